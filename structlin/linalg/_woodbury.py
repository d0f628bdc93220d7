"""Sums of an operator with a fast inverse and operators of low rank: Woodbury and the matrix determinant lemma.

For A = B + U V, with U of shape (n, r) and V of shape (r, n):
``A^-1 = B^-1 - B^-1 U (I + V B^-1 U)^-1 V B^-1`` and ``det A = det B det(I + V B^-1 U)``
(Woodbury 1950, Inverting Modified Matrices). Where B is positive and V is U^H, half of the middle matrix need be
computed, and Cholesky factors it. B is a diagonal, given in any of the forms it has in CoLA and here, or any
one structured operator with an inverse in closed form. The inverse is again such a sum. Its accuracy is that of the
condition of B as well as of A: the result is checked, and where it is bad the dense matrix is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from cola.annotations import PSD
from cola.linalg.algorithm_base import Algorithm, Auto
from cola.ops import LinearOperator, Sum

from structlin._arrays import Array
from structlin._cola_compat._repair import rule
from structlin.linalg._common import accuracy, annotated, hermitian, is_backward_stable, probe, require_square
from structlin.linalg._determinant import general_slogdet, of_numbers, structured_slogdet
from structlin.linalg._forms import diagonal_of, thin
from structlin.linalg._inverse import NO_INVERSE, general_inverse, inverse_values, structured_inverse
from structlin.linalg._lapack import as_array, eps, is_transpose, known, lapack, require_precision
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.diagonal import Diagonal

_WIDEST = 0.5  # of n: above this total rank, the dense matrix costs no more
_THREE = "i,ri->r; r,sr->s; s,os->o"


def split(A: Sum) -> tuple[StructuredOperator | Array, Array, Array] | None:
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
    U = _joined([u for u, _ in thins], 1, A.dtype, xp)
    V = _joined([v for _, v in thins], 0, A.dtype, xp)
    if others:
        base = others[0]
        return (base.to(dtype=A.dtype), U, V) if isinstance(base, StructuredOperator) else None
    values = [as_array(value, U) for value in diagonals]
    whole = values[0] if len(values) == 1 else sum(values[1:], start=values[0])
    return whole if whole.ndim else whole + xp.zeros((n,), U), U, V


def _joined(arrays: list[Array], axis: int, dtype: Any, xp: Any) -> Array:
    arrays = [x if x.dtype == dtype else xp.astype(x, dtype) for x in arrays]
    return arrays[0] if len(arrays) == 1 else xp.concat_axis(arrays, axis)


@lru_cache(maxsize=256)
def _correction(n: int, r: int) -> Structure:
    return Structure.parse(_THREE, i=n, r=r, s=r, o=n)


@dataclass(frozen=True)
class Woodbury:
    """A sum B + U V with what its inverse and its determinant are made of: ``base`` = B^-1, ``left`` = B^-1 U and
    ``capacitance`` = I + V B^-1 U. B and ``base`` are operators, or the numbers of diagonal matrices, which are
    ``positive`` if they are known to be. ``symmetric``: B is positive, and V is U^H."""

    B: StructuredOperator | Array
    U: Array
    V: Array
    base: LinearOperator | Array
    positive: bool = False
    symmetric: bool = False

    @cached_property
    def left(self) -> Array:
        return _times(self.base, self.U)

    @cached_property
    def capacitance(self) -> Array:
        xp = lapack(self.U)
        half = xp.gram(_times(xp.sqrt(self.base), self.U)) if self.symmetric else self.V @ self.left
        return half + xp.eye(self.U.shape[1], self.U)

    def solve(self, b: Array) -> Array:
        """(B + U V)^-1 b, for a vector or columns."""
        w = _times(self.base, b)
        small = self.V @ w
        small = small if small.ndim == 2 else small[:, None]
        xp = lapack(small)
        c = xp.cholesky_solve(self.capacitance, small) if self.symmetric else xp.solve(self.capacitance, small)
        middle = self.left @ c
        return w - (middle if w.ndim == 2 else middle[:, 0])

    def is_accurate(self, A: Sum) -> bool:
        """Whether a solve with a fixed random v leaves no more than roundoff. True while values are traced.

        With c = capacitance^-1 V B^-1 v and x = B^-1 v - left c, the residual A x - v is U (V x - c).
        """
        v = probe(A)
        w = _times(self.base, v)
        c = lapack(v).solve(self.capacitance, (self.V @ w)[:, None])[:, 0]
        x = w - self.left @ c
        residual = known(lapack(v).norm(self.U @ (self.V @ x - c)))
        return residual is None or residual <= accuracy(A) or is_backward_stable(A, self.solve)

    def inverse(self) -> LinearOperator:
        """As an operator: B^-1 and one product of low rank."""
        n, r = self.U.shape
        base = self.base if isinstance(self.base, LinearOperator) else Diagonal(self.base)
        factors = (self.V @ base, lapack(self.left).inv(self.capacitance), -self.left)
        return base + StructuredOperator(_correction(n, r), factors)

    def slogdet(self) -> tuple[Array, Array] | None:
        """None where B has no determinant in closed form."""
        xp = lapack(self.U)
        sign, log = (xp.positive_slogdet if self.symmetric else xp.slogdet)(self.capacitance)
        if self.positive:
            return sign, log + xp.log(xp.real(self.B)).sum()
        first = structured_slogdet(self.B) if isinstance(self.B, StructuredOperator) else of_numbers(self.B, xp)
        return None if first is None else (first[0] * sign, first[1] + log)


def _times(base: LinearOperator | Array, x: Array) -> Array:
    if isinstance(base, LinearOperator):
        return base @ x
    return (base if x.ndim == 1 else base[:, None]) * x


def _is_moderate(A: Sum, values: Array) -> bool:
    """Whether nothing cancels that matters: A is annotated PSD, and B is a positive diagonal of numbers that differ by
    less than eps^(-1/4). Then the eigenvalues of the capacitance are those of A, scaled by B, and what cancels is no
    more than cond(A) cond(B)."""
    if not A.isa(PSD):
        return False
    values = lapack(values).real(values)
    least, most = known(values.min()), known(values.max())
    return least is not None and most is not None and 0 < most < least * eps(A.dtype) ** -0.25


def woodbury(A: Sum) -> Woodbury | None:
    """None where A does not split, or where the formula is not accurate."""
    parts = split(A)
    if parts is None:
        return None
    B, U, V = parts
    require_precision(U, "an inverse")
    moderate, base = False, None
    try:
        if isinstance(B, StructuredOperator):
            base = structured_inverse(B)
        else:
            moderate = _is_moderate(A, B)
            base = B**-1 if moderate else inverse_values(B, 0.0)
    except ValueError:  # B may be singular where the sum is not
        return None
    if base is None:
        return None
    found = Woodbury(B, U, V, base, moderate, moderate and is_transpose(V, U))
    return found if moderate or found.is_accurate(A) else None


@rule("inv")
def _inverse_of_sum(A: Sum, alg: Auto):
    require_square(A, "the inverse", NO_INVERSE)
    found = woodbury(A)
    return general_inverse(A, alg) if found is None else annotated(found.inverse(), hermitian(A))


@rule("slogdet")
def _slogdet_of_sum(A: Sum, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    formula = woodbury(A)
    found = None if formula is None else formula.slogdet()
    return general_slogdet(A, log_alg, trace_alg) if found is None else found
