"""Logarithms and powers of matrices that are singular, defective, graded or nearly so, against exact formulas."""

import pickle
from fractions import Fraction

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch

import structlin as sl
from structlin import linalg
from structlin._arrays import to_backend
from structlin.linalg._common import in_dtype
from structlin.testing import to_numpy

BACKENDS = ["numpy", "torch", "jax"]
POWERS = [0.1, 0.3, 0.5, 1.5]


def power(exponent):
    return lambda A: linalg.matrix_power(A, exponent)


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def nilpotent(rng, m, extra, dtype):
    """Return a rotated Jordan block of the eigenvalue 0 and of size m, beside regular eigenvalues."""
    n = m + extra
    upper = np.diag(np.r_[np.zeros(m), 1 + rng.random(extra)])
    upper[:m, :m] += 10.0 ** rng.uniform(-3, 3) * np.eye(m, k=1)
    Q = orthogonal(rng, n)
    return (Q @ upper @ Q.T).astype(dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize("extra", [0, 3])
def test_a_defective_eigenvalue_zero_has_no_logarithm_and_no_roots(m, extra, dtype):
    rng = np.random.default_rng(m)
    functions = [linalg.logm, linalg.sqrtm, power(0.3), power(-0.5)]
    for backend in BACKENDS if m == 3 else BACKENDS[:2]:
        for function in functions:
            A = sl.Dense(to_backend(nilpotent(rng, m, extra, dtype), backend))
            with pytest.raises(ArithmeticError, match="singular") as caught:
                function(A)
            assert isinstance(caught.value, np.linalg.LinAlgError)


@pytest.mark.parametrize("size", [4e-15, 1e-14, 1e-13, 1e-3])
def test_the_logarithm_of_a_defective_matrix_near_the_identity(size):
    N = np.diag([1.0, 0.5], 1)
    found = linalg.logm(sl.Dense(np.eye(3) + size * N)).to_dense()
    np.testing.assert_allclose(found, size * N - size**2 * N @ N / 2, atol=4e-16)


@pytest.mark.parametrize("function", [linalg.sqrtm, linalg.expm, lambda A: linalg.slogdet(A)])
def test_all_functions_have_one_bound_for_positive_eigenvalues(function):
    """100 roundoffs of the largest eigenvalue are too many for any number of rows."""
    n = 64
    values = np.r_[-100 * np.finfo(float).eps, np.linspace(0.5, 1, n - 1)]
    A = cola.PSD(sl.Kronecker(np.diag(values), np.eye(2)) + 1e-300 * cola.ops.I_like(sl.Dense(np.eye(2 * n))))
    with pytest.raises(np.linalg.LinAlgError, match="annotated PSD but is not positive"):
        function(A)


def test_traced_values_without_a_logarithm_are_nan():
    def log(a):
        return linalg.logm(sl.Dense(a)).to_dense()

    rng = np.random.default_rng(0)
    for a in (nilpotent(rng, 3, 0, "float64"), np.ones((3, 3))):
        assert not jnp.isfinite(jax.jit(log)(a)).any()
    a = np.eye(3) + rng.standard_normal((3, 3)) / 4
    np.testing.assert_allclose(jax.jit(log)(a), scipy.linalg.logm(a), atol=1e-12)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "backend"), [(2, "numpy"), (3, "torch"), (4, "jax"), (20, "numpy"), (20, "torch")])
def test_powers_at_a_semisimple_eigenvalue_zero(n, dtype, backend):
    rng, tolerance = np.random.default_rng(n), 1000 * np.finfo(dtype).eps
    values = np.r_[rng.uniform(0.5, 2, n - n // 2), np.zeros(n // 2)]
    Q, V = orthogonal(rng, n), rng.standard_normal((n, n)) / 4 + 2 * np.eye(n)
    W = np.linalg.inv(V)
    for exponent in POWERS if backend != "jax" else [0.3]:  # jax compiles each one
        for left, right, kind in ((Q, Q.T, cola.PSD), (Q, Q.T, None), (V, W, None)):
            A = sl.Dense(to_backend((left * values @ right).astype(dtype), backend))
            A = A if kind is None else kind(A)
            want = left * values**exponent @ right
            np.testing.assert_allclose(to_numpy(linalg.matrix_power(A, exponent).to_dense()), want, atol=tolerance)
            for function in (linalg.logm, power(-exponent)):
                with pytest.raises(ArithmeticError, match="singular"):
                    function(A)


def test_powers_where_another_eigenvalue_is_defective():
    Q = orthogonal(np.random.default_rng(0), 3)
    A = sl.Dense(Q @ np.array([[0.0, 2, 0], [0, 1, 1], [0, 0, 1]]) @ Q.T)
    for p in POWERS:  # the derivative at the double eigenvalue 1
        want = Q @ np.array([[0, 2, 2 * p - 2], [0, 1, p], [0, 0, 1]]) @ Q.T
        np.testing.assert_allclose(linalg.matrix_power(A, p).to_dense(), want, atol=1e-6)


@pytest.mark.parametrize(("n", "backend"), [(2, "numpy"), (20, "torch"), (4, "jax"), (200, "numpy"), (200, "torch")])
def test_the_logarithm_of_a_nearly_singular_regular_matrix(n, backend):
    rng = np.random.default_rng(n)
    V, x = np.eye(n) + rng.standard_normal((n, n)) / (3 * np.sqrt(n)), np.r_[-20, rng.uniform(-1, 3, n - 1)]
    W = np.linalg.inv(V)
    found = linalg.logm(sl.Dense(to_backend(V * np.exp(x) @ W, backend)))
    np.testing.assert_allclose(to_numpy(found.to_dense()), V * x @ W, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_graded_matrices(dtype):
    rng, exponent = np.random.default_rng(0), 150 if dtype == "float64" else 15
    d = 10.0 ** np.linspace(-exponent, exponent, 3)
    np.testing.assert_allclose(
        linalg.logm(sl.Dense(np.diag(d).astype(dtype))).to_dense(), np.diag(np.log(d)), rtol=1e-6
    )
    small = np.eye(3) + rng.standard_normal((3, 3)) / 4
    scaled = (d[:, None] * small / d).astype(dtype)
    found, want = linalg.logm(sl.Dense(scaled)).to_dense(), d[:, None] * scipy.linalg.logm(small) / d
    np.testing.assert_allclose(found / abs(want).max(), want / abs(want).max(), atol=1e-2)
    Q = orthogonal(rng, 3)  # rotated, the small numbers are roundoff
    with pytest.raises(ArithmeticError, match="singular"):
        linalg.logm(sl.Dense((Q * d @ Q.T).astype(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_ill_conditioned_positive_matrices_are_regular(backend, dtype):
    n, condition, rng = 30, {"float32": 1e6, "float64": 1e13}[dtype], np.random.default_rng(0)
    column = np.exp(-8 * np.minimum(np.arange(n), n - np.arange(n)) ** 2 / n)
    spectrum = np.fft.fft(column).real
    column[0] += spectrum.max() / condition - spectrum.min()
    Q, values = orthogonal(rng, n), np.logspace(0, -np.log10(condition), n)
    for matrix, kind in (((Q * values @ Q.T), sl.Dense), (scipy.linalg.circulant(column), sl.Circulant)):
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        given = matrix if kind is sl.Dense else column
        A = cola.PSD(kind(to_backend(given.astype(dtype), backend)))
        for function, numbers, tolerance in (
            (linalg.logm, np.log(values), 0.1),
            (power(-0.5), values**-0.5, 0.2),
            (linalg.sqrtm, values**0.5, 3e-4),
        ):
            found, want = to_numpy(function(A).to_dense()), vectors * numbers @ vectors.T
            np.testing.assert_allclose(found / abs(want).max(), want / abs(want).max(), atol=tolerance)


def test_members_of_kronecker_products_and_sums():
    rng = np.random.default_rng(0)
    Q = orthogonal(rng, 3)
    projection, upper = Q[:, :2] @ Q[:, :2].T, np.array([[1, 0.3, 0], [0, 2, 0.1], [0, 0, 3.0]])
    root = linalg.sqrtm(sl.Kronecker(projection, upper))
    np.testing.assert_allclose(root.to_dense(), np.kron(projection, scipy.linalg.sqrtm(upper)), atol=1e-12)
    without = [
        sl.Kronecker(projection, upper),
        sl.Kronecker(nilpotent(rng, 2, 0, "float64"), upper),
        cola.kronsum(sl.Dense(upper), sl.Dense(-upper)),
        sl.Circulant(np.array([2.0, -1.0, -1.0])),
        cola.PSD(sl.Circulant(np.array([0.2, -0.1, -0.1]))),
    ]
    for A in without:
        with pytest.raises(ArithmeticError, match="singular"):
            linalg.logm(A)
    with pytest.raises(ArithmeticError, match="singular"):
        linalg.sqrtm(without[1])
    with pytest.raises(ArithmeticError):
        linalg.apply(torch.log, sl.Dense(torch.ones((3, 3), dtype=torch.float64)))


def real_composites(a, b, u, v):
    """Return composites whose inverses and exponentials use eigenvectors of real matrices without orthogonal ones."""
    product, thin = sl.Kronecker(a, b), sl.LowRank(u, v)
    total = cola.kronsum(sl.Dense(a), sl.Dense(b))
    made = [product, product.T, total, 0.5 * total, cola.ops.Kronecker(sl.Dense(a), sl.Dense(b))]
    return made + [A + 0.25 * cola.ops.I_like(A) for A in (product, total, thin)]


def real_matrices(dtype="float64"):
    rng = np.random.default_rng(4)
    made = [np.eye(n) + rng.standard_normal((n, n)) / 4 for n in (3, 4)]  # with complex eigenvalues
    return [m.astype(dtype) for m in (*made, rng.standard_normal((2, 12)) / 4, rng.standard_normal((12, 2)) / 4)]


REAL = [linalg.inverse, linalg.expm, power(2), power(-2)]
DENSE = [np.linalg.inv, scipy.linalg.expm, lambda m: m @ m, lambda m: np.linalg.inv(m @ m)]


@pytest.mark.parametrize(("backend", "dtype"), [(b, f"float{w}") for b in BACKENDS for w in (32, 64)][:-1])
def test_real_functions_of_real_matrices_are_real(backend, dtype):
    assert all(np.iscomplex(np.linalg.eigvals(m)).any() for m in real_matrices()[:2])
    given = [to_backend(m, backend) for m in real_matrices(dtype)]
    pairs = list(zip(real_composites(*given), real_composites(*real_matrices()), strict=True))
    tolerance = 1e4 * np.finfo(dtype).eps
    for A, exact in pairs[6:7] if backend == "jax" else pairs:  # jax compiles each one
        dense = exact.to_dense()
        for function, oracle in zip(REAL, DENSE, strict=True):
            found, want = function(A), oracle(dense)
            assert found.dtype == A.dtype
            for M, value in ((found, want), (found.T, want.T)):
                product = M @ given[3]
                assert product.dtype == A.dtype
                np.testing.assert_allclose(to_numpy(product), value @ real_matrices()[3], atol=tolerance)


def test_real_functions_of_real_matrices_have_right_gradients():
    values, weights = real_matrices(), np.random.default_rng(1).standard_normal((12, 12))
    oracles = {linalg.inverse: torch.linalg.inv, linalg.expm: torch.linalg.matrix_exp}
    given = [torch.tensor(m, requires_grad=True) for m in values]
    for function, oracle in oracles.items():
        for A in real_composites(*given):
            found, want = (
                torch.autograd.grad((torch.from_numpy(weights) * x).sum(), given, allow_unused=True, retain_graph=True)
                for x in (function(A).to_dense(), oracle(A.to_dense()))
            )
            for x, y in zip(found, want, strict=True):
                assert (x is None) == (y is None)
                np.testing.assert_allclose(torch.zeros(1) if x is None else x, 0 if y is None else y, atol=1e-10)

    def value(matrices, structured):
        A = real_composites(*matrices)[6]  # the Kronecker sum with a multiple of the identity
        return (weights * (linalg.inverse(A).to_dense() if structured else jnp.linalg.inv(A.to_dense()))).sum()

    found, want = (jax.jit(jax.grad(value), static_argnums=1)(values, flag) for flag in (True, False))
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_real_inverses_have_closed_forms_as_their_operators_have(backend):
    A = real_composites(*(to_backend(m, backend) for m in real_matrices()))[6]
    X, dense = linalg.inverse(A), to_numpy(A.to_dense())
    b = to_backend(np.random.default_rng(0).standard_normal((12, 2)), backend)
    with linalg.dense_limit(1):
        solution, again, (sign, log) = linalg.solve(X, b), linalg.inverse(X), cola.linalg.slogdet(X)
        power_of_two = linalg.matrix_power(X, 2)
    assert solution.dtype == again.dtype == power_of_two.dtype == sign.dtype == A.dtype
    np.testing.assert_allclose(to_numpy(solution), dense @ to_numpy(b), atol=1e-12)
    np.testing.assert_allclose(to_numpy(again @ b), dense @ to_numpy(b), atol=1e-12)
    np.testing.assert_allclose([float(sign), float(log)], np.linalg.slogdet(np.linalg.inv(dense)), atol=1e-12)
    np.testing.assert_allclose(to_numpy(b.T @ X), to_numpy(b).T @ np.linalg.inv(dense), atol=1e-12)
    np.testing.assert_allclose(to_numpy(cola.linalg.diag(X)), np.diag(np.linalg.inv(dense)), atol=1e-12)
    np.testing.assert_allclose(to_numpy(cola.linalg.diag(X.T, 1)), np.diag(np.linalg.inv(dense), -1), atol=1e-12)
    np.testing.assert_allclose(to_numpy(pickle.loads(pickle.dumps(X)) @ b), to_numpy(X @ b))
    assert sl.macs(X) == sl.macs(X.T) == sl.macs(X.A)
    narrow = linalg.inverse(real_composites(*(to_backend(m, backend) for m in real_matrices("float32")))[6])
    np.testing.assert_allclose(to_numpy(linalg.solve(narrow, b)), to_numpy(solution), atol=1e-4)
    assert linalg.solve(narrow, b).dtype == A.dtype


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_symmetric_products_of_skew_members_have_real_functions(backend):
    """The eigenvalues of the product are real, those of its members are not."""
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    dense = np.kron(0.5 * turn, 0.7 * turn) + 0.7 * np.eye(4)
    K = sl.Kronecker(*(to_backend(c * turn, backend) for c in (0.5, 0.7)))
    b = to_backend(np.arange(8.0), backend)
    for annotation in (cola.SelfAdjoint, cola.PSD):
        A = annotation(K + 0.7 * cola.ops.I_like(K))
        cases = [(linalg.inverse, np.linalg.inv), (linalg.expm, scipy.linalg.expm)]
        cases += [(linalg.sqrtm, scipy.linalg.sqrtm)] if annotation is cola.PSD else []
        for function, oracle in cases:
            found = function(A)
            assert found.dtype == A.dtype
            np.testing.assert_allclose(to_numpy(found.to_dense()), oracle(dense), atol=1e-14)
        solution = linalg.solve(cola.ops.BlockDiag(A, A), b)
        assert solution.dtype == A.dtype
        np.testing.assert_allclose(to_numpy(solution), np.linalg.solve(np.kron(np.eye(2), dense), np.arange(8.0)))
        assert cola.linalg.slogdet(linalg.inverse(A))[0].dtype == A.dtype


def test_conversions_of_real_functions_keep_their_values():
    X = linalg.expm(real_composites(*map(torch.from_numpy, real_matrices()))[0])
    for dtype, tolerance in ((None, 1e-14), (torch.float64, 1e-14), (torch.float32, 1e-5), (torch.complex128, 1e-14)):
        moved = X.to("cpu", dtype)
        assert moved.dtype == (dtype or X.dtype)
        torch.testing.assert_close(moved.to_dense().to(torch.complex128), X.to_dense() + 0j, atol=tolerance, rtol=0)
    inside = cola.ops.Kronecker(X, X).to("cpu", torch.float32)  # CoLA converts all arrays
    with pytest.raises(TypeError, match="without their imaginary parts; convert the operators"):
        inside.to_dense()
    kept = in_dtype(cola.SelfAdjoint(X), torch.complex128)
    assert kept.isa(cola.annotations.SelfAdjoint)
    assert kept.dtype == torch.complex128


def test_roots_of_products_of_nearly_defective_members_are_accurate():
    rng, upper = np.random.default_rng(0), np.diag([1.0, 1.001, 2.0]) + np.eye(3, k=1) * [0, 1, 0]
    for _ in range(40):
        a, b = ((Q @ upper @ Q.T).astype("float32") for Q in (orthogonal(rng, 3), orthogonal(rng, 3)))
        for A in (sl.Kronecker(a, b), cola.kronsum(sl.Dense(a), sl.Dense(b))):
            found, want = linalg.sqrtm(A).to_dense(), scipy.linalg.sqrtm(A.to_dense().astype(complex))
            np.testing.assert_allclose(found, want, atol=0.02 * abs(want).max())


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logarithms_that_are_zero(backend, dtype):
    def made(x):
        return to_backend(np.asarray(x, dtype), backend)

    blocks = np.array([np.eye(2), [[2.0, 1], [0, 3]]])
    swap = sl.Permutation(to_backend(np.array([1, 0, 2]), backend))
    for A in (
        sl.Dense(made(np.eye(3))),
        sl.Toeplitz(made(np.eye(3)[0])),
        sl.Kronecker(made(np.eye(3)), made(np.eye(2))),
        sl.Kronecker(made(2 * np.eye(3)), made(0.5 * np.eye(2))),
        cola.kronsum(sl.Dense(made(3 * np.eye(2))), sl.Dense(made(-2 * np.eye(2)))),
        sl.BlockDiagonal(made(blocks)),
        swap @ swap.H,
    ):
        want = scipy.linalg.logm(to_numpy(A.to_dense()).astype(float).round(6))
        np.testing.assert_allclose(
            to_numpy(linalg.logm(A).to_dense()), want, atol=1e-6 if dtype == "float32" else 1e-14
        )


def logarithm_near_identity(a):
    """Return the series of log(I + E) for small E, in exact fractions."""
    one = np.array([[Fraction(int(i == j)) for j in range(len(a))] for i in range(len(a))])
    E, power, total = np.array([[*map(Fraction, row)] for row in a.tolist()]) - one, one, 0 * one
    for k in range(1, 8):
        power = power @ E
        total = total + power * Fraction((-1) ** (k + 1), k)
    return total.astype(float)


@pytest.mark.parametrize("scale", [1e-17, 1e-16, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7])
def test_logarithms_near_the_identity(scale):
    log = jax.jit(lambda a: linalg.logm(sl.Dense(a)).to_dense())
    for n in (2, 7):
        a = np.eye(n) + scale * np.random.default_rng(n).standard_normal((n, n))
        for found in (linalg.logm(sl.Dense(a)).to_dense(), log(a)):
            np.testing.assert_allclose(found, logarithm_near_identity(a), atol=1e-14)
        a = np.eye(n) + scale * np.eye(n, k=1)  # defective
        np.testing.assert_allclose(linalg.logm(sl.Dense(a)).to_dense(), logarithm_near_identity(a), atol=1e-14)


def test_functions_at_a_root():
    np.testing.assert_allclose(linalg.apply(np.sin, sl.Dense(np.pi * np.eye(3))).to_dense(), 0, atol=1e-15)
    found = linalg.apply(lambda x: (x - 1) ** 2 * (x - 3), sl.Dense(np.array([[1.0, 1], [0, 3]]))).to_dense()
    np.testing.assert_allclose(found, 0, atol=1e-14)
