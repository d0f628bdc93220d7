"""The leading singular vectors of a stack of matrices M, without a full decomposition.

A full decomposition costs about twenty times a product of such matrices, and a Kronecker product needs one pair of
thousands of vectors. So the leading left vectors come from the Gram matrix G of the shorter side, by the cheapest of

- repeated squaring, for one vector of each of many small matrices: ``G^(2^k)`` converges to the projection onto it up
  to a factor, also if singular values are close;
- Lanczos iteration (ARPACK), for few vectors of a large matrix;
- eigenvectors of G; for large matrices, only those needed (``syevr`` of LAPACK).

A Gram matrix squares the condition number. So vectors with singular values below the square root of roundoff are lost.
Steps of subspace iteration with M itself, orthogonalized by Householder reflections, recover them: none or one if the
remainder is large, and four if it is near roundoff. If the remainder is then neither large nor at roundoff, the full
decomposition is computed.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from structlin._threads import linalg, of_stack

SMALL = 16  # longest shorter side for which a full decomposition is faster
LANCZOS = 512  # least shorter side for which Lanczos iteration is tried
MANY = 4  # least number of matrices for which squaring is faster than eigenvectors
SQUARINGS = 60  # G^(2^60) separates singular values that differ by roundoff


def leading(matrices: np.ndarray, count: int) -> np.ndarray:
    """Return orthonormal bases (batch, m, count) of the leading left singular vectors of ``matrices`` (batch, m, n).

    ``count`` is at most min(m, n). The norm of the projection of a matrix onto its basis is that of its leading
    singular values, up to roundoff. The vectors of a basis are unordered.
    """
    short = min(matrices.shape[1:])
    if short <= SMALL or 2 * count > short:
        return linalg.svd(matrices, full_matrices=False)[0][..., :count]
    adjoint = matrices.conj().swapaxes(-1, -2)
    wide = matrices.shape[1] <= matrices.shape[2]
    start = None
    if len(matrices) == 1 and short >= LANCZOS and count <= short // 128:
        start = _by_lanczos(matrices[0], count)
    exact = start is None and (count > 1 or len(matrices) < MANY)
    if start is None:
        gram = matrices @ adjoint if wide else adjoint @ matrices
        start = _by_eigenvectors(gram, count) if exact else _by_squaring(gram)
        if not wide:
            start = orthonormal(matrices @ start)
    total, eps = np.linalg.norm(matrices), float(np.finfo(matrices.dtype).eps)
    image = adjoint @ start
    rest = 1 - (np.linalg.norm(image) / total) ** 2 if total else 1.0
    near = rest <= 1e4 * eps
    # Eigenvectors of G lose at most roundoff of the squared norm, which is negligible if the remainder is large.
    for _ in range(4 if near else 0 if exact and rest > 0.01 else 1):
        start = orthonormal(matrices @ orthonormal(image))
        image = adjoint @ start
    if near and np.linalg.norm(matrices - start @ image.conj().swapaxes(-1, -2)) > 100 * eps * total:
        # The remainder is neither large nor at roundoff, so a Gram matrix does not give the last vectors.
        double = np.result_type(matrices.dtype, np.float64)
        if matrices.dtype != double:
            return leading(matrices.astype(double), count).astype(matrices.dtype)
        return linalg.svd(matrices, full_matrices=False)[0][..., :count]
    return start


def _by_lanczos(matrix: np.ndarray, count: int) -> np.ndarray | None:
    """Return the vectors by ARPACK, or None if the iteration does not converge."""
    short, eps = min(matrix.shape), np.finfo(matrix.dtype).eps
    first = np.random.default_rng(0).standard_normal(short).astype(matrix.dtype)
    # Vectors with an error t lose t^2 / gap of the squared norm, and at most t; the next step squares t.
    ways = {"tol": eps**0.7, "ncv": min(short, max(64, 4 * count))}
    try:
        u, s, _ = scipy.sparse.linalg.svds(matrix, k=count, v0=first, **ways)
    except (scipy.sparse.linalg.ArpackError, np.linalg.LinAlgError):  # zeros, for example
        return None
    return u[None, :, ::-1] if s.min() > 0 and np.isfinite(u).all() else None


def _by_eigenvectors(gram: np.ndarray, count: int) -> np.ndarray:
    size = gram.shape[1]
    if size < 128:
        return linalg.eigh(gram)[1][..., : -count - 1 : -1]
    wanted = (size - count, size - 1)
    with of_stack(gram):
        found = [scipy.linalg.eigh(g, subset_by_index=wanted, check_finite=False)[1] for g in gram]
    return np.stack(found)[..., ::-1]


def _by_squaring(gram: np.ndarray) -> np.ndarray:
    """Return the leading vectors (batch, size, 1) by squaring until the matrices are multiples of projections.

    If the eigenvalues are scaled to a sum of 1 and the sum of their squares is 1 - d, a column differs from the vector
    by d, and the norm of the projection onto it by d^2.
    """
    power, left = gram.copy(), np.arange(len(gram))
    tolerance = np.sqrt(np.finfo(gram.dtype).eps)
    for _ in range(SQUARINGS):
        trace = np.trace(power[left], axis1=1, axis2=2).real[:, None, None]
        scaled = power[left] / np.where(trace == 0, 1, trace)
        power[left] = square = scaled @ scaled
        left = left[np.trace(square, axis1=1, axis2=2).real < 1 - tolerance]
        if not len(left):
            break
    column = np.argmax(np.abs(np.diagonal(power, axis1=1, axis2=2)), axis=1)
    return orthonormal(power[np.arange(len(power)), :, column][..., None])


def orthonormal(vectors: np.ndarray) -> np.ndarray:
    """Return orthonormal columns of (batch, m, k) arrays; the first columns keep their directions."""
    if vectors.shape[-1] > 1:
        return linalg.qr(vectors)[0]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.eye(vectors.shape[1], 1, dtype=vectors.dtype)
    return np.where(norms == 0, unit, vectors / np.where(norms == 0, 1, norms))
