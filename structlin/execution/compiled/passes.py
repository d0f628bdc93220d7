"""The compiled passes of a chain for torch, which runs their plans (:mod:`._plans`) in its threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._parse import Step
from structlin.execution._memory import advised
from structlin.execution.compiled._plans import Call, Plan, Plans
from structlin.execution.compiled._rules import ChainRules
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._team import run_shares

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class FusedChain(ChainRules):
    """The two passes; see :class:`structlin.execution.torch_cpu.Passes`."""

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool,
        **which: Any,
    ) -> None:  # fmt: skip
        super().__init__(steps, sizes, d_in, d_out, rows, **which)
        # Of plain matrices whether each is (free, contracted), or else the other way round; None of others.
        self._upright = _upright(steps, sizes, d_in, d_out) if rows and self.plain else None
        self._plans = Plans()
        self.failed = False  # the compiler did not compile a pass: no other is tried

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether the chain can be compiled for this dtype, and the compiler has not failed."""
        return not self.failed and dtype in NAMES and self.program(NAMES[dtype]) is not None

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Compute the product, and append to ``kept`` the activations that the backward pass reads."""
        name, tokens, threads = NAMES[x.dtype], x.shape[0 if self.rows else 1], torch.get_num_threads()
        cut = 0 if kept is None else self.kept_tokens(name, tokens, self.shares(tokens, threads))
        operands = [x.contiguous(), *(factor.contiguous() for factor in factors)]
        if bias is not None:
            program = self.given(name)
            spare = program.schedule.widths[-1] - self.d_out
            operands.append((F.pad(bias, (0, spare)) if spare else bias).to(program.dtype).contiguous())
        y, *found = run(self._plan(Call(self, name, tokens, threads, cut, bias is not None)), operands)
        if kept is not None:
            kept += found
        return y

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients that ``needs`` selects."""
        name, tokens, threads = NAMES[x.dtype], x.shape[0 if self.rows else 1], torch.get_num_threads()
        program = self.given(name)
        by_blas = x.dtype is not torch.float16 and self._upright is not None  # whose products are slow in float16
        several = self.shares(tokens, threads) > 1
        if by_blas and (program.pairs or (several and self.sums_are_large(program))):
            return self._plain_backward(gy, x, factors, needs, kept)
        *needs, for_bias = needs
        cut = kept[0].numel() // program.schedule.rows[1] if kept else 0
        call = Call(self, name, tokens, threads, cut, needs=(*needs, False))
        if inside := for_bias and self.rows and call.back().count == 1:
            call = replace(call, needs=(*needs, True))
        operands = [gy.contiguous(), x.contiguous(), *(factor.contiguous() for factor in factors), *kept]
        found = iter(run(self._plan(call), operands))
        gradients = [next(found) if need else None for need in needs]
        if not for_bias:
            return *gradients, None
        return *gradients, next(found).to(x.dtype) if inside else gy.sum(0 if self.rows else 1)

    def _plan(self, call: Call) -> Plan:
        return self._plans.get(tuple(value for name, value in vars(call).items() if name != "chain"), call.plan)

    def _plain_backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients of plain matrices by the BLAS, which is faster for them.

        This applies in bfloat16, and to large matrices if each of several threads would need its own sums.
        """
        program, tokens, (for_x, *for_factors, for_bias) = self.given(NAMES[x.dtype]), x.shape[0], needs
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


def run(plan: Plan, operands: Sequence[Tensor]) -> list[Tensor]:
    """Run a plan, and return its results; memory is held only by the stages that use it."""
    arrays, places, kinds = dict(enumerate(operands)), [t.data_ptr() for t in operands], plan.results
    starts = dict(enumerate(places))

    def make(array: int) -> None:
        if array < 0:  # from the start of a cache line: vectors that start at the end of one are slow
            made = torch.empty(plan.bytes[array] + LINE, dtype=torch.uint8, device="cpu")
        else:
            shape, dtype = kinds[array - len(operands)]
            made = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        arrays[array] = advised(made)
        starts[array] = -(-made.data_ptr() // LINE) * LINE if array < 0 else made.data_ptr()

    for (function, tables, shares, total), (first, last) in zip(plan.stages, plan.lives, strict=True):
        for array in first:
            make(array)
        run_shares(function, [[starts[k] + at for k, at in table] for table in tables], shares, total, plan.target)
        for array in last:
            if array < 0:
                del arrays[array]
    results = range(len(operands), len(operands) + len(kinds))
    for array in results:
        if array not in arrays:  # there are no tokens
            make(array)
    return [arrays[array] for array in results]
