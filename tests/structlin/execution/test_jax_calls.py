"""Chains in jax called in other ways: dtypes, donated inputs, exported programs, meshes and several devices."""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.children import output
from helpers.jax_chains import calls, close, exactly, gradients, inputs, portable, run

import structlin as sl
from structlin.execution.compiled import _target, _xla_runtime
from structlin.execution.products import products

COMPILED = _target.host() is not None and _xla_runtime.unsupported() is None


@pytest.fixture(autouse=True)
def by_passes(monkeypatch):
    monkeypatch.setenv("STRUCTLIN_EXECUTION", "compiled")


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_dtypes_without_doubles(dtype):
    x, factors = inputs(dtype=dtype)
    assert calls(run, x, factors) == (1 if COMPILED and dtype != "float16" else 0)
    exact = exactly(portable, x.astype("float32"), [f.astype("float32") for f in factors])
    found = run(x, factors)
    assert found.dtype == dtype
    assert np.linalg.norm(found.astype("float32") - exact) < {"float32": 1e-5}.get(dtype, 0.02) * np.linalg.norm(exact)


def test_doubles_that_were_made_elsewhere():
    """Where doubles are not enabled an array of them may still come along."""
    with jax.enable_x64(True):
        x, factors = inputs(dtype="float64")
        wanted = exactly(portable, x, factors)
    for function in (run, jax.jit(run)):
        found = function(x, factors)
        close(np.asarray(found), np.asarray(wanted), 1e-11 if found.dtype == "float64" else 1e-5)


def test_donated_inputs():
    x, factors = inputs()
    wanted = exactly(gradients(portable), x, factors), exactly(portable, x, factors)
    for function, exact in ((gradients(run), wanted[0]), (run, wanted[1])):
        donated = jnp.array(x)
        close(jax.jit(function, donate_argnums=0)(donated, factors), exact)
        assert donated.is_deleted()


def test_no_tokens():
    x, factors = inputs(0)
    assert run(x, factors).shape == (0, 64)
    found = gradients(run)(x, factors)
    assert found[0].shape == (0, 64)
    assert all(not np.any(g) for g in found[1])
    close(jax.vmap(run, (0, None))(jnp.ones((3, 0, 64)), factors), jnp.ones((3, 0, 64)))


def test_shapes_without_values():
    x, factors = inputs()
    found = jax.eval_shape(gradients(run), x, factors)
    assert jax.tree.map(lambda t: (t.shape, t.dtype), found) == jax.tree.map(lambda t: (t.shape, t.dtype), (x, factors))


def test_exported_gradients_of_any_number_of_tokens():
    x, factors = inputs()
    (tokens,) = jax.export.symbolic_shape("tokens")
    given = jax.ShapeDtypeStruct((tokens, 64), x.dtype), factors
    exported = jax.export.export(jax.jit(gradients(run)), platforms=("cpu", "cuda"))(*given)
    assert "structlin_" not in exported.mlir_module()
    for some in (x, x[:7]):
        close(exported.call(some, factors), exactly(gradients(portable), some, factors))
    whole = jax.export.export(jax.jit(run))(x, factors)
    close(jax.vjp(whole.call, x, factors)[1](x), exactly(lambda *a: jax.vjp(portable, *a)[1](x), x, factors))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_mesh_of_one_device(kind):
    x, factors = inputs()
    wanted = *exactly(gradients(portable), x, factors), exactly(portable, x, factors)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    # Where the types say how arrays are shared out, jax wants to be told how each sum over shares is.
    own = jax.sharding.PartitionSpec("data" if kind == jax.sharding.AxisType.Auto else None)
    sharding = jax.sharding.NamedSharding(mesh, own)
    close(jax.jit(gradients(run))(jax.device_put(x, sharding), factors), wanted[:2])
    with jax.set_mesh(mesh):
        close(jax.jit(gradients(run))(jax.device_put(x, sharding), factors), wanted[:2])
        spec = jax.sharding.PartitionSpec("data")
        shared = jax.shard_map(run, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
        given = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        close(np.asarray(jax.jit(shared)(given, factors)), np.asarray(wanted[2]))


def test_pmap_of_one_device():
    x, factors = inputs()
    mapped = jax.pmap(gradients(run), in_axes=(0, None), devices=jax.devices("cpu")[:1])
    close(mapped(x[None], factors), jax.tree.map(lambda g: g[None], exactly(gradients(portable), x, factors)))


DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    import structlin as sl
    from structlin.execution import jax_ways
    from structlin.execution.products import products
    structure = sl.design("monarch", (64, 64), blocks=4)
    factors = sl.random_factors(structure, backend="jax", seed=0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((600, 64)), "float32")
    run = lambda x, factors: jax_ways.run(structure, factors, x)
    loss = lambda function: jax.grad(lambda x, f: jnp.sin(function(x, f)).sum(), (0, 1))
    wanted = jax.jit(loss(lambda x, f: products(structure, f, x, sl._arrays.ops("jax"))))(x, factors)
    def check(found):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    first, second = jax.devices()
    mesh = jax.sharding.Mesh([first, second], "data")
    shared = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    for function in (loss(run), jax.jit(loss(run))):
        check(function(x, factors))
        check(function(shared, factors))
        check(jax.device_get(function(*jax.device_put((x, factors), second))))
    mapped = jax.pmap(lambda x, f: jax.lax.psum(loss(run)(x, f)[1], "i"), "i", in_axes=(0, None))
    found = mapped(x.reshape(2, 300, 64), factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4), list(found), list(wanted[1]))
    print("same")
"""


def test_two_devices():
    """A program for each, and programs for both."""
    flags = "--xla_force_host_platform_device_count=2"
    assert output("-c", textwrap.dedent(DEVICES), XLA_FLAGS=flags) == "same\n"


@pytest.mark.parametrize(
    ("name", "options", "copies", "with_gradients"),
    [("block_tensor_train", {"rank": 2}, 3, 5), ("monarch", {"blocks": 4}, 3, 5), ("low_rank", {"rank": 4}, 0, 0)],
)
def test_what_xla_copies(name, options, copies, with_gradients):
    """XLA moves each activation once at most, and none of a chain without batch axes (docs/gpu.md)."""
    structure, tokens = sl.design(name, (60, 48), **options), 131

    def forward(x, *factors):
        return products(structure, factors, x, sl._arrays.ops("jax"))

    def gradients(gy, *operands):
        return jax.vjp(forward, *operands)[1](gy)

    x, y = (jax.ShapeDtypeStruct((tokens, size), jnp.float32) for size in (48, 60))
    factors = [jax.ShapeDtypeStruct(factor.shape, jnp.float32) for factor in structure.factors]
    for function, operands, most in ((forward, [x], copies), (gradients, [y, x], with_gradients)):
        text = jax.jit(function).lower(*operands, *factors).compile().as_text()
        shapes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text)
        moved = [shape for shape in shapes if str(tokens) in shape.split(",")]
        assert len(moved) <= most
        assert "dot" in text
