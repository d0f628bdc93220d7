"""Products of composites with stacks of columns (..., n, k) and of rows (..., k, n), and under torch.vmap."""

import re

import cola
import cola.ops as co
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch
from torch.func import grad, vmap

import structlin as sl
import structlin.linalg

BACKENDS = ("numpy", "torch", "jax")
MAKE = {"numpy": np.array, "torch": torch.tensor, "jax": jnp.array}
TYPES = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}
LEADS = ((2,), (2, 3), (0,), (2, 1, 3))


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def on_host(x):
    return x.detach().resolve_conj().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def same(x, want):
    got = on_host(x)
    assert got.shape == np.shape(want), f"{got.shape} != {np.shape(want)}"
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * max(1.0, float(np.abs(want).max(initial=0))))


a, b, low = draw(4, 4, seed=1) + 4 * np.eye(4), draw(3, 3, seed=2) + 4 * np.eye(3), draw(2, 4, seed=3)
ORDER = [2, 0, 1, 3]
KRON, EYES = np.kron(a, b), (np.eye(4), np.eye(3))
KRONSUM = np.kron(a, EYES[1]) + np.kron(EYES[0], b)

# An operator of arrays that ``make`` makes, and its matrix.
COMPOSITES = {
    "inverse": (lambda make: sl.linalg.inverse(sl.Dense(make(a))), np.linalg.inv(a)),
    "inverse of kronsum": (
        lambda make: sl.linalg.inverse(cola.kronsum(sl.Dense(make(a)), sl.Dense(make(b)))),
        np.linalg.inv(KRONSUM),
    ),
    "pinv": (lambda make: cola.pinv(co.Dense(make(low))), np.linalg.pinv(low)),
    "scaled": (
        lambda make: 2.5 * sl.Permutation(make(ORDER), dtype=sl.Dense(make(a)).dtype),
        2.5 * np.eye(4)[ORDER],
    ),
    "sum": (lambda make: sl.Dense(make(a)) + co.Dense(make(a.T.copy())), a + a.T),
    "product": (lambda make: co.Dense(make(low)) @ sl.Dense(make(a)), low @ a),
    "slice": (lambda make: sl.Dense(make(a))[1:, :2], a[1:, :2]),
    "chosen": (lambda make: sl.Dense(make(a))[np.array([3, 1])], a[[3, 1]]),
    "kron": (lambda make: cola.kron(sl.Dense(make(low)), co.Dense(make(b))), np.kron(low, b)),
    "kronsum": (lambda make: cola.kronsum(sl.Dense(make(a)), sl.Dense(make(b))), KRONSUM),
    "block_diag": (
        lambda make: co.BlockDiag(sl.Dense(make(a)), co.Dense(make(low)), multiplicities=[2, 1]),
        np.block([[np.kron(np.eye(2), a), np.zeros((8, 4))], [np.zeros((2, 8)), low]]),
    ),
    "concatenated": (lambda make: co.Concatenated(sl.Dense(make(a)), co.Dense(make(low))), np.concatenate([a, low])),
    "transpose": (lambda make: co.Transpose(co.Dense(make(low))), low.T),
    "adjoint": (lambda make: (sl.Dense(make(low)) @ co.Dense(make(a))).H, (low @ a).T),
    "identity": (lambda make: co.I_like(sl.Dense(make(a))), np.eye(4)),
    "diagonal": (lambda make: co.Diagonal(make(a[0].copy())), np.diag(a[0])),
    "permutation": (lambda make: co.Permutation(make(ORDER), sl.Dense(make(a)).dtype), np.eye(4)[ORDER]),
    "dense": (lambda make: co.Dense(make(low)), low),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_leading_axes_are_columns_or_rows(name, backend):
    make, (build, matrix) = MAKE[backend], COMPOSITES[name]
    A = build(make)
    for lead in LEADS if backend != "jax" else LEADS[1:2]:  # jax compiles each of them anew
        X, Y = draw(*lead, matrix.shape[1], 5), draw(*lead, 5, matrix.shape[0])
        columns, rows = A @ make(X), make(Y) @ A
        assert isinstance(columns, TYPES[backend])
        assert isinstance(rows, TYPES[backend])
        same(columns, matrix @ X)
        same(rows, Y @ matrix)


@pytest.mark.parametrize("name", ["inverse", "scaled", "slice", "kronsum", "block_diag"])
def test_stacks_under_jit(name):
    build, matrix = COMPOSITES[name]
    A = build(jnp.array)
    X, Y = draw(2, 3, matrix.shape[1], 5), draw(2, 3, 5, matrix.shape[0])
    same(jax.jit(lambda A, X: A @ X)(A, X), matrix @ X)
    same(jax.jit(lambda A, Y: jnp.asarray(Y) @ A)(A, Y), Y @ matrix)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacks_as_large_as_the_operator_are_not_transposed(backend):
    """Every axis has the same size, so that a wrong axis raises no error."""
    make, X = MAKE[backend], draw(4, 4, 4)
    A = co.Permutation(make(ORDER), sl.Dense(make(a)).dtype) @ co.Dense(make(a))
    same(A @ make(X), a[ORDER] @ X)
    same(make(X) @ A, X @ a[ORDER])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["inverse", "sum", "product", "slice", "kron", "kronsum", "block_diag", "dense"])
def test_wrong_sizes_are_refused_with_the_shapes(name, backend):
    make, (build, matrix) = MAKE[backend], COMPOSITES[name]
    A, (d_out, d_in) = build(make), matrix.shape
    for shape in [(), (d_in + 1,), (d_in + 1, 2), (2, d_in + 1, 2), (d_in, d_in + 1, 1)]:
        with pytest.raises(
            ValueError, match=rf"shape \({d_out}, {d_in}\) @ array .*got \({', '.join(map(str, shape))}"
        ):
            A @ make(draw(*shape))
    for shape in [(), (d_out + 1,), (2, d_out + 1), (2, d_out, d_out + 1)]:
        with pytest.raises(ValueError, match=rf"@ operator of shape \({d_out}, {d_in}\) .*got {re.escape(str(shape))}"):
            make(draw(*shape)) @ A
    with pytest.raises(ValueError, match=rf"shapes \({d_out}, {d_in}\) and \({d_in + 1}, {d_in + 1}\)"):
        A @ co.Dense(make(draw(d_in + 1, d_in + 1)))


def test_stacks_times_operators_of_scipy():
    sparse = scipy.sparse.random_array((5, 4), density=0.5, rng=0)
    A, X, Y = sl.from_scipy(sparse), draw(2, 4, 3), draw(2, 3, 5)
    same(A @ X, sparse.toarray() @ X)
    same(Y @ A, Y @ sparse.toarray())


def test_gradients_of_stacks_in_torch():
    X = torch.tensor(draw(2, 3, 12, 5), requires_grad=True)
    A = torch.tensor(a, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, X: cola.kronsum(sl.Dense(A), sl.Dense(torch.tensor(b))) @ X, (A, X))


# -- torch.vmap --------------------------------------------------------------------------------------------------------

TAKEN = {
    "columns": lambda K, x: K @ x,
    "rows": lambda K, x: x @ K,
    "solve": structlin.linalg.solve,
    "inverse": lambda K, x: structlin.linalg.inverse(K) @ x,
    "stack": lambda K, x: K @ x.reshape(1, 12, 1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)])
@pytest.mark.parametrize("kind", [sl.Dense, co.Dense])
@pytest.mark.parametrize("make", [cola.kron, cola.kronsum])
def test_kronecker_products_and_sums_under_vmap(make, kind, in_dims):
    stacks = draw(3, 4, 4, seed=1) + 4 * np.eye(4), draw(3, 3, 3, seed=2) + 4 * np.eye(3), draw(3, 12, seed=3)
    given = [torch.tensor(s if dim == 0 else s[0]) for s, dim in zip(stacks, in_dims, strict=True)]
    batch = [[g[i] if dim == 0 else g for g, dim in zip(given, in_dims, strict=True)] for i in range(3)]
    matrix = np.kron if make is cola.kron else lambda A, B: np.kron(A, EYES[1]) + np.kron(EYES[0], B)
    for name, take in TAKEN.items():

        def f(A, B, x, take=take):
            return take(make(kind(A), kind(B)), x)

        found = vmap(f, in_dims=in_dims)(*given)
        for i, (A, B, x) in enumerate(batch):
            M, y = matrix(A.numpy(), B.numpy()), x.numpy()
            want = {"columns": M @ y, "stack": (M @ y).reshape(1, 12, 1), "rows": y @ M}
            same(found[i], want[name] if name in want else np.linalg.solve(M, y))
        slopes = grad(lambda *z, f=f: f(*z).square().sum(), argnums=(0, 1, 2))
        wanted = [slopes(*z) for z in batch]
        for k, got in enumerate(vmap(slopes, in_dims=in_dims)(*given)):
            same(got, np.stack([want[k].numpy() for want in wanted]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [sl.Dense, co.Dense])
def test_a_complex_kronecker_sum_times_real_columns(kind, backend):
    make, c, X = MAKE[backend], np.array([[1j, 1], [0, 2]]), draw(4, 3)
    K, matrix = cola.kronsum(kind(make(c)), kind(make(c.T.copy()))), np.kron(c, np.eye(2)) + np.kron(np.eye(2), c.T)
    same(K @ make(X), matrix @ X)
    same(K @ make(X[:, 0].copy()), matrix @ X[:, 0])
    same(make(X.T.copy()) @ K, X.T @ matrix)
