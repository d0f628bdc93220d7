"""Test error of a trained dense network against the MACs of its projections, with and without calibration.

    python benchmarks/compress.py --out compress

The script trains the dense residual MLP of the package on the embedded images, projects all its linear layers except
the last at each budget, and evaluates without further training. Calibration data are training images; errors are those
of the test images. It is one run with one seed, so differences below one standard error, which the result states, are
not significant.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import machine, result_path, write_result
from torch import nn

from structlin_nn.data import load_images
from structlin_nn.data.augment import normalize
from structlin_nn.recipes.cifar import Config, Options, loss_and_error, train
from structlin_nn.torch import project_linear, to_dense_linear
from structlin_nn.trained import load_trained

STRUCTURES = ("low_rank", "block_tensor_train")


def measure(model: nn.Module, data: Any, name: str, fraction: float, calibration: list[torch.Tensor] | None) -> dict:
    """Return one row of the table."""
    compressed = copy.deepcopy(model)
    start = time.perf_counter()
    row = {"structure": name, "mac_fraction": fraction, "calibrated": calibration is not None}
    try:
        report = project_linear(compressed, name, mac_fraction=fraction, calibration=calibration)
    except ValueError as error:  # a budget below the structure's smallest form
        return {**row, "error": str(error)}
    seconds = time.perf_counter() - start
    test = (torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))
    loss, wrong = loss_and_error(compressed, *test, data)
    return {
        **row,
        "mac_ratio": report.macs_before / report.macs_after,
        "param_ratio": report.params_before / report.params_after,
        "test_loss": loss,
        "test_error": wrong,
        "project_seconds": seconds,
        "report": report.to_dict(),
    }


def table(rows: list[dict], dense: dict) -> str:
    """Format the test errors in per cent, without and with calibration."""
    lines = [f"dense: {100 * dense['test_error']:.2f} % of {dense['test_images']} test images wrong, standard error "
             f"{100 * dense['standard_error']:.2f} %", "",
             f"{'structure':<20}{'MACs kept':>10}{'plain':>9}{'calibrated':>12}"]  # fmt: skip
    found = {(r["structure"], r["mac_fraction"], r["calibrated"]): r for r in rows}
    for name, fraction in dict.fromkeys((r["structure"], r["mac_fraction"]) for r in rows):
        pair = [found[name, fraction, calibrated] for calibrated in (False, True)]
        shown = [f"{100 * r['test_error']:.2f}" if "test_error" in r else "-" for r in pair]
        lines.append(f"{name:<20}{fraction:>10.3g}{shown[0]:>9}{shown[1]:>12}")
    return "\n".join([*lines, "", "-: the budget is below the smallest form of the structure"])


def report(result: dict) -> str:
    """Format a result as the table of the documentation."""
    return table(result["rows"], result["dense"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--structures", nargs="+", default=STRUCTURES)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--calibration-images", type=int, default=2000)
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    setting = {"width": arguments.width, "epochs": arguments.epochs, "calibration_images": arguments.calibration_images}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "width": arguments.width,
            "epochs": arguments.epochs,
            "eval_every": arguments.epochs,
            "batch_size": 256,
        }
        config = Config(**sizes, augment=False, mixup=0.0, label_smoothing=0.1)
        train(config, Options(out=Path(folder) / "run"))
        model = load_trained(Path(folder) / "run")
    to_dense_linear(model)
    data = load_images("fashion").as_32x32_rgb()
    images = torch.from_numpy(data.train_images[: arguments.calibration_images])
    calibration = [normalize(batch, data.mean, data.std) for batch in images.split(500)]
    test = (torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))
    loss, wrong = loss_and_error(model, *test, data)
    dense = {"test_loss": loss, "test_error": wrong, "test_images": len(data.test_labels),
             "standard_error": math.sqrt(wrong * (1 - wrong) / len(data.test_labels))}  # fmt: skip
    rows = []
    for name in arguments.structures:
        for fraction in arguments.fractions:
            rows += [measure(model, data, name, fraction, given) for given in (None, calibration)]
            print(f"{name}, {fraction:g} of the MACs: done", file=sys.stderr)
    print(table(rows, dense))
    if arguments.out:
        result = {"setting": setting, "machine": machine("cpu"), "dense": dense, "rows": rows}
        write_result(result_path(arguments.out), result)


if __name__ == "__main__":
    main()
