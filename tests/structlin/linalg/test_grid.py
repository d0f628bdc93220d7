"""Every structure, and composites of them, under every operation, against NumPy and SciPy on the dense matrix.

An operation either gives the oracle's result to 1e-8, or raises with a message, and it raises only where the matrix
has no such result (a singular or rectangular matrix, a defective one under a function that needs eigenvectors).
"""

from __future__ import annotations

import warnings

import cola
import numpy as np
import pytest
import scipy.linalg

import structlin
from structlin import Structure, StructuredOperator, linalg
from structlin._arrays import to_backend
from structlin.testing import dense_matrix, to_numpy

TOLERANCE = 1e-8

# -- operators -----------------------------------------------------------------------------------------------------

NAMED = {
    "dense": ("dense", (6, 6), {}),
    "dense wide": ("dense", (4, 6), {}),
    "low rank": ("low_rank", (7, 7), {"rank": 3}),
    "low rank tall": ("low_rank", (9, 5), {"rank": 2}),
    "low rank full": ("low_rank", (5, 5), {"rank": 6}),
    "block diagonal": ("block_diagonal", (12, 12), {"blocks": 3}),
    "block diagonal wide": ("block_diagonal", (6, 15), {"blocks": 3}),
    "kronecker": ("kronecker", (6, 6), {}),
    "kronecker of three": ("kronecker", (12, 12), {"cores": 3, "factorization": ((2, 3, 2), (2, 3, 2))}),
    "kronecker singular": ("kronecker", (6, 6), {"factorization": ((2, 3), (3, 2))}),
    "kronecker tall": ("kronecker", (15, 4), {}),
    "tensor train": ("tensor_train", (6, 6), {"rank": 3}),
    "tensor train of three": ("tensor_train", (12, 12), {"cores": 3, "rank": (2, 3)}),
    "tensor train of rank 1": ("tensor_train", (6, 6), {"rank": 1}),
    "tensor train wide": ("tensor_train", (6, 20), {"rank": 2}),
    "block tensor train": ("block_tensor_train", (6, 6), {"rank": 2}),
    "block tensor train square steps": ("block_tensor_train", (12, 12), {"rank": 2, "factorization": ((2, 6), (4, 3))}),
    "block tensor train rank 1": ("block_tensor_train", (15, 15), {"factorization": ((3, 5), (3, 5))}),
    "block tensor train singular": ("block_tensor_train", (15, 15), {"factorization": ((3, 5), (5, 3))}),
    "block tensor train of three": ("block_tensor_train", (12, 12), {"cores": 3, "rank": (2, 3)}),
    "block tensor train tall": ("block_tensor_train", (35, 6), {"rank": 2}),
    "monarch": ("monarch", (12, 12), {"blocks": 3}),
    "monarch padded": ("monarch", (11, 11), {"blocks": 3}),
    "monarch regrouped": ("monarch", (10, 10), {"blocks": 2}),
    "monarch wide": ("monarch", (10, 21), {"blocks": 3}),
    "blast": ("blast", (6, 6), {"blocks": 3, "rank": 3}),
    "butterfly": ("butterfly", (8, 8), {}),
    "einsum": ("einsum", (12, 12), {"theta": (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.4)}),
    "toeplitz": ("toeplitz", (6, 6), {}),
    "toeplitz tall": ("toeplitz", (7, 4), {}),
    "circulant even": ("circulant", (6, 6), {}),
    "circulant odd": ("circulant", (5, 5), {}),
    "circulant of one": ("circulant", (1, 1), {}),
    "permutation": ("permutation", (5, 5), {}),
    "diagonal": ("diagonal", (5, 5), {}),
}


def draw(name: str, shape, options, backend: str, dtype: str, seed: int = 0):
    """An operator of a named structure with entries of order one, and its matrix."""
    structure = structlin.design(name, shape, **options)
    rng = np.random.default_rng([seed, *shape])
    factors = []
    for spec in structure.factors:
        if not spec.trainable:
            factors.append(to_backend(rng.permutation(spec.shape[0]), backend))
            continue
        x = rng.standard_normal(spec.shape) / np.sqrt(spec.fan_in)
        if "complex" in dtype:
            x = x + 1j * rng.standard_normal(spec.shape) / np.sqrt(spec.fan_in)
        factors.append(to_backend(x, backend, dtype))
    cls = structlin.structure_class(name)
    op = cls._build(structure, tuple(factors), None if any(s.trainable for s in structure.factors) else dtype)
    return op, dense_matrix(structure, factors).astype(dtype)


def single(key: str):
    return lambda backend, dtype: draw(*NAMED[key], backend, dtype)


def transposed(key: str):
    def make(backend, dtype):
        op, matrix = draw(*NAMED[key], backend, dtype)
        return op.T, matrix.T

    return make


def nameless(backend, dtype):
    """A chain without a name, square step by step, with batch, carried and permuted axes."""
    structure = Structure.parse("abc,bxa->cxb; cxb,cyx->byc", a=2, b=3, c=4, x=2, y=2)
    rng = np.random.default_rng(8)
    factors = []
    for spec in structure.factors:
        x = rng.standard_normal(spec.shape)
        factors.append(to_backend(x + 1j * x[::-1] if "complex" in dtype else x, backend, dtype))
    return StructuredOperator(structure, factors), dense_matrix(structure, factors).astype(dtype)


def pair(first: str, second: str, combine, matrices):
    """A composite of two named operators."""

    def make(backend, dtype):
        A, a = draw(*NAMED[first], backend, dtype, seed=1)
        B, b = draw(*NAMED[second], backend, dtype, seed=2)
        return combine(A, B), matrices(a, b)

    return make


def alone(name: str, change, matrix):
    return pair(name, name, lambda A, _: change(A), lambda a, _: matrix(a))


eye, block_diag = cola.ops.I_like, scipy.linalg.block_diag
DIAG = np.diag([1.0, -2.0, 3.0, 0.5, -1.5, 2.5, 4.0])
COMPOSITES = {
    "product": pair("kronecker", "toeplitz", lambda A, B: A @ B, lambda a, b: a @ b),
    "product of kroneckers": pair("kronecker", "kronecker", lambda A, B: A @ B, lambda a, b: a @ b),
    "product of block diagonals": pair("block diagonal", "block diagonal", lambda A, B: A @ B, lambda a, b: a @ b),
    "product through few": pair("low rank tall", "low rank tall", lambda A, B: A @ B.T, lambda a, b: a @ b.T),
    "product through many": pair("kronecker tall", "kronecker tall", lambda A, B: A.T @ B, lambda a, b: a.T @ b),
    "product of circulants": pair("circulant even", "circulant even", lambda A, B: A @ B, lambda a, b: a @ b),
    "product of permutations": pair("permutation", "permutation", lambda A, B: A @ B, lambda a, b: a @ b),
    "product with a diagonal": pair("diagonal", "permutation", lambda A, B: A @ B @ A, lambda a, b: a @ b @ a),
    "low rank @ dense": pair("low rank full", "permutation", lambda A, B: A @ B, lambda a, b: a @ b),
    "sum": pair("kronecker", "circulant even", lambda A, B: A + B, lambda a, b: a + b),
    "difference": pair("tensor train", "tensor train", lambda A, B: A - B, lambda a, b: a - b),
    "low rank + diagonal": alone("low rank", lambda A: A + structlin_diagonal(A), lambda a: a + DIAG),
    "low rank + identity": alone("low rank", lambda A: A + 2.5 * eye(A), lambda a: a + 2.5 * np.eye(7)),
    "two low ranks + identity": pair(
        "low rank tall", "low rank tall", lambda A, B: A @ B.T + eye(A @ B.T), lambda a, b: a @ b.T + np.eye(9)
    ),
    "low rank + circulant": alone(
        "circulant odd", lambda A: A + rank_one(A), lambda a: a + np.outer(np.arange(5.0), np.ones(5))
    ),
    "circulant + identity": alone("circulant odd", lambda A: A + 3 * eye(A), lambda a: a + 3 * np.eye(5)),
    "scaled": alone("kronecker", lambda A: 3 * A, lambda a: 3 * a),
    "scaled by an array": alone(
        "monarch", lambda A: A * to_backend(np.asarray(-0.5), A.backend, A.dtype), lambda a: -0.5 * a
    ),
    "scaled permutation": alone("permutation", lambda A: -2 * A, lambda a: -2 * a),
    "kron": pair("butterfly", "toeplitz tall", lambda A, B: cola.kron(A, B[:4]), lambda a, b: np.kron(a, b[:4])),
    "kron of rectangular": pair(
        "toeplitz tall", "toeplitz tall", lambda A, B: cola.kron(A, B.T), lambda a, b: np.kron(a, b.T)
    ),
    "kronsum": pair("diagonal", "toeplitz", cola.kronsum, lambda a, b: np.kron(a, np.eye(6)) + np.kron(np.eye(5), b)),
    "block diag": pair("kronecker", "circulant odd", cola.block_diag, block_diag),
    "block diag of rectangular": pair(
        "toeplitz tall", "low rank tall", lambda A, B: cola.block_diag(A, A.T), lambda a, b: block_diag(a, a.T)
    ),
    "concatenated": pair("kronecker", "toeplitz", cola.ops.Concatenated, lambda a, b: np.concatenate([a, b])),
    "sliced": alone("monarch", lambda A: A[1:7, 2:8], lambda a: a[1:7, 2:8]),
    "transposed sum": pair("kronecker", "circulant even", lambda A, B: (A + B).T, lambda a, b: (a + b).T),
    "adjoint product": pair("kronecker", "toeplitz", lambda A, B: (A @ B).H, lambda a, b: (a @ b).conj().T),
    "positive": alone("kronecker", lambda A: cola.PSD(A @ A.H + eye(A)), lambda a: a @ a.conj().T + np.eye(6)),
    "self-adjoint": alone("toeplitz", lambda A: cola.SelfAdjoint(A + A.H), lambda a: a + a.conj().T),
    "positive low rank + diagonal": alone(
        "low rank", lambda A: cola.PSD(A @ A.H + 0.5 * eye(A)), lambda a: a @ a.conj().T + 0.5 * np.eye(7)
    ),
}


def structlin_diagonal(A):
    return structlin.Diagonal(to_backend(np.diag(DIAG).copy(), A.backend, A.dtype))


def rank_one(A):
    V, U = to_backend(np.ones((1, 5)), A.backend, A.dtype), to_backend(np.arange(5.0)[:, None], A.backend, A.dtype)
    return structlin.LowRank(V, U)


CASES = {**{k: single(k) for k in NAMED}, "transposed monarch": transposed("monarch padded")}
CASES |= {
    f"transposed {k}": transposed(k) for k in ("low rank", "tensor train of three", "block tensor train square steps")
}
CASES |= {"nameless": nameless, **COMPOSITES}

# -- operations ------------------------------------------------------------------------------------------------------


def assert_close(got, want, size=None):
    """Relative to the norm of what is wanted, or to ``size``."""
    got, want = host(got), np.asarray(want)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    error = float(np.linalg.norm(got - want)) / (max(float(np.linalg.norm(want)), 1e-300) if size is None else size)
    assert error <= TOLERANCE, f"relative error {error:.1e}"


def host(x):
    return to_numpy(x) if hasattr(x, "ndim") and not isinstance(x, np.generic) else np.asarray(x)


def vectors(A, rows, columns=3):
    """The same numbers in the operator's library and in NumPy."""
    x = np.random.default_rng([rows, columns]).standard_normal((rows, columns))
    library = A.xnp.__name__.rsplit(".", 1)[-1].removesuffix("_fns")
    return to_backend(x, "numpy" if library == "np" else library, A.dtype), x


def rectangular(a):
    return a.shape[0] != a.shape[1]


def singular(a):
    return rectangular(a) or np.linalg.matrix_rank(a, tol=1e-9 * np.linalg.norm(a, 2)) < len(a)


def defective(a):
    return rectangular(a) or np.linalg.cond(np.linalg.eig(a)[1]) > 1e7


OPERATIONS = {}


def operation(raises=lambda a: False):
    """Register a check; where ``raises`` holds of the matrix, it has to raise."""

    def register(check):
        OPERATIONS[check.__name__] = (check, raises)
        return check

    return register


@operation()
def products(A, a):
    (X, x), (Y, y) = vectors(A, a.shape[1]), vectors(A, a.shape[0])
    assert_close(A @ X, a @ x)
    assert_close(A @ X[:, 0], a @ x[:, 0])
    assert_close(Y.T @ A, y.T @ a)
    assert_close(A.T @ Y, a.T @ y)
    assert_close(A.H @ Y, a.conj().T @ y)


@operation()
def dense(A, a):
    assert_close(A.to_dense(), a)
    assert_close(A.T.to_dense(), a.T)
    assert_close(A.H.to_dense(), a.conj().T)


@operation(singular)
def inverse(A, a):
    X, x = vectors(A, len(a))
    inverse = cola.inv(A)
    assert_close(inverse @ X, np.linalg.solve(a, x))
    assert_close(X.T @ inverse, np.linalg.solve(a.T, x).T)
    assert_close(cola.linalg.solve(A, X[:, 1]), np.linalg.solve(a, x[:, 1]))


@operation(singular)
def inverse_of_transpose(A, a):
    X, x = vectors(A, len(a))
    assert_close(cola.inv(A.T) @ X, np.linalg.solve(a.T, x))
    assert_close(cola.inv(A).H @ X, np.linalg.solve(a.conj().T, x))


@operation(singular)
def inverse_of_inverse(A, a):
    assert_close(cola.inv(cola.inv(A)).to_dense(), a)


@operation(rectangular)
def slogdet(A, a):
    sign, log = cola.linalg.slogdet(A)
    if singular(a):  # by roundoff the dense matrix has a tiny determinant where the structure knows it to be zero
        assert float(host(log)) < -25
        return
    want = np.linalg.slogdet(a)
    assert_close(sign, want[0])
    assert_close(log, want[1], max(1.0, abs(want[1])))
    assert_close(cola.logdet(A), want[1], max(1.0, abs(want[1])))


@operation()
def diagonals(A, a):
    for k in (0, 1, -2):
        if -a.shape[0] < k < a.shape[1]:
            assert_close(cola.diag(A, k), np.diag(a, k), np.linalg.norm(a))


@operation(rectangular)
def trace(A, a):
    assert_close(cola.trace(A), np.trace(a), np.linalg.norm(a))


@operation()
def pseudo_inverse(A, a):
    X, x = vectors(A, a.shape[0])
    want = np.linalg.pinv(a, rcond=1e-12)
    assert_close(cola.pinv(A) @ X, want @ x)
    assert_close(vectors(A, a.shape[1])[0].T @ cola.pinv(A), vectors(A, a.shape[1])[1].T @ want)


@operation(rectangular)
def eigenvalues(A, a):
    n, size = len(a), np.linalg.norm(a)
    every = np.linalg.eigvals(a)
    magnitudes = np.sort(np.abs(every))
    spread = np.linalg.cond(np.linalg.eig(a)[1])
    for k, which in ((n, "LM"), (1, "LM"), (min(2, n), "SM")):
        values, vectors_ = cola.eig(A, k, which)
        values, V = host(values), host(vectors_.to_dense())
        assert values.shape == (k,)
        assert V.shape == (n, k)
        assert np.linalg.norm(a @ V - V * values) <= TOLERANCE * size * np.sqrt(k)
        np.testing.assert_allclose(np.linalg.norm(V, axis=0), 1, rtol=1e-6)
        if spread < 1e4:  # roundoff moves the eigenvalues of matrices that are nearly defective
            wanted = magnitudes[:k] if which == "SM" else magnitudes[n - k :]
            assert_close(np.abs(values), wanted, size)
            if k == n:
                assert_close(np.prod(values / size), np.prod(every / size), 1.0)
                assert_close(np.sum(values), np.trace(a), size)


@operation(rectangular)
def exponential(A, a):
    assert_close(cola.exp(A).to_dense(), scipy.linalg.expm(a))


@operation(rectangular)
def integer_powers(A, a):
    for k in (0, 1, 2, 3, 12):
        want = np.linalg.matrix_power(a, k)
        assert_close(cola.linalg.pow(A, k).to_dense(), want, np.linalg.norm(a) ** k + 1)


@operation(singular)
def negative_powers(A, a):
    assert_close(cola.linalg.pow(A, -1).to_dense(), np.linalg.inv(a))
    assert_close(cola.linalg.pow(A, -2).to_dense(), np.linalg.matrix_power(np.linalg.inv(a), 2))


@operation(lambda a: defective(a) or singular(a))
def roots(A, a):
    root, inverse = host(cola.linalg.sqrt(A).to_dense()), host(cola.linalg.isqrt(A).to_dense())
    size = np.linalg.cond(np.linalg.eig(a)[1])
    assert np.linalg.norm(root @ root - a) <= TOLERANCE * np.linalg.norm(a) * size
    assert np.linalg.norm(root @ inverse - np.eye(len(a))) <= TOLERANCE * np.linalg.cond(root) * size
    assert (np.linalg.eigvals(root).real >= -1e-7 * np.linalg.norm(root)).all()  # the principal branch


@operation(lambda a: defective(a) or singular(a))
def logarithm(A, a):
    found = host(cola.linalg.log(A).to_dense())
    size = np.linalg.cond(np.linalg.eig(a)[1])
    assert np.linalg.norm(scipy.linalg.expm(found) - a) <= TOLERANCE * np.linalg.norm(a) * size
    assert np.abs(np.linalg.eigvals(found).imag).max() <= np.pi + 1e-6


@operation()
def singular_values(A, a):
    U, s, Vh = linalg.svd(A)
    U, s, Vh = host(U.to_dense()), host(s), host(Vh.to_dense())
    assert_close((U * s) @ Vh, a)
    want = np.linalg.svd(a, compute_uv=False)
    assert_close(np.pad(s, (0, len(want) - len(s))), want)
    assert_close(U.conj().T @ U, np.eye(len(s)))
    assert_close(Vh @ Vh.conj().T, np.eye(len(s)))


@operation()
def norms(A, a):
    assert_close(linalg.frobenius_norm(A), np.linalg.norm(a))
    assert_close(linalg.frobenius_norm(A.T), np.linalg.norm(a))
    assert_close(linalg.inner_product(A, A), np.linalg.norm(a) ** 2)
    assert_close(linalg.spectral_norm(A, tolerance=1e-7), np.linalg.norm(a, 2))


@operation()
def inner_products(A, a):
    B, b = A @ A.T @ A, a @ a.T @ a
    assert_close(linalg.inner_product(A, B), np.vdot(a, b), np.linalg.norm(a) * np.linalg.norm(b))
    assert_close(linalg.inner_product(B, 2 * A), 2 * np.vdot(b, a), np.linalg.norm(a) * np.linalg.norm(b))


@operation()
def scaling_and_sums(A, a):
    X, x = vectors(A, a.shape[1])
    assert_close((-3 * A) @ X, -3 * a @ x)
    assert_close((A / 2 - A) @ X, -0.5 * a @ x)
    assert_close((A + A) @ X, 2 * a @ x)
    assert_close((A @ A.T) @ (A @ X), a @ a.T @ a @ x)
    assert_close((A.H @ A) @ X, a.conj().T @ a @ x)


@operation()
def annotations(A, a):
    """What is claimed of an operator, and of what is made of it, holds of its matrix."""
    made = [A, A.T, A.H, -A, 2 * A, A @ A.T, A.H @ A, A + A, A - A]
    if not singular(a):
        made += [cola.inv(A), cola.inv(A.T)]
    if not rectangular(a):
        made += [cola.exp(A), cola.linalg.pow(A, 2)]
    for op in made:
        matrix = host(op.to_dense())
        size = np.linalg.norm(matrix) + 1e-300
        if op.isa(cola.SelfAdjoint):
            assert_close(matrix, matrix.conj().T)
        if op.isa(cola.PSD):
            assert np.linalg.eigvalsh(matrix).min() >= -TOLERANCE * size
        if op.isa(cola.annotations.Stiefel):
            assert_close(matrix.conj().T @ matrix, np.eye(matrix.shape[1]))


REFUSALS = (ValueError, ArithmeticError, np.linalg.LinAlgError)


def run(A, a, name):
    check, raises = OPERATIONS[name]
    if not raises(a):
        check(A, a)
        return
    try:
        check(A, a)
    except REFUSALS as error:
        if len(str(error)) < 20:
            raise AssertionError(f"{error!r} says too little") from error
    except AssertionError as error:
        raise AssertionError(f"a wrong result where it should have raised: {error}") from error


def check_all(make, backend, dtype, names=tuple(OPERATIONS)):
    """All operations on one operator, and one report of those that fail."""
    failed = {}
    A, a = make(backend, dtype)
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                run(A, a, name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_operations(case, backend, dtype):
    check_all(CASES[case], backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("case", CASES)
def test_operations_on_jax(case, dtype):
    check_all(CASES[case], "jax", dtype)


@pytest.mark.parametrize("case", ["monarch", "low rank + identity"])
def test_core_operations_on_jax(case):
    check_all(CASES[case], "jax", "float64", ("products", "inverse", "slogdet", "trace"))


# -- all pairs -------------------------------------------------------------------------------------------------------

FOUR = {
    "dense": {}, "low_rank": {"rank": 2}, "block_diagonal": {"blocks": 2}, "kronecker": {}, "tensor_train": {"rank": 3},
    "block_tensor_train": {"rank": 2}, "monarch": {"blocks": 2}, "blast": {"blocks": 2, "rank": 3}, "butterfly": {},
    "einsum": {"theta": (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.5)}, "toeplitz": {}, "circulant": {}, "permutation": {},
    "diagonal": {},
}  # fmt: skip
TOGETHER = {
    "product": (lambda A, B: A @ B, lambda a, b: a @ b),
    "sum": (lambda A, B: A + B, lambda a, b: a + b),
    "kron": (cola.kron, np.kron),
    "block diagonal": (cola.block_diag, scipy.linalg.block_diag),
}


def theirs(kind, backend, dtype):
    """One of CoLA's own operators of size 4, and its matrix."""
    rng = np.random.default_rng(7)
    a = (rng.standard_normal((4, 4)) + (1j * rng.standard_normal((4, 4)) if "complex" in dtype else 0)).astype(dtype)
    x, ops = to_backend(a, backend, dtype), cola.ops
    order, eye = np.array([2, 0, 3, 1]), np.eye(4, dtype=dtype)
    return {
        "Dense": lambda: (ops.Dense(x), a),
        "Triangular": lambda: (ops.Triangular(to_backend(np.tril(a), backend, dtype), lower=True), np.tril(a)),
        "Diagonal": lambda: (ops.Diagonal(x[0]), np.diag(a[0])),
        "Identity": lambda: (ops.I_like(ops.Dense(x)), eye),
        "ScalarMul": lambda: (1.5 * ops.I_like(ops.Dense(x)), 1.5 * eye),
        "Permutation": lambda: (ops.Permutation(to_backend(order, backend), x.dtype), eye[order]),
    }[kind]()


THEIRS = ("Dense", "Triangular", "Diagonal", "Identity", "ScalarMul", "Permutation")


def member(name, backend, dtype, seed):
    if name in THEIRS:
        return theirs(name, backend, dtype)
    return draw(name, (4, 4), FOUR[name], backend, dtype, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("how", TOGETHER)
@pytest.mark.parametrize("second", [*FOUR, *THEIRS])
@pytest.mark.parametrize("first", FOUR)
def test_operations_on_pairs(first, second, how, dtype):
    combine, matrices = TOGETHER[how]

    def make(backend, dtype):
        (A, a), (B, b) = member(first, backend, dtype, 3), member(second, backend, dtype, 4)
        return combine(A, B), matrices(a, b)

    check_all(make, "torch", dtype)
