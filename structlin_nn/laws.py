"""Scaling laws of groups of runs: one fit for each group, or one of all in two sizes, compared with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from structlin.scaling_laws import (
    Bootstrap,
    Estimate,
    PowerLawFit,
    compare_exponents,
    compute_multiplier,
    fit_power_law,
    interpolated_multiplier,
)
from structlin.scaling_laws import pareto_frontier as frontier_of
from structlin_nn.tables import Row, column

__all__ = ["GroupLaw", "compare_laws", "comparisons_record", "fit_groups", "laws_record"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class GroupLaw:
    """The law of one group of ``points`` runs.

    ``bootstrap`` is None if there are too few points to estimate the residuals.
    """

    fit: PowerLawFit
    bootstrap: Bootstrap | None
    points: int

    @property
    def used(self) -> int:
        """Number of fitted points."""
        return len(self.fit.compute)

    def term(self, name: str, confidence: float = 0.95) -> Estimate | dict[str, float]:
        """Return ``exponent``, ``coefficient`` or ``floor`` with its interval; without a bootstrap, its value alone."""
        if self.bootstrap is None:
            return {"value": getattr(self.fit.law, name)}
        return getattr(self.bootstrap, name)(confidence)


def fit_groups(
    groups: Mapping[str, Sequence[Row]],
    x: str,
    y: str,
    *,
    frontier: bool = False,
    floor: bool | float = False,
    loss: str = "soft_l1",
    samples: int = 1000,
    seed: int = 0,
    method: str = "parametric",
    noise: float | None = None,
) -> tuple[dict[str, GroupLaw], dict[str, str]]:
    """Fit a law to each group, and say why others have none.

    Parameters
    ----------
    groups
        Rows by label (:func:`structlin_nn.tables.group_rows`).
    x, y
        Columns of compute and of error.
    frontier
        Fit only the points that no other point of the group beats.
    floor, loss
        Arguments of :func:`structlin.scaling_laws.fit_power_law`.
    samples, seed, method, noise
        Arguments of the bootstrap (:class:`structlin.scaling_laws.Bootstrap`).

    Returns
    -------
    tuple[dict[str, GroupLaw], dict[str, str]]
        (laws, left_out) by label, the latter with reasons. ValueError, with the reasons, if no group can be fitted.

    Examples
    --------
    >>> rows = [{"macs": c, "error": 2 * c**-0.1} for c in (1e6, 1e7, 1e8)]
    >>> laws, left_out = fit_groups({"dense": rows, "monarch": rows[:1]}, "macs", "error")
    >>> round(laws["dense"].fit.law.exponent, 4), left_out
    (0.1, {'monarch': 'a law of 2 parameters needs at least 2 different values of compute, got 1'})
    """

    def law(rows: Sequence[Row]) -> GroupLaw:
        compute, error = column(rows, x), column(rows, y)
        if frontier:
            kept = frontier_of(compute, error)
            compute, error = ([values[i] for i in kept] for values in (compute, error))
        fit = fit_power_law(compute, error, floor=floor, loss=loss)
        drawn = None
        if len(compute) > fit.free_parameters or noise is not None:
            drawn = fit.bootstrap(samples, seed=seed, method=method, noise=noise)
        return GroupLaw(fit, drawn, len(rows))

    return for_each(groups, law)


def for_each(
    groups: Mapping[str, Sequence[Row]], fit: Callable[[Sequence[Row]], Result]
) -> tuple[dict[str, Result], dict[str, str]]:
    """Return what `fit` returns for each group, and its error for others; ValueError if there is no result."""
    found, left_out = {}, {}
    for name, rows in groups.items():
        try:
            found[name] = fit(rows)
        except ValueError as problem:
            left_out[name] = str(problem)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(reasons or "there are no groups")
    return found, left_out


def compare_laws(
    laws: Mapping[str, GroupLaw], reference: str, *, error: float | None = None, confidence: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Compare every other law with a reference: exponents, and how many times less compute at equal error.

    Returns for each name ``exponent_difference`` and ``multiplier`` (of the laws), ``interpolated`` (the multiplier
    between the points, without a law, with an interval where the noise is known), each None where there is none,
    and ``notes`` that say why.

    Raises ValueError for an unknown reference.
    """
    if reference not in laws:
        raise ValueError(f"there is no group {reference!r} to compare with; one of {', '.join(map(repr, laws))}")
    base = laws[reference].bootstrap
    found: dict[str, dict[str, Any]] = {}
    for name, law in laws.items():
        if name == reference:
            continue
        row: dict[str, Any] = {"exponent_difference": None, "multiplier": None, "interpolated": None, "notes": []}
        if base is None or law.bootstrap is None:
            row["notes"].append("too few points for intervals of the law; --noise states the noise of an error")
        else:
            row["exponent_difference"] = compare_exponents(law.bootstrap, base, confidence)
            try:
                row["multiplier"] = compute_multiplier(law.bootstrap, base, error, confidence)
            except ValueError as problem:
                row["notes"].append(str(problem))
        ours, theirs = ((each.fit.compute, each.fit.error) for each in (law, laws[reference]))
        draws: dict[str, Any] = {}
        if law.bootstrap is not None and law.bootstrap.noise is not None:
            drawn = law.bootstrap
            draws = {"noise": drawn.noise, "samples": len(drawn.draws), "seed": drawn.seed}
        try:
            row["interpolated"] = interpolated_multiplier(ours, theirs, error, confidence=confidence, **draws)
        except ValueError as problem:
            row["notes"].append(f"no interpolation: {problem}")
        found[name] = row
    return found


def laws_record(
    laws: Mapping[str, GroupLaw], x: str, y: str, *, reference: str | None = None, error: float | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:  # fmt: skip
    """Return laws and comparisons as values that ``json.dumps`` takes (:func:`plain`)."""
    groups = {}
    for name, law in laws.items():
        fit = law.fit
        row: dict[str, Any] = {
            "points": law.points, "fitted_points": law.used, "log_coefficient": fit.law.log_coefficient,
            **{term: law.term(term, confidence) for term in ("exponent", "coefficient", "floor")},
            "r_squared": fit.r_squared, "notes": list(fit.notes), "compute_range": range_of(fit.compute),
            "error_range": range_of(fit.error),
        }  # fmt: skip
        if error is not None and fit.law.exponent > 0:
            needed = law.bootstrap.compute(error, confidence) if law.bootstrap else {"value": fit.law.compute(error)}
            row["compute_at_error"] = needed
        groups[name] = row
    record: dict[str, Any] = {"x": x, "y": y, "confidence": confidence, "error": error, "groups": groups}
    if reference is not None:
        record["reference"] = reference
        record["comparisons"] = compare_laws(laws, reference, error=error, confidence=confidence)
    return plain(record)


def comparisons_record(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the result of :func:`compare_laws` as values that ``json.dumps`` takes."""
    return plain(compared)


def range_of(values: Any) -> list[float]:
    """Return the smallest and the largest of some values."""
    return [float(values.min()), float(values.max())]


def plain(value: Any) -> Any:
    """Return estimates as dictionaries, NaN as None and infinity as the string "inf", in containers too.

    Examples
    --------
    >>> plain({"alpha": Estimate(0.1, 0.05, math.inf, 0.95), "floor": math.nan})
    {'alpha': {'value': 0.1, 'low': 0.05, 'high': 'inf'}, 'floor': None}
    """
    if isinstance(value, Estimate):
        names = ("value", "low", "high", "error", "extrapolated")
        value = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    return value
