"""Draw every figure of the documentation that shows training runs, from the records in benchmarks/records/.

    python benchmarks/figures.py --out docs/images

Each figure is one call of ``structlin figure``; ``--print`` only prints the calls. ``demo.png`` is drawn from
benchmarks/results/demo.json, which ``structlin demo`` wrote.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from structlin_nn.cli import main as structlin
from structlin_nn.figures.compute import demo_figure
from structlin_nn.figures.style import save

DEMO = Path(__file__).resolve().parent / "results" / "demo.json"
RECORDS = Path(__file__).resolve().parent / "records"

FIGURES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "delta-h.png": ("delta-h", "delta-h", ()),
    "cifar-mlp.png": ("cifar", "cifar-mlp-short", ("--y", "train_error")),
    "cifar-mlp-time.png": ("compute", "cifar-mlp-short", ("--x", "seconds", "--y", "train_error")),
    "lr-landscape-btt.png": (
        "landscape",
        "lr-landscape-short",
        ("--where", "structure=block_tensor_train", "--y", "train_loss"),
    ),
    "lr-landscape-dense.png": (
        "landscape",
        "lr-landscape-short",
        ("--where", "structure=dense", "--y", "train_loss"),
    ),
    "low-rank-rates.png": ("landscape", "low-rank-rates", ("--y", "train_error")),
    "gpt2.png": ("gpt2", "gpt2-short", ()),
}
"""By file: the figure, the folder of its records, and options."""


def call(file: str, out: Path) -> list[str]:
    """Return the arguments of ``structlin`` that draw a figure into a folder.

    Examples
    --------
    >>> call("delta-h.png", Path("out"))[:2]
    ['figure', 'delta-h']
    """
    name, records, options = FIGURES[file]
    return ["figure", name, str(RECORDS / records), *options, "--out", str(out / file)]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all figures; return the exit code of the first one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder, created if missing")
    parser.add_argument("--print", action="store_true", help="only print the commands")
    arguments = parser.parse_args(argv)
    if not arguments.print:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for file in FIGURES:
        command = call(file, arguments.out)
        if arguments.print:
            print(shlex.join(["structlin", *command]))
        elif code := structlin(command):
            return code
    if not arguments.print:
        save(demo_figure(json.loads(DEMO.read_text(encoding="utf-8"))), arguments.out / "demo.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
