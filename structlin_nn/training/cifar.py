"""The pipeline of CIFAR: images in memory on the device, augmented there in whole batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data import ImageDataset, batch_rows, load_images
from structlin_nn.data.augment import Augmentation, normalize
from structlin_nn.training.config import TrainConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.task import Task, split

__all__ = ["EVALUATED_TRAINING_IMAGES", "CifarTask", "cifar_steps", "evaluate"]

EVALUATED_TRAINING_IMAGES = 10_000
"""At most so many, the first of the training images, are evaluated."""
PROBED_IMAGES = 1024
"""At most so many, the first of the training images, are those on which features and gains are measured."""
_EVALUATION_BATCH = 1000


class CifarTask(Task):
    """Classification of 32 x 32 images.

    Every process has all images, and augments whole batches before it takes its share, so that their number does
    not change the result.

    Args:
        config: of the run.
        processes: of the run.
        data_root: where the files of CIFAR are (`structlin_nn.data.load_images`).
        verify: compare these files with the official ones.
    """

    sums = 3

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        data_root: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> None:
        self.config: TrainConfig = config
        self.processes = processes
        self.part_size()
        device = processes.device
        self.data = load_images(config.data_set, data_root, verify=verify).as_32x32_rgb()
        self.digest = self.data.digest
        self.outputs = self.data.num_classes
        self.images = torch.from_numpy(self.data.train_images).to(device)
        self.labels = torch.from_numpy(self.data.train_labels).to(device)
        self.taken = 0
        batch_rows(len(self.labels), config.batch_size, config.seed, 0)
        self.test = (
            torch.from_numpy(self.data.test_images).to(device),
            torch.from_numpy(self.data.test_labels).to(device),
        )
        self.augment = _augmentation(config, self.data)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.per_epoch = len(self.labels) // config.batch_size
        self.steps = cifar_steps(config, len(self.data.train_labels))
        self.warmup = round(config.warmup_epochs * self.per_epoch)

    def described(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "training_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "image_shape": list(data.image_shape),
            "classes": data.num_classes,
            "sha256": self.digest,
        }

    def introduction(self) -> str:
        data = self.data
        images = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
        return f"{data.name}, {images}; {data.source}"

    def parts(self) -> list[Any]:
        rows = batch_rows(len(self.labels), self.config.batch_size, self.config.seed, self.taken)
        chosen = torch.from_numpy(rows).to(self.labels.device)
        images, labels = self.images.index_select(0, chosen), self.labels.index_select(0, chosen)
        self.taken += 1
        inputs, targets = self.augment(images, labels, self.generator)
        together = (inputs, targets, labels, labels.flip(0))
        shares = [split(tensor, self.processes, self.config.accumulate) for tensor in together]
        return list(zip(*shares, strict=True))

    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
        inputs, targets, labels, others = part
        logits = model(inputs)
        predictions = logits.detach().argmax(1)
        right = torch.stack([(predictions == labels).sum(), (predictions == others).sum()])
        return F.cross_entropy(logits, targets), right

    def add(self, sums: Tensor, loss: Tensor, statistics: Tensor) -> None:
        # Of a mixed batch, those labels count that more predictions agree with.
        sums[0] += loss * self.config.batch_size
        sums[1] += statistics.max() if self.config.mixup else statistics[0]
        sums[2] += self.config.batch_size

    def evaluates(self, step: int) -> bool:
        epoch, within = divmod(step, self.per_epoch)
        return step == self.steps or (within == 0 and epoch % self.config.eval_every == 0)

    def evaluate(self, model: Callable[..., Any], step: int, sums: list[float]) -> dict[str, Any]:
        number = min(EVALUATED_TRAINING_IMAGES, len(self.data.train_labels))
        images, labels = self.images[:number], self.labels[:number]
        train_loss, train_error = evaluate(model, images, labels, self.data, self.processes)
        test_loss, test_error = evaluate(model, *self.test, self.data, self.processes)
        loss_sum, right, seen = sums
        return {
            "epoch": step // self.per_epoch if step % self.per_epoch == 0 else step / self.per_epoch,
            "train_loss": train_loss,
            "train_error": train_error,
            "test_loss": test_loss,
            "test_error": test_error,
            "batch_loss": loss_sum / seen if seen else None,
            "batch_error": 1 - right / seen if seen else None,
        }

    def summary(self, evaluation: dict[str, Any]) -> str:
        return (
            f"epoch {evaluation['epoch']:>3.4g} of {self.config.epochs}  loss: train {evaluation['train_loss']:.4f}, "
            f"test {evaluation['test_loss']:.4f}  error: train {100 * evaluation['train_error']:.2f} %, "
            f"test {100 * evaluation['test_error']:.2f} %"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "augmentation": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.generator.set_state(state["augmentation"])

    def probe(self) -> Tensor:
        return normalize(self.images[:PROBED_IMAGES], self.data.mean, self.data.std)

    def measures(self, step: int) -> bool:
        every = self.config.measure_every
        return step % every == 0 if every else self.evaluates(step)


def cifar_steps(config: TrainConfig, images: int) -> int:
    """Steps of a run on so many training images.

    Raises:
        ValueError: `config.steps` that do not end within the last epoch.

    >>> cifar_steps(TrainConfig(batch_size=1024, epochs=11, steps=500), 50_000)
    500
    """
    per_epoch = images // config.batch_size
    if config.steps and per_epoch and (needed := -(-config.steps // per_epoch)) != config.epochs:
        raise ValueError(
            f"{config.steps} steps of {per_epoch} an epoch end in epoch {needed}: epochs must be {needed}, got "
            f"{config.epochs}"
        )
    return config.steps or config.epochs * per_epoch


@torch.no_grad()
def evaluate(
    model: Callable[..., Any], images: Tensor, labels: Tensor, data: ImageDataset, processes: Processes | None = None
) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of wrong predictions, without augmentation.

    Args:
        model: images to logits; a module is put into evaluation mode for the time.
        images: uint8 (N, C, H, W) on the model's device.
        labels: (N,) there.
        data: whose mean and standard deviation normalise the images.
        processes: that share the images, None for one.
    """
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for some, right in zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True):
        if processes is not None:
            some, right = processes.share(some), processes.share(right)
        logits = model(normalize(some, data.mean, data.std))
        loss += F.cross_entropy(logits, right, reduction="sum").double()
        wrong += (logits.argmax(1) != right).sum()
    if isinstance(model, nn.Module):
        model.train(was_training)
    if processes is not None:
        processes.sum(loss)
        processes.sum(wrong)
    return loss.item() / len(labels), wrong.item() / len(labels)


def _augmentation(config: TrainConfig, data: ImageDataset) -> Augmentation:
    made = Augmentation(
        data.mean, data.std, data.num_classes, mixup_alpha=config.mixup, smoothing=config.label_smoothing
    )
    return made if config.augment else replace(made, crop_scale=None, flip=0.0)
