"""Scaling laws of groups of runs: one fit for each group, or one of all in two sizes, compared with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from structlin import scaling_laws
from structlin.scaling_laws import FLOPS, TERMS, Bootstrap, Envelope, Estimate, IsoFlop, LossBootstrap, PowerLawFit
from structlin_nn.tables import Row, by_run, column

__all__ = ["GroupLaw", "compare_laws", "fit_groups", "fitted_record", "laws_record"]

Result = TypeVar("Result")
TIME = "training_seconds"


@dataclass(frozen=True)
class GroupLaw:
    """The law of one group of ``points`` runs.

    ``bootstrap`` is None if there are too few points to estimate the residuals.
    """

    fit: PowerLawFit
    bootstrap: Bootstrap | None
    points: int

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
    samples, method, noise
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
            kept = scaling_laws.pareto_frontier(compute, error)
            compute, error = ([values[i] for i in kept] for values in (compute, error))
        fit = scaling_laws.fit_power_law(compute, error, floor=floor, loss=loss)
        drawn = None
        if len(compute) > fit.free_parameters or noise is not None:
            drawn = fit.bootstrap(samples, method=method, noise=noise)
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
    check_reference(reference, laws)
    base = laws[reference]
    found: dict[str, dict[str, Any]] = {}
    for name, law in laws.items():
        if name == reference:
            continue
        row: dict[str, Any] = {"exponent_difference": None, "multiplier": None, "interpolated": None, "notes": []}
        draws: dict[str, Any] = {}
        if law.bootstrap is not None and law.bootstrap.noise is not None:
            draws = {"noise": law.bootstrap.noise, "samples": len(law.bootstrap.draws), "seed": law.bootstrap.seed}
        if base.bootstrap is None or law.bootstrap is None:
            row["notes"].append("too few points for intervals of the law; --noise states the noise of an error")
        else:
            row["exponent_difference"] = scaling_laws.compare_exponents(law.bootstrap, base.bootstrap, confidence)
            try:
                row["multiplier"] = scaling_laws.compute_multiplier(law.bootstrap, base.bootstrap, error, confidence)
            except ValueError as problem:
                row["notes"].append(str(problem))
        ours, theirs = ((each.fit.compute, each.fit.error) for each in (law, base))
        try:
            row["interpolated"] = scaling_laws.interpolated_multiplier(
                ours, theirs, error, confidence=confidence, **draws
            )
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
            "points": law.points, "fitted_points": len(fit.compute), "log_coefficient": fit.law.log_coefficient,
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


def fitted_record(
    groups: Mapping[str, Sequence[Row]], x: str, y: str, *, reference: str | None = None, error: float | None = None,
    confidence: float = 0.95, **fit: Any,
) -> tuple[dict[str, GroupLaw], dict[str, Any]]:  # fmt: skip
    """Fit groups, compare them with a reference, and if all rows have the seconds of training, by time too.

    A `reference` of None is dense, if there is such a group among others. `fit` are arguments of :func:`fit_groups`,
    and the others those of :func:`laws_record`. Returns the laws, and the record with the reasons of groups that are
    ``left_out`` and with ``comparisons_by_time``. ValueError if no group, or not the reference, can be fitted.
    """
    laws, left_out = fit_groups(groups, x, y, **fit)
    if reference in left_out:
        raise ValueError(f"{reference} cannot be fitted: {left_out[reference]}")
    reference = reference or default_reference(laws)
    at: dict[str, Any] = {"error": error, "confidence": confidence}
    record = laws_record(laws, x, y, reference=reference, **at) | {"left_out": left_out}
    if reference and x != TIME and all(row.get(TIME) for rows in groups.values() for row in rows):
        try:
            by_time, without = fit_groups(groups, TIME, y, **fit)
        except ValueError as problem:
            by_time, without = {}, {"all groups": str(problem)}
        left_out |= {f"{name} by time": reason for name, reason in without.items()}
        if reference in by_time and (timed := compare_laws(by_time, reference, **at)):
            record["comparisons_by_time"] = plain(timed)
    return laws, record


def check_reference(reference: str, groups: Collection[str]) -> None:
    """Raise ValueError for a group to compare with that is not there."""
    if reference not in groups:
        raise ValueError(f"there is no group {reference!r} to compare with; one of {', '.join(map(repr, groups))}")


def default_reference(laws: Mapping[str, Any]) -> str | None:
    """Return the group to compare with if none is given: dense, if there are others."""
    return "dense" if "dense" in laws and len(laws) > 1 else None


# Records as tables: the head, and the rows as text.

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def laws_table(record: Mapping[str, Any], floor: bool) -> Table:
    """Return the laws of a record of :func:`laws_record`, with their irreducible errors if ``floor``."""
    rows = []
    for name, law in record["groups"].items():
        used, points = law["fitted_points"], law["points"]
        numbers = [value_text(law["exponent"], ".4f"), interval_text(law["exponent"]), value_text(law["coefficient"])]
        numbers += [value_text(law["floor"])] * floor
        rows.append((name, f"{used} of {points}" if used != points else f"{used}", *numbers, f"{law['r_squared']:.4f}"))
    return ("group", "points", "alpha", "interval", "a", *["floor"] * floor, "R2"), rows


def comparisons_table(compared: Mapping[str, Mapping[str, Any]], what: str) -> Table:
    """Return the comparisons of a record; ``what`` is saved, compute or time."""
    rows = []
    for name, row in compared.items():
        difference, law, points = row["exponent_difference"], row["multiplier"], row["interpolated"]
        extrapolated = " extrapolated" if law and law["extrapolated"] else ""
        rows.append(
            (
                name, value_text(difference, "+.4f"), interval_text(difference),
                f"{(law or points)['error']:.4g}" if law or points else "-",
                value_text(law, ".3g", f" x{extrapolated}"), interval_text(law), value_text(points, ".3g", " x"),
                interval_text(points),
            )
        )  # fmt: skip
    return ("group", "alpha", "interval", "at error", f"less {what} (law)", "interval", "(points)", "interval"), rows


def sizes_table(record: Mapping[str, Any]) -> Table:
    """Return the laws of a record of :func:`sizes_record`."""
    rows = [
        (name, str(law["points"]), *map(estimate_text, law["terms"].values()), estimate_text(law["allocation"]))
        for name, law in record["groups"].items()
    ]
    return ("group", "points", *TERMS, "a of N_opt ~ C^a"), rows


def multipliers_table(record: Mapping[str, Any]) -> Table:
    """Return the comparison of a record of :func:`sizes_record` with its reference."""
    rows = [
        (name, f"{row['loss']:.4g}", value_text(row, ".3g", " x"), interval_text(row, ".3g"))
        for name, row in record["multipliers"].items()
    ]
    return ("group", f"at {record['y']}", "less compute", "interval"), rows


def value_text(estimate: Any, form: str = ".4g", unit: str = "") -> str:
    """Return the value of an estimate of a record (:func:`plain`)."""
    known = estimate and estimate["value"] is not None
    return f"{float(estimate['value']):{form}}{unit}" if known else "-"


def interval_text(estimate: Any, form: str = ".4g") -> str:
    """Return the interval of an estimate of a record."""
    if not estimate or estimate.get("low") is None:
        return "-"
    return f"[{float(estimate['low']):{form}}, {float(estimate['high']):{form}}]"


def estimate_text(estimate: Any) -> str:
    """Return the value of an estimate of a record, with its interval if it has one."""
    return value_text(estimate) if estimate["low"] is None else f"{value_text(estimate)} {interval_text(estimate)}"


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


SHARED = ("E", "B", "beta")


def fit_sizes(
    groups: Mapping[str, Sequence[Row]],
    size: str,
    data: str,
    y: str,
    *,
    shared: Sequence[str] = SHARED,
    samples: int = 1000,
    method: str = "residuals",
) -> tuple[LossBootstrap, dict[str, str]]:
    """Fit ``L = E + A / N**alpha + B / D**beta`` to all groups at once (approach 3 of Hoffmann et al. 2022).

    N, D and L are the columns `size`, `data` and `y`; `shared` is that of :func:`structlin.scaling_laws.fit_loss_law`,
    and the others those of its bootstrap. Returns the fit with its draws, and why groups are left out, by label.
    ValueError, with the reasons, if no group can be fitted.
    """
    own = [term for term in TERMS if term not in shared] if len(groups) > 1 else list(TERMS)

    def points(rows: Sequence[Row]) -> list[tuple[float, ...]]:
        values = [column(rows, c) for c in (size, data, y)]
        for c, numbers in zip((size, data, y), values, strict=True):
            if min(numbers) <= 0:
                raise ValueError(f"{c} must be positive, got {min(numbers):g}")
        if lacking := scaling_laws.lacks_sizes(values[0], values[1], own):
            raise ValueError(lacking)
        return list(zip(*values, strict=True))

    found, left_out = for_each(groups, points)
    labels, n, d, loss = zip(*((name, *point) for name, own in found.items() for point in own), strict=True)
    fit = scaling_laws.fit_loss_law(n, d, loss, groups=labels, shared=shared)
    return fit.bootstrap(samples, method=method), left_out


def allocations(
    groups: Mapping[str, Sequence[Row]],
    size: str,
    data: str,
    y: str,
    *,
    approach: int,
    budgets: Sequence[float] | None = None,
    flops: float = FLOPS,
) -> tuple[dict[str, Envelope | IsoFlop], dict[str, str]]:
    """Return the best split of a budget for each group by approach 1 or 2 of Hoffmann et al. (2022).

    Approach 1 is the envelope of the curves: rows are all evaluations, with the column ``record`` of their run.
    Approach 2 is parabolas at equal compute, with `budgets` (:func:`structlin.scaling_laws.fit_isoflop`). Other
    arguments and errors are those of :func:`fit_sizes` and :func:`sizes_record`.
    """
    if approach not in (1, 2):
        raise ValueError(f"approach must be 1 or 2, got {approach}")

    def best(rows: Sequence[Row]) -> Envelope | IsoFlop:
        if approach == 1:
            return scaling_laws.fit_envelope(_curves(rows, size, data, y), flops=flops)
        n, d, loss = (column(rows, c) for c in (size, data, y))
        compute = [flops * a * b for a, b in zip(n, d, strict=True)]
        return scaling_laws.fit_isoflop(n, compute, loss, budgets=budgets, flops=flops)

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
    """Return the result of :func:`fit_sizes`, and its comparison with a reference, as values that ``json.dumps`` takes.

    A `loss` of None is the lowest that points of both groups reach; `flops` are those of training for each unit of N
    and of D. ValueError for an unknown reference, or a loss that neither law reaches.
    """
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
        check_reference(reference, fit.laws)
        lowest = {name: float(fit.loss[fit.group == number].min()) for number, name in enumerate(fit.laws)}
        found = {}
        for name in fit.laws:
            if name != reference:
                at = max(lowest[name], lowest[reference]) if loss is None else loss
                found[name] = {"loss": at} | plain(drawn.multiplier(name, reference, loss=at, **common))
        record["reference"], record["multipliers"] = reference, found
    return plain(record)
