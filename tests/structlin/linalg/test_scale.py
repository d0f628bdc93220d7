"""Matrices of very large and very small numbers: solutions, determinants and norms scale."""

import math

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.arrays import spd

import structlin as sl
from structlin import linalg
from structlin._arrays import to_backend


def rng(seed=0):
    return np.random.default_rng(seed)


THIN = sl.Structure.parse("i,ri->r; r,or->o", i=6, r=1, o=6)
SCALES = {
    "dense": lambda s: sl.Dense(s * (rng().standard_normal((6, 6)) + 3 * np.eye(6))),
    "blocks": lambda s: sl.BlockDiagonal(s * (rng().standard_normal((2, 3, 3)) + 3 * np.eye(3))),
    "diagonal": lambda s: sl.Diagonal(s * np.arange(1.0, 7)),
    "circulant": lambda s: sl.Circulant(s * np.array([4.0, 1, 0.5, 0.2, 0.1, 0])),
    "kronecker": lambda s: sl.Kronecker(s * spd(2), spd(3, 1)),
    "shifted": lambda s: sl.Kronecker(s * spd(2), spd(3, 1)) + s * cola.ops.I_like(sl.Dense(np.eye(6))),
    "low rank": lambda s: (
        s * (sl.StructuredOperator(THIN, (np.ones((1, 6)), np.ones((6, 1)))) + sl.Diagonal(np.arange(1.0, 7)))
    ),
    "monarch": lambda s: sl.Monarch(
        s * (rng().standard_normal((2, 3, 3)) + 3 * np.eye(3)), rng(1).standard_normal((3, 2, 2)) + 3 * np.eye(2)
    ),
    "toeplitz": lambda s: sl.Toeplitz(s * 0.5 ** np.arange(70)),
    "hankel": lambda s: sl.Hankel(s * 0.5 ** np.arange(70)[::-1], s * 0.5 ** np.arange(70)),
}


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("name", SCALES)
def test_scale(name, scale):
    A = SCALES[name](scale)
    a = A.to_dense() / scale
    n = len(a)
    b = rng(2).standard_normal((n, 2))
    np.testing.assert_allclose(linalg.solve(A, b) * scale, np.linalg.solve(a, b), rtol=1e-8)
    np.testing.assert_allclose(cola.inv(A) @ b * scale, np.linalg.solve(a, b), rtol=1e-8)
    sign, log = linalg.slogdet(A)
    np.testing.assert_allclose(
        [float(sign), float(log)], np.linalg.slogdet(a) + np.array([0, n * np.log(scale)]), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(linalg.frobenius_norm(A) / scale, np.linalg.norm(a), rtol=1e-9)
    np.testing.assert_allclose(linalg.trace(A) / scale, np.trace(a), rtol=1e-9)


B = np.array([[2.0, 1], [1, 3]])
# operators of arrays made by f, and their norms, in exact arithmetic
NORMS = {
    "kronecker": (lambda f, s: sl.Kronecker(f(s * np.eye(2)), f(B / s)), lambda s: math.sqrt(30)),
    "three": (lambda f, s: sl.Kronecker(f(s * np.eye(2)), f(s * np.eye(2)), f(B / s / s)), lambda s: math.sqrt(60)),
    "rank 1": (lambda f, s: sl.LowRank(f(s * np.ones((1, 3))), f(np.ones((3, 1)) / s)), lambda s: 3),
    "rank 2": (lambda f, s: sl.LowRank(f(s * np.eye(2, 5)), f(np.eye(5, 2) / s)), lambda s: math.sqrt(2)),
    "diagonal": (lambda f, s: sl.Diagonal(f(s * np.array([3.0, 4]))), lambda s: 5 * s),
    "circulant": (lambda f, s: sl.Circulant(f(s * np.array([3.0, 4]))), lambda s: math.sqrt(50) * s),
    "toeplitz": (lambda f, s: sl.Toeplitz(f(s * np.array([2.0, 1]))), lambda s: math.sqrt(10) * s),
    "blocks": (lambda f, s: sl.BlockDiagonal(f(s * B[None])), lambda s: math.sqrt(15) * s),
    "dense": (lambda f, s: sl.Dense(f(s * B)), lambda s: math.sqrt(15) * s),
    "tensor-train": (
        lambda f, s: sl.TensorTrain(f(s * np.ones((1, 2, 2, 1))), f(np.ones((1, 2, 2, 1)) / s)),
        lambda s: 4,
    ),
}


@pytest.mark.parametrize(
    ("dtype", "exponents"), [("float64", [-300, -160, 150, 200, 300]), ("float32", [-35, -22, 12, 18, 35])]
)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_norms_whose_squares_leave_the_range(backend, dtype, exponents):
    tolerance = 1e-13 if dtype == "float64" else 1e-5
    for name, (make, norm) in NORMS.items():
        for exponent in exponents:
            scale = 10.0 ** (exponent / 2 if name == "three" else exponent)
            A = make(lambda x: to_backend(x, backend, dtype), scale)
            found = float(linalg.frobenius_norm(A))
            np.testing.assert_allclose(found, norm(scale), rtol=tolerance, err_msg=f"{name} {scale}")
            if name in ("kronecker", "rank 1", "rank 2"):
                np.testing.assert_allclose(float(linalg.inner_product(A, A)), norm(scale) ** 2, rtol=tolerance)


def test_partial_products_of_norms_stay_in_the_range():
    A = sl.Kronecker(1e200 * np.eye(2), 1e200 * np.eye(2), 1e-300 * B)
    np.testing.assert_allclose(linalg.frobenius_norm(A), 1e100 * math.sqrt(60), rtol=1e-13)
    np.testing.assert_allclose(linalg.spectral_norm(A), 1e100 * (5 + math.sqrt(5)) / 2, rtol=1e-13)
    assert linalg.inner_product(sl.Dense(1e200 * B), sl.Dense(1e200 * B)) == math.inf


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_gradients_of_norms(scale):
    d = np.array([3.0, 4])
    at = torch.tensor(scale * d, requires_grad=True)
    linalg.frobenius_norm(sl.Diagonal(at)).backward()
    a, b = (torch.tensor(x, requires_grad=True) for x in (scale * np.eye(2), B / scale))
    linalg.frobenius_norm(sl.Kronecker(a, b)).backward()
    slope = jax.grad(lambda x: linalg.frobenius_norm(sl.Diagonal(x)))
    for found in (at.grad.numpy(), slope(jnp.asarray(scale * d)), jax.jit(slope)(jnp.asarray(scale * d))):
        np.testing.assert_allclose(found, d / 5, rtol=1e-13)
    np.testing.assert_allclose(a.grad * scale, np.eye(2) * math.sqrt(15 / 2), atol=1e-13)
    np.testing.assert_allclose(b.grad / scale, B * math.sqrt(2 / 15), atol=1e-13)
    found = jax.grad(lambda x: linalg.frobenius_norm(sl.Kronecker(x, jnp.asarray(B / scale))))(scale * jnp.eye(2))
    np.testing.assert_allclose(found * scale, np.eye(2) * math.sqrt(15 / 2), atol=1e-13)
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    linalg.frobenius_norm(sl.Diagonal(zero)).backward()
    np.testing.assert_array_equal(zero.grad, 0)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [("float64", -200), ("float64", -300), ("float64", 200), ("float32", -25), ("float32", 25)]
)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_solutions_whose_squares_leave_the_range(backend, dtype, exponent):
    d, b = (to_backend(x, backend, dtype) for x in (10.0**exponent * np.array([1.0, 2, 3]), np.array([1.0, 2, 4])))
    want = np.array([1, 1, 4 / 3]) * 10.0**-exponent
    answer = linalg.solve(sl.Diagonal(d), b, full_output=True)
    assert answer.verdict is linalg.Verdict.VERIFIED
    np.testing.assert_allclose(np.asarray(answer.value, float), want, rtol=1e-6)
    wide = to_backend(np.stack([b, np.asarray(b) * 10.0 ** (exponent / 2)], 1), backend, dtype)
    found = np.asarray(linalg.solve(sl.Diagonal(d), wide), float)
    np.testing.assert_allclose(found, want[:, None] * [1, 10.0 ** (exponent / 2)], rtol=1e-6)
