"""Pre-norm transformer blocks, shared by the vision and the language model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.models.factory import LinearFactory


class Attention(nn.Module):
    """Multi-head attention with LayerNorm on queries and keys. (batch, tokens, width) -> the same shape.

    Logits are scaled by ``8 / head_dim`` in place of ``1 / sqrt(head_dim)``, as muP asks for (Yang and Hu, *Tensor
    Programs V*, 2022); at a head_dim of 64 the two agree. The output projection is zero at initialisation.
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
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, head_dim, causal
        inner = heads * head_dim
        # No gains on queries and keys: the norms that follow would undo them.
        self.query = linear(width, inner, bias=False, zero_init=zero_query, gain=False)
        self.key = linear(width, inner, bias=False, gain=False)
        self.value = linear(width, inner, bias=False)
        self.query_norm = linear.norm(head_dim, bias=bias)
        self.key_norm = linear.norm(head_dim, bias=bias)
        self.out = linear(inner, width, bias=bias, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        split = (self.heads, self.head_dim)
        q = self.query_norm(self.query(x).unflatten(-1, split)).transpose(1, 2)
        k = self.key_norm(self.key(x).unflatten(-1, split)).transpose(1, 2)
        v = self.value(x).unflatten(-1, split).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=8 / self.head_dim)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``; both branches zero at initialisation."""

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
    ) -> None:
        super().__init__()
        self.attention_norm = linear.norm(width, bias=bias)
        self.attention = Attention(linear, width, heads, head_dim, causal=causal, bias=bias, zero_query=zero_query)
        self.ffn_norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))
