"""The law of the loss in the sizes of model and data, for one or several structures, and its bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from structlin.scaling_laws._descent import MAX_EXPONENT, Problem
from structlin.scaling_laws._frontier import positive
from structlin.scaling_laws._law import Estimate, PowerLaw, check_samples, compute_at, estimate, ratio

Array = npt.NDArray[Any]
TERMS = ("E", "A", "alpha", "B", "beta")
FLOPS = 6.0  # training FLOPs for each parameter of a dense layer and each token: 2 forward, 4 backward
_EXPONENTS = (0.08, 0.2, 0.35, 0.5, 0.8, 1.3)  # initial values


@dataclass(frozen=True)
class Optimum:
    """Optimal split of a compute budget.

    Attributes
    ----------
    params, tokens
        Sizes N and D.
    loss
        Loss of the law at these sizes.
    """

    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossLaw:
    r"""Law of the loss of a model of N parameters after training on D tokens.

    .. math:: L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}

    Source: Hoffmann et al., *Training Compute-Optimal Large Language Models*, 2022, equation 2.

    Attributes
    ----------
    E
        Irreducible loss.
    A, alpha
        Coefficient and exponent of the model size.
    B, beta
        Coefficient and exponent of the size of the data.

    Examples
    --------
    >>> law = LossLaw(E=1.8172, A=482.0, alpha=0.3478, B=2085.4, beta=0.3659)
    >>> round(law(70e9, 1.4e12), 3)
    1.974
    >>> best = law.optimum(5.76e23)
    >>> f"{best.params:.3g} {best.tokens:.3g} {best.loss:.3f}"
    '7.25e+10 1.32e+12 1.974'
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, params: Any, tokens: Any) -> Any:
        """Return the loss at sizes, numbers or arrays."""
        params, tokens = (np.asarray(size, dtype=np.float64) for size in (params, tokens))
        value = self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)
        return float(value) if np.ndim(value) == 0 else value

    @property
    def allocation(self) -> float:
        r"""Exponent a of :math:`N_\mathrm{opt} \propto C^a`. The exponent of the tokens is 1 - a."""
        return self.beta / (self.alpha + self.beta) if self.alpha + self.beta else math.nan

    def optimum(self, compute: float, *, flops: float = FLOPS) -> Optimum:
        """Return the sizes with the lowest loss for which ``flops * N * D = compute``.

        Parameters
        ----------
        compute
            Compute budget in FLOPs, above 0.
        flops
            Training FLOPs for each unit of N times D. It is 6 if N is the number of parameters of dense layers and D
            that of tokens. It is also 6 for any structure if N is the number of MACs of the forward pass of one token.

        Returns
        -------
        Optimum
            The sizes and their loss.

        Raises
        ------
        ValueError
            If a value is not positive and finite, or the law has no optimum because a coefficient or exponent is 0.
        """
        if not (compute > 0 and math.isfinite(compute) and flops > 0):
            raise ValueError(f"compute and flops must be positive and finite, got {compute} and {flops}")
        if not (self.A > 0 and self.B > 0 and self.alpha > 0 and self.beta > 0):
            raise ValueError(f"all coefficients and exponents must be positive for an optimum, got {self}")
        params, tokens, loss = optima(np.array(self.parameters)[None], compute, flops)
        return Optimum(float(params[0]), float(tokens[0]), float(loss[0]))

    def frontier(self, *, flops: float = FLOPS) -> PowerLaw:
        r"""Return the lowest loss of each budget, a power law with exponent :math:`\alpha \beta / (\alpha + \beta)`."""
        self.optimum(1.0, flops=flops)
        return PowerLaw(*(float(v) for v in frontiers(np.array(self.parameters)[None], flops)[0]))

    @property
    def parameters(self) -> tuple[float, float, float, float, float]:
        """The tuple (log E, log A, alpha, log B, beta)."""
        logs = [math.log(v) if v > 0 else -math.inf for v in (self.E, self.A, self.B)]
        return logs[0], logs[1], self.alpha, logs[2], self.beta


def optima(p: Array, compute: float, flops: float) -> tuple[Array, Array, Array]:
    """Return the optimal sizes and their losses, for laws of shape (..., 5)."""
    e, log_a, alpha, log_b, beta = np.moveaxis(p, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Equal marginal gains: alpha A N^-alpha = beta B D^-beta, with N D = C / flops.
        balance = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
        product = math.log(compute) - math.log(flops)
        n = balance + beta / (alpha + beta) * product
        d = product - n
        return np.exp(n), np.exp(d), np.exp(e) + np.exp(log_a - alpha * n) + np.exp(log_b - beta * d)


def frontiers(p: Array, flops: float) -> Array:
    """Return log coefficient, exponent and floor of the lowest loss against compute, shape (..., 3)."""
    e, _, alpha, _, beta = np.moveaxis(p, -1, 0)
    exponent = alpha * beta / (alpha + beta)
    loss = optima(p, 1.0, flops)[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([np.log(loss - np.exp(e)), exponent, np.exp(e)], axis=-1)


@dataclass(frozen=True)
class LossLawFit:
    """Laws of one or several groups, and the points to which they were fitted.

    Attributes
    ----------
    laws
        Law of each group, by name.
    shared
        Terms that are equal in all groups; empty for one group.
    params, tokens, loss
        Sizes and losses of the points, shape (n,).
    group
        Index of the group of each point in ``laws``, shape (n,).
    residuals
        Residuals ``log(loss) - log(law)``, shape (n,).
    objective
        Sum of the Huber losses.
    delta
        As given to :func:`fit_loss_law`.
    agreement
        Fraction of the starts that converge to the best objective, within a relative difference of 1e-6.
    notes
        Warnings about the fit: exponents at a bound, terms that vanish.
    """

    laws: dict[str, LossLaw]
    shared: tuple[str, ...]
    params: Array = field(repr=False)
    tokens: Array = field(repr=False)
    loss: Array = field(repr=False)
    group: Array = field(repr=False)
    residuals: Array = field(repr=False)
    objective: float
    delta: float
    agreement: float
    notes: tuple[str, ...]
    problem: Problem = field(repr=False, compare=False)
    point: Array = field(repr=False, compare=False)

    @property
    def law(self) -> LossLaw:
        """The law of a fit with one group; ValueError if there are several."""
        if len(self.laws) > 1:
            raise ValueError(
                f"the fit has the laws of {len(self.laws)} groups, {', '.join(self.laws)}; use laws[group]"
            )
        return next(iter(self.laws.values()))

    @property
    def free_parameters(self) -> int:
        """Number of fitted parameters."""
        return self.problem.size

    def bootstrap(self, samples: int = 1000, *, seed: int = 0, method: str = "residuals") -> LossBootstrap:
        """Fit the laws to resampled data.

        Parameters
        ----------
        samples
            Number of samples, at least 2.
        seed
            Seed of the generator.
        method
            ``residuals``, ``parametric`` or ``cases`` (:class:`LossBootstrap`).

        Returns
        -------
        LossBootstrap
            The laws of all samples.

        Raises
        ------
        ValueError
            If the method is unknown or there are fewer than two samples.
        """
        check_samples(method, samples)
        generator = np.random.default_rng(seed)
        problem = self.problem
        n, freedom = len(self.loss), len(self.loss) - self.free_parameters
        spread = np.sqrt(n / generator.chisquare(freedom, size=(samples, 1)))
        start = np.broadcast_to(self.point, (samples, problem.size))
        if method == "cases":
            weights = np.zeros((samples, n))
            for number in range(len(self.laws)):
                own = np.flatnonzero(self.group == number)
                weights[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=samples)
            ends = problem.solve(start, weights=weights)[0]
            ends = np.clip(self.point + spread * (ends - self.point), problem.lower, problem.upper)
        else:
            if method == "parametric":
                moved = np.sqrt(np.square(self.residuals).mean()) * generator.standard_normal((samples, n))
            else:
                # A fit close to least absolute deviations passes through as many points as it has parameters. Their
                # residuals of 0 say nothing about the spread of the runs.
                kept = np.argsort(np.abs(self.residuals))[self.free_parameters :]
                moved = math.sqrt(freedom / n) * generator.choice(self.residuals[kept], size=(samples, n))
            ends = problem.solve(start, problem.predicted(self.point[None]) + spread * moved)[0]
        found = problem.natural(ends)
        return LossBootstrap(self, {name: found[:, k] for k, name in enumerate(self.laws)}, method, seed)


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

    def multiplier(
        self, group: str, reference: str, *, loss: float, flops: float = FLOPS, confidence: float = 0.95
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
            Training FLOPs for each unit of N times D (:meth:`LossLaw.optimum`).
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
        names = self._group(group), self._group(reference)
        computes = [float(compute_at(self.fit.laws[name].frontier(flops=flops).parameters, loss)) for name in names]
        draws = [compute_at(_filled(frontiers(self.draws[name], flops)), loss) for name in names]
        return ratio(computes, draws, f"a loss of {loss:g}", confidence)

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


def fit_loss_law(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    shared: Sequence[str] = ("E", "B", "beta"),
    delta: float = 1e-3,
) -> LossLawFit:
    r"""Fit :math:`L(N, D) = E + A / N^\alpha + B / D^\beta` with the Huber loss of the residuals of log L.

    The objective has several minima. The fit starts from all 36 pairs of six exponents between 0.08 and 1.3, with E, A
    and B from non-negative least squares, and returns the best result. Exponents are bounded by 0 and 10.

    Parameters
    ----------
    params
        Model sizes N, shape (n,): parameters, or another measure such as the MACs of one token.
    tokens
        Sizes D of the data, shape (n,): tokens, samples, or another measure.
    loss
        Losses, shape (n,), above 0.
    groups
        Name of the group (structure) of each point. All groups have the terms in ``shared`` in common; each group has
        its own values of the other terms. Default: all points belong to one group.
    shared
        Names out of E, A, alpha, B and beta. By default the groups differ only in A and alpha, because E, B and beta
        are properties of the data.
    delta
        Threshold beyond which a residual counts linearly. With 1e-3, the value of the paper, the fit is close to least
        absolute deviations.

    Returns
    -------
    LossLawFit
        The laws and their residuals.

    Raises
    ------
    ValueError
        If a value is not positive and finite, the lengths differ, there are no more points than parameters, a group has
        too few different sizes to determine its terms, or a term is unknown.

    Notes
    -----
    Source: Hoffmann et al. 2022, section 3.3 and D.2.

    Examples
    --------
    >>> n, d = (g.ravel() for g in np.meshgrid(np.logspace(7, 9, 4), np.logspace(9, 11, 4)))
    >>> law = LossLaw(1.7, 400.0, 0.34, 410.0, 0.28)
    >>> found = fit_loss_law(n, d, law(n, d)).law
    >>> round(found.E, 4), round(found.alpha, 4), round(found.beta, 4)
    (1.7, 0.34, 0.28)
    """
    n, d, y = (positive(name, v) for name, v in (("params", params), ("tokens", tokens), ("loss", loss)))
    if not len(n) == len(d) == len(y):
        raise ValueError(f"params, tokens and loss must have equal lengths, got {len(n)}, {len(d)} and {len(y)}")
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta must be positive and finite, got {delta}")
    if unknown := [term for term in shared if term not in TERMS]:
        raise ValueError(f"unknown term {unknown[0]!r} in shared; one of {', '.join(TERMS)}")
    labels = ["all"] * len(n) if groups is None else [str(g) for g in groups]
    if len(labels) != len(n):
        raise ValueError(f"groups must have one name for each point, got {len(labels)} names for {len(n)} points")
    names = list(dict.fromkeys(labels))
    common = tuple(term for term in TERMS if term in shared) if len(names) > 1 else ()
    group = np.array([names.index(g) for g in labels])
    index = np.empty((len(names), 5), dtype=int)
    size = 0
    for column, term in enumerate(TERMS):
        index[:, column] = size + (0 if term in common else np.arange(len(names)))
        size += 1 if term in common else len(names)
    _check_points(names, group, n, d, size, common)
    problem = Problem(np.log(n), np.log(d), np.log(y), group, index, delta)
    ends, values = problem.solve(_starts(problem))
    best = int(values.argmin())
    agreement = float((values <= values[best] * (1 + 1e-6) + 1e-24).mean())
    point = ends[best]
    laws = {name: as_law(row) for name, row in zip(names, problem.natural(point[None])[0], strict=True)}
    return LossLawFit(
        laws, common, n, d, y, group, problem.y - problem.predicted(point[None])[0], float(values[best]), delta,
        agreement, _notes(problem, point, names), problem, point,
    )  # fmt: skip


def as_law(row: Array) -> LossLaw:
    with np.errstate(over="ignore"):
        return LossLaw(
            float(np.exp(row[0])), float(np.exp(row[1])), float(row[2]), float(np.exp(row[3])), float(row[4])
        )


def lacks_sizes(params: npt.ArrayLike, tokens: npt.ArrayLike, own: Sequence[str]) -> str | None:
    """Return the reason why the points of a group do not determine its terms ``own``; None if they do.

    Examples
    --------
    >>> lacks_sizes([1e6, 1e6], [1e9, 1e10], ["A", "alpha"])
    'a law needs 3 different sizes of the model, got 1'
    """
    for values, what, terms in ((params, "model", ("A", "alpha")), (tokens, "data", ("B", "beta"))):
        needed = 1 + sum(term in own for term in terms)
        if (different := len(np.unique(values))) < needed:
            return f"a law needs {needed} different sizes of the {what}, got {different}"
    return None


def _check_points(names: list[str], group: Array, n: Array, d: Array, size: int, shared: tuple[str, ...]) -> None:
    if len(n) <= size:
        raise ValueError(f"a law of {size} parameters needs more than {size} points, got {len(n)}")
    if lacking := lacks_sizes(n, d, TERMS):
        raise ValueError(lacking)
    for number, name in enumerate(names):
        own = group == number
        if lacking := lacks_sizes(n[own], d[own], [term for term in TERMS if term not in shared]):
            raise ValueError(f"{name}: {lacking}" if len(names) > 1 else lacking)


def _starts(problem: Problem) -> Array:
    """Return a start for each pair of exponents; E, A and B by non-negative least squares of L / L - 1."""
    index, group = problem.index, problem.group
    found = []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            columns = np.zeros((len(group), problem.size))
            points = np.arange(len(group))
            for column, values in ((0, 0 * problem.n), (1, -alpha * problem.n), (3, -beta * problem.d)):
                columns[points, index[group, column]] = np.exp(values - problem.y)
            start = np.log(np.maximum(nnls(columns, np.ones(len(group)))[0], 1e-4))
            start[index[:, 2]], start[index[:, 4]] = alpha, beta
            found.append(start)
    return np.array(found)


def _notes(problem: Problem, point: Array, names: Sequence[str]) -> tuple[str, ...]:
    notes = []
    for name, row in zip(names, point[problem.index], strict=True):
        where = f"{name}: " if len(names) > 1 else ""
        for column in (2, 4):
            if row[column] <= 1e-6 or row[column] >= MAX_EXPONENT - 1e-6:
                notes.append(
                    f"{where}{TERMS[column]} is at its bound, {row[column]:.3g}: the points do not determine it"
                )
        for column, size in ((1, "model"), (3, "data")):
            if row[column] < -12:
                notes.append(f"{where}the term of the {size} vanishes: the loss does not fall with its size")
        if row[0] < -12:
            notes.append(f"{where}E vanishes: the points show no irreducible loss")
    return tuple(dict.fromkeys(notes))
