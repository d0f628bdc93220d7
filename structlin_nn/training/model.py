"""Model and optimiser of a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.models import StructureConfig, base_model, build_model
from structlin_nn.torch import ParameterRule, parameter_groups, replace_linear
from structlin_nn.torch._layout import changes
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, TrainConfig
from structlin_nn.training.distributed import local

__all__ = [
    "INPUT_LAYERS",
    "example_input",
    "make_model",
    "make_optimizer",
    "model_sizes",
    "structure_of",
    "timm_options",
]

INPUT_LAYERS = {"cifar-mlp": "input", "cifar-vit": "patch_embedding"}
"""Name of the first linear layer of each model, which `TrainConfig.input_lr_mult` is for."""


def structure_of(config: RunConfig) -> StructureConfig:
    """The structure of the model's layers."""
    return StructureConfig(config.structure, config.options, config.layers, config.rms_cap, config.rule)


def model_sizes(config: RunConfig, outputs: int) -> dict[str, Any]:
    """The sizes of a model, as `structlin_nn.models.build_model` takes them.

    `outputs`: the number of classes, or of the tokens that the model knows.

    >>> model_sizes(TrainConfig(depth=2), 10)
    {'depth': 2, 'num_classes': 10, 'bias': True}
    """
    if isinstance(config, TrainConfig):
        sizes: dict[str, Any] = {"depth": config.depth, "num_classes": outputs}
        return sizes | ({"bias": config.bias} if config.model == "cifar-mlp" else {})
    if isinstance(config, ImageNetTrainConfig):
        return {
            "depth": config.depth,
            "heads": config.heads,
            "patch": config.patch,
            "num_classes": outputs,
            "input_shape": (3, config.image_size, config.image_size),
        }
    assert isinstance(config, GPT2TrainConfig)
    return {
        "depth": config.depth,
        "heads": config.heads,
        "head_dim": config.head_dim or None,
        "vocabulary": outputs,
        "context": config.context,
        "expansion": config.expansion,
        "qk_norm": config.qk_norm,
        "attention_scale": config.attention_scale or None,
        "bias": config.bias,
        "tied": config.tied,
        "gelu": config.gelu,
    }


def make_model(
    config: RunConfig, outputs: int, device: torch.device | str, layout: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model of a configuration, drawn from torch's global generator on the CPU, whatever its device.

    Args:
        config: of any pipeline.
        outputs: number of classes, or of the tokens that the model knows.
        device: ``meta`` allocates nothing.
        layout: which layers are structured, and how (`structlin_nn.torch._layout`), in place of what the
            configuration says of them; layers that it replaces have no values yet.

    Raises:
        ValueError: sizes that the structure does not allow, an unknown model of timm, or a layout of another model.
        ModuleNotFoundError: a model of timm where timm is not installed.
    """
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    structure = structure_of(config) if layout is None else StructureConfig()
    if config.model.startswith("timm:"):
        assert isinstance(config, ImageNetTrainConfig)
        model = _timm_model(config, structure, outputs, place)
    else:
        sizes = model_sizes(config, outputs)
        model = build_model(config.model, width=config.width, structure=structure, device=place, **sizes)
    for change in () if layout is None else changes(model, layout):
        change.apply(model)
    if config.recompute:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model.to(device)


def _timm_model(config: ImageNetTrainConfig, structure: StructureConfig, classes: int, device: str) -> nn.Module:
    import timm

    name = config.model.removeprefix("timm:")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    try:
        with torch.device(device):
            model = timm.create_model(name, **timm_options(config, classes))
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take images of {config.image_size} pixels: {error}") from error
    if structure.name != "dense":
        replace_linear(
            model,
            structure.name,
            layers=structure.layers,
            rms_cap=structure.rms_cap,
            rule=structure.rule,
            **structure.options,
        )
    return model


def timm_options(config: ImageNetTrainConfig, classes: int) -> dict[str, int]:
    """What timm is told to build the model of a configuration.

    >>> timm_options(ImageNetTrainConfig(model="timm:resnet18", width=0, base_width=0), 7)
    {'num_classes': 7}
    """
    # Models without an argument img_size take images of any size.
    sized = "vit" in config.model or config.image_size != 224
    return {"num_classes": classes, **({"img_size": config.image_size} if sized else {})}


def example_input(config: RunConfig, model: nn.Module) -> Tensor:
    """A batch of one sample on the meta device, of the longest shape that a model of `make_model` takes."""
    if isinstance(config, ImageNetTrainConfig):
        return torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
    return model.example_input(device="meta")  # type: ignore[operator]


def make_optimizer(config: RunConfig, model: nn.Module, outputs: int) -> tuple[torch.optim.Optimizer, list[float]]:
    """The optimiser, and the learning rate of each of its groups before the schedule.

    Structure-aware or naive learning rates relative to the dense model at base width
    (`structlin_nn.torch.parameter_groups`); a model of timm, whose width is fixed, is its own base.
    """
    base = None
    if not config.model.startswith("timm:"):
        base = base_model(config.model, config.base_width, **model_sizes(config, outputs))
    extra: dict[str | re.Pattern[str], float] = {}
    if isinstance(config, TrainConfig) and config.input_lr_mult != 1:
        extra[INPUT_LAYERS[config.model]] = config.input_lr_mult
    groups = parameter_groups(
        model,
        base,
        lr=config.lr,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        structure_aware=config.structure_aware,
        extra_multipliers=extra,
        rules=_timm_rules(model) if base is None else {},
    )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(_by_sharding(groups), lr=config.lr, betas=config.betas, fused=True)
    return optimizer, [group["lr"] for group in optimizer.param_groups]


def _timm_rules(model: nn.Module) -> dict[str | re.Pattern[str], ParameterRule]:
    """Embeddings that modules of timm hold as bare parameters: multiplier 1, no decay, as timm itself says."""
    named = getattr(model, "no_weight_decay", set)()
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return {re.compile(re.escape(name)): ParameterRule(1.0) for name in matrices if name in named}


def _by_sharding(groups: Any) -> list[dict[str, Any]]:
    """The groups, those that hold sharded and whole parameters split: an optimiser takes one kind at a time."""
    split = []
    for group in groups:
        for sharded in (False, True):
            chosen = [
                (p, n) for p, n in zip(group["params"], group["names"], strict=True) if (local(p) is not p) == sharded
            ]
            if chosen:
                split.append({**group, "params": [p for p, _ in chosen], "names": [n for _, n in chosen]})
    return split
