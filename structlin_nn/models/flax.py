"""The models of :mod:`structlin_nn.models` in flax.nnx, with the same names, sizes and values.

The parameters of a model here and of the torch model of the same configuration go over into one another by
:mod:`structlin_nn.convert`. Sizes, presets and the fixed order of the pixels are those of :mod:`structlin_nn.models`,
which needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from structlin_nn import models
from structlin_nn.flax.linear import Index, StructuredLinear
from structlin_nn.models import LinearFactory, MLPConfig, StructureConfig, factory
from structlin_nn.models.networks import pixel_order

__all__ = ["GPT2", "MLP", "MODELS", "ViT", "base_model", "build_model"]

_EPSILON = 1e-5  # torch's, for layer norms


class _Maker(LinearFactory):
    """Makes the layers of one model as the factory of torch does."""

    layer, bias_option = StructuredLinear, "use_bias"

    def norm(self, size: int, bias: bool = True) -> nnx.LayerNorm:
        return nnx.LayerNorm(size, epsilon=_EPSILON, use_bias=bias, use_fast_variance=False, **self.common)

    def embedding(self, count: int, size: int) -> nnx.Embed:
        return nnx.Embed(count, size, embedding_init=nnx.initializers.normal(1.0), **self.common)


class _Model(nnx.Module):
    """A model of the sizes ``config``; further options are those of :class:`StructuredLinear`."""

    default_layers: str
    make: Callable[..., None]
    stack: Any = nnx.List

    def __init__(self, config: Any, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.make(_Maker(config.structure, self.default_layers, **common), config)


class MLPBlock(factory.MLPBlockParts, nnx.Module):
    """The block of :class:`structlin_nn.models.factory.MLPBlockParts`."""

    def __call__(self, h: Array) -> Array:
        return h + self.down(nnx.gelu(self.up(self.norm(h)), approximate=False))


class MLP(factory.MLPParts, _Model):
    """Residual MLP on permuted pixels: :class:`structlin_nn.models.MLP`.

    (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> model = MLP(MLPConfig(width=16, depth=1, input_shape=(1, 4, 4)), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 1, 4, 4))).shape
    (2, 10)
    """

    block = MLPBlock

    def make(self, linear: _Maker, config: MLPConfig) -> None:
        """Make the layers, and the fixed order of the pixels."""
        self.permutation = Index(jnp.asarray(pixel_order(math.prod(config.input_shape)).numpy()))
        super().make(linear, config)

    def __call__(self, x: Array) -> Array:
        """Return the logits of images (batch, channels, height, width)."""
        factory.check_images(x, self.config.input_shape)
        h = nnx.gelu(self.input(x.reshape(len(x), -1)[:, self.permutation[...]]), approximate=False)
        for block in self.blocks:
            h = block(h)
        return self.output(h)


class Attention(factory.AttentionParts, nnx.Module):
    """The attention of :class:`structlin_nn.models.factory.AttentionParts`."""

    def __call__(self, x: Array) -> Array:
        split = (*x.shape[:-1], self.heads, self.head_dim)
        q, k, v = self.query(x).reshape(split), self.key(x).reshape(split), self.value(x).reshape(split)
        if self.norms:
            q, k = self.query_norm(q), self.key_norm(k)
        # Not jax.nn.dot_product_attention, which takes the softmax of float64 in float32.
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * self.scale
        if self.causal:
            seen = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), bool))
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        shares = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(v.dtype)
        y = jnp.einsum("...hqk,...khd->...qhd", shares, v)
        return self.out(y.reshape(*x.shape[:-1], -1))


class Block(factory.BlockParts, nnx.Module):
    """The block of :class:`structlin_nn.models.factory.BlockParts`."""

    attend = Attention

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.ffn_norm(x)), approximate=self.gelu == "tanh"))


class GPT2(factory.GPT2Parts, _Model):
    """Causal transformer over tokens: :class:`structlin_nn.models.GPT2`.

    Tokens (batch, length) -> logits (batch, length, vocabulary).

    Examples
    --------
    >>> config = models.GPT2Config(width=16, depth=1, heads=2, vocabulary=30, context=9)
    >>> nnx.eval_shape(lambda x: GPT2(config, rngs=nnx.Rngs(0))(x), jnp.zeros((2, 5), int)).shape
    (2, 5, 30)
    """

    block = Block

    def __call__(self, tokens: Array) -> Array:
        """Return the logits of tokens (batch, length)."""
        config = self.config
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= config.context:
            raise ValueError(f"tokens of shape (batch, length up to {config.context}) are needed, got {tokens.shape}")
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.tokens.attend(x) if config.tied else self.head(x)


class ViT(factory.ViTParts, _Model):
    """Vision transformer with a class token: :class:`structlin_nn.models.ViT`.

    (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> config = models.ViTConfig(width=16, depth=1, num_classes=7, input_shape=(1, 8, 8), patch=4)
    >>> nnx.eval_shape(lambda x: ViT(config, rngs=nnx.Rngs(0))(x), jnp.zeros((2, 1, 8, 8))).shape
    (2, 7)
    """

    block = Block

    def patchify(self, x: Array) -> Array:
        """Return patches (batch, patches, patch * patch * channels) of images (batch, channels, height, width)."""
        n, channels, height, width = x.shape
        p = self.config.patch
        x = x.reshape(n, channels, height // p, p, width // p, p)
        return x.transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * channels)

    def __call__(self, x: Array) -> Array:
        """Return the logits of images (batch, channels, height, width)."""
        factory.check_images(x, self.config.input_shape)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(self.patchify(x))))
        token, positions = self.class_token(jnp.zeros((len(x), 1), int)), self.positions(jnp.arange(x.shape[1] + 1))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1) + positions.astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


MODELS: dict[str, type[MLP] | type[ViT] | type[GPT2]]
MODELS = {"cifar-mlp": MLP, "cifar-vit": ViT, "imagenet-vit": ViT, "gpt2": GPT2}
"""The flax models, by the names of :data:`structlin_nn.models.MODELS`."""


def build_model(
    name: str, *, width: int, structure: StructureConfig | None = None, dtype: Any = None,
    param_dtype: Any = jnp.float32, rngs: nnx.Rngs, **sizes: Any,
) -> MLP | ViT | GPT2:  # fmt: skip
    """Return a model of :data:`MODELS` at a width, as :func:`structlin_nn.models.build_model`, with its errors.

    ``dtype``, ``param_dtype`` and ``rngs`` are those of :class:`StructuredLinear`.

    Examples
    --------
    >>> structure = StructureConfig("block_tensor_train")
    >>> model = nnx.eval_shape(lambda: build_model("cifar-mlp", width=64, structure=structure, rngs=nnx.Rngs(0)))
    >>> sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    49162
    """
    config = models.build_model(name, width=width, structure=structure, device="meta", **sizes).config
    return MODELS[name](config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def base_model(name: str, base_width: int | None = None, **sizes: Any) -> MLP | ViT | GPT2:
    """Return the dense model at base width, abstract: what learning-rate multipliers are relative to.

    Arguments and errors are those of :func:`structlin_nn.models.base_model`.

    Examples
    --------
    >>> base_model("cifar-mlp").input.in_features
    3072
    """
    config = models.base_model(name, base_width, **sizes).config
    return nnx.eval_shape(lambda: MODELS[name](config, rngs=nnx.Rngs(0)))
