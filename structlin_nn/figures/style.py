"""The common style of all figures: colours, markers, axes and files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from structlin_nn._files import atomic_write

__all__ = [
    "FORMATS", "GRID", "STYLES", "Series", "columns", "finish", "label", "legend", "new_figure", "save", "series",
    "style",
]  # fmt: skip

# Okabe and Ito's palette for colour-blind readers, and a marker for each colour, for prints without colour.
STYLES: dict[str, tuple[str, str, str]] = {
    "dense": ("dense", "#000000", "o"),
    "block_tensor_train": ("Block Tensor-Train", "#0072B2", "s"),
    "monarch": ("Monarch", "#D55E00", "^"),
    "low_rank": ("low rank", "#009E73", "D"),
    "kronecker": ("Kronecker", "#CC79A7", "v"),
    "tensor_train": ("Tensor-Train", "#56B4E9", "P"),
}
_OTHERS = (("#E69F00", "X"), ("#8C564B", "<"), ("#7F7F7F", ">"), ("#B8A000", "h"), ("#332288", "d"), ("#882255", "p"))
_LINES = ("-", "--", ":", "-.")
GRID = "0.9"
_LABELS = {
    "training_macs": "training compute (MACs)", "total_training_macs": "training compute (MACs)",
    "training_seconds": "seconds of training", "forward_macs": "MACs of one sample, forward", "params": "parameters",
    "trainable_params": "parameters", "samples": "training samples", "step": "training step", "lr": "learning rate",
    "train_error": "training error", "test_error": "test error", "val_error": "validation error",
    "batch_error": "training error (augmented)", "train_loss": "training loss (nats)", "test_loss": "test loss (nats)",
    "val_loss": "validation loss (nats)", "batch_loss": "training loss (nats, augmented)",
}  # fmt: skip
FORMATS = ("png", "svg", "pdf")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "structlin",  # the same figure is the same file
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Series:
    """The colour, marker and line of a series."""

    label: str
    colour: str
    marker: str
    line: str
    filled: bool = True

    @property
    def face(self) -> str:
        """Colour of the inside of markers."""
        return self.colour if self.filled else "white"

    def points(self, size: float = 6, line: str = "") -> dict[str, Any]:
        """Return the options of ``Axes.plot`` for markers of the series, by default without a line."""
        return {
            "color": self.colour, "marker": self.marker, "markerfacecolor": self.face, "linestyle": line,
            "markersize": size,
        }  # fmt: skip


def style(name: str) -> tuple[str, str, str]:
    """Return the label, colour and marker of a structure.

    Examples
    --------
    >>> style("dense")
    ('dense', '#000000', 'o')
    """
    return STYLES.get(name, (name.replace("_", " "), *_OTHERS[0]))


def label(column: str) -> str:
    """Return the name of a column on an axis.

    Examples
    --------
    >>> label("test_error"), label("wall_time")
    ('test error', 'wall time')
    """
    return _LABELS.get(column, column.replace("_", " "))


def series(names: Iterable[str]) -> dict[str, Series]:
    """Return a different style for each label of a group.

    A label that starts with a structure has its colour and marker. A second label of the same structure has another
    line and open markers. Other labels take colours in turn.

    Examples
    --------
    >>> found = series(["monarch, blocks 4", "monarch, blocks 16"])
    >>> [(s.label, s.colour, s.line) for s in found.values()]
    [('Monarch, blocks 4', '#D55E00', '-'), ('Monarch, blocks 16', '#D55E00', '--')]
    """
    used: dict[str, int] = {}
    others = itertools.cycle(_OTHERS)
    kept: dict[str, tuple[str, str]] = {}
    found = {}
    for name in names:
        head, comma, rest = name.partition(", ")
        label, colour, marker = style(head)
        if head not in STYLES:
            colour, marker = kept.setdefault(head, kept[head] if head in kept else next(others))
        number = used[head] = used.get(head, -1) + 1
        line = _LINES[number % len(_LINES)]
        found[name] = Series(label + comma + rest, _lighter(colour, number // 2), marker, line, number % 2 == 0)
    return found


def _lighter(colour: str, steps: int) -> str:
    mix = min(0.3 * steps, 0.6)
    return colour if not steps else "#" + "".join(f"{round(255 * (c + (1 - c) * mix)):02x}" for c in to_rgb(colour))


def new_figure(width: float = 6.4, height: float = 4.4) -> Figure:
    """Return an empty figure with a constrained layout; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def columns(entries: int, most: int) -> int:
    """Return the columns of a legend: the fewest rows with at most `most` columns, evenly filled.

    Examples
    --------
    >>> columns(6, 4), columns(4, 4), columns(2, 4)
    (3, 4, 2)
    """
    rows = -(-entries // most)
    return -(-entries // rows)


def legend(figure: Figure, axes: Axes, most: int, fontsize: int = 9) -> None:
    """Draw the legend of a panel above the figure, in at most so many columns."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns(len(labels), most), frameon=False, fontsize=fontsize
    )


def finish(axes: Axes, *, x: str, y: str, log_x: bool = True, log_y: bool = True) -> None:
    """Set the labels, scales, grid and frame of a panel."""
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG, SVG or PDF, by the suffix.

    Examples
    --------
    >>> save(new_figure(), Path("figure.jpeg"))
    Traceback (most recent call last):
    ...
    ValueError: figures are written as .png, .svg or .pdf, got 'figure.jpeg'
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"figures are written as .png, .svg or .pdf, got {path.name!r}")
    metadata: Any = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with mpl.rc_context(_SETTINGS), atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=160, metadata=metadata)
