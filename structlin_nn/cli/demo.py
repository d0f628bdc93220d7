"""``structlin demo``: train and compare small networks with one command."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from structlin_nn.cli.common import add, fail, positive, print_json, print_table

HELP = "train dense and structured networks at equal training compute, with two learning-rate rules"
EXAMPLES = """\
examples:
  structlin demo                     a few minutes on two cores; table, records and a figure in runs/demo
  structlin demo --out DIR --seed 1  another folder and other random numbers
  structlin demo --quick             tiny networks, in seconds, in runs/demo-quick: a check of the installation

The images are a subset of Fashion-MNIST that is part of the package. The same command resumes an interrupted
demonstration, and prints the results of a finished one.
"""
HEAD = (
    "structure", "learning rate", "width", "parameters", "MACs/image", "training MACs", "seconds", "train error",
    "test loss", "test error",
)  # fmt: skip
FORM = (
    "{structure}|{learning_rate}|{width}|{params:,}|{forward_macs:,}|{training_macs:.3g}|{training_seconds:.1f}|"
    "{train_error:.2%}|{loss:.4f}|{error:.2%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "--out DIR", "folder to write (runs/demo, with --quick runs/demo-quick)")
    add(parser, "--seed N", "seed of all runs", 0)
    add(parser, "--quick", "train tiny networks for one epoch, as a test")
    add(parser, "--workers N", "number of parallel runs (one for each core)", kind=positive)
    add(parser, "--quiet", "no progress bar")
    add(parser, "--json", "print the table as JSON")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.demo import TOLERANCE, compute_difference, configurations, demo

    folder = Path(arguments.out or ("runs/demo-quick" if arguments.quick else "runs/demo"))
    start = time.monotonic()
    names = list(configurations(arguments.seed, arguments.quick))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out must be a folder, and {folder} is a file")
    if not arguments.quiet:
        there = sum((folder / name / "record.jsonl").exists() for name in names)
        told = f"; {folder} already holds {there} of them" if there else ""
        print(
            "10,000 training and 2,000 test images: the subset of Fashion-MNIST that is part of the package\n"
            f"{len(names)} networks of equal compute within {100 * TOLERANCE:g} %{told}", file=sys.stderr
        )  # fmt: skip
    options = {"seed": arguments.seed, "quick": arguments.quick, "workers": arguments.workers}
    try:
        rows = demo(folder, progress=not arguments.quiet, **options)
    except RuntimeError as error:
        return fail("demo", error)
    if not isinstance(rows, list):
        fail("demo", f"{rows.name}; the same command resumes the demonstration")
        return 128 + rows
    difference = compute_difference(rows)
    if arguments.json:
        print_json({
            "seed": arguments.seed, "quick": arguments.quick, "largest_compute_difference": difference, "rows": rows,
            "records": [str(folder / name / "record.jsonl") for name in names], "figure": str(folder / "demo.png"),
            "table": str(folder / "demo.json"),
        })  # fmt: skip
        return 0
    print_table(HEAD, [FORM.format(**row).split("|") for row in rows], left=2)
    # Standard error of an error rate on so few test images.
    smallest, images = min(row["error"] for row in rows), rows[0]["test_images"]
    spread = 100 * (smallest * (1 - smallest) / images) ** 0.5
    print(
        "\nMACs are multiply-accumulates, of one image forward and of the whole training, forward and backward.\n"
        f"The training MACs differ by at most {100 * difference:.1f} % from those of a dense network.\n"
        "Seconds are those of the training steps, each run on one core, without evaluations.\n"
        f"One seed; with {images:,} test images an error has a standard error of {spread:.1f} points or more.\n"
        f"records  {folder}/*/record.jsonl\ntable    {folder / 'demo.json'}\nfigure   {folder / 'demo.png'}\n"
        f"done in {time.monotonic() - start:.0f} s"
    )
    return 0
