"""StructuredLinear of flax.nnx: against a float64 oracle, against torch, and everything that nnx does to a module."""

import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from helpers.children import output
from helpers.layers import EXAMPLES
from jax.test_util import check_grads

import structlin
from structlin.testing import dense_matrix
from structlin_nn.convert import to_flax, to_torch
from structlin_nn.flax import Index, StructuredLinear
from structlin_nn.torch import StructuredLinear as TorchLinear

FEW = [
    ("dense", (7, 5), {}),
    ("block_tensor_train", (35, 6), {"rank": 2}),
    ("monarch", (10, 21), {"blocks": 3}),  # padded and cut
    ("toeplitz", (5, 7), {}),
    ("permutation", (6, 6), {}),
]


def pair(
    name: str, shape: tuple[int, int], options: dict, dtype: str = "float64", **more
) -> tuple[TorchLinear, StructuredLinear]:
    """The same layer in torch and in flax, with random bias and, where there are any, gains other than 1."""
    torch.manual_seed(0)
    theirs = TorchLinear(shape[1], shape[0], structure=name, dtype=getattr(torch, dtype), **options, **more)
    with torch.no_grad():
        for parameter in (theirs.bias, *(theirs.gains or ())):
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = nnx.eval_shape(
        lambda: StructuredLinear(
            shape[1], shape[0], structure=name, param_dtype=dtype, rngs=nnx.Rngs(0), **options, **more
        )
    )
    to_flax(theirs.state_dict(), ours)
    return theirs, ours


def matrix(layer: StructuredLinear) -> np.ndarray:
    """A in float64, from the stored parameters, without the layer's, the chain's or the operator's code."""
    factors = [np.asarray(f[...], np.float64) for f in layer.factors]
    if layer.rms_cap:
        sigmas = [s for s, f in zip(layer.cap_sigma, layer.structure.factors, strict=True) if f.trainable]
        gains = [1.0] * len(factors) if layer.gains is None else [np.asarray(g[...]).item() for g in layer.gains]
        factors = [
            f * g * min(1.0, s / math.sqrt((f**2).sum() / f.size))
            for f, g, s in zip(factors, gains, sigmas, strict=True)
        ]
    for number, spec in enumerate(layer.structure.factors):
        if not spec.trainable:
            factors.insert(number, np.asarray(getattr(layer, f"index{number}")[...]))
    return dense_matrix(layer.structure, factors)


def arrays(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("rms_cap", "name", "shape", "options"),
    [(cap, *case) for cap, cases in ((False, FEW), (True, FEW[1:3])) for case in cases],
    ids=lambda value: str(value),
)
def test_is_the_matrix_and_bias(rms_cap: bool, name: str, shape: tuple[int, int], options: dict) -> None:
    _, layer = pair(name, shape, options, rms_cap=rms_cap)
    x = np.random.default_rng(0).standard_normal((3, 2, shape[1]))
    expected = x @ matrix(layer).T + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.operator.to_dense(), matrix(layer), rtol=1e-11, atol=1e-12)
    assert layer.structure.num_params == sum(f.size for f in layer.factors)


def check_parity(name: str, shape: tuple[int, int], options: dict, dtype: str, tolerance: float, **more) -> None:
    """Outputs and gradients, of input and parameters, of the same factors in torch and flax."""
    theirs, ours = pair(name, shape, options, dtype, **more)
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal((5, size)).astype(dtype) for size in (shape[1], shape[0]))
    there = torch.from_numpy(x).requires_grad_()
    y = theirs(there)
    (torch.from_numpy(weight) * torch.sin(y)).sum().backward()

    def loss(layer: StructuredLinear, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer(x)
        return (weight * jnp.sin(y)).sum(), y

    differentiated = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, ours_y), (gradients, of_input) = differentiated(ours, jnp.asarray(x))

    def close(ours, theirs: torch.Tensor) -> None:
        expected = theirs.detach().numpy()
        scale = max(1.0, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=tolerance * scale)

    close(ours_y, y)
    close(of_input, there.grad)
    for number, parameter in enumerate(theirs.factors):
        close(gradients["factors"][number][...], parameter.grad)
    for number, parameter in enumerate(theirs.gains or ()):
        close(gradients["gains"][number][...], parameter.grad)
    close(gradients["bias"][...], theirs.bias.grad)


@pytest.mark.parametrize(("name", "shape", "options"), FEW[1:3], ids=lambda value: str(value))
def test_agrees_with_torch(name: str, shape: tuple[int, int], options: dict) -> None:
    check_parity(name, shape, options, "float32", 1e-5, rms_cap=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_agrees_with_torch_for_every_structure(
    name: str, shape: tuple[int, int], options: dict, dtype: str, tolerance: float
) -> None:
    check_parity(name, shape, options, dtype, tolerance)
    if any(f.trainable for f in structlin.design(name, shape, **options).factors):
        check_parity(name, shape, options, dtype, tolerance, rms_cap=True)


class TestInitialisation:
    def test_deviations_are_those_of_the_rule(self) -> None:
        layer = StructuredLinear(600, 500, structure="low_rank", rank=40, rngs=nnx.Rngs(3), rule="rank_corrected")
        expected = structlin.init_std(layer.structure, rule="rank_corrected")
        for factor, std in zip(layer.factors, expected, strict=True):
            assert float(factor[...].std()) == pytest.approx(std, rel=0.03)
            assert abs(float(factor[...].mean())) < 0.02 * std
        assert float(jnp.abs(layer.bias[...]).max()) == 0
        other = StructuredLinear(600, 500, structure="low_rank", rank=40, rngs=nnx.Rngs(4), rule="rank_corrected")
        assert not np.allclose(layer.factors[0][...], other.factors[0][...])

    def test_zero_init_zeroes_the_last_factor_and_keeps_its_cap(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", rank=2, zero_init=True, rms_cap=True, rngs=nnx.Rngs(0))
        assert [bool((f[...] == 0).all()) for f in layer.factors] == [False, True]
        assert layer.init_std[1] == 0 < layer.cap_sigma[1]
        gradient = nnx.jit(nnx.grad(lambda m: m(jnp.ones(8)).sum()))(layer)
        assert all(np.isfinite(array).all() for array in arrays(gradient))
        assert float(jnp.abs(gradient["factors"][1][...]).max()) > 0

    def test_index_factors_are_permutations_and_not_trained(self) -> None:
        layer = StructuredLinear(6, 6, structure="permutation", use_bias=False, rngs=nnx.Rngs(0))
        assert isinstance(layer.index0, Index)
        assert sorted(layer.index0[...].tolist()) == list(range(6))
        assert jax.tree.leaves(nnx.state(layer, nnx.Param)) == []
        assert jax.tree.leaves(nnx.grad(lambda m: m(jnp.ones(6)).sum())(layer)) == []

    def test_gain_and_bias_are_left_out_on_request(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", use_bias=False, rms_cap=True, gain=False, rngs=nnx.Rngs(0))
        assert layer.bias is None
        assert layer.gains is None
        assert len(jax.tree.leaves(nnx.state(layer))) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"structure": "monarc"}, "monarc"),
            ({"structure": "low_rank", "blocks": 2}, "blocks"),
            ({"structure": structlin.design("dense", (3, 4))}, r"\(6, 8\)"),
            ({"structure": "dense", "gain": True}, "rms_cap"),
            ({"structure": "permutation", "rms_cap": True}, "no trainable factors"),
            ({"structure": "dense", "rule": "other"}, "rule"),
            ({"structure": "dense", "dtype": jnp.int32}, "floating or complex, got int32"),
            ({"structure": "toeplitz", "partition": {"i": "model"}}, "axes of a chain"),
            ({"structure": "low_rank", "partition": {"q": "model"}}, "no axis 'q'; its axes are iro"),
            ({"structure": "low_rank", "partition": {"i": "model", "r": "model"}}, "one mesh axis"),
        ],
    )
    def test_refuses_invalid_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            StructuredLinear(8, 8 if arguments["structure"] == "permutation" else 6, rngs=nnx.Rngs(0), **arguments)

    def test_refuses_an_input_of_another_size(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"in_features = 8, got shape \(2, 7\)"):
            layer(jnp.ones((2, 7)))


class TestDtypes:
    def test_dtype_is_that_of_the_computation(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        assert layer.factors[0].dtype == jnp.float32
        assert layer(jnp.ones((2, 8))).dtype == jnp.bfloat16

    def test_without_dtype_input_and_parameters_promote(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        assert layer(jnp.ones(8, jnp.float64)).dtype == jnp.float64
        assert layer(jnp.ones(8, jnp.bfloat16)).dtype == jnp.float32
        assert layer(jnp.ones(8, jnp.int32)).dtype == jnp.float32

    @pytest.mark.slow
    def test_complex(self) -> None:
        layer = StructuredLinear(8, 6, structure="low_rank", param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
        assert float(jnp.abs(layer.factors[0][...].imag).max()) > 0
        x = np.arange(8.0)
        np.testing.assert_allclose(layer(jnp.asarray(x)), layer.operator.to_dense() @ x, rtol=1e-5, atol=1e-5)


class TestTransforms:
    @pytest.fixture
    def layer(self) -> StructuredLinear:
        return pair("block_tensor_train", (35, 6), {"rank": 2}, rms_cap=True)[1]

    def test_jit_vmap_and_functional_form(self, layer: StructuredLinear) -> None:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
        expected = np.asarray(layer(x))
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), expected, atol=1e-12)
        np.testing.assert_allclose(jax.vmap(layer)(x), expected, atol=1e-12)
        graph, state = nnx.split(layer)
        np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x), expected, atol=1e-12)

    @pytest.mark.slow
    def test_remat(self, layer: StructuredLinear) -> None:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))

        def loss(layer: StructuredLinear, x: jax.Array) -> jax.Array:
            return jnp.sin(layer(x)).sum()

        plain = nnx.grad(loss)(layer, x)
        saved = nnx.grad(lambda m, x: nnx.remat(loss)(m, x))(layer, x)
        for ours, theirs in zip(arrays(plain), arrays(saved), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)

    @pytest.mark.slow
    def test_gradients_are_those_of_differences(self, layer: StructuredLinear) -> None:
        graph, state = nnx.split(layer)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)))
        check_grads(lambda s: nnx.merge(graph, s)(x), (state,), order=2, modes=["fwd", "rev"])

    @pytest.mark.slow
    def test_scan_over_stacked_layers(self) -> None:
        depth, width = 3, 12

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> StructuredLinear:
            return StructuredLinear(width, width, structure="monarch", blocks=3, rms_cap=True, rngs=rngs)

        stacked = stack(nnx.Rngs(0))
        assert all(f.shape[0] == depth for f in stacked.factors)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(h: jax.Array, layer: StructuredLinear) -> jax.Array:
            return jnp.tanh(layer(h))

        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, width)), jnp.float32)
        expected = x
        graph, state = nnx.split(stacked)
        for number in range(depth):
            expected = jnp.tanh(nnx.merge(graph, jax.tree.map(lambda a, n=number: a[n], state))(expected))
        np.testing.assert_allclose(forward(x, stacked), expected, atol=1e-6)
        gradient = nnx.grad(lambda layers: forward(x, layers).sum())(stacked)
        assert all(np.isfinite(array).all() for array in arrays(gradient))

    def test_representation_and_options(self) -> None:
        layer = StructuredLinear(12, 10, structure="kronecker", factorization=([5, 2], [3, 4]), rngs=nnx.Rngs(0))
        assert layer.options == {"factorization": ((5, 2), (3, 4))}
        assert "structure=kronecker factorization=((5, 2), (3, 4))" in repr(layer)
        hash(nnx.graphdef(layer))  # jit needs it


@pytest.mark.slow
def test_in_linen() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.bridge.to_linen(StructuredLinear, 6, 35, structure="block_tensor_train", rank=2, name="inner")(x)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)), jnp.float32)
    variables = Net().init(jax.random.key(0), x)
    factors = variables["params"]["inner"]["factors"]
    layer = StructuredLinear(6, 35, structure="block_tensor_train", rank=2, rngs=nnx.Rngs(0))
    for number, factor in enumerate(layer.factors):
        factor[...] = factors[number]
    np.testing.assert_allclose(Net().apply(variables, x), layer(x), rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda p: Net().apply({**variables, "params": p}, x).sum())(variables["params"])
    assert all(np.abs(array).max() > 0 for array in arrays(gradient))


def run_with_two_devices(code: str) -> None:
    """Run a program that sees two CPU devices; the number has to be chosen before jax starts."""
    output("-c", textwrap.dedent(code), XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_ENABLE_X64="1")


@pytest.mark.parametrize("axis", "pafre")
def test_partitions_under_an_explicit_mesh(axis: str) -> None:
    """They change neither values nor gradients; the product has the sharding of x and of the axes that stay."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    make = functools.partial(StructuredLinear, 16, 24, structure="monarch", blocks=4, param_dtype=jnp.float64)
    whole, x = make(rngs=nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16)))
    run = nnx.value_and_grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=(0, 1))
    with jax.set_mesh(mesh):
        split = make(partition={axis: "model"}, rngs=nnx.Rngs(0))
        for spec in (("data",), (("data", "model"),)):
            placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
            features = "model" if axis == "f" and spec == ("data",) else None
            assert jax.typeof(split(placed)).sharding.spec == jax.P(*spec, None, features)
            for a, b in zip(jax.tree.leaves(run(split, placed)), jax.tree.leaves(run(whole, x)), strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_partitions_over_two_devices() -> None:
    run_with_two_devices(
        """
        import itertools
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from structlin_nn.flax import StructuredLinear

        meshes = [jax.make_mesh((2,), ("model",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)]
        cases = [
            ("block_tensor_train", {"rank": 2}, {"c": "model"}),
            ("monarch", {"blocks": 4}, {"p": "model"}),
            ("low_rank", {"rank": 6}, {"r": "model"}),
            ("dense", {}, {"o": "model"}),
        ]
        x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 16)))

        def loss(layer, x):
            return jnp.sin(layer(x)).sum()

        for mesh, (name, options, partition) in itertools.product(meshes, cases):
            common = {"structure": name, "param_dtype": jnp.float64, **options}
            whole = StructuredLinear(16, 24, rngs=nnx.Rngs(0), **common)
            letters = dict(whole.structure.sizes)
            assert set(partition) <= set(letters), letters
            expected, gradients = nnx.jit(nnx.value_and_grad(loss))(whole, x)
            with jax.set_mesh(mesh):
                split = nnx.jit(lambda: StructuredLinear(16, 24, rngs=nnx.Rngs(0), partition=partition, **common))()
                placed = jax.device_put(x, NamedSharding(mesh, P()))
                value, theirs = nnx.jit(nnx.value_and_grad(loss))(split, placed)
            sharded = [v for v in jax.tree.leaves(nnx.state(split)) if not v.sharding.is_fully_replicated]
            assert sharded, name
            for array in sharded:
                assert {shard.data.size for shard in array.addressable_shards} == {array.size // 2}, name
            np.testing.assert_allclose(value, expected, rtol=1e-12)
            for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-10, atol=1e-12)
        """
    )


@pytest.mark.slow
def test_orbax_round_trip(tmp_path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    _, layer = pair("block_tensor_train", (35, 6), {"rank": 2}, rms_cap=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.to_pure_dict(nnx.state(layer)))
    abstract = nnx.eval_shape(
        lambda: StructuredLinear(
            6, 35, structure="block_tensor_train", rank=2, rms_cap=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    )
    graph, state = nnx.split(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "layer", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    again = nnx.merge(graph, state)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)))
    np.testing.assert_array_equal(again(x), layer(x))


@pytest.mark.slow
def test_import_needs_no_torch() -> None:
    code = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Missing())
    import structlin_nn.convert, structlin_nn.flax
    """
    output("-c", textwrap.dedent(code))


def test_state_is_that_of_torch() -> None:
    theirs, ours = pair("monarch", (10, 21), {"blocks": 3}, rms_cap=True)
    state = to_torch(ours)
    assert set(state) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_stacked_layers_outside_of_vmap_are_named() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs: nnx.Rngs) -> StructuredLinear:
        return StructuredLinear(16, 16, structure="low_rank", rank=3, rngs=rngs)

    with pytest.raises(ValueError, match=r"has shape \(2, 3, 16\), expected \(3, 16\): .* nnx.vmap or nnx.scan"):
        stacked(nnx.Rngs(0).split(2))(jnp.ones((2, 16)))
