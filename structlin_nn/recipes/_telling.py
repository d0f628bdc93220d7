"""Signals, trackers (TensorBoard, Weights & Biases), and the description of versions and hardware."""

from __future__ import annotations

import atexit
import hashlib
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import structlin
from structlin_nn._files import cores

SAME_SECONDS = 5.0
"""A signal sooner after the first is the same request: Ctrl-C reaches a process, and torchrun forwards it."""


class Interruption:
    """Keep the first SIGINT or SIGTERM within the block in `signal`; one after `SAME_SECONDS` acts as usual.

    A nested block is the outer one. After a signal the handler stays, and later signals are ignored while the process
    ends: Python restores their defaults then, and the exit code would be that of a killed process. Outside of the main
    thread, where Python cannot handle signals, the block changes nothing.
    """

    active: Interruption | None = None

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> Interruption:
        if Interruption.active is not None:
            return Interruption.active
        if threading.current_thread() is threading.main_thread():
            Interruption.active = self
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if Interruption.active is self:
            Interruption.active = None
            if self.signal is None:
                self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), time.monotonic()
            atexit.register(_ignore)
        elif time.monotonic() - self._first > SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def scalars(evaluation: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of an evaluation, nested ones by their path, without None.

    Examples
    --------
    >>> scalars({"test_loss": 0.5, "batch_loss": None, "statistics": {"gains": {"input": 1.0}}})
    {'test_loss': 0.5, 'statistics/gains/input': 1.0}
    """
    found: dict[str, float] = {}
    for key, value in evaluation.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[prefix + key] = float(value)
    return found


def _tensorboard(folder: Path, config: Mapping[str, Any], started: str, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Hide values that an interrupted run wrote after its last checkpoint.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, config: Mapping[str, Any], started: str, step: int) -> Tracker:
    import wandb

    name = folder.resolve().name
    number = hashlib.sha256(f"{name} {started}".encode()).hexdigest()[:16]  # the same for a run and its resumption
    run = wandb.init(project="structlin", name=name, id=number, resume="allow", dir=str(folder), config=dict(config))
    return lambda values, step: run.log(dict(values), step=step), run.finish


Tracker = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]
"""A function that logs values of a step, and one that ends."""
TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def versions(more: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "structlin": structlin.__version__}
    for name in ("numpy", "cola-ml", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def hardware(threads: int, device: str) -> dict[str, Any]:
    """Return a description of the processor, without the name of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.system(), "machine": platform.machine(),
        "cpu": names[0] if names else platform.processor() or "unknown",
        "cores": cores(), "threads": threads, "device": device,
    }  # fmt: skip
