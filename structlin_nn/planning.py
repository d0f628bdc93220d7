"""What fits into a budget: the width or the rank of a named model that spends it, structure by structure.

Every candidate is counted on the meta device (:mod:`structlin_nn.counting`): nothing is estimated from 6 N.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from structlin.planning import largest_within
from structlin_nn.counting import count, training_bytes
from structlin_nn.counting._named import loss_of
from structlin_nn.models import MODELS, StructureConfig, build_model

__all__ = ["RESOURCES", "ModelPlan", "parse_structure", "plan_for_error", "plan_model", "plan_models", "plans_record"]

RESOURCES = ("forward_macs", "params", "bytes", "training_flops")
_SPLIT = ("kronecker", "tensor_train", "block_tensor_train")  # into factors, best at powers of a number
_LAW_COLUMNS = {"forward_macs": "forward_macs", "params": "params", "trainable_params": "params",
                "training_macs": "training_flops", "total_training_macs": "training_flops"}  # fmt: skip


@dataclass(frozen=True)
class ModelPlan:
    """A model that fits into a budget.

    Attributes:
        model: its name.
        structure: of its layers.
        options: of the structure.
        width: of the model.
        planned: ``width`` or ``rank``.
        forward_macs: of one sample.
        training_macs: of one sample.
        params: trainable ones.
        bytes: of a training step of ``batch_size`` samples.
        training_flops: of ``samples`` samples; None where they were not given.
        share: of the budget, from 0 to 1.
        next: what the next larger candidate would be.
    """

    model: str
    structure: str
    options: dict[str, Any]
    width: int
    planned: str
    forward_macs: int
    training_macs: int
    params: int
    bytes: int
    training_flops: int | None
    share: float
    next: int


def plan_model(
    name: str,
    budget: float,
    *,
    resource: str = "forward_macs",
    structure: str = "dense",
    options: Mapping[str, Any] | None = None,
    width: int | None = None,
    multiple_of: int = 1,
    any_width: bool = False,
    layers: str | None = None,
    rms_cap: bool = False,
    batch_size: int = 1,
    samples: int | None = None,
    optimizer: str = "adam",
    dtype: str = "float32",
    activation_dtype: str | None = None,
    **sizes: Any,
) -> ModelPlan:
    """The largest width of a model within a budget, or with a given width the largest rank.

    Kronecker, Tensor-Train and Block Tensor-Train of c cores are planned at widths that are powers of c (squares for
    two), where they split evenly and their cost rises with the width.

    Args:
        name: one of :data:`structlin_nn.models.MODELS`.
        budget: of the resource.
        resource: ``forward_macs`` of one sample, trainable ``params``, ``bytes`` of a training step of ``batch_size``
            samples (:func:`structlin_nn.counting.training_bytes`), or ``training_flops`` of ``samples`` samples
            (products, forward and backward).
        structure, options, layers, rms_cap: as :class:`structlin_nn.models.StructureConfig`.
        width: plan the rank at this width.
        multiple_of: of which the width has to be a multiple.
        any_width: take all such widths, not only powers; the largest one found may then not be the largest there is,
            because an uneven split costs more.
        batch_size, optimizer, dtype, activation_dtype: for the bytes.
        samples: of the run, for its FLOPs.
        **sizes: sizes of the model.

    Raises:
        ValueError: an unknown name, resource, structure or option; a budget that is not positive or that nothing fits
            into; training FLOPs without samples; a rank to plan for a structure that has none.

    >>> plan = plan_model("cifar-mlp", 5e6, structure="monarch", options={"blocks": 4}, multiple_of=8)
    >>> plan.width, plan.forward_macs, round(plan.share, 2)
    (752, 4967712, 0.99)
    """
    if resource not in RESOURCES:
        raise ValueError(f"unknown resource {resource!r}; one of {', '.join(RESOURCES)}")
    if not budget > 0:
        raise ValueError(f"the budget must be positive, got {budget}")
    if resource == "training_flops" and samples is None:
        raise ValueError("a budget of training FLOPs needs the number of samples of the run")
    for key, value in (("multiple_of", multiple_of), ("batch_size", batch_size), ("samples", samples)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} must be a positive integer, got {value!r}")
    fixed = dict(options or {})
    config = StructureConfig(structure, fixed, layers=layers, rms_cap=rms_cap)
    import structlin

    known = structlin.options(structure)
    if width is not None and ("rank" not in known or {"rank", "rank_fraction"} & fixed.keys()):
        raise ValueError(f"at a given width the rank is planned, and {structure} {fixed or ''} leaves none to choose")
    spec = MODELS.get(name)
    full_depth = sizes.get("depth", spec.config(width=256, **spec.sizes).depth if spec else None)

    @cache
    def measured(width: int, rank: int | None, depth: int | None) -> dict[str, int]:
        chosen = config if rank is None else StructureConfig(
            structure, {**fixed, "rank": rank}, layers=layers, rms_cap=rms_cap
        )  # fmt: skip
        model = build_model(name, width=width, structure=chosen, device="meta", **{**sizes, "depth": depth})
        counted = count(model, model.example_input(device="meta"))
        step = counted if batch_size == 1 else count(model, model.example_input(batch_size, device="meta"))
        held = training_bytes(
            step, loss=loss_of(model, batch_size), optimizer=optimizer, dtype=dtype, activation_dtype=activation_dtype
        )
        return {
            "forward_macs": counted.macs(), "training_macs": counted.training_macs, "params": counted.trainable_params,
            "bytes": held["total"], "training_flops": 2 * counted.training_macs * (samples or 0),
        }  # fmt: skip

    def cost(width: int, rank: int | None) -> int:
        if full_depth is None or full_depth < 4:
            return measured(width, rank, full_depth)[resource]
        # All blocks cost the same; what is chosen in the end is counted in full.
        one, two = (measured(width, rank, depth)[resource] for depth in (1, 2))
        return one + (full_depth - 1) * (two - one)

    if width is None:
        cores = 1 if any_width or structure not in _SPLIT else fixed.get("cores", known["cores"])
        planned, candidate = "width", lambda n: _candidate(n, multiple_of, cores)
        number = _largest_width(lambda n: cost(candidate(n), None), budget)
    else:
        cost(width, 1)
        planned, candidate = "rank", lambda n: n
        number = largest_within(lambda n: _or_none(cost, width, n), budget)
    if number is None:
        least = f"{cost(width, 1):,}" if width is not None else f"{_first(lambda n: cost(candidate(n), None)):,}"
        raise ValueError(f"{name} with {structure} needs at least {least} {resource}, the budget is {budget:,.0f}")
    final = (candidate(number), None) if width is None else (width, number)
    found = measured(*final, full_depth)
    if found[resource] != cost(*final):
        raise AssertionError(f"blocks of {name} differ in cost: {found[resource]} against {cost(*final)}")
    return ModelPlan(
        name, structure, fixed if width is None else {**fixed, "rank": number}, final[0], planned,
        found["forward_macs"], found["training_macs"], found["params"], found["bytes"],
        found["training_flops"] if samples else None, found[resource] / budget, candidate(number + 1),
    )  # fmt: skip


def _candidate(n: int, multiple_of: int, cores: int) -> int:
    """The n-th width: multiples, or for several cores the powers that are multiples."""
    if cores == 1:
        return n * multiple_of
    root = next(k for k in range(1, multiple_of + 1) if k**cores % multiple_of == 0)
    return (root * (n + (root == 1))) ** cores  # 1 cannot be split


def _or_none(cost: Any, *arguments: Any) -> int | None:
    try:
        return cost(*arguments)
    except ValueError:
        return None


def _first(cost: Any) -> int:
    """The cost of the smallest width that can be built; the last error where none of the first can."""
    for n in range(1, 64):
        if (found := _or_none(cost, n)) is not None:
            return found
    return cost(64)


def _largest_width(cost: Any, budget: float) -> int | None:
    """As `largest_within`, but over widths of which some cannot be built, small ones in particular."""
    start = next((n for n in range(1, 64) if _or_none(cost, n) is not None), None)
    if start is None:
        cost(64)
        return None

    def down(n: int, least: int) -> int:
        """The nearest width from n downwards that can be built."""
        return next(k for k in range(n, least - 1, -1) if k == least or _or_none(cost, k) is not None)

    if cost(start) > budget:
        return None
    low, high = start, 2 * start
    while True:
        found = _or_none(cost, high)
        if found is None:
            high += 1
        elif found > budget:
            break
        else:
            low, high = high, 2 * high
    while high - low > 1:
        middle = down((low + high) // 2, low)
        if middle == low:
            # Nothing below the middle can be built: go on above it.
            above = next((k for k in range((low + high) // 2 + 1, high) if _or_none(cost, k) is not None), None)
            if above is None:
                break
            middle = above
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def plan_models(
    name: str, budget: float, structures: Sequence[tuple[str, Mapping[str, Any]]], **settings: Any
) -> tuple[list[ModelPlan], dict[str, str]]:
    """Plans of several structures for one budget (iso-FLOP, for one of compute), and why others have none.

    Args:
        name: as :func:`plan_model`, like all further settings.
        budget: as :func:`plan_model`.
        structures: (name, options) of each.

    >>> plans, left_out = plan_models("cifar-mlp", 1e6, [("dense", {}), ("block_tensor_train", {"rank": 2})])
    >>> [(p.structure, p.width) for p in plans], left_out
    ([('dense', 149), ('block_tensor_train', 484)], {})
    """
    plans, left_out = [], {}
    for structure, options in structures:
        StructureConfig(structure, options)
        try:
            plans.append(plan_model(name, budget, structure=structure, options=options, **settings))
        except ValueError as error:
            left_out[structure] = str(error)
    return plans, left_out


def parse_structure(text: str) -> tuple[str, dict[str, Any]]:
    """``name`` or ``name:option=value,...`` as (name, options), and the labels of fitted groups.

    Raises ValueError for an option without a value.

    >>> parse_structure("block_tensor_train:rank=2,factorization=greedy")
    ('block_tensor_train', {'rank': 2, 'factorization': 'greedy'})
    >>> parse_structure("monarch, blocks 4")
    ('monarch', {'blocks': 4})
    """
    head, *rest = re.split(r"[:,]\s*", text.strip())
    found: dict[str, Any] = {}
    for part in rest:
        pair = re.fullmatch(r"(\w+)(?:=| )(.+)", part.strip())
        if pair is None:
            raise ValueError(f"an option of a structure must be NAME=VALUE, got {part!r} in {text!r}")
        found[pair[1]] = _number(pair[2])
    return head, found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def plan_for_error(name: str, laws: Mapping[str, Any], error: float, **settings: Any) -> list[dict[str, Any]]:
    """The cheapest structure for a target error: compute from fitted laws, and the model that spends it.

    Args:
        name: of the model that the laws are of.
        laws: a record of ``structlin fit --json`` (:func:`structlin_nn.laws.laws_record`), whose compute is
            ``forward_macs``, ``params``, ``training_macs`` or ``total_training_macs``, and whose groups are
            structures, with options if need be ("monarch, blocks 4").
        error: the target.
        **settings: as :func:`plan_model`; ``samples`` for training compute.

    Returns:
        For each group, the cheapest first, ``group``, ``compute`` (None where the law never reaches the error),
        ``extrapolated`` and ``plan`` (None likewise).

    Raises:
        ValueError: laws of another compute; an error that is not positive; as :func:`plan_model`.
    """
    from structlin.scaling import PowerLaw

    resource = _LAW_COLUMNS.get(laws.get("x", ""))
    if resource is None:
        raise ValueError(f"laws of {laws.get('x')!r} give no budget; one of {', '.join(_LAW_COLUMNS)}")
    if not error > 0:
        raise ValueError(f"the error must be positive, got {error}")
    rows = []
    for group, fitted in laws["groups"].items():
        law = PowerLaw(fitted["log_coefficient"], fitted["exponent"]["value"], fitted["floor"]["value"])
        compute = law.compute(error) if law.exponent > 0 else float("inf")
        low, high = fitted["compute_range"]
        row: dict[str, Any] = {
            "group": group,
            "compute": None,
            "extrapolated": not low <= compute <= high,
            "plan": None,
        }
        if compute < float("inf"):
            structure, options = parse_structure(group)
            budget = 2 * compute if resource == "training_flops" else compute
            plan = plan_model(name, budget, resource=resource, structure=structure, options=options, **settings)
            row |= {"compute": compute, "plan": plan}
        rows.append(row)
    return sorted(rows, key=lambda row: float("inf") if row["compute"] is None else row["compute"])


def plans_record(plans: Sequence[ModelPlan]) -> list[dict[str, Any]]:
    """Plans as plain values that ``json.dumps`` takes."""
    return [asdict(plan) for plan in plans]
