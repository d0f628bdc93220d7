"""What the models of torch and of flax consist of, made by the factory of either.

Classes of both libraries add the forward pass, and for models the classes of their blocks (`block`) and of a list of
blocks (`stack`).
"""

from __future__ import annotations

import math
from typing import Any


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
