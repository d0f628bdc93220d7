"""Bootstrap of laws in two sizes: intervals of their terms, of optima, and of multipliers between structures."""

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
    """Laws fitted to data that were drawn anew, all groups together.

    ``residuals``: residuals of the logarithms drawn with replacement around the law, without the p smallest of n (a
    fit near the least absolute deviations passes through as many points as it has parameters, p), each draw scaled by
    ``sqrt((n - p) / chi2)``, chi2 drawn with n - p degrees of freedom. ``parametric``: normal ones of the standard
    deviation of the residuals, with ``sqrt(n / chi2)``; outliers widen it. ``cases``: points drawn with replacement, in
    each group, and the change of the parameters scaled by ``sqrt(n / chi2)``. Without that factor intervals of few
    points are too narrow, as quantiles of the normal in place of Student's t are.

    Attributes
    ----------
    fit
        What it is a bootstrap of.
    draws
        By group, shape (samples, 5): log E, log A, alpha, log B, beta of each draw's law.
    method, seed
        As given.
    """

    fit: LossLawFit
    draws: dict[str, Array] = field(repr=False)
    method: str
    seed: int

    def term(self, name: str, group: str | None = None, confidence: float = 0.95) -> Estimate:
        """E, A, alpha, B or beta of a group, with its interval. Raises ValueError for an unknown name or group."""
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r}; one of {', '.join(TERMS)}")
        group = self._group(group)
        column = TERMS.index(name)
        with np.errstate(over="ignore"):
            drawn = self.draws[group][:, column] if column in (2, 4) else np.exp(self.draws[group][:, column])
        return estimate(getattr(self.fit.laws[group], name), drawn, confidence)

    def allocation(self, group: str | None = None, confidence: float = 0.95) -> Estimate:
        """Return the exponent a of ``N_opt ~ C**a``, with its interval."""
        group = self._group(group)
        alpha, beta = self.draws[group][:, 2], self.draws[group][:, 4]
        return estimate(self.fit.laws[group].allocation, beta / np.maximum(alpha + beta, 1e-300), confidence)

    def optimum(
        self, compute: float, group: str | None = None, *, flops: float = FLOPS, confidence: float = 0.95
    ) -> dict[str, Estimate]:
        """``params``, ``tokens`` and ``loss`` of the best split of a budget, with intervals.

        Arguments and errors are those of :meth:`structlin.scaling_laws.LossLaw.optimum`.
        """
        group = self._group(group)
        best = self.fit.laws[group].optimum(compute, flops=flops)
        drawn = optima(self.draws[group], compute, flops)
        values = zip(("params", "tokens", "loss"), drawn, strict=True)
        return {name: estimate(getattr(best, name), _filled(v), confidence) for name, v in values}

    def loss(self, params: float, tokens: float, group: str | None = None, confidence: float = 0.95) -> Estimate:
        """Return the loss at two sizes, with its interval (of the law, not of a new measurement)."""
        group = self._group(group)
        e, log_a, alpha, log_b, beta = self.draws[group].T
        drawn = np.exp(e) + np.exp(log_a - alpha * math.log(params)) + np.exp(log_b - beta * math.log(tokens))
        return estimate(self.fit.laws[group](params, tokens), drawn, confidence)

    def multiplier(
        self, group: str, reference: str, *, loss: float, flops: float | tuple[float, float] = FLOPS,
        confidence: float = 0.95,
    ) -> Estimate:  # fmt: skip
        """How many times less compute a group needs than a reference for a loss, each at its best split.

        Both are of one fit, so what the laws share moves together in every draw and cancels.

        Parameters
        ----------
        group, reference
            Names of groups.
        loss
            At which they are compared, above the irreducible loss of both.
        flops
            Of training for each unit of N and of D (:meth:`LossLaw.optimum`); two where the groups differ.
        confidence
            Of the interval. Draws in which only the reference does not reach the loss count as infinite, those in which
            the group does not count as 0.

        Notes
        -----
        Raises ValueError for unknown groups, and a loss that neither law reaches.
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
    """Return a draw without an optimum, as where an exponent is 0, counts as one that never gets there."""
    return np.where(np.isnan(draws), np.inf, draws)


def bootstrap_loss(fit: LossLawFit, samples: int, *, seed: int = 0, method: str = "residuals") -> LossBootstrap:
    """Draw data and fit the same law to each draw, all side by side, from the law of the fit.

    Raises
    ------
    ValueError
        An unknown method; less than two samples.
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
            # A fit near the least absolute deviations passes through as many points as it has parameters. Their
            # residuals of 0 are of the fit, not of the runs.
            kept = np.argsort(np.abs(fit.residuals))[fit.free_parameters :]
            moved = math.sqrt(freedom / n) * generator.choice(fit.residuals[kept], size=(samples, n))
        ends = problem.solve(start, problem.predicted(fit.point[None]) + spread * moved)[0]
    return LossBootstrap(fit, dict(laws_of(fit, ends)), method, seed)
