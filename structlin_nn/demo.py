"""The demonstration: dense and structured networks at equal training compute, with two learning-rate rules.

MLPs of *Compute Better Spent* (Qiu et al., ICML 2024) are trained on the embedded images. At each of a few amounts
of compute stands a dense network, and beside it one network of each structure whose width makes its training compute
equal to the dense network's within `TOLERANCE`. Training compute are the MACs of the forward and backward passes over
all images seen, counted by `structlin_nn.counting`. Each structured network is trained
twice: every factor with the learning rate of a dense layer of the same size (naive), and with that of its structure
(structure-aware). All else is the same for all of them: base learning rate, optimiser, schedule, batches and their
order, number of epochs. The networks are small and the runs short, so that all of them take a few minutes on two
cores; they show the machinery at work, and rank nothing.

Each run uses one core; as many run side by side as there are cores. A demonstration that was interrupted goes on
where it was when it is started again with the same folder.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from structlin_nn.training.config import TrainConfig
from structlin_nn.training.files import atomic_write
from structlin_nn.training.records import Record, read_record

__all__ = ["TOLERANCE", "DemoResult", "compute_difference", "configurations", "demo", "row_of"]

TOLERANCE = 0.03
"""By how much the compute of a structured network may differ from that of the dense network beside it."""

MAX_WORKERS = 8
"""Processes that are started unless more are asked for; each takes about half a gigabyte of memory."""

# Structure, options, width at each amount of compute. The dense widths set the compute.
WIDTHS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("dense", {}, (16, 32, 64, 128)),
    ("block_tensor_train", {"rank": 1}, (64, 140, 288, 624)),
    ("monarch", {"blocks": 4}, (44, 80, 140, 260)),
    ("low_rank", {}, (72, 156, 328, 704)),
    ("kronecker", {}, (64, 140, 288, 624)),
)
QUICK_WIDTHS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("dense", {}, (16,)),
    ("block_tensor_train", {"rank": 1}, (64,)),
    ("monarch", {"blocks": 4}, (44,)),
    ("low_rank", {}, (72,)),
    ("kronecker", {}, (64,)),
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


def configurations(seed: int = 0, quick: bool = False) -> dict[str, TrainConfig]:
    """The runs of the demonstration, by name: dense once, each structure with both learning-rate rules.

    `quick` has tiny networks, one amount of compute and one epoch: for tests, its errors say nothing.
    """
    found = {}
    for structure, options, widths in QUICK_WIDTHS if quick else WIDTHS:
        for width in widths:
            for aware in (True,) if structure == "dense" else (True, False):
                rule = "" if structure == "dense" else "-aware" if aware else "-naive"
                settings = {**COMMON, **(QUICK if quick else {})}
                found[f"{structure}-w{width}{rule}"] = TrainConfig(
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
    ``loss`` and ``error`` are those on test images, at the end.
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
        workers: processes, by default one for each core, and `MAX_WORKERS` at most.
        progress: bars on stderr.

    Raises:
        ValueError: a number of workers below 1, or runs in `folder` with another configuration.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    configs = configurations(seed, quick)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, MAX_WORKERS)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folders = {name: folder / name for name in configs}
    folder.mkdir(parents=True, exist_ok=True)
    left = {name: config for name, config in configs.items() if not _is_finished(config, folders[name])}
    stopped = _run_all(left, folders, min(workers, len(left)), progress) if left else None
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


def _is_finished(config: TrainConfig, folder: Path) -> bool:
    """Whether the run is there and at its end; ValueError where it is one of another configuration."""
    checkpoint, record = folder / "checkpoint.pt", folder / "record.jsonl"
    if not checkpoint.exists() or not record.exists():
        return False
    try:
        found = read_record(record)
    except ValueError:  # cut off: resuming repairs it
        return False
    config.check_continues(TrainConfig.from_dict(found.header["config"]), folder)
    return found.finished


def _run_all(
    configs: dict[str, TrainConfig], folders: dict[str, Path], workers: int, progress: bool
) -> signal.Signals | None:
    """Train all, the widest first, so that no core is left with a long run at the end."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from structlin_nn.training.interrupt import Interruption

    context = get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    interval = 0.2 if sys.stderr.isatty() else 15.0
    work = {name: config.epochs * (100 + config.width) for name, config in configs.items()}  # near enough to seconds
    total = sum(work.values())
    order = sorted(configs, key=lambda name: -configs[name].width)
    with (
        Interruption() as interruption,
        ProcessPoolExecutor(workers, context, _prepare_worker, (messages, stop)) as pool,
        tqdm(
            total=total, desc=f"{len(configs)} runs", disable=not progress, dynamic_ncols=True, mininterval=interval,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}] {postfix}",
        ) as bar,
    ):  # fmt: skip
        running: set[Future[bool]] = {pool.submit(_train, name, configs[name], str(folders[name])) for name in order}
        done = 0
        try:
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    done += future.result()
                if interruption.signal is not None and not stop.is_set():
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                # `wait` does not count those as done.
                running = {future for future in running if not future.cancelled()}
                for name, share, text in _waiting(messages):
                    bar.set_postfix_str(f"{done} done, {name}: {text}", refresh=False)
                    bar.update(share * work[name])
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if interruption.signal is None:
            bar.update(max(0.0, total - bar.n))
    return interruption.signal


def _waiting(messages: Any) -> list[tuple[str, float, str]]:
    found = []
    while True:
        try:
            found.append(messages.get_nowait())
        except queue.Empty:
            return found


_messages: Any = None
_stop: Any = None


def _prepare_worker(messages: Any, stop: Any) -> None:
    global _messages, _stop
    _messages, _stop = messages, stop
    messages.cancel_join_thread()
    # Ctrl-C reaches every process of the terminal; runs write a checkpoint then, and the parent ends the rest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Reporter:
    """Sends the progress of a run to the parent: its name, the share done since the last time, and a text."""

    def __init__(self, name: str) -> None:
        self.name, self.total, self.waiting = name, 1, 0

    def start(self, total: int, done: int, label: str) -> None:
        self.total = total
        if done:
            _messages.put((self.name, done / total, "resumed"))

    def update(self, images: int, loss: float | None) -> None:
        self.waiting += images
        if self.waiting >= self.total / 50:
            _messages.put((self.name, self.waiting / self.total, "" if loss is None else f"loss {loss:.3f}"))
            self.waiting = 0

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def _train(name: str, config: TrainConfig, folder: str) -> bool:
    from structlin_nn.training.loop import fit, setup

    if _stop.is_set():
        return False
    return fit(setup(config, folder, resume=True), _Reporter(name), stop=_stop.is_set).finished
