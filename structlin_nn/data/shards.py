"""Work in many pieces, by several processes, that can be interrupted at any moment and taken up again.

A piece is done when its file is there, and files are there as a whole or not at all. What the pieces belong to is
written down before the first of them, so that nothing is put together from two different jobs.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from structlin_nn.data._checks import natural
from structlin_nn.data.tokens import DTYPE, META, META_VERSION, SPLITS
from structlin_nn._files import atomic_write
from structlin_nn.training.interrupt import Interruption

__all__ = ["Interrupted", "finished_job", "run_parallel", "write_token_shards"]

WORK = ".prepare"
Result = TypeVar("Result")


class Interrupted(Exception):
    """A signal ended the work; what was done is kept. Attribute ``signal``: which."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


def run_parallel(
    work: Callable[[Any], Result],
    items: Iterable[Any],
    *,
    workers: int | None = None,
    done: Callable[[Any, Result], None] | None = None,
) -> None:
    """Call `work` on each item, in this process or several, and `done` on each result in the order of completion.

    Args:
        work: a function that other processes can be given (pickled).
        items: its arguments, likewise.
        workers: processes; 1: this one; None: one for each core this process may use.
        done: called in this process with an item and its result.

    Raises:
        Interrupted: SIGINT or SIGTERM came; work that was begun is finished, no other is begun.
        Exception: what `work` or `done` raised first; no other work is begun.

    Example:
        >>> found = {}
        >>> run_parallel(abs, [-2, 3], workers=1, done=found.__setitem__)
        >>> found
        {-2: 2, 3: 3}
    """
    count = _cores() if workers is None else natural("workers", workers, 1)
    waiting = iter(items)
    with Interruption() as interruption:
        if count == 1:
            for item in waiting:
                result = work(item)
                if done is not None:
                    done(item, result)
                if interruption.signal is not None:
                    raise Interrupted(interruption.signal)
            return
        with ProcessPoolExecutor(count, initializer=_prepare_worker, initargs=(os.getpid(), work)) as pool:
            running: dict[Future[Result], Any] = {}
            try:
                while True:
                    # Few at a time, so that an interruption has little to wait for.
                    while len(running) < 2 * count and interruption.signal is None:
                        try:
                            item = next(waiting)
                        except StopIteration:
                            break
                        running[pool.submit(_call, item)] = item
                    if not running:
                        break
                    finished, _ = concurrent.futures.wait(running, timeout=0.2, return_when="FIRST_COMPLETED")
                    for future in finished:
                        item = running.pop(future)
                        result = future.result()
                        if done is not None:
                            done(item, result)
                    if interruption.signal is not None:
                        running = {future: item for future, item in running.items() if not future.cancel()}
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if interruption.signal is not None:
            raise Interrupted(interruption.signal)


def finished_job(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` holds the finished tokens of this job.

    Raises:
        FileExistsError: it holds other tokens, or the beginnings of another job.
    """
    meta, begun = out / META, out / WORK / "job.json"
    if meta.exists():
        if _read_json(meta).get("job") == job:
            return True
        raise FileExistsError(f"{out} holds other tokens, or those of other settings: choose another folder")
    if any((out / f"{split}.bin").exists() for split in SPLITS) and not begun.exists():
        raise FileExistsError(f"{out} holds token files without {META}: choose another folder")
    if begun.exists() and _read_json(begun) != job:
        raise FileExistsError(
            f"another preparation was begun in {out}, of other data or with other settings: finish it, remove "
            f"{out / WORK}, or choose another folder"
        )
    return False


def write_token_shards(
    out: Path,
    job: dict[str, Any],
    count: int,
    make: Callable[[int], dict[str, np.ndarray]],
    meta: dict[str, Any],
    *,
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Make the shards of a corpus that are missing, and put all of them together.

    Args:
        out: the folder; gets ``train.bin``, ``val.bin`` and, last, ``meta.json``.
        job: plain values that decide every token; it is written down, and only the same job is taken up again.
        count: number of shards.
        make: shard number -> its tokens for each split, uint16; a function that other processes can be given.
        meta: what ``meta.json`` says besides the splits.
        workers: as in `run_parallel`.
        advance: called with the number of shards done and of tokens made, each time that one is done.

    Returns:
        Number of tokens of each split.

    Raises:
        FileExistsError: as `finished_job`.
        ValueError: a split is empty.
        Interrupted: as `run_parallel`.
        OSError: the disk is full, or the folder cannot be written; shards that are done stay.
    """
    if finished_job(out, job):
        stated = _read_json(out / META)
        return {split: stated[split]["tokens"] for split in SPLITS}
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "job.json").exists():
        with atomic_write(work / "job.json") as file:
            file.write(json.dumps(job, sort_keys=True).encode())
    shards = [_shard(work, number) for number in range(count)]
    made = {number: sum(_counts(shards[number]).values()) for number in range(count) if shards[number].exists()}

    def note(number: int, size: int) -> None:
        made[number] = size
        if advance is not None:
            advance(len(made), sum(made.values()))

    if advance is not None:
        advance(len(made), sum(made.values()))
    missing = [number for number in range(count) if number not in made]
    run_parallel(_Maker(make, work), missing, workers=workers, done=note)
    counts = [_counts(shard) for shard in shards]
    for split in SPLITS:
        if not sum(count[split] for count in counts):
            shutil.rmtree(work)
            raise ValueError(f"the {split} split would be empty: too little text for this val_fraction")
    stated = {split: _concatenate(out / f"{split}.bin", shards, split) for split in SPLITS}
    with atomic_write(out / META) as file:
        file.write(json.dumps({"version": META_VERSION, **meta, **stated, "job": job}, indent=2).encode())
    shutil.rmtree(work)
    return {split: stated[split]["tokens"] for split in SPLITS}


class _Maker:
    """Makes one shard and writes it: the tokens of all splits, after a line that says how many each has."""

    def __init__(self, make: Callable[[int], dict[str, np.ndarray]], work: Path) -> None:
        self.make, self.work = make, work

    def __call__(self, number: int) -> int:
        tokens = {split: np.asarray(part, dtype=DTYPE) for split, part in self.make(number).items()}
        with atomic_write(_shard(self.work, number)) as file:
            file.write(json.dumps({split: len(tokens[split]) for split in SPLITS}).encode() + b"\n")
            for split in SPLITS:
                file.write(tokens[split].tobytes())
        return sum(len(part) for part in tokens.values())


def _shard(work: Path, number: int) -> Path:
    return work / f"{number:06d}.tokens"


def _counts(shard: Path) -> dict[str, int]:
    with shard.open("rb") as file:
        return json.loads(file.readline())


def _concatenate(path: Path, shards: list[Path], split: str) -> dict[str, Any]:
    digest, total = hashlib.sha256(), 0
    with atomic_write(path) as out:
        for shard in shards:
            with shard.open("rb") as file:
                counts = json.loads(file.readline())
                before = sum(counts[name] for name in SPLITS[: SPLITS.index(split)])
                file.seek(before * DTYPE.itemsize, os.SEEK_CUR)
                raw = file.read(counts[split] * DTYPE.itemsize)
            out.write(raw)
            digest.update(raw)
            total += counts[split]
    return {"tokens": total, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: Callable[[Any], Any] | None = None


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def _prepare_worker(parent: int, work: Callable[[Any], Any]) -> None:
    """Take the function over, once; Ctrl-C is for the parent to answer, and no worker outlives it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
