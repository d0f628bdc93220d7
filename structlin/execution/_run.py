"""The executor of structures on all array libraries."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace

from structlin._arrays import Array
from structlin.execution.choice import load_with
from structlin.execution.products import plan_of, products
from structlin.structure import Structure


class _Executor:
    def prepare(self, structure: Structure) -> None:
        plan_of(structure, True)
        plan_of(structure, False)
        plan_of(structure, False, one=True)

    def run(
        self, structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool,
        xp: SimpleNamespace,
    ) -> Array:  # fmt: skip
        if xp.name == "torch" and not xp.is_compiling():
            from structlin.execution.torch_ways import torch_chain

            return torch_chain(structure, rows)(x, factors, bias)
        if xp.name == "jax":
            from structlin.execution.jax_ways import run as run_jax

            return run_jax(structure, factors, x, bias, rows)
        y = products(structure, factors, x, xp, rows)
        return y if bias is None else y + bias


def _load_ways(every: bool) -> None:
    """Import the ways of ``every`` installed library, or only those of libraries that the process has imported.

    So a process that uses only jax does not import torch, and the reverse.
    """
    if "structlin.execution.torch_ways" not in sys.modules and (every or "torch" in sys.modules):
        with suppress(ImportError):
            import structlin.execution.torch_ways
    if "structlin.execution.jax_ways" not in sys.modules and (every or "jax" in sys.modules):
        with suppress(ImportError):
            import structlin.execution.jax_ways  # noqa: F401


load_with(_load_ways)
EXECUTOR = _Executor()
