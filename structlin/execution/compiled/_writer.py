"""The frame of a pass: the arrays of its table and of scratch memory, and its blocks of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from structlin.execution.compiled import _tiles as tiles
from structlin.execution.compiled._ahead import Ahead
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._forms import Array, Forms, Key
from structlin.execution.compiled._ir import Code, Int
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._schedule import LINE, Operation
from structlin.execution.compiled._target import load
from structlin.execution.compiled._tiles import BUFFER, write_product

if TYPE_CHECKING:
    from structlin.execution.compiled._program import Program

NONE: Mapping[Any, Any] = MappingProxyType({})
At = Callable[[Array], Memory]  # where a block's part of an array starts


@dataclass(frozen=True)
class Pass:
    """``run(table, first, last, total)`` for tokens ``first`` to ``last`` of all; ``scratch``: bytes that it needs.

    Of a program that is not ``packed``: ``run(table)``, with the number of tokens as the last entry of the table.
    """

    run: Callable[..., None]
    scratch: int
    block: int


class Writer:
    """The frame of a pass: reads the table, and runs ``body`` for each block of tokens."""

    def __init__(self, program: Program, block: int) -> None:
        self.program, self.code, self.places, self.block, self.bytes = program, Code(), 0, block, 0
        self.pointer = ""
        self.buffer: str | None = None  # for sums of tiles
        self._made: list[Array] = []  # copies of activations, which hold for the rest of a block

    def _next(self) -> str:
        pointer = self.code.at("ptr", "%table", self.places)
        self.places += 1
        return self.code.value(f"load ptr, ptr {pointer}")

    def rows(self, element: str, row: int) -> Array:
        return Array(self._next(), element, row)

    def end(self, stride: int) -> Array:
        """Return the input, the output, or the gradient of one, with ``stride`` numbers from row to row."""
        return self.rows(self.program.outside, stride if self.program.rows else 1)

    def whole(self, element: str) -> Array:
        return Array(self._next(), element, 0)

    def factor(self, operation: Operation) -> Array:
        return self.whole(self.program.element(operation))

    def scratch(self, forms: Forms, outside: Sequence[Key]) -> dict[Key, Array]:
        """Return the arrays of a pass in scratch memory, whose address is next in the table."""
        self.enter()
        return self.arrays(forms, outside)

    def enter(self) -> None:
        """Take the next address of the table for that of scratch memory."""
        self.pointer = self._next()
        if self.program.tiles:
            self.buffer = self.code.at("i8", self.pointer, self.bytes)
            self.bytes += BUFFER

    def arrays(self, forms: Forms, outside: Sequence[Key], given: Mapping[Key, Array] = NONE) -> dict[Key, Array]:
        """Return the arrays of one chain in scratch memory, except for ``given``."""
        places, size = forms.places([*outside, *given])
        found = {
            key: Array(self.code.at("i8", self.pointer, self.bytes + place * self.block), forms.elements[key[2]], 0,
                       key[2] == "zipped")
            for key, place in places.items()
        }  # fmt: skip
        self.bytes += size * self.block
        return dict(given) | found

    def take(self, row: int, element: str, zipped: bool = False) -> Array:
        """Reserve scratch memory for this many numbers of each token."""
        array = Array(self.code.at("i8", self.pointer, self.bytes), element, 0, zipped)
        self.bytes += -(-row * self.block * BYTES[element] // LINE) * LINE
        return array

    def source(
        self, emitter: Emitter, at: At, forms: Forms, arrays: Mapping[Key, Array],
        operation: Operation, kind: str, number: int, tokens: Int | None = None,
    ) -> Memory:  # fmt: skip
        """Return the activation that an operation reads, or its copy, which is made here unless it was before.

        ``tokens``: how many to copy.
        """
        found = at(forms.one(arrays, kind, number, operation.reads))
        if operation.turn is None:
            return found
        array = forms.one(arrays, f"turned {kind}", number, operation.copied)
        copy = at(array)
        if not any(array is made for made in self._made):
            self._made.append(array)
            count = emitter.tokens if tokens is None else tokens
            operation.turn.write(emitter, found, forms.rows[number], copy, count)
        return copy

    def multiply(
        self, emitter: Emitter, operation: Operation, out: Sequence[Memory], source: Memory, factor: Memory,
        bias: Memory | None = None, tokens: Int | None = None,
    ) -> None:  # fmt: skip
        write_product(
            emitter, operation.product, out, source, factor,
            bias=bias, tokens=tokens, zipped=operation.zips, buffer=self.buffer,
        )  # fmt: skip

    def compile(
        self, body: Callable[[Emitter, Callable[[Array], Memory]], None], inputs: Sequence[Array] = (),
        outputs: Sequence[Array] = (), operations: Sequence[Operation] = (),
    ) -> Pass:  # fmt: skip
        """Write the pass whose blocks are ``body``.

        Its ``operations`` prefetch the ``inputs`` and ``outputs`` of the next block.
        """
        code, program = self.code, self.program
        parameters, counts = "ptr %table", [ctypes.c_int64] * 3
        start: Int = "%first"
        stop: Int = "%last"
        if program.packed:
            parameters += ", i64 %first, i64 %last, i64 %total"
        else:  # ctypes takes a quarter of a microsecond for each argument
            start, stop, counts = 0, code.value(f"load i64, ptr {code.at('ptr', '%table', self.places)}"), []
        tiles_of_block = sum(one.tiles(program.target, program.inside, self.block) for one in operations)
        arrays = [*inputs, *outputs]
        ahead = Ahead(code, arrays, len(outputs), self.block, tiles_of_block) if arrays and tiles_of_block else None

        def block(first: Int, _: list[str]) -> None:
            count = code.least(code.subtract(stop, first), self.block)
            emitter = Emitter(code, program.target, program.inside, count, self.block)
            if ahead is not None:
                ahead.start(first)
                emitter.ahead = ahead.ask

            def at(array: Array) -> Memory:
                offset = code.multiply(first, array.row)
                return Memory(code.at(array.element, array.pointer, offset), array.element, array.zipped)

            body(emitter, at)

        code.loop(start, stop, self.block, block)
        if program.tiles:
            tiles.release(code)
        target = program.target
        text = code.function("chain", parameters, target.attributes)
        run = load(text, "chain", target, [ctypes.c_void_p, *counts])
        return Pass(run, self.bytes, self.block)
