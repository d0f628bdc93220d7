"""Runs on this machine: their costs and states, and their training in parallel processes."""

from __future__ import annotations

import json
import os
import queue
import signal
import traceback
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from structlin_nn._files import atomic_write, cores
from structlin_nn._text import progress_bar
from structlin_nn.checkpoints import checkpoints
from structlin_nn.recipes import recipe_module
from structlin_nn.records import FAILED, read_record

__all__ = [
    "MAX_WORKERS", "STATES", "Job", "Outcome", "Planned", "default_workers", "note_failure", "number_of_runs", "plan",
    "run_all", "state_of",
]  # fmt: skip

MAX_WORKERS = 8
"""Default limit of parallel processes; each takes about half a gigabyte of memory."""
STATES = ("new", "begun", "finished", "failed")


@dataclass(frozen=True)
class Job:
    """A run: its configuration and its options (``options.out`` is its folder)."""

    config: Any
    options: Any

    @property
    def recipe(self) -> Any:
        """The module that trains it."""
        return recipe_module(type(self.config).__module__.rpartition(".")[2])

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.options.out)


@dataclass(frozen=True)
class Planned:
    """A planned run: its state, one of `STATES`, and its counts (`structlin_nn.records`)."""

    job: Job
    state: str
    counts: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """The end of some jobs: messages of failed ones by name, and the signal that interrupted them."""

    failed: dict[str, str]
    signal: signal.Signals | None


def default_workers() -> int:
    """Return the number of cores, at most `MAX_WORKERS`."""
    return min(cores(), MAX_WORKERS)


def number_of_runs(number: int) -> str:
    """Return a number of runs in words.

    Examples
    --------
    >>> number_of_runs(1), number_of_runs(0)
    ('1 run', '0 runs')
    """
    return f"{number} run" if number == 1 else f"{number} runs"


def state_of(config: Any, folder: Path) -> str:
    """Return one of `STATES`; ``failed`` is a run that ended with an error.

    ValueError for a folder with a run of another configuration.
    """
    failed = (folder / FAILED).exists()
    if not (folder / "record.jsonl").exists():
        return "failed" if failed else "new"
    unfinished = "failed" if failed else "begun"
    try:
        found = read_record(folder / "record.jsonl")
    except ValueError:  # cut off, which resuming repairs, or damaged, which it reports
        return unfinished
    config.check_continues(recipe_module(found.header["recipe"]).Config.from_dict(found.header["config"]), folder)
    return "finished" if found.finished and checkpoints(folder) else unfinished


def plan(jobs: Mapping[str, Job]) -> dict[str, Planned]:
    """Count all runs on the meta device, and find their states.

    ValueError for sizes that a structure cannot have (the message names the run), or a folder with another run.
    """
    counted: dict[str, dict[str, int]] = {}
    found = {}
    for name, job in jobs.items():
        free = ("seed", "lr", "structure_aware", "device", "threads", "rule")  # change neither model nor steps
        key = repr(sorted((k, v) for k, v in job.config.to_dict().items() if k not in free))
        try:
            if key not in counted:
                counted[key] = job.recipe.plan(job.config, job.options)[2]
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from error
        found[name] = Planned(job, state_of(job.config, job.folder), counted[key])
    return found


def run_all(jobs: Mapping[str, Job], *, workers: int, weights: Mapping[str, float], progress: bool = True) -> Outcome:
    """Train all runs, the largest first, and resume begun ones.

    An error in one run is written to its folder, and the others go on. Call this function under
    ``if __name__ == "__main__":``, since it starts processes. With several GPUs and jobs on ``cuda``, each worker has
    one GPU. After SIGINT or SIGTERM, runs write a checkpoint and end. `weights` are the costs of the runs, for their
    order and the progress bar.
    """
    from structlin_nn.recipes._run import Interruption

    if not jobs:
        return Outcome({}, None)
    workers, total = min(workers, len(jobs)), sum(weights.values())
    context = get_context("spawn")
    messages, stop, places = context.Queue(), context.Event(), context.Queue()
    for number in range(workers):
        places.put((number, workers))
    failed: dict[str, str] = {}
    form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}] {postfix}"
    with (
        Interruption() as interruption,
        ProcessPoolExecutor(workers, context, _prepare_worker, (messages, stop, places)) as pool,
        progress_bar(total, number_of_runs(len(jobs)), quiet=not progress, bar_format=form) as bar,
    ):
        largest = sorted(jobs, key=lambda name: -weights[name])
        names = {pool.submit(_train, name, jobs[name]): name for name in largest}
        running, done = set(names), 0
        try:
            while running:
                finished, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in finished:
                    error = future.exception()  # of a process that was killed
                    message = f"its process ended: {error}" if error is not None else future.result()
                    if message is None:
                        done += 1
                    elif message:
                        failed[names[future]] = message
                if interruption.signal is not None and not stop.is_set():
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                # `wait` does not count cancelled ones as done.
                running = {future for future in running if not future.cancelled()}
                with suppress(queue.Empty):
                    while True:
                        name, share, text = messages.get_nowait()
                        bar.set_postfix_str(f"{done} done, {name}: {text}", refresh=False)
                        bar.update(share * weights[name])
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if interruption.signal is None and not failed:
            bar.update(max(0.0, total - bar.n))
    return Outcome(failed, interruption.signal)


_shared: Any = None  # of a worker: the queue of messages, the event that stops it, and the number of workers


def _prepare_worker(messages: Any, stop: Any, places: Any) -> None:
    global _shared
    messages.cancel_join_thread()
    number, workers = places.get()
    _shared = messages, stop, workers
    # Ctrl-C reaches every process of the terminal; the parent stops the runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    gpus = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if not gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _train(name: str, job: Job) -> str | None:
    """Return None for a finished run, "" for a stopped one, and else the reason of its failure."""
    import torch

    messages, stop, workers = _shared
    if stop.is_set():
        return ""
    if not job.config.threads:
        # Torch's default, shared with the other workers.
        torch.set_num_threads(max(1, default_workers() // workers))
    told = 0.0

    def watch(run: Any, loss: float | None) -> bool:
        nonlocal told
        reached = run.step / run.steps
        if reached - told >= 0.02 or run.step == run.steps:
            messages.put((name, reached - told, "" if loss is None else f"loss {loss:.4g}"))
            told = reached
        return stop.is_set()

    (job.folder / FAILED).unlink(missing_ok=True)
    try:
        result = job.recipe.train(job.config, replace(job.options, resume=True, quiet=True), watch=watch)
    except BlockingIOError as error:  # another process trains this run
        return str(error)
    except Exception as error:
        return note_failure(job.folder, error)
    return None if result.finished else ""


def note_failure(folder: Path, error: Exception) -> str:
    """Write the error that is handled, and that ended a run, to the folder of the run; return it in words."""
    folder.mkdir(parents=True, exist_ok=True)
    reason = f"{type(error).__name__}: {error}"
    with atomic_write(folder / FAILED) as file:
        file.write(json.dumps({"error": reason, "traceback": traceback.format_exc()}).encode() + b"\n")
    return reason
