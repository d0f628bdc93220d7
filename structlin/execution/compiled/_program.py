"""The two passes over a chain as functions in machine code.

Both take a table of addresses and a range of tokens, and process it in blocks of a few tokens. For each block the input
is copied to scratch memory (converted and padded with zeros), every step runs, and the last one writes to the output.
The backward pass adds to the gradients of the factors, which start at zero. Before a pass the factors are copied into
the orders of axes that its products read. After it, their gradients are copied back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from structlin._parse import Step
from structlin.execution._kept import once
from structlin.execution.compiled import _tiles as tiles
from structlin.execution.compiled._arrange import Arrangement, load_copies
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._forms import Array, Forms, Key
from structlin.execution.compiled._ir import Int
from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._product import BYTES, Axis
from structlin.execution.compiled._schedule import LINE, Operation, Schedule, make_schedule
from structlin.execution.compiled._schedule import row as row_of
from structlin.execution.compiled._target import Target
from structlin.execution.compiled._tiles import SIDE, write_product
from structlin.execution.compiled._writer import At, Pass, Writer

ELEMENTS = {
    **{"float32": ("float", "float"), "float64": ("double", "double")},
    **{"bfloat16": ("bfloat", "float"), "float16": ("half", "float")},
}
NAMES = {"float": "float32", "double": "float64", "bfloat": "bfloat16", "half": "float16"}  # of dtypes
# Tokens of a block: few enough that the activations stay in the second level of cache, and enough that reading the
# factors costs little. Tiles divide a block without remainder. They usually have 8 rows, and 12 or 6 for pairs of
# bfloat16 or with few registers.
BLOCKS, OTHER_BLOCKS, TILE_BLOCKS = (48, 32, 16), (48, 24), (64, 32)
# Of a block if not even the factors, or the sums of their gradients, stay in cache from one block to the next.
LARGE_BLOCKS, LARGE_TILE_BLOCKS = (144, 72), (128, 64)
COLUMN_BLOCK = 48  # whole cache lines of each number, and whole vectors


@dataclass(frozen=True)
class Packing:
    """Copies of factors for the products of a pass, or of gradients for the factors.

    ``sizes``: bytes of each copy, 0 of what is taken as it is, and ``starts`` where they are, if they follow each other
    in ``total`` bytes; ``numbers``: how many are copied. ``run(table, first, last, shares)``, with the table of
    originals and copies, makes the shares ``first`` to ``last``.
    """

    sizes: tuple[int, ...]
    numbers: int
    run: Callable[..., None]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        whole = (-(-size // LINE) * LINE for size in self.sizes)
        return tuple(accumulate(whole, initial=0))[:-1]

    @cached_property
    def total(self) -> int:
        return self.starts[-1] + self.sizes[-1] if any(self.sizes) else 0


@dataclass(frozen=True)
class Part:
    """The whole of which a chain is one of ``count`` slices, along the first axis of the input or of the output.

    ``shapes``: of the whole factors. ``between``: sizes of the whole axes, where the activations between steps are
    written as slices of whole ones, whose axes lie in the order of ``states``.
    """

    count: int
    of_input: bool
    shapes: tuple[tuple[int, ...], ...]
    between: tuple[tuple[str, int], ...] | None = None
    states: tuple[str, ...] = ()

    def strides(self, d_in: int, d_out: int) -> tuple[int, int]:
        """Return the row strides of the whole input and output, of which a slice has rows of ``d_in`` and ``d_out``."""
        return (d_in * self.count, d_out) if self.of_input else (d_in, d_out * self.count)


Enter = Callable[[int], None]


class Program:
    """The passes of a chain in one dtype; each is compiled at its first use.

    ``d_in`` and ``d_out`` are the sizes of rows of the input and of the output, which is padded or cut to the chain's.
    ``rows``: a token is a row of both, or else a column. ``shapes``: of the factors. Input or output, factors and kept
    activations may be slices of the whole ones, of which the chain is a ``part``.
    """

    def __init__(
        self, schedule: Schedule, target: Target, dtype: str, d_in: int, d_out: int, rows: bool,
        shapes: Sequence[tuple[int, ...]], part: Part | None = None, packed: bool = True, block: int | None = None,
        inner: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        self.schedule, self.target, self.d_in, self.d_out, self.rows = schedule, target, d_in, d_out, rows
        self.inner = inner
        self.name, (self.outside, self.inside) = dtype, ELEMENTS[dtype]
        self.shapes, self.part = tuple(shapes), part
        self.strides = part.strides(d_in, d_out) if part else (d_in, d_out)
        self.numel = sum(map(math.prod, shapes))
        self.size = BYTES[self.inside]
        self.lanes = target.width // self.size  # numbers in a vector
        self.packed = packed
        self.pairs = dtype == "bfloat16" and target.half_products and packed
        self.given = block
        self.tiles = self.pairs and target.tiles
        # Pairs of tokens are stored together, tiles take pairs too, and squares of vectors are transposed.
        unit = 2 * SIDE if self.tiles else 2 if rows else self.lanes
        # Fixed, whatever there is to hold in cache; 0: it depends on that.
        self._fixed = -(-(block or (0 if rows else COLUMN_BLOCK)) // unit) * unit
        self.made: dict[tuple[object, ...], Any] = {}  # by the methods below that are called once for their arguments

    @cached_property
    def uses_tiles(self) -> bool:
        """Whether any product runs by tiles."""
        operations = *self.schedule.forward, *self.schedule.back
        return any(operation.by_tiles(self.target, self.inside) for operation in operations) or any(
            map(self._gradient_by_tiles, range(len(self.shapes)))
        )

    @property
    def dtype(self) -> Any:
        """Dtype of factors, bias and gradients of factors."""
        import torch

        return getattr(torch, NAMES[self.inside])

    @once
    def packing(self, kind: str, numbers: tuple[int, ...]) -> Packing:
        """Return the copies of factors that the products ``kind`` read; of ``gradients``, the copies back."""
        sizes = tuple(self.copied(kind, k) for k in numbers)
        copies = [copy for copy in (self._copy(kind, k) for k in numbers) if copy is not None]
        moved = sum(math.prod(copy[0].shape) for copy in copies)
        run = load_copies(copies, self.target, self.inside) if copies else _nothing
        return Packing(sizes, moved, run)

    def _copy(self, kind: str, k: int) -> tuple[Arrangement, str, str] | None:
        """Return the argument of :func:`load_copies` for one array; None if it is used without a copy."""
        operation: Operation = getattr(self.schedule, kind)[k]
        back = kind == "gradients"
        whole = self.part.shapes[k] if self.part else None
        arrangement = Arrangement(self.shapes[k], operation.order, operation.in_pairs, back, whole)
        ends = self.outside, self.element(operation)
        if ends[0] == ends[1] and arrangement.trivial:
            return None
        return arrangement, *(reversed(ends) if back else ends)

    def element(self, operation: Operation) -> str:
        """Return the element type of the factor that an operation reads, or of the gradient that it writes."""
        if not self.packed:
            return self.outside
        return "i32" if operation.in_pairs else self.outside if operation.product.paired else self.inside

    def copied(self, kind: str, k: int) -> int:
        """Return the bytes of the copy of a factor or of its gradient, 0 if there is no copy."""
        copy = self._copy(kind, k)
        if copy is None:
            return 0
        # In pairs each element of 32 bits is two numbers.
        return math.prod(self.shapes[k]) * (BYTES["bfloat"] if copy[2] == "i32" else BYTES[copy[2]])

    @once
    def work_bytes(self, threads: int, kept: bool) -> int:
        """Return the peak of temporary memory of the backward pass, without activations and returned gradients.

        ``kept``: the activations between the steps are not computed again.
        """
        numbers = range(len(self.shapes))
        forms, outside = self._whole_back_forms(kept)
        block = self._back_block(True, forms.bytes(outside), threads > 1)
        scratch = threads * forms.places(outside)[1] * block
        packed = sum(self.copied("back", k) for k in numbers)
        if not kept:
            packed += sum(self.copied("forward", k) for k in numbers[:-1])
        sums, returned = self.numel * self.size, self.numel * BYTES[self.outside]
        if self.part:  # gradients of other slices are there, to which sums are copied or are added up in place
            direct = sum(math.prod(shape) for k, shape in enumerate(self.shapes) if not self.copied("gradients", k))
            return threads * sums - direct * self.size + packed + scratch
        unpacked = sum(self.copied("gradients", k) for k in numbers)
        return max(threads * sums + packed + scratch, sums + unpacked) - returned

    @cached_property
    def spills(self) -> bool:
        """Whether neither the gradients of factors nor enough tokens to compensate for them fit into cache.

        False in 16 bits, where other ways are slower.
        """
        forms, outside = self._whole_back_forms(False)
        far = self.inside == self.outside and self.numel * self.size > limits().sums
        return far and LARGE_BLOCKS[-1] * forms.bytes(outside) > limits().sums_block

    def _whole_back_forms(self, kept: bool) -> tuple[Forms, list[Key]]:
        """Return :meth:`back_forms` of the backward pass with all gradients."""
        return self.back_forms((True,) * (2 + len(self.shapes)), kept)

    def _back_block(self, gradients: bool, each: int, shared: bool) -> int:
        """Return the tokens of a block of the backward pass, with ``each`` bytes of a token in scratch memory.

        ``shared``: the tokens are shared among threads.
        """
        if self._fixed:
            return self._fixed
        if not gradients or self.numel * self.size <= limits().sums:
            return self.near_block(each)
        blocks = self._large_blocks[-1:] if shared else self._large_blocks
        return next((b for b in blocks if b * each <= limits().sums_block), blocks[-1])

    def _front_block(self, each: int) -> int:
        """Return the tokens of a block of the forward pass, with ``each`` bytes of a token in scratch memory."""
        if self._fixed:
            return self._fixed
        if self.numel * BYTES[self.outside] <= limits().factors:
            return self.near_block(each)
        least = TILE_BLOCKS[-1] if self.tiles else OTHER_BLOCKS[-1]
        return next((b for b in self._large_blocks if b * each <= limits().factors_block), least)

    @property
    def _large_blocks(self) -> tuple[int, ...]:
        return LARGE_TILE_BLOCKS if self.tiles else LARGE_BLOCKS

    def near_block(self, each: int) -> int:
        """Return the tokens of a block whose activations are in the second level of cache."""
        few = self.pairs or self.target.registers < 32
        blocks = TILE_BLOCKS if self.tiles else OTHER_BLOCKS if few else BLOCKS
        return next((b for b in blocks if b * each <= limits().block), blocks[-1])

    @property
    def block(self) -> int:
        """Tokens of a block of the forward pass."""
        return self._front_block(self.front_forms().bytes([]))

    def front_forms(self) -> Forms:
        """Return the forms of arrays that the forward pass reads."""
        schedule, forms = self.schedule, Forms(self.inside, self.schedule.rows)
        for k, operation in enumerate(schedule.forward):
            forms.now = k
            forms.read_by(operation, "state", k)
            forms.write("state", k + 1)
        if self.cuts_front:
            forms.now = len(schedule.forward)
            forms.read("state", len(schedule.forward))
        return forms

    @property
    def cuts_front(self) -> bool:
        """Whether the output goes through scratch memory."""
        return self.inner[1] or self.d_out < self.schedule.widths[-1] or not self.rows

    @once
    def forward(self, bias: bool, kept: bool) -> Pass:
        """Table: x, y, scratch, bias (if any), factors, and where ``kept`` the activations between steps."""
        schedule, last = self.schedule, len(self.schedule.forward)
        forms, cut = self.front_forms(), self.cuts_front
        outside = forms.keep("state", range(1, last)) if kept else []
        writer = Writer(self, self._front_block(forms.bytes([])))
        x, y = map(writer.end, self.strides)
        arrays = writer.scratch(forms, outside)
        added = writer.whole(self.inside) if bias else None
        factors = [writer.factor(operation) for operation in schedule.forward]
        arrays |= {key: writer.rows(self.outside, schedule.rows[key[1]]) for key in outside}

        def body(emitter: Emitter, at: At) -> None:
            for array in forms.of(arrays, "state", 0):
                full, enters = schedule.widths[0], schedule.forward[0].enters
                self.read(emitter, at(x), (self.strides[0], self.d_in), at(array), schedule.rows[0], full, enters)
            for k, operation in enumerate(schedule.forward):
                to = [at(array) for array in forms.of(arrays, "state", k + 1) or [y]]
                source = writer.source(emitter, at, forms, arrays, operation, "state", k)
                fused = at(added) if added is not None and k == last - 1 else None
                writer.multiply(emitter, operation, to, source, at(factors[k]), bias=fused)
            if cut:
                source = at(forms.one(arrays, "state", last))
                self.write(emitter, source, schedule.rows[last], at(y), (self.strides[1], self.d_out))

        ends = [*(() if cut else [y]), *(arrays[key] for key in outside)]
        return writer.compile(body, self._in_one_piece([x]), self._in_one_piece(ends), schedule.forward)

    @once
    def backward(self, needs: tuple[bool, ...], kept: bool, shared: bool = False) -> Pass:
        """Table: x, gy, scratch, gx (if needed), factors for this pass, gradients of factors and bias, and activations.

        Where these are not ``kept``, it holds the factors for the forward pass in their stead. ``needs``: x, factors,
        bias (for rows only).
        """
        schedule, last, rows = self.schedule, len(self.schedule.forward), self.schedule.rows
        wanted = [k for k in range(last) if needs[k + 1]]
        passed = range(last - 1, -1 if needs[0] else min(wanted), -1)  # steps that the gradient passes through
        again = range(0 if kept else max(wanted, default=0))  # steps that are run again
        cut = self.cuts_back
        paired = {k for k in wanted if self.gradient_in_pairs(k)}
        forms, outside = self.back_forms(needs, kept)
        writer = Writer(self, self._back_block(bool(wanted), forms.bytes(outside), shared))
        x, gy = map(writer.end, self.strides)
        arrays = writer.scratch(forms, outside)
        gx = writer.end(self.strides[0]) if needs[0] else None
        back = {k: writer.factor(schedule.back[k]) for k in sorted(passed)}
        grads = {k: writer.whole(self.inside) for k in wanted}
        bias = writer.whole(self.inside) if needs[-1] else None
        arrays |= {key: writer.rows(self.outside, self.kept_rows[key[1]]) for key in outside}
        factors = [writer.factor(schedule.forward[k]) for k in again]

        def body(emitter: Emitter, at: At) -> None:
            ends = {("state", 0): (x, self.d_in), ("flow", last): (gy, self.d_out)}
            ends |= {key[:2]: (arrays[key], schedule.widths[key[1]]) for key in outside}
            inner = emitter.even if paired else emitter.tokens  # where nothing is written to gx

            def enter(when: int) -> None:
                for key in forms.entered(when, outside):
                    (source, width), number = ends[key[:2]], key[1]
                    if key[:2] in (("state", 0), ("flow", last)):
                        full, reader = schedule.widths[number], schedule.back[-1] if number else schedule.forward[0]
                        places = (source.row, width), at(arrays[key])
                        self.read(emitter, at(source), *places, rows[number], full, reader.enters, even=bool(paired))
                    else:
                        row = source.row, at(arrays[key]), rows[number], width, width
                        emitter.copy(at(source), *row, even=bool(paired))
                    self._clear(emitter, at, arrays, key)

            if bias is not None:
                emitter.add_rows(at(gy), self.strides[1], at(bias), self.d_out)
            self.write_states(writer, emitter, at, forms, arrays, {k: factors[k] for k in again}, inner, enter)
            self.write_gradients(writer, emitter, at, forms, arrays, grads, back, inner, gx, enter)
            if gx is not None and cut:
                wide = self.strides[0], self.d_in
                self.write(emitter, at(forms.one(arrays, "flow", 0)), rows[0], at(gx), wide)

        ran = [schedule.forward[k] for k in again] + [schedule.back[k] for k in passed]
        written = [] if gx is None or cut else self._in_one_piece([gx])
        operations = [*ran, *(schedule.gradients[k] for k in wanted)]
        read = [x, gy, *(arrays[key] for key in outside)]
        return writer.compile(body, self._in_one_piece(read), written, operations)

    def _in_one_piece(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """Return the arrays to prefetch: those whose rows are contiguous."""
        return arrays if self.rows and self.part is None else ()

    def write_states(
        self, writer: Writer, emitter: Emitter, at: At, forms: Forms, arrays: Mapping[Key, Array],
        factors: Mapping[int, Array], tokens: Int, enter: Enter | None = None,
    ) -> None:  # fmt: skip
        """Write the forward products by these factors, from one activation in scratch memory to the next.

        ``enter`` is called with the number of each product before that is written.
        """
        for k, factor in factors.items():
            operation = self.schedule.forward[k]
            if enter is not None:
                enter(self.when("forward", k))
            to = [at(array) for array in forms.of(arrays, "state", k + 1)]
            source = writer.source(emitter, at, forms, arrays, operation, "state", k, tokens)
            writer.multiply(emitter, operation, to, source, at(factor), tokens=tokens)
            self.clear_all(emitter, at, arrays, "state", k + 1)

    def write_gradients(
        self, writer: Writer, emitter: Emitter, at: At, forms: Forms, arrays: Mapping[Key, Array],
        grads: Mapping[int, Array], back: Mapping[int, Array], tokens: Int, gx: Array | None,
        enter: Enter | None = None,
    ) -> None:  # fmt: skip
        """Write the products of the backward pass, with the sums ``grads`` and the factors ``back``, by step number.

        The last one writes to ``gx`` unless the gradient of the input is in scratch memory.
        """
        rows, widths = self.schedule.rows, self.schedule.widths
        for k in range(len(self.schedule.forward) - 1, -1, -1):
            if k in grads:
                if enter is not None:
                    enter(self.when("gradients", k))
                pairs, ends = self.gradient_in_pairs(k), (("flow", k + 1), ("state", k))
                flow, state = (at(forms.one(arrays, *end, "tokens" if pairs else "plain")) for end in ends)
                count = emitter.code.value(f"lshr i64 {emitter.even}, 1") if pairs else emitter.tokens
                operation = self.schedule.gradients[k]
                product = operation.product
                if operation.turn is not None:
                    kind, number = self._copied_for_gradient(k)
                    copy = writer.source(emitter, at, forms, arrays, operation, kind, number, count)
                    flow, state = (flow, copy) if product.swapped else (copy, state)
                if self._gradient_by_tiles(k):
                    kind, number = self._copied_for_gradient(k)
                    last_tokens = at(forms.one(arrays, f"turned {kind}", number, "last"))
                    source = state if product.swapped else flow
                    tiles.turn_tokens(emitter, source, rows[number], widths[number], last_tokens)
                    flow, state = (flow, last_tokens) if product.swapped else (last_tokens, state)
                    product = tiles.tokens_last(product, emitter.block)
                write_product(
                    emitter, product, [at(grads[k])], flow, state, add=True, tokens=count, buffer=writer.buffer
                )
            if k in back:
                if enter is not None:
                    enter(self.when("back", k))
                operation, found = self.schedule.back[k], forms.of(arrays, "flow", k)
                if found:
                    to, count = [at(array) for array in found], tokens
                else:
                    assert gx is not None
                    to, count = [at(gx)], emitter.tokens
                source = writer.source(emitter, at, forms, arrays, operation, "flow", k + 1, count)
                writer.multiply(emitter, operation, to, source, at(back[k]), tokens=count)
                self.clear_all(emitter, at, arrays, "flow", k)

    def when(self, kind: str, k: int) -> int:
        """Return the number of a backward product; forward products that the pass repeats come first."""
        last = len(self.schedule.forward)
        return k if kind == "forward" else last + 2 * (last - 1 - k) + (kind == "back")

    def clear_all(self, emitter: Emitter, at: At, arrays: Mapping[Key, Array], kind: str, number: int) -> None:
        """Write zeros after the tokens of all forms of an activation that products by tiles read."""
        for key in arrays:
            if key[:2] == (kind, number):
                self._clear(emitter, at, arrays, key)

    def _clear(self, emitter: Emitter, at: At, arrays: Mapping[Key, Array], key: Key) -> None:
        """Write zeros after the last pair of tokens of an array that a product by tiles reads."""
        if self.tiles and key[2] == "tokens":
            tiles.clear_after(emitter, at(arrays[key]), self.schedule.rows[key[1]], self.schedule.widths[key[1]])

    def back_forms(
        self, needs: tuple[bool, ...], kept: bool, again: Sequence[int] | None = None
    ) -> tuple[Forms, list[Key]]:
        """Return the forms of arrays that the backward pass reads, and which of them lie outside of scratch memory.

        ``again``: the steps that it runs again; None: all that it needs, unless activations are ``kept``.
        """
        schedule, last = self.schedule, len(self.schedule.forward)
        wanted = [k for k in range(last) if needs[k + 1]]
        passed = range(last - 1, -1 if needs[0] else min(wanted), -1)
        forms = Forms(self.inside, self.schedule.rows)
        for k in range(0 if kept else max(wanted, default=0)) if again is None else again:
            forms.now = self.when("forward", k)
            forms.read_by(schedule.forward[k], "state", k)
            forms.write("state", k + 1)
        for k in range(last - 1, -1, -1):
            if k in wanted:
                forms.now = self.when("gradients", k)
                form = "tokens" if self.gradient_in_pairs(k) else "plain"
                forms.read("state", k, form)
                forms.read("flow", k + 1, form)
                if schedule.gradients[k].turn is not None:
                    forms.read_by(schedule.gradients[k], *self._copied_for_gradient(k))
                if self._gradient_by_tiles(k):
                    kind, number = self._copied_for_gradient(k)
                    forms.read(f"turned {kind}", number, "last")
            if k in passed:
                forms.now = self.when("back", k)
                forms.read_by(schedule.back[k], "flow", k + 1)
                forms.write("flow", k)
        if self.cuts_back and needs[0]:
            forms.now = self.when("back", -1)
            forms.read("flow", 0)
        # Slices of kept activations do not lie as the products read them.
        return forms, forms.keep("state", range(1, last), "kept" if self.part else "plain") if kept else []

    @property
    def kept_rows(self) -> tuple[int, ...]:
        """Strides from token to token of kept activations, which may be slices."""
        if self.part is None:
            return self.schedule.rows
        return tuple(row_of(width * self.part.count, self.inside) for width in self.schedule.widths)

    @property
    def cuts_back(self) -> bool:
        """Whether the gradient of the input goes through scratch memory."""
        return self.inner[0] or self.d_in < self.schedule.widths[0] or not self.rows

    def read(
        self, emitter: Emitter, source: Memory, ends: tuple[int, int], target: Memory, row: int, full: int,
        enters: Axis | None, even: bool = False,
    ) -> None:  # fmt: skip
        """Copy the input or the gradient of the output; ``ends``: its row stride and the numbers of a row to read."""
        stride, width = ends
        if target.zipped:
            assert enters is not None
            assert enters.out is not None
            emitter.zip(source, stride, target, row, width, (enters.size, enters.out), even)
        elif self.rows:
            emitter.copy(source, stride, target, row, width, full, even)
        else:
            emitter.from_columns(source, "%total", target, row, width, full)

    def write(self, emitter: Emitter, source: Memory, row: int, target: Memory, ends: tuple[int, int]) -> None:
        """Copy the output, or the gradient of the input, to its place."""
        stride, width = ends
        if self.rows:
            emitter.copy(source, row, target, stride, width, width)
        else:
            emitter.to_columns(source, row, target, "%total", width)

    def gradient_in_pairs(self, k: int) -> bool:
        """Whether to add up the gradient of factor k over pairs of tokens in bfloat16."""
        schedule = self.schedule
        if not self.pairs or not any(axis.size == 0 for axis in schedule.gradients[k].product.summed):
            return False
        before, after = k == 0, k + 1 == len(schedule.forward)
        return (before or schedule.forward[k - 1].product.stores_pairs) and (
            after or schedule.back[k + 1].product.stores_pairs
        )

    def _gradient_by_tiles(self, k: int) -> bool:
        """Whether to transpose an activation or its gradient, so that tiles can compute the gradient of factor k."""
        if not self.tiles or not self.gradient_in_pairs(k):
            return False
        width = self.schedule.widths[self._copied_for_gradient(k)[1]]
        return tiles.tiles_pay(self.schedule.gradients[k].product, width, self.target, self.inside)

    def _copied_for_gradient(self, k: int) -> tuple[str, int]:
        """Return kind and number of the activation, or of its gradient, that is read number by number."""
        return ("state", k) if self.schedule.gradients[k].product.swapped else ("flow", k + 1)


def _nothing(*_: object) -> None:
    """Make no copies."""


# Equal structures share a program while it is one of the last PROGRAMS that were used; each takes 0.1 to 1 MB. Older
# programs live as long as their owners.
PROGRAMS = 64


@lru_cache(maxsize=PROGRAMS)
def make_program(
    steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool, dtype: str,
    target: Target, part: Part | None = None, packed: bool = True, block: int | None = None,
    inner: tuple[bool, bool] = (False, False),
) -> Program | None:  # fmt: skip
    """None where the chain has no schedule, and for columns in 16 bits.

    Not ``packed``: a forward pass for one or a few tokens, which reads the factors as they are stored; None also where
    its products would have no axis for their vectors. ``block``: tokens that all steps run for, one after the other, at
    a time, rounded up to whole pairs or for columns to whole vectors; None: as many as the caches suggest. ``inner``:
    whether the input and the output are in scratch memory, between chains of a block (:mod:`.block`).
    """
    if dtype in ("bfloat16", "float16") and not rows:
        return None
    pairs = dtype == "bfloat16" and target.half_products and packed
    strides, between, states = (part.strides(d_in, d_out), part.between, part.states) if part else (None, None, ())
    schedule = make_schedule(
        *(steps, dict(sizes), target, ELEMENTS[dtype][1], d_in, d_out, rows, pairs),
        *(strides, dict(between) if between else None, packed, inner, states),
    )
    size = dict(sizes)
    shapes = [tuple(size[a] for a in step.factor) for step in steps]
    if schedule is None:
        return None
    return Program(schedule, target, dtype, d_in, d_out, rows, shapes, part, packed, block, inner)
