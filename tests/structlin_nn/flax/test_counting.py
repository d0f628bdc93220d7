"""Counts of jax functions and flax models against those of torch and XLA, and against formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import structlin
from structlin_nn import models
from structlin_nn._flops import FLOPS
from structlin_nn.flax import StructuredLinear, counting, register_no_product, register_primitive
from structlin_nn.flax.counting import UnknownPrimitiveError, count
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


# Without the slow tests, each structure with one of the models.
@pytest.mark.parametrize(
    ("name", "structure"),
    [
        pytest.param(name, structure, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, name in enumerate(["cifar-mlp", "cifar-vit"])
        for j, structure in enumerate(STRUCTURES)
    ],
)
def test_models_as_in_torch(name: str, structure: str) -> None:
    """The same MACs forward, and at least as many in training: what is computed again counts again."""
    config = models.StructureConfig(structure, STRUCTURES[structure], layers="intermediate")
    sizes = {"width": 24, "depth": 1, "num_classes": 7} | ({"heads": 3, "head_dim": 10} if name == "cifar-vit" else {})
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
    """By the cost analysis of XLA before optimisation, in FLOPs."""

    def function(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bjk,kl->bil", a, b, c)

    inputs = array(3, 5, 7), array(3, 7, 11), array(11, 2)
    counted = count(function, *inputs)
    assert 2 * counted.macs == jax.jit(function).lower(*inputs).cost_analysis()["flops"]
    assert counted.uncounted_ops == {}


def test_python_numbers_are_inputs() -> None:
    class Scaled(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array, scale: float) -> jax.Array:
            return self.linear(x) * scale

    module = nnx.eval_shape(Scaled)
    for number in (3, 2.5, True):
        assert count(module, array(2, 3), number).macs == 24
        assert count(lambda x, s: s * (x @ x.T), array(2, 3), number, training=True).macs == 12


LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "groups", "dilation"),
    [
        ((11, 13), (3, 2), (1, 1), (0, 0), 1, (1, 1)),  # the gradient of the input pads by more than this
        ((11, 13), (3, 2), (3, 1), (1, 0), 2, (1, 1)),
        ((11, 13), (4, 3), (2, 3), (1, 1), 1, (1, 2)),
        ((2, 1), (3, 5), (1, 1), (1, 2), 2, (1, 1)),  # a kernel longer than the input
        ((12, 8), (4, 4), (4, 4), (0, 0), 1, (1, 1)),
    ],
)
def test_convolution_against_torch(
    size: tuple, kernel: tuple, stride: tuple, padding: tuple, groups: int, dilation: tuple
) -> None:
    """Forward, and with both gradients: zeros between the entries of an input do not count."""

    def function(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, weight, stride, [(n, n) for n in padding], rhs_dilation=dilation, feature_group_count=groups,
            dimension_numbers=LAYOUT,
        )  # fmt: skip

    layer = torch.nn.Conv2d(6, 8, kernel, stride, padding, dilation, groups, bias=False, device="meta")
    expected = torch_counting.count(layer, torch.zeros(5, 6, *size, device="meta", requires_grad=True))
    counted = count(function, array(5, *size, 6), array(*kernel, 6 // groups, 8), training=True)
    assert counted.products == {"conv_general_dilated": expected.macs()}
    assert counted.training_macs == expected.training_macs
    batched = count(jax.vmap(function, (0, None)), array(2, 5, *size, 6), array(*kernel, 6 // groups, 8), training=True)
    assert batched.training_macs == 2 * expected.training_macs


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [((5, 7), (3, 2), (2, 3), (0, 0)), ((1, 1), (4, 3), (1, 1), (0, 0)), ((5, 7), (4, 3), (2, 1), (1, 1))],
)
def test_transposed_convolution_against_torch(size: tuple, kernel: tuple, stride: tuple, padding: tuple) -> None:
    def function(x: jax.Array, weight: jax.Array) -> jax.Array:
        pads = [(k - 1 - n, k - 1 - n) for k, n in zip(kernel, padding, strict=True)]
        return jax.lax.conv_general_dilated(x, weight, (1, 1), pads, lhs_dilation=stride, dimension_numbers=LAYOUT)

    layer = torch.nn.ConvTranspose2d(6, 8, kernel, stride, padding, bias=False, device="meta")
    expected = torch_counting.count(layer, torch.zeros(5, 6, *size, device="meta", requires_grad=True))
    assert expected.macs() == 5 * 6 * 8 * size[0] * size[1] * kernel[0] * kernel[1]
    counted = count(function, array(5, *size, 6), array(*kernel, 6, 8), training=True)
    assert (counted.macs, counted.training_macs) == (expected.macs(), expected.training_macs)


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

    def counting_fft(x: jax.Array, w: jax.Array) -> jax.Array:
        shared = (lambda: x @ w, lambda: jnp.fft.fft(x @ w).real)
        return jax.lax.cond(x.sum() > 0, *shared) + jax.lax.cond(x.sum() > 0, *shared[::-1])

    assert count(counting_fft, x, w).other_flops == 2 * count(jnp.fft.fft, x).other_flops, "of equal MACs"

    def unknown(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: x, x, x)

    def hidden(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: unknown(x))
        return jax.lax.while_loop(lambda h: h.sum() < 1, unknown, y)

    assert count(hidden, x, w).unknown_ops == {"pure_callback": 2}, "in a cheaper branch and in a loop"

    two = count(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: until(x, w), lambda: x @ w), x, w)
    assert (two.macs, two.unbounded) == (step, (step,)), "the loop of the other branch"

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
    with pytest.raises(TypeError, match=r"model must be an nnx.Module or a function, got 3"):
        count(3)  # type: ignore[arg-type]


class TestTraining:
    def test_modules_with_state(self) -> None:
        """Of dropout and batch normalisation no products; of a cell the gradient of its state, too."""
        rngs = nnx.Rngs(0)
        linear, x = nnx.Linear(8, 5, rngs=rngs), array(3, 8)
        for more in (nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)):
            for training in (False, True):
                counted = count(nnx.Sequential(linear, more), x, training=training)
                assert (counted.macs, counted.training_macs) == (120, 240 if training else None)
        counted = count(nnx.RNN(nnx.LSTMCell(7, 5, rngs=rngs)), array(2, 9, 7), training=True)
        forward, state = 2 * 9 * (7 + 5) * 20, 2 * 9 * 5 * 20
        assert (counted.macs, counted.training_macs) == (forward, 2 * forward + state)

    def test_all_floating_inputs(self) -> None:
        product = 3 * 4 * 5
        keyword = count(lambda x, w: x @ w, array(3, 4), w=array(4, 5), training=True)
        assert (keyword.macs, keyword.training_macs) == (product, 3 * product)
        parameters = {"table": array(7, 4), "rows": array(3, dtype="int32"), "key": jax.random.key(0)}
        mixed = count(lambda d, w: d["table"][d["rows"]] @ w, parameters, array(4, 5), training=True)
        assert mixed.training_macs == 3 * product

    def test_no_floating_inputs(self) -> None:
        """The gradient of nothing costs nothing, as in torch."""
        counted = count(lambda x: x @ x, array(4, 4, dtype="int32"), training=True)
        assert (counted.macs, counted.training_macs) == (64, 64)
        assert count(lambda x: (x @ x).argmax(), array(4, 4), training=True).macs == 64

    def test_complex_results(self) -> None:
        counted = count(lambda x, w: x @ w, array(3, 4, dtype="complex64"), array(4, 5), training=True)
        assert (counted.macs, counted.training_macs) == (60, 180)
        shapes = ((3, 4), (4, 5))
        operands = [torch.zeros(n, dtype=torch.complex64, device="meta", requires_grad=True) for n in shapes]
        with torch_counting.Counting() as counting_torch:
            (operands[0] @ operands[1]).sum().real.backward()
        assert counting_torch.result.training_macs == 180


class TestLists:
    def test_lists_are_apart(self) -> None:
        lists = (counting.FREE, counting._NAMED, counting._COMPOSITE, frozenset(counting._FORMULAS))
        assert len(frozenset.union(*lists)) == sum(map(len, lists))

    def test_unknown_first(self) -> None:
        def call(x: Any) -> Any:
            return jax.pure_callback(lambda x: x, x, x) @ x

        found = count(call, array(3, 3), training=False)
        assert found.unknown_ops == {"pure_callback": 1}
        lines = str(found).splitlines()
        assert lines[0] == "UNKNOWN primitives: pure_callback x1"
        assert any(line.startswith("forward MACs") and "without UNKNOWN" in line for line in lines)
        assert found.to_dict()["macs"] == 27
        with pytest.raises(UnknownPrimitiveError, match="pure_callback x1; register them with register_primitive"):
            count(call, array(3, 3), strict=True)
        try:
            register_primitive("pure_callback")(lambda equation: 5)
            assert count(call, array(3, 3), strict=True).products == {"pure_callback": 5, "dot_general": 27}
            register_primitive("pure_callback")(lambda equation: (5, 4))
            assert count(call, array(3, 3), strict=True).other_flops == 4
            register_no_product("pure_callback")
            assert count(call, array(3, 3), strict=True).uncounted_ops == {"pure_callback": 1}
        finally:
            counting._REGISTERED_FREE.discard("pure_callback")


class TestFormulas:
    @pytest.mark.parametrize(
        ("call", "macs"),
        [
            (lambda a, b: jnp.linalg.cholesky(a), 3 * FLOPS["cholesky"](6) / 2),
            (lambda a, b: jax.scipy.linalg.solve_triangular(a, b), 3 * FLOPS["triangular_solve"](6, 4) / 2),
            (lambda a, b: jnp.linalg.solve(a, b), 3 * (FLOPS["lu"](6, 6) + FLOPS["lu_solve"](6, 4)) / 2),
            (lambda a, b: jnp.linalg.eigh(a)[1], 3 * FLOPS["eigh"](6) / 2),
            (lambda a, b: jnp.linalg.svd(b, compute_uv=False), 3 * FLOPS["svdvals"](6, 4) / 2),
            (lambda a, b: jnp.linalg.svd(b, full_matrices=False)[0], 3 * FLOPS["svd"](6, 4) / 2),
            (lambda a, b: jnp.linalg.qr(b)[0], 3 * (FLOPS["qr"](6, 4) + FLOPS["householder_product"](6, 4, 4)) / 2),
            (lambda a, b: jnp.linalg.eigvals(a), 3 * FLOPS["eigvals"](6) / 2),
            (lambda a, b: jnp.linalg.slogdet(a)[1], 3 * FLOPS["lu"](6, 6) / 2),
        ],
    )  # fmt: skip
    def test_factorisations(self, call: Any, macs: float) -> None:
        """Three matrices of 6 x 6, and right-hand sides 6 x 4; of a solve neither its checks nor its derivatives."""
        assert count(call, array(3, 6, 6), array(3, 6, 4), strict=True).macs == pytest.approx(float(macs), abs=3)

    def test_groups(self) -> None:
        """Rows of groups meet one matrix each, and the gradient of the matrices costs the same."""
        found = count(jax.lax.ragged_dot, array(8, 5), array(3, 5, 7), array(3, dtype="int32"), strict=True)
        assert found.macs == 8 * 5 * 7
        loss = lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([2, 5, 1]))  # noqa: E731
        assert count(loss, array(8, 5), array(3, 5, 7), training=True, strict=True).training_macs == 3 * 8 * 5 * 7

    def test_transforms(self) -> None:
        flops = [count(call, array(3, 10)).other_flops for call in (jnp.fft.rfft, jnp.fft.fft, lambda x: jnp.fft.irfft(
            jnp.fft.rfft(x)))]  # fmt: skip
        one = 3 * 84  # ceil(2.5 * 10 * log2(10))
        assert flops == [one, 3 * 167, 2 * one]
        trained = count(jnp.fft.rfft, array(3, 10), training=False)
        assert (trained.macs, trained.products) == (0, {})
        real = count(lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2, array(3, 10), training=True)
        assert real.training_other_flops == 2 * one

    def test_sparse(self) -> None:
        from jax.experimental import sparse

        matrix = sparse.BCOO.fromdense(jnp.array([[1.0, 0, 2, 0], [0, 0, 3, 0], [4, 5, 0, 0]]))
        assert count(lambda x: matrix @ x, array(4, 7), strict=True).macs == 5 * 7
