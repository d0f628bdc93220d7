"""The figure of the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from structlin_nn.figures.style import finish, new_figure, style

__all__ = ["demo_figure"]

ERROR = "training error (%)"


def demo_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return the figure of the demonstration.

    Left: training error against training compute, a line for each structure, structure-aware learning rates. Middle:
    the same against the seconds of training. Right: for each structured network the training error with the naive and
    with the structure-aware learning rate. Training errors, as in the paper's scaling figures, are those on training
    images without augmentation.

    Parameters
    ----------
    rows
        As `structlin_nn.demo.row_of` gives them.
    """
    figure = new_figure(16, 4.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    _cost_panel(left, rows, structures, "training_macs")
    finish(left, x="training compute (multiply-accumulates)", y=ERROR, log_y=False)
    left.set_title("equal compute, structure-aware learning rates", fontsize=11, pad=26)
    left.legend(
        frameon=False, fontsize=9, ncols=len(structures), loc="lower center", bbox_to_anchor=(0.5, 0.995),
        handlelength=1.2, columnspacing=0.9, handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip
    _cost_panel(middle, rows, structures, "training_seconds")
    finish(middle, x="seconds of training on one core of this machine", y=ERROR, log_y=False)
    # A decade or less: numbers without powers of ten.
    middle.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    middle.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    middle.xaxis.set_minor_formatter(NullFormatter())
    middle.set_title("the same networks by time", fontsize=11, pad=26)
    _rule_panel(right, rows, [name for name in structures if name != "dense"])
    return figure


def _cost_panel(axes: Axes, rows: Sequence[dict[str, Any]], structures: Sequence[str], cost: str) -> None:
    for name in structures:
        label, colour, marker = style(name)
        chosen = [row for row in rows if row["structure"] == name and row["learning_rate"] != "naive"]
        chosen.sort(key=lambda row: row["training_macs"])
        x = [row[cost] for row in chosen]
        y = [100 * row["train_error"] for row in chosen]
        axes.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.8, label=label)


def _rule_panel(axes: Axes, rows: Sequence[dict[str, Any]], structures: Sequence[str]) -> None:
    ticks: list[int] = []
    labels: list[str] = []
    for name in structures:
        label, colour, marker = style(name)
        own = [row for row in rows if row["structure"] == name]
        widths = sorted({row["width"] for row in own})
        start = ticks[-1] + 2 if ticks else 0
        for x, width in enumerate(widths, start):
            errors = {row["learning_rate"]: 100 * row["train_error"] for row in own if row["width"] == width}
            axes.annotate(
                "", (x, errors["aware"]), (x, errors["naive"]),
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4},
            )  # fmt: skip
            axes.plot(x, errors["naive"], marker=marker, color=colour, markerfacecolor="white", markersize=8)
            axes.plot(x, errors["aware"], marker=marker, color=colour, markersize=8)
            ticks.append(x)
            labels.append(str(width))
        middle = start + (len(widths) - 1) / 2
        place = axes.get_xaxis_transform()
        axes.text(middle, 1.015, label, color=colour, ha="center", va="bottom", fontsize=10, transform=place)
    finish(axes, x="width of the network", y=ERROR, log_x=False, log_y=False)
    axes.grid(False, axis="x")
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_title("effect of the learning-rate rule", fontsize=11, pad=26)
    axes.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=8, label="naive")
    axes.plot([], [], "o", color="0.4", markersize=8, label="structure-aware")
    axes.legend(frameon=False, loc="upper left", fontsize=10)
    axes.margins(y=0.12)
