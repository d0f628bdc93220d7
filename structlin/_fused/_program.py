"""The two passes over a chain as functions in machine code.

Both take a table of addresses and the range of tokens to run. They go through it in blocks of a few tokens: for each
block the input is copied to scratch memory (and converted, and padded with zeros), every step runs, and the last one
writes the output where it belongs. The backward pass adds to the gradients of the factors, which start at zero.

``tables`` says what each place of the table holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from structlin._fused._ir import Code
from structlin._fused._product import BYTES, Emitter, Memory
from structlin._fused._schedule import Schedule, make_schedule
from structlin._fused._target import Target, load
from structlin._parse import Step

ELEMENTS = {"float32": ("float", "float"), "float64": ("double", "double"), "bfloat16": ("bfloat", "float")}
CACHE = 256 << 10  # bytes of scratch memory that a block of tokens should stay within
BLOCKS = (12, 24, 36, 48, 72)  # all tiles divide them without a remainder, or nearly so
BACK_BLOCKS = (36, 48, 72)  # the gradients of factors are read and written once for each block


@dataclass(frozen=True)
class Pass:
    """``run(table, first, last)`` for tokens ``first`` to ``last``; ``scratch``: bytes that it needs."""

    run: Callable[..., None]
    scratch: int
    block: int


class Program:
    """The passes of a chain in one dtype; they are compiled when they are first asked for.

    ``d_in`` and ``d_out`` are the sizes of rows of the input and of the output, which is padded or cut to the chain's.
    """

    def __init__(self, schedule: Schedule, target: Target, dtype: str, d_in: int, d_out: int) -> None:
        self.schedule, self.target, self.d_in, self.d_out = schedule, target, d_in, d_out
        self.outside, self.inside = ELEMENTS[dtype]
        self.size = BYTES[self.inside]
        self.lanes = target.width // self.size  # numbers in a vector
        self.forward = lru_cache(maxsize=None)(self._forward)
        self.backward = lru_cache(maxsize=None)(self._backward)

    @property
    def dtype(self) -> Any:
        """Of factors, bias, gradients of factors and kept activations."""
        import torch

        return torch.float64 if self.inside == "double" else torch.float32

    def _block(self, numbers: int, blocks: Sequence[int]) -> int:
        """Tokens of a block, for which ``numbers`` are in scratch memory each."""
        return max((b for b in blocks if b * numbers * self.size <= CACHE), default=blocks[0])

    def _forward(self, bias: bool, kept: bool) -> Pass:
        """Table: x, y, scratch, bias (if any), factors, and where ``kept`` the activations between steps."""
        schedule, last = self.schedule, len(self.schedule.forward)
        cut = self.d_out < schedule.widths[-1]
        inner = range(1, last)
        held = [0, *(() if kept else inner), *((last,) if cut else ())]  # activations in scratch memory
        block = self._block(sum(schedule.rows[k] for k in held), BLOCKS)
        writer = _Writer(self, block)
        x, y = writer.rows("x", self.outside, self.d_in), writer.rows("y", self.outside, self.d_out)
        scratch = writer.scratch({k: schedule.rows[k] for k in held})
        added = writer.whole("bias", self.inside) if bias else None
        factors = [writer.whole(f"factor{k}", self.inside) for k in range(last)]
        outside = {k: writer.rows(f"kept{k}", self.inside, schedule.rows[k]) for k in inner} if kept else {}

        def body(emitter: Emitter, at: Callable[[_Array], Memory]) -> None:
            emitter.copy(at(x), self.d_in, at(scratch[0]), schedule.rows[0], self.d_in, schedule.widths[0])
            places = {**scratch, **outside}
            for k, operation in enumerate(schedule.forward):
                to = at(places.get(k + 1, y))
                fused = at(added) if added is not None and k == last - 1 else None
                emitter.product(operation.product, to, at(places[k]), at(factors[k]), bias=fused)
            if cut:
                emitter.copy(at(scratch[last]), schedule.rows[last], at(y), self.d_out, self.d_out, self.d_out)

        return writer.compile(body)

    def _backward(self, needs: tuple[bool, ...], kept: bool) -> Pass:
        """Table: x, gy, scratch, gx (if needed), factors for this pass, gradients of factors, and the activations.

        Where these are not ``kept``, it holds the factors for the forward pass in their stead. ``needs``: x first.
        """
        schedule, last = self.schedule, len(self.schedule.forward)
        wanted = [k for k in range(last) if needs[k + 1]]
        lowest = 0 if needs[0] else min(wanted)  # the first step whose gradient passes
        read = [k for k in wanted if k]  # activations that are needed
        again = range(1, max(read, default=0) + 1) if not kept else range(0)
        cut = self.d_in < schedule.widths[0]
        flows = [k for k in range(lowest, last) if k > lowest or (k == 0 and needs[0] and cut)]
        rows = schedule.rows
        sizes = {("state", 0): rows[0]} if needs[1] or again else {}
        sizes |= (
            {("state", k): rows[k] for k in again}
            | {("flow", last): rows[last]}
            | {("flow", k): rows[k] for k in flows}
        )
        block = self._block(sum(sizes.values()), BACK_BLOCKS)
        writer = _Writer(self, block)
        x, gy = writer.rows("x", self.outside, self.d_in), writer.rows("gy", self.outside, self.d_out)
        scratch = writer.scratch(sizes)
        gx = writer.rows("gx", self.outside, self.d_in) if needs[0] else None
        back = {k: writer.whole(f"back{k}", self.inside) for k in range(lowest, last) if k > lowest or needs[0]}
        grads = {k: writer.whole(f"gradient{k}", self.inside) for k in wanted}
        if kept:
            outside = {k: writer.rows(f"kept{k}", self.inside, rows[k]) for k in range(1, last)}
        else:
            outside = {}
            factors = {k: writer.whole(f"factor{k}", self.inside) for k in range(len(again))}

        def body(emitter: Emitter, at: Callable[[_Array], Memory]) -> None:
            def state(k: int) -> Memory:
                return at(outside[k] if k in outside else scratch["state", k])

            if ("state", 0) in scratch:
                emitter.copy(at(x), self.d_in, state(0), rows[0], self.d_in, schedule.widths[0])
            for k in again:
                emitter.product(schedule.forward[k - 1].product, state(k), state(k - 1), at(factors[k - 1]))
            emitter.copy(at(gy), self.d_out, at(scratch["flow", last]), rows[last], self.d_out, schedule.widths[-1])
            for k in range(last - 1, lowest - 1, -1):
                flow = at(scratch["flow", k + 1])
                if k in grads:
                    emitter.product(schedule.gradients[k].product, at(grads[k]), flow, state(k), add=True)
                if k in back:
                    direct = k == 0 and not cut
                    to = at(gx) if direct and gx is not None else at(scratch["flow", k])
                    emitter.product(schedule.back[k].product, to, flow, at(back[k]))
            if gx is not None and cut:
                emitter.copy(at(scratch["flow", 0]), rows[0], at(gx), self.d_in, self.d_in, self.d_in)

        return writer.compile(body)


@dataclass(frozen=True)
class _Array:
    """Of the table: ``row`` numbers for each token, 0 for what is no row of each token."""

    pointer: str
    element: str
    row: int
    offset: int = 0


class _Writer:
    """The frame of a pass: reads the table, and runs ``body`` for each block of tokens."""

    def __init__(self, program: Program, block: int) -> None:
        self.program, self.block, self.code, self.places = program, block, Code(), 0
        self.bytes = 0

    def _next(self) -> str:
        pointer = self.code.at("ptr", "%table", self.places)
        self.places += 1
        return self.code.value(f"load ptr, ptr {pointer}")

    def rows(self, name: str, element: str, row: int) -> _Array:
        return _Array(self._next(), element, row)

    def whole(self, name: str, element: str) -> _Array:
        return _Array(self._next(), element, 0)

    def scratch(self, rows: dict) -> dict:
        pointer, element, found, place = self._next(), self.program.inside, {}, 0
        for key, row in rows.items():
            found[key] = _Array(self.code.at(element, pointer, place), element, 0)
            place += row * self.block
        self.bytes = place * self.program.size
        return found

    def compile(self, body: Callable[[Emitter, Callable[[_Array], Memory]], None]) -> Pass:
        code = self.code

        def block(first: int | str, _: list[str]) -> None:
            count = code.least(code.subtract("%last", first), self.block)
            emitter = Emitter(code, self.program.target, self.program.inside, count, self.block)

            def at(array: _Array) -> Memory:
                offset = code.multiply(first, array.row)
                return Memory(code.at(array.element, array.pointer, offset), array.element)

            body(emitter, at)

        code.loop("%first", "%last", self.block, block)
        target = self.program.target
        text = code.function("chain", "ptr %table, i64 %first, i64 %last", target.attributes)
        run = load(text, "chain", target, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64])
        return Pass(run, self.bytes, self.block)


@lru_cache(maxsize=512)
def make_program(
    steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, dtype: str, target: Target
) -> Program | None:
    """None where the chain has no schedule."""
    schedule = make_schedule(steps, dict(sizes), target, ELEMENTS[dtype][1], d_in, d_out)
    return None if schedule is None else Program(schedule, target, dtype, d_in, d_out)
