"""The compiled passes of a chain for torch: one slice after the other, with tokens divided among threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._parse import Step
from structlin.execution._memory import advised
from structlin.execution.compiled._buffers import Packed, Sums, kept_places
from structlin.execution.compiled._program import Program
from structlin.execution.compiled._rules import ChainRules, cuts, shares
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._slices import Slices, whole
from structlin.execution.compiled._target import Target
from structlin.execution.compiled._team import run_shares
from structlin.execution.compiled._writer import Pass

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Of some of the tokens: the pass, the factors that it goes back through, and what else it reads of a slice.
_Way = tuple[range, Pass, Packed, Callable[[int], list[int]]]


class FusedChain(ChainRules):
    """The two passes; see :class:`structlin.execution.torch_cpu.Passes`."""

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool
    ) -> None:
        super().__init__(steps, sizes, d_in, d_out, rows)
        # Of plain matrices whether each is (free, contracted), or else the other way round; None of others.
        self._upright = _upright(steps, sizes, d_in, d_out) if rows and self.plain else None
        self._found: dict[torch.dtype, Program | None] = {}
        self.failed = False  # the compiler did not compile a pass: no other is tried

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the chain can be compiled for this dtype, and the compiler has not failed."""
        return not self.failed and self._program(dtype) is not None

    def _threads(self, tokens: int) -> int:
        return shares(tokens, torch.get_num_threads(), self.macs)

    def _program(self, dtype: torch.dtype) -> Program | None:
        if dtype not in self._found:
            self._found[dtype] = self.program(NAMES[dtype]) if dtype in NAMES else None
        return self._found[dtype]

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Compute the product, and append to ``kept`` the activations that the backward pass reads."""
        name, tokens = NAMES[x.dtype], x.shape[0 if self.rows else 1]
        program = self._ready(x.dtype)
        x, factors = x.contiguous(), [factor.contiguous() for factor in factors]
        shape = (tokens, self.d_out) if self.rows else (self.d_out, tokens)
        y = advised(torch.empty(shape, dtype=x.dtype, device="cpu"))
        cut, found = self.kept_tokens(name, tokens, self._threads(tokens)) if kept is not None else 0, []
        if kept is not None and cut:
            rows, kept_dtype = program.schedule.rows[1:-1], program.kept_dtype
            found = [advised(torch.empty(cut * row, dtype=kept_dtype, device="cpu")) for row in rows]
            kept += found
        if bias is not None:
            spare = program.schedule.widths[-1] - self.d_out
            bias = (F.pad(bias, (0, spare)) if spare else bias).to(program.dtype).contiguous()
        slices = self.front(name, cut > 0)
        packed = Packed(slices, "forward", range(len(factors)), factors)
        apart = self.apart(slices, tokens, y.itemsize)
        for number in range(slices.count):
            table, ends = packed.slice(number), [x.data_ptr(), y.data_ptr() + number * apart]
            if bias is not None:
                table = [bias.data_ptr() + number * slices.end * bias.itemsize, *table]
            for part, more in ((range(cut), found), (range(cut, tokens), [])):
                if part:
                    run = slices.program.forward(bias is not None, bool(more))
                    held = kept_places(more, slices, number) if more else []
                    tables = [[*table, *held]] * self._threads(len(part))
                    _run(run, part, tokens, ends, tables, program.target)
        return y

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients that ``needs`` selects."""
        program, tokens, last = self._ready(x.dtype), x.shape[0 if self.rows else 1], len(factors)
        threads = self._threads(tokens)
        by_blas = x.dtype is not torch.float16  # whose products are slow there
        if by_blas and self._upright is not None and (program.pairs or (threads > 1 and self.sums_are_large(program))):
            return self._plain_backward(gy, x, factors, needs, kept)
        x, gy, factors = x.contiguous(), gy.contiguous(), [factor.contiguous() for factor in factors]
        slices = self.back(NAMES[x.dtype], threads)
        if kept and slices.states is None:  # with another number of threads these were not to be read in slices
            slices = whole(program)
        gx = advised(torch.empty(x.shape, dtype=x.dtype, device="cpu")) if needs[0] else None
        *needs, for_bias = needs
        wanted = [k for k in range(last) if needs[k + 1]]
        # Each slice reads the whole of gy, whose sum is in the way of none of them.
        inside_bias = for_bias and self.rows and slices.count == 1
        sums = Sums(slices, wanted, self.shapes, x.dtype, [self.d_out] * inside_bias, threads)
        ways = self._back_ways(slices, (*needs, inside_bias), tokens, factors, kept)
        apart = self.apart(slices, tokens, x.itemsize)
        for number in range(slices.count):
            moved, grads = number * apart, sums.slice(number)
            ends, first = [x.data_ptr() + moved, gy.data_ptr()], [] if gx is None else [gx.data_ptr() + moved]
            for part, run, packed, more in ways:
                table, rest = [*first, *packed.slice(number)], more(number)
                tables = [[*table, *mine, *rest] for mine in grads[: self._threads(len(part))]]
                _run(run, part, tokens, ends, tables, slices.program.target)
                del packed, more
            if number + 1 == slices.count:
                ways.clear()  # gradients may take the memory of what these hold
            sums.finish(number)
        found: list[Tensor | None] = [gx, *([None] * last), None]
        for k, gradient in zip(wanted, sums.found, strict=True):
            found[k + 1] = gradient
        if inside_bias:
            found[-1] = sums.more[0].to(x.dtype)
        elif for_bias:
            found[-1] = gy.sum(0 if self.rows else 1)
        return tuple(found)

    def _plain_backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients of plain matrices by the BLAS, which is faster for them.

        This applies in bfloat16, and to large matrices if each of several threads would need its own sums.
        """
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

    def _back_ways(
        self, slices: Slices, needs: tuple[bool, ...], tokens: int, factors: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> list[_Way]:
        """Return how to run the pass for tokens with and without stored activations."""
        last = len(factors)
        wanted = [k for k in range(last) if needs[k + 1]]
        cut = kept[0].numel() // slices.program.kept_rows[1] if kept else 0
        back = Packed(slices, "back", range(0 if needs[0] else min(wanted) + 1, last), factors)
        ways: list[_Way] = []
        for part, held in ((range(cut), kept), (range(cut, tokens), None)):
            if not part:
                continue
            run = slices.program.backward(needs, held is not None, self._threads(len(part)) > 1)
            if held is None:
                more = Packed(slices, "forward", range(max(wanted, default=0)), factors).slice
            else:
                more = partial(kept_places, held, slices)
            ways.append((part, run, back, more))
        return ways

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


def _run(
    run: Pass, part: range, tokens: int, ends: Sequence[int], tables: Sequence[Sequence[int]], target: Target
) -> None:  # fmt: skip
    """Run a part of the tokens, divided among as many threads as there are tables of addresses."""
    each = -(-run.scratch // LINE) * LINE
    scratch = torch.empty(len(tables) * each + LINE, dtype=torch.uint8, device="cpu")
    first = -(-scratch.data_ptr() // LINE) * LINE  # vectors that start at the end of a cache line are slow
    tables = [[*ends, first + k * each, *table] for k, table in enumerate(tables)]
    run_shares(run.run, tables, cuts(part, run.block, len(tables)), tokens, target)
