"""Inverses and pseudo-inverses as operators that apply fast, registered with ``cola.inv`` and ``cola.pinv``.

They apply where the algorithm is CoLA's ``Auto`` (the default); an algorithm that is named is used as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cola
from cola.annotations import Stiefel, Unitary
from cola.linalg.algorithm_base import Auto
from cola.ops import Adjoint, BlockDiag, LinearOperator, Product, ScalarMul, Transpose
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array
from structlin._cola_compat._repair import rule
from structlin.linalg import _chain as chain
from structlin.linalg import _toeplitz as toeplitz
from structlin.linalg._cola import scalar_like
from structlin.linalg._common import (
    annotated,
    dense_inverse,
    fits_dense,
    hermitian,
    is_backward_stable,
    require_dense,
    require_square,
    singular,
)
from structlin.linalg._iterative import verified_inverse
from structlin.linalg._lapack import (
    eps,
    inverse_of,
    known,
    lapack,
    refusing_singular,
    require_precision,
    singular_to_roundoff,
)
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.circulant import Circulant, CirculantStructure
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal, DiagonalStructure
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.permutation import PermutationStructure
from structlin.structures.toeplitz import ToeplitzStructure

NO_INVERSE = "; cola.pinv has one for any shape"


# -- inverse -------------------------------------------------------------------------------------------------------


@rule("inv")
def _inverse_rule(A: StructuredOperator, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    if A.isa(Unitary):
        return Unitary(A.H)
    found = structured_inverse(A)
    return general_inverse(A, alg) if found is None else annotated(found, hermitian(A))


def structured_inverse(A: StructuredOperator) -> LinearOperator | None:
    """The inverse in closed form, without annotations, or None. ValueError for a structure that is singular."""
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        return A.T
    require_precision(factors[0], "an inverse")
    if isinstance(structure, DiagonalStructure):
        return Diagonal(inverse_values(factors[0], 0.0))
    if isinstance(structure, CirculantStructure):
        return Circulant(inverse_column(factors[0]))
    if isinstance(structure, ToeplitzStructure):
        return toeplitz.inverse(A)
    if chain.rank_bound(structure) < structure.d_in:
        raise singular(A, chain.rank_bound(structure))
    if chain.is_dense(structure):
        return None
    if chain.is_square_chain(structure):
        parts = chain.kronecker_parts(structure)
        if parts is not None and all(p.factor is not None for p in parts):
            matrices = chain.part_matrices(structure, factors)
            assert matrices is not None
            return Kronecker(*map(inverse_of, matrices))
        blocks = chain.diagonal_blocks(structure, factors)
        return _chain_inverse(A) if blocks is None else BlockDiagonal(inverse_of(blocks))
    return _schur_inverse(A)


def inverse_column(column: Array) -> Array:
    """First column of the inverse of a circulant matrix: its eigenvalues are the Fourier transform of the column."""
    xp, n = lapack(column), column.shape[0]
    if xp.is_complex(column):
        return xp.ifft(inverse_values(xp.fft(column, n, 0), eps(column.dtype)), n, 0)
    return xp.irfft(inverse_values(xp.rfft(column, n, 0), eps(column.dtype)), n, 0)


def inverse_values(values: Array, smallest: float) -> Array:
    """1 / x; LinAlgError for a number as small as ``smallest`` of the largest one."""
    xp = lapack(values)
    size = xp.abs(xp.stop_gradient(values))
    least, most = known(size.min()), known(size.max()) if smallest else 0.0
    if least is not None and most is not None and not least > smallest * most:
        raise singular_to_roundoff(f"a matrix with an eigenvalue of magnitude {least:.1e}")
    return 1 / values


def _chain_inverse(A: StructuredOperator) -> StructuredOperator:
    structure = A.structure
    assert isinstance(structure, Structure)
    inverse, orders = chain.inverse_structure(structure)
    sizes, xp, factors = dict(structure.sizes), lapack(A.factors[0]), []
    numbers = reversed(range(len(structure.steps)))
    for number, order in zip(numbers, orders, strict=True):
        step = structure.steps[number]
        blocks = inverse_of(chain.blocks_of(structure, number, A.factors[number]))
        blocks = blocks.reshape(tuple(sizes[a] for a in step.batch + step.contracted + step.free))
        factors.append(blocks if order == tuple(range(len(order))) else xp.permute(blocks, order))
    return StructuredOperator(inverse, factors)


@dataclass(frozen=True)
class PaddedInverse:
    """What is needed of the inverse of M, a square chain of which A is the leading (n - k) x (n - k) part.

    ``M^-1 = [[leading, right], [below, corner]]``, ``full`` is the structure of M.
    """

    full: Structure
    leading: StructuredOperator
    right: Array
    below: Array
    corner: Array


def padded_inverse(A: StructuredOperator) -> PaddedInverse | None:
    """None where A is no part of a square chain, or a small one."""
    structure = A.structure
    if not isinstance(structure, Structure) or structure.padding[0] != structure.padding[1]:
        return None
    k, n = structure.padding[0], structure.d_in + structure.padding[0]
    full = Structure(structure.steps, structure.sizes, n, n)
    if not chain.is_square_chain(full) or k == 0 or 2 * k > n:
        return None
    inverse = _chain_inverse(StructuredOperator(full, A.factors))
    assert isinstance(inverse.structure, Structure)
    xp, d = lapack(A.factors[0]), structure.d_in
    last = xp.eye(n, A.factors[0])[:, d:]
    columns, rows = inverse._matmat(last), inverse._rmatmat(last.T)
    cut = Structure(inverse.structure.steps, inverse.structure.sizes, d, d)
    return PaddedInverse(full, StructuredOperator(cut, inverse.factors), columns[:d], rows[:, :d], columns[d:])


def _schur_inverse(A: StructuredOperator) -> LinearOperator | None:
    """A^-1 = leading - right corner^-1 below, by the Schur complement of the corner."""
    parts = padded_inverse(A)
    if parts is None:
        return None
    with refusing_singular(parts.corner):
        middle = lapack(parts.corner).solve(parts.corner, parts.below)
    found = parts.leading + LowRank(middle, -parts.right)
    return found if is_backward_stable(A, found.__matmul__) else None


def general_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """Dense up to the limit, and for what is a dense matrix anyway; iterative and verified beyond."""
    is_matrix = isinstance(A, StructuredOperator) and chain.is_dense(A.structure)
    if is_matrix or isinstance(A, cola.ops.Dense) or fits_dense(A):
        return dense_inverse(A)
    return verified_inverse(A, alg)


# CoLA's operators. A rule for LinearOperator stands between CoLA's rules for Auto (-1) and for kinds of operators (0).


@rule("inv", precedence=-0.5)
def _inverse_of_any(A: LinearOperator, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    return Unitary(A.H) if A.isa(Unitary) else general_inverse(A, alg)


@rule("inv")
def _inverse_of_transpose(A: Transpose, alg: Auto):
    return annotated(cola.inv(A.A, alg).T, hermitian(A))


@rule("inv")
def _inverse_of_adjoint(A: Adjoint, alg: Auto):
    return annotated(cola.inv(A.A, alg).H, hermitian(A))


@rule("inv")
def _inverse_of_product(A: Product, alg: Auto):
    n = require_square(A, "the inverse", NO_INVERSE)
    if A.isa(Unitary):
        return Unitary(A.H)
    if all(M.shape == (n, n) for M in A.Ms):
        return annotated(Product(*(cola.inv(M, alg) for M in reversed(A.Ms))), hermitian(A))
    if (width := min(M.shape[0] for M in A.Ms)) < n:
        raise singular(A, width)
    return general_inverse(A, alg)


@rule("inv")
def _inverse_of_kronecker(A: ColaKronecker, alg: Auto):
    n = require_square(A, "the inverse", NO_INVERSE)
    if all(M.shape[0] == M.shape[1] for M in A.Ms):
        return annotated(ColaKronecker(*(cola.inv(M, alg) for M in A.Ms)), hermitian(A))
    rank = math.prod(min(M.shape) for M in A.Ms)
    raise singular(A, min(rank, n - 1))


@rule("inv")
def _inverse_of_blocks(A: BlockDiag, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    if any(M.shape[0] != M.shape[1] for M in A.Ms):
        raise singular(A, sum(min(M.shape) * m for M, m in zip(A.Ms, A.multiplicities, strict=True)))
    inverses = [cola.inv(M, alg) for M in A.Ms]
    return annotated(BlockDiag(*inverses, multiplicities=A.multiplicities), hermitian(A))


@rule("inv")
def _inverse_of_scalar(A: ScalarMul, alg: Auto):
    return scalar_like(A, inverse_values(A.c.reshape((1,)), 0.0)[0])


# -- pseudo-inverse --------------------------------------------------------------------------------------------------


@rule("pinv")
def _pseudo_inverse_rule(A: StructuredOperator, alg: Auto):
    if A.isa(Stiefel):
        return A.H
    return annotated(structured_pinv(A), hermitian(A))


def pinv_of(matrix: Array) -> Array:
    """Pseudo-inverse, batched; singular values below max(n, m) * eps of the largest count as zero."""
    return lapack(matrix).pinv(matrix, max(matrix.shape[-2:]) * eps(matrix.dtype))


def _reciprocals(values: Array, xp: Any) -> Array:
    """1 / x, and 0 for what counts as zero."""
    size = xp.abs(values)
    kept = size > values.shape[0] * eps(values.dtype) * xp.max(size)
    # The inner ``where`` keeps 1 / 0 out of the gradient.
    return xp.where(kept, 1 / xp.where(kept, values, values * 0 + 1), values * 0)


def structured_pinv(A: StructuredOperator) -> LinearOperator:
    """The pseudo-inverse, without annotations: closed forms, else from the dense matrix."""
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        return A.T
    require_precision(factors[0], "a pseudo-inverse")
    xp = lapack(factors[0])
    if isinstance(structure, DiagonalStructure):
        return Diagonal(_reciprocals(factors[0], xp))
    if isinstance(structure, CirculantStructure):
        n = structure.size
        column = xp.ifft(_reciprocals(xp.fft(factors[0], n, 0), xp), n, 0)
        return Circulant(column if xp.is_complex(factors[0]) else xp.real(column))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None:
        return Kronecker(*map(pinv_of, matrices)) if len(matrices) > 1 else Dense(pinv_of(matrices[0]))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return BlockDiagonal(pinv_of(blocks))
    found = chain.bottleneck(structure)
    if found is not None and found[0] < min(A.shape):
        left, core, right = thin_orthogonal(A)
        return LowRank(xp.conj(left).T, xp.conj(right).T @ pinv_of(core))
    require_dense(A, "the pseudo-inverse", "solve the normal equations, for example with cola.linalg.CG()")
    return Dense(pinv_of(A.to_dense()))


def thin_orthogonal(A: StructuredOperator) -> tuple[Array, Array, Array]:
    """(Q1, C, Q2) with A = Q1 C Q2, where Q1 has orthonormal columns, Q2 orthonormal rows, for a chain that has a
    bottleneck."""
    thin = chain.thin_factors(A)
    assert thin is not None
    xp = lapack(thin[0])
    left, first = xp.qr(thin[0])
    right, second = xp.qr(xp.conj(thin[1]).T)
    return left, first @ xp.conj(second).T, xp.conj(right).T


@rule("pinv", precedence=-0.5)
def _pseudo_inverse_of_any(A: LinearOperator, alg: Auto):
    if A.isa(Stiefel):
        return A.H
    require_dense(A, "the pseudo-inverse", "solve the normal equations, for example with cola.linalg.CG()")
    return annotated(Dense(pinv_of(A.to_dense())), hermitian(A))


@rule("pinv")
def _pseudo_inverse_of_kronecker(A: ColaKronecker, alg: Auto):
    return annotated(ColaKronecker(*(cola.pinv(M, alg) for M in A.Ms)), hermitian(A))


@rule("pinv")
def _pseudo_inverse_of_blocks(A: BlockDiag, alg: Auto):
    parts = [cola.pinv(M, alg) for M in A.Ms]
    return annotated(BlockDiag(*parts, multiplicities=A.multiplicities), hermitian(A))


@rule("pinv")
def _pseudo_inverse_of_diagonal(A: ColaDiagonal, alg: Auto):
    return ColaDiagonal(_reciprocals(A.diag, lapack(A.diag)))


@rule("pinv")
def _pseudo_inverse_of_scalar(A: ScalarMul, alg: Auto):
    xp = lapack(A.c)
    return scalar_like(A, _reciprocals(A.c.reshape((1,)), xp)[0])


@rule("pinv")
def _pseudo_inverse_of_product(A: Product, alg: Auto):
    """A multiple: (c A)^+ = c^+ A^+."""
    scalars = [M for M in A.Ms if isinstance(M, ScalarMul)]
    rest = [M for M in A.Ms if not isinstance(M, ScalarMul)]
    if len(rest) != 1 or not scalars:
        return _pseudo_inverse_of_any(A, alg)
    found = cola.pinv(rest[0], alg)
    for M in scalars:
        found = cola.pinv(M, alg).c * found
    return annotated(found, hermitian(A))


@rule("pinv")
def _pseudo_inverse_of_transpose(A: Transpose, alg: Auto):
    return annotated(cola.pinv(A.A, alg).T, hermitian(A))


@rule("pinv")
def _pseudo_inverse_of_adjoint(A: Adjoint, alg: Auto):
    return annotated(cola.pinv(A.A, alg).H, hermitian(A))
