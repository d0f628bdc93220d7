"""Training curves, and where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from structlin_nn.figures.compute import plain_ticks
from structlin_nn.figures.style import Series, columns, finish, label, new_figure, series
from structlin_nn.tables import Row, column

__all__ = ["curves_figure"]


def curves_figure(groups: Mapping[str, Sequence[Row]], *, x: str, y: str, final_x: str = "forward_macs") -> Figure:
    """Draw the evaluations of runs against what was spent, and their last ones against the cost of the model.

    On the left is a line for each run, in the colour of its group, darker for wider models; on the right are the last
    values, joined along the width, with runs of one width (seeds) at their mean. `groups` are all evaluations of runs
    by label, with ``record``, ``width`` and the columns ``x`` (without evaluations at 0), ``y`` and ``final_x``;
    ValueError for missing columns.
    """
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1), sharey=True)
    styles = series(groups)
    ends: list[float] = []
    starts: list[float] = []
    for name, rows in groups.items():
        runs: dict[str, list[Row]] = {}
        for row in rows:
            if column([row], x)[0] > 0:
                runs.setdefault(str(row["record"]), []).append(row)
        if not runs:
            raise ValueError(f"{name} has no evaluation after the start of a run")
        ends += _curves(left, list(runs.values()), styles[name], x, y)
        starts += [max(column(lines, y)) for lines in runs.values()]
        _ends(right, [lines[-1] for lines in runs.values()], styles[name], final_x, y)
    finish(left, x=label(x), y=label(y))
    finish(right, x=label(final_x), y="")
    least, most = right.get_xlim()
    if most < 16 * least:  # models of almost one cost look so, and ticks have room
        middle = (least * most) ** 0.5
        right.set_xlim(middle / 4, middle * 4)
        right.xaxis.set_minor_formatter(NullFormatter())
    # Curves may start far above where they end: the panel is of at most twice the range of the ends.
    low, high = min(ends), max(ends)
    room = max(high / low, 1.15)
    left.set_ylim(low / room**0.12, min(high * room, max(starts) * 1.05))
    plain_ticks(left)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside upper center", ncols=columns(len(groups), 4), frameon=False,
        fontsize=9,
    )  # fmt: skip
    return figure


def _curves(axes: Axes, runs: Sequence[Sequence[Row]], style: Series, x: str, y: str) -> list[float]:
    widths = sorted({lines[0]["width"] for lines in runs})
    ends = []
    for lines in runs:
        # Narrow models light, the widest in the full colour.
        share = (widths.index(lines[0]["width"]) + 1) / len(widths)
        colour = tuple(1 - (1 - c) * (0.35 + 0.65 * share) for c in to_rgb(style.colour))
        values = column(lines, y)
        # A single evaluation is a point, and no line.
        marker = style.marker if len(lines) == 1 else ""
        axes.plot(column(lines, x), values, color=colour, linestyle=style.line, linewidth=1.2, marker=marker)
        ends.append(values[-1])
    return ends


def _ends(axes: Axes, lines: Sequence[Row], style: Series, x: str, y: str) -> None:
    points: dict[float, list[float]] = {}
    for cost, error in zip(column(lines, x), column(lines, y), strict=True):
        points.setdefault(cost, []).append(error)
    costs = sorted(points)
    axes.plot(
        costs, [float(np.mean(points[c])) for c in costs], color=style.colour, marker=style.marker, linewidth=1.5,
        markerfacecolor=style.face, linestyle=style.line, markersize=6, label=style.label,
    )  # fmt: skip
