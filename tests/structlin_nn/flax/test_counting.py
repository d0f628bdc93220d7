"""Counts of jax functions and flax models, against torch's, XLA's and formulas by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import structlin
from structlin_nn import models
from structlin_nn.flax import StructuredLinear
from structlin_nn.flax.counting import count, xla_flops
from structlin_nn.models import flax as flax_models
from structlin_nn.torch import counting as torch_counting


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "low_rank": {"rank": 3},
    "monarch": {"blocks": 3},
    "block_tensor_train": {"rank": 2},
    "tensor_train": {"rank": 3},
    "kronecker": {},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["cifar-mlp", "cifar-vit"])
def test_models_as_in_torch(name: str, structure: str) -> None:
    """The same MACs forward, and at least as many in training: what is computed again counts again."""
    config = models.StructureConfig(structure, STRUCTURES[structure], layers="intermediate")
    sizes = {"width": 24, "num_classes": 7} | ({"heads": 3, "head_dim": 10} if name == "cifar-vit" else {})
    ours = nnx.eval_shape(lambda: flax_models.build_model(name, structure=config, rngs=nnx.Rngs(0), **sizes))
    theirs = models.build_model(name, structure=config, device="meta", **sizes)
    torch_count = torch_counting.count(theirs, theirs.example_input(3, device="meta"))
    counted = count(ours, array(3, 3, 32, 32), training=True)
    assert counted.params == torch_count.params
    assert counted.macs == torch_count.macs()
    assert counted.training_macs is not None
    assert torch_count.training_macs <= counted.training_macs <= 1.4 * torch_count.training_macs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layer(structure: str) -> None:
    layer = nnx.eval_shape(
        lambda: StructuredLinear(24, 30, structure=structure, rngs=nnx.Rngs(0), **STRUCTURES[structure])
    )
    counted = count(layer, array(2, 5, 24))
    assert counted.macs == 10 * structlin.design(structure, (30, 24), **STRUCTURES[structure]).macs


def test_products_are_all_that_xla_counts() -> None:
    def function(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bjk,kl->bil", a, b, c)

    inputs = array(3, 5, 7), array(3, 7, 11), array(11, 2)
    counted = count(function, *inputs)
    assert 2 * counted.macs == xla_flops(function, *inputs)
    assert counted.uncounted_ops == {}


def test_convolution_against_torch() -> None:
    for groups, stride in ((1, 1), (2, 3)):
        kernel, x = array(8, 6 // groups, 3, 2), array(4, 6, 11, 13)

        def function(x: jax.Array, kernel: jax.Array, stride: int = stride, groups: int = groups) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, 1), "VALID", feature_group_count=groups,
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
            )  # fmt: skip

        layer = torch.nn.Conv2d(6, 8, (3, 2), (stride, 1), groups=groups, device="meta")
        expected = torch_counting.count(layer, torch.zeros(4, 6, 11, 13, device="meta")).macs()
        assert count(function, x, kernel).products == {"conv_general_dilated": expected}


def test_control_flow() -> None:
    w, x = array(6, 6), array(4, 6)
    step = 4 * 36

    def repeated(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=5)[0]

    counted = count(repeated, x, w)
    assert (counted.macs, counted.uncounted_ops) == (5 * step, {"tanh": 5})
    assert count(jax.jit(jax.checkpoint(repeated)), x, w).macs == 5 * step
    assert count(jax.checkpoint(repeated), x, w, training=True).training_macs == 4 * 5 * step, "forward twice"
    assert count(repeated, x, w, training=True).training_macs == 3 * 5 * step
    assert count(jax.vmap(repeated, (0, None)), array(3, 4, 6), w).macs == 3 * 5 * step

    def either(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)

    assert count(either, x, w).macs == 2 * step, "the dearest branch"

    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h @ w, x)

    counted = count(until, x, w)
    assert (counted.macs, counted.unbounded) == (0, (step,))

    @jax.custom_vjp
    def own(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    counted = count(own, x, w, training=True)
    assert (counted.macs, counted.training_macs) == (step, 3 * step)


def test_integers_have_no_gradient() -> None:
    def function(table: jax.Array, tokens: jax.Array, w: jax.Array) -> jax.Array:
        return table[tokens] @ w

    counted = count(function, array(9, 6), array(2, 3, dtype="int32"), array(6, 4), training=True)
    assert (counted.macs, counted.training_macs) == (6 * 24, 3 * 6 * 24)
    assert counted.params == 0
    with pytest.raises(TypeError, match="a module or a function is needed, got 3"):
        count(3)  # type: ignore[arg-type]
