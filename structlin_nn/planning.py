"""Plans of models for a budget: the width or the rank that uses most of it, and the best of several choices.

Every candidate is counted on the meta device (:mod:`structlin_nn.counting`). No cost is an estimate such as 6 N.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlin
from structlin.planning import BudgetError, check_budget
from structlin_nn._planned import (
    RESOURCES,
    WIDEST,
    Choice,
    Costs,
    TooLargeError,
    device_of,
    largest_rank,
    number_of_factors,
    widest,
    widest_of,
)
from structlin_nn._text import check_integer, check_known, read_value
from structlin_nn.counting import Device
from structlin_nn.models import StructureConfig

__all__ = [
    "PREFERENCES", "RESOURCES", "UNITS", "ModelPlan", "best_plan", "iso_table", "parse_structure", "plan_model",
    "plan_models", "plan_of",
]  # fmt: skip

PREFERENCES = ("spent", "width", "params")
UNITS = {
    "macs": "MACs",
    "forward_macs": "MACs of the forward pass",
    "params": "parameters",
    "bytes": "bytes",
    "training_flops": "FLOPs of training",
    "step_seconds": "seconds for a step",
    "run_seconds": "seconds for the run",
}
"""Resources of models, and of layers (``macs``), in words."""


@dataclass(frozen=True)
class ModelPlan:
    """A model that fits into a budget.

    Attributes
    ----------
    structure, options
        Structure of its layers.
    depth
        Number of blocks; None for your own model if the depth was not chosen.
    planned
        What uses the budget, ``width`` or ``rank``; None if all choices were given.
    forward_macs
        MACs of one sample. Operations that are not products count with half their FLOPs.
    training_macs
        MACs of one sample in training, products only.
    params
        Number of trainable parameters.
    bytes
        Bytes of a training step of ``batch_size`` samples.
    training_flops
        FLOPs of training on ``samples`` samples, of all operations; None without ``samples``.
    step_seconds, run_seconds
        Minimum times of a step and of training on ``samples`` samples, by the roofline model; None without a device.
    share
        Used share of the budget, from 0 to 1; of several budgets, the largest share.
    next
        The next larger width or rank that can be built. It does not fit.
    """

    model: str
    structure: str
    options: dict[str, Any]
    width: int
    depth: int | None
    planned: str | None
    forward_macs: float
    training_macs: float
    params: int
    bytes: int
    training_flops: float | None
    step_seconds: float | None
    run_seconds: float | None
    share: float
    next: int | None


def plan_model(
    name: str,
    budget: float | Mapping[str, float],
    *,
    resource: str = "forward_macs",
    structure: str = "dense",
    options: Mapping[str, Any] | None = None,
    width: int | Sequence[int] | None = None,
    rank: int | Sequence[int] | None = None,
    cores: int | Sequence[int] | None = None,
    blocks: int | Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    multiple_of: int = 1,
    prefer: str = "spent",
    layers: str | None = None,
    rms_cap: bool = False,
    batch_size: int | None = None,
    samples: int | None = None,
    optimizer: str = "adam",
    dtype: str = "float32",
    activation_dtype: str | None = None,
    device: str | Device | None = None,
    **sizes: Any,
) -> ModelPlan:
    """Return the best choice of width, rank, cores, blocks and depth within a budget.

    Each of the five is one number, several numbers to choose from, or None. Every combination of several ranks, cores,
    blocks and depths is tried, each with the largest width that fits. Rank, cores, blocks and depth are those of the
    structure and the model by default. If one width is given and the structure has a rank, the largest rank that fits
    is searched.

    The candidates for the width are the given list, or all multiples of ``multiple_of``. Structures that split sizes
    into factors cost more at some widths than at larger ones. The search therefore starts with c-th powers (c factors),
    which split evenly. Then it tries all widths, from the largest: up to the third power above the last one that fits,
    and up to twice that one.

    Parameters
    ----------
    name
        One of :data:`structlin_nn.models.MODELS`, or ``package.module:function``. The function takes a width (and a
        ``depth``, if that is chosen) and returns a torch model that has ``example_input(batch)``, or (model, inputs).
        The structure replaces its linear layers but the last.
    budget
        Budget of the resource; or budgets by resource, which must all be met.
    resource
        ``forward_macs`` of one sample, trainable ``params``, ``bytes`` of a training step of ``batch_size`` samples
        (:func:`structlin_nn.counting.training_bytes`), ``training_flops`` of ``samples`` samples (forward and
        backward), or the minimum time on a device, of a step (``step_seconds``) or of ``samples`` samples
        (``run_seconds``), by :func:`structlin_nn.counting.roofline`. Times are lower bounds, not predictions.
    structure, options, layers, rms_cap
        Arguments of :class:`structlin_nn.models.StructureConfig`.
    width, rank, cores, blocks, depth
        Choices, see above.
    multiple_of
        The width is a multiple of this number.
    prefer
        The best combination: the one that has ``spent`` most of the budget, the largest ``width``, or most ``params``.
    batch_size, optimizer, dtype, activation_dtype
        Settings of a training step, for bytes and seconds.
    samples
        Number of samples of the run, for its FLOPs and seconds.
    device
        Device, for seconds (:func:`structlin_nn.counting.device`).
    **sizes
        Sizes of a named model.

    Raises
    ------
    BudgetError
        If every choice that can be built needs more than the budget.
    ValueError
        If an argument is wrong, no choice can be built, or even the largest width fits.

    Examples
    --------
    >>> plan = plan_model("cifar-mlp", 5e6, structure="monarch", options={"blocks": 4}, multiple_of=8)
    >>> plan.width, plan.forward_macs, round(plan.share, 2)
    (752, 4967712, 0.99)
    >>> plan = plan_model("cifar-mlp", 1e6, structure="block_tensor_train", width=256, cores=[2, 3], depth=[1, 2, 3])
    >>> plan.options, plan.depth, round(plan.share, 3)
    ({'cores': 2, 'rank': 6}, 2, 0.986)
    """
    budgets = _budgets(budget, resource, samples, device)
    for key, value in (("multiple_of", multiple_of), ("batch_size", batch_size), ("samples", samples)):
        if value is not None:
            check_integer(key, value)
    check_known("preference", prefer, PREFERENCES)
    fixed, known = dict(options or {}), structlin.structure_options(structure)
    lists: dict[str, list[int]] = {}
    for key, given in (("rank", rank), ("cores", cores), ("blocks", blocks), ("depth", depth)):
        if given is None:
            continue
        if key != "depth" and key not in known:
            raise ValueError(f"structure {structure!r} has no option {key!r} to choose")
        if key in fixed:
            raise ValueError(f"{key} is given twice: {fixed[key]!r} and {given!r}")
        lists[key] = _numbers(key, given)
    widths = None if width is None else _numbers("width", width)
    if widths and multiple_of > 1:
        raise ValueError("multiple_of is for widths that are searched, not for those that are given")
    by_rank = widths is not None and len(widths) == 1 and "rank" in known and "rank" not in lists
    by_rank = by_rank and not {"rank", "rank_fraction"} & fixed.keys()
    if widths is not None and len(widths) == 1 and not by_rank and all(len(v) == 1 for v in lists.values()):
        raise ValueError(f"at a given width the rank is planned, and {structure} {fixed or ''} leaves none to choose")
    StructureConfig(structure, fixed, layers=layers, rms_cap=rms_cap)
    costs = Costs(
        name, structure, fixed, sizes, layers, rms_cap, batch_size, samples, optimizer, dtype, activation_dtype,
        device_of(device, activation_dtype or dtype), full=not budgets.keys() <= {"forward_macs", "params"},
    )  # fmt: skip

    seen: dict[Choice, float | None] = {}

    def share(choice: Choice) -> float | None:
        found = costs.quick(choice)
        seen[choice] = None if found is None else max(found[r] / b for r, b in budgets.items())
        return seen[choice]

    def may_fit(choice: Choice) -> bool:
        """Return whether the lower bounds, which need no model, are within the budgets."""
        least = costs.least(choice)
        return least is not None and all(least[r] <= b for r, b in budgets.items())

    plans = []
    for chosen in itertools.product(*lists.values()):
        own = dict(zip(lists, chosen, strict=True))
        start = Choice(1, own.pop("depth", None), tuple(own.items()))
        try:
            if by_rank:
                assert widths is not None
                found, after = largest_rank(share, replace(start, width=widths[0]))
            elif widths is not None:
                found, after = widest_of(share, start, sorted(set(widths)))
            else:
                parts = number_of_factors(structure, fixed | own)
                found, after = widest(share, may_fit, start, multiple_of, parts)
        except TooLargeError:
            asked = " and ".join(f"{b:g} {UNITS[r]}" for r, b in budgets.items())
            raise ValueError(f"{name} with {structure} fits into {asked} at the largest width, {WIDEST:,}") from None
        if found is None:
            continue
        if any(not math.isclose(costs.measured(found)[r], costs.quick(found)[r]) for r in budgets):  # type: ignore[index]
            raise AssertionError(f"blocks of {name} differ in cost: {costs.measured(found)} and {costs.quick(found)}")
        planned = "rank" if by_rank else "width" if widths is None or len(widths) > 1 else None
        plans.append(plan_of(costs, found, budgets, planned, after))
    if plans:
        return best_plan(plans, prefer)
    built = {choice: spent for choice, spent in seen.items() if spent is not None}
    if not built:
        costs.measured(next(iter(seen), Choice(64)))  # raises the error of a choice that cannot be built
        raise ValueError(f"{name} with {structure} cannot be built at any of the widths")
    least = costs.quick(min(built, key=lambda choice: built[choice])) or {}
    over = max(budgets, key=lambda r: least[r] / budgets[r])
    raise BudgetError(f"{name} with {structure}", least[over], UNITS[over], budgets[over])


def plan_of(
    costs: Costs, choice: Choice, budgets: Mapping[str, float], planned: str | None, after: int | None
) -> ModelPlan:  # fmt: skip
    """Return the plan of a choice, counted in full."""
    counted = costs.measured(choice)
    return ModelPlan(
        costs.name, costs.structure, {**costs.options, **dict(choice.options)}, choice.width, costs.depth_of(choice),
        planned, **counted, share=max(counted[r] / b for r, b in budgets.items()), next=after,
    )  # fmt: skip


def best_plan(plans: Sequence[ModelPlan], prefer: str = "spent") -> ModelPlan:
    """Return the best plan, as ``prefer`` says; of equal ones the wider, then the one of more parameters."""
    check_known("preference", prefer, PREFERENCES)
    if not plans:
        raise ValueError("there are no plans to choose from")
    first = {"spent": lambda p: p.share, "width": lambda p: p.width, "params": lambda p: p.params}[prefer]
    return max(plans, key=lambda p: (first(p), p.width, p.params, p.share))


def _budgets(
    budget: float | Mapping[str, float], resource: str, samples: int | None, device: str | Device | None
) -> dict[str, float]:
    budgets = dict(budget) if isinstance(budget, Mapping) else {resource: budget}
    if not budgets:
        raise ValueError(f"a budget is needed, of {', '.join(RESOURCES)}")
    for key, value in budgets.items():
        check_known("resource", key, RESOURCES)
        check_budget(value, "the budget" if len(budgets) == 1 else f"the budget of {key}")
        if key in ("training_flops", "run_seconds") and samples is None:
            raise ValueError(f"a budget of {key} needs the number of samples of the run")
        if key in ("step_seconds", "run_seconds") and device is None:
            raise ValueError(f"a budget of {key} needs a device")
    return budgets


def _numbers(key: str, given: int | Sequence[int]) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    if not values:
        raise ValueError(f"there is no {key} to choose from")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive integer, or several, got {given!r}")
    return values


def plan_models(
    name: str, budget: float | Mapping[str, float], structures: Sequence[tuple[str, Mapping[str, Any]]], **settings: Any
) -> tuple[list[ModelPlan], dict[str, ValueError]]:
    """Return plans of several structures for one budget, and the errors of others, by ``name:option=value,...``.

    `structures` are pairs (name, options); other arguments are those of :func:`plan_model`. Ranks, cores and blocks to
    choose from apply to the structures that have them. ValueError for an error that concerns all structures.

    Examples
    --------
    >>> plans, left_out = plan_models("cifar-mlp", 1e6, [("dense", {}), ("block_tensor_train", {"rank": 2})])
    >>> [(p.structure, p.width) for p in plans], left_out
    ([('dense', 149), ('block_tensor_train', 495)], {})
    """
    _budgets(budget, settings.get("resource", "forward_macs"), settings.get("samples"), settings.get("device"))
    asked = {key: settings.pop(key) for key in ("rank", "cores", "blocks") if settings.get(key) is not None}
    for key in asked:
        if not any(key in structlin.structure_options(structure) for structure, _ in structures):
            raise ValueError(f"none of the structures has an option {key!r} to choose")
    # Measured once, if it is this machine.
    dtype = settings.get("activation_dtype") or settings.get("dtype", "float32")
    settings["device"] = device_of(settings.get("device"), dtype)
    plans: list[ModelPlan] = []
    left_out: dict[str, ValueError] = {}
    for structure, options in structures:
        StructureConfig(structure, options)
        known = structlin.structure_options(structure)
        own = {key: value for key, value in asked.items() if key in known and key not in options}
        try:
            plans.append(plan_model(name, budget, structure=structure, options=options, **own, **settings))
        except ValueError as error:
            left_out[_label(structure, options)] = error.with_traceback(None)  # the frames would be kept too
    return plans, left_out


def _label(structure: str, options: Mapping[str, Any]) -> str:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{structure}:{text}" if text else structure


def iso_table(
    name: str,
    budgets: Sequence[float],
    structures: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    resource: str = "forward_macs",
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return plans of several structures at several budgets: equal compute, or equal time for a resource of seconds.

    Arguments are those of :func:`plan_models`. The result has for each budget ``budget``, ``plans`` by structure and
    options as text (:func:`parse_structure`), and ``left_out`` with the errors.

    Examples
    --------
    >>> table = iso_table("cifar-mlp", [1e5, 1e6], [("dense", {}), ("low_rank", {"rank": 4})], depth=1)
    >>> [(row["budget"], {name: plan.width for name, plan in row["plans"].items()}) for row in table]
    [(100000.0, {'dense': 30, 'low_rank:rank=4': 1624}), (1000000.0, {'dense': 209, 'low_rank:rank=4': 18290})]
    """
    rows = []
    for budget in budgets:
        check_budget(budget)
    for budget in budgets:
        plans: dict[str, ModelPlan] = {}
        left_out: dict[str, ValueError] = {}
        for structure, options in structures:
            found, reasons = plan_models(name, budget, [(structure, options)], resource=resource, **settings)
            plans |= {_label(structure, options): plan for plan in found}
            left_out |= reasons
        rows.append({"budget": budget, "plans": plans, "left_out": left_out})
    return rows


def parse_structure(text: str) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of ``name:option=value,...``, or of the label of a fitted group.

    Raises ValueError for an option without a value.

    Examples
    --------
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
        found[pair[1]] = read_value(pair[2])
    return head, found
