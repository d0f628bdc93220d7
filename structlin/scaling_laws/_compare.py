"""Comparisons of two laws: exponents, and compute at equal error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from structlin.scaling_laws._frontier import as_points, pareto_frontier
from structlin.scaling_laws._law import Bootstrap, Estimate, compute_at, estimate, ratio


def compare_exponents(a: Bootstrap, b: Bootstrap, confidence: float = 0.95) -> Estimate:
    """Return the difference of the exponents of two independent laws, with its interval.

    A positive difference means that the error of ``a`` decreases faster with compute.

    Parameters
    ----------
    a, b
        Bootstraps with equal numbers of draws.
    confidence
        Level of confidence of the interval. If the interval excludes 0, the difference is significant at the level
        ``1 - confidence``.

    Returns
    -------
    Estimate
        Exponent of ``a`` minus exponent of ``b``.

    Raises
    ------
    ValueError
        If the numbers of draws differ or the confidence does not lie between 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin.scaling_laws import fit_power_law
    >>> compute, noise = np.logspace(6, 9, 6), np.array([1, 1.01, 0.99, 1.01, 0.99, 1])
    >>> a, b = (fit_power_law(compute, 2 * compute**-x * noise).bootstrap(100) for x in (0.12, 0.1))
    >>> round(compare_exponents(a, b).value, 3)
    0.02
    """
    _check_draws(a, b)
    value = a.fit.law.exponent - b.fit.law.exponent
    return estimate(value, a.draws[:, 1] - _shuffled(b)[:, 1], confidence)


@dataclass(frozen=True)
class Multiplier(Estimate):
    """Ratio of the compute of two laws at equal error.

    Attributes
    ----------
    error
        Error at which the laws are compared.
    extrapolated
        True if the error lies outside the range of the points of one of them.
    """

    error: float
    extrapolated: bool

    __str__ = Estimate.__str__


def compute_multiplier(a: Bootstrap, b: Bootstrap, error: float | None = None, confidence: float = 0.95) -> Multiplier:
    """Return the compute of ``b`` divided by that of ``a`` at equal error, with its interval.

    A value of 3.8 means that ``a`` needs 3.8 times less compute.

    Parameters
    ----------
    a, b
        Bootstraps with equal numbers of draws.
    error
        Error at which to compare. Default: the lowest error that the points of both reach.
    confidence
        Level of confidence of the interval. Draws in which only ``b`` does not reach the error count as infinite, draws
        in which ``a`` does not reach it count as 0.

    Returns
    -------
    Multiplier
        The ratio, and the error at which it holds.

    Raises
    ------
    ValueError
        If ``error`` is None and the errors of ``a`` and ``b`` do not overlap, or if neither law reaches the error.
    """
    _check_draws(a, b)
    ranges = [(float(s.fit.error.min()), float(s.fit.error.max())) for s in (a, b)]
    lowest, highest = max(low for low, _ in ranges), min(high for _, high in ranges)
    if error is None:
        if lowest > highest:
            raise ValueError(
                f"the ranges of errors, {_range(ranges[0])} and {_range(ranges[1])}, do not overlap; give the error "
                "to compare at"
            )
        error = lowest
    ours, theirs = (float(compute_at(s.fit.law.parameters, error)) for s in (a, b))
    draws = compute_at(a.draws, error), compute_at(_shuffled(b), error)
    found = ratio((ours, theirs), draws, f"an error of {error:g}", confidence)
    return Multiplier(found.value, found.low, found.high, confidence, error, not lowest <= error <= highest)


def interpolated_multiplier(
    a: tuple[npt.ArrayLike, npt.ArrayLike],
    b: tuple[npt.ArrayLike, npt.ArrayLike],
    error: float | None = None,
    *,
    noise: float | None = None,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Multiplier:
    """Return the compute of ``b`` divided by that of ``a`` at equal error, by interpolation and without a law.

    The points of the Pareto frontier are interpolated linearly in the logarithms. Runs of equal compute (seeds) count
    as their geometric mean. Use it for few points, and for points that do not follow a power law.

    Parameters
    ----------
    a, b
        Pairs (compute, error), each of shape (n,), above 0.
    error
        Error at which to compare. Default: the lowest error that both reach.
    noise
        Standard deviation of an error, in the unit of the errors, with which errors are resampled for the interval. If
        ``error`` is None, it is chosen again in each sample. Default: no interval; both ends are NaN.
    samples, seed
        Number of samples and seed of the generator.
    confidence
        Level of confidence of the interval. Draws in which only ``b`` does not reach the error count as infinite, draws
        in which ``a`` does not reach it count as 0.

    Returns
    -------
    Multiplier
        The ratio, and the error at which it holds.

    Raises
    ------
    ValueError
        If the errors do not overlap, ``error`` lies outside the points of ``a`` or ``b``, a value is not positive, or
        the noise is negative.

    Examples
    --------
    >>> round(interpolated_multiplier(([1e6, 1e8], [0.4, 0.2]), ([1e6, 4e8], [0.6, 0.2])).value, 6)
    4.0
    """
    points = [as_points(*s) for s in (a, b)]
    for x, y in points:
        if not (x > 0).all() or not (y > 0).all() or not len(x):
            raise ValueError(f"compute and error must be positive, got {x.tolist()} and {y.tolist()}")
    ranges = [(float(y.min()), float(y.max())) for _, y in points]
    common = max(low for low, _ in ranges), min(high for _, high in ranges)
    value, at = _interpolated(points, error)
    if math.isnan(value):
        asked = "" if error is None else f" and not {error:g}"
        raise ValueError(f"the points span errors of {_range(ranges[0])} and {_range(ranges[1])}{asked}")
    if noise is None:
        return Multiplier(value, math.nan, math.nan, confidence, at, False)
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    generator = np.random.default_rng(seed)
    drawn = np.empty(samples)
    for i in range(samples):
        # Errors are positive: a draw below a hundredth of the error is clipped.
        moved = [(x, np.maximum(y + noise * generator.standard_normal(len(y)), 0.01 * y)) for x, y in points]
        drawn[i] = _interpolated(moved, error)[0]
    found = estimate(value, drawn[~np.isnan(drawn)], confidence)
    return Multiplier(value, found.low, found.high, confidence, at, not common[0] <= at <= common[1])


def _interpolated(points: Sequence[tuple[np.ndarray, np.ndarray]], error: float | None) -> tuple[float, float]:
    """Return (multiplier, error), NaN if the error is outside the points or neither reaches it."""
    curves = []
    for x, y in points:
        computes, where = np.unique(x, return_inverse=True)
        means = np.bincount(where, np.log(y)) / np.bincount(where)
        kept = pareto_frontier(computes, means)
        curves.append((np.log(computes[kept]), means[kept]))
    lowest, highest = max(e[-1] for _, e in curves), min(e[0] for _, e in curves)
    at = lowest if error is None else math.log(error)
    if at > highest + 1e-12:
        return math.nan, math.exp(at)
    ours, theirs = (math.inf if at < e[-1] - 1e-12 else float(np.interp(-at, -e, c)) for c, e in curves)
    if math.isinf(ours) and math.isinf(theirs):
        return math.nan, math.exp(at)
    return math.exp(theirs - ours), math.exp(at)


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.4g} to {bounds[1]:.4g}"


def _shuffled(s: Bootstrap) -> np.ndarray:
    """Return the draws in another order, because two bootstraps with the same seed use the same random numbers."""
    return np.random.default_rng([s.seed, 1]).permutation(s.draws)


def _check_draws(a: Bootstrap, b: Bootstrap) -> None:
    if len(a.draws) != len(b.draws):
        raise ValueError(f"both bootstraps must have the same number of draws, got {len(a.draws)} and {len(b.draws)}")
