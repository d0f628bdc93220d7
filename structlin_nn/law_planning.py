"""Plans from fitted laws: the cheapest structure for an error, and the lowest loss within a budget of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from structlin.planning import check_budget
from structlin.scaling_laws import LossLaw, PowerLaw
from structlin_nn._planned import WIDEST, Choice, Costs, device_of, nth_width, number_of_factors
from structlin_nn._text import check_known
from structlin_nn.counting import Device
from structlin_nn.planning import parse_structure, plan_model, plan_of

__all__ = ["plan_by_law", "plan_for_error"]

_LAW_COLUMNS = {"forward_macs": "forward_macs", "params": "params", "trainable_params": "params",
                "training_macs": "training_flops", "total_training_macs": "training_flops"}  # fmt: skip
_SIZES = {name: resource for name, resource in _LAW_COLUMNS.items() if resource in ("forward_macs", "params")}
_BUDGETS = ("run_seconds", "training_flops")
_GRID = 16  # number of widths on either side of the best one that a refinement tries


def plan_for_error(name: str, laws: Mapping[str, Any], error: float, **settings: Any) -> list[dict[str, Any]]:
    """Return the structure that needs the least compute for an error, by fitted laws, and the model that uses it.

    Parameters
    ----------
    name
        Name of the model that the laws were fitted to.
    laws
        A record of ``structlin fit --json`` (:func:`structlin_nn.laws.laws_record`). The compute is ``forward_macs``,
        ``params``, ``training_macs`` or ``total_training_macs``. The groups are structures, which may have options
        ("monarch, blocks 4").
    error
        The target.
    **settings
        Arguments of :func:`structlin_nn.planning.plan_model`; ``samples`` for training compute.

    Returns
    -------
    list[dict[str, Any]]
        For each group, in ascending order of compute: ``group``, ``compute``, ``extrapolated`` and ``plan``. Compute
        and plan are None if the law never reaches the error.
    """
    resource = _LAW_COLUMNS.get(laws.get("x", ""))
    if resource is None:
        raise ValueError(f"laws in {laws.get('x')!r} give no budget; fit laws in one of {', '.join(_LAW_COLUMNS)}")
    if not error > 0:
        raise ValueError(f"the error must be positive, got {error}")
    rows = []
    for group, fitted in laws["groups"].items():
        law = PowerLaw(fitted["log_coefficient"], fitted["exponent"]["value"], fitted["floor"]["value"])
        compute = law.compute(error) if law.exponent > 0 else float("inf")
        low, high = fitted["compute_range"]
        row: dict[str, Any] = {
            "group": group, "compute": None, "extrapolated": not low <= compute <= high, "plan": None
        }  # fmt: skip
        if compute < float("inf"):
            structure, options = parse_structure(group)
            budget = 2 * compute if resource == "training_flops" else compute
            plan = plan_model(name, budget, resource=resource, structure=structure, options=options, **settings)
            row |= {"compute": compute, "plan": plan}
        rows.append(row)
    return sorted(rows, key=lambda row: float("inf") if row["compute"] is None else row["compute"])


def plan_by_law(
    name: str,
    laws: Mapping[str, Any],
    budget: float,
    *,
    resource: str = "run_seconds",
    device: str | Device | None = None,
    batch_size: int = 1,
    multiple_of: int = 1,
    layers: str | None = None,
    rms_cap: bool = False,
    optimizer: str = "adam",
    dtype: str = "float32",
    activation_dtype: str | None = None,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Return the structure, width and number of samples of the lowest loss that a law in two sizes predicts.

    A wider model takes more time for a sample, so a run of the same time has fewer samples D. For each structure of
    the laws, the width with the lowest ``L(N, D)`` is searched. N and the cost of a sample are counted. The search
    doubles the width until the loss rises. It then refines around the lowest loss, 33 widths at a time, down to
    neighbouring widths. For structures of c factors, only c-th powers are tried, which split evenly.

    Parameters
    ----------
    laws
        A record of ``structlin fit --size forward_macs --data samples --json``
        (:func:`structlin_nn.laws.sizes_record`), or with the size ``params``; groups as for
        :func:`plan_for_error`.
    budget, resource
        Budget of the whole run: ``run_seconds`` on a device, by the roofline model, or ``training_flops``.
    batch_size
        Samples of a step. A run has at least one step.
    name, device, multiple_of, layers, rms_cap, optimizer, dtype, activation_dtype, **sizes
        Arguments of :func:`structlin_nn.planning.plan_model`.

    Returns
    -------
    list[dict[str, Any]]
        For each group, in ascending order of the loss: ``group``, ``loss``, ``samples``, ``extrapolated`` (N or D is
        outside of the fitted points) and ``plan``. If no model fits, the last four are None, and ``reason`` says why.
    """
    size = _SIZES.get(laws.get("size", ""))
    if size is None or laws.get("data") != "samples":
        raise ValueError(
            f"laws in {laws.get('size')!r} and {laws.get('data')!r} give no width and no samples; "
            f"fit laws in one of {', '.join(_SIZES)}, and in samples"
        )
    check_known("resource", resource, _BUDGETS)
    check_budget(budget)
    if resource == "run_seconds" and device is None:
        raise ValueError(f"a budget of {resource} needs a device")
    device = device_of(device, activation_dtype or dtype)
    rows = []
    for group, fitted in laws["groups"].items():
        law = LossLaw(**{term: _finite(group, term, value["value"]) for term, value in fitted["terms"].items()})
        structure, options = parse_structure(group)
        costs = Costs(
            name, structure, options, sizes, layers, rms_cap, batch_size, 1, optimizer, dtype, activation_dtype, device
        )
        row: dict[str, Any] = {"group": group, "loss": None, "samples": None, "extrapolated": None, "plan": None}
        found = _lowest(
            _predicted(costs, law, size, resource, budget), multiple_of, number_of_factors(structure, options)
        )
        if found is None:
            rows.append(row | {"reason": f"no width of {name} trains for one step within the budget"})
            continue
        width, (loss, n, samples) = found
        whole = replace(costs, samples=samples, _known={}, _layers={})
        plan = plan_of(whole, Choice(width), {resource: budget}, "width", None)
        ranges = ((n, fitted["size_range"]), (samples, fitted["data_range"]))
        outside = any(not low <= value <= high for value, (low, high) in ranges)
        rows.append(row | {"loss": loss, "samples": samples, "extrapolated": outside, "plan": plan})
    return sorted(rows, key=lambda row: math.inf if row["loss"] is None else row["loss"])


Predicted = tuple[float, float, int]


def _predicted(
    costs: Costs, law: LossLaw, size: str, resource: str, budget: float
) -> Callable[[int], Predicted | None]:  # fmt: skip
    """Return a function of the width: loss, N and samples of a run that uses the budget, or None if none fits."""

    @cache
    def of(width: int) -> Predicted | None:
        counted = costs.quick(Choice(width))
        if counted is None:
            return None
        batch = costs.batch_size or 1
        samples = int(budget / (counted[resource] * batch)) * batch
        return (law(counted[size], samples), counted[size], samples) if samples else None

    return of


def _lowest(
    of: Callable[[int], Predicted | None], multiple_of: int, parts: int
) -> tuple[int, Predicted] | None:  # fmt: skip
    """Return the width of the lowest loss, of a loss that falls and then rises with the width."""
    best: tuple[int, Predicted] | None = None
    at = 1

    def attempt(numbers: range) -> None:
        nonlocal best, at
        for n in numbers:
            width = nth_width(n, multiple_of, parts)
            found = of(width)
            if found is not None and (best is None or found[0] < best[1][0]):
                best, at = (width, found), n

    n = 1
    while nth_width(n, multiple_of, parts) <= WIDEST and (best is None or n <= 8 * at):
        attempt(range(n, n + 1))
        n *= 2
    step = max(at // _GRID, 1)
    while True:
        attempt(range(max(at - _GRID * step, 1), at + _GRID * step + 1, step))
        if step == 1:
            return best
        step = max(step // 8, 1)


def _finite(group: str, term: str, value: float | str | None) -> float:
    if not isinstance(value, float | int):
        raise ValueError(f"the law of {group} has no finite {term}, got {value!r}; fit it to more runs")
    return float(value)
