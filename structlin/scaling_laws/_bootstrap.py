"""Bootstrap of power laws: the spread of fits to resampled data."""

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
    """A value with its confidence interval.

    Attributes
    ----------
    value
        The estimate.
    low, high
        Ends of the interval.
    confidence
        Level of confidence, between 0 and 1.

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
        """Return whether a value lies outside the interval.

        Parameters
        ----------
        value
            The value to test.

        Returns
        -------
        bool
            True if it lies outside.

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
    r"""Laws fitted to resampled data, with the same number of points in each sample.

    There are three methods. Let n be the number of points, :math:`\nu` the degrees of freedom, n minus the number of
    fitted parameters, and :math:`\chi^2_\nu` a random number with the chi-squared distribution.

    - ``parametric`` adds errors to the logarithms of the law. The errors are normal. Their variance is drawn for each
      sample, the sum of squared residuals over :math:`\chi^2_\nu`. Without a floor and with the linear loss, the
      intervals are those of Student's t, which also hold for few points. If ``noise`` is given, the standard deviation
      of an error, it replaces the spread of the residuals, and the law is assumed to be true.
    - ``residuals`` adds residuals drawn with replacement. Each residual is divided by the square root of one minus its
      leverage. All residuals of a sample are scaled by :math:`\sqrt{\nu / \chi^2_\nu}`.
    - ``cases`` draws points with replacement. The change of the parameters is scaled by :math:`\sqrt{n / \chi^2_\nu}`.

    Without these factors the intervals are too narrow for few points (Hesterberg, *What Teachers Should Know About the
    Bootstrap*, 2015).

    Attributes
    ----------
    fit
        The fit to the original data.
    draws
        Shape (samples, 3): log_coefficient, exponent and floor of the law of each sample.
    method, seed, noise
        As given to :meth:`PowerLawFit.bootstrap`.
    """

    fit: PowerLawFit
    draws: Array = field(repr=False)
    method: str
    seed: int
    noise: float | None = None

    def exponent(self, confidence: float = 0.95) -> Estimate:
        """Return the exponent. Its interval lies between two quantiles of the draws."""
        return estimate(self.fit.law.exponent, self.draws[:, 1], confidence)

    def coefficient(self, confidence: float = 0.95) -> Estimate:
        """Return the coefficient, with its interval."""
        with np.errstate(over="ignore"):
            return estimate(self.fit.law.coefficient, np.exp(self.draws[:, 0]), confidence)

    def floor(self, confidence: float = 0.95) -> Estimate:
        """Return the irreducible error, with its interval; both ends equal the value if it was not fitted."""
        return estimate(self.fit.law.floor, self.draws[:, 2], confidence)

    def error(self, compute: float, confidence: float = 0.95) -> Estimate:
        """Return the error of the law at a compute, with the interval of the law (not of a new measurement)."""
        values = np.exp(self.draws[:, 0] - self.draws[:, 1] * np.log(compute)) + self.draws[:, 2]
        return estimate(self.fit.law(compute), values, confidence)

    def compute(self, error: float, confidence: float = 0.95) -> Estimate:
        """Return the compute at which the law has an error, with its interval; infinite if draws do not reach it."""
        return estimate(self.fit.law.compute(error), compute_at(self.draws, error), confidence)


def estimate(value: float, draws: Array, confidence: float) -> Estimate:
    """Return a value and the quantiles of draws; ValueError unless the confidence lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    # The quantiles are elements of the draws, because draws can be infinite and cannot be interpolated then.
    low = np.quantile(draws, tail, method="lower")
    return Estimate(float(value), float(low), float(np.quantile(draws, 1 - tail, method="higher")), confidence)


def bootstrap(
    fit: PowerLawFit, samples: int, *, seed: int = 0, method: str = "parametric", noise: float | None = None
) -> Bootstrap:
    """Resample the data and fit the same law to each sample.

    Raises
    ------
    ValueError
        If the method is unknown, there are fewer than two samples, there are no degrees of freedom and no known noise,
        or a noise is negative or given with a method other than ``parametric``.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if isinstance(samples, bool) or not hasattr(samples, "__index__") or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, got {samples!r}")
    n = len(fit.compute)
    freedom = n - fit.free_parameters
    if noise is not None and (method != "parametric" or not noise >= 0):
        raise ValueError(f"noise must be at least 0 and needs method='parametric', got {noise} and {method!r}")
    if freedom < 1 and noise is None:
        raise ValueError(
            f"a bootstrap of {fit.free_parameters} parameters needs more points than that, got {n}; add "
            "points or give the noise"
        )
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
    """Return the law with its difference from the fitted law multiplied by a factor, within the bounds of the fit.

    Levels are compared at the mean logarithm of compute, where they are nearly independent of the exponents.
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
        # With this factor the spread of the residuals varies from draw to draw, as it does between samples.
        factor = math.sqrt(freedom / generator.chisquare(freedom))
        moved = factor * generator.choice(residuals - residuals.mean(), size=n)
    return np.arange(n), fit.law(fit.compute) * np.exp(moved)
