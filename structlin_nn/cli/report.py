"""``structlin report``: one page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from structlin_nn.cli.fit import conditions_of

HELP = "write one HTML page about runs: curves, laws, multipliers, compute and time, planned and spent"
EXAMPLES = """\
examples:
  structlin report runs --out report.html
  structlin report runs --y val_loss --group structure,rank --floor --title GPT-2

RECORDS are run records or folders of them. The page is one file without scripts that takes nothing from the network.
Runs that have not ended are on it, and not in the laws. `structlin fit` explains columns and laws.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", metavar="RECORDS", nargs="+", help="run records, or folders of them")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="what to write (report.html)")
    parser.add_argument("--title", default="Training runs", metavar="TEXT", help="of the page")
    parser.add_argument("--y", metavar="COLUMN", help="the result (that of the task: test_error, val_error, val_loss)")
    parser.add_argument("--x", default="training_macs", metavar="COLUMN", help="compute of the laws (training_macs)")
    parser.add_argument("--group", default="structure", metavar="COLUMNS", help="one law each, with commas (structure)")
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows with this value, repeatable"
    )
    parser.add_argument(
        "--floor", nargs="?", const=True, default=False, type=float, metavar="E",
        help="an irreducible error: fitted, or E if it is known",
    )  # fmt: skip
    parser.add_argument("--reference", metavar="GROUP", help="group to compare with (dense, if there is one)")
    parser.add_argument("--at", type=float, metavar="E", help="error at which to compare (the lowest that both reach)")
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="draws of the bootstrap (500)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (0.95)")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.report import write_report

    out = Path(arguments.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a report is written as .html, got {out.name!r}")
    if not 0 < arguments.confidence < 1:
        raise ValueError(f"--confidence must be between 0 and 1, got {arguments.confidence:g}")
    write_report(
        out, arguments.records, y=arguments.y, x=arguments.x, where=conditions_of(arguments),
        group=[name for name in arguments.group.split(",") if name], reference=arguments.reference, error=arguments.at,
        floor=arguments.floor, samples=arguments.samples, confidence=arguments.confidence, title=arguments.title,
    )  # fmt: skip
    print(out)
    return 0
