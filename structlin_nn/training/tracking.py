"""Evaluations shown elsewhere too: TensorBoard and Weights & Biases, both optional (the extra ``tracking``).

The run record stays the source: a tracker gets the numbers of each evaluation when the record has them, and those of
a resumed run once more from the step at which it goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TRACKERS", "Tracker", "check_tracker", "scalars", "tracker"]


class Tracker(Protocol):
    """What a run tells of its evaluations."""

    def log(self, evaluation: Mapping[str, Any]) -> None:
        """An evaluation, as the record has it."""

    def close(self) -> None:
        """The run is over, finished or not."""


def scalars(evaluation: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of an evaluation, nested ones by their path; what is None has none.

    >>> scalars({"step": 3, "test_loss": 0.5, "batch_loss": None, "statistics": {"gains": {"input": 1.0}}})
    {'step': 3.0, 'test_loss': 0.5, 'statistics/gains/input': 1.0}
    """
    found: dict[str, float] = {}
    for key, value in evaluation.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


class _TensorBoard:
    def __init__(self, folder: Path, header: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after its last checkpoint is hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, evaluation: Mapping[str, Any]) -> None:
        for name, value in scalars(evaluation).items():
            if name != "step":
                self._writer.add_scalar(name, value, evaluation["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, header: Mapping[str, Any], step: int) -> None:
        import wandb

        name = folder.resolve().name
        # The same for a run and its resumption, and no other's.
        identity = hashlib.sha256(f"{name} {header['started']}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project="structlin", name=name, id=identity, resume="allow", dir=str(folder), config=dict(header["config"])
        )

    def log(self, evaluation: Mapping[str, Any]) -> None:
        self._run.log(scalars(evaluation), step=int(evaluation["step"]))

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
"""What `structlin train --track` takes."""


def check_tracker(name: str) -> None:
    """Raise unless there is such a tracker and its package is installed: to be asked before a run begins.

    Raises:
        ImportError: the package is not installed.
        ValueError: an unknown name.

    >>> check_tracker("tensorbord")
    Traceback (most recent call last):
        ...
    ValueError: unknown tracker 'tensorbord' (one of tensorboard, wandb)
    """
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r} (one of {', '.join(TRACKERS)})")
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"tracking by {name} needs the package {name}: pip install 'structlin[tracking]'")


def tracker(name: str, folder: Path, header: Mapping[str, Any], step: int) -> Tracker:
    """A tracker for the run in `folder`.

    Args:
        name: one of `TRACKERS`.
        folder: of the run; TensorBoard's files go to its folder ``tensorboard``.
        header: of the run's record.
        step: at which the run begins or goes on.

    Raises:
        ImportError, ValueError: as `check_tracker`.
    """
    check_tracker(name)
    return TRACKERS[name](folder, header, step)
