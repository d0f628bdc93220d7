"""Training an image classifier: `setup` makes a run or takes one up again, `fit` trains it to its end.

>>> from structlin_nn.training.config import TrainConfig
>>> from structlin_nn.training.loop import train
>>> config = TrainConfig(width=16, structure="low_rank", epochs=1, eval_every=1)
>>> result = train(config, "runs/example")  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data import Batches, ImageDataset, load_images
from structlin_nn.data.augment import Augmentation, normalize
from structlin_nn.training.checkpoint import load_checkpoint, save_checkpoint
from structlin_nn.training.config import TrainConfig
from structlin_nn.training.header import count_run, make_header
from structlin_nn.training.interrupt import Interruption
from structlin_nn.training.model import make_model, make_optimizer
from structlin_nn.training.progress import Progress, Silent
from structlin_nn.training.records import RecordWriter
from structlin_nn.training.schedule import cosine

__all__ = ["Run", "RunResult", "TrainingError", "evaluate", "fit", "setup", "train"]

RECORD, CHECKPOINT = "record.jsonl", "checkpoint.pt"
EVALUATED_TRAINING_IMAGES = 10_000
"""At most so many, the first of the training images, are evaluated."""
_EVALUATION_BATCH = 1000
# On an accelerator, looking at a loss waits for the device.
_CHECK_EVERY = {"cpu": 1, "cuda": 50}


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the weights are no longer finite."""


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


@dataclass
class Run:
    """A run between two steps: everything that `fit` changes and a checkpoint holds."""

    config: TrainConfig
    folder: Path
    data: ImageDataset
    digest: str
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    rates: list[float]
    batches: Batches
    test: tuple[Tensor, Tensor]
    augment: Augmentation
    generator: torch.Generator
    counts: dict[str, int]
    record: RecordWriter
    step: int = 0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    last: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * len(self.batches)

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / CHECKPOINT

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "config": self.config.to_dict(),
            "data": self.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "augmentation": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "last": self.last,
            "record_size": self.record.size,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the step at which `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.generator.set_state(state["augmentation"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda"])
        self.step, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        self.sums = state["sums"].to(self.device)

    def save(self) -> None:
        """Write a checkpoint; TrainingError where a weight is not finite, so that the last one stays good."""
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise TrainingError(f"{name} is not finite after step {self.step}; {self.good()}")
        save_checkpoint(self.checkpoint, self.state())

    def good(self) -> str:
        """A phrase that names the last checkpoint."""
        return f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"


def setup(
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    verify: bool = True,
    resume: bool = False,
) -> Run:
    """Load the data, build the model, and start a record, or take a run up where its last checkpoint left it.

    Args:
        config: the configuration.
        folder: where record and checkpoint are or will be; it is made.
        data_root: where the files of CIFAR are (`structlin_nn.data.load_images`).
        verify: compare these files with the official ones.
        resume: go on with the run in `folder`. Where none was begun there, one is, and `Run.messages` says so.

    Raises:
        FileNotFoundError: data that are not there.
        FileExistsError: `folder` holds a run, and `resume` is False.
        ValueError: damaged data or checkpoint, a structure that the sizes do not allow, a device that is not
            there, or a run with another configuration or other data than the one to be resumed (the message names
            the differing keys).
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    record, checkpoint = folder / RECORD, folder / CHECKPOINT
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, a run needs a folder")
    if (record.exists() or checkpoint.exists()) and not resume:
        raise FileExistsError(f"{folder} holds a run already: resume it, or choose another folder")
    state = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if state is not None:
        config.check_continues(TrainConfig.from_dict(state["config"]), folder)
    device = _device(config.device)
    data = load_images(config.data_set, data_root, verify=verify).as_32x32_rgb()
    digest = _digest(data)
    if state is not None and state["data"] != digest:
        raise ValueError(f"the run in {folder} was trained on other {config.data_set} data than these")

    torch.manual_seed(config.seed)
    model = make_model(config, data.num_classes, device)
    optimizer, rates = make_optimizer(config, model, data.num_classes)
    images = torch.from_numpy(data.train_images).to(device)
    labels = torch.from_numpy(data.train_labels).to(device)
    batches = Batches(images, labels, config.batch_size, seed=config.seed, drop_last=True)
    counts = count_run(config, batches, data.num_classes)
    messages: list[str] = []
    if state is not None:
        if not record.exists():
            raise FileNotFoundError(f"{record} is missing, it belongs to {checkpoint}")
        writer, messages = RecordWriter.reopen(record, state["record_size"])
        messages.insert(0, f"resuming {folder} after step {state['step']} of {config.epochs * len(batches)}")
    else:
        if resume:
            messages.append(f"{folder} holds no checkpoint: starting from the beginning")
        folder.mkdir(parents=True, exist_ok=True)
        writer = RecordWriter.create(record, make_header(config, data, digest, counts, model, optimizer, device))
    made = Run(
        config=config,
        folder=folder,
        data=data,
        digest=digest,
        device=device,
        model=model,
        optimizer=optimizer,
        rates=rates,
        batches=batches,
        test=(torch.from_numpy(data.test_images).to(device), torch.from_numpy(data.test_labels).to(device)),
        augment=_augmentation(config, data),
        generator=torch.Generator().manual_seed(config.seed),
        counts=counts,
        record=writer,
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        messages=messages,
    )
    if state is not None:
        made.restore(state)
    return made


def fit(
    run: Run,
    progress: Progress | None = None,
    *,
    checkpoint_minutes: float = 5.0,
    stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Train a run to its end, or to the first SIGINT or SIGTERM.

    Checkpoints are written at every evaluation, after every `checkpoint_minutes`, and when interrupted.

    Args:
        run: from `setup`.
        progress: where to report to, by default nowhere.
        checkpoint_minutes: minutes between checkpoints.
        stop: asked after every step; where it says True, the run ends there as with a signal.

    Raises:
        TrainingError: a loss or weight is not finite; the message names the step and the last good checkpoint.
        OSError: the disk is full or the folder is gone; the last checkpoint is whole.
    """
    config, model, batches, optimizer = run.config, run.model, run.batches, run.optimizer
    progress = progress or Silent()
    per_epoch = len(batches)
    warmup = round(config.warmup_epochs * per_epoch)
    check_every = _CHECK_EVERY[run.device.type]
    losses: list[Tensor] = []
    stopping = False
    with _threads(config.threads), Interruption() as interruption:
        clock = time.monotonic() - run.seconds
        progress.start(
            run.steps * config.batch_size, run.step * config.batch_size, f"{config.structure} {config.width}"
        )
        try:
            if not run.last:
                _record_evaluation(run, progress, clock)
            saved = time.monotonic()
            while run.step < run.steps and not stopping:
                model.train()
                for images, labels in batches:
                    share = cosine(run.step, run.steps, warmup)
                    for group, rate in zip(optimizer.param_groups, run.rates, strict=True):
                        group["lr"] = rate * share
                    inputs, targets = run.augment(images, labels, run.generator)
                    logits = model(inputs)
                    loss = F.cross_entropy(logits, targets)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    run.step += 1

                    losses.append(loss.detach())
                    run.sums[0] += losses[-1].double() * len(labels)
                    run.sums[1] += _agreements(logits, labels, mixed=config.mixup > 0)
                    run.sums[2] += len(labels)
                    end_of_epoch = run.step % per_epoch == 0
                    value = None
                    if run.step % check_every == 0 or end_of_epoch:
                        value = _last_loss(run, losses)
                    progress.update(len(labels), value)

                    stopping = interruption.signal is not None or (stop is not None and stop())
                    epoch = run.step // per_epoch
                    if end_of_epoch and (epoch % config.eval_every == 0 or run.step == run.steps):
                        _record_evaluation(run, progress, clock)
                        saved = time.monotonic()
                    elif stopping or time.monotonic() - saved > 60 * checkpoint_minutes:
                        _last_loss(run, losses)
                        run.seconds = time.monotonic() - clock
                        run.save()
                        saved = time.monotonic()
                    if stopping:
                        break
        finally:
            progress.close()
    return RunResult(run.record.path, run.checkpoint, run.step, run.steps, interruption.signal, run.last)


def train(
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    verify: bool = True,
    resume: bool = False,
    progress: Progress | None = None,
    checkpoint_minutes: float = 5.0,
) -> RunResult:
    """`setup`, then `fit`, with their arguments and errors.

    Example:
        >>> from structlin_nn.training.config import TrainConfig
        >>> config = TrainConfig(width=16, structure="monarch", epochs=1, batch_size=1000, augment=False)
        >>> result = train(config, "run")
        >>> result.finished, result.step
        (True, 10)
    """
    made = setup(config, folder, data_root=data_root, verify=verify, resume=resume)
    for message in made.messages:
        (progress or Silent()).say(message)
    return fit(made, progress, checkpoint_minutes=checkpoint_minutes)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, data: ImageDataset) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of wrong predictions, without augmentation, in evaluation mode.

    Args:
        model: images to logits.
        images: uint8 (N, C, H, W) on the model's device.
        labels: (N,) there.
        data: whose mean and standard deviation normalise the images.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for some, right in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
        logits = model(normalize(some, data.mean, data.std))
        loss += F.cross_entropy(logits, right, reduction="sum").double()
        wrong += (logits.argmax(1) != right).sum()
    model.train(was_training)
    return loss.item() / len(labels), wrong.item() / len(labels)


def _record_evaluation(run: Run, progress: Progress, clock: float) -> None:
    """Evaluate, add a line to the record, and write a checkpoint."""
    data, config = run.data, run.config
    number = min(EVALUATED_TRAINING_IMAGES, len(data.train_labels))
    train_loss, train_error = evaluate(run.model, run.batches.images[:number], run.batches.labels[:number], data)
    test_loss, test_error = evaluate(run.model, *run.test, data)
    if not all(map(_finite, (train_loss, test_loss))):
        raise TrainingError(f"the loss at the evaluation after step {run.step} is not finite; {run.good()}")
    loss_sum, right, seen = run.sums.tolist()
    samples = run.step * config.batch_size
    run.seconds = time.monotonic() - clock
    run.last = {
        "step": run.step,
        "epoch": run.step // len(run.batches),
        "samples": samples,
        "training_macs": samples * run.counts["training_macs"],
        "lr": config.lr * cosine(max(run.step - 1, 0), run.steps, round(config.warmup_epochs * len(run.batches))),
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
        "batch_loss": loss_sum / seen if seen else None,
        "batch_error": 1 - right / seen if seen else None,
        "seconds": round(run.seconds, 3),
    }
    run.sums.zero_()
    run.record.append(run.last)
    run.save()
    progress.say(
        f"epoch {run.last['epoch']:>3} of {config.epochs}  loss: train {train_loss:.4f}, test {test_loss:.4f}  "
        f"error: train {100 * train_error:.2f} %, test {100 * test_error:.2f} %"
    )


def _agreements(logits: Tensor, labels: Tensor, mixed: bool) -> Tensor:
    """Predictions that agree with the labels, or, of a mixed batch, with those labels that more agree with."""
    predictions = logits.detach().argmax(1)
    right = (predictions == labels).sum()
    if mixed:
        right = torch.maximum(right, (predictions == labels.flip(0)).sum())
    return right


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


def _augmentation(config: TrainConfig, data: ImageDataset) -> Augmentation:
    made = Augmentation(
        data.mean, data.std, data.num_classes, mixup_alpha=config.mixup, smoothing=config.label_smoothing
    )
    return made if config.augment else replace(made, crop_scale=None, flip=0.0)


def _digest(data: ImageDataset) -> str:
    digest = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
