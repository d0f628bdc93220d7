"""The models of :mod:`structlin_nn.models` in flax.nnx, with the same names, sizes and values.

The parameters of a model here and of the torch model of the same configuration go over into one another by
:mod:`structlin_nn.convert`. Sizes, presets and the fixed order of the pixels are those of :mod:`structlin_nn.models`,
which needs torch.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jax import Array

from structlin_nn import models
from structlin_nn.flax.linear import Index, StructuredLinear
from structlin_nn.models import GPT2Config, LinearFactory, MLPConfig, StructureConfig, ViTConfig
from structlin_nn.models.factory import check_images

__all__ = ["GPT2", "MLP", "MODELS", "ViT", "base_model", "build_model"]

_EPSILON = 1e-5  # torch's, for layer norms


class _Maker(LinearFactory):
    """Makes the layers of one model as the factory of torch does."""

    def __init__(self, structure: StructureConfig, default_layers: str, **common: Any) -> None:
        super().__init__(structure, default_layers)
        self.common = common

    def __call__(  # type: ignore[override]
        self, d_in: int, d_out: int, *, role: str = "hidden", bias: bool = True, zero_init: bool = False,
        gain: bool = True,
    ) -> StructuredLinear:  # fmt: skip
        options = {**self.common, **self.layer_options(role, gain)}
        return StructuredLinear(d_in, d_out, use_bias=bias, zero_init=zero_init, **options)

    def norm(self, size: int, bias: bool = True) -> nnx.LayerNorm:  # type: ignore[override]
        return nnx.LayerNorm(size, epsilon=_EPSILON, use_bias=bias, use_fast_variance=False, **self.common)

    def embedding(self, count: int, size: int) -> nnx.Embed:  # type: ignore[override]
        return nnx.Embed(count, size, embedding_init=nnx.initializers.normal(1.0), **self.common)


class MLPBlock(nnx.Module):
    """``h + down(gelu(up(norm(h))))``, the branch zero at initialisation. (..., width) -> (..., width)."""

    def __init__(self, linear: _Maker, width: int, expansion: int, bias: bool) -> None:
        self.norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)

    def __call__(self, h: Array) -> Array:
        return h + self.down(nnx.gelu(self.up(self.norm(h)), approximate=False))


class MLP(nnx.Module):
    """Residual MLP on permuted pixels: :class:`structlin_nn.models.MLP`.

    (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> model = MLP(MLPConfig(width=16, depth=1, input_shape=(1, 4, 4)), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 1, 4, 4))).shape
    (2, 10)
    """

    def __init__(self, config: MLPConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = _Static(config)
        default = models.MLP.default_layers
        linear = _Maker(config.structure, default, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        pixels = math.prod(config.input_shape)
        generator = torch.Generator().manual_seed(models.mlp.PERMUTATION_SEED)
        self.permutation = Index(jnp.asarray(torch.randperm(pixels, generator=generator).numpy()))
        bias = config.bias
        self.input = linear(pixels, config.width, role="input", bias=bias)
        self.blocks = nnx.List(MLPBlock(linear, config.width, config.expansion, bias) for _ in range(config.depth))
        self.output = linear(config.width, config.num_classes, role="output", bias=bias, zero_init=True)

    def __call__(self, x: Array) -> Array:
        """Return the logits of images (batch, channels, height, width)."""
        check_images(x, self.config.value.input_shape)
        h = nnx.gelu(self.input(x.reshape(len(x), -1)[:, self.permutation[...]]), approximate=False)
        for block in self.blocks:
            h = block(h)
        return self.output(h)


class Attention(nnx.Module):
    """Multi-head attention with LayerNorm on queries and keys, as in torch. (batch, tokens, width) -> the same."""

    def __init__(
        self, linear: _Maker, width: int, heads: int, head_dim: int, *, causal: bool = False, bias: bool = True,
        zero_query: bool = True, norms: bool = True, scale: float | None = None, projection_bias: bool = False,
    ) -> None:  # fmt: skip
        self.heads, self.head_dim, self.causal, self.norms = heads, head_dim, causal, norms
        self.scale = 8 / head_dim if scale is None else scale
        inner = heads * head_dim
        self.query = linear(width, inner, bias=projection_bias, zero_init=zero_query, gain=not norms)
        self.key = linear(width, inner, bias=projection_bias, gain=not norms)
        self.value = linear(width, inner, bias=projection_bias)
        if norms:
            self.query_norm = linear.norm(head_dim, bias=bias)
            self.key_norm = linear.norm(head_dim, bias=bias)
        self.out = linear(inner, width, bias=bias, zero_init=True)

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


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``; both branches zero at initialisation."""

    def __init__(
        self, linear: _Maker, width: int, heads: int, head_dim: int, expansion: int, *, bias: bool = True,
        gelu: str = "none", **attention: Any,
    ) -> None:  # fmt: skip
        self.approximate = gelu == "tanh"
        self.attention_norm = linear.norm(width, bias=bias)
        self.attention = Attention(linear, width, heads, head_dim, bias=bias, **attention)
        self.ffn_norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.ffn_norm(x)), approximate=self.approximate))


class GPT2(nnx.Module):
    """Causal transformer over tokens: :class:`structlin_nn.models.GPT2`.

    Tokens (batch, length) -> logits (batch, length, vocabulary).

    Examples
    --------
    >>> config = GPT2Config(width=16, depth=1, heads=2, vocabulary=30, context=9)
    >>> nnx.eval_shape(lambda x: GPT2(config, rngs=nnx.Rngs(0))(x), jnp.zeros((2, 5), int)).shape
    (2, 5, 30)
    """

    def __init__(
        self, config: GPT2Config, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config, width = _Static(config), config.width
        assert config.head_dim is not None
        default = models.GPT2.default_layers
        linear = _Maker(config.structure, default, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.tokens = linear.embedding(config.vocabulary, width)
        self.positions = linear.embedding(config.context, width)
        self.blocks = nnx.List(
            Block(
                linear, width, config.heads, config.head_dim, config.expansion, causal=True, bias=config.bias,
                zero_query=False, gelu=config.gelu, norms=config.qk_norm, scale=config.attention_scale,
                projection_bias=config.bias,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = linear.norm(width, bias=config.bias)
        if not config.tied:
            self.head = linear(width, config.vocabulary, role="output", bias=False, zero_init=True)

    def __call__(self, tokens: Array) -> Array:
        """Return the logits of tokens (batch, length)."""
        config = self.config.value
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= config.context:
            raise ValueError(f"tokens of shape (batch, length up to {config.context}) are needed, got {tokens.shape}")
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.tokens.attend(x) if config.tied else self.head(x)


class ViT(nnx.Module):
    """Vision transformer with a class token: :class:`structlin_nn.models.ViT`.

    (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> config = ViTConfig(width=16, depth=1, num_classes=7, input_shape=(1, 8, 8), patch=4)
    >>> nnx.eval_shape(lambda x: ViT(config, rngs=nnx.Rngs(0))(x), jnp.zeros((2, 1, 8, 8))).shape
    (2, 7)
    """

    def __init__(self, config: ViTConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = _Static(config)
        width, pixels = config.width, config.input_shape[0] * config.patch**2
        assert config.head_dim is not None
        default = models.ViT.default_layers
        linear = _Maker(config.structure, default, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.patch_norm = linear.norm(pixels)
        self.patch_embedding = linear(pixels, width, role="input")
        self.embedding_norm = linear.norm(width)
        self.class_token = linear.embedding(1, width)
        self.positions = linear.embedding(config.patches + 1, width)
        self.blocks = nnx.List(
            Block(linear, width, config.heads, config.head_dim, config.expansion) for _ in range(config.depth)
        )
        self.norm = linear.norm(width)
        self.head = linear(width, config.num_classes, role="output", zero_init=True)

    def patchify(self, x: Array) -> Array:
        """Return patches (batch, patches, patch * patch * channels) of images (batch, channels, height, width)."""
        n, channels, height, width = x.shape
        p = self.config.value.patch
        x = x.reshape(n, channels, height // p, p, width // p, p)
        return x.transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * channels)

    def __call__(self, x: Array) -> Array:
        """Return the logits of images (batch, channels, height, width)."""
        check_images(x, self.config.value.input_shape)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(self.patchify(x))))
        token, positions = self.class_token(jnp.zeros((len(x), 1), int)), self.positions(jnp.arange(x.shape[1] + 1))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1) + positions.astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


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
    _check_name(name)
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
    _check_name(name)
    config = models.base_model(name, base_width, **sizes).config
    return nnx.eval_shape(lambda: MODELS[name](config, rngs=nnx.Rngs(0)))


class _Static:
    """A configuration as a static attribute, which nnx requires to be hashable and compares for jit."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(repr(self.value))


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"flax has the models {', '.join(MODELS)}, got {name!r}")
