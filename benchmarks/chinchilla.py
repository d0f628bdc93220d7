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

from structlin.scaling_laws import TERMS, Estimate, fit_isoflop, fit_loss_law
from structlin_nn._files import atomic_write
from structlin_nn.figures.compute import isoflop_figure, sizes_figure
from structlin_nn.figures.style import save

OUTLIERS = 5  # the largest losses, which Besiroglu et al. leave out
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)  # of the iso-FLOP runs
CHINCHILLA = 5.76e23  # FLOPs of the model of that name


def plain(value: Estimate) -> list[float]:
    return [value.value, value.low, value.high]


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
