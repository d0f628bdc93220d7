"""Pre-norm transformer blocks, shared by the vision and the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from structlin_nn.models.factory import LinearFactory
from structlin_nn.torch import mlp, projections


class Attention(nn.Module):
    """Multi-head attention with LayerNorm on queries and keys. (batch, tokens, width) -> the same shape.

    Logits are scaled by ``8 / head_dim`` in place of ``1 / sqrt(head_dim)``, as muP asks for (Yang and Hu, *Tensor
    Programs V*, 2022); at a head_dim of 64 the two agree. The output projection is zero at initialisation.
    ``scale``, ``norms`` and ``projection_bias`` are for models that do otherwise, such as the published GPT-2. A
    ``norm`` of the input may be given to the call.
    """

    def __init__(
        self,
        linear: LinearFactory,
        width: int,
        heads: int,
        head_dim: int,
        *,
        causal: bool,
        bias: bool,
        zero_query: bool,
        norms: bool = True,
        scale: float | None = None,
        projection_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal
        self.scale = 8 / head_dim if scale is None else scale
        inner = heads * head_dim
        # No gains on queries and keys under norms, which would undo them.
        self.query = linear(width, inner, bias=projection_bias, zero_init=zero_query, gain=not norms)
        self.key = linear(width, inner, bias=projection_bias, gain=not norms)
        self.value = linear(width, inner, bias=projection_bias)
        self.query_norm = linear.norm(head_dim, bias=bias) if norms else nn.Identity()
        self.key_norm = linear.norm(head_dim, bias=bias) if norms else nn.Identity()
        self.out = linear(inner, width, bias=bias, zero_init=True)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        split = (self.heads, self.head_dim)
        q, k, v = (y.unflatten(-1, split) for y in projections(x, (self.query, self.key, self.value), norm))
        q, k, v = self.query_norm(q).transpose(1, 2), self.key_norm(k).transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``; both branches zero at initialisation.

    ``gelu`` is the ``approximate`` of torch's gelu; further keywords are those of :class:`Attention`.
    """

    def __init__(
        self,
        linear: LinearFactory,
        width: int,
        heads: int,
        head_dim: int,
        expansion: int,
        *,
        causal: bool = False,
        bias: bool = True,
        zero_query: bool = True,
        gelu: str = "none",
        **attention: Any,
    ) -> None:
        super().__init__()
        self.gelu = gelu
        self.attention_norm = linear.norm(width, bias=bias)
        self.attention = Attention(
            linear, width, heads, head_dim, causal=causal, bias=bias, zero_query=zero_query, **attention
        )
        self.ffn_norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, self.attention_norm)
        activation = "gelu" if self.gelu == "none" else "gelu_tanh"
        return mlp(x, self.up, self.down, activation, norm=self.ffn_norm, residual=True)


class Blocks(nn.ModuleList):
    """Modules that are applied in turn.

    With ``recompute``, the backward pass has only the input of each, and computes the rest again (activation
    checkpointing: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016).

    >>> blocks = Blocks([nn.Linear(3, 3), nn.Tanh()])
    >>> blocks(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            again = self.recompute and torch.is_grad_enabled()
            # Nothing in a block is random.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x
