"""Sums of an operator with a fast inverse and operators of low rank: Woodbury and the matrix determinant lemma.

For A = B + U V, with U of shape (n, r) and V of shape (r, n):
``A^-1 = B^-1 - B^-1 U (I + V B^-1 U)^-1 V B^-1`` and ``det A = det B det(I + V B^-1 U)``
(Woodbury 1950, Inverting Modified Matrices). B is a diagonal, given in any of the forms it has in CoLA and here, or any
one structured operator with an inverse in closed form. The inverse is again such a sum. Its accuracy is that of the
condition of B as well as of A: the result is checked, and where it is bad the dense matrix is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from cola.linalg.algorithm_base import Algorithm, Auto
from cola.ops import LinearOperator, Sum

from structlin._arrays import Array
from structlin._cola_compat._repair import rule
from structlin.linalg._common import annotated, hermitian, is_backward_stable, require_square
from structlin.linalg._determinant import general_slogdet, structured_slogdet
from structlin.linalg._forms import diagonal_of, thin
from structlin.linalg._inverse import NO_INVERSE, general_inverse, structured_inverse
from structlin.linalg._lapack import as_array, lapack, require_precision
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.diagonal import Diagonal

_WIDEST = 0.5  # of n: above this total rank, the dense matrix costs no more


def split(A: Sum) -> tuple[StructuredOperator, Array, Array] | None:
    """(B, U, V) with ``A = B + U V`` and B easy to invert; None where A is no such sum."""
    n = A.shape[0]
    room = int(_WIDEST * n)
    diagonals, thins, others = [], [], []
    for M in A.Ms:
        value = diagonal_of(M)
        if value is not None:
            diagonals.append(value)
            continue
        found = thin(M, room)
        if found is None:
            others.append(M)
        else:
            thins.append(found)
            room -= found[0].shape[1]
    if not thins or len(others) > 1 or (others and diagonals) or not (others or diagonals):
        return None
    xp = lapack(thins[0][0])
    dtype = A.dtype
    U = xp.concat_axis([xp.astype(u, dtype) for u, _ in thins], 1)
    V = xp.concat_axis([xp.astype(v, dtype) for _, v in thins], 0)
    if others:
        base = others[0]
        return (base.to(dtype=dtype), U, V) if isinstance(base, StructuredOperator) else None
    return Diagonal(sum((as_array(value, U) for value in diagonals), start=xp.zeros((n,), U))), U, V


_THREE = "i,ri->r; r,sr->s; s,os->o"


@dataclass(frozen=True)
class Woodbury:
    """A sum B + U V: ``B``, ``capacitance`` = I + V B^-1 U, and the inverse."""

    B: StructuredOperator
    capacitance: Array
    inverse: LinearOperator


def woodbury(A: Sum) -> Woodbury | None:
    """None where A does not split, or where the formula is not accurate."""
    parts = split(A)
    if parts is None:
        return None
    B, U, V = parts
    require_precision(U, "an inverse")
    base = structured_inverse(B)
    if base is None:
        return None
    xp, (n, r) = lapack(U), U.shape
    left, right = base @ U, V @ base
    capacitance = xp.eye(r, U) + V @ left
    correction = Structure.parse(_THREE, i=n, r=r, s=r, o=n)
    inverse = base + StructuredOperator(correction, (right, xp.inv(capacitance), -left))
    return Woodbury(B, capacitance, inverse) if is_backward_stable(A, inverse) else None


@rule("inv")
def _inverse_of_sum(A: Sum, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    found = woodbury(A)
    return general_inverse(A, alg) if found is None else annotated(found.inverse, hermitian(A))


@rule("slogdet")
def _slogdet_of_sum(A: Sum, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    found = woodbury(A)
    if found is None:
        return general_slogdet(A, log_alg, trace_alg)
    first, second = structured_slogdet(found.B), lapack(found.capacitance).slogdet(found.capacitance)
    assert first is not None
    return first[0] * second[0], first[1] + second[1]
