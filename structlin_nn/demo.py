"""The demonstration: dense and structured networks at equal training compute, with two learning-rate rules.

MLPs of *Compute Better Spent* (Qiu et al., ICML 2024) are trained on the embedded images. At each of a few amounts
of compute stands a dense network, and beside it one network of each structure whose width makes its training compute
equal to the dense network's within `TOLERANCE`. Training compute are the MACs of the forward and backward passes over
all images seen, counted by `structlin_nn.counting`. Each structured network is trained
twice: every factor with the learning rate of a dense layer of the same size (naive), and with that of its structure
(structure-aware). All else is the same for all of them: base learning rate, optimiser, schedule, batches and their
order, number of epochs. The networks are small and the runs short, so that all of them take a few minutes on two
cores; they show the machinery at work, and rank nothing.

Each run uses one core; as many run side by side as there are cores. A demonstration that was interrupted is
resumed when it is started again with the same folder.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structlin_nn._files import atomic_write
from structlin_nn.recipes.cifar import Config, Options
from structlin_nn.records import Record, read_record
from structlin_nn.sweeps.local import Job, default_workers, run_all, state_of

__all__ = ["TOLERANCE", "DemoResult", "compute_difference", "configurations", "demo", "row_of"]

TOLERANCE = 0.03
"""By how much the compute of a structured network may differ from that of the dense network beside it."""

# Structure, options, width at each amount of compute. The dense widths set the compute.
WIDTHS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("dense", {}, (16, 32, 64, 128)),
    ("block_tensor_train", {"rank": 1, "factorization": "balanced"}, (64, 140, 288, 624)),
    ("monarch", {"blocks": 4}, (44, 80, 140, 260)),
    ("low_rank", {}, (72, 156, 328, 704)),
    ("kronecker", {"factorization": "balanced"}, (64, 140, 288, 624)),
)
QUICK_WIDTHS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("dense", {}, (16,)),
    ("block_tensor_train", {"rank": 1, "factorization": "balanced"}, (64,)),
    ("monarch", {"blocks": 4}, (44,)),
    ("low_rank", {}, (72,)),
    ("kronecker", {"factorization": "balanced"}, (64,)),
)
COMMON: dict[str, Any] = {
    "model": "cifar-mlp",
    "data_set": "fashion",
    "epochs": 8,
    "batch_size": 256,
    "lr": 3e-3,
    "augment": False,
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "input_lr_mult": 0.1,
    "threads": 1,
}
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 250}


@dataclass(frozen=True)
class DemoResult:
    """What `demo` made.

    Attributes:
        rows: one for each run, see `row_of`.
        folder: where everything lies; `records`, `figure` and `table` (JSON) in it.
        signal: what interrupted it, None where it went to its end; there are no figure and no table then.
    """

    rows: list[dict[str, Any]]
    folder: Path
    records: list[Path]
    figure: Path
    table: Path
    signal: signal.Signals | None = None


def configurations(seed: int = 0, quick: bool = False) -> dict[str, Config]:
    """The runs of the demonstration, by name: dense once, each structure with both learning-rate rules.

    `quick` has tiny networks, one amount of compute and one epoch: for tests, its errors say nothing.
    """
    found = {}
    for structure, options, widths in QUICK_WIDTHS if quick else WIDTHS:
        for width in widths:
            for aware in (True,) if structure == "dense" else (True, False):
                rule = "" if structure == "dense" else "-aware" if aware else "-naive"
                settings = {**COMMON, **(QUICK if quick else {})}
                found[f"{structure}-w{width}{rule}"] = Config(
                    width=width,
                    structure=structure,
                    options=options,
                    structure_aware=aware,
                    seed=seed,
                    eval_every=settings["epochs"],
                    **settings,
                )
    return found


def row_of(name: str, record: Record) -> dict[str, Any]:
    """What the table and the figure show of a finished run, from its record alone.

    ``learning_rate`` is "aware" or "naive" ("dense" where both are the same); MACs are multiply-accumulates;
    ``loss`` and ``error`` are those on test images, at the end. ``training_seconds`` are those of the training steps
    on one core, ``seconds`` with evaluations.
    """
    config, counts, last = record.header["config"], record.header["counts"], record.evaluations[-1]
    rule = "dense" if config["structure"] == "dense" else "aware" if config["structure_aware"] else "naive"
    return {
        "name": name,
        "structure": config["structure"],
        "width": config["width"],
        "learning_rate": rule,
        "params": counts["params"],
        "forward_macs": counts["forward_macs"],
        "training_macs": last["training_macs"],
        "train_loss": last["train_loss"],
        "train_error": last["train_error"],
        "loss": last["test_loss"],
        "error": last["test_error"],
        "test_images": record.header["data"]["test_images"],
        "seconds": last["seconds"],
        "training_seconds": last.get("training_seconds", last["seconds"]),
    }


def demo(
    folder: str | os.PathLike[str] = "runs/demo",
    *,
    seed: int = 0,
    quick: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> DemoResult:
    """Train all networks, and write records, table and figure.

    Call it under ``if __name__ == "__main__":``, since it starts processes.

    Args:
        folder: where to write; runs that are there already, finished or not, are taken up.
        seed: of all runs.
        quick: see `configurations`.
        workers: processes, by default one for each core, and 8 at most.
        progress: bars on stderr.

    Raises:
        ValueError: a number of workers below 1, or runs in `folder` with another configuration.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    configs = configurations(seed, quick)
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folders = {name: folder / name for name in configs}
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: state_of(config, folders[name]) for name, config in configs.items()}
    left = {
        name: Job(configs[name], Options(out=folders[name])) for name, state in states.items() if state != "finished"
    }
    work = {name: configs[name].epochs * (100 + configs[name].width) for name in left}  # near enough to seconds
    outcome = run_all(left, workers=workers, weights=work, progress=progress)
    if outcome.failed:
        raise RuntimeError("; ".join(f"{name}: {message}" for name, message in outcome.failed.items()))
    stopped = outcome.signal
    records = [run / "record.jsonl" for run in folders.values()]
    result = DemoResult([], folder, records, folder / "demo.png", folder / "demo.json", stopped)
    if stopped is not None:
        return result
    result.rows.extend(row_of(name, read_record(run / "record.jsonl")) for name, run in folders.items())
    assert compute_difference(result.rows) <= TOLERANCE, "the widths do not match the compute"
    with atomic_write(result.table) as file:
        file.write(json.dumps(result.rows, indent=2, allow_nan=False).encode() + b"\n")

    from structlin_nn.plots import demo_figure, save_png

    save_png(demo_figure(result.rows), result.figure)
    return result


def compute_difference(rows: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of a network's training compute from that of the dense one beside it."""
    dense = [row["training_macs"] for row in rows if row["structure"] == "dense"]
    return max(min(abs(row["training_macs"] / macs - 1) for macs in dense) for row in rows)
