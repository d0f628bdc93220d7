"""Bootstrap of laws in two variables: intervals of their terms, of optima, and of ratios between structures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from structlin.scaling_laws._bootstrap import METHODS, Estimate, estimate
from structlin.scaling_laws._law import compute_at
from structlin.scaling_laws._loss_law import FLOPS, TERMS, LossLawFit, frontiers, laws_of, optima

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LossBootstrap:
    r"""Laws fitted to resampled data, all groups together.

    There are three methods. Let n be the number of points, p that of parameters, and :math:`\chi^2_{n-p}` a random
    number with the chi-squared distribution.

    - ``residuals`` adds residuals drawn with replacement to the logarithms of the law, scaled by
      :math:`\sqrt{(n - p) / \chi^2_{n-p}}`. The p smallest residuals are left out: a fit that is close to least
      absolute deviations passes through p points.
    - ``parametric`` adds normal errors with the standard deviation of the residuals, scaled by
      :math:`\sqrt{n / \chi^2_{n-p}}`. Outliers widen the intervals.
    - ``cases`` draws points with replacement in each group. The change of the parameters is scaled by
      :math:`\sqrt{n / \chi^2_{n-p}}`.

    Without these factors the intervals are too narrow for few points, like those of a normal distribution in place of
    Student's t.

    Attributes
    ----------
    fit
        The fit to the original data.
    draws
        For each group, log E, log A, alpha, log B and beta of the law of each sample, shape (samples, 5).
    method, seed
        As given to :meth:`LossLawFit.bootstrap`.
    """

    fit: LossLawFit
    draws: dict[str, Array] = field(repr=False)
    method: str
    seed: int

    def term(self, name: str, group: str | None = None, confidence: float = 0.95) -> Estimate:
        """Return the term E, A, alpha, B or beta of a group, with its interval.

        Parameters
        ----------
        name
            Name of the term.
        group
            Name of the group; may be left out if there is only one.
        confidence
            Level of confidence of the interval.

        Returns
        -------
        Estimate
            The term.

        Raises
        ------
        ValueError
            If the term or the group is unknown.
        """
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r}; one of {', '.join(TERMS)}")
        group = self._group(group)
        column = TERMS.index(name)
        with np.errstate(over="ignore"):
            drawn = self.draws[group][:, column] if column in (2, 4) else np.exp(self.draws[group][:, column])
        return estimate(getattr(self.fit.laws[group], name), drawn, confidence)

    def allocation(self, group: str | None = None, confidence: float = 0.95) -> Estimate:
        r"""Return the exponent a of :math:`N_\mathrm{opt} \propto C^a`, with its interval."""
        group = self._group(group)
        alpha, beta = self.draws[group][:, 2], self.draws[group][:, 4]
        return estimate(self.fit.laws[group].allocation, beta / np.maximum(alpha + beta, 1e-300), confidence)

    def optimum(
        self, compute: float, group: str | None = None, *, flops: float = FLOPS, confidence: float = 0.95
    ) -> dict[str, Estimate]:
        """Return ``params``, ``tokens`` and ``loss`` of the best split of a budget, with intervals.

        Parameters
        ----------
        compute, flops
            As for :meth:`structlin.scaling_laws.LossLaw.optimum`.
        group
            Name of the group; may be left out if there is only one.
        confidence
            Level of confidence of the intervals.

        Returns
        -------
        dict of str to Estimate
            The three values.

        Raises
        ------
        ValueError
            As for :meth:`structlin.scaling_laws.LossLaw.optimum`, or if the group is unknown.
        """
        group = self._group(group)
        best = self.fit.laws[group].optimum(compute, flops=flops)
        drawn = optima(self.draws[group], compute, flops)
        values = zip(("params", "tokens", "loss"), drawn, strict=True)
        return {name: estimate(getattr(best, name), _filled(v), confidence) for name, v in values}

    def loss(self, params: float, tokens: float, group: str | None = None, confidence: float = 0.95) -> Estimate:
        """Return the loss at two sizes, with the interval of the law (not of a new measurement)."""
        group = self._group(group)
        e, log_a, alpha, log_b, beta = self.draws[group].T
        drawn = np.exp(e) + np.exp(log_a - alpha * math.log(params)) + np.exp(log_b - beta * math.log(tokens))
        return estimate(self.fit.laws[group](params, tokens), drawn, confidence)

    def multiplier(
        self, group: str, reference: str, *, loss: float, flops: float | tuple[float, float] = FLOPS,
        confidence: float = 0.95,
    ) -> Estimate:  # fmt: skip
        """Return the compute of a reference divided by that of a group at equal loss, each at its best split.

        Both laws come from the same fit, so errors in their shared terms cancel in every draw.

        Parameters
        ----------
        group, reference
            Names of groups.
        loss
            Loss at which to compare, above the irreducible loss of both.
        flops
            Training FLOPs for each unit of N times D (:meth:`LossLaw.optimum`): one number, or one for the group and
            one for the reference.
        confidence
            Level of confidence of the interval. Draws in which only the reference does not reach the loss count as
            infinite, draws in which the group does not reach it count as 0.

        Returns
        -------
        Estimate
            The ratio.

        Raises
        ------
        ValueError
            If a group is unknown or neither law reaches the loss.
        """
        each = flops if isinstance(flops, tuple) else (flops, flops)
        found, values = [], []
        for name, factor in zip((group, reference), each, strict=True):
            law = self.fit.laws[self._group(name)]
            values.append(float(compute_at(law.frontier(flops=factor).parameters, loss)))
            found.append(compute_at(_filled(frontiers(self.draws[name], factor)), loss))
        if math.isinf(values[0]) and math.isinf(values[1]):
            raise ValueError(f"neither law reaches a loss of {loss:g}")
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = found[1] / found[0]
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            raise ValueError(f"no draw of the two laws reaches a loss of {loss:g}")
        return estimate(values[1] / values[0], drawn, confidence)

    def _group(self, name: str | None) -> str:
        if name is None:
            self.fit.law  # noqa: B018 - raises where there are several
            return next(iter(self.fit.laws))
        if name not in self.draws:
            raise ValueError(f"there is no group {name!r}; one of {', '.join(self.draws)}")
        return name


def _filled(draws: Array) -> Array:
    """Return the values with infinity for draws without an optimum, for example with an exponent of 0."""
    return np.where(np.isnan(draws), np.inf, draws)


def bootstrap_loss(fit: LossLawFit, samples: int, *, seed: int = 0, method: str = "residuals") -> LossBootstrap:
    """Resample the data and fit the same law to all samples at once, starting from the law of the fit.

    Raises
    ------
    ValueError
        If the method is unknown or there are fewer than two samples.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if isinstance(samples, bool) or not hasattr(samples, "__index__") or samples < 2:
        raise ValueError(f"samples must be an integer of at least 2, got {samples!r}")
    generator = np.random.default_rng(seed)
    problem = fit.problem
    n, freedom = len(fit.loss), len(fit.loss) - fit.free_parameters
    spread = np.sqrt(n / generator.chisquare(freedom, size=(samples, 1)))
    start = np.broadcast_to(fit.point, (samples, problem.size))
    if method == "cases":
        weights = np.zeros((samples, n))
        for number in range(len(fit.laws)):
            own = np.flatnonzero(fit.group == number)
            weights[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=samples)
        ends = problem.solve(start, weights=weights)[0]
        ends = np.clip(fit.point + spread * (ends - fit.point), problem.lower, problem.upper)
    else:
        if method == "parametric":
            moved = np.sqrt(np.square(fit.residuals).mean()) * generator.standard_normal((samples, n))
        else:
            # A fit close to least absolute deviations passes through as many points as it has parameters. Their
            # residuals of 0 say nothing about the spread of the runs.
            kept = np.argsort(np.abs(fit.residuals))[fit.free_parameters :]
            moved = math.sqrt(freedom / n) * generator.choice(fit.residuals[kept], size=(samples, n))
        ends = problem.solve(start, problem.predicted(fit.point[None]) + spread * moved)[0]
    return LossBootstrap(fit, dict(laws_of(fit, ends)), method, seed)
