"""Test loss and error of trained dense networks against the MACs of their projections, with and without calibration.

    python benchmarks/compress.py --out compress

The script trains the dense residual MLP of the package on the embedded images, projects all its linear layers except
the last at each budget, and evaluates without further training. Calibration data are training images. Losses, errors
and divergences are those of the test images. The divergence is the mean Kullback-Leibler divergence of the predictions
from those of the dense network, which measures the projection without the labels.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import machine, result_path, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data import load_images
from structlin_nn.data.augment import normalize
from structlin_nn.recipes.cifar import Config, Options, train
from structlin_nn.torch import project_linear, to_dense_linear
from structlin_nn.trained import load_trained

STRUCTURES = ("low_rank", "block_tensor_train")


@torch.no_grad()
def predictions(model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    """Return logarithms of the predicted probabilities of the test images, and the loss of each image."""
    images = normalize(torch.from_numpy(data.test_images), data.mean, data.std)
    found = model.eval()(images).log_softmax(1)
    return found, F.nll_loss(found, torch.from_numpy(data.test_labels).long(), reduction="none")


def measure(model: nn.Module, data: Any, name: str, fraction: float, calibration: list[Tensor] | None) -> dict:
    """Return one row of the table."""
    compressed = copy.deepcopy(model)
    start = time.process_time()
    row = {"structure": name, "mac_fraction": fraction, "calibrated": calibration is not None}
    try:
        report = project_linear(compressed, name, mac_fraction=fraction, calibration=calibration)
    except ValueError as error:  # a budget below the structure's smallest form
        return {**row, "error": str(error)}
    seconds = time.process_time() - start
    (dense, before), (found, after) = (predictions(m, data) for m in (model, compressed))
    return {
        **row,
        "mac_ratio": report.macs_before / report.macs_after,
        "param_ratio": report.params_before / report.params_after,
        "test_error": error_of(found, data),
        "loss_change": float((after - before).mean()),
        "loss_change_error": float((after - before).std()) / math.sqrt(len(after)),
        "divergence": float((dense.exp() * (dense - found)).sum(1).mean()),
        "project_seconds": seconds,
    }


def error_of(found: Tensor, data: Any) -> float:
    """Return the fraction of test images that are misclassified."""
    return float((found.argmax(1) != torch.from_numpy(data.test_labels)).float().mean())


def report(result: dict) -> str:
    """Format a result as the table of the documentation: means over seeds."""
    lines = [
        "| structure | MACs kept | calibrated | error in % | change of the loss | divergence from dense |",
        "|---" * 6 + "|",
    ]
    kinds: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        kinds.setdefault((row["structure"], row["mac_fraction"], row["calibrated"]), []).append(row)
    for (name, fraction, calibrated), rows in kinds.items():
        if any("error" in row for row in rows):
            shown = ["-"] * 3
        else:
            wrong, change, far = ([row[key] for row in rows] for key in ("test_error", "loss_change", "divergence"))
            within = math.sqrt(sum(row["loss_change_error"] ** 2 for row in rows)) / len(rows)
            shown = [
                f"{100 * statistics.fmean(wrong):.2f}", f"{statistics.fmean(change):+.4f} ± {within:.4f}",
                f"{statistics.fmean(far):.5f}",
            ]  # fmt: skip
        lines.append(f"| {name} | {fraction:g} | {'yes' if calibrated else 'no'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def run(seed: int, arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Return the dense network's figures and the rows of one seed."""
    sizes = {"width": arguments.width, "epochs": arguments.epochs, "eval_every": arguments.epochs, "batch_size": 256}
    with tempfile.TemporaryDirectory() as folder:
        config = Config(**sizes, augment=False, mixup=0.0, label_smoothing=0.1, seed=seed)
        train(config, Options(out=Path(folder) / "run", quiet=True))
        model = load_trained(Path(folder) / "run")
    to_dense_linear(model)
    data = load_images("fashion").as_32x32_rgb()
    images = torch.from_numpy(data.train_images[: arguments.calibration_images])
    calibration = [normalize(batch, data.mean, data.std) for batch in images.split(500)]
    found, losses = predictions(model, data)
    rows = [
        {"seed": seed, **measure(model, data, name, fraction, given)}
        for name in arguments.structures for fraction in arguments.fractions for given in (None, calibration)
    ]  # fmt: skip
    return {"seed": seed, "test_loss": float(losses.mean()), "test_error": error_of(found, data)}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--structures", nargs="+", default=STRUCTURES)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--calibration-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", metavar="NAME", help="the JSON file to write, or its name in results/")
    arguments = parser.parse_args()
    setting = {key: value for key, value in vars(arguments).items() if key != "out"}
    found = [run(seed, arguments) for seed in arguments.seeds]
    result = {
        "setting": setting, "machine": machine("cpu"), "dense": [dense for dense, _ in found],
        "rows": [row for _, rows in found for row in rows],
    }  # fmt: skip
    print(*result["dense"], report(result), sep="\n")
    if arguments.out:
        write_result(result_path(arguments.out), result)


if __name__ == "__main__":
    main()
