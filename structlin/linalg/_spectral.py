"""``K + c I`` for Kronecker products and sums, and sums of two Kronecker products, by eigenvectors of the members.

The eigenvectors V and eigenvalues L of K follow from those of the members. With K = V L V^-1,
``(K + c I)^-1 = V (L + c)^-1 V^-1`` (Saatci 2011, Scalable inference for structured Gaussian process models, chapter
5). The generalized eigenvectors of (A, C) and of (B, D) diagonalize ``A (x) B + C (x) D``, if all members are Hermitian
and C and D are positive definite (Golub and Van Loan 2013, Matrix Computations, section 8.7). The members and a few
vectors are stored.

If the members are Hermitian, the eigenvectors are unitary and the solution is backward stable. Otherwise solutions are
refined and verified for their right-hand side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Unitary
from cola.ops import LinearOperator, Sum

from structlin import _spectra as spectra
from structlin._arrays import Array
from structlin._implicit import Solver
from structlin._lapack import (
    as_tensors,
    determinant_of_numbers,
    eps,
    inverse_values,
    is_known,
    lapack,
    nan_unless,
    seen,
    small_views,
)
from structlin.algebra import kronecker
from structlin.linalg._forms import Members, members
from structlin.structures.diagonal import Diagonal
from structlin.structures.kronecker import Kronecker
from structlin.verdicts import Determinant, Eigen

_FEW = 2**10  # up to this size of a member, the overhead of NumPy calls is the lowest


@dataclass(frozen=True)
class Diagonalised:
    """``A = left diag(values) right``, without derivatives; ``normal``: left and right are unitary."""

    left: Any
    values: Array
    right: Any
    normal: bool


def _values(form: Members, values: list[Array]) -> Array:
    return kronecker.outer(values, form.add) + form.shift


def _on_views(form: Members) -> Members:
    """Return the members as NumPy views, if they are small torch tensors without gradients."""
    shift = [form.shift] if hasattr(form.shift, "dtype") else []
    views = small_views(*form.matrices, *shift, most=_FEW)
    if views is None:
        return form
    return Members(tuple(views[: len(form.matrices)]), form.add, views[-1] if shift else form.shift)


def _diagonalised(A: LinearOperator, form: Members) -> Diagonalised | None:
    """Return the decomposition of a K + c I without gradients; None if eigenvectors do not reproduce a member."""
    hermitian = form.hermitian and (A.isa(SelfAdjoint) or is_known(form.matrices[0]))
    found = [spectra.decompose(m, hermitian) for m in form.matrices]
    parts = [p for p in found if p is not None]
    if len(parts) < len(found):
        return None
    values = spectra.require_positive(_values(form, [p.values for p in parts]), A.isa(PSD))
    if hermitian and not is_known(form.matrices[0]):
        values = values + nan_unless(_is_hermitian_traced(form.matrices), values)
    left, right = Kronecker(*(p.vectors for p in parts)), Kronecker(*(p.inverse for p in parts))
    return Diagonalised(left, values, right, hermitian)


def _is_hermitian_traced(matrices: tuple[Array, ...]) -> Array:
    xp = lapack(matrices[0])
    good = [xp.max(xp.abs(m - xp.conj(m).T)) <= 100 * eps(m.dtype) * xp.max(xp.abs(m)) for m in matrices]
    found = good[0]
    for more in good[1:]:
        found = found & more
    return found


def eigen(A: LinearOperator) -> Eigen | None:
    """Return the eigendecomposition of K + c I, with the derivatives of the library, or None."""
    form = members(A)
    if form is None:
        return None
    xp = lapack(form.matrices[0])
    hermitian = form.hermitian and is_known(form.matrices[0])
    pairs = [(xp.eigh if hermitian else xp.eig)(m) for m in form.matrices]
    vectors = Kronecker(*(v for _, v in pairs))
    values = _values(form, [w for w, _ in pairs])
    if hermitian:
        unitary = Unitary(vectors)
        return Eigen(values, unitary, lambda: unitary.H, normal=True)
    return Eigen(values, vectors, lambda: Kronecker(*map(xp.inv, vectors.factors)))


def slogdet(A: LinearOperator) -> Determinant | None:
    """Return the determinant of K + c I by eigenvalues alone, whose derivatives exist if they repeat.

    None for other operators, and if a derivative of a defective member is needed.
    """
    form = members(A)
    if form is None:
        return None
    views = _on_views(form)
    found = _determinant(A, views)
    return found if found is None or views is form else Determinant(*as_tensors(*found))


def _determinant(A: LinearOperator, form: Members) -> Determinant | None:
    xp = lapack(form.matrices[0])
    hermitian = form.hermitian and (A.isa(SelfAdjoint) or is_known(form.matrices[0]))
    found = list(map(xp.eigvalsh if hermitian else spectra.eigenvalues, form.matrices))
    if any(x is None for x in found):
        return None
    values = spectra.require_positive(_values(form, found), A.isa(PSD))
    if hermitian and not is_known(form.matrices[0]):
        values = values + nan_unless(_is_hermitian_traced(tuple(map(xp.stop_gradient, form.matrices))), values)
    sign, log = determinant_of_numbers(values)
    if xp.is_complex(values) and not xp.is_complex(form.matrices[0]):
        sign = xp.sign(xp.real(sign))
    return Determinant(sign, log)


# -- two Kronecker products --------------------------------------------------------------------------------------------


def pair(A: LinearOperator) -> list[tuple[Array, Array]] | None:
    """Return [(A, C), (B, D)] of ``A (x) B + C (x) D``, Hermitian, with positive definite C and D.

    None if A is not such a sum, or if values are traced, so that definiteness cannot be checked.
    """
    if not isinstance(A, Sum) or len(A.Ms) != 2:
        return None
    forms = [members(M) for M in A.Ms]
    parts = [f for f in forms if f is not None]
    if len(parts) < 2 or any(f.add or len(f.matrices) != 2 or hasattr(f.shift, "dtype") for f in parts):
        return None
    if parts[0].matrices[0].shape != parts[1].matrices[0].shape or not all(f.hermitian for f in parts):
        return None
    if not all(is_known(m) for f in parts for m in f.matrices):
        return None
    a, b = (f.matrices for f in parts)
    for first, second in ((a, b), (b, a)):
        if all(map(_is_positive, second)):
            return list(zip(first, second, strict=True))
    return None


def _is_positive(matrix: Array) -> bool:
    xp = lapack(matrix)
    try:
        pivots = abs(xp.diagonal(xp.cholesky(xp.stop_gradient(matrix)))) ** 2
    except (np.linalg.LinAlgError, RuntimeError):
        return False
    return bool(pivots.min() > pivots.max() * eps(matrix.dtype) ** 0.5)


def _reduced(first: Array, second: Array) -> tuple[Array, Array]:
    """Return (L^-1 first L^-H, L) with ``second = L L^H``."""
    xp = lapack(first)
    lower = xp.cholesky(second)
    half = xp.solve(lower, first)
    core = xp.conj(xp.solve(lower, xp.conj(half).T)).T
    return (core + xp.conj(core).T) / 2, lower


def pair_inverse(A: LinearOperator) -> LinearOperator | None:
    """Return ``W^-H diag(1 / values) W^-1`` with W = L Q, for A = W diag(values) W^H; None for other sums."""
    found = pair(A)
    if found is None:
        return None
    reduced = [_reduced(m, c) for m, c in found]
    xp = lapack(reduced[0][0])
    spectral = [xp.eigh(core) for core, _ in reduced]
    values = inverse_values(kronecker.outer([w for w, _ in spectral]) + 1, eps(A.dtype))
    half = Kronecker(*(xp.inv(low) for _, low in reduced))
    vectors = Kronecker(*(v for _, v in spectral))
    inner = vectors.H @ half  # one Kronecker product
    return inner.H @ Diagonal(values) @ inner


def pair_slogdet(A: LinearOperator) -> Determinant | None:
    found = pair(A)
    if found is None:
        return None
    reduced = [_reduced(m, c) for m, c in found]
    xp = lapack(reduced[0][0])
    values = kronecker.outer([xp.eigh(core)[0] for core, _ in reduced]) + 1
    sign, log = determinant_of_numbers(values)
    sizes = [low.shape[0] for _, low in reduced]
    for (_, low), other in zip(reduced, reversed(sizes), strict=True):
        log = log + 2 * other * xp.log(xp.abs(xp.diagonal(low))).sum()
    return Determinant(sign, log)


# -- solutions ---------------------------------------------------------------------------------------------------------


def solver(A: LinearOperator) -> tuple[Solver, bool] | None:
    """Return a solver for an A without gradients, and whether it is backward stable without refinement, or None."""
    form = members(A)
    found = None if form is None else _diagonalised(A, _on_views(form))
    if found is None:
        inverse = pair_inverse(A)
        return None if inverse is None else (Solver(inverse.__matmul__, inverse.__matmul__), False)
    left, right = found.left, found.right
    scale = inverse_values(found.values, eps(found.values.dtype))
    conjugate = lapack(scale).conj(scale)
    real = not lapack(found.values).is_complex(found.values) or "complex" in str(A.dtype)

    def apply(left: Any, scale: Array, right: Any, b: Array) -> Array:
        if isinstance(scale, np.ndarray) and not isinstance(b, np.ndarray):
            return as_tensors(apply(left, scale, right, *seen(b)))[0]
        x = left @ ((scale if b.ndim == 1 else scale[:, None]) * (right @ b))
        return x if real or lapack(b).is_complex(b) else lapack(x).real(x)

    def solve(b: Array) -> Array:
        return apply(left, scale, right, b)

    def adjoint(b: Array) -> Array:
        return apply(right.H, conjugate, left.H, b)

    return Solver(solve, adjoint), found.normal
