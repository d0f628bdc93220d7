"""Draw a result of layers.py: the efficiency of each row.

python benchmarks/plot_layers.py benchmarks/results/PROCESSOR/layers.json layers.png
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from itertools import groupby, pairwise
from pathlib import Path

from _measure import describe
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from structlin_nn.figures.style import STYLES, finish, new_figure, save

TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
PRODUCTS = {"forward": 1, "forward_backward": 3}
NAMES = {"monarch": "Monarch, {} blocks", "tt": "TT, rank {}", "btt": "BTT, rank {}"}
OURS, OTHER = STYLES["block_tensor_train"][1], STYLES["monarch"][1]
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def name_of(label: str) -> str:
    head, _, number = label.rpartition("_")
    return NAMES[head].format(number) if head in NAMES else label.replace("_", " ").capitalize()


def others(row: Mapping) -> dict[str, Mapping[str, float]]:
    """Return the implementations of other libraries."""
    return {n: f for n, f in row["implementations"].items() if n != "structlin" and not n.startswith("way:")}


def dense_rate(row: Mapping, kind: str) -> float:
    """Return the GFLOP/s of the dense layers of a row."""
    macs = sum(a * b for a, b in pairwise(row["widths"]))
    return 2e-9 * PRODUCTS[kind] * macs * row["tokens"] / row["dense"][f"{kind}_seconds"]


def rates(result: Mapping) -> str:
    """Return the range of the GFLOP/s of dense layers in a result."""
    found = sorted(dense_rate(row, kind) for row in result["rows"] for kind in TITLES)
    low, high = (f"{rate:.3g}" for rate in (found[0], found[-1]))
    return f"{low} GFLOP/s" if low == high else f"{low} to {high} GFLOP/s"


def panel(axes: Axes, placed: list[tuple[float, Mapping]], kind: str) -> None:
    """Draw a point for each row and implementation, and a line from the point at which it is as fast as dense."""
    for y, row in placed:
        parity, here = 1 / row["mac_ratio"], row["implementations"]["structlin"][f"{kind}_efficiency"]
        axes.plot([parity, here], [y, y], color="0.75", linewidth=1.2, zorder=1)
        axes.plot([parity], [y], "|", color="0.35", markersize=8, zorder=2)
        best = max((found[f"{kind}_efficiency"] for found in others(row).values()), default=None)
        if best is not None:
            axes.plot([best], [y], "D", color=OTHER, markerfacecolor="white", markersize=5, zorder=3)
        axes.plot([here], [y], "o", color=OURS, markersize=6, zorder=4)
    finish(axes, x="efficiency", y="", log_y=False)
    axes.axvline(1, color="0.35", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in TICKS if low <= t <= high], [f"{t:g}" for t in TICKS if low <= t <= high])
    axes.set_xlim(low, max(high, 1.2))
    axes.minorticks_off()
    axes.set_title(TITLES[kind], fontsize=10)


def figure_of(result: Mapping) -> Figure:
    """Draw the efficiency of this library and of the best other one, forward and with the backward pass."""
    placed: list[tuple[float, Mapping]] = []
    heads: list[tuple[float, str]] = []
    dense: list[tuple[float, list[Mapping]]] = []
    y = 0.0
    for (widths, tokens), group in groupby(result["rows"], key=lambda row: (tuple(row["widths"]), row["tokens"])):
        heads.append((y, f"{' to '.join(map(str, widths))}, {tokens} token{'s' * (tokens != 1)}"))
        rows = list(group)
        dense.append((y, rows))
        placed += [(y + n, row) for n, row in enumerate(rows, start=1)]
        y += len(rows)
        y += 1.3
    figure = new_figure(7.4, 1.7 + 0.2 * y)
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for axes, kind in zip(panels, TITLES, strict=True):
        panel(axes, placed, kind)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        for at, rows in dense:
            text = f"dense: {statistics.median(dense_rate(row, kind) for row in rows):.3g} GFLOP/s"
            axes.text(0.02, at, text, transform=axes.get_yaxis_transform(), fontsize=7, color="0.35", va="center")
    first = panels[0]
    labels = [(y, name_of(row["structure"])) for y, row in placed] + heads
    first.set_yticks([y for y, _ in labels], [text for _, text in labels], fontsize=8)
    for tick in first.get_yticklabels()[len(placed) :]:
        tick.set_fontweight("bold")
    first.set_ylim(y - 0.8, -0.8)
    names = dict.fromkeys(name for row in result["rows"] for name in others(row))
    handles = [
        first.plot([], [], "o", color=OURS, label="structlin")[0],
        first.plot([], [], "D", color=OTHER, markerfacecolor="white", label=f"best of {', '.join(names)}")[0],
        first.plot([], [], "|", color="0.35", label="as fast as dense")[0],
        first.plot([], [], color="0.35", label="every saved MAC is saved time")[0],
    ]
    if not names:
        handles.pop(1)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    title = describe(result).partition(", torch ")[0]
    figure.suptitle(f"{title}\ndense: {rates(result)}", fontsize=9)
    return figure


def plot(result: Mapping, path: Path) -> None:
    """Draw a result as PNG, SVG or PDF."""
    save(figure_of(result), path)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
