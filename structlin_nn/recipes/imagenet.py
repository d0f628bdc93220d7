"""ViT/32, or a model of timm, on ImageNet or any other images in folders, shards or Hugging Face data.

    structlin train imagenet --data path/to/imagenet --structure block_tensor_train --options rank=2 --width 484

Images are decoded and augmented by worker processes as uint8, and normalised, erased and mixed on the device. The
recipe is that of *Compute Better Spent* (Qiu et al., ICML 2024), section 5. To change the loss, the data or the model,
copy this file; `train` also takes a model of your own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data.augment import normalize
from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageNetData, ImageRecipe, open_imagenet
from structlin_nn.data.tokens import IGNORE
from structlin_nn.models import StructureConfig, build_model
from structlin_nn.models.named import build_named
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._processes import ALONE, processes
from structlin_nn.recipes._run import Options as RunOptions
from structlin_nn.recipes._run import Result
from structlin_nn.recipes._torch import TorchRun, count_run
from structlin_nn.torch import ParameterRule

__all__ = ["Config", "Options", "build", "plan", "train"]

PROBED_IMAGES = 64
"""Validation images on which features and gains are measured, the first ones."""
ILSVRC_2012 = (1000, 1_281_167)
"""Classes and training images."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The configuration of a run on images in files, which with the images determines its result.

    The defaults are the paper's recipe for ViT/32.

    Examples
    --------
    >>> Config(width=128, depth=2, epochs=10).patch
    32
    """

    task: ClassVar[str] = "imagenet"
    named: ClassVar[tuple[str, ...]] = ("imagenet-vit",)
    sizes: ClassVar[tuple[str, ...]] = ("depth", "heads", "expansion", "patch", "base_expansion")
    execution: ClassVar[frozenset[str]] = RunConfig.execution | {"workers"}
    capped: ClassVar[bool] = True
    paper_options: ClassVar[Mapping[str, Any]] = {
        "imagenet-vit": {"block_tensor_train": {"rank": 1, "factorization": "greedy"}, "monarch": {"blocks": 4}}
    }

    model: str = "imagenet-vit"  # imagenet-vit, timm:NAME, hf:CONFIG, or package.module:function of a width
    width: int = 384  # width of imagenet-vit
    base_width: int = 256  # width at which the learning rate was tuned
    base_expansion: int = 0  # expansion of that model, 0: this one's; the paper's is 1 and quarters the rate of `down`
    depth: int = 12  # number of blocks of imagenet-vit
    heads: int = 4  # heads of the attention of imagenet-vit
    expansion: int = 4  # width of the feed-forward layers of imagenet-vit, as a multiple of the width
    patch: int = 32  # side of a patch of imagenet-vit
    image_size: int = 224  # side of the images
    batch_size: int = 3072  # images of a step, of all processes and parts together
    epochs: int = 300  # passes over the training images
    warmup_epochs: float = 5.0  # epochs of linear warm-up
    lr: float = 2e-3  # learning rate of the dense model at base width
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"  # muon: Muon for matrices, AdamW at adam_lr for the rest
    weight_decay: float = 0.05  # decoupled decay of factors and weights
    betas: tuple[float, float] = (0.9, 0.95)  # decay rates of Adam's two moments
    clip: float = 1.0  # largest norm of all gradients together, 0 for no clipping
    mixup: float = 0.2  # alpha of mixup, 0 for none
    label_smoothing: float = 0.1  # label smoothing, 0 for none
    augment: str = "rand-m9-mstd0.5-inc1"  # rand-augment as timm writes it; empty for none
    erasing: float = 0.25  # probability of random erasing
    color_jitter: float = 0.4  # strength of colour jitter, where rand-augment does not take its place
    eval_every: int = 5  # epochs from one evaluation to the next
    workers: int = 4  # processes that decode images, for each training process

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "depth", "heads", "patch", "expansion", "image_size", "epochs", "eval_every")
        self._at_least(0, "warmup_epochs", "mixup", "workers", "color_jitter", "base_expansion")
        require(0 <= self.label_smoothing < 1, f"label_smoothing must be from 0 to below 1, got {self.label_smoothing}")
        require(0 <= self.erasing <= 1, f"erasing must be from 0 to 1, got {self.erasing}")
        require(self.warmup_epochs < self.epochs, f"warmup_epochs must be less than epochs, got {self.warmup_epochs}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of the images."""
        return 3, self.image_size, self.image_size

    def images(self) -> ImageRecipe:
        """Return the augmentation of training images."""
        return ImageRecipe(
            size=self.image_size, rand_augment=self.augment or None, color_jitter=self.color_jitter,
            random_erasing=self.erasing, mixup=self.mixup, smoothing=self.label_smoothing,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Files and output of a run, which do not change its result."""

    num_classes: int | None = None  # number of classes, for numeric labels with missing classes


def build(config: Config, classes: int) -> nn.Module:
    """Return the model of a configuration: images (batch, 3, size, size) to logits (batch, classes)."""
    structure = StructureConfig(config.structure, config.options, config.layers, bool(config.rms_cap), config.rule)
    if not config.is_named:
        sides: dict[str, Any] = {"width": config.width, "image_size": config.image_size}
        return build_named(config.model, classes, structure, **sides, **config.model_options)
    sizes = {name: getattr(config, name) for name in ("depth", "heads", "patch", "expansion")}
    sizes |= {"num_classes": classes, "input_shape": config.image_shape}
    return build_model("imagenet-vit", width=config.width, structure=structure, **sizes)


def plan(config: Config, options: Options) -> tuple[int, int, dict[str, int]]:
    """Return (classes, steps, counts) of a run before it starts; without data those of ILSVRC 2012."""
    classes, images = ILSVRC_2012
    if options.data is not None:
        data = open_imagenet(options.data, num_classes=options.num_classes)
        classes, images = data.num_classes, data.train_size
    steps = _steps(config, images)
    return classes, steps, count_run(build, config, classes, steps, torch.zeros(1, *config.image_shape))


def _steps(config: Config, images: int) -> int:
    require(images >= config.batch_size, f"{images} images are less than one batch of {config.batch_size}")
    return config.epochs * (images // config.batch_size)


def train(
    config: Config, options: Options, *, build: Callable[[Config, int], nn.Module] = build, watch: Any = None
) -> Result:
    """Train a model, or resume a run from its last checkpoint.

    Parameters
    ----------
    config, watch
        As `structlin_nn.recipes.cifar.train`, whose results and errors are those of this function too.
    options
        Files and output; `options.data` is the folder or name of the images (`open_imagenet`).
    build
        (configuration, classes) to a model of your own, in place of ViT/32.
    """
    with processes(config.device, options.parallel) as group, TorchRun(config, options, group, watch) as run:
        size, recipe = group.part_size(config), config.images()
        even = not config.mixup or size % 2 == 0
        require(even, f"mixup pairs neighbours: a part of a step needs an even number of images, got {size}")

        # Images: each part of a step is a batch of the loader, as uint8, and a function of the step.
        folder = options.needs("a folder of images, of shards, or of Hugging Face data")
        data: ImageNetData = group.first(lambda: open_imagenet(folder, num_classes=options.num_classes))
        classes, steps = data.num_classes, _steps(config, data.train_size)
        per_epoch = data.train_steps(config.batch_size)
        where: dict[str, Any] = {"rank": group.rank, "world_size": group.size, "workers": config.workers}
        where |= {"pin_memory": run.device.type == "cuda"}
        batches = data.train_batches(
            batch_size=config.batch_size, seed=config.seed, recipe=recipe, start_step=run.step,
            accumulate=config.accumulate, **where,
        )  # fmt: skip
        validation = data.val_batches(size * group.size, size=config.image_size, **where)

        # Model and optimiser: learning rates relative to the dense model at base width (timm: this width).
        model = run.make_model(build, classes)
        first = next(iter(data.val_batches(PROBED_IMAGES, size=config.image_size)))[0]
        optimizer = run.start(
            build, classes, steps=steps, warmup=round(config.warmup_epochs * per_epoch), sums=2,
            sample=torch.zeros(1, *config.image_shape), probe=normalized(first, run.device),
            data=described(config, data), rules={} if config.width else _timm_rules(model),
        )  # fmt: skip

        def evaluate() -> None:
            with run.evaluation():
                scores = validated(run.call, validation, classes, run.device, group)
                total, done = run.sums.tolist()
                epoch = run.step // per_epoch
                found = {"epoch": epoch, **scores, "batch_loss": total / done if done else None}
                told = (
                    f"epoch {epoch:>3} of {config.epochs}  validation loss {scores['val_loss']:.4f}  "
                    f"error: top-1 {100 * scores['val_error']:.2f} %, top-5 {100 * scores['val_top5_error']:.2f} %"
                )
            run.evaluated(found, told, metric="val_error")

        # One step: the parts of this process's share of the batch, then the optimiser.
        for _ in run.training(evaluate, config.eval_every * per_epoch):
            run.set_rates()
            optimizer.zero_grad(set_to_none=True)
            losses = list[Tensor]()
            for _ in range(config.accumulate):
                *batch, keys = next(batches)  # keys are read on the CPU: the device is not waited for
                images, labels = (tensor.to(run.device, non_blocking=True) for tensor in batch)
                x, y = recipe.finish(images, labels, keys, classes, seed=(config.seed, run.step))
                with run.sync(last=len(losses) == config.accumulate - 1):
                    with run.autocast():
                        logits = run.forward(x)
                        loss = F.cross_entropy(logits, y)
                    run.scaler.scale(loss / config.accumulate).backward()
                losses.append(loss)
            norm = run.gradient_norm()
            run.update()
            loss, _ = run.mean_and_sum(losses)
            run.stepped(loss, norm, torch.stack([loss, torch.ones_like(loss)]))
        return run.result()


@torch.no_grad()
def validated(
    call: Callable[[Tensor], Tensor], batches: Any, classes: int, device: Any = "cpu", group: Any = ALONE
) -> dict[str, float]:
    """Return the mean cross-entropy in nats and the top-1 and top-5 errors over validation images."""
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        logits = call(normalized(images, device)).float()
        total[0] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE).double()
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        total[1] += hits[:, 0].sum()
        total[2] += hits.any(1).sum()
        total[3] += (labels != IGNORE).sum()
    loss, right, five, seen = group.sum(total).tolist()
    return {"val_loss": loss / seen, "val_error": 1 - right / seen, "val_top5_error": 1 - five / seen}


def normalized(images: Tensor, device: Any = "cpu") -> Tensor:
    """Return uint8 images as float32 with ImageNet's mean and deviation."""
    return normalize(images.to(device, non_blocking=True), IMAGENET_MEAN, IMAGENET_STD)


def _timm_rules(model: nn.Module) -> dict[Any, ParameterRule]:
    """Return rules for embeddings that timm holds as bare parameters, and for layer scales: multiplier 1, no decay."""
    named: Any = getattr(model, "no_weight_decay", set)()
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    chosen = [name for name, p in matrices.items() if name in named or "layer_scale" in name]
    return {re.compile(re.escape(name)): ParameterRule(1.0) for name in chosen}


def described(config: Config, data: ImageNetData) -> dict[str, Any]:
    return {
        "name": "imagenet" if data.num_classes == 1000 else f"{data.num_classes} classes", "format": data.format,
        "training_images": data.train_size, "val_images": data.val_size,
        "image_shape": list(config.image_shape), "classes": data.num_classes, "sha256": data.digest,
    }  # fmt: skip
