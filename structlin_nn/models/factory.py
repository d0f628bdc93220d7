"""The structure of the linear layers of a model, the factory that makes them, and the parts of the models.

The parts are those of the models of torch and of flax, made by the factory of either. Classes of both libraries add the
forward pass, and for models the classes of their blocks (`block`) and of a list of blocks (`stack`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

import structlin
from structlin.scale import RULES
from structlin_nn._text import check_integer, check_known
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
        if self.layers is not None:
            check_known("layers", self.layers, LAYER_PRESETS)
        check_known("rule", self.rule, RULES)
        if not isinstance(self.rms_cap, bool):
            raise TypeError(f"rms_cap must be True or False, got {self.rms_cap!r}")
        object.__setattr__(self, "options", dict(self.options))


class LinearFactory:
    """Makes the linear layers of one model, structured or dense according to their role; ``common`` are options of all.

    Examples
    --------
    >>> linear = LinearFactory(StructureConfig("low_rank", {"rank": 3}), default_layers="all_but_last")
    >>> linear(8, 12).structure.num_params, linear(8, 12, role="output").structure.num_params
    (60, 96)
    """

    layer: Any = StructuredLinear
    bias_option = "bias"

    def __init__(self, structure: StructureConfig, default_layers: str, **common: Any) -> None:
        self.structure, self.common = structure, common
        self.roles = LAYER_PRESETS[structure.layers or default_layers]

    def __call__(
        self, in_features: int, out_features: int, *, role: str = "hidden", bias: bool = True, zero_init: bool = False,
        gain: bool = True,
    ) -> Any:  # fmt: skip
        """Return a layer ``(..., in_features) -> (..., out_features)``; ValueError for an unknown role.

        A layer of the role ``input`` reads the data, one of the role ``output`` makes the logits, others are
        ``hidden``. ``gain=False`` leaves out the learned gains of an RMS-capped layer, and ``zero_init`` zeroes the
        factor that is applied last.
        """
        check_known("role", role, ROLES)
        config, options = self.structure, {**self.common, self.bias_option: bias, "zero_init": zero_init}
        if role not in self.roles:
            return self.layer(in_features, out_features, structure="dense", **options)
        options |= {"rms_cap": config.rms_cap, "gain": gain and config.rms_cap, "rule": config.rule, **config.options}
        return self.layer(in_features, out_features, structure=config.name, **options)

    def norm(self, size: int, bias: bool = True) -> Any:
        """Return a LayerNorm over the last axis."""
        return nn.LayerNorm(size, bias=bias, **self.common)

    def embedding(self, count: int, size: int) -> Any:
        """``count`` learned vectors, drawn from N(0, 1): features of RMS 1, whatever the width."""
        return nn.Embedding(count, size, **self.common)


def check_images(x: Any, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless an array has the shape (batch, *shape)."""
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"images of shape (batch, *{shape}) are needed, got {tuple(x.shape)}")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, checked by their types; ``head_dim`` None becomes the width divided by the number of heads."""

    width: int

    def __post_init__(self) -> None:
        for entry in fields(self):  # their types are strings, by `from __future__ import annotations`
            name, value = entry.name, getattr(self, entry.name)
            if name == "head_dim" and value is None:
                heads: int = self.heads  # type: ignore[attr-defined]
                if heads > self.width:
                    raise ValueError(f"width {self.width} is smaller than the number of heads {heads}; pass head_dim")
                value = self.width // heads
            if name == "input_shape":
                value = tuple(value)
                if len(value) != 3 or any(type(n) is not int or n < 1 for n in value):
                    raise ValueError(f"{name} is (channels, height, width) in positive integers, got {value}")
            if entry.type in ("int", "int | None"):
                check_integer(name, value)
            if entry.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
            object.__setattr__(self, name, value)


class AttentionParts:
    """Multi-head attention with LayerNorm on queries and keys. (batch, tokens, width) -> the same shape.

    Logits are scaled by ``8 / head_dim`` in place of ``1 / sqrt(head_dim)``, as muP asks for (Yang and Hu, *Tensor
    Programs V*, 2022); at a head_dim of 64 the two agree. The output projection is zero at initialisation.
    ``scale``, ``norms`` and ``projection_bias`` are for models that do otherwise, such as the published GPT-2.
    """

    def __init__(
        self, linear: Any, width: int, heads: int, head_dim: int, *, causal: bool = False, bias: bool = True,
        zero_query: bool = True, norms: bool = True, scale: float | None = None, projection_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.head_dim, self.causal, self.norms = heads, head_dim, causal, norms
        self.scale = 8 / head_dim if scale is None else scale
        inner = heads * head_dim
        # No gains on queries and keys under norms, which would undo them.
        self.query = linear(width, inner, bias=projection_bias, zero_init=zero_query, gain=not norms)
        self.key = linear(width, inner, bias=projection_bias, gain=not norms)
        self.value = linear(width, inner, bias=projection_bias)
        if norms:
            self.query_norm = linear.norm(head_dim, bias=bias)
            self.key_norm = linear.norm(head_dim, bias=bias)
        self.out = linear(inner, width, bias=bias, zero_init=True)


class BlockParts:
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``; both branches zero at initialisation.

    ``gelu`` is ``none`` (exact) or ``tanh`` (approximate); further keywords are those of :class:`AttentionParts`.
    """

    attend: Any

    def __init__(
        self, linear: Any, width: int, heads: int, head_dim: int, expansion: int, *, bias: bool = True,
        gelu: str = "none", **attention: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gelu = gelu
        self.attention_norm = linear.norm(width, bias=bias)
        self.attention = self.attend(linear, width, heads, head_dim, bias=bias, **attention)
        self.ffn_norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)


class MLPBlockParts:
    """``h + down(gelu(up(norm(h))))``, the branch zero at initialisation. (..., width) -> (..., width)."""

    def __init__(self, linear: Any, width: int, expansion: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)


class _ModelParts:
    default_layers: str  # preset of structured layers that the paper uses
    block: Any
    stack: Any


class MLPParts(_ModelParts):
    """The layers of the residual MLP on permuted pixels."""

    default_layers = "all_but_last"

    def make(self, linear: Any, config: Any) -> None:
        """Make the layers."""
        width, bias = config.width, config.bias
        self.input = linear(math.prod(config.input_shape), width, role="input", bias=bias)
        self.blocks = self.stack([self.block(linear, width, config.expansion, bias) for _ in range(config.depth)])
        self.output = linear(width, config.num_classes, role="output", bias=bias, zero_init=True)


class ViTParts(_ModelParts):
    """The layers of the vision transformer."""

    default_layers = "all_but_last"

    def make(self, linear: Any, config: Any) -> None:
        """Make the layers."""
        width, pixels = config.width, config.input_shape[0] * config.patch**2
        self.patch_norm = linear.norm(pixels)
        self.patch_embedding = linear(pixels, width, role="input")
        self.embedding_norm = linear.norm(width)
        self.class_token = linear.embedding(1, width)
        self.positions = linear.embedding(config.patches + 1, width)
        sizes = config.heads, config.head_dim, config.expansion
        self.blocks = self.stack([self.block(linear, width, *sizes) for _ in range(config.depth)])
        self.norm = linear.norm(width)
        self.head = linear(width, config.num_classes, role="output", zero_init=True)


class GPT2Parts(_ModelParts):
    """The layers of GPT-2; a tied one has no ``head``."""

    default_layers = "all"

    def make(self, linear: Any, config: Any) -> None:
        """Make the layers."""
        width = config.width
        self.tokens = linear.embedding(config.vocabulary, width)
        self.positions = linear.embedding(config.context, width)
        options = {
            "causal": True, "bias": config.bias, "zero_query": False, "gelu": config.gelu, "norms": config.qk_norm,
            "scale": config.attention_scale, "projection_bias": config.bias,
        }  # fmt: skip
        sizes = config.heads, config.head_dim, config.expansion
        self.blocks = self.stack([self.block(linear, width, *sizes, **options) for _ in range(config.depth)])
        self.norm = linear.norm(width, bias=config.bias)
        if not config.tied:
            self.head = linear(width, config.vocabulary, role="output", bias=False, zero_init=True)
