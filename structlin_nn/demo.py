"""The demonstration: dense and structured networks at equal training compute, with two learning-rate rules.

MLPs of *Compute Better Spent* (Qiu et al., ICML 2024) are trained on the embedded images. At each of a few amounts
of compute stands a dense network, and beside it one network of each structure whose width makes its training compute
equal to the dense network's within `TOLERANCE`. Training compute are the MACs of the forward and backward passes over
all images seen, counted by `structlin_nn.counting`. Each structured network is trained twice: every factor with the
learning rate of a dense layer of the same size (naive), and with that of its structure (structure-aware). All else is
the same for all of them. The networks are small and the runs short, so that all of them take a few minutes on two
cores; they show the machinery at work, and rank nothing.

Each run uses one core, with as many parallel runs as cores. A demonstration with the same folder resumes an interrupted
one.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structlin_nn._files import atomic_write
from structlin_nn.recipes.cifar import Config, Options
from structlin_nn.records import Record, read_record
from structlin_nn.sweeps.local import Job, default_workers, run_all, state_of

__all__ = ["TOLERANCE", "compute_difference", "configurations", "demo", "row_of"]

TOLERANCE = 0.03
"""Largest relative difference of compute between a structured network and its dense counterpart."""

# Structure, options, width at each amount of compute. The dense widths set the compute.
WIDTHS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("dense", {}, (16, 32, 64, 128)),
    ("block_tensor_train", {"rank": 1, "factorization": "balanced"}, (64, 140, 288, 624)),
    ("monarch", {"blocks": 4}, (44, 80, 140, 260)),
    ("low_rank", {}, (72, 156, 328, 704)),
    ("kronecker", {"factorization": "balanced"}, (64, 140, 288, 624)),
)
COMMON: dict[str, Any] = {
    "model": "cifar-mlp", "data_set": "fashion", "epochs": 8, "eval_every": 8, "batch_size": 256, "lr": 3e-3,
    "augment": False, "mixup": 0.0, "label_smoothing": 0.0, "input_lr_mult": 0.1, "threads": 1,
}  # fmt: skip
QUICK: dict[str, Any] = {**COMMON, "epochs": 1, "eval_every": 1, "batch_size": 250}


def configurations(seed: int = 0, quick: bool = False) -> dict[str, Config]:
    """Return the runs of the demonstration, by name: dense once, each structure with both learning-rate rules.

    `quick` has tiny networks, one amount of compute and one epoch: for tests, its errors say nothing.
    """
    found = {}
    for structure, options, widths in WIDTHS:
        for width in widths[:1] if quick else widths:
            for aware in (True,) if structure == "dense" else (True, False):
                rule = "" if structure == "dense" else "-aware" if aware else "-naive"
                found[f"{structure}-w{width}{rule}"] = Config(
                    width=width, structure=structure, options=options, structure_aware=aware, seed=seed,
                    **(QUICK if quick else COMMON),
                )  # fmt: skip
    return found


def row_of(name: str, record: Record) -> dict[str, Any]:
    """Return what the table and the figure show of a finished run, from its record alone.

    ``learning_rate`` is "aware" or "naive" ("dense" where both are the same); MACs are multiply-accumulates;
    ``loss`` and ``error`` are those on test images, at the end. ``training_seconds`` are those of the training steps
    on one core, ``seconds`` with evaluations.
    """
    config, last = record.header["config"], record.evaluations[-1]
    rule = "dense" if config["structure"] == "dense" else "aware" if config["structure_aware"] else "naive"
    kept = ("training_macs", "train_loss", "train_error", "seconds", "training_seconds")
    return {
        "name": name, "structure": config["structure"], "width": config["width"], "learning_rate": rule,
        **{key: record.header["counts"][key] for key in ("params", "forward_macs")}, **{key: last[key] for key in kept},
        "loss": last["test_loss"], "error": last["test_error"], "test_images": record.header["data"]["test_images"],
    }  # fmt: skip


def demo(
    folder: str | os.PathLike[str] = "runs/demo", *, seed: int = 0, quick: bool = False, workers: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]] | signal.Signals:  # fmt: skip
    """Train all networks, write records, ``demo.json`` and ``demo.png``, and return the rows of `row_of`.

    Runs in `folder` are kept or resumed; `quick` is that of `configurations`; `workers` processes (by default one for
    each core, 8 at most) show bars on stderr with `progress`. A signal that interrupts it is returned instead. Call it
    under ``if __name__ == "__main__":``, since it starts processes.

    Raises
    ------
    ValueError, RuntimeError
        Runs in `folder` with another configuration; a run that failed.
    """
    from structlin_nn.figures.compute import demo_figure
    from structlin_nn.figures.style import save

    folder, configs = Path(folder), configurations(seed, quick)
    left = {
        name: Job(config, Options(out=folder / name))
        for name, config in configs.items()
        if state_of(config, folder / name) != "finished"
    }
    work = {name: configs[name].epochs * (100 + configs[name].width) for name in left}  # near enough to seconds
    workers = default_workers() if workers is None else workers
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run_all(left, workers=workers, weights=work, progress=progress)
    if outcome.failed:
        raise RuntimeError("; ".join(f"{name}: {message}" for name, message in outcome.failed.items()))
    if outcome.signal is not None:
        return outcome.signal
    rows = [row_of(name, read_record(folder / name / "record.jsonl")) for name in configs]
    assert compute_difference(rows) <= TOLERANCE, "the widths do not match the compute"
    with atomic_write(folder / "demo.json") as file:
        file.write(json.dumps(rows, indent=2, allow_nan=False).encode() + b"\n")
    save(demo_figure(rows), folder / "demo.png")
    return rows


def compute_difference(rows: Sequence[dict[str, Any]]) -> float:
    """Return the largest relative difference in training compute between a network and its dense counterpart."""
    dense = [row["training_macs"] for row in rows if row["structure"] == "dense"]
    return max(min(abs(row["training_macs"] / macs - 1) for macs in dense) for row in rows)
