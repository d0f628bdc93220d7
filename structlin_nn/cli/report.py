"""``structlin report``: one page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from structlin_nn.cli.common import add, check_confidence
from structlin_nn.cli.fit import add_floor, add_selection

HELP = "write one HTML page about runs: curves, laws, multipliers, compute and time, planned and spent"
EXAMPLES = """\
examples:
  structlin report runs --out report.html
  structlin report runs --y val_loss --group structure,rank --floor --title GPT-2

RECORDS are run records or folders of them. The page is one file without scripts that takes nothing from the network.
Runs that have not ended are on it, and not in the laws. `structlin fit` explains columns and laws.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "RECORDS", "run records, or folders of them", nargs="+")
    add(parser, "--out FILE", "what to write", "report.html")
    add(parser, "--title TEXT", "of the page", "Training runs")
    add(parser, "--y COLUMN", "the result (that of the task: test_error, val_error, val_loss)")
    add(parser, "--x COLUMN", "compute of the laws", "training_macs")
    add_selection(parser)
    add_floor(parser)
    add(parser, "--reference GROUP", "group to compare with (dense, if there is one)")
    add(parser, "--at E", "error at which to compare (the lowest that both reach)", kind=float)
    add(parser, "--samples N", "draws of the bootstrap", 500)
    add(parser, "--confidence P", "of the intervals", 0.95)


def run(arguments: argparse.Namespace) -> None:
    from structlin_nn.report import write_report

    out = Path(arguments.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a report is written as .html, got {out.name!r}")
    check_confidence(arguments.confidence)
    write_report(
        out, arguments.records, y=arguments.y, x=arguments.x, where=dict(arguments.where),
        group=[name for name in arguments.group.split(",") if name], reference=arguments.reference, error=arguments.at,
        floor=arguments.floor, samples=arguments.samples, confidence=arguments.confidence, title=arguments.title,
    )  # fmt: skip
    print(out)
