"""A compiled forward pass for one or a few tokens, which reads the factors as they are stored.

To copy factors into other orders takes as long as the products of a few tokens do. Here nothing is copied, and what a
call needs beside its operands is kept for the next one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.execution.compiled._program import Program
from structlin.execution.compiled._rules import ChainRules
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._writer import Pass

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


class StoredChain:
    """The forward pass of a chain; see :class:`structlin.execution.torch_cpu.Passes`. It has no backward pass."""

    def __init__(self, rules: ChainRules) -> None:
        self._rules = rules
        self._made: dict[tuple[torch.dtype, bool], tuple[Program, Pass, Any]] = {}
        self._local = threading.local()  # scratch memory of each thread

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a compiled pass belongs to a structure, and is made again with it")

    def program(self, dtype: torch.dtype) -> Program | None:
        """Return what is compiled for a dtype; None where the chain does not run this way."""
        name = _NAMES.get(dtype)
        found = None if name is None or not self._rules.rows else self._rules.program(name, packed=False)
        # Bias and output are read and written as they are.
        return found if found is not None and found.schedule.widths[-1] == self._rules.d_out else None

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Compute the product with the factors as they are stored."""
        factors = [factor.contiguous() for factor in factors]
        return self.plain(x.contiguous(), factors, None if bias is None else bias.contiguous())

    def plain(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the same for operands that are contiguous."""
        made = self._made.get((x.dtype, bias is not None)) or self._make(x.dtype, bias is not None)
        program, run, table = made
        tokens = x.shape[0]
        y = x.new_empty((tokens, self._rules.d_out))
        scratch = self._scratch(run)
        if bias is None:
            places = table(x.data_ptr(), y.data_ptr(), scratch, *[factor.data_ptr() for factor in factors])
        else:
            if bias.dtype is not program.dtype:
                bias = bias.to(program.dtype)
            places = table(
                x.data_ptr(), y.data_ptr(), scratch, bias.data_ptr(), *[factor.data_ptr() for factor in factors]
            )
        run.run(places, 0, tokens, tokens)
        return y

    def _make(self, dtype: torch.dtype, bias: bool) -> tuple[Program, Pass, Any]:
        program = self.program(dtype)
        assert program is not None
        count = 3 + bias + len(self._rules.shapes)
        self._made[dtype, bias] = found = program, program.forward(bias, False), ctypes.c_void_p * count
        return found

    def _scratch(self, run: Pass) -> int:
        """Return the address of scratch memory of this thread, at the start of a cache line."""
        held = getattr(self._local, "held", None)
        if held is None or held.numel() < run.scratch + LINE:
            held = self._local.held = torch.empty(run.scratch + LINE, dtype=torch.uint8, device="cpu")
        return -(-held.data_ptr() // LINE) * LINE
