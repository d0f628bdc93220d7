"""Inverses and pseudo-inverses as structured operators, registered with ``cola.inv`` and ``cola.pinv``.

The rules apply to the algorithm ``Auto`` of CoLA (the default). CoLA runs any other algorithm.
"""

from __future__ import annotations

import math

import cola
from cola.annotations import Stiefel, Unitary
from cola.linalg.algorithm_base import Auto
from cola.ops import BlockDiag, LinearOperator, Product, ScalarMul, Sum
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import Kronecker as ColaKronecker

from structlin._cola_compat import rule
from structlin._lapack import inverse_values, nan_unless, pinv_of, reciprocals
from structlin.algebra import kronecker
from structlin.algebra.chains import singular
from structlin.linalg import _spectral as spectral
from structlin.linalg._common import (
    NO_INVERSE,
    Composite,
    annotated,
    by_members,
    dense_inverse,
    fits_dense,
    hermitian,
    is_backward_stable,
    is_matrix,
    require_dense,
    require_square,
    scalar_like,
)
from structlin.linalg._forms import members, without_scalars
from structlin.linalg._functions import reciprocal
from structlin.linalg._iterative import verified_inverse
from structlin.linalg._woodbury import woodbury
from structlin.operators import StructuredOperator
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal
from structlin.verdicts import Verdict

# -- inverse -------------------------------------------------------------------------------------------------------


# Precedence -0.5 lies between CoLA's rules for Auto (-1) and those for types of operators (0).
@rule("inv", precedence=-0.5)
def _inverse_of_any(A: LinearOperator, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    if A.isa(Unitary):
        return Unitary(A.H)
    found = structured_inverse(A) if isinstance(A, StructuredOperator) else inverse_of_members(A)
    return general_inverse(A, alg) if found is None else annotated(found, hermitian(A))


def structured_inverse(A: StructuredOperator) -> LinearOperator | None:
    """Return the inverse in closed form, without annotations, or None; LinAlgError for a singular structure."""
    answer = A.structure.inverse(A)
    if answer is None or answer.verdict is Verdict.VERIFIED:
        return None if answer is None else answer.value
    return _checked(A, answer.value)


def _checked(A: LinearOperator, inverse: LinearOperator) -> LinearOperator | None:
    """Return the inverse if it solves with A, else None; under tracing, its products are NaN instead."""
    good = is_backward_stable(A, inverse.__matmul__)
    if isinstance(good, bool):
        return inverse if good else None
    one = A.xnp.ones((A.shape[0],), dtype=A.dtype, device=A.device)
    return Diagonal(one + nan_unless(good, one)) @ inverse


def general_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """Return the inverse of the dense matrix; above the limit, an iterative and verified one."""
    if is_matrix(A) or fits_dense(A):
        return dense_inverse(A)
    return verified_inverse(A, alg)


def inverse_of_members(A: LinearOperator) -> LinearOperator | None:
    """Invert K + c I, a Kronecker sum or a sum of two Kronecker products; None if eigenvectors are ill conditioned.

    The inverse has no annotations.
    """
    form = members(A)
    if form is None:
        made = spectral.pair_inverse(A)
    else:
        made = kronecker.of_kronecker(form.matrices, A, reciprocal(), add=form.add, shift=form.shift)
    return None if made is None else _checked(A, made)


@rule("inv")
def _inverse_of_sum(A: Sum, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    formula = woodbury(A)
    made = None if formula is None else formula.inverse()
    found = None if made is None else _checked(A, made)
    return _inverse_of_any(A, alg) if found is None else annotated(found, hermitian(A))


@rule("inv")
def _inverse_by_members(A: Composite, alg: Auto):
    n = require_square(A, "the inverse", NO_INVERSE)
    if (rank := _rank_of_members(A)) < n:
        raise singular(A, rank)
    return annotated(by_members(A, lambda M: cola.inv(M, alg)), hermitian(A))


def _rank_of_members(A: LinearOperator) -> int:
    """Return an upper bound of the rank by the shapes of the members; it equals n only if all are square."""
    if isinstance(A, ColaKronecker):
        return math.prod(min(M.shape) for M in A.Ms)
    if isinstance(A, BlockDiag):
        return sum(min(M.shape) * count for M, count in zip(A.Ms, A.multiplicities, strict=True))
    return int(min(A.shape))


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


rule("inv", types=(ScalarMul, Auto))(lambda A, alg: scalar_like(A, inverse_values(A.c.reshape((1,)), 0.0)[0]))


# -- pseudo-inverse --------------------------------------------------------------------------------------------------


@rule("pinv", precedence=-0.5)
def _pseudo_inverse_of_any(A: LinearOperator, alg: Auto):
    if A.isa(Stiefel):
        return A.H
    answer = A.structure.pinv(A) if isinstance(A, StructuredOperator) else None
    if answer is not None:
        return annotated(answer.value, hermitian(A))
    require_dense(A, "the pseudo-inverse", "structlin.linalg.lstsq computes its product with a vector")
    return annotated(Dense(pinv_of(A.to_dense())), hermitian(A))


@rule("pinv")
def _pseudo_inverse_by_members(A: Composite, alg: Auto):
    return annotated(by_members(A, lambda M: cola.pinv(M, alg)), hermitian(A))


rule("pinv", types=(ColaDiagonal, Auto))(lambda A, alg: ColaDiagonal(reciprocals(A.diag)))
rule("pinv", types=(ScalarMul, Auto))(lambda A, alg: scalar_like(A, reciprocals(A.c.reshape((1,)))[0]))


@rule("pinv")
def _pseudo_inverse_of_product(A: Product, alg: Auto):
    """Take scalars out: (c A)^+ = c^+ A^+."""
    c, rest = without_scalars(A)
    if c is None or isinstance(rest, Product):
        return _pseudo_inverse_of_any(A, alg)
    return annotated(reciprocals(c.reshape((1,)))[0] * cola.pinv(rest, alg), hermitian(A))
