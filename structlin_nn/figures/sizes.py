"""Laws in two sizes: the frontier of the loss, iso-FLOP slices, and the best size of each budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from structlin.scaling_laws import FLOPS, IsoFlop, LossBootstrap
from structlin_nn.figures.compute import plain_ticks
from structlin_nn.figures.style import columns, finish, label, new_figure, series

__all__ = ["isoflop_figure", "sizes_figure"]


def sizes_figure(
    drawn: LossBootstrap,
    *,
    size: str = "params",
    y: str = "loss",
    budgets: Sequence[float] | None = None,
    flops: float = FLOPS,
    confidence: float = 0.95,
) -> Figure:
    """Left, loss against compute: the runs, and the lowest loss that the law gives, with its band.

    Right, for one group, the law at equal compute: loss against N, a curve for each budget, with runs near it and a
    star at its lowest point. For several groups the best N of each budget, with its band.

    Parameters
    ----------
    drawn
        Laws with intervals (:func:`structlin_nn.size_laws.fit_sizes`).
    size, y
        Columns of N and of the loss, for the axes.
    budgets
        Of the slices; None: six over the range of the runs.
    flops
        Of training, for each unit of N and of D.
    confidence
        Of the bands.
    """
    fit = drawn.fit
    compute = flops * fit.params * fit.tokens
    if budgets is None:
        budgets = list(np.geomspace(compute.min(), compute.max(), 8)[1:-1])
    figure = new_figure(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    styles = series(fit.laws)
    grid = np.geomspace(min(compute.min(), *budgets), max(compute.max(), *budgets), 50)
    for number, name in enumerate(fit.laws):
        own, style = fit.group == number, styles[name]
        best = [drawn.optimum(float(c), name, flops=flops, confidence=confidence) for c in grid]
        left.plot(
            compute[own], fit.loss[own], color=style.colour, marker=style.marker, markerfacecolor=style.face,
            linestyle="", markersize=4, alpha=0.45, markeredgewidth=0.8,
        )  # fmt: skip
        for axes, key in ((left, "loss"), (right, "params"))[: 1 if len(fit.laws) == 1 else 2]:
            low, high = ([getattr(b[key], end) for b in best] for end in ("low", "high"))
            axes.fill_between(grid, low, high, color=style.colour, alpha=0.15, lw=0)
            axes.plot(
                grid, [b[key].value for b in best], color=style.colour, linestyle=style.line, linewidth=1.6,
                label=style.label,
            )  # fmt: skip
    finish(left, x="training compute (FLOPs)", y=label(y))
    plain_ticks(left)
    if len(fit.laws) == 1:
        _slices(right, drawn, compute, budgets, flops)
        finish(right, x=f"N, {label(size)}", y=label(y))
        plain_ticks(right)
        right.legend(title="FLOPs", frameon=False, fontsize=8)
    else:
        finish(right, x="training compute (FLOPs)", y=f"best N, {label(size)}")
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside upper center", ncols=columns(len(fit.laws), 4),
            frameon=False, fontsize=9,
        )  # fmt: skip
    return figure


def _slices(
    axes: Axes, drawn: LossBootstrap, compute: np.ndarray, budgets: Sequence[float], flops: float
) -> None:  # fmt: skip
    fit, law = drawn.fit, drawn.fit.law
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(budgets)))
    for colour, budget in zip(colours, sorted(budgets), strict=True):
        best = law.optimum(budget, flops=flops)
        n = np.geomspace(best.params / 12, best.params * 12, 80)
        axes.plot(n, law(n, budget / (flops * n)), color=colour, linewidth=1.4, label=f"{budget:.1e}")
        axes.plot(best.params, best.loss, color=colour, marker="*", markersize=12, markeredgecolor="white")
        near = np.abs(np.log(compute / budget)) < 0.25
        # Moved along the law to the budget of the curve, so that points and curve may be compared.
        moved = fit.loss[near] * law(fit.params[near], budget / (flops * fit.params[near]))
        moved = moved / law(fit.params[near], fit.tokens[near])
        axes.plot(fit.params[near], moved, color=colour, marker="o", markersize=3.5, linestyle="", alpha=0.6)
    low, high = min(law.optimum(b, flops=flops).loss for b in budgets), float(fit.loss.max())
    axes.set_ylim(low * 0.97, min(high, 1.9 * low))


def isoflop_figure(found: IsoFlop, *, size: str = "params", y: str = "loss") -> Figure:
    """Left the parabolas of every budget with their runs and a star at the minimum; right the minima and their law."""
    figure = new_figure(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(found.parabolas)))
    for colour, each in zip(colours, found.parabolas, strict=True):
        n = np.geomspace(each.params.min(), each.params.max(), 80)
        left.plot(each.params, each.loss, color=colour, marker="o", markersize=4, linestyle="", alpha=0.6)
        left.plot(n, each(n), color=colour, linewidth=1.4, label=f"{each.compute:.1e}")
        for axes, place in ((left, each.best), (right, (each.compute, each.best[0]))):
            axes.plot(*place, color=colour, marker="*", markersize=12, markeredgecolor="white")
    compute = found.allocation.compute
    grid = np.geomspace(compute.min(), compute.max(), 2)
    right.plot(grid, [found.allocation.optimum(c)[0] for c in grid], color="0.3", linewidth=1.2, zorder=0)
    value = found.allocation.interval()
    right.set_title(f"exponent {value.value:.3f} [{value.low:.3f}, {value.high:.3f}]", fontsize=10)
    finish(left, x=f"N, {label(size)}", y=label(y))
    plain_ticks(left)
    finish(right, x="training compute (FLOPs)", y=f"best N, {label(size)}")
    left.legend(title="FLOPs", frameon=False, fontsize=8)
    return figure
