"""Products under ``jax.jit``, ``vmap`` and ``grad`` against the dense matrix, for rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structlin as sl

EXAMPLES = [
    (name, shape, options)
    for name in sl.structure_names()
    for shape, options in sl.structure_class(name).examples[-2:]
]  # fmt: skip
LAST = [(name, *sl.structure_class(name).examples[-1]) for name in sl.structure_names()]


@pytest.mark.parametrize(
    ("name", "shape", "options"), [e if e in LAST else pytest.param(*e, marks=pytest.mark.slow) for e in EXAMPLES]
)
def test_products_under_transformations(name, shape, options):
    A = sl.structure_class(name).random(shape, seed=0, backend="jax", dtype="float64", **options)
    dense = A.structure.dense([np.asarray(f) for f in A.factors])
    dense = np.asarray(A.to_dense()) if dense is None else dense
    rng = np.random.default_rng(1)
    wide, tall = rng.standard_normal((shape[1], 3)), rng.standard_normal((3, shape[0]))
    columns, rows = jax.jit(lambda A, X: A @ X), jax.jit(lambda A, X: X @ A)
    for X in (wide[:, 0], wide[:, :1], wide):
        np.testing.assert_allclose(columns(A, jnp.asarray(X)), dense @ X, atol=1e-12)
    for X in (tall[0], tall[:1], tall):
        np.testing.assert_allclose(rows(A, jnp.asarray(X)), X @ dense, atol=1e-12)
    each = jax.jit(jax.vmap(lambda A, x: A @ x, (None, 1), 1))
    np.testing.assert_allclose(each(A, jnp.asarray(wide)), dense @ wide, atol=1e-12)
    slope = jax.jit(jax.grad(lambda x, A: jnp.sin(A @ x).sum()))
    np.testing.assert_allclose(slope(jnp.asarray(wide[:, 0]), A), np.cos(dense @ wide[:, 0]) @ dense, atol=1e-12)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
def test_one_column_is_multiplied_as_several_are(name, shape, options, backend):
    A = sl.structure_class(name).random(shape, seed=0, backend=backend, dtype="float64", **options)
    X = sl._arrays.to_backend(np.random.default_rng(1).standard_normal((shape[1], 3)), backend)
    wanted = np.asarray(A @ X)
    for k in range(3):
        np.testing.assert_allclose(A @ X[:, k : k + 1], wanted[:, k : k + 1], atol=1e-12)
        np.testing.assert_allclose(A @ X[:, k], wanted[:, k], atol=1e-12)
