"""The pipeline of ImageNet: images decoded and augmented by worker processes, mixed on the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data.augment import normalize
from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageRecipe, open_imagenet
from structlin_nn.data.tokens import IGNORE
from structlin_nn.training.config import ImageNetTrainConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.task import Task

__all__ = ["ImageNetTask", "image_recipe"]

PROBED_IMAGES = 64
"""Validation images on which features and gains are measured, the first ones."""


def image_recipe(config: ImageNetTrainConfig) -> ImageRecipe:
    """The augmentation that a configuration asks for.

    >>> image_recipe(ImageNetTrainConfig(augment="", erasing=0.0, color_jitter=0.0)).rand_augment is None
    True
    """
    return ImageRecipe(
        size=config.image_size,
        rand_augment=config.augment or None,
        color_jitter=config.color_jitter,
        random_erasing=config.erasing,
        mixup=config.mixup,
        smoothing=config.label_smoothing,
    )


class ImageNetTask(Task):
    """Classification of images in a tree, in shards, or in Hugging Face data.

    Args:
        config: of the run.
        processes: of the run.
        data_root: where the images are (`structlin_nn.data.imagenet.open_imagenet`).
        format: of the data, None for what is found.
        on_broken: ``error`` or ``skip``.
    """

    sums = 4

    def __init__(
        self,
        config: ImageNetTrainConfig,
        processes: Processes,
        data_root: str | os.PathLike[str] | None = None,
        format: str | None = None,
        on_broken: str = "error",
    ) -> None:
        self.config: ImageNetTrainConfig = config
        self.processes = processes
        # Each part of a step is a batch of the loader: what memory has to hold.
        self.loaded = self.part_size() * processes.size
        if data_root is None:
            raise ValueError("ImageNet is trained on a folder of images: none was given")
        self.recipe = image_recipe(config)
        self.data = processes.first(lambda: open_imagenet(data_root, format=format, on_broken=on_broken))
        self.digest = self.data.digest
        self.outputs = self.data.num_classes
        self.per_epoch = self.data.train_steps(config.batch_size)
        if not self.per_epoch:
            raise ValueError(f"{self.data.train_size} images are less than one batch of {config.batch_size}")
        self.steps = config.epochs * self.per_epoch
        self.warmup = round(config.warmup_epochs * self.per_epoch)
        self.taken = 0
        self._batches: Iterator[tuple[Tensor, Tensor, Tensor]] | None = None
        self._validation: Any = None

    def described(self) -> dict[str, Any]:
        return {
            "name": "imagenet" if self.data.num_classes == 1000 else f"{self.data.num_classes} classes",
            "format": self.data.format,
            "training_images": self.data.train_size,
            "val_images": self.data.val_size,
            "image_shape": [3, self.config.image_size, self.config.image_size],
            "classes": self.data.num_classes,
            "sha256": self.digest,
        }

    def introduction(self) -> str:
        return repr(self.data)

    def parts(self) -> list[Any]:
        if self._batches is None:
            self._batches = self.data.train_batches(
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                recipe=self.recipe,
                rank=self.processes.rank,
                world_size=self.processes.size,
                workers=self.config.workers,
                start_step=self.taken,
                accumulate=self.config.accumulate,
                pin_memory=self.processes.device.type == "cuda",
            )
        seed = (self.config.seed, self.taken)
        self.taken += 1
        parts = []
        for _ in range(self.config.accumulate):
            images, labels, keys = next(self._batches)
            images, labels = (tensor.to(self.processes.device, non_blocking=True) for tensor in (images, labels))
            parts.append((*self.recipe.finish(images, labels, keys, self.outputs, seed), labels))
        return parts

    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
        inputs, targets, labels = part
        logits = model(inputs)
        right = (logits.detach().argmax(1) == labels).sum()
        return F.cross_entropy(logits, targets), torch.stack([right, torch.tensor(len(labels), device=right.device)])

    def add(self, sums: Tensor, loss: Tensor, statistics: Tensor) -> None:
        sums[0] += loss
        sums[1] += 1
        sums[2:] += statistics

    def evaluates(self, step: int) -> bool:
        epoch, within = divmod(step, self.per_epoch)
        return step == self.steps or (within == 0 and epoch % self.config.eval_every == 0)

    def evaluate(self, model: Callable[..., Any], step: int, sums: list[float]) -> dict[str, Any]:
        group = self.processes
        if self._validation is None:
            self._validation = self.data.val_batches(
                self.loaded,
                rank=group.rank,
                world_size=group.size,
                workers=self.config.workers,
                size=self.config.image_size,
            )
        # Loss, predictions among the first and the first five, images.
        total = torch.zeros(4, dtype=torch.float64, device=group.device)
        for images, labels in self._validation:
            images, labels = images.to(group.device), labels.to(group.device)
            images = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
            logits = model(images).float()
            total[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE).double()
            found = logits.topk(min(5, self.outputs), dim=1).indices == labels[:, None]
            total[1] += found[:, 0].sum()
            total[2] += found.any(1).sum()
            total[3] += (labels != IGNORE).sum()
        loss, first, five, images_seen = group.sum(total).tolist()
        batch_loss, steps, _, _ = sums
        return {
            "epoch": step // self.per_epoch,
            "val_loss": loss / images_seen,
            "val_error": 1 - first / images_seen,
            "val_top5_error": 1 - five / images_seen,
            "batch_loss": batch_loss / steps if steps else None,
        }

    def summary(self, evaluation: dict[str, Any]) -> str:
        return (
            f"epoch {evaluation['epoch']:>3} of {self.config.epochs}  validation loss {evaluation['val_loss']:.4f}  "
            f"error: top-1 {100 * evaluation['val_error']:.2f} %, top-5 {100 * evaluation['val_top5_error']:.2f} %"
        )

    def probe(self) -> Tensor:
        batches = self.data.val_batches(PROBED_IMAGES, size=self.config.image_size)
        images, _ = next(iter(batches))
        return normalize(images.to(self.processes.device), IMAGENET_MEAN, IMAGENET_STD)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self._batches = None
