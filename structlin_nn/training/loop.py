"""Training: `setup` makes a run or takes one up again, `fit` trains it to its end.

One loop for all pipelines; what a batch, a loss and an evaluation are is their `Task`'s.

>>> from structlin_nn.training.config import TrainConfig
>>> from structlin_nn.training.loop import train
>>> config = TrainConfig(width=16, structure="low_rank", epochs=1, eval_every=1)
>>> result = train(config, "runs/example")  # doctest: +SKIP
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structlin_nn.training.base import RunConfig
from structlin_nn.training.interrupt import Interruption
from structlin_nn.training.progress import Progress, Silent
from structlin_nn.training.run import CHECKPOINT, RECORD, Run, TrainingError, load_trained, setup
from structlin_nn.training.tracking import Tracker

__all__ = ["CHECKPOINT", "RECORD", "Run", "RunResult", "TrainingError", "fit", "load_trained", "setup", "train"]

# On an accelerator, looking at a loss waits for the device.
_CHECK_EVERY = {"cpu": 1, "cuda": 50}


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        record: the run record (`structlin_nn.training.records`).
        checkpoint: the last checkpoint.
        step: steps done; `steps` those of the whole run.
        signal: what interrupted it, None where it went to its end.
        evaluation: the last line of the record.
    """

    record: Path
    checkpoint: Path
    step: int
    steps: int
    signal: signal.Signals | None
    evaluation: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps


def fit(
    run: Run,
    progress: Progress | None = None,
    *,
    checkpoint_minutes: float = 5.0,
    stop: Callable[[], bool] | None = None,
    trackers: Sequence[Tracker] = (),
) -> RunResult:
    """Train a run to its end, or to the first SIGINT or SIGTERM.

    Checkpoints are written at every evaluation, after every `checkpoint_minutes`, and when interrupted. Where
    several processes train together, each calls it, and all stop at the same step.

    Args:
        run: from `setup`.
        progress: where to report to, by default nowhere.
        checkpoint_minutes: minutes between checkpoints.
        stop: asked after every step; where it says True, the run ends there as with a signal.
        trackers: told of every evaluation, in the main process (`structlin_nn.training.tracking`).

    Raises:
        TrainingError: a loss or weight is not finite; the message names the step and the last good checkpoint.
        OSError: the disk is full or the folder is gone; the last checkpoint is whole.
    """
    config, task, processes, stepper, probe = run.config, run.task, run.processes, run.stepper, run.probe
    progress = progress if progress is not None and processes.main else Silent()
    check_every = _CHECK_EVERY[run.device.type]
    losses: list[Tensor] = []
    stopping = False
    with _threads(config.threads), Interruption() as interruption:
        clock = time.monotonic() - run.seconds
        label = f"{config.structure} {config.width or config.model}"
        progress.start(run.steps * config.batch_size, run.step * config.batch_size, label)
        try:
            if not run.last:
                _record_evaluation(run, progress, clock, trackers)
            saved = time.monotonic()
            run.model.train()
            while run.step < run.steps and not stopping:
                evaluating = task.evaluates(run.step + 1)
                measuring = probe is not None and task.measures(run.step + 1)
                if measuring:
                    probe.before_step()
                loss, statistics = stepper.step(task.parts(), task.loss, task.share(run.step))
                run.step += 1
                if measuring:
                    probe.after_step(again=run.step < run.steps and task.measures(run.step + 1))

                if processes.size > 1:
                    together = processes.sum(torch.cat([loss[None] / processes.size, statistics.double()]))
                    loss, statistics = together[0], together[1:]
                task.add(run.sums, loss, statistics)
                losses.append(loss)
                checking = run.step % check_every == 0 or evaluating
                progress.update(config.batch_size, _last_loss(run, losses) if checking else None)

                stopping = interruption.signal is not None or (stop is not None and stop())
                due = time.monotonic() - saved > 60 * checkpoint_minutes
                if processes.size > 1:
                    # Asking each other waits for the device as well.
                    stopping = checking and processes.any(stopping)
                    due = checking and processes.any(due)
                if evaluating:
                    _record_evaluation(run, progress, clock, trackers)
                    saved = time.monotonic()
                elif stopping or due:
                    _last_loss(run, losses)
                    run.seconds = time.monotonic() - clock
                    run.save()
                    saved = time.monotonic()
        finally:
            progress.close()
    return RunResult(run.record.path, run.checkpoint, run.step, run.steps, interruption.signal, run.last)


def train(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    checkpoint_minutes: float = 5.0,
    **data: Any,
) -> RunResult:
    """`setup`, then `fit`, with their arguments and errors.

    Example:
        >>> from structlin_nn.training.config import TrainConfig
        >>> config = TrainConfig(width=16, structure="monarch", epochs=1, batch_size=1000, augment=False)
        >>> result = train(config, "run")
        >>> result.finished, result.step
        (True, 10)
    """
    made = setup(config, folder, data_root=data_root, resume=resume, **data)
    for message in made.messages:
        (progress or Silent()).say(message)
    return fit(made, progress, checkpoint_minutes=checkpoint_minutes)


def _record_evaluation(run: Run, progress: Progress, clock: float, trackers: Sequence[Tracker]) -> None:
    """Evaluate, add a line to the record, and write a checkpoint."""
    config, task = run.config, run.task
    found = run.evaluate()
    if not all(_finite(value) for value in found.values() if isinstance(value, float)):
        raise TrainingError(f"the loss at the evaluation after step {run.step} is not finite; {run.good()}")
    samples = run.step * config.batch_size
    run.seconds = time.monotonic() - clock
    run.last = {
        "step": run.step,
        "samples": samples,
        "training_macs": samples * run.counts["training_macs"],
        "lr": config.lr * task.share(max(run.step - 1, 0)),
        **found,
        "seconds": round(run.seconds, 3),
    }
    run.sums.zero_()
    run.processes.first(lambda: run.record.append(run.last))
    run.save()
    for tracker in trackers if run.processes.main else ():
        tracker.log(run.last)
    progress.say(task.summary(run.last))


def _last_loss(run: Run, losses: list[Tensor]) -> float:
    """The last of the losses since the previous call; TrainingError for the first that is not finite."""
    values = torch.stack(losses).tolist() if losses else [0.0]
    for number, value in enumerate(values):
        if not _finite(value):
            raise TrainingError(f"the loss is {value} at step {run.step - len(values) + number + 1}; {run.good()}")
    losses.clear()
    return values[-1]


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
