"""The language model: GPT-2 without biases, with normalised queries and keys; by options, GPT-2 as published."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.models.factory import LinearFactory, StructureConfig
from structlin_nn.models.sizes import check_positive, resolve_head_dim
from structlin_nn.models.transformer import Block, Blocks


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a :class:`GPT2`. ``context`` is the number of positions; ``head_dim`` None: width // heads.

    The rest turns the paper's model into the published GPT-2 (:mod:`structlin_nn.models.pretrained`): ``qk_norm``
    normalises queries and keys; ``attention_scale`` is the factor on the attention logits, None for 8 / head_dim;
    ``bias`` gives every linear layer (but the head) and every LayerNorm a bias; ``tied`` takes the token embedding
    for the head, which then is neither structured nor zero at initialisation; ``gelu`` is ``none`` (exact) or
    ``tanh`` (approximate).
    """

    width: int
    depth: int = 12
    heads: int = 12
    head_dim: int | None = None
    vocabulary: int = 50304
    context: int = 512
    expansion: int = 4
    qk_norm: bool = True
    attention_scale: float | None = None
    bias: bool = False
    tied: bool = False
    gelu: str = "none"
    structure: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        check_positive(self, "depth", "vocabulary", "context", "expansion")
        resolve_head_dim(self)
        for name in ("qk_norm", "bias", "tied"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale must be positive and finite, got {self.attention_scale!r}")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu must be 'none' or 'tanh', got {self.gelu!r}")


class GPT2(nn.Module):
    """Causal transformer over tokens (Radford et al., 2019), by default without biases and with an untied head.

    Token and position embeddings, pre-norm blocks, a final LayerNorm and a head that is structured like the rest.
    Residual branches and head are zero at initialisation, the query projection is not.
    Tokens (batch, length) of an integer dtype -> logits (batch, length, vocabulary).

    >>> config = GPT2Config(width=16, depth=1, heads=2, vocabulary=30, context=9)
    >>> GPT2(config)(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 30])
    """

    default_layers = "all"

    def __init__(
        self, config: GPT2Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        assert config.head_dim is not None
        linear = LinearFactory(config.structure, self.default_layers, device, dtype)
        self.tokens = linear.embedding(config.vocabulary, width)
        self.positions = linear.embedding(config.context, width)
        self.blocks = Blocks(
            Block(
                linear, width, config.heads, config.head_dim, config.expansion,
                causal=True, bias=config.bias, zero_query=False, gelu=config.gelu,
                norms=config.qk_norm, scale=config.attention_scale, projection_bias=config.bias,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = linear.norm(width, bias=config.bias)
        self.head = None if config.tied else linear(width, config.vocabulary, role="output", bias=False, zero_init=True)

    def forward(self, tokens: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, features): the features (batch, length, width) are what the head reads."""
        if tokens.ndim != 2 or tokens.is_floating_point() or not 1 <= tokens.shape[1] <= self.config.context:
            raise ValueError(
                f"integer tokens of shape (batch, length up to {self.config.context}) are needed, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        x = self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        features = self.norm(x)
        logits = F.linear(features, self.tokens.weight) if self.head is None else self.head(features)
        return (logits, features) if return_features else logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again; as in timm."""
        self.blocks.recompute = enable

    def example_input(self, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Zeros of the longest shape that the model takes."""
        return torch.zeros(batch, self.config.context, dtype=torch.int64, device=device)
