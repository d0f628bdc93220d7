"""Draw a result of linalg.py: the times of other libraries relative to structlin.

python benchmarks/plot_linalg.py benchmarks/results/PROCESSOR/linalg.json linalg.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from _measure import describe
from matplotlib.ticker import LogLocator

from structlin_nn.figures.style import finish, new_figure, save

MARKS = {
    "dense": ("#000000", "o"),
    "linear_operator": ("#D55E00", "^"),
    "lineax": ("#009E73", "D"),
    "scipy": ("#CC79A7", "v"),
}
TITLES = {
    "matmat": "product",
    "solve": "solution",
    "logdet": "log-determinant",
    "likelihood": "likelihood and gradient",
}
LARGEST_ERROR = 1e-3  # results with a larger relative error are left out


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each operation, a row for each matrix and number of columns, and a mark for each library."""
    rows = result["rows"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    keys = list(dict.fromkeys((row["n"], row.get("columns", 16), row["structure"]) for row in rows))
    figure = new_figure(8.4, 1.5 + 0.21 * len(keys))
    panels = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for axes, operation in zip(panels, operations, strict=True):
        for row in rows:
            if row["operation"] != operation:
                continue
            for name, ratio in row["ratio"].items():
                if row["error"].get(name, 0.0) < LARGEST_ERROR:
                    colour, marker = MARKS[name]
                    place = keys.index((row["n"], row.get("columns", 16), row["structure"]))
                    axes.plot([ratio], [place], marker, color=colour, markersize=5, alpha=0.8)
        axes.axvline(1, color="0.35", linewidth=1)
        finish(axes, x="", y="", log_y=False)
        axes.set_title(TITLES[operation], fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        axes.minorticks_off()
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
    labels = [f"{s.replace('_plus_', ' + ').replace('_', ' ')}, n = {n}, {c} columns" for n, c, s in keys]
    labels = [label.replace(" 1 columns", " 1 column") for label in labels]
    panels[0].set_yticks(range(len(keys)), labels, fontsize=7)
    panels[0].invert_yaxis()
    names = [name for name in MARKS if any(name in row["ratio"] for row in rows)]
    handles = [panels[0].plot([], [], MARKS[n][1], color=MARKS[n][0], label=n.replace("_", " "))[0] for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    title = ["time relative to structlin (right of the line: structlin is faster)", *wrap(describe(result), 110)]
    figure.suptitle("\n".join(title), fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
