"""Functions of Kronecker products and sums of small matrices, from the eigenvectors of the members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint

from structlin import _spectra as spectra
from structlin._arrays import Array
from structlin._lapack import eps, known, lapack, nan_unless, seen
from structlin.operators import RealPart, StructuredOperator
from structlin.structure import Structure
from structlin.structures.diagonal import Diagonal
from structlin.structures.kronecker import Kronecker


def outer(values: Sequence[Array], add: bool = False) -> Array:
    """Return all products or sums of one entry of each vector, in the order of a Kronecker product."""
    found = values[0]
    for more in values[1:]:
        left, right = found[:, None], more[None, :]
        found = (left + right if add else left * right).reshape((-1,))
    return found


def is_hermitian(matrix: Array) -> bool:
    """Whether a matrix is Hermitian to roundoff; True while values are traced, where the caller has to check."""
    (fixed,) = seen(matrix)
    xp = lapack(fixed)
    adjoint = xp.conj(fixed).swapaxes(-1, -2)
    if known(xp.equal(fixed, adjoint)):
        return True
    distance, size = known(xp.max(abs(fixed - adjoint))), known(xp.max(abs(fixed)))
    return distance is None or size is None or distance <= 100 * eps(matrix.dtype) * size


def of_kronecker(matrices: Sequence[Array], A: Any, f: Any, *, add: bool = False, shift: Any = 0.0) -> Any | None:
    """Return f(K + shift I), for K the Kronecker product of the matrices, or with ``add`` their Kronecker sum.

    V f(L) V^-1, where V and L are made of the members' eigenvectors and eigenvalues. None if a member is defective, or
    if roundoff in the members changes f. A tells what is known of the whole: its annotations.

    The derivatives by which :func:`structlin._spectra.is_determined` verifies functions of one matrix do not show the
    roundoff of products with eigenvectors of several members, whose condition numbers multiply. For two members that
    are nearly defective, in single precision, they accepted errors of a tenth. So f is computed twice.
    """
    hermitian = A.isa(SelfAdjoint) and all(map(is_hermitian, matrices))
    found, _ = _of_members(matrices, A, f, add, shift, hermitian)
    if found is None or hermitian or f.real:
        return found
    fixed = [lapack(m).stop_gradient(m) for m in matrices]
    other, values = _of_members([m + spectra.rounding(m) for m in fixed], A, f, add, shift, False)
    if other is None:
        return None
    floor = spectra.roundoff_of(spectra.derivative(lambda x: f.on_spectrum(x, A), values), values, eps(A.dtype))
    X = _random_vectors(A.shape[0], matrices[0])
    Y = lapack(X).stop_gradient(found @ X)
    return _unless_refused(spectra.is_small(other @ X - Y, Y, floor), found, Y)


def _of_members(
    matrices: Sequence[Array], A: Any, f: Any, add: bool, shift: Any, hermitian: bool
) -> tuple[StructuredOperator | None, Array]:
    """Return f of the product or sum, and the eigenvalues."""
    found = [spectra.decompose(m, hermitian) for m in matrices]
    parts = [p for p in found if p is not None]
    if len(parts) < len(found):
        return None, matrices[0]
    xp = lapack(parts[0].values)
    left, right = Kronecker(*(p.vectors for p in parts)), Kronecker(*(p.inverse for p in parts))

    def shifted(values: Array) -> Array:
        return xp.real(values) + shift if A.isa(SelfAdjoint) else values + shift

    def numbers(values: Array) -> Array:
        return f.on_spectrum(shifted(values), A)

    values = shifted(outer([p.values for p in parts], add))
    radius = _radius(parts, add, hermitian) + spectra.ROUNDOFF * eps(A.dtype) * abs(shift)
    settled = f.settled(values, radius)
    middle: Any = Diagonal(f.on_spectrum(settled, A))
    for k, part in enumerate(parts):
        if part.followed:
            middle = middle + _member_derivative(parts, k, numbers, add)
    made = left @ middle @ right
    real = (f.real or A.isa(PSD)) and "complex" not in str(A.dtype)
    if real and any(map(xp.is_complex, (values, *(p.vectors for p in parts)))):
        made = RealPart(made, A.dtype)
    moved = lapack(values).stop_gradient(values - settled)
    if hermitian or settled is values or known(abs(moved).sum()) == 0:
        return made, settled
    # As in spectra.with_values: eigenvalues moved to one number are semisimple if this keeps the matrix.
    image = right @ _random_vectors(A.shape[0], parts[0].vectors)
    change, size = (left @ (x[:, None] * image) for x in (moved, xp.stop_gradient(values)))
    good = xp.max(xp.abs(change)) <= eps(A.dtype) ** 0.75 * xp.max(xp.abs(size))
    return _unless_refused(good & (xp.max(xp.abs(moved) - radius / 8) <= 0), made, change), settled


def _radius(parts: Sequence[spectra.Decomposition], add: bool, hermitian: bool) -> Array:
    radii = [spectra.uncertainty(p, hermitian) for p in parts]
    if add:
        return outer(radii, True)
    sizes = [abs(p.values) for p in parts]
    return outer([s + r for s, r in zip(sizes, radii, strict=True)]) - outer(sizes)


def _random_vectors(n: int, like: Array) -> Array:
    """Return fixed random vectors, (n, 8), in the library and dtype of ``like``.

    Of square roots of products of two nearly defective members in single precision, with errors above 2 %, one vector
    accepts 34 of 239, four vectors accept 5, and eight accept 1.
    """
    xp = lapack(like)
    return xp.astype(xp.index(np.random.default_rng(0).standard_normal((n, 8)), like), like.dtype)


def _unless_refused(good: Array, A: Any, like: Array) -> Any | None:
    """Return A if ``good``, else None; for a traced condition, its products are NaN instead."""
    number = known(good)
    if number is not None:
        return A if number else None
    one = like[:, 0] * 0 + 1
    if isinstance(A, RealPart):
        one = one.real
    return Diagonal(one + nan_unless(good, one)) @ A


def _member_derivative(parts: Sequence[Any], k: int, f: Any, add: bool) -> StructuredOperator:
    """Zero, with the derivative of f(L) with respect to member k: one matrix for each position of the others."""
    xp, part = lapack(parts[k].values), parts[k]
    neutral = part.values[:1] * 0 + (0 if add else 1)
    first, last = (outer([neutral, *(p.values for p in side)], add) for side in (parts[:k], parts[k + 1 :]))
    others = first[:, None] + last[None, :] if add else first[:, None] * last[None, :]  # (p, q)
    whole = others[:, :, None] + part.values if add else others[:, :, None] * part.values  # (p, q, m)
    weights = spectra.divided_differences(f, whole)
    weights = weights if add else weights * others[:, :, None, None]
    weights = xp.permute(weights, (0, 2, 3, 1))  # (p, m, m, q)
    p, m, _, q = weights.shape
    structure = Structure.parse("pjq,pijq->piq", p=p, j=m, i=m, q=q)
    return StructuredOperator(structure, (spectra.first_order(part, weights),))
