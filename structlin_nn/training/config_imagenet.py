"""The configuration of ViT/32 on ImageNet, or on any other image folders, and its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structlin_nn.training.base import RunConfig, check, option

__all__ = ["IMAGENET_RECIPE", "ImageNetTrainConfig"]


@dataclass(frozen=True, kw_only=True)
class ImageNetTrainConfig(RunConfig):
    """Everything that decides the result of a training run on images in folders or shards, apart from them.

    `ImageNetTrainConfig()` is no recipe; see `structlin_nn.training.config.recipe`.

    Raises:
        TypeError, ValueError: as `RunConfig`.

    Example:
        >>> ImageNetTrainConfig(width=128, depth=2, epochs=1, warmup_epochs=0).patch
        32
    """

    task = "imagenet"

    model: str = option("imagenet-vit", "imagenet-vit, or timm:NAME for a model of timm")
    width: int = option(384, "width of imagenet-vit; 0 for a model of timm, which has its own")
    base_width: int = option(256, "width at which the learning rate was tuned; 0 for a model of timm")
    depth: int = option(12, "number of blocks of imagenet-vit")
    heads: int = option(4, "heads of the attention of imagenet-vit")
    patch: int = option(32, "side of a patch of imagenet-vit")
    image_size: int = option(224, "side of the images")
    batch_size: int = option(1024, "images of a step, of all processes and parts together")
    epochs: int = option(10, "passes over the training images")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up")
    mixup: float = option(0.2, "alpha of mixup, 0 for none")
    label_smoothing: float = option(0.1, "label smoothing, 0 for none")
    augment: str = option("rand-m9-mstd0.5-inc1", "rand-augment as timm writes it; empty for none")
    erasing: float = option(0.25, "probability of random erasing")
    color_jitter: float = option(0.4, "strength of colour jitter, where rand-augment does not take its place")
    eval_every: int = option(1, "epochs from one evaluation to the next")
    workers: int = option(4, "processes that decode images, for each training process", execution=True)

    def __post_init__(self) -> None:
        if not self.model.startswith("timm:"):
            check("model", self.model, self.model == "imagenet-vit", "imagenet-vit or timm:NAME")
        super().__post_init__()
        self._at_least(1, "depth", "heads", "patch", "image_size", "epochs", "eval_every")
        self._at_least(0, "warmup_epochs", "mixup", "workers", "color_jitter")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "from 0 to below 1")
        check("erasing", self.erasing, 0 <= self.erasing <= 1, "from 0 to 1")
        check("warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, "less than epochs")

    def _check_width(self) -> None:
        if not self.model.startswith("timm:"):
            super()._check_width()
        elif self.width or self.base_width:
            raise ValueError(
                f"{self.model} has its own width: width and base_width must be 0, got {self.width} and "
                f"{self.base_width}"
            )


IMAGENET_RECIPE: dict[str, Any] = {
    "base_width": 256,
    "layers": "all_but_last",
    "batch_size": 3072,
    "epochs": 300,
    "warmup_epochs": 5.0,
    "lr": 2e-3,
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "clip": 1.0,
    "mixup": 0.2,
    "label_smoothing": 0.1,
    "augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.25,
    "color_jitter": 0.4,
    "eval_every": 5,
}
"""ViT/32 by the paper."""
