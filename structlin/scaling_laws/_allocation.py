"""Optimal split of a compute budget without a law of the loss: envelopes of training curves and iso-FLOP parabolas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from structlin.scaling_laws._frontier import positive
from structlin.scaling_laws._law import Estimate
from structlin.scaling_laws._loss_law import FLOPS

Array = npt.NDArray[Any]
_BUDGETS = 2000  # at which the curves of an envelope are compared


@dataclass(frozen=True)
class Allocation:
    r"""Law of the optimal model size, :math:`N_\mathrm{opt} = e^b \, C^a`, fitted to the best sizes of several budgets.

    The interval of the exponent is that of Student's t for a line through the logarithms. The scatter of the best sizes
    around the line determines its width.

    Attributes
    ----------
    log_coefficient, exponent
        The coefficients b and a.
    compute, params
        Budgets and their best sizes, shape (n,).
    flops
        Training FLOPs for each unit of N times D.
    """

    log_coefficient: float
    exponent: float
    compute: Array = field(repr=False)
    params: Array = field(repr=False)
    flops: float = FLOPS

    def optimum(self, compute: float) -> tuple[float, float]:
        """Return the optimal sizes (N, D) for a budget, with ``flops * N * D = compute``."""
        n = math.exp(self.log_coefficient + self.exponent * math.log(compute))
        return n, compute / (self.flops * n)

    def interval(self, confidence: float = 0.95) -> Estimate:
        """Return the exponent with its interval. With fewer than three budgets both ends are NaN."""
        if len(self.compute) < 3:
            return Estimate(self.exponent, math.nan, math.nan, confidence)
        line = stats.linregress(np.log(self.compute), np.log(self.params))
        half = float(stats.t.ppf((1 + confidence) / 2, len(self.compute) - 2) * line.stderr)
        return Estimate(self.exponent, self.exponent - half, self.exponent + half, confidence)


@dataclass(frozen=True)
class Parabola:
    """Parabola of the loss against log N at one compute budget.

    Attributes
    ----------
    compute
        Geometric mean of the compute of the points.
    params, loss
        Model sizes and losses of the points, shape (n,).
    coefficients
        Coefficients of the polynomial in ``log(N) - centre``, constant first, shape (3,).
    centre
        Mean of log N.
    """

    compute: float
    params: Array = field(repr=False)
    loss: Array = field(repr=False)
    coefficients: Array
    centre: float

    def __call__(self, params: npt.ArrayLike) -> Any:
        """Return the value of the parabola at model sizes."""
        return np.polynomial.polynomial.polyval(np.log(params) - self.centre, self.coefficients)

    @property
    def best(self) -> tuple[float, float]:
        """Model size and loss (N, loss) at the vertex."""
        c, b, a = self.coefficients
        return float(math.exp(self.centre - b / (2 * a))), float(c - b * b / (4 * a))


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of several budgets and the law of their minima, from :func:`fit_isoflop`.

    Attributes
    ----------
    parabolas
        Parabolas in ascending order of the budget.
    allocation
        Law of the minima.
    left_out
        Budgets without a parabola, each with the reason.
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
    """Fit a parabola of the loss against log N for each compute budget, and the law of their minima (approach 2).

    A budget is used if its parabola opens upwards and its minimum lies between the smallest and the largest size.

    Parameters
    ----------
    params, compute, loss
        Model sizes, compute and losses of runs, shape (n,), above 0.
    budgets
        Compute budgets, shape (k,). A run belongs to the nearest budget. It is left out if the relative distance
        exceeds ``tolerance``. Default: the runs in order of compute, divided where the compute of neighbours differs by
        more than ``tolerance``.
    tolerance
        Relative width of a budget, above 0.
    flops
        Training FLOPs for each unit of N times D (:meth:`LossLaw.optimum`).

    Returns
    -------
    IsoFlop
        The parabolas, and the law of their minima.

    Raises
    ------
    ValueError
        If a value is not positive, or fewer than two budgets can be used. The message gives the reasons for the others.

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
    n, c, y = (positive(name, v) for name, v in (("params", params), ("compute", compute), ("loss", loss)))
    if not len(n) == len(c) == len(y):
        raise ValueError(f"params, compute and loss must be of equal length, got {len(n)}, {len(c)} and {len(y)}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    parabolas, left_out = [], {}
    for own in _by_budget(c, budgets, tolerance):
        budget = float(np.exp(np.log(c[own]).mean()))
        sizes = np.log(n[own])
        if (different := len(np.unique(sizes))) < 3:
            left_out[budget] = f"a parabola needs 3 different sizes, got {different}"
            continue
        centre = float(sizes.mean())
        coefficients = np.polynomial.polynomial.polyfit(sizes - centre, y[own], 2)
        found = Parabola(budget, n[own], y[own], coefficients, centre)
        if coefficients[2] <= 0:
            left_out[budget] = "the parabola opens downwards"
        elif not n[own].min() <= found.best[0] <= n[own].max():
            left_out[budget] = f"the minimum, {found.best[0]:.3g}, lies outside the sizes of the runs"
        else:
            parabolas.append(found)
    if len(parabolas) < 2:
        reasons = "; ".join(f"{budget:.3g}: {text}" for budget, text in left_out.items())
        raise ValueError(
            f"a law of the minima needs at least 2 budgets with a minimum, got {len(parabolas)} ({reasons})"
        )
    budgets, best = np.array([p.compute for p in parabolas]), np.array([p.best[0] for p in parabolas])
    return IsoFlop(tuple(parabolas), _allocation(budgets, best, flops), left_out)


def _by_budget(compute: Array, budgets: npt.ArrayLike | None, tolerance: float) -> list[Array]:
    """Return the indices of the points of each budget, in ascending order of the budgets."""
    logs, width = np.log(compute), math.log1p(tolerance)
    if budgets is None:
        order = np.argsort(compute, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(logs[order]) > width) + 1)
    given = np.sort(np.log(positive("budgets", budgets)))
    distance = np.abs(logs[:, None] - given)
    nearest = np.where(distance.min(axis=1) <= width, distance.argmin(axis=1), -1)
    return [own for number in range(len(given)) if len(own := np.flatnonzero(nearest == number))]


@dataclass(frozen=True)
class Envelope:
    """Best run of each budget and the law of their sizes, from :func:`fit_envelope`.

    Attributes
    ----------
    compute
        Geometric mean of the budgets at which a run has the lowest loss, shape (runs,), ascending.
    params, run
        Model size and index of that run, shape (runs,).
    allocation
        Law of the sizes.
    """

    compute: Array
    params: Array
    run: Array
    allocation: Allocation


def fit_envelope(curves: Sequence[tuple[float, npt.ArrayLike, npt.ArrayLike]], *, flops: float = FLOPS) -> Envelope:
    """Find the run with the lowest loss at each compute budget, and fit the law of its size (approach 1).

    Each training curve is interpolated linearly in the logarithm of compute. The curves are compared at 2000 budgets
    with equal ratios. A run that is the best at some budgets counts once, with the geometric mean of these budgets. If
    there are four or more such runs, the first and the last are left out, because the data limit their ranges.

    Parameters
    ----------
    curves
        Tuples (params, tokens, loss), one for each run: the model size, and the tokens and losses of its evaluations,
        shape (n,), tokens ascending. The learning rate should be decayed by the end of a curve. Earlier losses exceed
        the final loss of a run of that length.
    flops
        Training FLOPs for each unit of N times D (:meth:`LossLaw.optimum`).

    Returns
    -------
    Envelope
        The best runs, and the law of their sizes.

    Raises
    ------
    ValueError
        If a value is not positive, tokens do not ascend, or the best runs have fewer than two sizes.

    Notes
    -----
    Source: Hoffmann et al. 2022, section 3.1.
    """
    lines = []
    for number, (size, tokens, loss) in enumerate(curves):
        (n,), t, y = positive("params", [size]), positive("tokens", tokens), positive("loss", loss)
        if len(t) != len(y) or not (np.diff(t) > 0).all():
            raise ValueError(
                f"run {number}: tokens must ascend, with one loss for each, got {len(t)} tokens and {len(y)} losses"
            )
        lines.append((float(n), np.log(flops * n * t), y))
    if not lines:
        raise ValueError("curves is empty; give one (params, tokens, loss) for each run")
    low, high = min(x[0] for _, x, _ in lines), max(x[-1] for _, x, _ in lines)
    at = np.linspace(low, high, _BUDGETS)
    values = np.array([np.interp(at, x, y, left=np.inf, right=np.inf) for _, x, y in lines])
    covered = np.isfinite(values).any(axis=0)
    at, winner = at[covered], values[:, covered].argmin(axis=0)
    means = {int(r): float(at[winner == r].mean()) for r in np.unique(winner)}
    runs = np.array(sorted(means, key=means.__getitem__))
    budgets, sizes = np.exp([means[r] for r in runs]), np.array([lines[r][0] for r in runs])
    kept = slice(1, -1) if len(runs) >= 4 else slice(None)
    if len(np.unique(sizes[kept])) < 2:
        raise ValueError(f"a law needs best runs of at least 2 sizes, got {np.unique(sizes).tolist()}")
    return Envelope(budgets, sizes, runs, _allocation(budgets[kept], sizes[kept], flops))


def _allocation(compute: Array, params: Array, flops: float) -> Allocation:
    log_coefficient, exponent = np.polynomial.polynomial.polyfit(np.log(compute), np.log(params), 1)
    return Allocation(float(log_coefficient), float(exponent), compute, params, flops)
