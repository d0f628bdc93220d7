"""Inner products and norms of matrices."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import cola
import numpy as np
from cola.annotations import Stiefel
from cola.ops import Adjoint, BlockDiag, Identity, LinearOperator, Product, ScalarMul, Transpose
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, backend_of
from structlin.linalg import _chain as chain
from structlin.linalg import _contract
from structlin.linalg._common import like
from structlin.linalg._forms import diagonal_of
from structlin.linalg._iterative import ConvergenceError
from structlin.linalg._lapack import in_library, is_known, known, lapack, nan_unless, needs_grad, require_precision
from structlin.linalg._tensor_train import norm_of_cores, tensor_train_cores
from structlin.operators import StructuredOperator
from structlin.structures.circulant import CirculantStructure
from structlin.structures.diagonal import DiagonalStructure
from structlin.structures.permutation import PermutationStructure
from structlin.structures.toeplitz import ToeplitzStructure

_CHUNK = 256  # columns of a matrix without structure that are computed at once


def _require_operator(A: Any, name: str) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{name} must be a linear operator, got {type(A).__qualname__}; wrap an array in cola.ops.Dense"
        )


# -- inner product and Frobenius norm ------------------------------------------------------------------------------


def inner(A: LinearOperator, B: LinearOperator) -> Array:
    """Frobenius inner product ``sum(conj(A) * B) = tr(A^H B)``, a 0-d array.

    Of two chains without regrouping whose sizes are split alike, the factors are contracted with one another (for
    Tensor-Trains O(c n r^3)); a diagonal operator meets the diagonal of the other; anything else costs the dense
    columns, some at a time. Differentiable. Contraction rounds relative to the product of the absolute values.

    Raises TypeError for what is no operator, ValueError for different shapes.

    >>> from structlin import Kronecker
    >>> A, B = Kronecker.random((6, 4), seed=0), Kronecker.random((6, 4), seed=1)
    >>> bool(np.isclose(inner(A, B), np.sum(A.to_dense() * B.to_dense())))
    True
    """
    _require_operator(A, "A")
    _require_operator(B, "B")
    if tuple(A.shape) != tuple(B.shape):
        raise ValueError(f"an inner product needs equal shapes, got {tuple(A.shape)} and {tuple(B.shape)}")
    a, A = _without_scalars(A)
    b, B = _without_scalars(B)
    found = _inner(A, B)
    for value, conjugate in ((a, True), (b, False)):
        if value is not None:
            value = in_library(value, found)
            found = found * (value.conj() if conjugate and hasattr(value, "conj") else value)
    return found


def _without_scalars(A: LinearOperator) -> tuple[Any | None, LinearOperator]:
    """(c, B) with A = c B; c is None where A is not scaled."""
    if not isinstance(A, Product):
        return None, A
    scalars = [M.c for M in A.Ms if isinstance(M, ScalarMul)]
    rest = [M for M in A.Ms if not isinstance(M, ScalarMul)]
    if not scalars or not rest:
        return None, A
    c = scalars[0]
    for other in scalars[1:]:
        c = c * other
    return c, rest[0] if len(rest) == 1 else Product(*rest)


def _inner(A: LinearOperator, B: LinearOperator) -> Array:
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
    """The columns of the dense matrix, some at a time."""
    n = A.shape[1]
    eye = np.eye(n)
    for start in range(0, n, _CHUNK):
        yield A @ like(eye[:, start : start + _CHUNK], A)


def frobenius_norm(A: LinearOperator) -> Array:
    """``sqrt(sum(|A|^2))``, a real 0-d array.

    Closed form for circulant, Toeplitz, diagonal, permutation and Kronecker matrices; for chains without regrouping
    by contracting the factors with themselves; Tensor-Trains whose numbers are known and need no gradient by a sweep of
    QR decompositions, which keeps its accuracy where terms cancel (Oseledets 2011, Tensor-Train decomposition); CoLA's
    Kronecker and BlockDiag from the norms of their members; else from the dense columns. Differentiable where the norm
    is not zero. Raises TypeError for what is no operator.

    >>> from structlin import Diagonal
    >>> frobenius_norm(Diagonal(np.array([3.0, 4.0])))
    np.float64(5.0)
    """
    _require_operator(A, "A")
    c, A = _without_scalars(A)
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
        found = _frobenius_of_structure(A)
        if found is not None:
            return found
    squares: Any = 0
    for X in _columns(A):
        squares = squares + (abs(X) ** 2).sum()
    return lapack(squares).sqrt(squares)


def _frobenius_of_structure(A: StructuredOperator) -> Array | None:
    structure, factors = A.structure, A.factors
    xp = lapack(factors[0])
    if isinstance(structure, PermutationStructure):
        return like(np.full(1, math.sqrt(structure.size)), A)[0]
    if isinstance(structure, DiagonalStructure):
        return xp.norm(factors[0])
    if isinstance(structure, CirculantStructure):
        return xp.norm(factors[0]) * math.sqrt(structure.size)
    if isinstance(structure, ToeplitzStructure):
        i = np.arange(structure.d_out + structure.d_in - 1)
        repeats = np.minimum(np.minimum(i + 1, i[::-1] + 1), min(structure.shape))
        return xp.norm(factors[0] * like(np.sqrt(repeats), A))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None:
        return math.prod(map(xp.norm, matrices))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return xp.norm(blocks)
    cores = tensor_train_cores(A)
    if cores is not None and all(is_known(c) and not needs_grad(c) for c in cores):
        return norm_of_cores(cores)
    square = _contract.inner(A, A)
    return None if square is None else xp.sqrt(xp.real(square))


# -- spectral norm -------------------------------------------------------------------------------------------------


def spectral_norm(A: LinearOperator, *, tol: float = 1e-6, max_iters: int = 10_000, seed: int = 0) -> Array:
    """The largest singular value, a real 0-d array.

    Closed form (singular values of the parts) for dense, Kronecker and block-diagonal matrices, circulant, diagonal,
    permutation, unitary and low-rank ones; ``tol`` plays no part there. CoLA's Kronecker and BlockDiag by members.
    Otherwise power iteration on ``A^H A`` from a random vector drawn with ``seed``, until
    ``|A^H A v - s^2 v| <= tol s^2``: then some singular value lies within a relative ``tol / 2`` of s, and unless the
    start was orthogonal to the largest one's vectors, or another value is as close, it is the largest, with an error
    of the order of ``tol^2``. Two products for each iteration. Differentiable (through ``u^H A v`` with the vectors
    held fixed).

    Raises ConvergenceError where the tolerance is not met after ``max_iters`` iterations (inside jit, where it can not
    be raised, the result is NaN), ValueError for a tolerance outside (0, 1) and fewer than one iteration, TypeError
    for what is no operator.

    >>> from structlin import Kronecker
    >>> A = Kronecker(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]]))
    >>> print(round(float(spectral_norm(A)), 12))
    10.0
    """
    _require_operator(A, "A")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol!r}")
    if isinstance(max_iters, bool) or not hasattr(max_iters, "__index__") or max_iters < 1:
        raise ValueError(f"max_iters must be a positive integer, got {max_iters!r}")
    c, A = _without_scalars(A)
    found: Array | None
    if isinstance(A, ColaKronecker | BlockDiag):
        norms = [spectral_norm(M, tol=tol, max_iters=max_iters, seed=seed) for M in A.Ms]
        found = math.prod(norms) if isinstance(A, ColaKronecker) else reduce(_larger, norms)
    else:
        found = _closed_spectral_norm(A)
        if found is None:
            found = _power_iteration(A, tol, max_iters, seed)
    return found if c is None else found * abs(in_library(c, found))


def _larger(x: Array, y: Array) -> Array:
    return lapack(x).where(x < y, y, x)


def _largest(matrices: Array) -> Array:
    """Largest singular value of each of a stack of matrices."""
    require_precision(matrices, "a spectral norm")
    return lapack(matrices).singular_values(matrices)[..., 0]


def _closed_spectral_norm(A: LinearOperator) -> Array | None:
    if A.isa(Stiefel):
        return lapack(like(np.ones(1), A)).real(like(np.ones(1), A))[0]
    if isinstance(A, Transpose | Adjoint):
        return _closed_spectral_norm(A.A)
    value = diagonal_of(A)
    if value is not None and hasattr(value, "dtype"):
        return abs(value).max()
    if isinstance(A, cola.ops.Dense):
        return _largest(A.A)
    if not isinstance(A, StructuredOperator):
        return None
    structure, factors = A.structure, A.factors
    xp = lapack(factors[0])
    if isinstance(structure, CirculantStructure):
        return xp.max(xp.abs(xp.fft(factors[0], structure.size, 0)))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None:
        return math.prod(map(_largest, matrices))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return xp.max(_largest(blocks))
    found = chain.bottleneck(structure)
    if found is not None and 2 * found[0] <= min(A.shape):
        from structlin.linalg._inverse import thin_orthogonal

        return _largest(thin_orthogonal(A)[1])
    return None


def _power_iteration(A: LinearOperator, tol: float, max_iters: int, seed: int) -> Array:
    start = np.random.default_rng(seed).standard_normal((A.shape[1], 1))
    v = like(start / np.linalg.norm(start), A)
    xp = lapack(v)
    frozen = _frozen(A)
    adjoint = frozen.H

    def step(v: Array) -> tuple[Array, Array, Array]:
        w = adjoint @ (frozen @ v)
        square = xp.real((xp.conj(v) * w).sum())
        return w, square, xp.norm(w - square * v)

    run = _run_jax if backend_of(v) == "jax" else _run
    v, residual = run(step, v, tol, max_iters, xp)
    u = frozen @ v
    size = xp.norm(u)
    u = u / xp.where(size == 0, size * 0 + 1, size)
    value = xp.real((xp.conj(u) * (A @ v)).sum())
    worst = known(residual)
    if worst is None:
        return value + nan_unless(residual <= tol, value)
    if not worst <= tol:
        raise ConvergenceError(
            f"power iteration left a relative residual of {worst:.1e} after {max_iters} iterations, the tolerance is "
            f"{tol:.0e}: raise max_iters or tol (values close to the largest one slow it down)"
        )
    return value


def _frozen(A: LinearOperator) -> LinearOperator:
    """A, whose numbers no gradient reaches."""
    leaves, unflatten = A.flatten()
    return unflatten([lapack(x).stop_gradient(x) if hasattr(x, "dtype") else x for x in leaves])


def _run(step: Any, v: Array, tol: float, max_iters: int, xp: Any) -> tuple[Array, Any]:
    for _ in range(max_iters):
        w, square, residual = step(v)
        size = xp.norm(w)
        if known(size) == 0:
            return v, 0.0
        if known(residual) is not None and float(residual) <= tol * float(square):
            break
        v = w / size
    return v, residual / square


def _run_jax(step: Any, v: Array, tol: float, max_iters: int, xp: Any) -> tuple[Array, Any]:
    import jax
    import jax.numpy as jnp

    def body(state: Any) -> Any:
        i, v, _ = state
        w, square, residual = step(v)
        size = xp.norm(w)
        relative = jnp.where(size == 0, 0.0, residual / square)
        done = relative <= tol
        return i + 1, jnp.where(done, v, w / jnp.where(size == 0, 1.0, size)), relative

    def go_on(state: Any) -> Any:
        return (state[0] < max_iters) & ~(state[2] <= tol)

    first = jnp.full((), jnp.inf, dtype=xp.real(v).dtype)
    _, v, relative = jax.lax.while_loop(go_on, body, (0, v, first))
    return v, relative
