"""Matrices of very large and very small numbers: solutions, determinants and norms scale."""

import math

import cola
import numpy as np
import pytest

import structlin as sl
from structlin import linalg


def rng(seed=0):
    return np.random.default_rng(seed)


def spd(n, seed=0, shift=0.5):
    x = rng(seed).standard_normal((n, n)) / math.sqrt(n)
    return x @ x.T + shift * np.eye(n)


SCALES = {
    "dense": lambda s: sl.Dense(s * (rng().standard_normal((6, 6)) + 3 * np.eye(6))),
    "blocks": lambda s: sl.BlockDiagonal(s * (rng().standard_normal((2, 3, 3)) + 3 * np.eye(3))),
    "diagonal": lambda s: sl.Diagonal(s * np.arange(1.0, 7)),
    "circulant": lambda s: sl.Circulant(s * np.array([4.0, 1, 0.5, 0.2, 0.1, 0])),
    "kronecker": lambda s: sl.Kronecker(s * spd(2), spd(3, 1)),
    "shifted": lambda s: sl.Kronecker(s * spd(2), spd(3, 1)) + s * cola.ops.I_like(sl.Dense(np.eye(6))),
    "low rank": lambda s: (
        s
        * (
            sl.StructuredOperator(
                sl.Structure.parse("i,ri->r; r,or->o", i=6, r=1, o=6), (np.ones((1, 6)), np.ones((6, 1)))
            )
            + sl.Diagonal(np.arange(1.0, 7))
        )
    ),
    "monarch": lambda s: sl.Monarch(
        *(
            f + 0.0
            for f in (
                s * (rng().standard_normal((2, 3, 3)) + 3 * np.eye(3)),
                rng(1).standard_normal((3, 2, 2)) + 3 * np.eye(2),
            )
        )
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
