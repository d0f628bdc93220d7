"""The models for images of :mod:`structlin_nn.models` in flax.nnx, with the same names, sizes and values.

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
from structlin_nn.models import LAYER_PRESETS, MLPConfig, StructureConfig, ViTConfig

__all__ = ["MLP", "MODELS", "ViT", "base_model", "build_model"]

_EPSILON = 1e-5  # torch's, for layer norms


class _Maker:
    """Makes the layers of one model: structured or dense, by their role, as torch's LinearFactory."""

    def __init__(self, structure: StructureConfig, default_layers: str, **common: Any) -> None:
        self.structure, self.common = structure, common
        self.roles = LAYER_PRESETS[structure.layers or default_layers]

    def __call__(
        self, d_in: int, d_out: int, *, role: str = "hidden", bias: bool = True, zero_init: bool = False,
        gain: bool = True,
    ) -> StructuredLinear:  # fmt: skip
        config, more = self.structure, {"use_bias": bias, "zero_init": zero_init, **self.common}
        if role not in self.roles:
            return StructuredLinear(d_in, d_out, structure="dense", **more)
        capped = {"rms_cap": config.rms_cap, "gain": gain and config.rms_cap, "rule": config.rule}
        return StructuredLinear(d_in, d_out, structure=config.name, **capped, **more, **config.options)

    def norm(self, size: int, bias: bool = True) -> nnx.LayerNorm:
        return nnx.LayerNorm(size, epsilon=_EPSILON, use_bias=bias, use_fast_variance=False, **self.common)

    def embedding(self, count: int, size: int) -> nnx.Embed:
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
        _check_images(x, self.config.value.input_shape)
        h = nnx.gelu(self.input(x.reshape(len(x), -1)[:, self.permutation[...]]), approximate=False)
        for block in self.blocks:
            h = block(h)
        return self.output(h)


class Attention(nnx.Module):
    """Multi-head attention with LayerNorm on queries and keys, as in torch. (batch, tokens, width) -> the same."""

    def __init__(self, linear: _Maker, width: int, heads: int, head_dim: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.query = linear(width, inner, bias=False, zero_init=True, gain=False)
        self.key = linear(width, inner, bias=False, gain=False)
        self.value = linear(width, inner, bias=False)
        self.query_norm = linear.norm(head_dim)
        self.key_norm = linear.norm(head_dim)
        self.out = linear(inner, width, zero_init=True)

    def __call__(self, x: Array) -> Array:
        split = (*x.shape[:-1], self.heads, self.head_dim)
        q = self.query_norm(self.query(x).reshape(split))
        k = self.key_norm(self.key(x).reshape(split))
        v = self.value(x).reshape(split)
        # Not jax.nn.dot_product_attention, which takes the softmax of float64 in float32.
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * (8 / self.head_dim)
        shares = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(v.dtype)
        y = jnp.einsum("...hqk,...khd->...qhd", shares, v)
        return self.out(y.reshape(*x.shape[:-1], -1))


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``; both branches zero at initialisation."""

    def __init__(self, linear: _Maker, width: int, heads: int, head_dim: int, expansion: int) -> None:
        self.attention_norm = linear.norm(width)
        self.attention = Attention(linear, width, heads, head_dim)
        self.ffn_norm = linear.norm(width)
        self.up = linear(width, expansion * width)
        self.down = linear(expansion * width, width, zero_init=True)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.ffn_norm(x)), approximate=False))


class ViT(nnx.Module):
    """Vision transformer with a class token: :class:`structlin_nn.models.ViT`.

    (batch, channels, height, width) -> logits (batch, num_classes).

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
        """(batch, channels, height, width) -> (batch, patches, patch * patch * channels)."""
        n, channels, height, width = x.shape
        p = self.config.value.patch
        x = x.reshape(n, channels, height // p, p, width // p, p)
        return x.transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * channels)

    def __call__(self, x: Array) -> Array:
        _check_images(x, self.config.value.input_shape)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(self.patchify(x))))
        token, positions = self.class_token(jnp.zeros((len(x), 1), int)), self.positions(jnp.arange(x.shape[1] + 1))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1) + positions.astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


MODELS = {"cifar-mlp": MLP, "cifar-vit": ViT, "imagenet-vit": ViT}
"""The models that there are in flax, by the names of :data:`structlin_nn.models.MODELS`."""


def build_model(
    name: str, *, width: int, structure: StructureConfig | None = None, dtype: Any = None,
    param_dtype: Any = jnp.float32, rngs: nnx.Rngs, **sizes: Any,
) -> MLP | ViT:  # fmt: skip
    """A model of :data:`MODELS` at a width, as :func:`structlin_nn.models.build_model`.

    Args:
        name: ``cifar-mlp``, ``cifar-vit`` or ``imagenet-vit``.
        width: features of the residual stream.
        structure: structure of the linear layers; None: all dense.
        dtype: of the computation, as in :class:`StructuredLinear`.
        param_dtype: of parameters.
        rngs: source of the keys.
        **sizes: sizes other than the named model's.

    Raises:
        ValueError: unknown model, size or structure, or sizes that do not fit.
        TypeError: a ``structure`` that is no StructureConfig.

    >>> structure = StructureConfig("block_tensor_train")
    >>> model = nnx.eval_shape(lambda: build_model("cifar-mlp", width=64, structure=structure, rngs=nnx.Rngs(0)))
    >>> sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    49162
    """
    _check_name(name)
    config = models.build_model(name, width=width, structure=structure, device="meta", **sizes).config
    return MODELS[name](config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)  # type: ignore[arg-type]


def base_model(name: str, base_width: int | None = None, **sizes: Any) -> MLP | ViT:
    """The dense model at base width, abstract: what learning-rate multipliers are relative to.

    Arguments and errors are those of :func:`structlin_nn.models.base_model`.

    >>> base_model("cifar-mlp").input.in_features
    3072
    """
    _check_name(name)
    config = models.base_model(name, base_width, **sizes).config
    return nnx.eval_shape(lambda: MODELS[name](config, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


class _Static:
    """A configuration as a static attribute: nnx wants those hashable, and compares them for jit."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(repr(self.value))


def _check_name(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"flax has the models {', '.join(MODELS)}, got {name!r}")


def _check_images(x: Array, shape: tuple[int, int, int]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"images of shape (batch, *{shape}) are needed, got {tuple(x.shape)}")
