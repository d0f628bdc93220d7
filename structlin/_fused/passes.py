"""The compiled passes of a chain for torch: memory for them, tokens dealt out to threads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._fused._program import Packing, Pass, Program
from structlin._fused._rules import ChainRules, copy_shares, cuts, shares
from structlin._fused._schedule import LINE
from structlin._fused._target import Target
from structlin._fused._team import run_shares
from structlin._parse import Step


class FusedChain(ChainRules):
    """The two passes; see :class:`structlin._cpu.Passes`."""

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool
    ) -> None:
        super().__init__(steps, sizes, d_in, d_out, rows)
        # Of plain matrices whether each is (free, contracted), or else the other way round; None of others.
        self._upright = _upright(steps, sizes, d_in, d_out) if rows and self.plain else None
        self._found: dict[torch.dtype, Program | None] = {}

    def suits(self, x: Tensor, tokens: int) -> bool:
        """Whether this way is the fastest for ``x``."""
        return self.pays(tokens, torch.is_grad_enabled()) and self._program(x.dtype) is not None

    def spills(self, dtype: torch.dtype) -> bool:
        """Whether the backward pass has too much to hold in cache."""
        return self._ready(dtype).spills

    def _program(self, dtype: torch.dtype) -> Program | None:
        if dtype not in self._found:
            self._found[dtype] = self.program(str(dtype).removeprefix("torch."))
        return self._found[dtype]

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        program = self._ready(x.dtype)
        x, tokens, inside = x.contiguous(), x.shape[0 if self.rows else 1], program.dtype
        y = x.new_empty((tokens, self.d_out) if self.rows else (self.d_out, tokens))
        cut = self.kept_tokens(program, tokens, _threads(tokens)) if kept is not None else 0
        found = [torch.empty(cut * row, dtype=program.kept_dtype) for row in program.schedule.rows[1:-1]] if cut else []
        if kept is not None:
            kept += found
        table, held = _packed(program, "forward", range(len(factors)), factors)
        if bias is not None:
            spare = program.schedule.widths[-1] - self.d_out
            bias = (F.pad(bias, (0, spare)) if spare else bias).to(inside).contiguous()
            table = [bias.data_ptr(), *table]
        for part, more in ((range(cut), found), (range(cut, tokens), [])):
            if part:
                run = program.forward(bias is not None, bool(more))
                tables = [[*table, *_places(more)]] * _threads(len(part))
                _run(run, part, tokens, _places((x, y)), tables, program.target)
        del held
        return y

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        program = self._ready(x.dtype)
        if self._upright is not None and program.pairs:
            return self._plain_backward(gy, x, factors, needs, kept)
        x, gy, inside = x.contiguous(), gy.contiguous(), program.dtype
        tokens = x.shape[0 if self.rows else 1]
        last = len(factors)
        gx = x.new_empty(x.shape) if needs[0] else None
        *needs, for_bias = needs
        wanted = [k for k in range(last) if needs[k + 1]]
        sizes = [*(math.prod(self.shapes[k]) for k in wanted), *([self.d_out] if for_bias and self.rows else [])]
        grads = [[torch.zeros(size, dtype=inside) for size in sizes] for _ in range(_threads(tokens))]
        self._add_gradients(program, x, gy, gx, factors, (*needs, for_bias and self.rows), grads, kept)
        while len(grads) > 1:
            for total, part in zip(grads[0], grads.pop(), strict=True):
                total += part
        found: list[Tensor | None] = [gx, *([None] * last), None]
        for k, gradient in zip(wanted, _unpacked(program, wanted, grads[0][: len(wanted)], x.dtype), strict=True):
            found[k + 1] = gradient
        if for_bias:
            found[-1] = grads[0][-1].to(x.dtype) if self.rows else gy.sum(1)
        return tuple(found)

    def _plain_backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """By the BLAS, which in bfloat16 is the faster one at gradients of plain matrices."""
        program, tokens, (for_x, *for_factors, for_bias) = self._ready(x.dtype), x.shape[0], needs
        upright, widths = self._upright or (), program.schedule.widths
        matrices = [
            f.reshape(out, d) if up else f.reshape(d, out).mT
            for f, up, d, out in zip(factors, upright, widths[:-1], widths[1:], strict=True)
        ]
        states, highest = [x], max((k for k, need in enumerate(for_factors) if need), default=0)
        for k, matrix in enumerate(matrices[:highest]):
            width, row = widths[k + 1], program.schedule.rows[k + 1]
            held = kept[k].view(-1, row)[:, :width] if kept else x.new_empty(0, width)
            states.append(held if len(held) == tokens else torch.cat((held, states[k][len(held) :] @ matrix.mT)))
        found: list[Tensor | None] = [None] * len(needs)
        if for_bias:
            found[-1] = gy.sum(0)
        lowest = 0 if for_x else for_factors.index(True)
        for k in range(len(matrices) - 1, lowest - 1, -1):
            if for_factors[k]:
                gradient = gy.mT @ states[k] if upright[k] else states[k].mT @ gy
                found[k + 1] = gradient.view(self.shapes[k])
            if k > lowest or for_x:
                gy = gy @ matrices[k]
        if for_x:
            found[0] = gy
        return tuple(found)

    def _add_gradients(
        self, program: Program, x: Tensor, gy: Tensor, gx: Tensor | None, factors: Sequence[Tensor],
        needs: tuple[bool, ...], grads: Sequence[Sequence[Tensor]], kept: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Run the backward pass; each thread adds to the gradients ``grads`` of its own."""
        tokens, last = x.shape[0 if self.rows else 1], len(factors)
        wanted = [k for k in range(last) if needs[k + 1]]
        cut = kept[0].numel() // program.schedule.rows[1] if kept else 0
        lowest = 0 if needs[0] else min(wanted) + 1
        table, held = _packed(program, "back", range(lowest, last), factors)
        if gx is not None:
            table = [gx.data_ptr(), *table]
        for part, rest in ((range(cut), kept), (range(cut, tokens), None)):
            if part:
                again = range(max(wanted, default=0))
                more, copies = (_places(rest), []) if rest is not None else _packed(program, "forward", again, factors)
                tables = [[*table, *_places(mine), *more] for mine in grads[: _threads(len(part))]]
                run = program.backward(needs, rest is not None, len(tables) > 1)
                _run(run, part, tokens, _places((x, gy)), tables, program.target)
                del copies
        del held

    def _ready(self, dtype: torch.dtype) -> Program:
        program = self._program(dtype)
        assert program is not None
        return program


def _upright(
    steps: Sequence[Step], sizes: Sequence[tuple[str, int]], d_in: int, d_out: int
) -> tuple[bool, ...] | None:  # fmt: skip
    size, written = dict(sizes), steps[0].input
    for step in steps:
        if step.input != written or step.factor not in (step.output + step.input, step.input + step.output):
            return None
        written = step.output
    ends = (math.prod(size[a] for a in axes) for axes in (steps[0].input, written))
    return tuple(s.factor == s.output + s.input for s in steps) if tuple(ends) == (d_in, d_out) else None


def _packed(
    program: Program, kind: str, numbers: Sequence[int], factors: Sequence[Tensor]
) -> tuple[list[int], list[Tensor]]:
    """Where these factors are as the products ``kind`` read them, and what has to live as long as they are read."""
    packing = program.packing(kind, tuple(numbers))
    originals = [factors[k].contiguous() for k in numbers]
    copies = torch.empty(packing.total, dtype=torch.uint8) if packing.total else None
    first, places, moved = 0 if copies is None else copies.data_ptr(), [], []
    for original, size, start in zip(originals, packing.sizes, packing.starts, strict=True):
        place = original.data_ptr()
        if size:
            moved += [place, first + start]
            place = first + start
        places.append(place)
    _copy(program, packing, moved)
    return places, originals if copies is None else [copies, *originals]


def _unpacked(program: Program, numbers: Sequence[int], found: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The gradients of these factors with axes as the factors have them."""
    packing = program.packing("gradients", tuple(numbers))
    copies, moved = [], []
    for k, original, size in zip(numbers, found, packing.sizes, strict=True):
        if size:
            copies.append(torch.empty(program.shapes[k], dtype=dtype))
            moved += _places((original, copies[-1]))
        else:
            copies.append(original.view(program.shapes[k]))
    _copy(program, packing, moved)
    return copies


def _copy(program: Program, packing: Packing, table: Sequence[int]) -> None:
    """From and to where the table says."""
    if table:
        count = copy_shares(packing.numbers, torch.get_num_threads())
        run_shares(packing.run, [table] * count, range(count + 1), count, program.target)


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _threads(tokens: int) -> int:
    return shares(tokens, torch.get_num_threads())


def _run(
    run: Pass, part: range, tokens: int, ends: Sequence[int], tables: Sequence[Sequence[int]], target: Target
) -> None:  # fmt: skip
    """Run a part of the tokens, shared among as many threads as there are tables; all are of addresses."""
    threads = len(tables)
    each = -(-run.scratch // LINE) * LINE
    scratch = torch.empty(threads * each + LINE, dtype=torch.uint8)
    first = -(-scratch.data_ptr() // LINE) * LINE  # vectors that start at the end of a cache line are slow
    tables = [[*ends, first + k * each, *table] for k, table in enumerate(tables)]
    run_shares(run.run, tables, cuts(part, run.block, threads), tokens, target)
