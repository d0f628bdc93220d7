"""Draw a result of steps.py: time per MAC of whole models relative to dense, or the speed-up of single layers.

python benchmarks/plot_steps.py benchmarks/results/PROCESSOR/steps.json steps.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import describe
from matplotlib.figure import Figure

from structlin_nn.figures.style import STYLES, new_figure, save

OURS, OTHER = STYLES["block_tensor_train"][1], "0.75"
KINDS = {"step": "training step", "inference": "inference"}


def models(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw bars of the time per MAC, with passes over blocks of layers and layer after layer."""
    axes = figure.subplots(1, len(KINDS), sharey=True)
    for panel, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for place, row in enumerate(rows):
            found = row[kind]
            if "separate_time_per_mac" in found:
                panel.bar(place - 0.2, found["separate_time_per_mac"], 0.38, color=OTHER, label="layer after layer")
            panel.bar(place + 0.2, found["time_per_mac"], 0.38, color=OURS, label="as structlin runs it")
        panel.axhline(1, color="0.3", linewidth=0.8)
        panel.set_xticks(range(len(rows)), [row["model"] for row in rows])
        panel.set_title(title, fontsize=10)
    axes[0].set_ylabel("time per MAC\n(dense of equal MACs = 1)")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    axes[0].legend(handles.values(), handles.keys(), fontsize=8, frameon=False)


def layers(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the speed-up over nn.Linear for few tokens, and a mark at the ratio of MACs."""
    axes = figure.subplots()
    for place, row in enumerate(rows):
        axes.bar(place, row["speed_up"], 0.7, color=OURS)
        axes.plot([place - 0.35, place + 0.35], [row["mac_ratio"]] * 2, color="0.3", linewidth=1)
    axes.axhline(1, color="0.3", linewidth=0.8)
    labels = [f"{row['structure']}\n{row['size']}\n{row['tokens']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7)
    axes.set_yscale("log", base=2)
    axes.set_ylabel("speed-up over nn.Linear\n(line: ratio of MACs)")
    axes.set_xlabel("structure, d, tokens")


def plot(result: Mapping[str, Any], path: Path) -> None:
    rows = result["rows"]
    figure = new_figure(7.6, 3.4)
    (layers if "dense_seconds" in rows[0] else models)(figure, rows)
    figure.suptitle(describe(result), fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
