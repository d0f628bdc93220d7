"""Recipes: each trains one kind of model, in one flat file from data to optimiser in the manner of nanoGPT.

`cifar`, `imagenet` and `gpt2` are in torch, `flax_cifar` and `flax_gpt2` in flax. Each has a dataclass `Config`, which
determines the result, `Options` for files and output, and `train`. Modules with an underscore hold the shared parts.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from structlin_nn._text import unknown

__all__ = ["MODELS", "recipe", "recipe_module"]

_VIT = {"model": "cifar-vit", "epochs": 200, "batch_size": 256, "lr": 1e-3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar-mlp": ("cifar", {"model": "cifar-mlp"}), "cifar-vit": ("cifar", _VIT), "imagenet-vit": ("imagenet", {}),
    "gpt2": ("gpt2", {}),
}  # fmt: skip
"""The recipe of each model, and the fields in which the paper's configuration differs from the recipe's defaults."""
_RECIPES = ("cifar", "imagenet", "gpt2", "flax_cifar", "flax_gpt2")


def recipe_module(name: str) -> ModuleType:
    """Return the module of a recipe; ValueError for an unknown name, with the nearest."""
    if name not in _RECIPES:
        raise ValueError(unknown("recipe", name, _RECIPES))
    return importlib.import_module(f"structlin_nn.recipes.{name}")


def recipe(model: str = "cifar-mlp", **changes: Any) -> Any:
    """Return the paper's configuration of a model, the ``Config`` of a recipe, with changes of its fields.

    Options of the structure that are not given are the paper's for that model; all are in the result. So is `rms_cap`:
    on for Block Tensor-Trains in the recipes of ImageNet and GPT-2, which diverge without it. The model is
    ``cifar-mlp``, ``cifar-vit``, ``imagenet-vit`` or ``gpt2``; or ``timm:NAME`` for a model of timm by the recipe of
    ``imagenet-vit``.

    Examples
    --------
    >>> recipe("cifar-vit", structure="low_rank", width=128).options
    {'rank_fraction': 0.1}
    >>> recipe("cifar-vit", structure="low_rank", options={"rank": 8}).options
    {'rank': 8}
    >>> recipe("gpt2", width=1024, structure="block_tensor_train").rms_cap
    True
    """
    named = "imagenet-vit" if model.startswith("timm:") else model
    if named not in MODELS:
        raise ValueError(unknown("model", model, MODELS))
    name, own = MODELS[named]
    return recipe_module(name).Config.from_dict({**own, **changes, "model": model})
