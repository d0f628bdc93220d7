"""Operators of SciPy and CoLA, and plain arrays, to and from ours."""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as sla
import torch
from helpers.refusals import refused

import structlin
from structlin import interop
from structlin.testing import dense_matrix, random_chain, to_numpy

BACKENDS = ("numpy", "torch", "jax")


def random(name, shape, backend="numpy", dtype="float64", seed=0, **options):
    return structlin.structure_class(name).random(shape, seed=seed, backend=backend, dtype=dtype, **options)


def matrix(A):
    return to_numpy(A.to_dense())


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_through_scipy(backend, dtype):
    A = random("monarch", (6, 8), backend, dtype, blocks=2)
    S, a = interop.to_scipy(A), matrix(A)
    assert isinstance(S, sla.LinearOperator)
    assert S.shape == (6, 8)
    assert S.dtype == np.dtype(dtype)
    rng = np.random.default_rng(1)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for x in (rng.standard_normal((8, 3)), rng.standard_normal((8, 3)) + 1j * rng.standard_normal((8, 3))):
        np.testing.assert_allclose(S @ x, a @ x, atol=tolerance)
        np.testing.assert_allclose(S @ x[:, 0], a @ x[:, 0], atol=tolerance)
        np.testing.assert_allclose(S.matvec(x[:, :1]), a @ x[:, :1], atol=tolerance)
    y = rng.standard_normal((6, 2))
    np.testing.assert_allclose(S.H @ y, a.conj().T @ y, atol=tolerance)
    np.testing.assert_allclose(S.T @ y, a.T @ y, atol=tolerance)
    np.testing.assert_allclose(S.rmatvec(y[:, 0]), a.conj().T @ y[:, 0], atol=tolerance)
    np.testing.assert_allclose((2 * S + S) @ (S.H @ y), 3 * a @ a.conj().T @ y, atol=10 * tolerance)
    assert isinstance(S @ y.repeat(2, 0)[:8], np.ndarray)


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_scipys_solvers_run_on_ours(backend):
    L = random("low_rank", (12, 12), backend, rank=3)
    A = L @ L.T + random("diagonal", (12, 12), backend) @ random("diagonal", (12, 12), backend) + cola.ops.I_like(L)
    S, a, b = interop.to_scipy(A), matrix(A), np.arange(12.0)
    want = np.linalg.solve(a, b)
    for solver in (sla.cg, sla.gmres, sla.bicgstab, sla.minres):
        x, info = solver(S, b, rtol=1e-11)
        assert info == 0
        np.testing.assert_allclose(x, want, rtol=1e-7)
    np.testing.assert_allclose(sla.lsqr(S, b, atol=1e-13, btol=1e-13)[0], want, rtol=1e-7)
    np.testing.assert_allclose(np.sort(sla.eigsh(S, k=3)[0]), np.linalg.eigvalsh(a)[-3:])
    np.testing.assert_allclose(np.sort(sla.svds(S, k=2)[1]), np.sort(np.linalg.svd(a, compute_uv=False)[:2]))
    inverse = interop.to_scipy(cola.inv(A))
    x, info = sla.gmres(S, b, M=inverse, rtol=1e-12)
    np.testing.assert_allclose(x, want, rtol=1e-8)


def test_composites_and_half_precision():
    A = random("monarch", (6, 6), "torch", "bfloat16", blocks=2)
    S = interop.to_scipy(A)
    assert S.dtype == np.float32
    np.testing.assert_allclose(S @ np.ones(6), matrix(A) @ np.ones(6), rtol=0.05, atol=0.05)
    whole = cola.kron(random("toeplitz", (3, 4)), cola.ops.Dense(np.ones((2, 5))))
    np.testing.assert_allclose(interop.to_scipy(whole) @ np.arange(20.0), matrix(whole) @ np.arange(20.0))
    tracked = structlin.Diagonal(torch.ones(3, requires_grad=True))
    np.testing.assert_array_equal(interop.to_scipy(tracked) @ np.arange(3.0), np.arange(3.0))


def test_round_trips():
    A = random("kronecker", (6, 6))
    assert interop.from_scipy(interop.to_scipy(A)) is A
    S = sla.aslinearoperator(np.diag([1.0, 2.0]))
    assert interop.to_scipy(interop.from_scipy(S)) is S


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_scipys_operators_compose_with_ours(dtype):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 6)) + (1j * rng.standard_normal((6, 6)) if "complex" in dtype else 0)
    S = interop.from_scipy(scipy.sparse.csr_array(a))
    A = random("kronecker", (6, 6), dtype=dtype)
    x = rng.standard_normal((6, 2))
    np.testing.assert_allclose(S @ x, a @ x)
    np.testing.assert_allclose(x.T @ S, x.T @ a)
    np.testing.assert_allclose(S.H @ x, a.conj().T @ x)
    np.testing.assert_allclose(np.asarray((S @ A + 2 * S).T), (a @ matrix(A) + 2 * a).T)
    np.testing.assert_allclose(cola.linalg.solve(S + A, x), np.linalg.solve(a + matrix(A), x))
    sign, log = cola.linalg.slogdet(S)
    np.testing.assert_allclose([sign, log], np.linalg.slogdet(a))
    assert isinstance(S @ x, np.ndarray)


def test_what_from_scipy_refuses():
    refused(TypeError, r"sparse matrix of SciPy, got builtins\.str", interop.from_scipy, "x")
    refused(TypeError, "already", interop.from_scipy, random("dense", (2, 2)))
    refused(ValueError, "got int64", interop.from_scipy, scipy.sparse.csr_array(np.eye(2, dtype=int)))
    refused(TypeError, "expected a linear operator", interop.to_scipy, np.eye(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays(backend):
    A = random("block_tensor_train", (6, 8), backend, rank=2)
    a = matrix(A)
    for op, want in ((A, a), (A @ A.T + cola.ops.I_like(A @ A.T), a @ a.T + np.eye(6))):
        for got in (np.asarray(op), np.array(op), interop.to_numpy(op)):
            assert type(got) is np.ndarray
            np.testing.assert_allclose(got, want)
    assert np.asarray(A, dtype="float32").dtype == np.float32
    assert not np.shares_memory(np.asarray(cola.ops.Dense(a)), a)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(A, copy=False)
    as_torch, as_jax = interop.to_torch(A), interop.to_jax(A)
    assert isinstance(as_torch, torch.Tensor)
    assert as_torch.dtype == torch.float64
    assert isinstance(as_jax, jax.Array)
    np.testing.assert_allclose(as_torch, a)
    np.testing.assert_allclose(as_jax, a)
    np.testing.assert_allclose(torch.as_tensor(np.asarray(A)), a)
    assert interop.to_torch(A, dtype=torch.float32).dtype == torch.float32


def test_arithmetic_with_arrays_still_goes_to_the_operator():
    """``__array__`` must not make NumPy or jax multiply a dense copy."""
    N, J = random("kronecker", (6, 6)), random("kronecker", (6, 6), "jax")
    for found in (np.float64(2) * N, np.array(2.0) * N, np.ones((6, 6)) + N, np.ones((6, 6)) - N, jnp.ones((6, 6)) + J):
        assert isinstance(found, cola.ops.LinearOperator)
    assert isinstance(np.ones((2, 6)) @ N, np.ndarray)
    assert isinstance(jnp.ones((2, 6)) @ J, jax.Array)
    assert isinstance(jnp.asarray(2.0) * J, cola.ops.LinearOperator)
    with pytest.raises(TypeError, match="ufunc"):
        np.multiply(N, 2)
    with pytest.raises(TypeError, match="numpy array"):
        np.ones((2, 6)) @ random("kronecker", (6, 6), "torch")


def test_gradients_pass_through_to_torch():
    d = torch.tensor([1.0, 2.0], requires_grad=True)
    interop.to_torch(structlin.Diagonal(d)).sum().backward()
    torch.testing.assert_close(d.grad, torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_operator(backend):
    x = structlin._arrays.to_backend(np.arange(6.0).reshape(2, 3), backend)
    A = interop.as_operator(x)
    assert isinstance(A, structlin.Dense)
    assert A.factors[0] is x
    assert interop.as_operator(A) is A
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        interop.as_operator(x[:, 0])


def test_as_operator_of_scipys_matrices():
    np.testing.assert_array_equal(np.asarray(interop.as_operator(scipy.sparse.eye_array(3))), np.eye(3))
    with pytest.raises(TypeError, match="list"):
        interop.as_operator([[1.0]])


COUNTERPARTS = {
    "dense": ((5, 7), {}, cola.ops.Dense),
    "kronecker": ((6, 35), {}, cola.ops.Kronecker),
    "block_diagonal": ((6, 9), {"blocks": 3}, cola.ops.BlockDiag),
    "diagonal": ((5, 5), {}, cola.ops.Diagonal),
    "permutation": ((5, 5), {}, cola.ops.Permutation),
    "low_rank": ((5, 7), {"rank": 2}, cola.ops.Product),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_colas_operators(name, backend):
    shape, options, cls = COUNTERPARTS[name]
    for A in (random(name, shape, backend, **options), random(name, shape, backend, **options).T):
        theirs = interop.to_cola(A)
        assert isinstance(theirs, cls)
        assert not isinstance(theirs, structlin.StructuredOperator)
        assert theirs.annotations == A.annotations
        np.testing.assert_allclose(np.asarray(theirs), matrix(A), atol=1e-14)
        again = interop.from_cola(theirs)
        assert isinstance(again, structlin.structure_class(name))
        assert again.backend == backend
        np.testing.assert_allclose(matrix(again), matrix(A), atol=1e-14)


CHAINS = {
    "monarch": ((6, 8), {"blocks": 2}),  # padded and regrouped
    "block_tensor_train": ((12, 20), {"rank": 2, "cores": 3}),
    "tensor_train": ((6, 20), {"rank": 2}),
    "blast": ((6, 9), {"blocks": 3, "rank": 2}),
    "butterfly": ((8, 8), {}),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_in_colas_operators(name, backend):
    shape, options = CHAINS[name]
    for A in (random(name, shape, backend, **options), random(name, shape, backend, **options).T):
        theirs = interop.to_cola(A)
        assert not isinstance(theirs, structlin.StructuredOperator)
        assert theirs.xnp is A.xnp
        a, x = dense_matrix(A.structure, A.factors), np.random.default_rng(0).standard_normal((A.shape[1], 2))
        columns, rows = (structlin._arrays.to_backend(v, backend) for v in (x, x.T))
        np.testing.assert_allclose(matrix(theirs), a, atol=1e-13)
        np.testing.assert_allclose(to_numpy(theirs @ columns), a @ x, atol=1e-13)
        np.testing.assert_allclose(to_numpy(rows @ theirs.T), x.T @ a.T, atol=1e-13)


@pytest.mark.parametrize("seed", range(30))
def test_random_chains_in_colas_operators(seed):
    rng = np.random.default_rng(seed)
    structure = random_chain(rng)
    factors = [rng.standard_normal(f.shape) for f in structure.factors]
    theirs = interop.to_cola(structlin.StructuredOperator(structure, factors))
    wanted = dense_matrix(structure, factors)
    assert tuple(theirs.shape) == wanted.shape
    np.testing.assert_allclose(theirs.to_dense(), wanted, atol=1e-12 * max(1, np.abs(wanted).max()))


def test_gradients_reach_the_factors_of_a_chain():
    A = random("monarch", (6, 8), "torch", blocks=2)
    factors = [f.clone().requires_grad_() for f in A.factors]
    theirs = interop.to_cola(structlin.StructuredOperator(A.structure, factors))
    (theirs @ theirs.T.to_dense()).sum().backward()
    assert all(bool((f.grad != 0).any()) for f in factors)


def test_what_has_no_counterpart():
    with pytest.raises(ValueError, match="CoLA has no operator"):
        interop.to_cola(random("toeplitz", (3, 3)))
    with pytest.raises(TypeError, match="of structlin"):
        interop.to_cola(cola.ops.Dense(np.eye(2)))
    tridiagonal = cola.ops.Tridiagonal(np.ones(2), np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="Tridiagonal"):
        interop.from_cola(tridiagonal)
    scalar = interop.from_cola(3.0 * cola.ops.I_like(random("diagonal", (2, 2), "torch")))
    assert isinstance(scalar, structlin.Diagonal)
    np.testing.assert_array_equal(np.asarray(scalar), 3 * np.eye(2))
    product = cola.ops.Product(cola.ops.Dense(np.ones((2, 5))), cola.ops.Dense(np.ones((5, 2))))
    with pytest.raises(ValueError, match="Product"):
        interop.from_cola(product)


# -- what NumPy's and SciPy's users expect -------------------------------------------------------------------------


def positive_definite(backend):
    a = np.random.default_rng(0).standard_normal((6, 6)) / 3
    K = structlin.Kronecker(*(structlin._arrays.to_backend(x @ x.T + np.eye(n), backend, "float64")
                              for n, x in ((2, a[:2, :2]), (3, a[:3, :3]))))  # fmt: skip
    return K + structlin.Diagonal(structlin._arrays.to_backend(np.arange(1.0, 7.0), backend, "float64"))


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_scipys_solvers_take_operators_and_composites_as_they_are(backend):
    A, b = positive_definite(backend), np.arange(6.0)
    dense = np.asarray(A)
    x, info = scipy.sparse.linalg.cg(A, b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(dense @ x, b, atol=1e-9)
    wrapped = scipy.sparse.linalg.aslinearoperator(A @ A)
    np.testing.assert_allclose(wrapped @ np.eye(6), dense @ dense, rtol=1e-12)
    np.testing.assert_allclose(wrapped.H @ b, dense.T @ (dense.T @ b), rtol=1e-12)
    np.testing.assert_allclose(scipy.sparse.linalg.eigsh(A, k=2)[0], np.linalg.eigvalsh(dense)[-2:], rtol=1e-10)


def test_scipys_methods_on_rectangular_and_complex_operators():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((3, 5)) + 1j * rng.standard_normal((3, 5))
    A, x, Y = structlin.Dense(a), rng.standard_normal(5), rng.standard_normal((3, 2))
    np.testing.assert_allclose(A.matvec(x), a @ x)
    np.testing.assert_allclose(A.matvec(x[:, None]), (a @ x)[:, None])
    np.testing.assert_allclose(A.rmatvec(Y[:, 0]), a.conj().T @ Y[:, 0])
    np.testing.assert_allclose(A.rmatmat(Y), a.conj().T @ Y)
    np.testing.assert_allclose(A.matmat(np.eye(5)), a)
    torch_operator = structlin.Dense(torch.tensor(a))
    np.testing.assert_allclose(torch_operator.matvec(x), a @ x)
    np.testing.assert_allclose(interop.to_scipy(torch_operator) @ x, a @ x)


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_powers(backend):
    A = positive_definite(backend)
    dense = np.asarray(A)
    for n in (0, 1, 2, 5, np.int64(3), 2.0):
        np.testing.assert_allclose(np.asarray(A**n), np.linalg.matrix_power(dense, int(n)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.asarray((A**-2).to_dense()), np.linalg.matrix_power(dense, -2), rtol=1e-8, atol=1e-12)
    root = np.asarray((cola.PSD(A) ** 0.5).to_dense())
    np.testing.assert_allclose(root @ root, dense, rtol=1e-9, atol=1e-9)
    K = structlin.Kronecker(*(structlin._arrays.to_backend(np.eye(n) + 1, backend) for n in (2, 3)))
    assert isinstance(K**3, structlin.Kronecker)
    with pytest.raises(ValueError, match=r"only square operators have powers, got shape \(2, 3\)"):
        structlin.Dense(np.ones((2, 3))) ** 2
    with pytest.raises(TypeError):
        K ** "2"


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_with_batches_of_columns(backend):
    rng = np.random.default_rng(2)
    A = structlin.BlockTensorTrain.random((35, 6), rank=2, seed=0, backend=backend, dtype="float64")
    X = rng.standard_normal((2, 3, 6, 4))
    got = A @ structlin._arrays.to_backend(X, backend, "float64")
    np.testing.assert_allclose(np.asarray(got), np.asarray(A) @ X, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"an array of shape \(6,\) or \(..., 6, k\), got \(6, 2, 4\)"):
        A @ structlin._arrays.to_backend(np.ones((6, 2, 4)), backend, "float64")


def test_to_jax_keeps_the_precision_or_says_that_it_cannot():
    import jax

    A = structlin.Dense(np.eye(2))
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="jax would return float32 instead of float64; enable 64 bits with"):
            interop.to_jax(A)
        assert interop.to_jax(A, "float32").dtype == "float32"
    assert interop.to_jax(A).dtype == "float64"
    half = structlin.Dense(torch.eye(2, dtype=torch.bfloat16))
    assert str(interop.to_jax(half).dtype) == "bfloat16"
    assert interop.to_torch(structlin.Dense(interop.to_jax(half))).dtype == torch.bfloat16
