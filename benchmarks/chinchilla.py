"""The runs of Chinchilla (Hoffmann et al. 2022, figure 4, read off by Besiroglu et al. 2024) and their published fit.

    python benchmarks/chinchilla.py RUNS.csv --out benchmarks/results/chinchilla.json --images docs/images

The file has the columns parameters, training_flops and loss. It has no licence, so it is not part of the package.
Tokens are FLOPs / (6 parameters).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from structlin.scaling_laws import TERMS, Estimate, IsoFlop, fit_isoflop, fit_loss_law
from structlin_nn._files import atomic_write
from structlin_nn.figures.compute import plain_ticks, sizes_figure
from structlin_nn.figures.style import finish, label, new_figure, save

OUTLIERS = 5  # the largest losses, which Besiroglu et al. leave out
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # of the iso-FLOP runs
CHINCHILLA = 5.76e23  # FLOPs of the model of that name


def plain(value: Estimate) -> list[float]:
    return [value.value, value.low, value.high]


def isoflop_figure(found: IsoFlop, *, size: str = "params", y: str = "loss") -> Figure:
    """Draw the parabolas of all budgets, and beside them their minima with the law.

    The parabola of a budget has its runs, and a star at the minimum.
    """
    figure = new_figure(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(found.parabolas)))
    for colour, each in zip(colours, found.parabolas, strict=True):
        n = np.geomspace(each.params.min(), each.params.max(), 80)
        left.plot(each.params, each.loss, color=colour, marker="o", markersize=4, linestyle="", alpha=0.6)
        left.plot(n, each(n), color=colour, linewidth=1.4, label=f"{each.compute:.1e}")
        for axes, place in ((left, each.best), (right, (each.compute, each.best[0]))):
            axes.plot(*place, color=colour, marker="*", markersize=12, markeredgecolor="white")
    compute = found.allocation.compute
    grid = np.geomspace(compute.min(), compute.max(), 2)
    right.plot(grid, [found.allocation.optimum(c)[0] for c in grid], color="0.3", linewidth=1.2, zorder=0)
    value = found.allocation.interval()
    right.set_title(f"exponent {value.value:.3f} [{value.low:.3f}, {value.high:.3f}]", fontsize=10)
    finish(left, x=f"N, {label(size)}", y=label(y))
    plain_ticks(left)
    finish(right, x="training compute (FLOPs)", y=f"best N, {label(size)}")
    left.legend(title="FLOPs", frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder for the figures")
    arguments = parser.parse_args(argv)
    table = np.genfromtxt(arguments.runs, delimiter=",", names=True)
    record: dict[str, Any] = {"runs": len(table), "intervals": 0.95}
    for name, left_out in (("without_outliers", OUTLIERS), ("all", 0)):
        kept = table[np.argsort(-table["loss"], kind="stable")[left_out:]]
        n, c, y = kept["parameters"], kept["training_flops"], kept["loss"]
        fit = fit_loss_law(n, c / (6 * n), y)
        drawn = fit.bootstrap(1000)
        record[name] = {term: plain(drawn.term(term)) for term in TERMS} | {
            "allocation": plain(drawn.allocation()), "objective": fit.objective, "agreement": fit.agreement,
            "optimum": {key: plain(value) for key, value in drawn.optimum(CHINCHILLA).items()},
        }  # fmt: skip
        parabolas = fit_isoflop(n, c, y, budgets=BUDGETS, tolerance=0.2)
        record[name]["parabolas"] = plain(parabolas.allocation.interval())
        if arguments.images and left_out:
            arguments.images.mkdir(parents=True, exist_ok=True)
            save(sizes_figure(drawn, size="params", y="loss"), arguments.images / "chinchilla-law.png")
            save(isoflop_figure(parabolas), arguments.images / "chinchilla-isoflop.png")
    with atomic_write(arguments.out) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
