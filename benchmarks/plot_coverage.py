"""Draw the coverage of intervals, from benchmarks/results/coverage.json.

python benchmarks/plot_coverage.py --out docs/images/coverage.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from structlin_nn.figures.style import finish, new_figure, save

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"


def coverage_figure(record: dict[str, Any]) -> Figure:
    """Draw a row for each experiment, a dot for each quantity, and the range of exact intervals (19 of 20)."""
    rows = record["rows"]
    figure = new_figure(9, 1.2 + 0.32 * len(rows))
    axes = figure.subplots()
    nominal = record["confidence"]
    error = 2 * (nominal * (1 - nominal) / record["experiments"]) ** 0.5
    axes.axvspan(100 * (nominal - error), min(100 * (nominal + error), 100), color="0.92", lw=0)
    axes.axvline(100 * nominal, color="0.4", linewidth=1)
    for place, values in enumerate(rows.values()):
        shares = [100 * share for share in values.values()]
        axes.plot(shares, [place] * len(shares), "o", color="#0072B2", markersize=6, alpha=0.6)
    finish(axes, x="intervals of 95 % that hold the truth (%)", y="", log_x=False, log_y=False)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(80, 100.5)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    arguments = parser.parse_args(argv)
    save(coverage_figure(json.loads(RESULTS.read_text(encoding="utf-8"))), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
