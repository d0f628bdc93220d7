"""A compiled forward pass for one or a few tokens, which reads the factors as they are stored.

Copying factors into other orders takes as long as the products of a few tokens. Here nothing is copied, and the tables
and scratch memory of a call are kept for the next one.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.execution.compiled._program import Program
from structlin.execution.compiled._rules import ChainRules
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._writer import Pass
from structlin.execution.compiled.passes import NAMES


class StoredChain:
    """The forward pass of a chain; see :class:`structlin.execution.torch_cpu.Passes`. It has no backward pass."""

    def __init__(self, rules: ChainRules) -> None:
        self._rules = rules
        self._made: dict[tuple[torch.dtype, bool], tuple[torch.dtype, Pass]] = {}  # dtype of the bias
        self._local: Any = threading.local()  # tables and scratch memory of each thread

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a compiled pass cannot be pickled; pickle its structure, which compiles it again")

    def program(self, dtype: torch.dtype) -> Program | None:
        """Return the program of a dtype; None if this way cannot run the chain."""
        name = NAMES.get(dtype)
        found = None if name is None or not self._rules.rows else self._rules.program(name, False)
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
        key = x.dtype, bias is not None
        dtype, run = self._made.get(key) or self._make(*key)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        tokens = x.shape[0]
        y = x.new_empty(tokens, self._rules.d_out)  # a tuple takes half a microsecond longer
        address, fill, table, scratch, _ = self._local.__dict__.get(key) or self._hold(key, run)
        operands = [factor.data_ptr() for factor in factors]
        if bias is not None:
            operands.insert(0, bias.data_ptr())
        fill(table, 0, x.data_ptr(), y.data_ptr(), scratch, *operands, tokens)
        run.run(address)
        return y

    def _make(self, dtype: torch.dtype, bias: bool) -> tuple[torch.dtype, Pass]:
        program = self.program(dtype)
        assert program is not None
        self._made[dtype, bias] = found = program.dtype, program.forward(bias, False)
        return found

    def _hold(self, key: tuple[torch.dtype, bool], run: Pass) -> tuple[Any, ...]:
        """Return a table of addresses for this thread, what fills it, and scratch memory from the start of a line."""
        count = 4 + key[1] + len(self._rules.shapes)
        memory = torch.empty(run.scratch + LINE, dtype=torch.uint8, device="cpu")
        first = -(-memory.data_ptr() // LINE) * LINE
        table = (ctypes.c_uint64 * count)()
        held = ctypes.addressof(table), struct.Struct(f"={count}Q").pack_into, table, first, memory
        self._local.__dict__[key] = held
        return held
