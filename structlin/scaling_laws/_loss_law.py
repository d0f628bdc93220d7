"""The law of a loss in two sizes, model and data, for one or several structures (Hoffmann et al. 2022, approach 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from structlin.scaling_laws._descent import MAX_EXPONENT, Problem
from structlin.scaling_laws._law import PowerLaw

if TYPE_CHECKING:
    from structlin.scaling_laws._loss_bootstrap import LossBootstrap

Array = npt.NDArray[Any]
TERMS = ("E", "A", "alpha", "B", "beta")
FLOPS = 6.0  # of training, for each parameter of a dense layer and each token: 2 forward, 4 backward
_EXPONENTS = (0.08, 0.2, 0.35, 0.5, 0.8, 1.3)  # starts


@dataclass(frozen=True)
class Optimum:
    """The best split of a compute budget. ``params``, ``tokens``, and the ``loss`` that the law gives there."""

    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossLaw:
    r"""``L(N, D) = E + A / N**alpha + B / D**beta``: the loss of a model of N parameters after D tokens.

    Source: Hoffmann et al., *Training Compute-Optimal Large Language Models*, 2022, equation 2.

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
        """Return the loss, of numbers or of arrays."""
        value = self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)
        return float(value) if np.ndim(value) == 0 else value

    @property
    def allocation(self) -> float:
        """Exponent a of ``N_opt ~ C**a``; that of the tokens is 1 - a."""
        return self.beta / (self.alpha + self.beta) if self.alpha + self.beta else math.nan

    def optimum(self, compute: float, *, flops: float = FLOPS) -> Optimum:
        """Return the sizes of the lowest loss with ``flops * N * D = compute``.

        Parameters
        ----------
        compute
            FLOPs, above 0.
        flops
            Of training, for each unit of N and of D. 6 for parameters of dense layers and tokens; 6 also where N is the
            MACs of a forward pass of a token, of whatever structure.

        Notes
        -----
        Raises ValueError for a budget that is not positive and finite, and for a law that has no optimum.
        """
        if not (compute > 0 and math.isfinite(compute) and flops > 0):
            raise ValueError(f"compute and flops must be positive and finite, got {compute} and {flops}")
        if not (self.A > 0 and self.B > 0 and self.alpha > 0 and self.beta > 0):
            raise ValueError(f"a law in which a size does not lower the loss has no optimum: {self}")
        params, tokens, loss = optima(np.array(self.parameters)[None], compute, flops)
        return Optimum(float(params[0]), float(tokens[0]), float(loss[0]))

    def frontier(self, *, flops: float = FLOPS) -> PowerLaw:
        """Return the lowest loss of each budget: a power law with exponent alpha beta / (alpha + beta), above E."""
        self.optimum(1.0, flops=flops)
        return PowerLaw(*(float(v) for v in frontiers(np.array(self.parameters)[None], flops)[0]))

    @property
    def parameters(self) -> tuple[float, float, float, float, float]:
        """(log E, log A, alpha, log B, beta)."""
        logs = [math.log(v) if v > 0 else -math.inf for v in (self.E, self.A, self.B)]
        return logs[0], logs[1], self.alpha, logs[2], self.beta


def optima(p: Array, compute: float, flops: float) -> tuple[Array, Array, Array]:
    """Optimal sizes and losses for laws of shape (..., 5)."""
    e, log_a, alpha, log_b, beta = np.moveaxis(p, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Equal marginal gains: alpha A N^-alpha = beta B D^-beta, with N D = C / flops.
        balance = (np.log(alpha) + log_a - np.log(beta) - log_b) / (alpha + beta)
        product = math.log(compute) - math.log(flops)
        n = balance + beta / (alpha + beta) * product
        d = product - n
        return np.exp(n), np.exp(d), np.exp(e) + np.exp(log_a - alpha * n) + np.exp(log_b - beta * d)


def frontiers(p: Array, flops: float) -> Array:
    """(log coefficient, exponent, floor) of the lowest loss against compute, shape (..., 3)."""
    e, _, alpha, _, beta = np.moveaxis(p, -1, 0)
    exponent = alpha * beta / (alpha + beta)
    loss = optima(p, 1.0, flops)[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([np.log(loss - np.exp(e)), exponent, np.exp(e)], axis=-1)


@dataclass(frozen=True)
class LossLawFit:
    """Laws of one or several groups, and the points that they were fitted to.

    Attributes
    ----------
    laws
        By group.
    shared
        The terms that all groups have in common; empty for one group.
    params, tokens, loss
        Of the points, shape (n,).
    group
        Of each point, shape (n,), as a number into ``laws``.
    residuals
        ``log(loss) - log(law)``, shape (n,).
    objective
        The sum of the Huber losses.
    delta
        As given.
    agreement
        Share of the starts that end within 1e-6 (relative) of the best.
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
        """The law, of a fit of one group. Raises ValueError where there are several."""
        if len(self.laws) > 1:
            raise ValueError(f"there are several laws, of {', '.join(self.laws)}; take one of `laws`")
        return next(iter(self.laws.values()))

    @property
    def free_parameters(self) -> int:
        """How many numbers were fitted."""
        return self.problem.size

    def bootstrap(self, samples: int = 1000, *, seed: int = 0, method: str = "residuals") -> LossBootstrap:
        """Fit again to data drawn anew; see :class:`structlin.scaling_laws.LossBootstrap`."""
        from structlin.scaling_laws._loss_bootstrap import bootstrap_loss

        return bootstrap_loss(self, samples, seed=seed, method=method)


def fit_loss_law(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    shared: Sequence[str] = ("E", "B", "beta"),
    delta: float = 1e-3,
) -> LossLawFit:
    """Fit ``L(N, D) = E + A / N**alpha + B / D**beta`` by the Huber loss of the residuals of log L.

    The objective has several minima. The fit starts from every pair of six exponents from 0.08 to 1.3, with E, A and B
    by non-negative least squares, and keeps the best of the 36 ends. Exponents are held between 0 and 10.

    Parameters
    ----------
    params
        N, shape (n,): parameters, or any other size of the model, such as the MACs of a token.
    tokens
        D, shape (n,): tokens, samples, or any other size of the data.
    loss
        Shape (n,), above 0.
    groups
        Label of the structure of each point: one law for all, in which the terms in ``shared`` are the same for all
        groups and every group has its own of the others. None: all points are of one group.
    shared
        Of E, A, alpha, B, beta. By default the groups differ in A and alpha alone: the entropy of the data and what a
        finite amount of them costs belong to the task.
    delta
        Residuals beyond it count linearly. 1e-3, as in the paper, is near the least absolute deviations.

    Raises
    ------
    ValueError
        Points that are not positive and finite, or of different numbers; as many parameters as points or more; a group
        with less than two sizes of model or of data that it needs; an unknown term.

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
    n, d, y = (_positive(name, v) for name, v in (("params", params), ("tokens", tokens), ("loss", loss)))
    if not len(n) == len(d) == len(y):
        raise ValueError(f"params, tokens and loss must be of equal length, got {len(n)}, {len(d)} and {len(y)}")
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(f"delta must be positive and finite, got {delta}")
    if unknown := [term for term in shared if term not in TERMS]:
        raise ValueError(f"unknown term {unknown[0]!r} to share; one of {', '.join(TERMS)}")
    labels = ["all"] * len(n) if groups is None else [str(g) for g in groups]
    if len(labels) != len(n):
        raise ValueError(f"groups must name every point, got {len(labels)} names for {len(n)} points")
    names = list(dict.fromkeys(labels))
    common = tuple(term for term in TERMS if term in shared) if len(names) > 1 else ()
    group = np.array([names.index(g) for g in labels])
    index = np.empty((len(names), 5), dtype=int)
    size = 0
    for column, term in enumerate(TERMS):
        index[:, column] = size + (0 if term in common else np.arange(len(names)))
        size += 1 if term in common else len(names)
    _check_points(names, group, n, d, size, common)
    centre = np.log(n).mean(), np.log(d).mean(), np.log(y).min()
    problem = Problem(np.log(n) - centre[0], np.log(d) - centre[1], np.log(y) - centre[2], group, index, delta)
    ends, values = problem.solve(_starts(problem))
    best = int(values.argmin())
    agreement = float((values <= values[best] * (1 + 1e-6) + 1e-24).mean())
    point = ends[best]
    laws = {name: as_law(row) for name, row in zip(names, natural(problem, point[None], centre)[0], strict=True)}
    return LossLawFit(
        laws, common, n, d, y, group, problem.y - problem.predicted(point[None])[0], float(values[best]), delta,
        agreement, _notes(problem, point, names), problem, point,
    )  # fmt: skip


def natural(problem: Problem, points: Array, centre: tuple[float, float, float]) -> Array:
    """Parameters of the problem, shape (k, size), as those of the laws: shape (k, groups, 5), (log E, log A, ...)."""
    p = points[:, problem.index].copy()
    p[..., 1] += p[..., 2] * centre[0]
    p[..., 3] += p[..., 4] * centre[1]
    p[..., (0, 1, 3)] += centre[2]
    return p


def centre_of(fit: LossLawFit) -> tuple[float, float, float]:
    """Return what the problem of a fit was centred at."""
    return np.log(fit.params).mean(), np.log(fit.tokens).mean(), np.log(fit.loss).min()


def as_law(row: Array) -> LossLaw:
    with np.errstate(over="ignore"):
        return LossLaw(
            float(np.exp(row[0])), float(np.exp(row[1])), float(row[2]), float(np.exp(row[3])), float(row[4])
        )


def _positive(name: str, values: npt.ArrayLike) -> Array:
    found = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if found.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {found.shape}")
    if not (np.isfinite(found) & (found > 0)).all():
        bad = found[~(np.isfinite(found) & (found > 0))][0]
        raise ValueError(f"{name} must be positive and finite to have a logarithm, got {bad:g}")
    return found


def lacks_sizes(params: npt.ArrayLike, tokens: npt.ArrayLike, own: Sequence[str]) -> str | None:
    """Why the points of a group do not determine the terms that are its ``own``; None where they do.

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
        raise ValueError(f"a law of {size} parameters needs more points than that, got {len(n)}")
    if lacking := lacks_sizes(n, d, TERMS):
        raise ValueError(lacking)
    for number, name in enumerate(names):
        own = group == number
        if lacking := lacks_sizes(n[own], d[own], [term for term in TERMS if term not in shared]):
            raise ValueError(f"{name}: {lacking}" if len(names) > 1 else lacking)


def _starts(problem: Problem) -> Array:
    """One start for each pair of exponents: E and both coefficients by non-negative least squares of L / L - 1."""
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


def laws_of(fit: LossLawFit, draws: Array) -> Mapping[str, Array]:
    """Draws of the problem's parameters as those of each group's law, shape (samples, 5)."""
    found = natural(fit.problem, draws, centre_of(fit))
    return {name: found[:, number] for number, name in enumerate(fit.laws)}
