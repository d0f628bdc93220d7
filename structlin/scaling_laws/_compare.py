"""Comparisons of two laws: exponents, and compute at equal error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from structlin.scaling_laws._bootstrap import Bootstrap, Estimate, estimate
from structlin.scaling_laws._frontier import as_points, pareto_frontier
from structlin.scaling_laws._law import compute_at


def compare_exponents(a: Bootstrap, b: Bootstrap, confidence: float = 0.95) -> Estimate:
    """Exponent of ``a`` minus that of ``b``, with its interval; the two are taken to be independent.

    Above 0: the error of ``a`` falls faster with compute. The interval excludes 0 where the difference is
    significant at ``1 - confidence``. Raises ValueError for different numbers of draws.
    """
    _check_draws(a, b)
    value = a.fit.law.exponent - b.fit.law.exponent
    return estimate(value, a.draws[:, 1] - _shuffled(b)[:, 1], confidence)


@dataclass(frozen=True)
class Multiplier(Estimate):
    """How many times less compute a law needs than another at equal error.

    Attributes
    ----------
    error
        The error at which they are compared.
    extrapolated
        Whether one of them was not measured there: the error lies outside the range of its points.
    """

    error: float
    extrapolated: bool

    __str__ = Estimate.__str__


def compute_multiplier(a: Bootstrap, b: Bootstrap, error: float | None = None, confidence: float = 0.95) -> Multiplier:
    """Compute of ``b`` over compute of ``a`` at equal error, with its interval: "a needs 3.8 times less".

    Parameters
    ----------
    a, b
        Bootstraps of two fits, of equally many draws.
    error
        Where to compare; None: the lowest error that points of both reach, which is the better of two models at the
        error of the best of the worse.
    confidence
        Of the interval. Draws in which only ``b`` does not reach the error count as infinite, those in which ``a`` does
        not count as 0.

    Raises
    ------
    ValueError
        Errors of ``a`` and ``b`` that do not overlap, where ``error`` is None; an error that neither law reaches.
    """
    _check_draws(a, b)
    ranges = [(float(s.fit.error.min()), float(s.fit.error.max())) for s in (a, b)]
    lowest, highest = max(low for low, _ in ranges), min(high for _, high in ranges)
    if error is None:
        if lowest > highest:
            raise ValueError(
                f"the errors do not overlap ({_range(ranges[0])} and {_range(ranges[1])}): say at which to compare"
            )
        error = lowest
    ours, theirs = (float(compute_at(s.fit.law.parameters, error)) for s in (a, b))
    if math.isinf(ours) and math.isinf(theirs):
        raise ValueError(f"neither law reaches an error of {error:g}")
    with np.errstate(invalid="ignore"):
        drawn = compute_at(_shuffled(b), error) / compute_at(a.draws, error)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        raise ValueError(f"no draw of the two laws reaches an error of {error:g}")
    found = estimate(theirs / ours, drawn, confidence)
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
    """Compute of ``b`` over compute of ``a`` at equal error, read off the measured points without any law.

    Points are joined by straight lines of the logarithms, along the Pareto frontier; runs of equal compute (seeds)
    count as their geometric mean. This is how a sentence like "3.8 times less compute" is usually come by, and the
    right reading of few points, or of points that no power law describes.

    Parameters
    ----------
    a, b
        (compute, error), each of shape (n,), above 0.
    error
        Where to compare; None: the lowest error that both reach.
    noise
        Standard deviation of an error, in the same units. The interval is of errors drawn anew with it, with ``error``
        chosen anew too where it is None. None: no interval, both ends are NaN.
    samples, seed
        Of these draws.
    confidence
        Of the interval. Draws in which only ``b`` does not reach the error count as infinite, those in which ``a`` does
        not count as 0.

    Raises
    ------
    ValueError
        Errors that do not overlap, or an ``error`` that is not within the points of both; points that are not positive;
        a negative noise.

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
        # Errors are positive: what is drawn below a hundredth of an error is held there.
        moved = [(x, np.maximum(y + noise * generator.standard_normal(len(y)), 0.01 * y)) for x, y in points]
        drawn[i] = _interpolated(moved, error)[0]
    found = estimate(value, drawn[~np.isnan(drawn)], confidence)
    return Multiplier(value, found.low, found.high, confidence, at, not common[0] <= at <= common[1])


def _interpolated(points: Sequence[tuple[np.ndarray, np.ndarray]], error: float | None) -> tuple[float, float]:
    """(multiplier, error); NaN where the error is not within the points, or neither reaches it."""
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
    """Return the draws in another order: two bootstraps of one seed would otherwise be drawn from the same numbers."""
    return np.random.default_rng([s.seed, 1]).permutation(s.draws)


def _check_draws(a: Bootstrap, b: Bootstrap) -> None:
    if len(a.draws) != len(b.draws):
        raise ValueError(f"bootstraps of equally many draws are needed, got {len(a.draws)} and {len(b.draws)}")


def cheapest(laws: Mapping[str, Bootstrap], error: float, confidence: float = 0.95) -> dict[str, Estimate]:
    """Compute that each law needs for an error, the cheapest first; those that never reach it last, infinite.

    Examples
    --------
    >>> from structlin.scaling_laws import fit_power_law
    >>> compute, noise = np.logspace(6, 9, 6), np.array([1, 1.01, 0.99, 1.01, 0.99, 1])
    >>> laws = {
    ...     name: fit_power_law(compute, 2 * compute**-a * noise).bootstrap(100)
    ...     for name, a in {"dense": 0.1, "btt": 0.12}.items()
    ... }
    >>> list(cheapest(laws, error=0.2))
    ['btt', 'dense']
    """
    found = {
        name: estimate(float(compute_at(law.fit.law.parameters, error)), compute_at(law.draws, error), confidence)
        for name, law in laws.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].value))
