"""The programs of a chain, the division of its tokens among threads, and what is stored for the backward pass."""

from __future__ import annotations

import math
from typing import Any

from structlin._parse import Step
from structlin.execution._kept import once
from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._program import ELEMENTS, Program, make_program
from structlin.execution.compiled._slices import LARGER, RUN, Slices, counts, enough, slices, whole
from structlin.execution.compiled._target import CompileError, host, tiled_host
from structlin.execution.machine import caches

# Activations are stored for the backward pass if computing one again takes more than KEPT_WORK vector multiplications,
# and only for at least KEPT_SHARE of the tokens. If they do not fit into cache, computing a byte again must take more
# than FRESH_WORK.
KEPT_WORK, FRESH_WORK, KEPT_SHARE = 3, 3, 0.125
# Relative to the memory of a dense matrix and its gradient: how much larger passes may be if they store the activations
# of all tokens, and how much larger they must be without activations to store them anyway.
MORE, MISSED = 0.1, 0.05
SHARE, COPIED_SHARE = 48, 1 << 15  # tokens of a thread, and numbers that it copies, at least
SHARE_MACS = 1 << 19  # of a thread, at least, where tokens are few: about as long as a team takes to start, 10 us
FEW_SLICES = 4  # or with RUN neighbours each: more to save memory would take more time than they are worth
NEAR_LARGER = 4  # times near_slice(): products of narrow slices lose more than the second level of cache gains
WASTE = 12  # times the instructions that products without losses would take: more is slower than what others do


class ChainRules:
    """The rules of one chain, for row-major or column-major activations; dtypes are given by name.

    ``block``: tokens of a block; None: as many as the caches suggest. ``tiles``: only programs that use tiles.
    ``near``: slices whose factors, or sums, have about the size of the second level of cache.
    """

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool,
        block: int | None = None, tiles: bool = False, near: bool = False,
    ) -> None:  # fmt: skip
        self.parts, self.rows, self.d_in, self.d_out = (steps, sizes, d_in, d_out, rows), rows, d_in, d_out
        size = dict(sizes)
        self.shapes = [tuple(size[a] for a in step.factor) for step in steps]
        macs = [math.prod(size[a] for a in set(step.input + step.factor)) for step in steps]
        self.macs, self.macs_before_last = sum(macs), sum(macs[:-1])
        self.numel = sum(map(math.prod, self.shapes))
        self.plain = not any(step.batch or step.carried for step in steps)
        self.block, self.tiles, self.near = block, tiles, near
        self.made: dict[tuple[object, ...], Any] = {}  # by the methods below that are called once for their arguments

    @once
    def program(self, dtype: str, packed: bool = True) -> Program | None:
        """Return the program, or None if this way should not run the chain; ``packed``: as in :func:`make_program`."""
        target = tiled_host() if self.tiles else host()
        if target is None or dtype not in ELEMENTS:
            return None
        found = make_program(*self.parts, dtype, target, None, packed, self.block)
        if found is None or (self.tiles and not found.uses_tiles):
            return None
        wasted = found.schedule.cost + found.schedule.back_cost > 3 * WASTE * self.macs / found.lanes
        return None if packed and wasted else found

    def given(self, dtype: str) -> Program:
        """Return the program of a dtype; raise CompileError if this processor has none."""
        found = self.program(dtype)
        if found is None:
            raise CompileError(f"this processor has no passes for the chain in {dtype}")
        return found

    @property
    def team_macs(self) -> int:
        """The MACs per token by which :meth:`shares` divides few tokens."""
        return self.macs

    def shares(self, tokens: int, threads: int) -> int:
        """Return the number of threads among which to divide the tokens."""
        return shares(tokens, threads, self.team_macs)

    def kept_sizes(self, dtype: str, kept: int) -> list[int]:
        """Return the numbers of the activations between the steps that are stored for so many tokens, in order."""
        return [kept * row for row in self.given(dtype).schedule.rows[1:-1]] if kept else []

    @once
    def front(self, dtype: str, keeps: bool) -> Slices:
        """Return how to run the forward pass, which may be one that ``keeps`` activations."""
        program = self.given(dtype)
        item = BYTES[program.outside]
        most, each = (near_slice(),) * 2 if self.near else (limits().factors, limits().factors_slice)
        if program.numel * item <= most:
            return whole(program)
        several, larger = counts(self.parts, program, False), NEAR_LARGER if self.near else LARGER
        return slices(self.parts, program, False, enough(several, program.numel, each // item, larger), keeps)

    def sums_are_large(self, program: Program) -> bool:
        """Whether the sums of gradients do not stay in cache well."""
        return program.numel * BYTES[program.inside] > limits().sums_slice

    @once
    def back(self, dtype: str, threads: int) -> Slices:
        """Return how to run the backward pass, in which each thread has its own sums."""
        program = self.given(dtype)
        several, item = counts(self.parts, program, True), BYTES[program.inside]
        most, larger = (near_slice(), NEAR_LARGER) if self.near else (limits().sums_slice, LARGER)
        least = enough(several, program.numel, most // item, larger)
        found = slices(self.parts, program, True, least)
        if program.numel * item < limits().room or self.room(found.program, threads, False) >= 0:
            return found
        for count in several:
            if least < count <= max(FEW_SLICES, several[-1] // RUN):
                smaller = slices(self.parts, program, True, count)
                if self.room(smaller.program, threads, False) >= 0:
                    return smaller
        return found

    def apart(self, slices: Slices, tokens: int, item: int) -> int:
        """Return the bytes from one slice of the input, or of the output, to the next; ``item``: of a number."""
        return slices.end * (1 if self.rows else tokens) * item

    def kept_tokens(self, dtype: str, tokens: int, threads: int) -> int:
        """Return the number of tokens whose activations between the steps to store for the backward pass.

        The others are computed again. The memory of the passes should not exceed that of the dense matrix and its
        gradient, or only slightly if nothing is computed again. If the passes without activations already need clearly
        more, as much as x or y is stored.
        """
        program, back = self.given(dtype), self.back(dtype, threads)
        if back.states is None:
            return 0
        row, item = sum(program.schedule.rows[1:-1]), BYTES[program.outside]
        size = row * item
        work = self.macs_before_last / (program.lanes * (2 if program.pairs else 1))
        if work < KEPT_WORK * row or (tokens * size > limits().kept and work < FRESH_WORK * size):
            return 0
        dense = 2 * self.d_in * self.d_out * item
        if tokens * size <= self.room(back.program, threads, True) + MORE * dense:
            return tokens
        room = self.room(back.program, threads, False)
        if room < -MISSED * dense:
            return tokens if row <= 1.1 * min(self.d_in, self.d_out) else 0
        found = max(0, room) // size // SHARE * SHARE
        return found if found >= KEPT_SHARE * tokens else 0

    def room(self, program: Program, threads: int, kept: bool) -> int:
        """Return the bytes of the dense matrix and its gradient, less those of the passes with this backward pass.

        Without the activations between the steps, which are ``kept`` or in part computed again.
        """
        dense, own = (2 * n * BYTES[program.outside] for n in (self.d_in * self.d_out, self.numel))
        return dense - own - program.work_bytes(threads, kept)


def near_slice() -> int:
    """Return the bytes of the factors or sums of a slice that fit into the second level of cache with a block."""
    return caches().l2 // 2


def shares(tokens: int, threads: int, macs: int = 0) -> int:
    """Return the number of threads among which to divide the tokens, given the MACs per token if they are known."""
    least = max(1, min(SHARE, math.ceil(SHARE_MACS / macs))) if macs else SHARE
    return max(1, min(threads, tokens // least))


def copy_shares(numbers: int, threads: int) -> int:
    """Return the number of threads among which to divide copies of this many numbers."""
    return max(1, min(threads, numbers // COPIED_SHARE))


def cuts(part: range, block: int, count: int) -> list[int]:
    """Return the starts of ``count`` shares of a part of the tokens, in whole blocks, and the end of the last."""
    if count == 1:
        return [part.start, part.stop]
    block = min(block, math.ceil(len(part) / count))
    blocks = math.ceil(len(part) / block)
    return [min(part.stop, part.start + blocks * k // count * block) for k in range(count + 1)]
