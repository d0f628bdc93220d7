"""Solutions with arrays of several dtypes, accurate to the widest of them."""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cola.ops import BlockDiag, Dense, KronSum, Product, Sum, Transpose

import structlin as sl
from structlin.testing import to_numpy

MAKE = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}
RNG = np.random.default_rng(0)


def positive(n):
    x = RNG.standard_normal((n, n))
    return x @ x.T / n + np.eye(n)


a, c, whole, U, d = positive(4), positive(5), positive(20), RNG.standard_normal((20, 3)), 1 + RNG.random(20)
column = np.r_[4.0, 0.2 * RNG.random(19)]


def shifted(K):
    return cola.PSD(K + 0.25 * cola.ops.I_like(K))


# of two functions that make arrays, each with its dtype
OPERATORS = {
    "kronecker": lambda f, g: sl.Kronecker(f(a), f(c)),
    "kronecker of CoLA": lambda f, g: cola.ops.Kronecker(Dense(f(a)), sl.Dense(g(c))),
    "two kronecker": lambda f, g: sl.Kronecker(f(a), f(c)) + sl.Kronecker(g(a), g(c)),
    "kronecker and scalar": lambda f, g: sl.Kronecker(f(a), f(c)) + 0.25 * Dense(g(np.eye(20))),
    "kronecker and identity": lambda f, g: shifted(sl.Kronecker(f(a), f(c))),
    "kronecker sum": lambda f, g: KronSum(Dense(f(a)), Dense(g(c))),
    "low rank": lambda f, g: cola.PSD(sl.LowRank(f(U).T, f(U)) + sl.Diagonal(g(d))),
    "dense": lambda f, g: Dense(f(whole)) + Dense(g(whole)),
    "structures": lambda f, g: Sum(sl.Circulant(f(column)), sl.Toeplitz(g(column))),
    "product": lambda f, g: Product(sl.Circulant(f(column)), sl.Toeplitz(g(column))),
    "blocks": lambda f, g: BlockDiag(Dense(f(a)), Dense(g(c)), multiplicities=[5, 0]),
    "scaled": lambda f, g: 2.5 * Transpose(Dense(f(whole))),
    "permuted": lambda f, g: sl.Permutation(f(column).argsort()) @ Dense(f(whole)),
}
DTYPES = [
    ("float32", "float32", "float64"),
    ("float64", "float32", "float32"),
    ("float32", "float64", "float64"),
    ("float32", "float32", "complex128"),
]


def makers(backend, first, second):
    make = MAKE[backend]
    return [lambda x, t=t: make(x.astype(t)) for t in (first, second)]


def exact(name, first, second):
    return OPERATORS[name](*(lambda x, t=t: x.astype(t).astype("float64") for t in (first, second))).to_dense()


@pytest.mark.covering(2)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("first", "second", "right"), DTYPES)
def test_the_solution_is_accurate_in_the_common_dtype(name, first, second, right, backend):
    check(name, first, second, right, backend)


# jax compiles every product; the dtypes are promoted before any of them.
@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "name", [k if i % 3 == 0 else pytest.param(k, marks=pytest.mark.slow) for i, k in enumerate(OPERATORS)]
)
@pytest.mark.parametrize(("first", "second", "right"), DTYPES)
def test_the_solution_is_accurate_in_the_common_dtype_of_jax(name, first, second, right):
    check(name, first, second, right, "jax")


def check(name, first, second, right, backend):
    A = OPERATORS[name](*makers(backend, first, second))
    b = RNG.standard_normal((20, 2)).astype(right)
    dtypes = {str(x.dtype).removeprefix("torch.") for x in A.flatten()[0]} | {right}
    common = np.result_type(*(t for t in dtypes if "int" not in t))
    answer = sl.linalg.solve(A, MAKE[backend](b), full_output=True)
    assert answer.verdict is sl.linalg.Verdict.VERIFIED
    x = answer.value
    assert str(x.dtype).removeprefix("torch.") == common
    wanted = np.linalg.solve(exact(name, first, second), b)
    tolerance = 1e-12 if common.name in ("float64", "complex128") else 1e-4
    assert np.linalg.norm(to_numpy(x) - wanted) < tolerance * np.linalg.norm(wanted)


INDEXED = {
    "slice of a permutation": lambda P: P[np.ix_([4, 0, 2], [0, 3, 1])],
    "permutation and identity": lambda P: P + cola.ops.I_like(P),
    "sum of identities": lambda P: Sum(cola.ops.I_like(P), cola.ops.I_like(P)),
    "slice of a transform": lambda P: sl.Cosine(5, backend=P.backend, dtype=P.dtype)[:4, :4],
    "permutation": lambda P: P,
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", MAKE)
@pytest.mark.parametrize("right", ["float64", "complex128"])
@pytest.mark.parametrize("own", ["float32", "float64"])
@pytest.mark.parametrize("name", INDEXED)
def test_the_solution_with_an_operator_of_indices_is_accurate_in_the_dtype_of_the_right_hand_side(
    name, own, right, backend
):
    make = MAKE[backend]
    A = INDEXED[name](sl.Permutation(make(np.array([1, 2, 3, 4, 0])), dtype=own))
    n = A.shape[0]
    b = RNG.standard_normal((n, 2)).astype(right) * (1 + 2j if right == "complex128" else 1)
    dense = to_numpy(A @ make(np.eye(n)))
    wanted = np.linalg.solve(dense, b)
    answer = sl.linalg.solve(A, make(b), full_output=True)
    assert answer.verdict is sl.linalg.Verdict.VERIFIED
    assert str(answer.value.dtype).removeprefix("torch.") == right
    np.testing.assert_allclose(to_numpy(answer.value), wanted, atol=1e-12)
    quadratic, log = sl.linalg.inv_quad_logdet(A, make(b[:, 0]))
    np.testing.assert_allclose(float(quadratic), (b[:, 0].conj() @ wanted[:, 0]).real, rtol=1e-12)
    np.testing.assert_allclose(float(log), np.linalg.slogdet(dense)[1], atol=1e-6)


@pytest.mark.parametrize("name", ["kronecker and identity", "low rank", "kronecker of CoLA"])
def test_gradients_reach_the_narrow_arrays(name):
    b = RNG.standard_normal(20)

    def value(make, scale):
        A = OPERATORS[name](lambda x: make(x.astype("float32")) * scale, lambda x: make(x.astype("float32")) * scale)
        return (sl.solve(A, make(b)) ** 2).sum()

    wanted = (value(np.asarray, np.float64(1.0001)) - value(np.asarray, np.float64(0.9999))) / 2e-4
    scale = torch.ones((), dtype=torch.float32, requires_grad=True)
    (found,) = torch.autograd.grad(value(torch.tensor, scale), scale)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.item(), wanted, rtol=1e-4)
    if name == "kronecker and identity":
        eager = jax.grad(lambda scale: value(jnp.asarray, scale))(jnp.ones((), "float32"))
        np.testing.assert_allclose(eager, wanted, rtol=1e-4)
    found = jax.jit(jax.grad(lambda scale: value(jnp.asarray, scale)))(jnp.ones((), "float32"))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_likelihood_and_least_squares_in_the_common_dtype():
    A = OPERATORS["low rank"](*makers("torch", "float32", "float32"))
    dense, b = exact("low rank", "float32", "float32"), RNG.standard_normal(20)
    quadratic, log = sl.linalg.inv_quad_logdet(A, torch.tensor(b))
    assert quadratic.dtype == log.dtype == torch.float64
    np.testing.assert_allclose(quadratic, b @ np.linalg.solve(dense, b), rtol=1e-12)
    np.testing.assert_allclose(log, np.linalg.slogdet(dense)[1], rtol=1e-12)
    found = sl.linalg.lstsq(A, torch.tensor(b))
    np.testing.assert_allclose(found, np.linalg.solve(dense, b), rtol=1e-12)


def test_an_operator_made_of_a_function_keeps_its_dtype():
    small = torch.tensor(whole, dtype=torch.float32)
    A = cola.ops.LinearOperator(torch.float32, (20, 20), matmat=lambda X: small @ X)
    assert sl.linalg._common.in_dtype(A + Dense(small), torch.float64) is None
