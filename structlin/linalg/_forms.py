"""Forms of an operator, recognized by its type and the types of its parts.

The forms are: a diagonal; a product with a small inner dimension; a Kronecker product or sum of small matrices plus a
multiple of the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cola.annotations import SelfAdjoint
from cola.ops import Adjoint, Identity, KronSum, LinearOperator, Product, ScalarMul, Sum, Transpose
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, as_array
from structlin._lapack import lapack, promoted
from structlin.algebra import chains, kronecker, roles
from structlin.linalg._common import fits_dense
from structlin.operators import StructuredOperator
from structlin.structures.diagonal import DiagonalStructure


def diagonal_of(A: LinearOperator) -> Any | None:
    """Return the number or vector on the diagonal if A is diagonal by its type; else None."""
    if isinstance(A, StructuredOperator):
        return A.factors[0] if isinstance(A.structure, DiagonalStructure) else None
    if isinstance(A, Identity):
        return 1.0
    if isinstance(A, ScalarMul):
        return A.c
    if isinstance(A, ColaDiagonal):
        return A.diag
    if isinstance(A, Transpose):
        return diagonal_of(A.A)
    if isinstance(A, Adjoint):
        inner: Any = diagonal_of(A.A)
        return inner.conj() if hasattr(inner, "conj") else inner
    if isinstance(A, Product):
        found: Any = 1.0
        for M in A.Ms:
            value = diagonal_of(M)
            if value is None:
                return None
            found = found * value
        return found
    return None


def without_scalars(A: LinearOperator) -> tuple[Any | None, LinearOperator]:
    """Return (c, B) with A = c B, for a product with multiples of the identity; c is None for any other operator."""
    scalars = [M.c for M in A.Ms if isinstance(M, ScalarMul)] if isinstance(A, Product) else []
    if not scalars or len(scalars) == len(A.Ms):
        return None, A
    rest = [M for M in A.Ms if not isinstance(M, ScalarMul)]
    return math.prod(scalars[1:], start=scalars[0]), rest[0] if len(rest) == 1 else Product(*rest)


def thin(A: LinearOperator, limit: int) -> tuple[Array, Array] | None:
    """Return dense (U, V) with ``A = U V`` if an inner dimension of A is at most ``limit``; else None."""
    if isinstance(A, StructuredOperator):
        found = roles.bottleneck(A.structure)
        return roles.thin_factors(A) if found is not None and found[0] <= limit else None
    if isinstance(A, Transpose | Adjoint):
        inner = thin(A.A, limit)
        if inner is None:
            return None
        U, V = inner[1].T, inner[0].T
        xp = lapack(U)
        return (U, V) if isinstance(A, Transpose) else (xp.conj(U), xp.conj(V))
    if isinstance(A, Product):
        return _thin_product(A.Ms, limit)
    return None


def _thin_product(Ms: Sequence[LinearOperator], limit: int) -> tuple[Array, Array] | None:
    widths = [M.shape[0] for M in Ms[1:]]
    if widths and min(widths) <= limit:
        cut = widths.index(min(widths)) + 1
        U, V = Ms[cut - 1].to_dense(), Ms[cut].to_dense()
        left, right = Ms[: cut - 1], Ms[cut + 1 :]
    else:
        parts = [thin(M, limit) for M in Ms]
        place = next((i for i, part in enumerate(parts) if part is not None), None)
        if place is None:
            return None
        found = parts[place]
        assert found is not None
        U, V = found
        left, right = Ms[:place], Ms[place + 1 :]
    for M in reversed(left):
        U = M @ U
    for M in right:
        V = V @ M
    return promoted(U, V)


@dataclass(frozen=True)
class Members:
    """``A = kron(matrices) + shift I``, or with ``add`` the Kronecker sum of the matrices.

    All have the dtype of A, or the shift has the real one if A is annotated SelfAdjoint.
    """

    matrices: tuple[Array, ...]
    add: bool
    shift: Any = 0.0

    @property
    def size(self) -> int:
        return math.prod(m.shape[0] for m in self.matrices)

    @property
    def hermitian(self) -> bool:
        """Whether all members are known to be Hermitian to roundoff."""
        return all(map(kronecker.is_hermitian, self.matrices))


def members(A: LinearOperator) -> Members | None:
    """Return the members of A; None if A is not such an operator, or is a single dense matrix."""
    if isinstance(A, StructuredOperator):
        found = chains.kronecker_members(A, square=True)
        return None if found is None else Members(tuple(found), False)
    if isinstance(A, Sum):
        K, shift = without_shift(A)
        inner = None if K is None or shift is None else members(K)
        if inner is None:
            return None
        matrices = _in_dtype_of(A, inner.matrices)
        return Members(matrices, inner.add, _shift_of(A, inner.shift + as_array(shift, matrices[0])))
    if isinstance(A, ColaKronecker | KronSum):
        if len(A.Ms) < 2 or not all(M.shape[0] == M.shape[1] and fits_dense(M) for M in A.Ms):
            return None
        return Members(_in_dtype_of(A, [M.to_dense() for M in A.Ms]), isinstance(A, KronSum))
    if isinstance(A, Product):
        c, rest = without_scalars(A)
        inner = None if c is None else members(rest)
        return None if inner is None else _scaled(inner, c, A)
    return None


def _scaled(found: Members, c: Any, A: LinearOperator) -> Members:
    matrices = _in_dtype_of(A, found.matrices)
    c = as_array(c, matrices[0])
    scaled = [m * c if found.add or not i else m for i, m in enumerate(matrices)]
    return Members(tuple(scaled), found.add, _shift_of(A, found.shift * c))


def _shift_of(A: LinearOperator, shift: Array) -> Array:
    return lapack(shift).real(shift) if A.isa(SelfAdjoint) else shift


def _in_dtype_of(A: LinearOperator, matrices: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(lapack(m).astype(m, A.dtype) for m in matrices)


def without_shift(A: Sum) -> tuple[LinearOperator | None, Any | None]:
    """Return (K, c) with ``A = K + c I``.

    c is None if no term is a multiple of the identity. K is None unless there is exactly one other term.
    """
    shift: Any = None
    rest = []
    for M in A.Ms:
        value = diagonal_of(M)
        if value is not None and getattr(value, "ndim", 0) == 0:
            shift = value if shift is None else shift + value
        else:
            rest.append(M)
    if len(rest) != 1:
        return None, shift
    K = rest[0]
    return (SelfAdjoint(K) if A.isa(SelfAdjoint) and not K.isa(SelfAdjoint) else K), shift
