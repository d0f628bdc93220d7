"""Runs on this machine: several at a time in processes of their own, finished ones skipped, begun ones resumed."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from structlin_nn._files import atomic_write
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import config_from_dict
from structlin_nn.training.records import read_record

__all__ = ["MAX_WORKERS", "STATES", "Job", "Outcome", "default_workers", "run_all", "state_of"]

MAX_WORKERS = 8
"""Processes that are started unless more are asked for; each takes about half a gigabyte of memory."""

STATES = ("new", "begun", "finished", "failed")
FAILED = "failed.json"


@dataclass(frozen=True)
class Job:
    """A run to be made: its configuration, its folder, and where its data are (arguments of `setup`)."""

    config: RunConfig
    folder: Path
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs: messages of those that failed, by name, and the signal that interrupted them."""

    failed: dict[str, str]
    signal: signal.Signals | None


def default_workers() -> int:
    """One for each core, and `MAX_WORKERS` at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def state_of(config: RunConfig, folder: Path) -> str:
    """One of `STATES`: ``failed`` is a run whose loss was no longer finite, or whose data were refused.

    Raises:
        ValueError: a run with another configuration in that folder.
    """
    if not (folder / "record.jsonl").exists():
        return "failed" if (folder / FAILED).exists() else "new"
    try:
        found = read_record(folder / "record.jsonl")
    except ValueError:  # cut off: resuming repairs it
        return "begun"
    config.check_continues(config_from_dict(found.header["task"], found.header["config"]), folder)
    if found.finished and (folder / "checkpoint.pt").exists():
        return "finished"
    return "failed" if (folder / FAILED).exists() else "begun"


def run_all(
    jobs: Mapping[str, Job],
    *,
    workers: int,
    weights: Mapping[str, float] | None = None,
    progress: bool = True,
) -> Outcome:
    """Train all, the heaviest first, so that no worker is left with a long run at the end.

    Call it under ``if __name__ == "__main__":``, since it starts processes. Where there are several GPUs, and the
    jobs use ``cuda``, each worker has one of them. After SIGINT or SIGTERM, runs write a checkpoint and end.

    Args:
        jobs: by name; those that are begun are resumed.
        workers: processes, at least 1.
        weights: work of each, for the order and the bar.
        progress: a bar on stderr.

    Raises:
        ValueError: a number of workers below 1, or an error of a run that is neither its loss nor its data.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    from structlin_nn.training.interrupt import Interruption

    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not jobs:
        return Outcome({}, None)
    work = dict(weights) if weights is not None else dict.fromkeys(jobs, 1.0)
    workers = min(workers, len(jobs))
    context = get_context("spawn")
    messages, stop, places = context.Queue(), context.Event(), context.Queue()
    for number in range(workers):
        places.put((number, workers))
    interval = 0.2 if sys.stderr.isatty() else 15.0
    total = sum(work.values())
    failed: dict[str, str] = {}
    with (
        Interruption() as interruption,
        ProcessPoolExecutor(workers, context, _prepare_worker, (messages, stop, places)) as pool,
        tqdm(
            total=total, desc=f"{len(jobs)} runs", disable=not progress, dynamic_ncols=True, mininterval=interval,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}] {postfix}",
        ) as bar,
    ):  # fmt: skip
        names: dict[Future[str | None], str] = {}
        for name in sorted(jobs, key=lambda name: -work[name]):
            names[pool.submit(_train, name, jobs[name])] = name
        running, done = set(names), 0
        try:
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    if (message := future.result()) is None:
                        done += 1
                    elif message:
                        failed[names[future]] = message
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
        if interruption.signal is None and not failed:
            bar.update(max(0.0, total - bar.n))
    return Outcome(failed, interruption.signal)


def _waiting(messages: Any) -> list[tuple[str, float, str]]:
    found = []
    while True:
        try:
            found.append(messages.get_nowait())
        except queue.Empty:
            return found


_messages: Any = None
_stop: Any = None
_workers = 1


def _prepare_worker(messages: Any, stop: Any, places: Any) -> None:
    global _messages, _stop, _workers
    _messages, _stop = messages, stop
    messages.cancel_join_thread()
    number, _workers = places.get()
    # Ctrl-C reaches every process of the terminal; runs write a checkpoint then, and the parent ends the rest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    gpus = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if not gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


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


def _train(name: str, job: Job) -> str | None:
    """None where the run is finished, "" where it was stopped, and else why it cannot go on."""
    import torch

    from structlin_nn.training.loop import TrainingError, fit, setup

    if _stop.is_set():
        return ""
    if not job.config.threads:
        # What torch would take, shared with the other workers.
        torch.set_num_threads(max(1, default_workers() // _workers))
    (job.folder / FAILED).unlink(missing_ok=True)
    try:
        made = setup(job.config, job.folder, resume=True, **job.data)
        result = fit(made, _Reporter(name), stop=_stop.is_set)
    except TrainingError as error:
        with atomic_write(job.folder / FAILED) as file:
            file.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return str(error)
    return None if result.finished else ""
