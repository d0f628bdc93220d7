"""replace_linear and to_dense_linear on nnx models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import structlin
from structlin_nn.flax import StructuredLinear, replace_linear, to_dense_linear


class Small(nnx.Module):
    """Layers in every place that nnx has, some of them shared; zero, since only sizes matter here."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        zero = {"kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.first = nnx.Linear(8, 12, **zero)
        self.blocks = nnx.List([nnx.Linear(12, 12, use_bias=False, **zero) for _ in range(2)])
        self.again = self.blocks[0]
        self.inner = nnx.Dict(up=nnx.Linear(12, 8, dtype=jnp.bfloat16, **zero))
        self.attention = nnx.MultiHeadAttention(2, 8, **zero)
        self.head = nnx.Linear(8, 11, use_bias=False, **zero)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.inner.up(self.again(h)))


@pytest.fixture
def model() -> Small:
    return Small(nnx.Rngs(0))


def replaced(model: nnx.Module, structure="low_rank", **more):
    return replace_linear(model, structure, rngs=nnx.Rngs(1), **more)


def names(report) -> list[str]:
    return [" = ".join(row.names) for row in report.layers]


class TestSelection:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("all", ["first", "blocks.0 = again", "blocks.1", "inner.up", "head"]),
            ("all_but_last", ["first", "blocks.0 = again", "blocks.1", "inner.up"]),
            ("intermediate", ["blocks.0 = again", "blocks.1", "inner.up"]),
            ("blocks.*", ["blocks.0 = again", "blocks.1"]),
            (["again", re.compile(r"inner\.\w+")], ["blocks.0 = again", "inner.up"]),
            (lambda name, layer: layer.out_features == 8, ["inner.up"]),
        ],
        ids=["all", "all_but_last", "intermediate", "glob", "several", "predicate"],
    )
    def test_takes_the_layers_named(self, model: Small, layers, expected: list[str]) -> None:
        report = replaced(model, "dense", layers=layers)
        assert names(report) == expected
        found = {p for p, m in nnx.iter_modules(model) if isinstance(m, StructuredLinear)}
        assert len(found) == len(expected)

    def test_says_what_is_left_alone(self, model: Small) -> None:
        report = replaced(model, "dense", layers="all", exclude="head")
        assert [name for name, _ in report.skipped] == [
            f"attention.{name}" for name in ("query", "key", "value", "out")
        ]
        assert {reason for _, reason in report.skipped} == {"a LinearGeneral, not an nnx.Linear"}
        assert isinstance(model.attention.query, nnx.LinearGeneral)
        assert isinstance(model.head, nnx.Linear)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layers": "blocs.*"}, r"no linear layer matches 'blocs.\*'; the linear layers are first, blocks.0"),
            ({"layers": "attention.query"}, "no linear layer matches 'attention.query'"),
            ({"exclude": "nothing"}, "exclude: no linear layer matches"),
            ({"zero_init": "head"}, "zero_init: no linear layer matches 'head'"),
            ({"layers": lambda name, layer: False}, "leaves no layer to replace"),
            ({"shared_weights": "maybe"}, "one of 'error', 'skip'"),
            ({"structure": "permutation"}, r"layer 'first' \(8 -> 12\)"),
        ],
    )
    def test_refuses(self, model: Small, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replaced(model, **arguments)
        assert not any(isinstance(m, StructuredLinear) for _, m in nnx.iter_modules(model))

    def test_model_without_linear_layers_or_that_is_one(self) -> None:
        with pytest.raises(ValueError, match=r"no linear layers \(nnx.Linear\)"):
            replaced(nnx.eval_shape(lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0))))
        with pytest.raises(ValueError, match="put it in a container"):
            replaced(nnx.eval_shape(lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0))))


class TestNewLayers:
    def test_keep_biases_dtypes_and_sharing(self, model: Small) -> None:
        replaced(model, "dense", layers="all", zero_init="inner.*")
        assert model.again is model.blocks[0]
        assert model.blocks[0].bias is None
        assert model.first.bias is not None
        assert model.inner.up.dtype == jnp.bfloat16
        assert model.inner.up.zero_init
        assert not model.first.zero_init

    def test_counts(self, model: Small) -> None:
        report = replaced(model, "low_rank", rank=2, layers=["first", "blocks.0"])
        first, block = report.layers
        assert (first.params_before, first.params_after) == (8 * 12 + 12, 2 * (8 + 12) + 12)
        assert (block.macs_before, block.macs_after) == (144, 48)
        assert "total" in str(report)

    def test_structure_by_function(self, model: Small) -> None:
        def chosen(name: str, layer: nnx.Linear) -> structlin.AbstractStructure:
            rank = 1 if name == "first" else 3
            return structlin.design("low_rank", (layer.out_features, layer.in_features), rank=rank)

        replaced(model, chosen)
        assert [model.first.structure.rank_bound, model.blocks[1].structure.rank_bound] == [1, 3]


class TestRefusals:
    def test_tied_weights(self, model: Small) -> None:
        model.inner.up.kernel = model.blocks[0].kernel
        with pytest.raises(ValueError, match=r"layer 'blocks.0' shares inner.up.kernel"):
            replaced(model)
        report = replaced(model, "low_rank", shared_weights="skip")
        assert names(report) == ["first", "blocks.1"]
        assert report.skipped[-1][0] == "inner.up"
        with pytest.raises(ValueError, match="all selected layers share their weights"):
            replaced(model, layers="again", shared_weights="skip")

    def test_layers_that_compute_something_else(self) -> None:
        class Doubled(nnx.Linear):
            def __call__(self, x: jax.Array) -> jax.Array:
                return 2 * super().__call__(x)

        model = nnx.eval_shape(lambda: nnx.Sequential(Doubled(4, 4, rngs=nnx.Rngs(0))))
        with pytest.raises(ValueError, match="Doubled, whose forward pass"):
            replaced(model, layers="all")
        own = {"precision": "highest", "preferred_element_type": jnp.float32}
        model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0), **own)))
        with pytest.raises(ValueError, match="has its own precision, preferred_element_type"):
            replaced(model, layers="all")

    def test_stacked_layers_and_tuples(self) -> None:
        class Holder(nnx.Module):
            def __init__(self, held) -> None:
                self.held = nnx.data(held)

        def stack(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(4, 4, rngs=rngs)

        made = nnx.eval_shape(lambda: Holder(nnx.split_rngs(splits=3)(nnx.vmap(stack))(nnx.Rngs(0))))
        with pytest.raises(ValueError, match=r"kernel of shape \(3, 4, 4\), stacked by nnx.vmap"):
            replaced(made, layers="all")
        held = nnx.eval_shape(lambda: Holder((nnx.Linear(4, 4, rngs=nnx.Rngs(0)),)))
        with pytest.raises(ValueError, match="is an entry of a tuple"):
            replaced(held, layers="all")


@pytest.mark.slow
def test_back_to_dense() -> None:
    rngs = nnx.Rngs(0)
    structured = StructuredLinear(10, 8, structure="block_tensor_train", rms_cap=True, rngs=rngs)
    structured.factors[0][...] *= 3  # beyond its cap
    structured.gains[1][...] = jnp.full_like(structured.gains[1][...], 0.5)
    structured.bias[...] = jnp.arange(8.0, dtype=jnp.float32)
    model = nnx.Sequential(structured, structured.__class__(8, 6, structure="toeplitz", use_bias=False, rngs=rngs))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 10)), jnp.float32)
    before = model(x)
    report = to_dense_linear(model)
    assert [type(layer) for layer in model.layers] == [nnx.Linear, nnx.Linear]
    assert model.layers[1].bias is None
    assert report.layers[0].macs_after == 80
    np.testing.assert_allclose(model(x), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"no linear layers \(StructuredLinear\)"):
        to_dense_linear(model)


def test_back_to_dense_after_a_cast() -> None:
    model = nnx.Sequential(StructuredLinear(16, 16, structure="monarch", blocks=4, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    x = jnp.ones((2, 16), jnp.bfloat16)
    before = model(x)
    to_dense_linear(model)
    assert {model(x).dtype, model.layers[0].kernel.dtype, model.layers[0].bias.dtype} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(np.float32(model(x)), np.float32(before), atol=0.05)
