"""How a compute budget is split best, without a law of the loss: envelopes of curves and iso-FLOP parabolas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from structlin.scaling_laws._bootstrap import Estimate
from structlin.scaling_laws._loss_law import FLOPS, _positive

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Allocation:
    """``N_opt = exp(log_coefficient) * C**exponent``, fitted to the best sizes of several budgets.

    The interval is that of Student's t for a line through the logarithms. It takes the errors of the best sizes from
    their scatter around the line.

    Attributes
    ----------
    log_coefficient, exponent
        Of the law.
    compute, params
        The budgets and their best sizes, shape (n,).
    flops
        Of training, for each unit of N and of D.
    """

    log_coefficient: float
    exponent: float
    compute: Array = field(repr=False)
    params: Array = field(repr=False)
    flops: float = FLOPS

    def optimum(self, compute: float) -> tuple[float, float]:
        """(N, D) for a budget, with ``flops * N * D = compute``."""
        n = math.exp(self.log_coefficient + self.exponent * math.log(compute))
        return n, compute / (self.flops * n)

    def interval(self, confidence: float = 0.95) -> Estimate:
        """Return the exponent with its interval; NaN at both ends for less than three budgets."""
        if len(self.compute) < 3:
            return Estimate(self.exponent, math.nan, math.nan, confidence)
        line = stats.linregress(np.log(self.compute), np.log(self.params))
        half = float(stats.t.ppf((1 + confidence) / 2, len(self.compute) - 2) * line.stderr)
        return Estimate(self.exponent, self.exponent - half, self.exponent + half, confidence)


@dataclass(frozen=True)
class Parabola:
    """Loss against log N at one compute budget.

    Attributes
    ----------
    compute
        Geometric mean of the points' budgets.
    params, loss
        Of the points, shape (n,).
    coefficients
        Of the polynomial in ``log(N) - centre``, the constant first, shape (3,).
    centre
        Mean of log N.
    """

    compute: float
    params: Array = field(repr=False)
    loss: Array = field(repr=False)
    coefficients: Array
    centre: float

    def __call__(self, params: npt.ArrayLike) -> Any:
        """Return the loss that the parabola gives for sizes."""
        return np.polynomial.polynomial.polyval(np.log(params) - self.centre, self.coefficients)

    @property
    def best(self) -> tuple[float, float]:
        """(N, loss) at the vertex."""
        c, b, a = self.coefficients
        return float(math.exp(self.centre - b / (2 * a))), float(c - b * b / (4 * a))


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of several budgets and the law of their minima, from :func:`fit_isoflop`.

    Attributes
    ----------
    parabolas
        In order of the budget.
    allocation
        The law of the minima.
    left_out
        Why other budgets have no parabola, by budget.
    """

    parabolas: tuple[Parabola, ...]
    allocation: Allocation
    left_out: dict[float, str]


def fit_isoflop(
    params: npt.ArrayLike,
    compute: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    budgets: npt.ArrayLike | None = None,
    tolerance: float = 0.1,
    flops: float = FLOPS,
) -> IsoFlop:
    """Parabolas of the loss against log N at each compute budget, and the law of their minima (approach 2).

    A budget counts where its parabola opens upwards and has its minimum within the sizes that were tried.

    Parameters
    ----------
    params, compute, loss
        Of runs, shape (n,), above 0.
    budgets
        Of compute, shape (k,). A point belongs to the nearest, where that is within ``tolerance``, and is left out
        otherwise. None: points are of one budget where no gap between neighbours, in order of compute, is larger than
        ``tolerance``, which finds the budgets of a sweep that has no runs in between.
    tolerance
        Of a budget, relative, above 0.
    flops
        Of training, for each unit of N and of D (:meth:`LossLaw.optimum`).

    Raises
    ------
    ValueError
        Points that are not positive; less than two budgets that count. The message says why others do not.

    Notes
    -----
    Source: Hoffmann et al. 2022, section 3.2.

    Examples
    --------
    >>> from structlin.scaling_laws import LossLaw
    >>> law = LossLaw(1.7, 400.0, 0.34, 410.0, 0.28)
    >>> c = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
    >>> n = np.concatenate([law.optimum(b).params * np.logspace(-0.5, 0.5, 7) for b in (1e18, 1e19, 1e20, 1e21)])
    >>> found = fit_isoflop(n, c, law(n, c / (6 * n)))
    >>> round(found.allocation.exponent, 3), round(law.allocation, 3)
    (0.452, 0.452)
    """
    n, c, y = (_positive(name, v) for name, v in (("params", params), ("compute", compute), ("loss", loss)))
    if not len(n) == len(c) == len(y):
        raise ValueError(f"params, compute and loss must be of equal length, got {len(n)}, {len(c)} and {len(y)}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    parabolas, left_out = [], {}
    for own in _by_budget(c, budgets, tolerance):
        budget = float(np.exp(np.log(c[own]).mean()))
        sizes = np.log(n[own])
        if (different := len(np.unique(sizes))) < 3:
            left_out[budget] = f"{different} different sizes, a parabola needs 3"
            continue
        centre = float(sizes.mean())
        coefficients = np.polynomial.polynomial.polyfit(sizes - centre, y[own], 2)
        found = Parabola(budget, n[own], y[own], coefficients, centre)
        if coefficients[2] <= 0:
            left_out[budget] = "the parabola opens downwards"
        elif not n[own].min() <= found.best[0] <= n[own].max():
            left_out[budget] = f"the minimum, {found.best[0]:.3g}, is outside of the sizes that were tried"
        else:
            parabolas.append(found)
    if len(parabolas) < 2:
        reasons = "; ".join(f"{budget:.3g}: {text}" for budget, text in left_out.items())
        raise ValueError(f"a law of the minima needs two budgets with one, got {len(parabolas)} ({reasons})")
    budgets, best = np.array([p.compute for p in parabolas]), np.array([p.best[0] for p in parabolas])
    return IsoFlop(tuple(parabolas), _allocation(budgets, best, flops), left_out)


def _by_budget(compute: Array, budgets: npt.ArrayLike | None, tolerance: float) -> list[Array]:
    """Return the indices of the points of each budget, in rising order of the budgets."""
    logs, width = np.log(compute), math.log1p(tolerance)
    if budgets is None:
        order = np.argsort(compute, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(logs[order]) > width) + 1)
    given = np.sort(np.log(_positive("budgets", budgets)))
    distance = np.abs(logs[:, None] - given)
    nearest = np.where(distance.min(axis=1) <= width, distance.argmin(axis=1), -1)
    return [own for number in range(len(given)) if len(own := np.flatnonzero(nearest == number))]


@dataclass(frozen=True)
class Envelope:
    """The best run of each budget and the law of their sizes, from :func:`fit_envelope`.

    Attributes
    ----------
    compute
        Geometric mean of the budgets at which a run is the best, shape (runs,), rising.
    params, run
        Size and number of that run.
    allocation
        The law of the sizes.
    """

    compute: Array
    params: Array
    run: Array
    allocation: Allocation


def fit_envelope(
    curves: Sequence[tuple[float, npt.ArrayLike, npt.ArrayLike]], *, flops: float = FLOPS, grid: int = 2000
) -> Envelope:
    """Return the run of the lowest loss at each compute, from training curves, and the law of its size (approach 1).

    Curves are joined by straight lines of the loss against log compute, and compared on ``grid`` budgets, evenly
    spaced in the logarithm. Each run that is best somewhere counts once, with the geometric mean of the budgets where
    it is. The first and the last are left out where there are four or more: their ranges end with the data.

    Parameters
    ----------
    curves
        (params, tokens, loss) of each run; tokens and loss of its evaluations, shape (n,), tokens rising. The learning
        rate should have come down by the end of a curve; what was measured before is higher than a run of that length
        would end at.
    flops
        Of training, for each unit of N and of D (:meth:`LossLaw.optimum`).
    grid
        Number of budgets.

    Raises
    ------
    ValueError
        Values that are not positive, tokens that do not rise, less than two runs that are best somewhere.

    Notes
    -----
    Source: Hoffmann et al. 2022, section 3.1.
    """
    lines = []
    for number, (size, tokens, loss) in enumerate(curves):
        (n,), t, y = _positive("params", [size]), _positive("tokens", tokens), _positive("loss", loss)
        if len(t) != len(y) or not (np.diff(t) > 0).all():
            raise ValueError(f"run {number}: tokens must rise and be as many as losses, got {len(t)} and {len(y)}")
        lines.append((float(n), np.log(flops * n * t), y))
    if not lines:
        raise ValueError("no curves were given")
    low, high = min(x[0] for _, x, _ in lines), max(x[-1] for _, x, _ in lines)
    at = np.linspace(low, high, grid)
    values = np.array([np.interp(at, x, y, left=np.inf, right=np.inf) for _, x, y in lines])
    covered = np.isfinite(values).any(axis=0)
    at, winner = at[covered], values[:, covered].argmin(axis=0)
    means = {int(r): float(at[winner == r].mean()) for r in np.unique(winner)}
    runs = np.array(sorted(means, key=means.__getitem__))
    budgets, sizes = np.exp([means[r] for r in runs]), np.array([lines[r][0] for r in runs])
    kept = slice(1, -1) if len(runs) >= 4 else slice(None)
    if len(np.unique(sizes[kept])) < 2:
        raise ValueError(f"a law needs two sizes that are best somewhere, got {np.unique(sizes).tolist()}")
    return Envelope(budgets, sizes, runs, _allocation(budgets[kept], sizes[kept], flops))


def _allocation(compute: Array, params: Array, flops: float) -> Allocation:
    log_coefficient, exponent = np.polynomial.polynomial.polyfit(np.log(compute), np.log(params), 1)
    return Allocation(float(log_coefficient), float(exponent), compute, params, flops)
