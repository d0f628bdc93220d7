"""Which chains are compiled and for which inputs, and what of a forward pass is kept for the backward one."""

from __future__ import annotations

import math

from structlin._parse import Step
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._program import ELEMENTS, FAR_BYTES, Program, make_program
from structlin.execution.compiled._slices import RUN, Slices, counts, enough, slices, whole
from structlin.execution.compiled._target import host

# The calls cost more than they save for so few numbers in the widest activation. Copies of the factors do if there are
# fewer than one for each COPIED of their numbers, or COPIED_FAR of factors with more than NEAR_NUMBERS; with gradients
# to come, which others copy too, COPIED_TWICE. Plain matrices of few tokens the BLAS multiplies as fast, and with few
# registers those of many too.
FEW, PLAIN_TOKENS, PLAIN_REGISTERS = 1 << 9, 256, 32
COPIED, COPIED_FAR, COPIED_TWICE, NEAR_NUMBERS = 32, 8, 128, 1 << 18
# Activations are kept for the backward pass if to compute one again takes more than KEPT_WORK multiplications of
# vectors, and of at least KEPT_SHARE of the tokens. If they have more than KEPT_BYTES they come from fresh pages of
# memory, which is worth it if to compute a byte again takes more than FRESH_WORK.
KEPT_BYTES, KEPT_WORK, FRESH_WORK, KEPT_SHARE = 16 << 20, 3, 3, 0.125
# Of a dense matrix and its gradient: by how much passes may be larger if they keep the activations of all tokens, and
# by how much they have to be larger even without, to keep them anyway.
MORE, MISSED = 0.1, 0.05
# Numbers, from which on the BLAS multiplies blocks faster than what is compiled with so many registers at least: in one
# thread, and in several, of which each has sums of gradients of its own.
LARGE_BLOCKS = {32: (1 << 21, 1 << 19), 0: (1 << 18, 1 << 18)}
SHARE, COPIED_SHARE = 48, 1 << 15  # tokens of a thread, and numbers that it copies, at least
# Bytes of the sums of gradients, and of the factors of a forward pass: more are sliced, if they can be.
SLICE_BYTES, FRONT_SLICE_BYTES = 15 << 18, 9 << 20
# Bytes of the sums of gradients, from which on slices are made so small that there is room for them: FEW_SLICES at
# most, or with RUN neighbours each.
ROOM_BYTES, FEW_SLICES = 1 << 20, 4
WASTE = 12  # times the instructions that products without losses would take: more is slower than what others do


class ChainRules:
    """Of one chain, for row-major activations or column-major ones; dtypes are given by name."""

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
        self._block = min(math.prod(size[a] for a in step.free + step.contracted) for step in steps)
        self._programs: dict[str, Program | None] = {}
        self._fronts: dict[tuple[str, bool], Slices] = {}
        self._backs: dict[tuple[str, int], Slices] = {}

    @property
    def registers(self) -> int:
        """For vectors, of the processor that is compiled for; 0 where nothing is."""
        target = host()
        return 0 if target is None else target.registers

    def large_blocks(self, threads: int) -> bool:
        """Whether the BLAS multiplies the blocks faster."""
        alone, several = next(n for registers, n in LARGE_BLOCKS.items() if self.registers >= registers)
        return self._block >= (alone if threads == 1 else several)

    def program(self, dtype: str) -> Program | None:
        """None where the chain is not to be run this way."""
        if dtype not in self._programs:
            target, found = host(), None
            if target is not None and dtype in ELEMENTS:
                found = make_program(*self._chain, dtype, target)
            if found is not None:
                lanes = found.lanes
                if found.schedule.cost + found.schedule.back_cost > 3 * WASTE * self.macs / lanes:
                    found = None
            self._programs[dtype] = found
        return self._programs[dtype]

    def front(self, dtype: str, keeps: bool) -> Slices:
        """How to run the forward pass, which may be one that ``keeps`` activations."""
        found = self._fronts.get((dtype, keeps))
        if found is None:
            target, program = host(), self.program(dtype)
            assert target is not None
            assert program is not None
            found, item = whole(program), BYTES[program.outside]
            if program.numel * item > FAR_BYTES:
                count = enough(counts(self._chain, program, False), program.numel, FRONT_SLICE_BYTES // item)
                found = slices(self._chain, program, False, count, dtype, target, keeps)
            self._fronts[dtype, keeps] = found
        return found

    def back(self, dtype: str, threads: int) -> Slices:
        """How to run the backward pass, in which each thread has sums of its own."""
        found = self._backs.get((dtype, threads))
        if found is None:
            found = self._backs[dtype, threads] = self._back(dtype, threads)
        return found

    def sums_are_large(self, program: Program) -> bool:
        """Whether the sums of gradients do not stay in cache well."""
        return program.numel * BYTES[program.inside] > SLICE_BYTES

    def _back(self, dtype: str, threads: int) -> Slices:
        target, program = host(), self.program(dtype)
        assert target is not None
        assert program is not None
        several, item = counts(self._chain, program, True), BYTES[program.inside]
        least = enough(several, program.numel, SLICE_BYTES // item)
        found = slices(self._chain, program, True, least, dtype, target)
        if program.numel * item < ROOM_BYTES or self.room(found.program, threads, False) >= 0:
            return found
        for count in several:
            if least < count <= max(FEW_SLICES, several[-1] // RUN):
                smaller = slices(self._chain, program, True, count, dtype, target)
                if self.room(smaller.program, threads, False) >= 0:
                    return smaller
        return found

    def apart(self, slices: Slices, tokens: int, item: int) -> int:
        """Bytes from one slice of the input, or of the output, to the next; ``item``: of a number."""
        return slices.end * (1 if self.rows else tokens) * item

    def pays(self, tokens: int, gradients: bool) -> bool:
        """Whether there is enough to do for so many tokens; ``gradients``: the backward pass is to come."""
        numbers = tokens * self.widest
        if numbers < FEW or (self.plain and (tokens < PLAIN_TOKENS or self.registers < PLAIN_REGISTERS)):
            return False
        copied = COPIED_TWICE if gradients else COPIED if self.numel <= NEAR_NUMBERS else COPIED_FAR
        return copied * numbers >= self.numel

    def kept_tokens(self, dtype: str, tokens: int, threads: int) -> int:
        """Of how many tokens to keep the activations between the steps for the backward pass, if it pays.

        The others are computed again. All that the passes take is to be no more than the dense matrix and its gradient
        would, or little more if none has to be computed again. Where even the rest of it takes clearly more, as much as
        x or y is kept.
        """
        program, back = self.program(dtype), self.back(dtype, threads)
        assert program is not None
        if back.states is None:
            return 0
        row, item = sum(program.schedule.rows[1:-1]), BYTES[program.outside]
        size = row * item
        work = self.macs_before_last / (program.lanes * (2 if program.pairs else 1))
        if work < KEPT_WORK * row or (tokens * size > KEPT_BYTES and work < FRESH_WORK * size):
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
        """Bytes that the dense matrix and its gradient take, less those that the passes do with such a backward one.

        Without the activations between the steps, which are ``kept`` or in part computed again.
        """
        dense, own = (2 * n * BYTES[program.outside] for n in (self.d_in * self.d_out, self.numel))
        return dense - own - program.work_bytes(threads, kept)


def shares(tokens: int, threads: int) -> int:
    """Among how many of the threads to share the tokens."""
    return max(1, min(threads, tokens // SHARE))


def copy_shares(numbers: int, threads: int) -> int:
    """Among how many of the threads to share copies of so many numbers."""
    return max(1, min(threads, numbers // COPIED_SHARE))


def cuts(part: range, block: int, count: int) -> list[int]:
    """Where ``count`` shares of a part of the tokens start, which are whole blocks, with the end of the last."""
    if count == 1:
        return [part.start, part.stop]
    blocks = math.ceil(len(part) / block)
    return [min(part.stop, part.start + blocks * k // count * block) for k in range(count + 1)]
