"""Draw a result of jax_layers.py: efficiency of each implementation, by structure, size and tokens.

python benchmarks/plot_jax_layers.py benchmarks/results/PROCESSOR/jax_layers.json jax_layers.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _measure import describe

from structlin_nn.figures.style import finish, new_figure, save

MARKS = {
    "structlin": ("#0072B2", "s"),
    "products": ("#56B4E9", "P"),
    "einsum": ("#D55E00", "^"),
    "dot_general": ("#009E73", "D"),
}
KINDS = {"forward": "forward", "forward_backward": "forward + backward"}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each kind of pass, a row for each layer, and a mark for each implementation."""
    rows = result["rows"]
    figure = new_figure(8.4, 1.5 + 0.24 * len(rows))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        for name, (colour, marker) in MARKS.items():
            found = [(row["implementations"].get(name, {}).get(f"{kind}_efficiency"), n) for n, row in enumerate(rows)]
            points = [point for point in found if point[0] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, alpha=0.8, label=name)
        axes.axvline(1, color="0.35", linewidth=1)
        finish(axes, x="efficiency", y="", log_x=False, log_y=False)
        axes.set_xlim(0, None)
        axes.set_title(title, fontsize=10)
    labels = [f"{row['structure'].replace('_', ' ')}, {row['size']}, {row['tokens']} tokens" for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=7)
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(describe(result), fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
