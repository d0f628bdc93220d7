"""Model and optimiser of a configuration."""

from __future__ import annotations

import re

import torch
from torch import nn

from structlin_nn.models import StructureConfig, base_model, build_model
from structlin_nn.torch import parameter_groups
from structlin_nn.training.config import TrainConfig

__all__ = ["INPUT_LAYERS", "make_model", "make_optimizer", "structure_of"]

INPUT_LAYERS = {"cifar-mlp": "input", "cifar-vit": "patch_embedding"}
"""Name of the first linear layer of each model, which `TrainConfig.input_lr_mult` is for."""


def structure_of(config: TrainConfig) -> StructureConfig:
    """The structure of the model's layers."""
    return StructureConfig(config.structure, config.options, config.layers, config.rms_cap, config.rule)


def make_model(config: TrainConfig, num_classes: int, device: torch.device | str) -> nn.Module:
    """The model of a configuration, drawn from torch's global generator on the CPU, whatever its device.

    Raises:
        ValueError: sizes that the structure does not allow.
    """
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    structure = structure_of(config)
    model = build_model(config.model, width=config.width, structure=structure, num_classes=num_classes, device=place)
    return model.to(device)


def make_optimizer(
    config: TrainConfig, model: nn.Module, num_classes: int
) -> tuple[torch.optim.Optimizer, list[float]]:
    """The optimiser, and the learning rate of each of its groups before the schedule.

    Structure-aware or naive learning rates relative to the dense model at base width
    (`structlin_nn.torch.parameter_groups`).
    """
    base = base_model(config.model, config.base_width, num_classes=num_classes)
    extra: dict[str | re.Pattern[str], float] = {}
    if config.input_lr_mult != 1:
        extra[INPUT_LAYERS[config.model]] = config.input_lr_mult
    groups = parameter_groups(
        model,
        base,
        lr=config.lr,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        structure_aware=config.structure_aware,
        extra_multipliers=extra,
    )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(groups, lr=config.lr, betas=config.betas, fused=True)
    return optimizer, [group["lr"] for group in optimizer.param_groups]
