"""The models in torch: the residual MLP on pixels, and pre-norm transformers (the vision transformer and GPT-2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from structlin_nn.models import factory
from structlin_nn.models.factory import LinearFactory, Sizes, StructureConfig
from structlin_nn.torch import mlp, projections

# Up to so many tokens, without and with a backward pass, batched products of bfloat16 are faster on a CPU than torch's
# fused kernel, whose products are of float32: by a factor of 1.2 and 3.9 at 50 tokens, and of 0.7 and 1.3 at 256
# (benchmarks/attention.py on an AMD EPYC of family 25).
PRODUCTS_TOKENS = {False: 64, True: 256}


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Return the attention of queries, keys and values of shape (batch, heads, tokens, head_dim).

    The result is that of torch's ``scaled_dot_product_attention``. On a CPU, short sequences of bfloat16 and
    float16 run by :func:`attend_by_products`, which is faster there.

    Examples
    --------
    >>> q, k, v = torch.randn(3, 2, 4, 5, 8)
    >>> attend(q, k, v, causal=True, scale=0.5).shape
    torch.Size([2, 4, 5, 8])
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = max(q.shape[-2], k.shape[-2]) <= PRODUCTS_TOKENS[train]
    if q.device.type == "cpu" and half and few and not torch.compiler.is_compiling():
        return attend_by_products(q, k, v, causal=causal, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Return the same by batched products; the logits are rounded to the dtype of the queries."""
    logits = (q * scale) @ k.transpose(-1, -2)
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.softmax(-1) @ v


class Attention(factory.AttentionParts, nn.Module):
    """The attention of :class:`structlin_nn.models.factory.AttentionParts`; a ``norm`` may be given to the call."""

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Attend over tokens (..., length, width), after ``norm`` if it is given."""
        split = (self.heads, self.head_dim)
        q, k, v = (y.unflatten(-1, split) for y in projections(x, (self.query, self.key, self.value), norm))
        if self.norms:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = attend(q, k, v, causal=self.causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(factory.BlockParts, nn.Module):
    """The block of :class:`structlin_nn.models.factory.BlockParts`."""

    attend = Attention

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus attention, plus the MLP."""
        x = x + self.attention(x, self.attention_norm)
        activation = "gelu" if self.gelu == "none" else "gelu_tanh"
        return mlp(x, self.up, self.down, activation, norm=self.ffn_norm, residual=True)


class Blocks(nn.ModuleList):
    """Modules that are applied in turn.

    With ``recompute``, the backward pass has only the input of each, and computes the rest again (activation
    checkpointing: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016).

    Examples
    --------
    >>> blocks = Blocks([nn.Linear(3, 3), nn.Tanh()])
    >>> blocks(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self:
            again = self.recompute and torch.is_grad_enabled()
            # Nothing in a block is random.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x


class BlockModel(nn.Module):
    """A model with ``blocks``, of the sizes ``config``, an instance of ``config_class``."""

    config_class: type
    blocks: Blocks
    default_layers: str
    make: Callable[..., None]
    stack: Any = Blocks

    def __init__(self, config: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.make(LinearFactory(config.structure, self.default_layers, device=device, dtype=dtype), config)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again; as in timm."""
        self.blocks.recompute = enable


class ImageModel(BlockModel):
    """A model of images of the shape ``config.input_shape``."""

    def example_input(self, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Zeros of the shape that the model takes."""
        return torch.zeros(batch, *self.config.input_shape, device=device)


@dataclass(frozen=True)
class ViTConfig(Sizes):
    """Sizes of a :class:`ViT`. ``input_shape`` is (channels, height, width); ``head_dim`` None: width // heads."""

    depth: int = 12
    heads: int = 4
    head_dim: int | None = None
    num_classes: int = 1000
    input_shape: tuple[int, int, int] = (3, 224, 224)
    patch: int = 32
    expansion: int = 4
    structure: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _, height, width = self.input_shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patches of {self.patch} x {self.patch} do not tile images of {height} x {width}")

    @property
    def patches(self) -> int:
        """Number of patches of one image."""
        return (self.input_shape[1] // self.patch) * (self.input_shape[2] // self.patch)


class ViT(factory.ViTParts, ImageModel):
    """Vision transformer with a class token (Dosovitskiy et al., 2021) and normalised queries and keys.

    Patch embedding with LayerNorm on both sides, pre-norm blocks, a final LayerNorm, and a head on the class token.
    Query projection, residual branches and head are zero at initialisation.
    (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> config = ViTConfig(width=16, depth=1, num_classes=7, input_shape=(1, 8, 8), patch=4)
    >>> ViT(config)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 7])
    """

    block, config_class = Block, ViTConfig

    def patchify(self, x: Tensor) -> Tensor:
        """Return patches (batch, patches, patch * patch * channels) of images (batch, channels, height, width)."""
        p = self.config.patch
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features): the head reads the features (batch, width) after the last norm."""
        factory.check_images(x, self.config.input_shape)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(self.patchify(x))))
        token = self.class_token.weight.expand(x.shape[0], 1, -1)
        x = torch.cat([token, x], dim=1) + self.positions.weight
        x = self.blocks(x)
        features = self.norm(x[:, 0])
        logits = self.head(features)
        return (logits, features) if return_features else logits


@dataclass(frozen=True)
class GPT2Config(Sizes):
    """Sizes of a :class:`GPT2`. ``context`` is the number of positions; ``head_dim`` None: width // heads.

    The rest turns the paper's model into the published GPT-2 (:mod:`structlin_nn.models.files`): ``qk_norm``
    normalises queries and keys; ``attention_scale`` is the factor on the attention logits, None for 8 / head_dim;
    ``bias`` gives every linear layer (but the head) and every LayerNorm a bias; ``tied`` takes the token embedding
    for the head, which then is neither structured nor zero at initialisation; ``gelu`` is ``none`` (exact) or
    ``tanh`` (approximate).
    """

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
        super().__post_init__()
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale must be positive and finite, got {self.attention_scale!r}")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu must be 'none' or 'tanh', got {self.gelu!r}")


class GPT2(factory.GPT2Parts, BlockModel):
    """Causal transformer over tokens (Radford et al., 2019), by default without biases and with an untied head.

    Token and position embeddings, pre-norm blocks, a final LayerNorm and a head that is structured like the rest.
    Residual branches and head are zero at initialisation, the query projection is not.
    Tokens (batch, length) of an integer dtype -> logits (batch, length, vocabulary).

    Examples
    --------
    >>> config = GPT2Config(width=16, depth=1, heads=2, vocabulary=30, context=9)
    >>> GPT2(config)(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 30])
    """

    block, config_class = Block, GPT2Config

    def forward(self, tokens: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features): the features (batch, length, width) are what the head reads."""
        if tokens.ndim != 2 or tokens.is_floating_point() or not 1 <= tokens.shape[1] <= self.config.context:
            raise ValueError(
                f"integer tokens of shape (batch, length up to {self.config.context}) are needed, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        x = self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        features = self.norm(x)
        logits = F.linear(features, self.tokens.weight) if self.config.tied else self.head(features)
        return (logits, features) if return_features else logits

    def example_input(self, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Return zeros of the longest shape that the model takes."""
        return torch.zeros(batch, self.config.context, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class MLPConfig(Sizes):
    """Sizes of an :class:`MLP`. ``input_shape`` is (channels, height, width); ``expansion`` that of the blocks.

    ``bias=False`` leaves out the biases of layers and norms.
    """

    depth: int = 3
    num_classes: int = 10
    input_shape: tuple[int, int, int] = (3, 32, 32)
    expansion: int = 4
    bias: bool = True
    structure: StructureConfig = field(default_factory=StructureConfig)


def pixel_order(count: int) -> Tensor:
    """Return the fixed random order of so many pixels, the same for all images and models."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")


class MLPBlock(factory.MLPBlockParts, nn.Module):
    """The block of :class:`structlin_nn.models.factory.MLPBlockParts`."""

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h + down(gelu(up(norm(h))))``."""
        return mlp(h, self.up, self.down, norm=self.norm, residual=True)


class MLP(factory.MLPParts, ImageModel):
    """Residual MLP on permuted pixels (Qiu et al., *Compute Better Spent*, ICML 2024, section 4).

    The pixels of an image are put into a fixed random order, the same for all images and models, so that no
    structure profits from the grid. (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> model = MLP(MLPConfig(width=16, input_shape=(1, 4, 4)))
    >>> model(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 10])
    """

    block, config_class = MLPBlock, MLPConfig
    permutation: Tensor

    def make(self, linear: LinearFactory, config: MLPConfig) -> None:
        """Make the layers, and the fixed order of the pixels."""
        super().make(linear, config)
        empty = torch.empty(math.prod(config.input_shape), dtype=torch.int64, device=linear.common["device"])
        self.register_buffer("permutation", empty)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Write the fixed order of the pixels, for example after ``to_empty``."""
        self.permutation.copy_(pixel_order(len(self.permutation)))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features): the features (batch, width) are what the output layer reads."""
        factory.check_images(x, self.config.input_shape)
        h = F.gelu(self.input(x.flatten(1).index_select(1, self.permutation)))
        h = self.blocks(h)
        logits = self.output(h)
        return (logits, h) if return_features else logits
