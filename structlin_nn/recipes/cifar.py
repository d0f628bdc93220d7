"""MLPs and vision transformers on images of 32 x 32 that are in memory, augmented on the device in whole batches.

    structlin train cifar-mlp --data path/to/cifar-10-batches-bin --structure block_tensor_train --width 256

The recipes are those of *Compute Better Spent* (Qiu et al., ICML 2024), section 4. To change the loss, the data or the
model, copy this file; `train` also takes images and a model of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data import ImageDataset, batch_rows, load_images
from structlin_nn.data.augment import Augmentation, normalize
from structlin_nn.models import StructureConfig, build_model
from structlin_nn.models.named import build_named
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._processes import ALONE, processes
from structlin_nn.recipes._run import Options as RunOptions
from structlin_nn.recipes._run import Result
from structlin_nn.recipes._torch import TorchRun, count_run, on_device

__all__ = ["Config", "Options", "build", "plan", "train"]

EVALUATED_TRAINING_IMAGES = 10_000
"""Number of training images that are evaluated, the first ones."""
PROBED_IMAGES = 1024
"""Number of training images on which features and gains are measured, the first ones."""
INPUT_LAYERS = {"cifar-mlp": "input", "cifar-vit": "patch_embedding"}
"""The first linear layer of each model, for `Config.input_lr_mult`."""
SIZES = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "fashion": (10, 10_000)}
"""Classes and training images."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The configuration of a run on images of 32 x 32, which with the images determines its result.

    The defaults are the paper's recipe for ``cifar-mlp``; `structlin_nn.recipes.recipe` has that for ``cifar-vit``.

    Examples
    --------
    >>> Config(width=128, structure="low_rank", options={"rank": 8}).replace(width=256).width
    256
    """

    task: ClassVar[str] = "cifar"
    named: ClassVar[tuple[str, ...]] = ("cifar-mlp", "cifar-vit")
    sizes: ClassVar[tuple[str, ...]] = ("depth", "bias")
    paper_options: ClassVar[Mapping[str, Any]] = {
        model: {
            "low_rank": low_rank,
            "kronecker": {"factorization": "greedy"},
            "tensor_train": {"rank": rank, "factorization": "greedy"},
            "block_tensor_train": {"rank": 1, "factorization": "greedy"},
            "monarch": {"blocks": 4},
        }
        # No option of low rank: rank ceil(sqrt(min(d_in, d_out))), the default.
        for model, low_rank, rank in (("cifar-mlp", {}, 16), ("cifar-vit", {"rank_fraction": 0.1}, 8))
    }

    model: str = "cifar-mlp"  # cifar-mlp, cifar-vit, timm:NAME, hf:CONFIG, or package.module:function of a width
    data_set: Literal["cifar10", "cifar100", "fashion"] = "fashion"  # fashion: the embedded subset of Fashion-MNIST
    depth: int = 3  # number of blocks
    bias: bool = True  # biases in the layers and norms of cifar-mlp
    batch_size: int = 1024  # images of a step; an epoch leaves out an incomplete batch
    epochs: int = 500  # passes over the training images
    steps: int = 0  # steps of the run, which end within its last epoch; 0: at its end
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    augment: bool = True  # random resized crops and horizontal flips
    mixup: float = 0.8  # alpha of mixup, 0 for none
    label_smoothing: float = 0.3  # label smoothing, 0 for none
    input_lr_mult: float | None = None  # extra learning-rate multiplier of the first linear layer; None: the paper's
    eval_every: int = 5  # epochs from one evaluation to the next
    measure_every: int = 0  # steps between measurements of the change of features; 0: before evaluations

    def __post_init__(self) -> None:
        if self.input_lr_mult is None:
            object.__setattr__(self, "input_lr_mult", 0.1 if self.model == "cifar-mlp" else 1.0)
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "epochs", "eval_every", "depth")
        self._at_least(0, "warmup_epochs", "mixup", "measure_every", "steps", "input_lr_mult")
        require(0 <= self.label_smoothing <= 1, f"label_smoothing must be from 0 to 1, got {self.label_smoothing}")
        require(self.warmup_epochs < self.epochs, f"warmup_epochs must be less than epochs, got {self.warmup_epochs}")
        require(self.bias or self.model == "cifar-mlp", f"bias=False is for cifar-mlp; {self.model} has its biases")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Files and output of a run, which do not change its result."""

    unverified: bool = False  # do not verify the checksums of CIFAR


def build(config: Config, classes: int) -> nn.Module:
    """Return the model of a configuration: images (batch, 3, 32, 32) to logits (batch, classes)."""
    structure = StructureConfig(config.structure, config.options, config.layers, bool(config.rms_cap), config.rule)
    if not config.is_named:
        return build_named(config.model, classes, structure, width=config.width, image_size=32, **config.model_options)
    sizes: dict[str, Any] = {"bias": config.bias} if config.model == "cifar-mlp" else {}
    return build_model(
        config.model, width=config.width, structure=structure, depth=config.depth, num_classes=classes, **sizes
    )


def plan(config: Config, options: Options) -> tuple[int, int, dict[str, int]]:
    """Return (classes, steps, counts) of a run before it starts."""
    classes, images = SIZES[config.data_set]
    if options.data is not None and options.unverified:
        data = load_images(config.data_set, options.data, verify=False)
        classes, images = data.num_classes, len(data.train_labels)
    steps = steps_of(config, images)
    return classes, steps, count_run(build, config, classes, steps, torch.zeros(1, 3, 32, 32))


def steps_of(config: Config, images: int) -> int:
    per_epoch = images // config.batch_size
    require(per_epoch > 0, f"{images} images are less than one batch of {config.batch_size}")
    needed = -(-config.steps // per_epoch)
    require(
        not config.steps or needed == config.epochs,
        f"{config.steps} steps of {per_epoch} an epoch end in epoch {needed}: epochs must be {needed}, got "
        f"{config.epochs}",
    )
    return config.steps or config.epochs * per_epoch


def train(
    config: Config, options: Options, *, build: Callable[[Config, int], nn.Module] = build,
    data: ImageDataset | None = None, watch: Any = None,
) -> Result:  # fmt: skip
    """Train a model, or resume a run from its last checkpoint.

    Parameters
    ----------
    config
        Configuration of the run.
    options
        Files and output; `options.data` is the folder of CIFAR (`load_images`), or None for the embedded images.
    build
        (configuration, classes) to a model of your own, in place of those of the paper; it is called for the model, and
        on the meta device for the dense model at base width.
    data
        Images of your own, in place of `options.data`.
    watch
        Function of the run and the loss, called after every step; the run ends if it returns True.

    Returns
    -------
    Result
        The end of the run. `structlin_nn.records` describes its record.

    Raises
    ------
    FileNotFoundError, FileExistsError, BlockingIOError, ValueError
        Data that are missing or damaged; as `structlin_nn.recipes._run.Run`.
    TrainingError, OSError
        A loss or a weight is not finite; a checkpoint could not be written. The last checkpoint is whole.
    """
    with processes(config.device, options.parallel) as group, TorchRun(config, options, group, watch) as run:
        size = group.part_size(config)

        # Images: all processes have all of them, and augment whole batches before they take their share.
        if data is None:
            data = load_images(config.data_set, options.data, verify=not options.unverified).as_32x32_rgb()
        steps, classes = steps_of(config, len(data.train_labels)), data.num_classes
        images, labels, test_images, test_labels = (
            torch.from_numpy(array).to(run.device)
            for array in (data.train_images, data.train_labels, data.test_images, data.test_labels)
        )
        per_epoch = len(labels) // config.batch_size
        augment = augmentation(config, data)
        generator = torch.Generator().manual_seed(config.seed)

        # Model and optimiser: learning rates relative to the dense model at base width.
        run.make_model(build, classes)
        optimizer = run.start(
            build, classes, steps=steps, warmup=round(config.warmup_epochs * per_epoch), sums=3,
            sample=torch.zeros(1, *data.image_shape), probe=normalize(images[:PROBED_IMAGES], data.mean, data.std),
            data=described(data), generators={"augmentation": generator}, extra_multipliers=extra_multipliers(config),
        )  # fmt: skip

        def evaluate() -> None:
            with run.evaluation():
                first = min(EVALUATED_TRAINING_IMAGES, len(labels))
                train_loss, train_error = loss_and_error(run.call, images[:first], labels[:first], data, group)
                test_loss, test_error = loss_and_error(run.call, test_images, test_labels, data, group)
                scores = (train_loss, train_error, test_loss, test_error)
                found, told = evaluation(config, run.step, per_epoch, scores, run.sums.tolist())
            run.evaluated(found, told, metric="test_error")

        # One step: the parts of this process's share of the batch, then the optimiser.
        for _ in run.training(evaluate, config.eval_every * per_epoch, config.measure_every):
            run.set_rates()
            optimizer.zero_grad(set_to_none=True)
            rows = on_device(batch_rows(len(labels), config.batch_size, config.seed, run.step), run.device)
            inputs, targets = augment(images[rows], labels[rows], generator)
            batch = (inputs, targets, labels[rows], labels[rows].flip(0))
            parts = zip(*(group.share(tensor).split(size) for tensor in batch), strict=True)
            losses, hits = list[Tensor](), list[Tensor]()
            for x, y, label, other in parts:
                with run.sync(last=len(losses) == config.accumulate - 1):
                    with run.autocast():
                        logits = run.forward(x)
                        loss = F.cross_entropy(logits, y)
                    run.scaler.scale(loss / config.accumulate).backward()
                predictions = logits.detach().argmax(1)
                losses.append(loss)
                hits.append(torch.stack([(predictions == label).sum(), (predictions == other).sum()]))
            norm = run.gradient_norm()
            run.update()
            loss, right = run.mean_and_sum(losses, hits)
            # A mixed batch counts by the labels that more predictions agree with.
            hit = right.max() if config.mixup else right[0]
            sums = torch.stack([loss * config.batch_size, hit, torch.full_like(loss, config.batch_size)])
            run.stepped(loss, norm, sums)
        return run.result()


def extra_multipliers(config: Config) -> dict[str, float]:
    """Return further learning-rate multipliers, by names of layers."""
    if config.input_lr_mult == 1:
        return {}
    require(config.is_named, f"input_lr_mult is for {' and '.join(config.named)}, got {config.model}")
    return {INPUT_LAYERS[config.model]: config.input_lr_mult}  # type: ignore[dict-item]  # None became the paper's


def augmentation(config: Config, data: ImageDataset) -> Augmentation:
    flip, soft = 0.5 if config.augment else 0.0, {"mixup_alpha": config.mixup, "smoothing": config.label_smoothing}
    return Augmentation(data.mean, data.std, data.num_classes, crop=config.augment, flip=flip, **soft)


@torch.no_grad()
def loss_and_error(
    call: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, data: ImageDataset, group: Any = ALONE
) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the share of wrong predictions of uint8 images (N, C, H, W)."""
    found = torch.zeros(2, dtype=torch.float64, device=images.device)
    for some, right in zip(images.split(1000), labels.split(1000), strict=True):
        some, right = group.share(some), group.share(right)
        logits = call(normalize(some, data.mean, data.std))
        found[0] += F.cross_entropy(logits, right, reduction="sum").double()
        found[1] += (logits.argmax(1) != right).sum()
    loss, wrong = group.sum(found).tolist()
    return loss / len(labels), wrong / len(labels)


def evaluation(
    config: Config, step: int, per_epoch: int, scores: Sequence[float], sums: Sequence[float]
) -> tuple[dict[str, Any], str]:
    """Return an evaluation as the record has it, and in a line."""
    train_loss, train_error, test_loss, test_error = scores
    loss, right, seen = sums
    epoch = step // per_epoch if step % per_epoch == 0 else step / per_epoch
    found = {
        "epoch": epoch, "train_loss": train_loss, "train_error": train_error, "test_loss": test_loss,
        "test_error": test_error, "batch_loss": loss / seen if seen else None,
        "batch_error": 1 - right / seen if seen else None,
    }  # fmt: skip
    told = (
        f"epoch {epoch:>3.4g} of {config.epochs}  loss: train {train_loss:.4f}, test {test_loss:.4f}  "
        f"error: train {100 * train_error:.2f} %, test {100 * test_error:.2f} %"
    )
    return found, told


def described(data: ImageDataset) -> dict[str, Any]:
    return {
        "name": data.name, "training_images": len(data.train_labels), "test_images": len(data.test_labels),
        "image_shape": list(data.image_shape), "classes": data.num_classes, "sha256": data.digest,
    }  # fmt: skip
