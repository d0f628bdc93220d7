"""Power laws, their fit to points, and the spread of fits to resampled points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import median_abs_deviation, theilslopes

from structlin.scaling_laws._frontier import as_points, positive

Array = npt.NDArray[Any]
LOSSES = ("soft_l1", "linear")
METHODS = ("parametric", "residuals", "cases")
MAX_EXPONENT = 10.0  # bound of the exponent of a law with a floor; without it, both can diverge
_STARTS = (0.01, 0.3, 0.6, 0.9, 0.99)  # initial floors, as fractions of the smallest error


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


def estimate(value: float, draws: Array, confidence: float) -> Estimate:
    """Return a value and the quantiles of draws; ValueError unless the confidence lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    # The quantiles are elements of the draws, because draws can be infinite and cannot be interpolated then.
    low = np.quantile(draws, tail, method="lower")
    return Estimate(float(value), float(low), float(np.quantile(draws, 1 - tail, method="higher")), confidence)


def ratio(computes: Sequence[float], draws: Sequence[Array], target: str, confidence: float) -> Estimate:
    """Return the second of two computes divided by the first, with the interval of their draws.

    Draws in which both are infinite are left out. ValueError if both computes are, or both in every draw: neither law
    reaches the `target`.
    """
    ours, theirs = computes
    if math.isinf(ours) and math.isinf(theirs):
        raise ValueError(f"neither law reaches {target}")
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = draws[1] / draws[0]
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        raise ValueError(f"no draw of the two laws reaches {target}")
    return estimate(theirs / ours, drawn, confidence)


@dataclass(frozen=True)
class PowerLaw:
    r"""The law :math:`\mathrm{error} = a \, C^{-\alpha} + c`.

    Attributes
    ----------
    log_coefficient
        Logarithm of a.
    exponent
        The exponent :math:`\alpha`.
    floor
        The irreducible error c.

    Examples
    --------
    >>> law = PowerLaw(math.log(3.0), 0.5, 0.1)
    >>> round(law(100.0), 6), round(law.compute(0.4), 6), law.compute(0.05)
    (0.4, 100.0, inf)
    """

    log_coefficient: float
    exponent: float
    floor: float = 0.0

    @property
    def parameters(self) -> tuple[float, float, float]:
        """The tuple (log_coefficient, exponent, floor)."""
        return self.log_coefficient, self.exponent, self.floor

    @property
    def coefficient(self) -> float:
        """The coefficient a, the error above the floor at a compute of 1; infinite if it overflows float64."""
        try:
            return math.exp(self.log_coefficient)
        except OverflowError:
            return math.inf

    def __call__(self, compute: Any) -> Any:
        """Return the error at a compute, a number or an array of numbers above 0."""
        value = np.exp(self.log_coefficient - self.exponent * np.log(compute)) + self.floor
        return float(value) if np.ndim(compute) == 0 else value

    def compute(self, error: float) -> float:
        """Return the compute at which the law has an error.

        Parameters
        ----------
        error
            Error to reach.

        Returns
        -------
        float
            The compute; infinite if the error is not above the floor.

        Raises
        ------
        ValueError
            If the exponent is not positive, so that the error does not decrease with compute.
        """
        if self.exponent <= 0:
            raise ValueError(
                f"the error does not fall with compute: the exponent must be positive, got {self.exponent:.4g}"
            )
        return float(compute_at(self.parameters, error))


def compute_at(parameters: npt.ArrayLike, error: float) -> Array:
    """Return the compute at an error, for laws of shape (..., 3); infinite if the law never reaches it."""
    level, exponent, floor = np.moveaxis(np.asarray(parameters, dtype=np.float64), -1, 0)
    above = error - floor
    reached = (above > 0) & (exponent > 0)
    logs = (level - np.log(np.where(reached, above, 1.0))) / np.where(reached, exponent, 1.0)
    with np.errstate(over="ignore"):
        return np.where(reached, np.exp(logs), np.inf)


@dataclass(frozen=True)
class PowerLawFit:
    """A law, and the points to which it was fitted.

    Attributes
    ----------
    law
        The fitted law.
    compute, error
        Coordinates of the points, shape (n,).
    floor, loss
        As given to :func:`fit_power_law`.
    residuals
        Residuals ``log(error) - log(law(compute))``, shape (n,).
    """

    law: PowerLaw
    compute: Array = field(repr=False)
    error: Array = field(repr=False)
    floor: bool | float
    loss: str
    residuals: Array = field(repr=False)

    @property
    def free_parameters(self) -> int:
        """Number of fitted parameters: 2, or 3 if the floor was fitted."""
        return 2 + (self.floor is True)

    @property
    def r_squared(self) -> float:
        """Fraction of the variance of the logarithms that the law explains; NaN if they are constant."""
        logs = np.log(self.error)
        total = float(np.square(logs - logs.mean()).sum())
        return 1 - float(np.square(self.residuals).sum()) / total if total else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the residuals of the logarithms; NaN without degrees of freedom."""
        freedom = len(self.compute) - self.free_parameters
        return math.sqrt(float(np.square(self.residuals).sum()) / freedom) if freedom > 0 else math.nan

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the law: an error that does not decrease, an exponent or a floor at its bound."""
        notes = []
        lowest = float(self.error.min())
        if self.law.exponent <= 1e-6:
            notes.append(f"the error does not fall with compute: the exponent is {self.law.exponent:.3g}")
        elif self.floor is True and self.law.exponent >= MAX_EXPONENT * (1 - 1e-3):
            notes.append(f"the exponent is at its bound, {MAX_EXPONENT:g}: the points do not determine it")
        if self.floor is True and self.law.exponent > 1e-6:
            if self.law.floor <= 1e-6 * lowest:
                notes.append("the floor is at its bound, 0: the points show no irreducible error")
            elif self.law.floor >= lowest * (1 - 1e-6):
                notes.append(f"the floor, {self.law.floor:.4g}, is not below the lowest error")
        return tuple(notes)

    def bootstrap(
        self, samples: int = 1000, *, seed: int = 0, method: str = "parametric", noise: float | None = None
    ) -> Bootstrap:
        """Fit the law to resampled data.

        Parameters
        ----------
        samples
            Number of samples, at least 2.
        seed
            Seed of the generator.
        method
            ``parametric``, ``residuals`` or ``cases`` (:class:`Bootstrap`).
        noise
            Known standard deviation of an error, for ``parametric``.

        Returns
        -------
        Bootstrap
            The laws of all samples.

        Raises
        ------
        ValueError
            If the method is unknown, there are fewer than two samples, there are no degrees of freedom and no known
            noise, or a noise is negative or given with a method other than ``parametric``.
        """
        check_samples(method, samples)
        n = len(self.compute)
        freedom = n - self.free_parameters
        if noise is not None and (method != "parametric" or not noise >= 0):
            raise ValueError(f"noise must be at least 0 and needs method='parametric', got {noise} and {method!r}")
        if freedom < 1 and noise is None:
            raise ValueError(
                f"a bootstrap of {self.free_parameters} parameters needs more points than that, got {n}; add "
                "points or give the noise"
            )
        generator = np.random.default_rng(seed)
        draws = np.empty((samples, 3))
        for row in draws:
            chosen, drawn = _draw(self, freedom, generator, method, noise)
            law = fit_law(self.compute[chosen], drawn, self.floor, self.loss, self.law)
            row[:] = law.parameters
            if method == "cases":
                row[:] = _scaled(self, law, math.sqrt(n / generator.chisquare(freedom)))
        return Bootstrap(self, draws, method, seed, noise)


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


def check_samples(method: str, samples: Any) -> None:
    """Raise ValueError for an unknown method of a bootstrap, or a number of samples below 2."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if isinstance(samples, bool) or not hasattr(samples, "__index__") or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, got {samples!r}")


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


def fit_power_law(
    compute: npt.ArrayLike, error: npt.ArrayLike, *, floor: bool | np.bool_ | float = False, loss: str = "soft_l1"
) -> PowerLawFit:
    r"""Fit :math:`\mathrm{error} = a \, C^{-\alpha} + c` to points by least squares of the logarithms.

    Parameters
    ----------
    compute, error
        Coordinates of the points, shape (n,), above 0.
    floor
        The irreducible error c. False: 0. True: fitted between 0 and the largest error, with an exponent from 0 to 10.
        A number: the known value.
    loss
        ``soft_l1``: robust against outliers; a residual counts linearly beyond 1.35 robust standard deviations.
        ``linear``: ordinary least squares.

    Returns
    -------
    PowerLawFit
        The law and its residuals.

    Raises
    ------
    ValueError
        If a value is not positive and finite, there are fewer different values of compute than parameters, a known
        floor is negative or not below all errors, or the loss is unknown.

    Examples
    --------
    >>> fit = fit_power_law([10, 100, 1000], [0.5, 0.25, 0.125])
    >>> round(fit.law.exponent, 4), round(fit.law.coefficient, 4), round(fit.r_squared, 4)
    (0.301, 1.0, 1.0)
    >>> compute = np.logspace(2, 6, 8)
    >>> fit = fit_power_law(compute, 0.07 + 3 * compute**-0.4, floor=True)
    >>> round(fit.law.floor, 4), round(fit.law.exponent, 4)
    (0.07, 0.4)
    """
    x, y = as_points(compute, error)
    positive("compute", x)
    positive("error", y)
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; one of {', '.join(LOSSES)}")
    floor = bool(floor) if isinstance(floor, np.bool_) else floor
    if not isinstance(floor, bool) and not 0 <= floor < y.min(initial=math.inf):
        raise ValueError(
            f"a known floor must be at least 0 and below every error, got {floor} and a smallest error of {y.min():g}"
        )
    needed = 2 + (floor is True)
    if (different := len(np.unique(x))) < needed:
        raise ValueError(
            f"a law of {needed} parameters needs at least {needed} different values of compute, got {different}"
        )
    law = fit_law(x, y, floor, loss)
    return PowerLawFit(law, x, y, floor, loss, np.log(y) - np.log(law(x)))


def fit_law(x: Array, y: Array, floor: bool | float, loss: str, start: PowerLaw | None = None) -> PowerLaw:
    """Return the law fitted to checked points; ``start`` replaces the search for an initial law."""
    # Centred and scaled, so that level and slope are nearly independent and a floor is of order 1.
    centre, scale = float(np.log(x).mean()), float(np.exp(np.log(y).mean()))
    problem = _Problem(np.log(x) - centre, y / scale, None if floor is True else float(floor) / scale)
    begin = None
    if start is not None:
        begin = start.log_coefficient - start.exponent * centre - math.log(scale), start.exponent, start.floor / scale
    level, slope, fitted = problem.solve(loss, begin)
    return PowerLaw(level + math.log(scale) + slope * centre, slope, fitted * scale if floor is True else float(floor))


@dataclass(frozen=True)
class _Problem:
    """The model ``y = floor + exp(level - slope * t)``; the floor is fitted if it is None."""

    t: Array
    y: Array
    known: float | None

    def solve(self, loss: str, start: tuple[float, float, float] | None) -> tuple[float, float, float]:
        if self.known == 0 and loss == "linear":
            return self._line(0.0)
        if self.known is not None:
            rough = self._line(self.known, robust=loss != "linear") if start is None else start
        else:
            starts = [start] if start else [self._line(share * float(self.y.min())) for share in _STARTS]
            best = min((self._least(s, "linear", 1.0) for s in starts), key=lambda found: found.cost)
            rough = self._whole(best.x)
            if loss == "linear":
                return rough
        deviation = float(median_abs_deviation(self._residuals(np.array(rough)), scale="normal"))
        # A lower bound, because the deviation is 0 if all points lie on a law.
        return self._whole(self._least(rough, loss, max(1.345 * deviation, 1e-6)).x)

    def _line(self, floor: float, robust: bool = False) -> tuple[float, float, float]:
        logs = np.log(self.y - floor)
        if robust:
            found = theilslopes(logs, self.t)
            return float(found.intercept), float(-found.slope), floor
        level, slope = np.polynomial.polynomial.polyfit(self.t, logs, 1)
        return float(level), float(-slope), floor

    def _whole(self, p: Array) -> tuple[float, float, float]:
        return float(p[0]), float(p[1]), float(p[2]) if self.known is None else self.known

    def _floor(self, p: Array) -> float:
        return p[2] if self.known is None else self.known

    def _residuals(self, p: Array) -> Array:
        return np.log(self.y) - np.log(self._floor(p) + np.exp(p[0] - p[1] * self.t))

    def jacobian(self, p: Array) -> Array:
        """Return the derivatives of the residuals, of shape (n, number of fitted parameters)."""
        above = np.exp(p[0] - p[1] * self.t)
        total = self._floor(p) + above
        columns = [-above / total, self.t * above / total, -1 / total]
        return np.stack(columns[: 3 if self.known is None else 2], axis=1)

    def _least(self, start: tuple[float, ...], loss: str, width: float) -> Any:
        bounds = (np.full(2, -np.inf), np.full(2, np.inf))
        if self.known is None:
            bounds = (np.array([-np.inf, 0, 0]), np.array([np.inf, MAX_EXPONENT, self.y.max()]))
        return least_squares(
            self._residuals,
            np.clip(start[: len(bounds[0])], *bounds),
            jac=self.jacobian,
            bounds=bounds,
            loss=loss,
            f_scale=width,
            xtol=1e-9,
            ftol=1e-12,
            gtol=1e-9,
        )


def leverages(x: Array, law: PowerLaw, floor: bool | float) -> Array:
    """Return the leverage of each point, shape (n,), between 0 and 1."""
    centre = float(np.log(x).mean())
    problem = _Problem(np.log(x) - centre, law(x), None if floor is True else float(floor))
    p = np.array([law.log_coefficient - law.exponent * centre, law.exponent, law.floor])
    q = np.linalg.qr(problem.jacobian(p))[0]
    return np.square(q).sum(axis=1)
