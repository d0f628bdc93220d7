"""Solving with one right-hand side at a time, which is less work than an inverse that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cola
from cola.annotations import PSD, Unitary
from cola.linalg.algorithm_base import Algorithm, Auto
from cola.ops import LinearOperator, Sum

from structlin._arrays import Array, backend_of
from structlin._cola_compat._repair import is_array
from structlin.execution.products import Product, plan_of
from structlin.linalg import _chain as chain
from structlin.linalg import _toeplitz as toeplitz
from structlin.linalg._common import require_square
from structlin.linalg._inverse import NO_INVERSE, inverse_values
from structlin.linalg._lapack import (
    eps,
    inverse_of,
    known,
    lapack,
    nan_unless,
    refusing_singular,
    require_precision,
    singular_to_roundoff,
)
from structlin.linalg._woodbury import woodbury
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.circulant import CirculantStructure
from structlin.structures.toeplitz import ToeplitzStructure

_AUTO = Auto()


def solve(A: LinearOperator, b: Array, alg: Algorithm = _AUTO) -> Array:
    """``A^-1 b``; ``cola.linalg.solve`` is this function once structlin is imported.

    As ``cola.inv(A, alg) @ b``, but where ``alg`` is Auto and A is dense, a chain of square blocks (block diagonal,
    Kronecker, Monarch, ...), circulant, Toeplitz or a low-rank matrix plus a diagonal, no inverse is built: blocks are
    factored and b is substituted (LU; Cholesky for what is dense or block diagonal and annotated PSD), which is about
    half the work where the blocks meet few columns. To solve with one A many times, keep ``cola.inv(A)``.

    Args:
        A: a square operator.
        b: array of its library, of shape (n,) or (n, k).
        alg: an algorithm of CoLA.

    Returns: an array of the shape of b. Differentiable in A and b.

    Raises ValueError for a rectangular A and a b that does not fit, LinAlgError (a ValueError) where A is singular to
    working precision, ConvergenceError where it is too large for a dense matrix and an iteration does not converge.

    >>> import numpy as np
    >>> from structlin import BlockDiagonal
    >>> solve(BlockDiagonal(np.array([[[2.0]], [[4.0]]])), np.ones(2))
    array([0.5 , 0.25])
    """
    if type(alg) is Auto and isinstance(A, StructuredOperator | Sum) and is_array(b):
        n = require_square(A, "solving", NO_INVERSE)
        if b.ndim not in (1, 2) or b.shape[0] != n:
            raise ValueError(
                f"solving with an operator of shape {tuple(A.shape)} needs an array of shape ({n},) or ({n}, k), "
                f"got {tuple(b.shape)}"
            )
        found = _directly(A, b)
        if found is not None:
            return found
    return cola.inv(A, alg) @ b


def _directly(A: LinearOperator, b: Array) -> Array | None:
    if isinstance(A, Sum):
        if str(A.dtype) != str(b.dtype):
            return None
        found = woodbury(A)
        return None if found is None else found.solve(b)
    assert isinstance(A, StructuredOperator)
    if A.dtype != b.dtype or A.backend != backend_of(b) or 0 in b.shape:
        return None
    if A.isa(Unitary):
        return None
    if isinstance(A.structure, CirculantStructure):
        return _with_circulant(A.factors[0], b)
    if isinstance(A.structure, ToeplitzStructure):
        return toeplitz.solve(A, b)
    if not chain.is_square_chain(A.structure) or chain.rank_bound(A.structure) < A.shape[0]:
        return None
    assert isinstance(A.structure, Structure)
    require_precision(b, "solving")
    if A.isa(PSD):
        if chain.is_dense(A.structure) and (matrices := chain.part_matrices(A.structure, A.factors)) is not None:
            blocks = matrices[0][None]
        else:
            blocks = chain.diagonal_blocks(A.structure, A.factors)
        if blocks is not None:
            return _solve_blocks(blocks, b.reshape((*blocks.shape[:2], -1)), True).reshape(tuple(b.shape))
    return _with_chain(A.structure, A.factors, b)


def _with_circulant(column: Array, b: Array) -> Array:
    require_precision(b, "solving")
    xp, n = lapack(column), column.shape[0]
    forth, back = (xp.fft, xp.ifft) if xp.is_complex(column) else (xp.rfft, xp.irfft)
    factors = inverse_values(forth(column, n, 0), eps(column.dtype))
    return back((factors if b.ndim == 1 else factors[:, None]) * forth(b, n, 0), n, 0)


def _with_chain(structure: Structure, factors: Sequence[Array], b: Array) -> Array:
    """The steps of the chain undone one by one. Where a block meets more columns than it has rows, its inverse and a
    product are faster than substitution."""
    inverse, orders = chain.solution_steps(structure)
    xp, tokens, number = lapack(b), math.prod(b.shape[1:]), 0
    x = b
    for step in plan_of(inverse, rows=False).steps:
        if not isinstance(step, Product):  # between the steps: only permuted
            x = step(x, tokens, xp)
            continue
        factor, order = factors[-1 - number], orders[number]
        if order != tuple(range(len(order))):
            factor = xp.permute(factor, order)
        blocks = factor.reshape((step.blocks, step.fan_in, step.fan_out))
        x = step.arrange(x, tokens, xp).reshape((step.blocks, step.fan_in, step.carried * tokens))
        few = step.carried * tokens <= step.fan_in
        x = _solve_blocks(blocks, x, False) if few else inverse_of(blocks) @ x
        number += 1
    return x.reshape(tuple(b.shape))


def _solve_blocks(blocks: Array, b: Array, positive: bool) -> Array:
    """(c, m, m), (c, m, k) -> (c, m, k). Raises LinAlgError, or gives NaN inside jit, for blocks that are singular to
    working precision: those whose solutions are as large as roundoff can make them."""
    xp = lapack(blocks)
    with refusing_singular(blocks):
        x = xp.cholesky_solve(blocks, b) if positive else xp.solve(blocks, b)
    detached = [xp.stop_gradient(y) for y in (blocks, b, x)]
    sizes = [xp.amax(xp.amax(xp.abs(y))) for y in detached]
    growth = sizes[0] * sizes[2] / xp.where(sizes[1] == 0, sizes[1] * 0 + 1, sizes[1])
    bound = 0.1 / eps(blocks.dtype)
    worst: Any = known(xp.max(growth))
    if worst is None:
        return x + nan_unless(growth < bound, x)[:, None, None]
    if not worst < bound:
        raise singular_to_roundoff(f"a block of size {blocks.shape[-1]}")
    return x
