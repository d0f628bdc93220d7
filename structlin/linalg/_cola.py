"""What linear algebra needs of CoLA and torch beyond the repairs of ``structlin._cola_compat``."""

from __future__ import annotations

import sys
from typing import Any

from cola.backends import np_fns
from cola.ops import Identity, LinearOperator, ScalarMul

from structlin._arrays import Array
from structlin._cola_compat._composing import _as_scalar, _scalar_mul
from structlin._cola_compat._repair import functions_of


def _repair_kron() -> None:
    """``torch.kron`` raises where its second argument is no contiguous array, which the transpose of one is not."""
    import torch

    def kron(a: Array, b: Array) -> Array:
        return torch.kron(a.contiguous(), b.contiguous())

    functions_of("torch").kron = kron  # type: ignore[attr-defined]


def _identity_to(self: Identity, device: Any) -> Identity:
    """CoLA's ``I_like(A)`` ends with this; where there is no device A is NumPy's, and so is the identity then."""
    self.device = device
    if device is None:
        self.xnp = np_fns
    return self


Identity.to = _identity_to
if "torch" in sys.modules:  # importing CoLA has imported it where it is installed
    _repair_kron()


def scalar_like(A: LinearOperator, c: Any) -> ScalarMul:
    """c times the identity, of A's shape, in the library of A; complex where c is."""
    c, dtype = _as_scalar(A, c)
    return _scalar_mul(A, c, dtype, A.shape[0])
