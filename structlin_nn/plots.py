"""Figures, from run records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from structlin_nn.training.files import atomic_write

__all__ = ["STYLES", "demo_figure", "save_png"]

# Okabe and Ito's palette, which the colour-blind can tell apart, and a marker each for prints without colour.
STYLES: dict[str, tuple[str, str, str]] = {
    "dense": ("dense", "#000000", "o"),
    "block_tensor_train": ("Block Tensor-Train", "#0072B2", "s"),
    "monarch": ("Monarch", "#D55E00", "^"),
    "low_rank": ("low rank", "#009E73", "D"),
    "kronecker": ("Kronecker", "#CC79A7", "v"),
    "tensor_train": ("Tensor-Train", "#56B4E9", "P"),
}
_OTHERS = ("#E69F00", "X")


def save_png(figure: Figure, path: Path, dpi: int = 160) -> None:
    """Write a figure as PNG, as a whole or not at all. Raises OSError where that fails."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def demo_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """The figure of the demonstration.

    Left: test error against training compute, a line for each structure (structure-aware learning rates). Right: for
    each structured network the error with the naive and with the structure-aware learning rate.

    Args:
        rows: as `structlin_nn.demo.row_of` gives them.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharey=False)
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    _compute_panel(left, rows, structures)
    _rule_panel(right, rows, [name for name in structures if name != "dense"])
    return figure


def _compute_panel(axes: Any, rows: Sequence[dict[str, Any]], structures: Sequence[str]) -> None:
    for name in structures:
        label, colour, marker = style(name)
        chosen = [row for row in rows if row["structure"] == name and row["learning_rate"] != "naive"]
        axes.plot(
            [row["training_macs"] for row in chosen], [100 * row["error"] for row in chosen],
            color=colour, marker=marker, markersize=7, linewidth=1.8, label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("training compute (MACs)")
    axes.set_ylabel("test error (%)")
    axes.set_title("Equal compute, structure-aware learning rates", fontsize=11)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.legend(frameon=False)
    _clean(axes)


def _rule_panel(axes: Any, rows: Sequence[dict[str, Any]], structures: Sequence[str]) -> None:
    ticks, labels = [], []
    for place, name in enumerate(structures):
        label, colour, marker = style(name)
        widths = sorted({row["width"] for row in rows if row["structure"] == name})
        for number, width in enumerate(widths):
            x = place * (len(widths) + 1) + number
            errors = {
                row["learning_rate"]: 100 * row["error"]
                for row in rows
                if row["structure"] == name and row["width"] == width
            }
            axes.annotate(
                "", (x, errors["aware"]), (x, errors["naive"]),
                arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 5, "shrinkB": 5},
            )  # fmt: skip
            axes.plot(x, errors["naive"], marker=marker, color=colour, markerfacecolor="white", markersize=8)
            axes.plot(x, errors["aware"], marker=marker, color=colour, markersize=8)
            ticks.append(x)
            labels.append(str(width))
        middle = place * (len(widths) + 1) + (len(widths) - 1) / 2
        axes.text(middle, 1.01, label, color=colour, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    axes.set_xticks(ticks, labels, fontsize=9)
    axes.set_xlabel("width of the network")
    axes.set_ylabel("test error (%)")
    axes.grid(True, axis="y", color="0.9", linewidth=0.8)
    axes.plot([], [], "o", color="0.4", markerfacecolor="white", label="naive learning rate")
    axes.plot([], [], "o", color="0.4", label="structure-aware")
    axes.legend(frameon=False)
    _clean(axes)


def style(name: str) -> tuple[str, str, str]:
    """Label, colour and marker of a structure."""
    return STYLES.get(name, (name.replace("_", " "), *_OTHERS))


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
