"""``structlin figure``: figures from run records and tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import add, given
from structlin_nn.cli.fit import add_rows, read_groups

HELP = "draw a figure from run records or tables: .png, .svg or .pdf"
FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "delta-h": ("change of the last features in a step against width (figure 2a of the paper)", {}),
    "landscape": ("error against learning rate, a line for each width (figure 2b)", {"y": "train_error"}),
    "compute": ("error against compute, with fitted laws and their exponents", {}),
    "cifar": ("the same for the training error of the paper", {"x": "forward_macs", "y": "batch_error"}),
    "curves": ("evaluations of every run, and final values against cost", {}),
    "imagenet": ("the same for the validation error of ImageNet", {"y": "val_error"}),
    "gpt2": ("the same for the validation loss of GPT-2", {"y": "val_loss"}),
}
"""Description and default columns of each figure."""
CURVES = ("curves", "imagenet", "gpt2")
LAWS = ("compute", "cifar")
EXAMPLES = """\
examples:
  structlin figure delta-h runs --out delta_h.pdf
  structlin figure landscape runs --where structure=block_tensor_train --y test_error --out landscape.png
  structlin figure cifar runs --group structure,rank --out cifar.svg
  structlin figure gpt2 runs/*/record.jsonl --unfinished --out gpt2.png

Figures are drawn from the records alone. `structlin fit --help` describes RECORDS and the names of columns.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {text}" for name, (text, _) in FIGURES.items())
    add(parser, "NAME", about, among=tuple(FIGURES), what="figure")
    add_rows(parser)
    add(parser, "--out FILE", "what to write: .png, .svg or .pdf", required=True)
    law = parser.add_argument_group("the laws (compute, cifar)")
    add(law, "--frontier", "fit only the Pareto frontier of each group")
    add(law, "--floor", "fit an irreducible error, too")
    add(law, "--samples N", "draws of the bootstrap", 500)
    add(law, "--noise E", "known standard deviation of an error", kind=float)


def run(arguments: argparse.Namespace) -> None:
    from structlin_nn.figures.style import FORMATS, save

    out = Path(arguments.out)
    if out.suffix.removeprefix(".").lower() not in FORMATS:
        raise ValueError(f"figures are written as .png, .svg or .pdf, got {out.name!r}")
    name, usual = arguments.name, FIGURES[arguments.name][1]
    if name not in LAWS and given(arguments, ("frontier", "floor", "noise")):
        raise ValueError(f"{name} draws no laws: --frontier, --floor and --noise are for {' and '.join(LAWS)}")
    arguments.x = arguments.x or usual.get("x", "training_macs")
    arguments.y = arguments.y or usual.get("y", "test_error")
    arguments.all_evaluations |= name in ("delta-h", *CURVES)
    save(_drawn(name, read_groups(arguments), arguments), out)
    print(out)


def _drawn(name: str, groups: dict[str, Any], arguments: argparse.Namespace) -> Any:
    if name == "delta-h":
        from structlin_nn.figures.scale import delta_h_figure

        return delta_h_figure(groups)
    if name == "landscape":
        from structlin_nn.figures.scale import landscape_figure

        if len(groups) > 1:
            raise ValueError(f"a landscape is of one group, got {', '.join(groups)}; choose one with --where")
        return landscape_figure(next(iter(groups.values())), y=arguments.y)
    if name in CURVES:
        from structlin_nn.figures.compute import curves_figure

        return curves_figure(groups, x=arguments.x, y=arguments.y)
    from structlin_nn.figures.compute import compute_figure
    from structlin_nn.laws import fit_groups

    laws, left_out = fit_groups(
        groups, arguments.x, arguments.y, frontier=arguments.frontier, floor=arguments.floor,
        samples=arguments.samples, noise=arguments.noise,
    )  # fmt: skip
    for group, reason in left_out.items():
        print(f"not fitted: {group}: {reason}", file=sys.stderr)
    return compute_figure(laws, x=arguments.x, y=arguments.y)
