"""What an operator is, read off its kind and that of its parts: a diagonal, or a product with a narrow middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cola.ops import Adjoint, Identity, LinearOperator, Product, ScalarMul, Transpose
from cola.ops import Diagonal as ColaDiagonal

from structlin._arrays import Array
from structlin.linalg import _chain as chain
from structlin.linalg._lapack import lapack
from structlin.operators import StructuredOperator
from structlin.structures.diagonal import DiagonalStructure


def diagonal_of(A: LinearOperator) -> Any | None:
    """A number or a vector, if A is known by its kind to be a multiple of the identity or diagonal; else None."""
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


def thin(A: LinearOperator, limit: int) -> tuple[Array, Array] | None:
    """(U, V) with ``A = U V``, dense, if A passes through a vector of at most ``limit`` numbers; else None."""
    if isinstance(A, StructuredOperator):
        found = chain.bottleneck(A.structure)
        return chain.thin_factors(A) if found is not None and found[0] <= limit else None
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
    return U, V
