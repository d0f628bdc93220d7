"""Diagonals and traces, registered with ``cola.diag`` and ``cola.trace`` for CoLA's Auto (the default) and Exact.

Both are exact. The stochastic estimates Hutch and HutchPP of CoLA can be passed as the algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cola
from cola.linalg.algorithm_base import Auto
from cola.linalg.trace.diagonal_estimation import Exact
from cola.ops import Adjoint, BlockDiag, KronSum, LinearOperator, Product, ScalarMul, Sum, Transpose
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, in_library
from structlin._cola_compat import rule
from structlin._lapack import lapack
from structlin.algebra.kronecker import outer
from structlin.linalg._common import has_square_members, require_operator, require_square
from structlin.linalg._forms import diagonal_of, thin, without_scalars
from structlin.operators import RealPart, StructuredOperator

_CHUNK = 256  # columns of a matrix without structure that are computed at once


def diagonal_length(shape: Sequence[int], k: int) -> int:
    """Return the number of entries of the k-th diagonal; ValueError if there is no such diagonal."""
    d_out, d_in = shape
    count = int(min(d_out + min(k, 0), d_in - max(k, 0)))
    if count < 1:
        raise ValueError(f"an operator of shape {tuple(shape)} has diagonals {1 - d_out} to {d_in - 1}, got k = {k}")
    return count


@rule("diag")
def _diagonal_rule(A: StructuredOperator, k: int, alg: Auto | Exact):
    diagonal_length(A.shape, k)
    answer = A.structure.diagonal(A, k)
    return diagonal_by_columns(A, k) if answer is None else answer.value


def diagonal_by_columns(A: LinearOperator, k: int) -> Array:
    """Return the diagonal from the dense matrix, some columns at a time."""
    count = diagonal_length(A.shape, k)
    xnp, first = A.xnp, max(k, 0)
    pieces = []
    for start in range(first, first + count, _CHUNK):
        stop = min(start + _CHUNK, first + count)
        columns = A @ unit_columns(A, start, stop)
        pieces.append(lapack(columns).diagonal(columns[start - k : stop - k]))
    return pieces[0] if len(pieces) == 1 else xnp.concat(pieces)


def unit_columns(A: LinearOperator, start: int, stop: int) -> Array:
    """Return columns ``start`` to ``stop`` (exclusive) of the identity."""
    eye = A.xnp.eye(stop - start, stop - start, dtype=A.dtype, device=A.device)
    above = A.xnp.zeros((start, stop - start), dtype=A.dtype, device=A.device)
    below = A.xnp.zeros((A.shape[1] - stop, stop - start), dtype=A.dtype, device=A.device)
    return A.xnp.concat([above, eye, below])


@rule("trace")
def _trace_rule(A: StructuredOperator, alg: Auto | Exact):
    require_square(A, "the trace")
    answer = A.structure.trace(A)
    return cola.diag(A, 0, alg).sum() if answer is None else answer.value


# -- operators of CoLA -------------------------------------------------------------------------------------------------


_EXACT = Auto | Exact

rule("diag", -0.5, types=(LinearOperator, int, _EXACT))(lambda A, k, alg: diagonal_by_columns(A, k))
rule("diag", types=(RealPart, int, _EXACT))(lambda A, k, alg: cola.diag(A.A, k, alg).real)
rule("diag", types=(Transpose, int, _EXACT))(lambda A, k, alg: cola.diag(A.A, -k, alg))
rule("diag", types=(Adjoint, int, _EXACT))(lambda A, k, alg: _conj(cola.diag(A.A, -k, alg)))


def _conj(x: Array) -> Array:
    return lapack(x).conj(x)


@rule("diag")
def _diagonal_of_product(A: Product, k: int, alg: Auto | Exact):
    """Diagonal members at the ends scale rows and columns; a small inner dimension gives short inner products."""
    count, Ms, scales = diagonal_length(A.shape, k), list(A.Ms), []
    rows, columns = (slice(start, start + count) for start in (max(-k, 0), max(k, 0)))
    for end, part in ((0, rows), (-1, columns)):
        while len(Ms) > 1 and (value := diagonal_of(Ms[end])) is not None:
            scales.append(value[part] if getattr(value, "ndim", 0) else value)
            del Ms[end]
    rest = Ms[0] if len(Ms) == 1 else Product(*Ms)
    found = thin(rest, min(rest.shape) - 1) if len(Ms) > 1 else None
    if len(Ms) == 1:
        diagonal = cola.diag(rest, k, alg)
    elif found is None:
        diagonal = diagonal_by_columns(rest, k)
    else:
        diagonal = (found[0][rows] * found[1][:, columns].T).sum(1)
    for value in scales:
        diagonal = diagonal * in_library(value, diagonal)
    return diagonal


@rule("diag")
def _diagonal_of_kronecker(A: ColaKronecker | KronSum, k: int, alg: Auto | Exact):
    if k or not has_square_members(A):
        return diagonal_by_columns(A, k)
    return outer([cola.diag(M, 0, alg) for M in A.Ms], isinstance(A, KronSum))


@rule("diag")
def _diagonal_of_blocks(A: BlockDiag, k: int, alg: Auto | Exact):
    if k or not has_square_members(A):
        return diagonal_by_columns(A, k)
    parts = [cola.diag(M, 0, alg) for M, count in zip(A.Ms, A.multiplicities, strict=True) for _ in range(count)]
    return A.xnp.concat(parts)


@rule("diag")
def _diagonal_of_scalar(A: ScalarMul, k: int, alg: Auto | Exact):
    count = diagonal_length(A.shape, k)
    return A.c * A.xnp.ones((count,), dtype=A.dtype, device=A.device) * (k == 0)


@rule("trace")
def _trace_of_any(A: LinearOperator, alg: Auto | Exact):
    """Scalars are taken out of products; sums and square Kronecker members are traced one by one."""
    require_square(A, "the trace")
    c, rest = without_scalars(A)
    if c is not None:
        found = cola.trace(rest, alg)
        return found * in_library(c, found)
    if isinstance(A, Sum):
        return sum(cola.trace(M, alg) for M in A.Ms)
    if isinstance(A, ColaKronecker) and has_square_members(A):
        return math.prod(cola.trace(M, alg) for M in A.Ms)
    return cola.diag(A, 0, alg).sum()


def diagonal(A: LinearOperator, k: int = 0) -> Array:
    """Return the k-th diagonal, ``cola.diag``; k > 0 is above the main one. ValueError if there is no such diagonal."""
    require_operator(A)
    return cola.diag(A, k, Auto())


def trace(A: LinearOperator) -> Array:
    """Return the sum of the main diagonal, ``cola.trace``. ValueError if A is not square."""
    require_operator(A)
    return cola.trace(A, Auto())
