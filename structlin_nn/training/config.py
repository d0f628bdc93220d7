"""The configuration of a training run: typed, frozen, checked, and the paper's recipes as starting points.

A run is a function of its configuration and its data: where the data lie, and where results are written, is no
part of it. `TrainConfig` is that of CIFAR, `ImageNetTrainConfig` and `GPT2TrainConfig` are those of the other
pipelines. Importing this module imports neither torch nor jax.

The recipes are those of Qiu, Potapczynski, Finzi, Goldblum, Wilson, Compute Better Spent (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from structlin_nn.training.base import (
    LAYERS,
    OPTIMIZERS,
    RULES,
    RunConfig,
    check,
    check_choice,
    nearest,
    option,
    overrides,
)
from structlin_nn.training.config_gpt2 import GPT2_RECIPE, GPT2TrainConfig
from structlin_nn.training.config_imagenet import IMAGENET_RECIPE, ImageNetTrainConfig

__all__ = [
    "CONFIGS",
    "DATA_SETS",
    "FRAMEWORKS",
    "LAYERS",
    "MODELS",
    "OPTIMIZERS",
    "RECIPES",
    "RULES",
    "GPT2TrainConfig",
    "ImageNetTrainConfig",
    "RunConfig",
    "TrainConfig",
    "config_from_dict",
    "nearest",
    "overrides",
    "recipe",
]

MODELS = ("cifar-mlp", "cifar-vit")
DATA_SETS = ("cifar10", "cifar100", "fashion")
FRAMEWORKS = ("torch", "flax")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides the result of a training run on CIFAR, apart from the data.

    `TrainConfig()` is no recipe of the paper; see `recipe`.

    Raises:
        TypeError, ValueError: as `RunConfig`.

    Example:
        >>> config = TrainConfig(model="cifar-mlp", width=128, structure="low_rank", options={"rank": 8})
        >>> config.replace(width=256).width
        256
        >>> TrainConfig.from_dict({"widht": 128})
        Traceback (most recent call last):
            ...
        ValueError: unknown key 'widht' in the configuration, did you mean 'width'?
    """

    task = "cifar"

    model: str = option("cifar-mlp", "which model to train", MODELS)
    data_set: str = option("fashion", "data set; fashion is the embedded subset of Fashion-MNIST", DATA_SETS)
    depth: int = option(3, "number of blocks")
    bias: bool = option(True, "biases in the layers and norms of cifar-mlp")
    batch_size: int = option(256, "images in a batch; what is left at the end of an epoch is left out of it")
    epochs: int = option(10, "passes over the training images")
    steps: int = option(0, "steps after which the run ends, within the last of its epochs; 0: at its end")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up before the cosine to 0")
    augment: bool = option(True, "random resized crops and horizontal flips")
    mixup: float = option(0.8, "alpha of mixup, 0 for none")
    label_smoothing: float = option(0.3, "label smoothing, 0 for none")
    input_lr_mult: float = option(0.1, "extra learning-rate multiplier of the first linear layer")
    eval_every: int = option(1, "epochs from one evaluation to the next")
    measure_every: int = option(
        0, "steps from one whose change of the last hidden features is measured to the next; 0: before evaluations only"
    )

    framework: str = option(
        "torch", "what computes the steps and evaluations; either goes on from the other's", FRAMEWORKS, execution=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.framework == "flax":
            wanted = {"precision": "float32", "compile": False, "recompute": False}
            for name, value in wanted.items():
                check(name, getattr(self, name), getattr(self, name) == value, f"{value!r} with framework='flax'")
        self._at_least(1, "epochs", "eval_every", "depth")
        self._at_least(0, "warmup_epochs", "mixup", "measure_every", "steps")
        check("input_lr_mult", self.input_lr_mult, self.input_lr_mult > 0, "positive")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing <= 1, "from 0 to 1")
        check("warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, "less than epochs")
        if not self.bias and self.model != "cifar-mlp":
            raise ValueError(f"bias=False is for cifar-mlp; {self.model} has its biases")


_CIFAR: dict[str, Any] = {"base_width": 64, "optimizer": "adam", "augment": True, "mixup": 0.8, "label_smoothing": 0.3}

RECIPES: dict[str, dict[str, Any]] = {
    "cifar-mlp": {
        **_CIFAR,
        "epochs": 500,
        "batch_size": 1024,
        "lr": 3e-3,
        "input_lr_mult": 0.1,
        "layers": "all_but_last",
        "eval_every": 5,
    },
    "cifar-vit": {
        **_CIFAR,
        "epochs": 200,
        "batch_size": 256,
        "lr": 1e-3,
        "input_lr_mult": 1.0,
        "layers": "all_but_last",
        "eval_every": 5,
    },
    "imagenet-vit": IMAGENET_RECIPE,
    "gpt2": GPT2_RECIPE,
}
"""The recipe of the paper for each model; for CIFAR-10 and CIFAR-100, ImageNet and OpenWebText."""

CONFIGS: dict[str, type[RunConfig]] = {
    "cifar-mlp": TrainConfig,
    "cifar-vit": TrainConfig,
    "imagenet-vit": ImageNetTrainConfig,
    "gpt2": GPT2TrainConfig,
}
"""The configuration of each model."""

STRUCTURE_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar-mlp": {
        "low_rank": {},  # rank ceil(sqrt(min(d_in, d_out))), the default
        "kronecker": {"factorization": "greedy"},
        "tensor_train": {"rank": 16, "factorization": "greedy"},
        "block_tensor_train": {"rank": 1, "factorization": "greedy"},
        "monarch": {"blocks": 4},
    },
    "cifar-vit": {
        "low_rank": {"rank_fraction": 0.1},
        "kronecker": {"factorization": "greedy"},
        "tensor_train": {"rank": 8, "factorization": "greedy"},
        "block_tensor_train": {"rank": 1, "factorization": "greedy"},
        "monarch": {"blocks": 4},
    },
    "imagenet-vit": {
        "block_tensor_train": {"rank": 1, "factorization": "greedy"},
        "monarch": {"blocks": 4},
    },
    "gpt2": {
        "block_tensor_train": {"rank": 4, "factorization": "greedy"},
    },
}
"""The options that the paper uses for each structure."""

# Two ways to state one size: giving one of them takes the place of the other.
_EXCLUSIVE = {"rank": "rank_fraction", "rank_fraction": "rank"}


def recipe(model: str = "cifar-mlp", **changes: Any) -> Any:
    """The paper's recipe for a model, with changes.

    Options of the structure that are not given are the paper's for that model; all are in the result. So is
    `rms_cap`: on for Block Tensor-Trains in the recipes of ImageNet and GPT-2, which diverge without it.

    Args:
        model: ``cifar-mlp``, ``cifar-vit``, ``imagenet-vit`` or ``gpt2``; or ``timm:NAME`` for a model of timm by
            the recipe of ``imagenet-vit`` (and with width and base_width 0: it has its own).
        **changes: fields of the configuration.

    Returns:
        A `TrainConfig`, `ImageNetTrainConfig` or `GPT2TrainConfig`.

    Raises:
        TypeError, ValueError: as `RunConfig.from_dict`.

    Example:
        >>> recipe("cifar-vit", structure="low_rank", width=128).options
        {'rank_fraction': 0.1}
        >>> recipe("cifar-vit", structure="low_rank", options={"rank": 8}).options
        {'rank': 8}
        >>> recipe("gpt2", width=1024, structure="block_tensor_train").rms_cap
        True
    """
    timm = model.startswith("timm:")
    named = "imagenet-vit" if timm else model
    check_choice("model", named, CONFIGS)
    own = {"width": 0, "base_width": 0} if timm else {}
    values = {**RECIPES[named], **own, **changes, "model": model}
    structure, given = values.get("structure"), values.get("options", {})
    if isinstance(given, Mapping) and isinstance(structure, str):
        replaced = {_EXCLUSIVE.get(name) for name in given}
        usual = STRUCTURE_RECIPES[named].get(structure, {})
        values["options"] = {**{k: v for k, v in usual.items() if k not in replaced}, **given}
    if named in ("imagenet-vit", "gpt2") and structure == "block_tensor_train":
        values.setdefault("rms_cap", True)
    return CONFIGS[named].from_dict(values)


def config_from_dict(task: str, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a pipeline from plain values, as run records and checkpoints hold them.

    Raises:
        TypeError, ValueError: as `RunConfig.from_dict`; an unknown pipeline.

    >>> config_from_dict("cifar", {"width": 32}).width
    32
    """
    kinds = {kind.task: kind for kind in CONFIGS.values()}
    check_choice("task", task, kinds)
    return kinds[task].from_dict(values)
