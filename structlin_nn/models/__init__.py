"""The models of *Compute Better Spent* (Qiu et al., ICML 2024), with every linear layer a StructuredLinear.

``cifar-mlp`` and ``cifar-vit`` for 32 x 32 images, ``imagenet-vit`` (ViT/32), and ``gpt2``. Build one with
:func:`build_model`; :func:`base_model` gives the dense model at the width at which the learning rate was tuned,
for :func:`structlin_nn.torch.parameter_groups`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from re import Pattern
from typing import Any

import torch

from structlin_nn._text import check_known
from structlin_nn.models.factory import LAYER_PRESETS, LinearFactory, StructureConfig
from structlin_nn.models.files import load_model, save_model
from structlin_nn.models.networks import GPT2, MLP, GPT2Config, MLPConfig, ViT, ViTConfig

__all__ = [
    "GPT2", "LAYER_PRESETS", "MLP", "MODELS", "GPT2Config", "LinearFactory", "MLPConfig", "ModelSpec",
    "StructureConfig", "ViT", "ViTConfig", "base_model", "build_model", "load_model", "save_model",
]  # fmt: skip

Model = MLP | ViT | GPT2


@dataclass(frozen=True)
class ModelSpec:
    """A named model: its class, and the sizes that differ from the defaults of ``model.config_class``.

    ``base_width`` is that at which the paper tuned the learning rate, and ``extra_multipliers`` are further factors on
    the learning rate of the factors of a layer, by the layer's name.
    """

    model: type[Model]
    base_width: int
    sizes: Mapping[str, Any] = field(default_factory=dict)
    extra_multipliers: Mapping[str | Pattern[str], float] = field(default_factory=dict)

    def config(self, **sizes: Any) -> Any:
        """Return the sizes of the model, some of them other than the named model's."""
        return self.model.config_class(**{**self.sizes, **sizes})

    @property
    def layers(self) -> str:
        """Preset of structured layers that the paper uses."""
        return self.model.default_layers

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the sizes other than the width."""
        return tuple(f.name for f in fields(self.model.config_class) if f.name not in ("width", "structure"))


MODELS: dict[str, ModelSpec] = {
    "cifar-mlp": ModelSpec(MLP, 64, extra_multipliers={"input": 0.1}),
    "cifar-vit": ModelSpec(
        ViT, 64, {"depth": 3, "heads": 8, "num_classes": 10, "input_shape": (3, 32, 32), "patch": 8}
    ),
    "imagenet-vit": ModelSpec(ViT, 256),
    "gpt2": ModelSpec(GPT2, 768),
}


def _spec(name: str, sizes: Mapping[str, Any]) -> ModelSpec:
    check_known("model", name, MODELS)
    spec = MODELS[name]
    if unknown := [key for key in sizes if key not in spec.options]:
        raise ValueError(
            f"model {name!r} has no size {', '.join(map(repr, unknown))}; its sizes are {', '.join(spec.options)}"
        )
    return spec


def build_model(
    name: str, *, width: int, structure: StructureConfig | None = None, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, **sizes: Any,
) -> Model:  # fmt: skip
    """Return a model of :data:`MODELS` at a width, with structured layers.

    Parameters
    ----------
    name
        ``cifar-mlp``, ``cifar-vit``, ``imagenet-vit`` or ``gpt2``.
    width
        Features of the residual stream.
    structure
        Structure of the linear layers; None: all dense.
    device
        ``"meta"`` allocates nothing.
    dtype
        Dtype of the parameters.
    **sizes
        Sizes other than the named model's (``MODELS[name].options``): ``num_classes``, ``heads``, ...

    Examples
    --------
    >>> model = build_model("cifar-mlp", width=64, structure=StructureConfig("block_tensor_train"), device="meta")
    >>> sum(p.numel() for p in model.parameters())
    49162
    """
    spec = _spec(name, sizes)
    structure = StructureConfig() if structure is None else structure
    if not isinstance(structure, StructureConfig):
        raise TypeError(f"structure must be a StructureConfig, got {structure!r}")
    return spec.model(spec.config(width=width, structure=structure, **sizes), device=device, dtype=dtype)


def base_model(name: str, base_width: int | None = None, **sizes: Any) -> Model:
    """Return the dense model at base width, on the meta device: what learning-rate multipliers are relative to.

    Parameters
    ----------
    name
        As in :func:`build_model`, whose errors these are.
    base_width
        Defaults to the paper's: 64 for CIFAR, 256 for ImageNet, 768 for GPT-2.
    **sizes
        Those of the model that is to be trained. All but the heads are taken over: the base model has the named model's
        own number of heads (or a divisor of it, so that they fill the base width). The code of the paper has
        ``expansion=1`` in the base models of ``imagenet-vit`` and ``gpt2``, by which the layers ``down`` of the dense
        model at base width train at a quarter of the rate; here they train at the rate itself.

    Examples
    --------
    >>> base = base_model("imagenet-vit", num_classes=100)
    >>> base.config.width, base.blocks[0].down.in_features, base.head.out_features
    (256, 1024, 100)
    """
    spec = _spec(name, sizes)
    taken = {key: value for key, value in sizes.items() if key not in ("heads", "head_dim")}
    width = spec.base_width if base_width is None else base_width
    if "heads" in spec.options:
        taken["heads"] = math.gcd(spec.sizes.get("heads", getattr(spec.model.config_class, "heads", 1)), width)
    return build_model(name, width=width, device="meta", **taken)
