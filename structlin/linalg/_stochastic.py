"""Stochastic Lanczos quadrature: an estimate of ``log det A`` with a standard error.

``log det A = tr log A`` is the mean of ``z^T log(A) z`` over vectors z of random signs (Hutchinson 1990, A stochastic
estimator of the trace). The Lanczos process gives each term as a Gauss quadrature (Ubaru, Chen and Saad 2017, Fast
estimation of tr(f(A))). Only three vectors per probe are kept, so memory does not depend on the number of steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from cola.annotations import PSD
from cola.ops import LinearOperator

from structlin._arrays import Array
from structlin._implicit import frozen, is_followed
from structlin._lapack import eps, is_known, lapack, singular_to_roundoff
from structlin._spectra import once_differentiable
from structlin.linalg._common import like, require_square
from structlin.linalg._iterative import cg
from structlin.verdicts import Answer, Verdict

PROBES = 16
STEPS = 100
_BATCH = 8  # probes at a time


def estimate_logdet(A: LinearOperator, *, probes: int = PROBES, steps: int = STEPS, seed: int = 0) -> Answer[Array]:
    """Return an estimate of ``log |det A|`` and its error; half of that of ``A^H A`` if A is not annotated PSD.

    The error is the standard error of the mean over probes, plus the largest change of a quadrature over the last third
    of its steps. The first derivative is the estimate ``z^T A^-1 dA z`` by conjugate gradients.
    """
    n = require_square(A, "the determinant")
    if probes < 2 or steps < 2:
        raise ValueError(f"probes and steps must be at least 2, got {probes} and {steps}")
    positive = A.isa(PSD)
    fixed = frozen(A)
    if not is_known(fixed @ like(np.zeros(n), A)):
        raise ValueError("a stochastic estimate depends on values and cannot be traced; cola.linalg.LU() can be traced")
    adjoint = fixed.H

    def multiply(x: Array) -> Array:
        y = fixed @ x
        return y if positive else adjoint @ y

    rng = np.random.default_rng(seed)
    values, drifts, vectors = [], [], []
    for start in range(0, probes, _BATCH):
        signs = rng.integers(0, 2, (n, min(_BATCH, probes - start))) * 2.0 - 1.0
        z = like(signs, A)
        found, earlier = _quadrature(multiply, z, min(steps, n), math.sqrt(n))
        values.append(found * n)
        drifts.append(np.abs(found - earlier).max() * n)
        vectors.append(z)
    sample = np.concatenate(values) * (1.0 if positive else 0.5)
    error = float(sample.std(ddof=1) / math.sqrt(probes) + max(drifts))
    xp = lapack(vectors[0])
    value = xp.real(like(np.array([sample.mean()]), A))[0]
    if is_followed(A):
        value = value + sum(_derivative(A, fixed, z, positive) for z in vectors) / probes
    return Answer(value, Verdict.ESTIMATED, error, {"probes": probes, "steps": min(steps, n), "seed": seed})


def _quadrature(multiply: Any, z: Array, steps: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return ``v^T log(A) v`` for each normalized column v of z, from all steps and from two thirds of them."""
    xp = lapack(z)
    v, before, beta = z / size, z * 0, None
    alphas, betas = [], []
    for _ in range(steps):
        w = multiply(v) if beta is None else multiply(v) - before * beta
        alpha = xp.real((xp.conj(v) * w).sum(0))
        w = w - v * alpha
        norm = xp.sqrt((xp.abs(w) ** 2).sum(0))
        alphas.append(_numpy(alpha))
        betas.append(_numpy(norm))
        if not betas[-1].max() > 10 * eps(z.dtype) * np.abs(alphas[0]).max():
            break
        before, v, beta = v, w / xp.where(norm == 0, norm * 0 + 1, norm), norm
    a, b = np.array(alphas), np.array(betas)
    return _of_tridiagonal(a, b), _of_tridiagonal(*(x[: max(1, 2 * len(a) // 3)] for x in (a, b)))


def _of_tridiagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    m = len(a)
    T = np.zeros((a.shape[1], m, m))
    i = np.arange(m)
    T[:, i, i] = a.T
    T[:, i[1:], i[:-1]] = T[:, i[:-1], i[1:]] = b[:-1].T
    values, vectors = np.linalg.eigh(T)
    least = values.min(initial=np.inf)
    if not least > 0:
        raise singular_to_roundoff(f"a matrix with a Ritz value of {least:.1e}")
    return (vectors[:, 0, :] ** 2 * np.log(values)).sum(-1)


def _derivative(A: LinearOperator, fixed: LinearOperator, z: Array, positive: bool) -> Array:
    """Return zero with the derivative ``tr(w^H dA z)``, for ``w = A^-H z``."""
    xp = lapack(z)
    if positive:
        w = cg(fixed, z, tolerance=1e-6)
    else:  # A^-H z = A (A^H A)^-1 z
        w = fixed @ cg(PSD(fixed.H @ fixed), z, tolerance=1e-6)
    product = (xp.conj(w) * (A @ z)).sum()
    return once_differentiable(xp.real(product - xp.stop_gradient(product)))


def _numpy(x: Array) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)
