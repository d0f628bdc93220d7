"""Error against compute, with fitted laws and their exponents."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from structlin_nn.figures.style import Series, columns, finish, label, new_figure, series
from structlin_nn.laws import GroupLaw

__all__ = ["compute_figure", "plain_ticks"]


def compute_figure(
    laws: Mapping[str, GroupLaw], *, x: str, y: str, confidence: float = 0.95, bars: bool = True
) -> Figure:
    """Points with their laws on logarithmic axes; beside them, a bar for each exponent, with its interval.

    `laws` are those of :func:`structlin_nn.laws.fit_groups`, of the columns ``x`` and ``y``; `confidence` is that of
    the shaded bands and of the intervals.
    """
    figure = new_figure(8.6 if bars else 6.4, 4.4)
    styles = series(laws)
    if bars:
        left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
        _bars(right, laws, styles, confidence)
    else:
        left = figure.subplots()
    for name, law in laws.items():
        _law(left, law, styles[name], confidence)
    finish(left, x=label(x), y=label(y))
    # Limits by the points: the band of few points can be far wider.
    errors = np.concatenate([law.fit.error for law in laws.values()])
    room = max((errors.max() / errors.min()) ** 0.08, 1.02)
    left.set_ylim(errors.min() / room, errors.max() * room)
    plain_ticks(left)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=columns(len(laws), 4 if bars else 3),
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _law(axes: Axes, law: GroupLaw, style: Series, confidence: float) -> None:
    fit = law.fit
    grid = np.geomspace(fit.compute.min(), fit.compute.max(), 60)
    if law.bootstrap is not None and len(fit.compute) > fit.free_parameters:
        band = [law.bootstrap.error(c, confidence) for c in grid]
        axes.fill_between(grid, [b.low for b in band], [b.high for b in band], color=style.colour, alpha=0.12, lw=0)
    axes.plot(grid, fit.law(grid), color=style.colour, linestyle=style.line, linewidth=1.4)
    axes.plot(
        fit.compute, fit.error, color=style.colour, marker=style.marker, markerfacecolor=style.face, linestyle="",
        markersize=6, label=style.label,
    )  # fmt: skip


def _bars(axes: Axes, laws: Mapping[str, GroupLaw], styles: Mapping[str, Series], confidence: float) -> None:
    places = np.arange(len(laws))
    for place, (name, law) in zip(places, laws.items(), strict=True):
        value, style = law.fit.law.exponent, styles[name]
        axes.barh(place, value, color=style.colour if style.filled else "white", edgecolor=style.colour, height=0.7)
        end = value
        if law.bootstrap is not None:
            found = law.bootstrap.exponent(confidence)
            axes.plot([found.low, found.high], [place, place], color="0.45", linewidth=1.6, solid_capstyle="butt")
            end = max(end, found.high)
        axes.annotate(f"{value:.3f}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    finish(axes, x=r"exponent $\alpha$", y="", log_x=False, log_y=False)
    axes.set_yticks(places, [styles[name].label for name in laws], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.22)


def plain_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic vertical axis that read as numbers, also where it spans less than a decade."""
    low, high = axes.get_ylim()
    few = high / low < 8
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 2.5 else (1, 2, 3, 4, 6)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs if few else (1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
