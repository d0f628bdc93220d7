"""Figures about width: the coordinate check, the change of the features by width, and learning-rate landscapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from structlin_nn.figures.compute import plain_ticks
from structlin_nn.figures.style import finish, label, legend, new_figure, series
from structlin_nn.tables import Row, by_run, column

__all__ = ["check_figure", "delta_h_figure", "landscape_figure"]


def check_figure(checks: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw coordinate checks (`ScaleCheck.to_dict`) side by side: RMS at initialisation above, of the change below."""
    figure = new_figure(1.2 + 4.2 * len(checks) + 1.6, 6.4)
    grid = figure.subplots(2, len(checks), sharex=True, sharey="row", squeeze=False)
    names = [layer["name"] for layer in checks[0]["layers"]]
    # From early (dark) to late layers, in a colour map that is monotone in lightness.
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for (top, bottom), check in zip(grid.T, checks, strict=True):
        for colour, layer in zip(colours, check["layers"], strict=True):
            for axes, values in ((top, layer["initial"]), (bottom, layer["change"][-1])):
                if all(values):
                    axes.plot(check["widths"], values, color=colour, marker="o", markersize=4, linewidth=1.3)
        rule = "structure-aware" if check["structure_aware"] else "naive"
        verdict = "flat" if check["passed"] else "not flat"
        top.set_title(f"{rule} learning rates: {verdict}", fontsize=10)
        for axes, text in ((top, "RMS at initialisation"), (bottom, f"RMS of the change, {check['steps']} steps")):
            finish(axes, x="width" if axes is bottom else "", y=text if check is checks[0] else "")
            _ticks_at(axes, check["widths"])
    low, high = grid[0, 0].get_ylim()
    if high < 10 * low:  # show flat lines as flat
        middle = (low * high) ** 0.5
        grid[0, 0].set_ylim(middle / 10**0.5, middle * 10**0.5)
    for axes in grid[:, 0]:
        plain_ticks(axes)
    # The legend names at most 20 layers, evenly spaced, with the first and the last.
    named = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(len(names), 20))})
    handles = [grid[0, -1].plot([], [], color=colours[i], marker="o", markersize=4)[0] for i in named]
    labels = [names[i] or "(model)" for i in named]
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _ticks_at(axes: Axes, values: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def delta_h_figure(groups: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw the change of the last hidden features in a step against the width (figure 2a of the paper).

    There is a line for each structure and rule: filled markers for structure-aware, open markers and dots for naive
    learning rates. The value of a run is the mean of ``statistics.feature_change`` over its evaluations, weighted by
    ``measured_steps``. Runs of one width (seeds) are averaged by the geometric mean. `groups` are all evaluations of
    runs by structure; ValueError for rows without ``record``, ``width``, ``feature_change`` or ``measured_steps``.
    """
    figure = new_figure(6.8, 4.6)
    axes = figure.subplots()
    styles = series(groups)
    widths: set[float] = set()
    for name, rows in groups.items():
        style = styles[name]
        for aware in (True, False):
            points = _mean_changes([row for row in rows if row.get("structure_aware", True) is aware])
            if not points:
                continue
            widths |= points.keys()
            axes.plot(
                list(points), list(points.values()), color=style.colour, marker=style.marker, markersize=6,
                linestyle=style.line if aware else ":", markerfacecolor=style.colour if aware else "white",
                linewidth=1.6, label=style.label if aware else f"{style.label}, naive",
            )  # fmt: skip
    finish(axes, x="width", y="RMS change of the last features in a step")
    _ticks_at(axes, sorted(widths))
    plain_ticks(axes)
    legend(figure, axes, 3, fontsize=8)
    return figure


def _mean_changes(rows: Sequence[Row]) -> dict[float, float]:
    """Return the change by width: the mean over the measured steps of a run, and the geometric mean over runs."""
    runs = by_run([row for row in rows if row.get("feature_change") is not None])
    if rows and not runs:
        raise ValueError(f"{rows[0].get('record', 'a row')} measured no change of features (feature_change)")
    found: dict[float, list[float]] = {}
    for lines in runs:
        changes, steps = np.array(column(lines, "feature_change")), np.array(column(lines, "measured_steps"))
        found.setdefault(column(lines[:1], "width")[0], []).append(float((changes * steps).sum() / steps.sum()))
    return {width: float(np.exp(np.log(found[width]).mean())) for width in sorted(found)}


def landscape_figure(rows: Sequence[Row], *, y: str) -> Figure:
    """Draw the final error ``y`` against the learning rate at base width, a line for each width (figure 2b).

    There is a panel for each learning-rate rule in the rows. A star marks the best rate of each width. Runs of one
    width and rate (seeds) are averaged. Values far above the best of every width, as of runs that diverge, are outside
    of the panel.
    """
    rules = [aware for aware in (True, False) if any(row.get("structure_aware", True) is aware for row in rows)]
    figure = new_figure(1 + 4.2 * len(rules), 4.4)
    panels = figure.subplots(1, len(rules), sharex=True, sharey=True, squeeze=False)[0]
    widths = sorted(set(column(rows, "width")))
    colours = dict(zip(widths, colormaps["viridis"](np.linspace(0, 0.85, len(widths))), strict=True))
    lowest: list[float] = []
    highest: list[float] = []
    for axes, aware in zip(panels, rules, strict=True):
        for width in widths:
            chosen = [r for r in rows if r["width"] == width and r.get("structure_aware", True) is aware]
            by_rate: dict[float, list[float]] = {}
            for rate, error in zip(_rates(chosen), column(chosen, y), strict=True):
                by_rate.setdefault(rate, []).append(error)
            if not by_rate:
                continue
            rates = sorted(by_rate)
            means = [float(np.mean(by_rate[rate])) for rate in rates]
            axes.plot(rates, means, color=colours[width], marker="o", markersize=4, linewidth=1.5, label=f"{width:g}")
            best = int(np.argmin(means))
            lowest.append(means[best])
            highest.append(max(means))
            axes.plot(
                rates[best], means[best], color=colours[width], marker="*", markersize=14, markeredgecolor="white"
            )
        if any(row.get("structure") != "dense" for row in rows):  # both rules are the same for dense layers
            axes.set_title(("structure-aware" if aware else "naive") + " learning rates", fontsize=10)
        finish(axes, x="learning rate at base width", y=label(y) if axes is panels[0] else "", log_y=False)
    tried = sorted(set(_rates(rows)))
    if len(tried) <= 9:
        for axes in panels:
            _ticks_at(axes, tried)
            axes.tick_params(axis="x", labelsize=8)
    low, high = min(lowest), min(max(highest), 1.35 * max(lowest))
    if high > low:
        panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="width", frameon=False, fontsize=9)
    return figure


def _rates(rows: Sequence[Row]) -> list[float]:
    return column(rows, "config.lr" if rows and "config.lr" in rows[0] else "lr")
