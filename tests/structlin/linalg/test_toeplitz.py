"""The recursion for Toeplitz matrices: against LAPACK and SciPy, its gradients, and when LAPACK takes over."""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from jax.test_util import check_grads

import structlin
from structlin import linalg
from structlin._arrays import to_backend
from structlin.linalg import _inverse
from structlin.operators import StructuredOperator
from structlin.structures import _levinson as levinson
from structlin.structures import toeplitz
from structlin.testing import to_numpy

N = 9


@pytest.fixture
def at_once(monkeypatch):
    """Use the recursions from one row on."""
    monkeypatch.setattr(toeplitz, "LEAST", 1)
    monkeypatch.setattr(levinson, "LEAST", 1)
    monkeypatch.setattr(levinson, "SMALL", 0)


@pytest.fixture
def never_dense(monkeypatch):
    def refuse(self):
        raise AssertionError("the dense matrix was built")

    monkeypatch.setattr(StructuredOperator, "to_dense", refuse)
    monkeypatch.setattr(_inverse, "dense_inverse", refuse)


def kernel(dtype="float64", n=N, seed=0):
    """Diagonals of a matrix all of whose leading parts are well conditioned, and that is not symmetric."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(2 * n - 1) / (2 * np.sqrt(n))
    if "complex" in dtype:
        x = x + 1j * rng.standard_normal(2 * n - 1) / (2 * np.sqrt(n))
    x[n - 1] += 2 if "complex" not in dtype else 1 - 2j
    return x.astype(dtype)


def matrix(k):
    n = (len(k) + 1) // 2
    return scipy.linalg.toeplitz(k[n - 1 :], k[:n][::-1])


def operator(k, backend="numpy"):
    return operator_of(to_backend(k, backend))


def operator_of(k):
    return structlin.Toeplitz.from_kernel(k, (k.shape[0] + 1) // 2)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 64])
def test_recursion(n, dtype):
    k = kernel(dtype, n)
    found, t = levinson.recursion(k), matrix(k)
    inverse = np.linalg.inv(t)
    np.testing.assert_allclose(found.first, inverse[:, 0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.last, inverse[:, -1], rtol=1e-12, atol=1e-14)
    determinants = [1, *(np.linalg.det(t[:m, :m]) for m in range(1, n + 1))]
    np.testing.assert_allclose(found.pivots, np.array(determinants[1:]) / determinants[:-1], rtol=1e-10)
    made = toeplitz.inverse_from(found.first, found.last)
    np.testing.assert_allclose(made.to_dense(), inverse, rtol=0, atol=1e-13)
    adjoint = found.adjoint()
    np.testing.assert_allclose(adjoint.first, inverse.conj().T[:, 0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(adjoint.last, inverse.conj().T[:, -1], rtol=1e-12, atol=1e-14)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_no_dense_matrix_is_built(backend, dtype, at_once, never_dense):
    k, rng = kernel(dtype), np.random.default_rng(1)
    A, t = operator(k, backend), matrix(k)
    x = rng.standard_normal((N, 3)).astype(dtype)
    b = to_backend(x, backend)
    tolerance = 2e-5 if dtype in ("float32", "complex64") else 1e-11
    wanted = np.linalg.solve(t, x)
    np.testing.assert_allclose(to_numpy(linalg.solve(A, b)), wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(to_numpy(linalg.solve(A, b[:, 0])), wanted[:, 0], rtol=tolerance, atol=tolerance)
    for op, m in ((A, t), (A.T, t.T), (A.H, t.conj().T)):
        np.testing.assert_allclose(to_numpy(cola.inv(op) @ b), np.linalg.solve(m, x), rtol=tolerance, atol=tolerance)
        sign, log = cola.linalg.slogdet(op)
        np.testing.assert_allclose(complex(sign), np.linalg.slogdet(m)[0], rtol=tolerance)
        np.testing.assert_allclose(float(log), np.linalg.slogdet(m)[1], rtol=tolerance)
        assert sign.dtype == b.dtype
        assert "complex" not in str(log.dtype)
    assert linalg.solve(A, b).dtype == b.dtype


def test_agrees_with_scipy_at_the_size_where_it_starts():
    k = kernel(n=toeplitz.LEAST)
    n, A, b = toeplitz.LEAST, operator(k), np.random.default_rng(2).standard_normal(toeplitz.LEAST)
    assert toeplitz.columns(A) is not None
    assert toeplitz.columns(operator(kernel(n=n - 1))) is None
    wanted = scipy.linalg.solve_toeplitz((k[n - 1 :], k[:n][::-1]), b)
    np.testing.assert_allclose(linalg.solve(A, b), wanted, rtol=1e-9, atol=1e-12)


# name: a kernel for which the recursion cannot be trusted, though the matrix is well conditioned
BAD = {
    "a leading entry of zero": np.array([1.0, 2.0, 0.0, 3.0, -1.0]),
    "a leading entry near zero": np.array([1.0, 2.0, 1e-7, 3.0, -1.0]),
    "a leading minor near zero": np.array([0.5, 1.0, 1.0, 1.0 + 1e-7, -2.0]),
}


@pytest.mark.parametrize("name", BAD)
def test_the_dense_matrix_takes_over(name, at_once):
    k, b = BAD[name], np.array([1.0, -2.0, 0.5])
    t = matrix(k)
    assert np.linalg.cond(t) < 100
    assert toeplitz.columns(operator(k)) is None
    for backend in ("numpy", "torch"):
        A = operator(k, backend)
        np.testing.assert_allclose(linalg.solve(A, to_backend(b, backend)), np.linalg.solve(t, b), rtol=1e-12)
        np.testing.assert_allclose(cola.inv(A).to_dense(), np.linalg.inv(t), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(cola.linalg.slogdet(A), np.linalg.slogdet(t), rtol=1e-12)


def test_a_bad_solution_is_not_returned(at_once, monkeypatch):
    """Should the columns be wrong after all, the residual shows it."""
    k = kernel()
    right = levinson.recursion(k)
    wrong = levinson.Columns(right.first * (1 + 1e-2 * np.arange(N)), right.last, right.pivots)
    b = np.random.default_rng(0).standard_normal((N, 2))
    assert levinson.solve(k, b, right) is not None
    monkeypatch.setattr(levinson, "SLACK", 0)
    assert levinson.solve(k, b, right) is None  # no solution passes: the bound is what decides
    monkeypatch.undo()
    assert levinson.solve(k, b, levinson.Columns(right.first, right.last[::-1], right.pivots)) is None
    monkeypatch.setattr(toeplitz, "LEAST", 1)
    monkeypatch.setattr(levinson, "LEAST", 1)
    monkeypatch.setattr(levinson, "SMALL", 0)
    monkeypatch.setattr(levinson, "recursion", lambda _: wrong)
    assert toeplitz.columns(operator(k)) is None
    np.testing.assert_allclose(linalg.solve(operator(k), b), np.linalg.solve(matrix(k), b), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("hermitian", [True, False])
@pytest.mark.parametrize("columns", [1, 3])
def test_preconditioned_iterations_are_backward_stable(hermitian, dtype, columns):
    n, rng = 4096, np.random.default_rng(0)
    c = 0.6 ** np.arange(n) * (1 if dtype == "float64" else np.exp(0.3j * np.arange(n)))
    c[0] = c[0].real + 0.1
    k = np.concatenate([(c[1:].conj() if hermitian else 0.5 ** np.arange(1, n))[::-1], c]).astype(dtype)
    b = rng.standard_normal((n, columns))
    x = linalg.solve(operator_of(k), b.astype(dtype))
    A = levinson.Convolution(k, n)
    assert np.linalg.norm(A(x) - b) <= 1e-13 * np.abs(k).sum() * np.linalg.norm(x)


def test_a_large_system_ends():
    n = 100_000
    k = np.concatenate([0.6 ** np.arange(1, n)[::-1], [1.0], 0.6 ** np.arange(1, n)])
    b = np.random.default_rng(0).standard_normal(n)
    answer = linalg.solve(operator_of(k), b, full_output=True)
    assert answer.verdict is linalg.Verdict.VERIFIED
    # the inverse of 0.6^|i - j| has three diagonals
    inner = (1.36 * b[1:-1] - 0.6 * (b[:-2] + b[2:])) / 0.64
    np.testing.assert_allclose(answer.value[1:-1], inner, atol=1e-10)


def test_a_singular_matrix_is_refused(at_once):
    A = operator(np.ones(5))
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        linalg.solve(A, np.ones(3))
    assert float(cola.logdet(A)) < -25


def test_half_precision_is_refused(at_once):
    A = operator(kernel("float32"), "torch").to(dtype=torch.bfloat16)
    for f in (cola.inv, cola.linalg.slogdet, lambda A: linalg.solve(A, torch.ones(N, dtype=torch.bfloat16))):
        with pytest.raises(ValueError, match="needs float32, float64 or complex"):
            f(A)


def test_above_the_dense_limit(monkeypatch):
    from structlin.linalg import _common

    monkeypatch.setattr(_common, "DENSE_LIMIT", 100)
    k = kernel(n=300)
    A, b = operator(k, "torch"), torch.ones(300, dtype=torch.float64)
    np.testing.assert_allclose(linalg.solve(A, b), np.linalg.solve(matrix(k), b), rtol=1e-10)
    np.testing.assert_allclose(cola.logdet(A), np.linalg.slogdet(matrix(k))[1], rtol=1e-12)


def test_toeplitz_plus_low_rank(at_once, never_dense):
    k, rng = kernel(), np.random.default_rng(3)
    U, V = rng.standard_normal((N, 2)) / 3, rng.standard_normal((2, N)) / 3
    A, a = operator(k) + structlin.LowRank(V, U), matrix(k) + U @ V
    b = rng.standard_normal((N, 2))
    np.testing.assert_allclose(linalg.solve(A, b), np.linalg.solve(a, b), rtol=1e-10)
    np.testing.assert_allclose(cola.inv(A) @ b, np.linalg.solve(a, b), rtol=1e-10)
    np.testing.assert_allclose(cola.linalg.slogdet(A), np.linalg.slogdet(a), rtol=1e-10)


# -- gradients -------------------------------------------------------------------------------------------------------


GRADIENTS = {
    "solve": lambda k, b: linalg.solve(operator_of(k), b),
    "solve with a vector": lambda k, b: linalg.solve(operator_of(k), b[:, 0]),
    "inverse": lambda k, b: cola.inv(operator_of(k)) @ b,
    "determinant": lambda k, b: torch.mul(*(x + 0 * b.sum() for x in cola.linalg.slogdet(operator_of(k)))),
}


@pytest.mark.parametrize("dtype", ["float64", pytest.param("complex128", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_and_their_gradients(name, dtype, at_once, never_dense):
    k = torch.tensor(kernel(dtype, 3), requires_grad=True)
    b = torch.tensor(np.random.default_rng(0).standard_normal((3, 2)).astype(dtype), requires_grad=True)
    assert torch.autograd.gradcheck(GRADIENTS[name], (k, b), atol=1e-7)
    assert torch.autograd.gradcheck(lambda b: GRADIENTS[name](k.detach(), b), (b,))
    assert torch.autograd.gradgradcheck(GRADIENTS[name], (k, b), atol=1e-6)


def test_gradients_at_full_size_are_those_of_the_dense_matrix():
    n = 300
    k = torch.tensor(kernel(n=n), requires_grad=True)
    b = torch.tensor(np.random.default_rng(0).standard_normal(n))

    def loss(solve, logdet):
        return solve.square().sum() + logdet

    A = operator_of(k)
    assert toeplitz.columns(A) is not None
    (fast,) = torch.autograd.grad(loss(linalg.solve(A, b), cola.logdet(A)), k)
    rows = torch.arange(n)
    dense = k[rows[:, None] - rows[None, :] + n - 1]
    (slow,) = torch.autograd.grad(loss(torch.linalg.solve(dense, b), torch.linalg.slogdet(dense)[1]), k)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)


def test_transformations_take_the_dense_matrix(at_once):
    """Their values cannot be looked at."""
    k, b = kernel(), np.random.default_rng(0).standard_normal(N)
    wanted = np.linalg.solve(matrix(k), b)
    many = torch.stack([torch.tensor(k), 2 * torch.tensor(k)])
    found = torch.func.vmap(lambda k: linalg.solve(operator_of(k), torch.tensor(b)))(many)
    np.testing.assert_allclose(found, np.stack([wanted, wanted / 2]), rtol=1e-10)
    gradient = jax.grad(lambda k: cola.logdet(operator_of(k)))(jnp.asarray(k))
    tracked = torch.tensor(k, requires_grad=True)
    cola.logdet(operator_of(tracked)).backward()
    np.testing.assert_allclose(gradient, tracked.grad, rtol=1e-9, atol=1e-11)
    _, tangent = torch.func.jvp(
        lambda k: linalg.solve(operator_of(k), torch.tensor(b)), (torch.tensor(k),), (torch.ones(2 * N - 1).double(),)
    )
    np.testing.assert_allclose(tangent, -np.linalg.solve(matrix(k), np.ones((N, N)) @ wanted), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_solutions_under_jit_take_the_recursion_too(dtype, at_once, never_dense):
    k, x = kernel(dtype), np.random.default_rng(1).standard_normal((N, 2)).astype(dtype)
    solve = jax.jit(lambda k, b: linalg.solve(operator_of(k), b))
    first, last, regular = jax.jit(toeplitz._traced_recursion)(jnp.asarray(k))
    wanted = levinson.recursion(k)
    assert regular
    np.testing.assert_allclose(first, wanted.first, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(last, wanted.last, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(solve(k, x), np.linalg.solve(matrix(k), x), rtol=1e-10)
    np.testing.assert_allclose(solve(k, x[:, 0]), np.linalg.solve(matrix(k), x[:, 0]), rtol=1e-10)
    if dtype == "float64":
        check_grads(solve, (jnp.asarray(k), jnp.asarray(x)), order=1, modes=["fwd"], rtol=1e-3)
        check_grads(solve, (jnp.asarray(k), jnp.asarray(x)), order=2, modes=["rev"], rtol=1e-3)
        found = jax.vmap(solve, (0, None))(jnp.stack([k, 2 * k]), x)
        np.testing.assert_allclose(found[1], np.linalg.solve(matrix(k), x) / 2, rtol=1e-10)


def test_lapack_takes_over_under_jit(at_once):
    b = np.array([1.0, -2.0, 0.5])
    solve = jax.jit(lambda k, b: linalg.solve(operator_of(k), b))
    for k in BAD.values():
        assert not toeplitz._traced_recursion(jnp.asarray(k))[2]
        np.testing.assert_allclose(solve(k, b), np.linalg.solve(matrix(k), b), rtol=1e-12)
    assert not np.isfinite(solve(np.ones(5), b)).any()


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "general"])
def test_few_rows_by_lapack(kind, dtype):
    n, rng = levinson.SMALL - 5, np.random.default_rng(4)
    k = kernel(dtype, n=n)
    if kind != "general":
        k = (k + k[::-1].conj()) / 2
        k[n - 1] = 2 if kind == "positive" else -0.1
    t, b = matrix(k), rng.standard_normal((n, 3)).astype(dtype)
    for backend in ("numpy", "torch"):
        x = to_numpy(linalg.solve(operator(k, backend), to_backend(b, backend)))
        np.testing.assert_allclose(x, np.linalg.solve(t, b), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [70, 130, 600])
def test_a_singular_matrix_raises_at_every_size(n):
    """Of rank 2: the recursion divides by roundoff, and the residual of what comes is small beside its size."""
    k = np.cos(0.3 * np.arange(1 - n, n))
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        linalg.solve(operator(k), np.random.default_rng(0).standard_normal(n))


# One column is iterated as a vector is, which both cases solve.
@pytest.mark.parametrize("columns", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "complex128"])
def test_iterations_under_jit_and_what_follows_them(dtype, columns, monkeypatch):
    n = levinson.ITERATED + 3
    c = 0.6 ** np.arange(n) * (1 if dtype == "float64" else np.exp(0.3j * np.arange(n)))
    c[0] = c[0].real + 0.1
    k = np.concatenate([c[1:].conj()[::-1], c]).astype(dtype)
    b = np.random.default_rng(0).standard_normal((n, columns)).astype(dtype)

    def solve(k, b):
        return linalg.solve(cola.PSD(operator_of(k)), b)

    wanted = np.linalg.solve(matrix(k), b)
    np.testing.assert_allclose(jax.jit(solve)(k, b), wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(jax.jit(solve)(k, b[:, 0]), wanted[:, 0], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(toeplitz, "_traced_iteration", lambda kernel, b, limit: b)  # which solves nothing
    np.testing.assert_allclose(jax.jit(lambda k, b: solve(k, b))(k, b), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.6, 0.5])
def test_large_systems_under_jit_are_solved_to_roundoff(ratio):
    """Above the largest dense matrix, too; a symmetric matrix by conjugate gradients, another one by BiCGSTAB."""
    n = toeplitz._LARGEST_DENSE + 8
    k = np.concatenate([ratio ** np.arange(1, n)[::-1], [1.0], 0.6 ** np.arange(1, n)])
    b = np.random.default_rng(0).standard_normal((n, 2))
    x = np.asarray(jax.jit(lambda k, b: linalg.solve(operator_of(k), b))(k, b))
    residual = scipy.linalg.matmul_toeplitz((k[n - 1 :], k[:n][::-1]), x) - b
    assert np.linalg.norm(residual) <= 1e-13 * np.linalg.norm(b)
    np.testing.assert_allclose(x, linalg.solve(operator_of(k), b), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n", [toeplitz.LEAST, toeplitz._LARGEST_DENSE + 8])
def test_singular_systems_under_jit_are_nan(n, monkeypatch):
    monkeypatch.setattr(toeplitz, "_PATIENCE", 5)
    k = np.cos(0.3 * np.arange(1 - n, n))  # of rank 2
    b = np.random.default_rng(0).standard_normal(n)
    assert np.isnan(jax.jit(lambda k, b: linalg.solve(operator_of(k), b))(k, b)).all()


def test_the_iteration_under_jit_is_as_accurate_as_the_dense_matrix():
    """In float32 at condition 2.5e4: a looser test of the residual returns one that is 60 times larger."""
    n = 1000
    kernel = np.exp(-((np.arange(n) / 10) ** 2) / 2).astype(np.float32)
    kernel[0] += 1e-3
    b = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    x = jax.jit(lambda c, b: linalg.solve(structlin.Toeplitz(c), b))(jnp.asarray(kernel), jnp.asarray(b))
    dense = scipy.linalg.toeplitz(kernel.astype(float))
    assert np.linalg.norm(dense @ np.asarray(x, float) - b) <= 1e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["toeplitz", "circulant"])
@pytest.mark.parametrize("n", [30, 300])
def test_a_kernel_of_lower_precision_is_promoted_first(n, kind, backend):
    """The matrix holds float32 numbers, and the results are those of the same numbers in float64."""
    column = np.r_[4, np.random.default_rng(n).standard_normal(n - 1) / (4 * n**0.5)].astype(np.float32)
    A = {"toeplitz": structlin.Toeplitz, "circulant": structlin.Circulant}[kind](to_backend(column, backend))
    wide = getattr(scipy.linalg, kind)(column.astype(np.float64))
    b = np.random.default_rng(1).standard_normal((n, 2))
    given = to_backend(b, backend)
    np.testing.assert_allclose(to_numpy(A @ given), wide @ b, rtol=0, atol=1e-13)
    np.testing.assert_allclose(to_numpy(linalg.solve(A, given)), np.linalg.solve(wide, b), rtol=0, atol=1e-13)
    if backend == "numpy":  # which promotes
        np.testing.assert_allclose(A.structure.apply(A.factors, b.T), b.T @ wide.T, rtol=0, atol=1e-13)
