"""Iterative solvers and the spectral norm against dense float64 matrices of NumPy."""

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
from structlin.linalg import Verdict
from structlin.testing import to_numpy

BACKENDS = ("numpy", "torch", "jax")


def complex_numbers(*shape):
    rng = np.random.default_rng(1)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["cg", "minres", "lsmr"])
def test_a_real_operator_with_a_complex_right_side(name, backend):
    a = np.random.default_rng(0).standard_normal((6, 6)) + 4 * np.eye(6)
    a = a if name == "lsmr" else a @ a.T
    A = sl.Dense(to_backend(a, backend))
    for b in (complex_numbers(6), complex_numbers(6, 2)):
        answer = getattr(linalg, name)(A, to_backend(b, backend), full_output=True)
        np.testing.assert_allclose(to_numpy(answer.value), np.linalg.solve(a, b), rtol=1e-6)
        assert answer.error < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["cg", "minres", "lsmr"])
def test_right_sides_of_other_dtypes_are_promoted(name, backend):
    a = np.random.default_rng(0).standard_normal((6, 6))
    a = (a @ a.T + np.eye(6)).astype("float32")
    for own, dtypes in (("float64", ("int64", "bool", "float32")), ("float32", ("int32", "float64"))):
        A = sl.Dense(to_backend(a.astype(own), backend))
        for dtype in dtypes:
            b = to_backend((np.arange(12).reshape(6, 2) % 5).astype(dtype), backend)
            common = str(A.xnp.promote_types(A.dtype, b.dtype))
            tolerance = 1e-12 if "64" in common else 1e-6
            answer = getattr(linalg, name)(A, b, tolerance=tolerance, full_output=True)
            assert str(answer.value.dtype) == common
            wanted = np.linalg.solve(a.astype("float64"), to_numpy(b).astype("float64"))
            np.testing.assert_allclose(to_numpy(answer.value), wanted, atol=100 * tolerance)


def general(n):
    """The parts of a Toeplitz matrix plus a diagonal that is not symmetric, and its dense matrix."""
    rng = np.random.default_rng(0)
    column, row, d = np.r_[3.0, -1, 0.5, np.zeros(n - 3)], np.r_[3.0, 0.7, np.zeros(n - 2)], 1 + rng.random(n)
    return (column, row, d), scipy.linalg.toeplitz(column, row) + np.diag(d)


def operator(column, row, d):
    return sl.Toeplitz(column, row) + sl.Diagonal(d)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gmres_above_the_dense_limit(backend, monkeypatch):
    products = []
    plain = cola.ops.Sum._matmat
    monkeypatch.setattr(cola.ops.Sum, "_matmat", lambda self, X: products.append(1) or plain(self, X))
    parts, a = general(300)
    A = operator(*(to_backend(x, backend) for x in parts))
    b = np.stack([complex_numbers(300).real, np.zeros(300), complex_numbers(300).imag], 1)
    with linalg.dense_limit(100):
        x = to_numpy(linalg.solve(A, to_backend(b, backend)))
        assert len(products) < 60
        assert (np.linalg.norm(a @ x - b, axis=0) <= 1e-5 * np.linalg.norm(b, axis=0)).all()
        inverse = cola.inv(A, cola.linalg.Auto(tol=1e-11))
        np.testing.assert_allclose(to_numpy(inverse @ to_backend(b, backend)), np.linalg.solve(a, b), atol=1e-9)
        np.testing.assert_allclose(to_numpy(inverse.T @ to_backend(b, backend)), np.linalg.solve(a.T, b), atol=1e-9)
        z = b[:, 0] + 1j * b[:, 2]
        np.testing.assert_allclose(to_numpy(inverse @ to_backend(z, backend)), np.linalg.solve(a, z), atol=1e-9)


def test_gmres_restarts_counts_and_uses_its_options():
    a = np.random.default_rng(0).standard_normal((120, 120)) + 14 * np.eye(120)
    A, b = sl.Dense(a) + sl.Toeplitz(np.zeros(120)), np.arange(120.0)
    with linalg.dense_limit(10):
        for options in ({}, {"x0": np.ones(120)}, {"P": sl.Diagonal(1 / np.diag(a))}):
            made = linalg._iterative.verified_inverse(A, cola.linalg.Auto(tol=1e-10, **options))
            np.testing.assert_allclose(made @ b, np.linalg.solve(a, b), atol=1e-6)
            np.testing.assert_allclose(b @ made, np.linalg.solve(a.T, b), atol=1e-6)
        few = linalg._iterative.verified_inverse(A, cola.linalg.Auto(tol=1e-10, max_iters=7))
        with pytest.raises(linalg.ConvergenceError, match="after 7 iterations"):
            few @ b
        with pytest.raises(linalg.ConvergenceError, match="GMRES left"):
            linalg._iterative.verified_inverse(0 * A, cola.linalg.Auto()) @ b
        half = sl.Dense(torch.eye(30, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="GMRES needs float32"):
            linalg._iterative.verified_inverse(half, cola.linalg.Auto()) @ torch.ones(30, dtype=torch.bfloat16)


def test_gmres_under_jit_and_its_gradients():
    parts, a = general(60)
    b = complex_numbers(60).real
    x = np.linalg.solve(a, b)
    wanted = -np.linalg.solve(a.T, 2 * x) * x  # of the sum of squares with respect to the diagonal

    def loss(d, column, row, b):
        return (linalg.solve(operator(column, row, d), b) ** 2).sum()

    with linalg.dense_limit(10):
        arrays = [jnp.asarray(y) for y in (parts[2], parts[0], parts[1], b)]
        value, found = jax.jit(jax.value_and_grad(loss))(*arrays)
        np.testing.assert_allclose(value, x @ x, rtol=1e-5)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * abs(wanted).max())
        d, *others = (torch.tensor(y) for y in (parts[2], parts[0], parts[1], b))
        (found,) = torch.autograd.grad(loss(d.requires_grad_(), *others), d)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * abs(wanted).max())
        with pytest.raises(ValueError, match=r"torch\.func"):
            torch.func.grad(loss)(d.detach(), *others)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["cg", "minres"])
def test_columns_that_are_not_finite(name, backend):
    b = np.array([[np.nan, 1.0, 1.0], [1.0, np.inf, 1.0], [2.0, 4.0, 6.0]]).T
    A = cola.PSD(sl.Diagonal(to_backend(np.array([1.0, 2.0, 3.0]), backend)))
    answer = getattr(linalg, name)(A, to_backend(b, backend), full_output=True)
    np.testing.assert_allclose(to_numpy(answer.value)[:, 2], 2, rtol=1e-7)
    assert np.isnan(to_numpy(answer.value)[:, :2]).all()
    assert np.isnan(answer.error)
    assert answer.verdict is Verdict.NOT_VERIFIED


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [[1.0, 0.0, 2.0], [1.0, -2.0, 3.0]])
def test_cg_finds_that_a_matrix_is_not_positive_definite(d, backend):
    A = cola.PSD(sl.Diagonal(to_backend(np.array(d), backend)))
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        linalg.cg(A, to_backend(np.ones(3), backend))
    if backend == "jax":
        assert jnp.isnan(jax.jit(lambda A: linalg.cg(A, jnp.ones(3)))(A)).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_cg_scales(scale):
    answer = linalg.cg(sl.Diagonal(np.array([1.0, 2.0, 4.0])), scale * np.ones((3, 2)), full_output=True)
    np.testing.assert_allclose(answer.value[:, 0] / scale, [1, 0.5, 0.25])
    assert answer.verdict is Verdict.VERIFIED


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_spectral_norm_with_close_singular_values(backend, dtype):
    n = 300
    A = sl.Toeplitz(to_backend(np.r_[2.0, -1, np.zeros(n - 2)].astype(dtype), backend))
    found = float(linalg.spectral_norm(A))
    np.testing.assert_allclose(found, 2 + 2 * np.cos(np.pi / (n + 1)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 2), (3, 9), (9, 3), (40, 70)])
def test_the_spectral_norm_of_any_shape(shape):
    A = sl.Toeplitz.random(shape, seed=0)
    np.testing.assert_allclose(linalg.spectral_norm(A), np.linalg.norm(A.to_dense(), 2), rtol=1e-6)


def test_the_spectral_norm_of_special_matrices():
    for column, wanted in ((np.ones(50), 50), (np.r_[1.0, np.zeros(50)], 1), (np.zeros(9), 0), ([np.nan] * 9, np.nan)):
        np.testing.assert_allclose(linalg.spectral_norm(sl.Toeplitz(np.array(column))), wanted)
    with pytest.raises(linalg.ConvergenceError, match="after 20 iterations"):
        linalg.spectral_norm(sl.Toeplitz(np.r_[2.0, -1, np.zeros(298)]), max_iterations=20)
