"""The structure of the linear layers of a model, and the factory that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import structlin
from structlin.scale import RULES
from structlin_nn._text import check_integer
from structlin_nn.torch import StructuredLinear

ROLES = ("input", "hidden", "output")
LAYER_PRESETS: dict[str, tuple[str, ...]] = {
    "all": ROLES,
    "all_but_last": ("input", "hidden"),
    "intermediate": ("hidden",),
}


@dataclass(frozen=True)
class StructureConfig:
    """The structure of a model's linear layers.

    Attributes
    ----------
    name
        A registered structure; ``dense`` leaves every layer dense.
    options
        Options of that structure, the same for every layer: ``{"rank": 2, "factorization": "greedy"}``.
    layers
        Layers that have the structure: ``all``, ``all_but_last`` (the output layer stays dense) or ``intermediate``
        (the output layer and the layer that reads the data stay dense). None takes the paper's choice for the model
        (``models.MODELS[name].layers``).
    rms_cap
        Hold the RMS of every factor at or below its initial deviation, with a learned gain for each factor. Query and
        key projections under QK LayerNorm get no gain. Dense layers are capped only where ``dense`` is the structure.
    rule
        Scale rule of the initialisation, ``paper`` or ``rank_corrected`` (:mod:`structlin.scale`).

    Examples
    --------
    >>> StructureConfig("block_tensor_train", {"rank": 2}).options
    {'rank': 2}
    >>> StructureConfig("monarch", {"rank": 2})
    Traceback (most recent call last):
    ...
    ValueError: structure 'monarch' has no option 'rank'; its options are blocks
    """

    name: str = "dense"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    layers: str | None = None
    rms_cap: bool = False
    rule: str = "paper"

    def __post_init__(self) -> None:
        known = structlin.structure_options(self.name)
        if unknown := [key for key in self.options if key not in known]:
            allowed = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"structure {self.name!r} has no option {', '.join(map(repr, unknown))}; {allowed}")
        if self.layers is not None and self.layers not in LAYER_PRESETS:
            raise ValueError(f"unknown layers {self.layers!r}; one of {', '.join(LAYER_PRESETS)}")
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; one of {', '.join(RULES)}")
        if not isinstance(self.rms_cap, bool):
            raise TypeError(f"rms_cap must be True or False, got {self.rms_cap!r}")
        object.__setattr__(self, "options", dict(self.options))


class LinearFactory:
    """Makes the linear layers of one model, structured or dense according to their role.

    Examples
    --------
    >>> linear = LinearFactory(StructureConfig("low_rank", {"rank": 3}), default_layers="all_but_last")
    >>> linear(8, 12).structure.num_params, linear(8, 12, role="output").structure.num_params
    (60, 96)
    """

    def __init__(
        self, structure: StructureConfig, default_layers: str, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.structure = structure
        self.roles = LAYER_PRESETS[structure.layers or default_layers]
        self.device, self.dtype = device, dtype

    def __call__(
        self, in_features: int, out_features: int, *, role: str = "hidden", bias: bool = True, zero_init: bool = False,
        gain: bool = True,
    ) -> StructuredLinear:  # fmt: skip
        """Return a layer ``(..., in_features) -> (..., out_features)``; the options are those of :meth:`layer_options`.

        ``zero_init`` zeroes the factor that is applied last.
        """
        return StructuredLinear(
            in_features, out_features, bias, self.device, self.dtype, zero_init=zero_init,
            **self.layer_options(role, gain),
        )  # fmt: skip

    def layer_options(self, role: str, gain: bool) -> dict[str, Any]:
        """Return the structure of a layer by its role, with its options; ValueError for an unknown role.

        A layer of the role ``input`` reads the data, one of the role ``output`` makes the logits, others are
        ``hidden``. ``gain=False`` leaves out the learned gains of an RMS-capped layer.
        """
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; one of {', '.join(ROLES)}")
        if role not in self.roles:
            return {"structure": "dense"}
        config = self.structure
        capped: dict[str, Any] = {"rms_cap": config.rms_cap, "gain": gain and config.rms_cap, "rule": config.rule}
        return {"structure": config.name, **capped, **config.options}

    def norm(self, size: int, bias: bool = True) -> nn.LayerNorm:
        """Return a LayerNorm over the last axis."""
        return nn.LayerNorm(size, bias=bias, device=self.device, dtype=self.dtype)

    def embedding(self, count: int, size: int) -> nn.Embedding:
        """``count`` learned vectors, drawn from N(0, 1): features of RMS 1, whatever the width."""
        return nn.Embedding(count, size, device=self.device, dtype=self.dtype)


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless the named attributes of ``config`` are positive integers."""
    for name in names:
        check_integer(name, getattr(config, name))


def check_shape(shape: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) as a tuple of positive integers; ValueError for other values."""
    shape = tuple(shape)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape is (channels, height, width) in positive integers, got {shape}")
    return shape


def check_images(x: Any, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless an array has the shape (batch, *shape)."""
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"images of shape (batch, *{shape}) are needed, got {tuple(x.shape)}")


def resolve_head_dim(config: Any) -> None:
    """Fill in ``config.head_dim``: the width divided by the number of heads, rounded down."""
    check_positive(config, "width", "heads")
    if config.head_dim is None:
        if config.heads > config.width:
            raise ValueError(f"width {config.width} is smaller than the number of heads {config.heads}; pass head_dim")
        object.__setattr__(config, "head_dim", config.width // config.heads)
    check_positive(config, "head_dim")
