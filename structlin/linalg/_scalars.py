"""Multiples of the identity."""

from __future__ import annotations

from typing import Any

from cola.ops import LinearOperator, ScalarMul

from structlin._cola_compat import as_scalar, scalar_mul


def scalar_like(A: LinearOperator, c: Any) -> ScalarMul:
    """C times the identity, of A's shape, in the library of A; complex where c is."""
    c, dtype = as_scalar(A, c)
    return scalar_mul(A, c, dtype, A.shape[0])
