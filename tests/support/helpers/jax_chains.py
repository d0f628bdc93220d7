"""A chain in jax by any way and by single products, and how their results are compared."""

import jax
import jax.numpy as jnp
import numpy as np

import structlin as sl
from structlin.execution import jax_ways
from structlin.execution.products import products

STRUCTURE = sl.design("monarch", (64, 64), blocks=4)


def inputs(tokens=300, dtype="float32", structure=STRUCTURE):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, structure.d_in)), dtype)
    return x, list(sl.random_factors(structure, seed=2, backend="jax", dtype=dtype))


def run(x, factors):
    return jax_ways.run(STRUCTURE, factors, x)


def portable(x, factors):
    return products(STRUCTURE, factors, x, sl._arrays.ops("jax"))


def exactly(function, *operands):
    """What an oracle gives. It is compiled as one, for XLA takes longer for one operation after the other."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*operands)


def gradients(function):
    return jax.grad(lambda *operands: jnp.sin(function(*operands)).sum(), (0, 1))


def calls(function, *operands):
    """How many custom calls of ours a function is compiled to."""
    return jax.jit(function).lower(*operands).as_text().count("call @structlin_")


def close(found, wanted, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)
