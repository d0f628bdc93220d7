"""What the grid does not show: which path is taken, at which cost, and what is refused."""

import math

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.operators import random
from helpers.refusals import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

import structlin
from structlin import Structure, StructuredOperator, linalg
from structlin.algebra import contract as _contract
from structlin.algebra import roles as _chain
from structlin.linalg import _common, _iterative, _norms
from structlin.testing import dense_matrix, random_chain, to_numpy

TORCH = {"backend": "torch", "dtype": "float64"}


def never_dense(monkeypatch):
    """Fail where a structured operator is multiplied out."""

    def refuse(self):
        raise AssertionError(f"{type(self).__name__} of shape {self.shape} was made dense")

    monkeypatch.setattr(StructuredOperator, "to_dense", refuse)


# -- chains ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.permutations(list("abcd")), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_sign_of_a_permutation_of_axes(order, sizes):
    table = dict(zip("abcd", sizes, strict=True))
    moved = np.arange(math.prod(sizes)).reshape(sizes).transpose(["abcd".index(a) for a in order]).ravel()
    want = np.linalg.det(np.eye(len(moved))[moved]) if len(moved) < 65 else None
    if want is None:
        want = (-1) ** sum(int((moved[i + 1 :] < x).sum()) for i, x in enumerate(moved))
    assert _chain._order_sign("abcd", "".join(order), table) == round(want)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(seed=53118)  # no factor has an axis of the input or of the output
def test_random_chains(seed):
    """Any chain, with every role of axes, padding and regrouping, against its dense matrix."""
    rng = np.random.default_rng(seed)
    structure = random_chain(rng)
    factors = [rng.standard_normal(f.shape) for f in structure.factors]
    A, a = StructuredOperator(structure, factors), dense_matrix(structure, factors)
    size = np.linalg.norm(a) + 1e-300
    for k in {0, 1 - a.shape[0], a.shape[1] - 1}:
        np.testing.assert_allclose(cola.diag(A, k), np.diag(a, k), atol=1e-9 * size)
        found = _contract.diagonal(A, k)
        if found is not None:
            np.testing.assert_allclose(found, np.diag(a, k), atol=1e-9 * size)
    np.testing.assert_allclose(linalg.frobenius_norm(A), size, rtol=1e-9)
    np.testing.assert_allclose(linalg.inner_product(A, A), size**2, rtol=1e-9)
    matrices = _chain.part_matrices(structure, factors)
    if matrices is not None:
        whole = np.ones((1, 1))
        for m in matrices:
            whole = np.kron(whole, m)
        np.testing.assert_allclose(whole, a, atol=1e-9 * size)
    if structure.d_in == structure.d_out:
        np.testing.assert_allclose(cola.trace(A), np.trace(a), atol=1e-9 * size)
        if _chain.is_square_chain(structure) and np.linalg.cond(a) < 1e8:
            np.testing.assert_allclose(to_numpy(cola.inv(A).to_dense()) @ a, np.eye(len(a)), atol=1e-6)
            sign, log = cola.linalg.slogdet(A)
            want = np.linalg.slogdet(a)
            assert round(float(sign)) == round(float(want[0]))
            np.testing.assert_allclose(log, want[1], rtol=1e-6, atol=1e-6)


def test_entries_of_split_sizes():
    A = random("tensor_train", (56, 56), cores=2, factorization=((7, 8), (8, 7)), rank=2)
    rows, columns = np.array([0, 55, 13, 13]), np.array([0, 1, 54, 13])
    np.testing.assert_allclose(_contract.entries(A, rows, columns), A.to_dense()[rows, columns])
    np.testing.assert_allclose(_contract.diagonal(A, 3), np.diag(A.to_dense(), 3))


# -- speed: the dense matrix is never built --------------------------------------------------------------------------

FAST = {
    "low rank": ("low_rank", {"rank": 3}),
    "block diagonal": ("block_diagonal", {"blocks": 8}),
    "kronecker": ("kronecker", {}),
    "tensor train": ("tensor_train", {"rank": 3, "cores": 3}),
    "block tensor train": ("block_tensor_train", {"rank": 1}),
    "monarch": ("monarch", {"blocks": 8}),
    "circulant": ("circulant", {}),
    "permutation": ("permutation", {}),
    "diagonal": ("diagonal", {}),
    "butterfly": ("butterfly", {}),
}
TRAINS = {"tensor train", "block tensor train", "monarch", "butterfly"}
CLOSED = {
    "inverse": (lambda A: cola.inv(A), {"low rank", "tensor train"}),
    "slogdet": (lambda A: cola.linalg.slogdet(A), {"tensor train"}),
    "trace": (lambda A: cola.trace(A), {"butterfly"}),
    "diag": (lambda A: cola.diag(A), {"butterfly"}),
    "frobenius": (linalg.frobenius_norm, {"butterfly"}),
    "spectral norm": (lambda A: linalg.spectral_norm(A, tolerance=1e-2), set()),
    "pinv": (lambda A: cola.pinv(A), TRAINS),
    "svd": (linalg.svd, TRAINS),
    "square": (lambda A: cola.linalg.pow(A, 2), set()),
    "eig": (lambda A: cola.eig(A, 2, "LM"), {*TRAINS, "permutation"}),
    "exp": (cola.exp, {*TRAINS, "permutation"}),
}


@pytest.mark.parametrize(("operation", "name"), [(o, n) for o in CLOSED for n in FAST if n not in CLOSED[o][1]])
def test_no_dense_matrix_is_built(name, operation, monkeypatch):
    """What docs/linalg.md calls closed form, fast or iterative."""
    A = random(FAST[name][0], (256, 256), **FAST[name][1])
    never_dense(monkeypatch)
    CLOSED[operation][0](A)


def test_the_inverse_is_of_the_same_cost():
    for name in ("monarch", "kronecker", "block_diagonal", "butterfly"):
        A = random(name, (64, 64))
        assert structlin.macs(cola.inv(A)) == structlin.macs(A)
        assert structlin.macs(cola.inv(cola.inv(A))) == structlin.macs(A)
    L = random("low_rank", (64, 64), rank=3)
    A = L + random("diagonal", (64, 64))
    assert structlin.macs(cola.inv(A)) == structlin.macs(L) + 9


def test_woodbury_sees_low_rank_in_many_forms(monkeypatch):
    L, D = random("low_rank", (20, 20), rank=2, **TORCH), random("diagonal", (20, 20), **TORCH)
    U = cola.ops.Dense(torch.tensor(np.random.default_rng(0).standard_normal((20, 2))))
    T = random("toeplitz", (20, 20), **TORCH)
    eye = cola.ops.I_like(L)
    sums = {
        "diagonal": L + D,
        "cola diagonal": L + cola.ops.Diagonal(torch.arange(1.0, 21, dtype=torch.float64)),
        "scaled": 2 * L + 3 * eye,
        "product of dense": U @ U.T + eye,
        "product through toeplitz": T @ L @ T + D,
        "transposed": (L + D).T,
        "two": cola.ops.Sum(L, L.T, D),
        "circulant": random("circulant", (20, 20), **TORCH) + L,
        "kronecker": random("kronecker", (20, 20), **TORCH) + L,
    }
    for name, A in sums.items():
        a, b = to_numpy(A.to_dense()), np.arange(20.0)
        with monkeypatch.context() as patch:
            patch.setattr(_common, "dense_inverse", None)
            patch.setattr(linalg._inverse, "dense_inverse", None)
            x = cola.linalg.solve(A, torch.tensor(b))
        np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-7, err_msg=name)


def test_wide_low_rank_goes_dense():
    A = random("low_rank", (8, 8), rank=5) + random("diagonal", (8, 8))
    np.testing.assert_allclose(cola.inv(A).to_dense() @ A.to_dense(), np.eye(8), atol=1e-10)


# -- algorithms ------------------------------------------------------------------------------------------------------


def test_an_algorithm_that_is_named_is_used():
    A = cola.PSD(random("diagonal", (6, 6), **TORCH) @ random("diagonal", (6, 6), **TORCH).T)
    inverse = cola.inv(A, cola.linalg.CG(max_iters=1))
    assert type(inverse).__name__.startswith("IterativeOperatorWInfo")
    K = random("kronecker", (6, 6), **TORCH)
    assert not isinstance(cola.inv(K, cola.linalg.LU()), structlin.Kronecker)
    np.testing.assert_allclose(cola.inv(K, cola.linalg.LU()).to_dense(), np.linalg.inv(K.to_dense()), rtol=1e-8)
    log = cola.logdet(K, cola.linalg.LU(), cola.linalg.Auto())
    np.testing.assert_allclose(log, np.linalg.slogdet(K.to_dense())[1])


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(_common, "DENSE_LIMIT", 10)


def spd(n=30, **options):
    T = random("toeplitz", (n, n), **options)
    return cola.PSD(T @ T.T + 0.3 * cola.ops.I_like(T))


def test_large_solves_are_iterative_and_verified(small_limit):
    A = spd(**TORCH)
    b = torch.ones(30, dtype=torch.float64)
    inverse = cola.inv(A, cola.linalg.Auto(tol=1e-10))
    assert isinstance(inverse, _iterative.VerifiedInverse)
    np.testing.assert_allclose(inverse @ b, np.linalg.solve(A.to_dense(), b), rtol=1e-6)
    np.testing.assert_allclose(b @ inverse, np.linalg.solve(A.to_dense(), b), rtol=1e-6)
    few = cola.inv(A, cola.linalg.Auto(tol=1e-10, max_iters=2))
    with pytest.raises(linalg.ConvergenceError, match="after 2 iterations"):
        few @ b
    general = random("toeplitz", (30, 30), **TORCH) + 2 * cola.ops.I_like(A)
    np.testing.assert_allclose(cola.linalg.solve(general, b), np.linalg.solve(general.to_dense(), b), rtol=1e-3)


def test_an_unfinished_solve_is_nan_under_jit(small_limit):
    A = spd(backend="jax")

    @jax.jit
    def solve(A, b):
        return cola.inv(A, cola.linalg.Auto(tol=1e-10, max_iters=2)) @ b

    assert np.isnan(solve(A, jnp.ones(30))).all()


def test_what_is_too_large_says_so(small_limit):
    A = random("toeplitz", (30, 30))
    for f in (cola.pinv, cola.exp, linalg.svd, lambda A: cola.eig(A, 2, "LM"), cola.linalg.sqrt):
        with pytest.raises(ValueError, match="no dense matrix is built"):
            f(A)
    with pytest.warns(UserWarning, match="estimated with a standard error"):
        log = cola.logdet(random("toeplitz", (12, 12), backend="torch", dtype="float64"))
    assert np.isfinite(float(log))
    assert isinstance(cola.inv(random("dense", (30, 30))), cola.ops.Product)  # a dense matrix is what it is


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f", [cola.inv, cola.linalg.slogdet, cola.trace, cola.exp, cola.linalg.sqrt, lambda A: cola.eig(A, 1, "LM")]
)
def test_rectangular_operators_are_refused(f):
    ours = random("monarch", (6, 8), blocks=2)
    for A in (ours, cola.ops.Dense(np.ones((2, 3))), ours + random("toeplitz", (6, 8))):
        with pytest.raises(ValueError, match="square"):
            f(A)


def test_structures_of_low_rank_have_no_inverse():
    for A in (random("low_rank", (6, 6), rank=2), random("kronecker", (6, 6), factorization=((2, 3), (3, 2)))):
        with pytest.raises(ValueError, match=r"rank \d at most and so no inverse"):
            cola.inv(A)
        sign, log = cola.linalg.slogdet(A)
        assert (sign, log) == (0, -np.inf)


def test_singular_matrices_are_refused():
    zeros = np.zeros((2, 2, 2))
    for A in (
        structlin.Diagonal(np.array([1.0, 0.0])),
        structlin.Circulant(np.ones(4)),
        structlin.BlockDiagonal(zeros + 1.0),
        structlin.Dense(np.ones((3, 3))),
        cola.ops.Dense(np.arange(9.0).reshape(3, 3)),
        0.0 * cola.ops.I_like(structlin.Dense(np.eye(2))),
    ):
        with pytest.raises(np.linalg.LinAlgError):
            cola.inv(A)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("n", [60, 61, 62])
def test_a_padding_that_makes_singular_is_refused(n, backend):
    """Between two blocks of a Monarch runs one number, so that cutting k rows and columns of them takes k - 1 ranks.
    LAPACK's pivots show no more than roundoff for some of these, and its solutions are noise."""
    for seed in range(4):
        A = random("monarch", (n, n), seed, blocks=8, backend=backend)
        assert np.linalg.matrix_rank(to_numpy(A.to_dense())) == n - (64 - n - 1)
        b = structlin._arrays.to_backend(np.ones(n), backend)
        for f in (cola.inv, lambda A, b=b: linalg.solve(A, b)):
            with pytest.raises(np.linalg.LinAlgError, match="singular to working precision"):
                f(A)


@pytest.mark.parametrize("c", [2.0, -1.5, 0.0])
def test_pseudo_inverses_of_multiples(c):
    members = (structlin.Circulant(np.array([1.0, 2.0, 4.0])), structlin.Dense(np.arange(6.0).reshape(2, 3)))
    A = c * cola.ops.Kronecker(*members)
    found = cola.pinv(A)
    np.testing.assert_allclose(found.to_dense(), np.linalg.pinv(A.to_dense()), atol=1e-14)
    assert any(isinstance(M, cola.ops.Kronecker) for M in getattr(found, "Ms", ()))


def test_half_precision_is_refused():
    A = random("kronecker", (6, 6), backend="torch", dtype="bfloat16")
    for f in (cola.inv, cola.pinv, cola.linalg.slogdet, linalg.svd, linalg.spectral_norm, cola.linalg.eigmax):
        with pytest.raises(ValueError, match="needs float32, float64 or complex"):
            f(A)


def test_arguments_are_checked():
    A = random("monarch", (6, 6), blocks=2)
    refused(ValueError, "diagonals -5 to 5, got k = 6", cola.diag, A, 6)
    refused(ValueError, "between 1 and 6", cola.eig, A, 7, "LM")
    refused(ValueError, "which must be", cola.eig, A, 1, "LA")
    refused(ValueError, "Eigh needs an operator annotated", cola.eig, A, 1, "LM", cola.linalg.Eigh())
    refused(ValueError, "tolerance must", linalg.spectral_norm, A, tolerance=0)
    refused(ValueError, "max_iterations", linalg.spectral_norm, A, max_iterations=0)
    refused(ValueError, "equal shapes", linalg.inner_product, A, random("toeplitz", (6, 5)))
    for f in (linalg.svd, linalg.frobenius_norm, linalg.spectral_norm, lambda x: linalg.inner_product(A, x)):
        with pytest.raises(TypeError, match="ndarray"):
            f(np.eye(2))


# -- spectra ---------------------------------------------------------------------------------------------------------


def test_eigenvalues_are_ordered_by_magnitude():
    A = cola.ops.Dense(torch.diag(torch.tensor([-3.0, 1.0, 2.0])))
    np.testing.assert_allclose(to_numpy(cola.eig(A, 1, "LM")[0]), [-3])
    np.testing.assert_allclose(to_numpy(cola.eig(cola.SelfAdjoint(A), 2, "SM")[0]), [1, 2])
    np.testing.assert_allclose(to_numpy(cola.eig(A, 2, "LM", cola.linalg.Eig())[0]), [2, -3])
    np.testing.assert_allclose(
        to_numpy(cola.eig(cola.ops.Diagonal(torch.tensor([-3.0, 1.0, 2.0])), 2, "LM")[0]), [2, -3]
    )
    assert cola.linalg.eigmax(A) == -3


def test_eigenvectors_of_hermitian_operators_are_orthonormal():
    B = random("block_diagonal", (6, 6), blocks=2)
    A = cola.SelfAdjoint(B + B.T)
    values, vectors = cola.eig(A, 6, "LM")
    assert values.dtype == np.float64
    assert vectors.isa(cola.annotations.Stiefel)
    V = vectors.to_dense()
    np.testing.assert_allclose(V.T @ V, np.eye(6), atol=1e-12)


def test_functions_of_hermitian_operators():
    column = np.array([4.0, 1.0, 0.5, 0.5, 1.0])
    C = cola.PSD(structlin.Circulant(column))
    root = cola.linalg.sqrt(C)
    assert isinstance(root, structlin.Circulant)
    assert root.dtype == np.float64
    assert root.isa(cola.PSD)
    np.testing.assert_allclose((root @ root).to_dense(), C.to_dense())
    assert cola.exp(cola.SelfAdjoint(structlin.Circulant(column - 4))).isa(cola.PSD)
    np.testing.assert_allclose(cola.linalg.log(cola.exp(C)).to_dense(), C.to_dense())


def test_functions_that_have_no_value():
    refused(ArithmeticError, "not finite", cola.linalg.sqrt, structlin.Dense(np.array([[0.0, 1.0], [0.0, 0.0]])))
    refused(ArithmeticError, "defective", linalg.apply, np.sin, structlin.Dense(np.array([[1.0, 1.0], [0.0, 1.0]])))
    refused(ValueError, "no inverse", cola.linalg.log, random("low_rank", (9, 9), rank=2))
    defective = structlin.Dense(np.array([[1.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_allclose(cola.exp(defective).to_dense(), scipy.linalg.expm(defective.to_dense()))
    np.testing.assert_allclose(cola.linalg.pow(defective, 12).to_dense(), [[1, 12], [0, 1]])
    np.testing.assert_allclose(cola.linalg.pow(defective, -2).to_dense(), [[1, -2], [0, 1]])


def test_powers_are_taken_on_the_principal_branch():
    minus = structlin.Dense(-np.eye(2))
    root = cola.linalg.sqrt(cola.ops.Kronecker(minus, minus))
    np.testing.assert_allclose(root.to_dense(), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(cola.linalg.pow(minus, 2.00001).to_dense()[0, 0], np.exp(2.00001j * np.pi), rtol=1e-9)


def test_unary_functions():
    A = random("kronecker", (6, 6))
    for B in (A, random("low_rank", (9, 9), rank=2)):
        found = cola.linalg.apply_unary(np.cos, B)
        np.testing.assert_allclose(found.to_dense(), scipy.linalg.cosm(B.to_dense()), rtol=1e-7, atol=1e-8)
    K = cola.kronsum(A, A)
    np.testing.assert_allclose(cola.exp(K).to_dense(), scipy.linalg.expm(K.to_dense()))


# -- norms -----------------------------------------------------------------------------------------------------------


def test_the_spectral_norm_meets_its_tolerance_or_raises():
    A = random("block_tensor_train", (48, 30), rank=3)
    want = np.linalg.norm(A.to_dense(), 2)
    for tol in (1e-2, 1e-5, 1e-9):
        assert abs(linalg.spectral_norm(A, tolerance=tol) - want) <= tol * want
    with pytest.raises(linalg.ConvergenceError, match="after 2 iterations"):
        linalg.spectral_norm(A, tolerance=1e-9, max_iterations=2)
    assert linalg.spectral_norm(0.0 * A) == 0
    np.testing.assert_allclose(linalg.spectral_norm(-3 * A + A, tolerance=1e-7), 2 * want)
    J = random("block_tensor_train", (48, 30), rank=3, backend="jax")
    np.testing.assert_allclose(jax.jit(lambda A: linalg.spectral_norm(A, tolerance=1e-9))(J), want)
    assert np.isnan(jax.jit(lambda A: linalg.spectral_norm(A, tolerance=1e-9, max_iterations=2))(J))


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_norms_of_colas_composites_by_their_members(backend, monkeypatch):
    K = random("kronecker", (4, 6), backend=backend)
    B = random("circulant", (5, 5), backend=backend, dtype="complex128")
    D = structlin.Diagonal(B.factors[0] * (2 + 1j))
    cases = [cola.ops.Kronecker(K, B), cola.ops.BlockDiag(K, D, multiplicities=[2, 3]), 2 * cola.ops.BlockDiag(D, K)]
    monkeypatch.setattr(_norms, "_iterated", None)
    monkeypatch.setattr(_norms, "_columns", None)
    for A in cases:
        a = to_numpy(A.to_dense())
        np.testing.assert_allclose(float(linalg.frobenius_norm(A)), np.linalg.norm(a), rtol=1e-12)
        np.testing.assert_allclose(float(linalg.spectral_norm(A)), np.linalg.norm(a, 2), rtol=1e-12)


def test_the_norm_of_a_tensor_train_survives_cancellation():
    A = random("tensor_train", (30, 24), cores=3, rank=3)
    B = linalg.add_tensor_trains(A, structlin.TensorTrain(*A.factors[:2], A.factors[2] * (1 + 1e-9)) * -1)
    want = 1e-9 * np.linalg.norm(A.to_dense())
    np.testing.assert_allclose(linalg.frobenius_norm(B), want, rtol=1e-5)


# -- tensor trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_rounding(backend, dtype):
    A = random("tensor_train", (30, 24), cores=3, rank=(2, 3), backend=backend, dtype=dtype)
    twice = linalg.add_tensor_trains(A, A)
    assert [f.shape[0] for f in twice.factors] == [1, 4, 6]
    exact = linalg.round_tensor_train(twice)
    assert [f.shape[0] for f in exact.factors] == [1, 2, 3]
    np.testing.assert_allclose(to_numpy(exact.to_dense()), 2 * to_numpy(A.to_dense()), atol=1e-12)
    for tol in (0.5, 0.1):
        rough = linalg.round_tensor_train(A, tolerance=tol)
        error = to_numpy(rough.to_dense()) - to_numpy(A.to_dense())
        assert np.linalg.norm(error) <= tol * np.linalg.norm(to_numpy(A.to_dense()))
    fixed = linalg.round_tensor_train(A, rank=(1, 2))
    assert [f.shape[0] for f in fixed.factors] == [1, 1, 2]
    transposed = linalg.round_tensor_train(A.T, rank=(1, 2))
    np.testing.assert_allclose(to_numpy(transposed.T.to_dense()), to_numpy(fixed.to_dense()), atol=1e-12)


def test_rounding_to_fixed_ranks_is_quasi_optimal():
    """Against the singular values of the unfoldings: the error is at most the root of the sum of their tails."""
    A = random("tensor_train", (30, 24), cores=3, rank=6)
    found = linalg.round_tensor_train(A, rank=2)
    error = np.linalg.norm(found.to_dense() - A.to_dense())
    shape = [c.shape[1:3] for c in A.factors]
    tensor = A.to_dense().reshape(*(s[0] for s in shape), *(s[1] for s in shape)).transpose(0, 3, 1, 4, 2, 5)
    sizes = [n * m for n, m in shape]
    tensor = tensor.reshape(sizes)
    tails = [
        np.linalg.norm(np.linalg.svd(tensor.reshape(math.prod(sizes[: k + 1]), -1), compute_uv=False)[2:])
        for k in range(2)
    ]
    assert max(tails) <= error * (1 + 1e-9)
    assert error <= np.hypot(*tails) * (1 + 1e-9)


def test_rounding_is_checked():
    A = random("tensor_train", (6, 6), rank=2)
    for options in ({"rank": 0}, {"rank": (1, 2)}, {"tolerance": -1.0}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
            linalg.round_tensor_train(A, **options)
    with pytest.raises(TypeError, match="TensorTrain"):
        linalg.round_tensor_train(random("toeplitz", (6, 6)))
    with pytest.raises(TypeError, match="TensorTrain"):
        linalg.add_tensor_trains(A, random("toeplitz", (6, 6)))
    with pytest.raises(ValueError, match="equal sizes"):
        linalg.add_tensor_trains(A, random("tensor_train", (6, 6), factorization=((3, 2), (2, 3))))
    K = random("kronecker", (6, 6))
    np.testing.assert_allclose(linalg.add_tensor_trains(K, A).to_dense(), K.to_dense() + A.to_dense())
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda A: linalg.round_tensor_train(A).to_dense())(random("tensor_train", (6, 6), backend="jax"))


def test_the_slowest_structure_is_a_chain_without_a_name():
    """A chain of square steps without a name is inverted block by block."""
    structure = Structure.parse("abc,bxa->cxb; cxb,cyx->byc", a=2, b=3, c=4, x=2, y=2)
    rng = np.random.default_rng(0)
    A = StructuredOperator(structure, [rng.standard_normal(f.shape) for f in structure.factors])
    assert isinstance(cola.inv(A).structure, Structure)
    assert structlin.macs(cola.inv(A)) == structlin.macs(A)


@pytest.mark.parametrize("size", [3, 80])
def test_determinants_of_nan_are_those_of_torch(size):
    """Few numbers go through NumPy, whose sign would be 1."""
    blocks = torch.full((1, size, size), float("nan"), dtype=torch.float64)
    sign, log = cola.linalg.slogdet(structlin.BlockDiagonal(blocks))
    assert sign == torch.linalg.slogdet(blocks)[0].prod()
    assert torch.isnan(log)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize("name", ["toeplitz", "monarch", "tensor_train"])
def test_the_spectral_norm_where_squares_leave_the_range(name, scale):
    A = random(name, (9, 9))
    with np.errstate(all="raise"):
        found = linalg.spectral_norm(scale * A)
    np.testing.assert_allclose(found / scale, np.linalg.norm(A.to_dense(), 2), rtol=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_the_spectral_norm_of_nothing_is_zero(backend):
    A = random("toeplitz", (9, 7), backend=backend)
    assert float(linalg.spectral_norm(A[:0])) == float(linalg.spectral_norm(A[:, :0])) == 0


def test_an_exponential_that_overflows_gives_no_warning():
    A = cola.SelfAdjoint(structlin.Dense(np.diag([800.0, 1.0])))
    with np.errstate(all="raise"), pytest.raises(ArithmeticError, match="not finite"):
        linalg.expm(A)
