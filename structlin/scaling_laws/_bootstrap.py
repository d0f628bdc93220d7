"""Bootstrap of fitted laws: the spread of what was fitted, from data drawn anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from structlin.scaling_laws._law import MAX_EXPONENT, PowerLaw, PowerLawFit, compute_at, fit_law, leverages

Array = npt.NDArray[Any]
METHODS = ("parametric", "residuals", "cases")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval at a level of confidence.

    Examples
    --------
    >>> print(Estimate(0.119, 0.11, 0.13, 0.95))
    0.119 [0.11, 0.13]
    """

    value: float
    low: float
    high: float
    confidence: float

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside the interval.

        Examples
        --------
        >>> Estimate(0.119, 0.11, 0.13, 0.95).excludes(0)
        True
        """
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Bootstrap:
    """Laws fitted to data that were drawn anew, the same number of points at each draw.

    ``parametric``: errors around the law, normal in the logarithm, their variance drawn from its own distribution
    (that of the residuals over a chi-squared variable): without floor and with the linear loss the intervals
    are those of Student's t, which hold for few points too. ``residuals``: residuals drawn with replacement, each
    raised for the freedom that the fit took from it, and all scaled by ``sqrt(df / chi2)``, with chi2 drawn of as many
    degrees of freedom as there are points beyond the parameters. ``cases``: points drawn with replacement, and the
    change of the law scaled by ``sqrt(n / chi2)``. Without these factors the quantiles are those of a normal
    distribution, for cases of a variance that is too small by ``df / n``, and too narrow for few points (Hesterberg,
    *What Teachers Should Know About the Bootstrap*, 2015). With a known ``noise``, the standard deviation of an
    error, ``parametric`` draws with that and not with the spread of the residuals: the law is then taken to be true.

    Attributes
    ----------
    fit
        What it is a bootstrap of.
    draws
        Shape (samples, 3): log_coefficient, exponent and floor of each draw's law.
    method
        As given, like ``seed`` and ``noise``.
    """

    fit: PowerLawFit
    draws: Array = field(repr=False)
    method: str
    seed: int
    noise: float | None = None

    def exponent(self, confidence: float = 0.95) -> Estimate:
        """Return the exponent, with the interval between quantiles of the draws."""
        return estimate(self.fit.law.exponent, self.draws[:, 1], confidence)

    def coefficient(self, confidence: float = 0.95) -> Estimate:
        """Return the coefficient, with its interval."""
        with np.errstate(over="ignore"):
            return estimate(self.fit.law.coefficient, np.exp(self.draws[:, 0]), confidence)

    def floor(self, confidence: float = 0.95) -> Estimate:
        """Return the irreducible error, with its interval; both ends are the value itself where it was not fitted."""
        return estimate(self.fit.law.floor, self.draws[:, 2], confidence)

    def error(self, compute: float, confidence: float = 0.95) -> Estimate:
        """Return the law's error at a compute, with its interval (of the law, not of a new measurement)."""
        values = np.exp(self.draws[:, 0] - self.draws[:, 1] * np.log(compute)) + self.draws[:, 2]
        return estimate(self.fit.law(compute), values, confidence)

    def compute(self, error: float, confidence: float = 0.95) -> Estimate:
        """Compute that reaches an error, with its interval; an end is infinite where draws do not reach it."""
        return estimate(self.fit.law.compute(error), compute_at(self.draws, error), confidence)


def estimate(value: float, draws: Array, confidence: float) -> Estimate:
    """Return a value and the quantiles of draws. Raises ValueError for a confidence that is not between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    # Quantiles that are draws themselves: between a number and infinity nothing can be interpolated.
    low = np.quantile(draws, tail, method="lower")
    return Estimate(float(value), float(low), float(np.quantile(draws, 1 - tail, method="higher")), confidence)


def bootstrap(
    fit: PowerLawFit, samples: int, *, seed: int = 0, method: str = "parametric", noise: float | None = None
) -> Bootstrap:
    """Draw data and fit the same law to each draw.

    Raises
    ------
    ValueError
        An unknown method; less than two samples; as many points as parameters, which leave no residuals, unless the
        noise is known; a noise that is negative, or with another method than ``parametric``.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if isinstance(samples, bool) or not hasattr(samples, "__index__") or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, got {samples!r}")
    n = len(fit.compute)
    freedom = n - fit.free_parameters
    if noise is not None and (method != "parametric" or not noise >= 0):
        raise ValueError(f"noise must be at least 0 and goes with the parametric method, got {noise} and {method!r}")
    if freedom < 1 and noise is None:
        raise ValueError(f"{n} points determine {fit.free_parameters} parameters: no residuals to draw from")
    generator = np.random.default_rng(seed)
    draws = np.empty((samples, 3))
    for row in draws:
        chosen, drawn = _draw(fit, freedom, generator, method, noise)
        law = fit_law(fit.compute[chosen], drawn, fit.floor, fit.loss, fit.law)
        row[:] = law.parameters
        if method == "cases":
            row[:] = _scaled(fit, law, math.sqrt(n / generator.chisquare(freedom)))
    return Bootstrap(fit, draws, method, seed, noise)


def _scaled(fit: PowerLawFit, law: PowerLaw, factor: float) -> tuple[float, float, float]:
    """Return a law whose distance from the fitted one is so many times as large, within the bounds of the fit.

    Levels are compared at the middle of the points, where they hardly depend on the exponents.
    """
    centre = float(np.log(fit.compute).mean())
    base = fit.law
    exponent = base.exponent + factor * (law.exponent - base.exponent)
    levels = [each.log_coefficient - each.exponent * centre for each in (base, law)]
    level, floor = levels[0] + factor * (levels[1] - levels[0]), base.floor + factor * (law.floor - base.floor)
    if fit.floor is True:
        exponent, floor = min(max(exponent, 0.0), MAX_EXPONENT), min(max(floor, 0.0), float(fit.error.max()))
    return level + exponent * centre, exponent, floor


def _draw(
    fit: PowerLawFit, freedom: int, generator: np.random.Generator, method: str, noise: float | None
) -> tuple[Array, Array]:
    """Return the indices of the points and the errors there."""
    n = len(fit.compute)
    if method == "cases":
        while True:
            chosen = generator.integers(n, size=n)
            if len(np.unique(fit.compute[chosen])) >= fit.free_parameters:
                return chosen, fit.error[chosen]
    if method == "parametric":
        if noise is None:
            deviation = np.sqrt(np.square(fit.residuals).sum() / generator.chisquare(freedom))
        else:
            deviation = noise / fit.law(fit.compute)
        moved = deviation * generator.standard_normal(n)
    else:
        spread = np.sqrt(np.clip(1 - leverages(fit.compute, fit.law, fit.floor), 1e-3, None))
        residuals = fit.residuals / spread
        # The factor has the residuals' spread vary from draw to draw, as it does from sample to sample.
        factor = math.sqrt(freedom / generator.chisquare(freedom))
        moved = factor * generator.choice(residuals - residuals.mean(), size=n)
    return np.arange(n), fit.law(fit.compute) * np.exp(moved)
