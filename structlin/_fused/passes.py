"""The compiled passes of a chain for torch: memory for them, tokens dealt out to threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from structlin._fused._program import ELEMENTS, Packing, Pass, Program, make_program
from structlin._fused._target import Target, host
from structlin._fused._team import run_shares
from structlin._parse import Step

# The calls cost more than they save for so few numbers in the widest activation, and copies of the factors if there are
# fewer than one for each COPIED of their numbers. Plain matrices of few tokens the BLAS multiplies as fast.
FEW, COPIED, PLAIN_TOKENS = 1 << 12, 2, 256
# Activations are kept for the backward pass if there are not so many that they come from fresh pages of memory, and if
# to compute one again takes more than this many multiplications of vectors.
KEPT_BYTES, KEPT_WORK = 16 << 20, 3
SHARE, COPIED_SHARE = 48, 1 << 15  # tokens of a thread, and numbers that it copies, at least
WASTE = 12  # times the instructions that products without losses would take: more is slower than what others do


class FusedChain:
    """The two passes; see :class:`structlin._cpu.Passes`."""

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool
    ) -> None:
        self._chain, self.rows, self.d_in, self.d_out = (steps, sizes, d_in, d_out, rows), rows, d_in, d_out
        size = dict(sizes)
        self.widest = max(math.prod(size[a] for a in axes) for step in steps for axes in (step.input, step.output))
        self.shapes = [tuple(size[a] for a in step.factor) for step in steps]
        macs = [math.prod(size[a] for a in set(step.input + step.factor)) for step in steps]
        self.macs, self.macs_before_last = sum(macs), sum(macs[:-1])
        self.numel = sum(map(math.prod, self.shapes))
        self.plain = not any(step.batch or step.carried for step in steps)
        # The dense matrix and its gradient, less the factors, their gradients, and copies of both in other orders.
        self.spare = 2 * d_in * d_out - 4 * self.numel

    def suits(self, x: Tensor, tokens: int) -> bool:
        """Whether this way is the fastest for ``x``."""
        numbers = tokens * self.widest
        if numbers < FEW or COPIED * numbers < self.numel or (self.plain and tokens < PLAIN_TOKENS):
            return False
        return self.program(x.dtype) is not None

    @cached_property
    def _programs(self) -> dict[torch.dtype, Program | None]:
        return {}

    def program(self, dtype: torch.dtype) -> Program | None:
        """None where the chain is not to be run this way."""
        if dtype not in self._programs:
            target, name = host(), str(dtype).removeprefix("torch.")
            found = None
            if target is not None and name in ELEMENTS:
                found = make_program(*self._chain, name, target)
            if found is not None:
                lanes = found.lanes
                if found.schedule.cost + found.schedule.back_cost > 3 * WASTE * self.macs / lanes:
                    found = None
            self._programs[dtype] = found
        return self._programs[dtype]

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        program = self._ready(x.dtype)
        x, tokens, inside = x.detach().contiguous(), x.shape[0 if self.rows else 1], program.dtype
        y = x.new_empty((tokens, self.d_out) if self.rows else (self.d_out, tokens))
        rows = program.schedule.rows[1:-1]
        keeps = kept is not None and self._keeps(x, rows, inside)
        found = [torch.empty(tokens * row, dtype=inside) for row in rows] if keeps else []
        if keeps and kept is not None:
            kept += found
        run = program.forward(bias is not None, keeps)
        added = []
        if bias is not None:
            added = [torch.nn.functional.pad(bias.detach().to(inside), (0, program.schedule.widths[-1] - self.d_out))]
        table = [*added, *_packed(program, "forward", range(len(factors)), factors), *found]
        _run(run, tokens, [x, y], [table] * _threads(tokens), program.target)
        return y

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        program = self._ready(x.dtype)
        x, gy, inside = x.detach().contiguous(), gy.detach().contiguous(), program.dtype
        tokens = x.shape[0 if self.rows else 1]
        last = len(factors)
        gx = x.new_empty(x.shape) if needs[0] else None
        *needs, for_bias = needs
        run = program.backward((*needs, for_bias and self.rows), bool(kept))
        wanted = [k for k in range(last) if needs[k + 1]]
        lowest = 0 if needs[0] else min(wanted) + 1
        back = _packed(program, "back", range(lowest, last), factors)
        if kept:
            rest = list(kept)
        else:
            rest = _packed(program, "forward", range(max(wanted, default=0)), factors)
        sizes = [*(math.prod(self.shapes[k]) for k in wanted), *([self.d_out] if for_bias and self.rows else [])]
        grads = [[torch.empty(size, dtype=inside) for size in sizes] for _ in range(_threads(tokens))]
        ends = [] if gx is None else [gx]
        _run(run, tokens, [x, gy], [[*ends, *back, *mine, *rest] for mine in grads], program.target)
        for more in grads[1:]:
            for total, part in zip(grads[0], more, strict=True):
                total += part
        found: list[Tensor | None] = [gx, *([None] * last), None]
        for k, gradient in zip(wanted, _unpacked(program, wanted, grads[0][: len(wanted)], x.dtype), strict=True):
            found[k + 1] = gradient
        if for_bias:
            found[-1] = grads[0][-1].to(x.dtype) if self.rows else gy.sum(1)
        return tuple(found)

    def _ready(self, dtype: torch.dtype) -> Program:
        program = self.program(dtype)
        assert program is not None
        return program

    def _keeps(self, x: Tensor, rows: Sequence[int], inside: torch.dtype) -> bool:
        """Whether to keep the activations between the steps for the backward pass, and not to compute them again.

        If it pays, and they take no more memory than the dense matrix and its gradient would, or than x and y.
        """
        program = self._ready(x.dtype)
        work = self.macs_before_last / (program.lanes * (2 if program.pairs else 1))
        if work < KEPT_WORK * sum(rows):
            return False
        numbers = x.shape[0 if self.rows else 1] * sum(rows)
        if numbers * inside.itemsize > KEPT_BYTES:
            return False
        return numbers * inside.itemsize <= self.spare * x.element_size() or sum(rows) <= 1.1 * min(
            self.d_in, self.d_out
        )


def _packed(program: Program, kind: str, numbers: Sequence[int], factors: Sequence[Tensor]) -> list[Tensor]:
    """These factors as the products ``kind`` read them."""
    packing = program.packing(kind, tuple(numbers))
    originals = [factors[k].detach().contiguous() for k in numbers]
    copies = [
        torch.empty(size, dtype=torch.uint8) if size else original
        for original, size in zip(originals, packing.sizes, strict=True)
    ]
    _copy(program, packing, originals, copies)
    return copies


def _unpacked(program: Program, numbers: Sequence[int], found: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The gradients of these factors with axes as the factors have them."""
    packing = program.packing("gradients", tuple(numbers))
    copies = [
        torch.empty(program.shapes[k], dtype=dtype) if size else original.view(program.shapes[k])
        for k, original, size in zip(numbers, found, packing.sizes, strict=True)
    ]
    _copy(program, packing, found, copies)
    return copies


def _copy(program: Program, packing: Packing, originals: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    moved = [pair for *pair, size in zip(originals, copies, packing.sizes, strict=True) if size]
    if moved:
        table = [tensor.data_ptr() for pair in moved for tensor in pair]
        numbers = sum(original.numel() for original, _ in moved)
        shares = max(1, min(torch.get_num_threads(), numbers // COPIED_SHARE))
        run_shares(packing.run, [table] * shares, range(shares + 1), program.target)


def _threads(tokens: int) -> int:
    return max(1, min(torch.get_num_threads(), tokens // SHARE))


def _run(
    run: Pass, tokens: int, ends: Sequence[Tensor], tables: Sequence[Sequence[Tensor]], target: Target
) -> None:  # fmt: skip
    """Run all tokens, shared among as many threads as there are tables."""
    threads = len(tables)
    blocks = math.ceil(tokens / run.block)
    cuts = [min(tokens, blocks * k // threads * run.block) for k in range(threads + 1)]
    scratch = torch.empty(threads, run.scratch + 64, dtype=torch.uint8)

    found = []
    for k, table in enumerate(tables):
        pointers = [t.data_ptr() for t in (*ends, scratch[k], *table)]
        pointers[2] = -(-pointers[2] // 64) * 64  # vectors that start at the end of a cache line are slow
        found.append(pointers)
    run_shares(run.run, found, cuts, target)
