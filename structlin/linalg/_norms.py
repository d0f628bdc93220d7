"""Inner products and norms of matrices."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import cola
import numpy as np
import scipy.sparse.linalg as sparse
from cola.annotations import Stiefel
from cola.ops import Adjoint, BlockDiag, Identity, LinearOperator, Transpose
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, backend_of, in_library
from structlin._implicit import frozen
from structlin._iterations import iterate
from structlin._lapack import eps, is_known, is_transformed, known, lapack, nan_unless
from structlin._spectra import once_differentiable
from structlin.algebra import contract as _contract
from structlin.algebra.chains import largest
from structlin.linalg._common import like, require_limits, require_operator
from structlin.linalg._diagonal import unit_columns
from structlin.linalg._forms import diagonal_of, without_scalars
from structlin.linalg._iterative import ConvergenceError, host_array
from structlin.operators import StructuredOperator

_CHUNK = 256  # columns of a matrix without structure that are computed at once
_NUMBERS = 2**20  # numbers in them at most
_VECTORS = 120  # vectors of the basis of ARPACK at most, and at least 20
_BASIS = 2**24  # numbers in them at most
_ROUNDOFFS = 100  # relative residual of a singular value that is always accepted


# -- inner product and Frobenius norm ------------------------------------------------------------------------------


def inner_product(A: LinearOperator, B: LinearOperator) -> Array:
    """Return the Frobenius inner product ``sum(conj(A) * B) = tr(A^H B)``.

    The factors of two chains are contracted with one another if the chains have no regrouping and split the sizes of
    input and output alike; for Tensor-Trains of c cores with n rows this takes O(c n r^3) operations. If one operator
    is diagonal, only the diagonal of the other is computed. Otherwise dense columns are computed, some at a time. The
    error of a contraction is relative to the product of the absolute values.

    Parameters
    ----------
    A, B
        Operators of equal shape.

    Returns
    -------
    Array
        A 0-d array, differentiable.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> from structlin import Kronecker
    >>> A, B = Kronecker.random((6, 4), seed=0), Kronecker.random((6, 4), seed=1)
    >>> bool(np.isclose(inner_product(A, B), np.sum(A.to_dense() * B.to_dense())))
    True
    """
    require_operator(A, "A")
    require_operator(B, "B")
    if tuple(A.shape) != tuple(B.shape):
        raise ValueError(f"an inner product needs equal shapes, got {tuple(A.shape)} and {tuple(B.shape)}")
    a, A = without_scalars(A)
    b, B = without_scalars(B)
    found = _inner_product(A, B)
    for value, conjugate in ((a, True), (b, False)):
        if value is not None:
            value = in_library(value, found)
            found = found * (value.conj() if conjugate and hasattr(value, "conj") else value)
    return found


def _inner_product(A: LinearOperator, B: LinearOperator) -> Array:
    if isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator):
        found = _contract.inner(A, B)
        if found is not None:
            return found
    for first, second, swapped in ((A, B, False), (B, A, True)):
        value = diagonal_of(first)
        if value is not None:
            diagonal = cola.diag(second, 0, cola.linalg.Auto())
            value = in_library(value, diagonal)
            xp = lapack(diagonal)
            if swapped:
                return (xp.conj(diagonal) * value).sum()
            return ((value.conj() if hasattr(value, "conj") else value) * diagonal).sum()
    total: Any = 0
    for X, Y in zip(_columns(A), _columns(B), strict=True):
        total = total + (lapack(X).conj(X) * Y).sum()
    return total


def _columns(A: LinearOperator) -> Any:
    """Yield the columns of the dense matrix, some at a time."""
    width = max(1, min(_CHUNK, _NUMBERS // max(A.shape)))
    for start in range(0, A.shape[1], width):
        yield A @ unit_columns(A, start, min(start + width, A.shape[1]))


def frobenius_norm(A: LinearOperator) -> Array:
    """Return the Frobenius norm ``sqrt(sum(|A|^2))``, a real 0-d array.

    The table in ``docs/linalg.md`` lists the method for each structure. The factors of a chain without regrouping are
    contracted with themselves. Tensor-Trains without gradients use a sweep of QR decompositions, which is accurate if
    terms cancel (Oseledets 2011). The norm is differentiable unless it is zero.

    References
    ----------
    Oseledets (2011), Tensor-Train decomposition.

    Examples
    --------
    >>> from structlin import Diagonal
    >>> frobenius_norm(Diagonal(np.array([3.0, 4.0])))
    np.float64(5.0)
    """
    require_operator(A, "A")
    c, A = without_scalars(A)
    found = _frobenius(A)
    return found if c is None else found * abs(in_library(c, found))


def _frobenius(A: LinearOperator) -> Array:
    if isinstance(A, Transpose | Adjoint):
        return frobenius_norm(A.A)
    if isinstance(A, Identity) or A.isa(Stiefel):
        return lapack(like(np.ones(1), A)).real(like(np.sqrt(np.ones(1) * A.shape[1]), A))[0]
    if isinstance(A, ColaKronecker):
        return math.prod(map(frobenius_norm, A.Ms))
    if isinstance(A, BlockDiag):
        squared: Any = sum(m * frobenius_norm(M) ** 2 for M, m in zip(A.Ms, A.multiplicities, strict=True))
        return lapack(squared).sqrt(squared)
    if isinstance(A, StructuredOperator):
        answer = A.structure.frobenius_norm(A)
        if answer is not None:
            return answer.value
    # Each block of columns is scaled by its largest entry, because squares overflow and underflow earlier.
    norms = [lapack(X).norm(X) for X in _columns(A)]
    return lapack(norms[0]).norm(lapack(norms[0]).concat([x.reshape((1,)) for x in norms]))


# -- spectral norm -------------------------------------------------------------------------------------------------


def spectral_norm(A: LinearOperator, *, tolerance: float = 1e-6, max_iterations: int = 10_000, seed: int = 0) -> Array:
    """Return the largest singular value, a real 0-d array.

    The table in ``docs/linalg.md`` lists the structures with a closed form. Without one, the Lanczos method (ARPACK, on
    the host) for ``A^H A`` or ``A A^H`` runs from a random vector. The result s has a vector v with
    ``|A^H A v - s^2 v| <= tolerance s^2``, which is verified (100 roundoffs are allowed in any case). Then a singular
    value lies within a relative ``tolerance / 2`` of s. It is the largest one, unless the start is orthogonal to its
    vectors. Traced values are iterated by the power method instead. The derivative is that of ``u^H A v`` with constant
    vectors, so that second derivatives are refused (``docs/linalg.md``).

    Parameters
    ----------
    A
        Operator of any shape.
    tolerance
        Bound of the relative residual, between 0 and 1.
    max_iterations
        Largest number of iterations, of one product with A and one with ``A^H`` each.
    seed
        Seed of the random vector.

    Raises
    ------
    ConvergenceError
        If the residual exceeds the tolerance after ``max_iterations``; NaN inside jit.
    ValueError
        If a limit is out of range.

    Examples
    --------
    >>> from structlin import Kronecker
    >>> A = Kronecker(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]))
    >>> print(round(float(spectral_norm(A)), 12))
    10.0
    """
    require_operator(A, "A")
    require_limits(tolerance, max_iterations)
    c, A = without_scalars(A)
    found: Array | None
    if isinstance(A, ColaKronecker | BlockDiag):
        norms = [spectral_norm(M, tolerance=tolerance, max_iterations=max_iterations, seed=seed) for M in A.Ms]
        found = math.prod(norms) if isinstance(A, ColaKronecker) else reduce(_larger, norms)
    else:
        found = _closed_spectral_norm(A)
        if found is None:
            found = _iterated(A, tolerance, max_iterations, seed)
    return found if c is None else found * abs(in_library(c, found))


def _larger(x: Array, y: Array) -> Array:
    return lapack(x).where(x < y, y, x)


def _closed_spectral_norm(A: LinearOperator) -> Array | None:
    if A.isa(Stiefel):
        return lapack(like(np.ones(1), A)).real(like(np.ones(1), A))[0]
    if isinstance(A, Transpose | Adjoint):
        return _closed_spectral_norm(A.A)
    value = diagonal_of(A)
    if value is not None and hasattr(value, "dtype"):
        return abs(value).max()
    if isinstance(A, cola.ops.Dense):
        return largest(A.A)
    if not isinstance(A, StructuredOperator):
        return None
    answer = A.structure.spectral_norm(A)
    return None if answer is None else answer.value


def _iterated(A: LinearOperator, tolerance: float, limit: int, seed: int) -> Array:
    if A.shape[0] < A.shape[1]:
        A = A.T
    n = A.shape[1]
    if 1 <= n <= 2:  # ARPACK needs more columns
        return largest(A @ unit_columns(A, 0, n))
    start = np.random.default_rng(seed).standard_normal(n)
    v = like((start / np.linalg.norm(start))[:, None], A)
    xp, fixed = lapack(v), frozen(A)
    adjoint = fixed.H
    first = xp.abs(fixed @ v)
    scale = xp.max(first)  # squares of singular values may overflow or underflow
    scale = xp.where(scale == 0, scale * 0 + 1, scale)

    def square(v: Array) -> Array:
        return adjoint @ ((fixed @ v) / scale) / scale

    def step(state: Any) -> tuple[Array, Array]:
        v = state[0]
        w = square(v)
        value, size = xp.real((xp.conj(v) * w).sum()), xp.norm(w)
        zero = size == 0
        residual = xp.where(zero, size * 0, xp.norm(w - value * v) / xp.where(zero, size * 0 + 1, value))
        return xp.where(residual <= tolerance, v, w / xp.where(zero, size * 0 + 1, size)), residual

    if n and is_known(first) and not is_transformed(first):
        v = _lanczos(fixed, square, v, tolerance, limit)
        residual = step((v,))[1]
    else:
        worst = scale * 0 + math.inf
        v, residual, _ = iterate(
            step, lambda state: ~(state[1] <= tolerance), (v, worst), limit, backend_of(v) == "jax"
        )
    u = fixed @ v / scale
    size = xp.norm(u)
    u = u / xp.where(size == 0, size * 0 + 1, size)
    value = once_differentiable(xp.real((xp.conj(u) * (A @ v)).sum()))
    bound = max(tolerance, _ROUNDOFFS * eps(v.dtype))
    worst = known(residual)
    if worst is None:
        return value + nan_unless(residual <= bound, value)
    if worst > bound:  # not for NaN
        raise _not_converged(f"of {worst:.1e}", tolerance, limit)
    return value


def _lanczos(A: LinearOperator, square: Any, v: Array, tolerance: float, limit: int) -> Array:
    """Return a vector for the largest eigenvalue of ``square`` by ARPACK; v if the first product is 0 or not finite."""
    count = itertools.count(1)
    n, dtype = v.shape[0], np.result_type(host_array(v).dtype, np.float64)

    def product(x: np.ndarray) -> np.ndarray:
        if next(count) > limit:
            raise _not_converged("above the tolerance", tolerance, limit)
        return host_array(square(like(x.reshape((n, 1)), A)))

    first = product(start := host_array(v))
    if not 0 < abs(first).max() < math.inf:
        return v
    H = sparse.LinearOperator((n, n), product, dtype=dtype)
    width = min(n, max(20, min(_VECTORS, _BASIS // n)))
    _, found = sparse.eigsh(H, 1, which="LM", v0=start[:, 0].astype(dtype), tol=tolerance / 2, maxiter=limit, ncv=width)
    return like(found.copy(), A)


def _not_converged(residual: str, tolerance: float, limit: int) -> ConvergenceError:
    return ConvergenceError(
        f"the largest singular value has a relative residual {residual} after {limit} iterations, the tolerance is "
        f"{tolerance:.0e}; raise max_iterations or tolerance (close singular values converge slowly)"
    )
