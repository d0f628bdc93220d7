"""What linear algebra needs of CoLA and torch beyond the repairs of ``structlin._cola_compat``."""

from __future__ import annotations

import sys

from structlin._arrays import Array
from structlin._cola_compat._repair import functions_of


def _repair_kron() -> None:
    """``torch.kron`` raises where its second argument is no contiguous array, which the transpose of one is not."""
    import torch

    def kron(a: Array, b: Array) -> Array:
        return torch.kron(a.contiguous(), b.contiguous())

    functions_of("torch").kron = kron  # type: ignore[attr-defined]


if "torch" in sys.modules:  # importing CoLA has imported it where it is installed
    _repair_kron()
