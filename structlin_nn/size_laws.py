"""Laws of runs in two sizes, model and data: one fit for all groups, and how a budget is split best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structlin.scaling_laws import (
    FLOPS,
    TERMS,
    Envelope,
    Estimate,
    IsoFlop,
    LossBootstrap,
    fit_envelope,
    fit_isoflop,
    fit_loss_law,
    lacks_sizes,
)
from structlin_nn.laws import for_each, plain, range_of
from structlin_nn.tables import Row, by_run, column

__all__ = ["SHARED", "allocations", "fit_sizes", "multipliers", "sizes_record"]

SHARED = ("E", "B", "beta")


def fit_sizes(
    groups: Mapping[str, Sequence[Row]],
    size: str,
    data: str,
    y: str,
    *,
    shared: Sequence[str] = SHARED,
    delta: float = 1e-3,
    samples: int = 1000,
    seed: int = 0,
    method: str = "residuals",
) -> tuple[LossBootstrap, dict[str, str]]:
    """Fit ``L = E + A / N**alpha + B / D**beta`` to all groups at once (approach 3 of Hoffmann et al. 2022).

    Parameters
    ----------
    groups
        Rows by label (:func:`structlin_nn.tables.group_rows`).
    size, data, y
        Columns of N, D and L.
    shared, delta
        Arguments of :func:`structlin.scaling_laws.fit_loss_law`.
    samples, seed, method
        Arguments of the bootstrap (:class:`structlin.scaling_laws.LossBootstrap`).

    Returns
    -------
    tuple[LossBootstrap, dict[str, str]]
        (bootstrap, left_out): the fit with its draws, and why groups are left out, by label. ValueError, with the
        reasons, if no group can be fitted.
    """
    own = [term for term in TERMS if term not in shared] if len(groups) > 1 else list(TERMS)

    def points(rows: Sequence[Row]) -> list[tuple[float, ...]]:
        values = [column(rows, c) for c in (size, data, y)]
        for c, numbers in zip((size, data, y), values, strict=True):
            if min(numbers) <= 0:
                raise ValueError(f"{c} must be positive, got {min(numbers):g}")
        if lacking := lacks_sizes(values[0], values[1], own):
            raise ValueError(lacking)
        return list(zip(*values, strict=True))

    found, left_out = for_each(groups, points)
    labels, n, d, loss = zip(*((name, *point) for name, own in found.items() for point in own), strict=True)
    fit = fit_loss_law(n, d, loss, groups=labels, shared=shared, delta=delta)
    return fit.bootstrap(samples, seed=seed, method=method), left_out


def multipliers(
    drawn: LossBootstrap, reference: str, *, loss: float | None = None, flops: float = FLOPS, confidence: float = 0.95
) -> dict[str, tuple[float, Estimate]]:
    """Return, for every other group, the loss at which it is compared and how much less compute it needs.

    `drawn` is a result of :func:`fit_sizes`. A `loss` of None is the lowest that points of both reach; `flops` are
    those of training for each unit of N and of D. ValueError for an unknown reference, or a loss that neither law
    reaches.
    """
    fit = drawn.fit
    if reference not in fit.laws:
        raise ValueError(f"there is no group {reference!r} to compare with; one of {', '.join(map(repr, fit.laws))}")
    lowest = {name: float(fit.loss[fit.group == number].min()) for number, name in enumerate(fit.laws)}
    found = {}
    for name in fit.laws:
        if name != reference:
            at = max(lowest[name], lowest[reference]) if loss is None else loss
            found[name] = at, drawn.multiplier(name, reference, loss=at, flops=flops, confidence=confidence)
    return found


def allocations(
    groups: Mapping[str, Sequence[Row]],
    size: str,
    data: str,
    y: str,
    *,
    approach: int,
    budgets: Sequence[float] | None = None,
    tolerance: float = 0.1,
    flops: float = FLOPS,
) -> tuple[dict[str, Envelope | IsoFlop], dict[str, str]]:
    """Return the best split of a budget for each group by approach 1 or 2 of Hoffmann et al. (2022).

    Approach 1 is the envelope of the curves: rows are all evaluations, with the column ``record`` of their run.
    Approach 2 is parabolas at equal compute, with `budgets` and `tolerance`
    (:func:`structlin.scaling_laws.fit_isoflop`). Other arguments and errors are those of :func:`fit_sizes` and
    :func:`multipliers`.
    """
    if approach not in (1, 2):
        raise ValueError(f"approach must be 1 or 2, got {approach}")

    def best(rows: Sequence[Row]) -> Envelope | IsoFlop:
        if approach == 1:
            return fit_envelope(_curves(rows, size, data, y), flops=flops)
        n, d, loss = (column(rows, c) for c in (size, data, y))
        compute = [flops * a * b for a, b in zip(n, d, strict=True)]
        return fit_isoflop(n, compute, loss, budgets=budgets, tolerance=tolerance, flops=flops)

    return for_each(groups, best)


def _curves(rows: Sequence[Row], size: str, data: str, y: str) -> list[tuple[float, list[float], list[float]]]:
    curves = []
    for lines in by_run(rows):
        points = [p for p in zip(column(lines, data), column(lines, y), strict=True) if p[0] > 0]
        if points:  # evaluations before the start have seen no data
            curves.append((column(lines, size)[0], [p[0] for p in points], [p[1] for p in points]))
    return curves


def sizes_record(
    drawn: LossBootstrap,
    left_out: Mapping[str, str],
    *,
    columns: tuple[str, str, str],
    budgets: Sequence[float] = (),
    reference: str | None = None,
    loss: float | None = None,
    flops: float = FLOPS,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the result of :func:`fit_sizes` as values that ``json.dumps`` takes (:func:`structlin_nn.laws.plain`)."""
    fit, groups = drawn.fit, {}
    common: dict[str, Any] = {"flops": flops, "confidence": confidence}
    for number, name in enumerate(fit.laws):
        own = fit.group == number
        groups[name] = {
            "points": int(own.sum()), "size_range": range_of(fit.params[own]), "data_range": range_of(fit.tokens[own]),
            "terms": {term: drawn.term(term, name, confidence) for term in TERMS},
            "optima": [{"compute": budget} | drawn.optimum(budget, name, **common) for budget in budgets],
            "allocation": drawn.allocation(name, confidence),
        }  # fmt: skip
    record: dict[str, Any] = {
        "size": columns[0], "data": columns[1], "y": columns[2], "shared": list(fit.shared), "delta": fit.delta,
        **common, "method": drawn.method, "objective": fit.objective, "agreement": fit.agreement,
        "notes": list(fit.notes), "left_out": dict(left_out), "groups": groups,
    }  # fmt: skip
    if reference is not None:
        found = multipliers(drawn, reference, loss=loss, **common)
        record["reference"] = reference
        record["multipliers"] = {name: {"loss": at} | plain(value) for name, (at, value) in found.items()}
    return plain(record)
