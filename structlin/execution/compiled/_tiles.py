"""Products of bfloat16 by tiles on processors with AMX, and the copies that tiles need.

A tile is a register of up to 16 rows of 64 bytes. One instruction, ``TDPBF16PS``, adds to a tile of 16 x 16 sums in
float32 the products of 16 rows of up to 16 pairs with up to 16 rows of 16 pairs: 8192 MACs. The operand that a product
in pairs reads in vectors (:mod:`._product`) lies in memory as the second of these, with neighbours along the summed
axis side by side; the one that it reads number by number is the first, if pairs along a summed axis are neighbours.
Where they are not, a copy has that axis last.

Four tiles of sums are computed together. They are stored to scratch memory, and from there read in vectors, to be
converted and written as by the other products. Where sums are to be added to float32, tiles load and store them.

Intel, *Architecture Instruction Set Extensions Programming Reference*, chapter "Intel AMX".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from structlin.execution.compiled._emit import BITS, Emitter, Memory
from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._loops import Loops, Places
from structlin.execution.compiled._loops import write_product as write_by_vectors
from structlin.execution.compiled._product import BYTES, Axis, Product
from structlin.execution.compiled._target import Target

SIDE = 16  # rows, and columns of 4 bytes, of a tile
FIRST, SECOND = 4, 6  # numbers of the tiles of operands; those of sums are 0 to 3
BUFFER = 4 * SIDE * SIDE * 4  # bytes that the four tiles of sums take in scratch memory
# In instructions of vectors, of which two take a cycle: of a row of a tile in a product, of one that is converted, and
# of a square of 256 numbers of 4 bytes that is transposed. A product of few rows takes no less than its loads.
ROW, ENDS, SQUARE, LEAST_ROWS = 2, 4, 128, 8
BLOCK = 64  # tokens, about
UNROLLED = 4  # rows of sums


@dataclass(frozen=True)
class Tiling:
    """``depth`` pairs along the summed ``axis`` at a time, for tiles of ``rows`` times ``columns`` sums."""

    axis: Axis
    rows: int
    columns: int
    depth: int

    @property
    def configuration(self) -> bytes:
        """The operand of ``LDTILECFG``: a palette, and rows and bytes of a row of each tile."""
        shapes = [(self.rows, self.columns)] * 4 + [(self.rows, self.depth)] * 2 + [(self.depth, self.columns)] * 2
        widths = b"".join((4 * wide).to_bytes(2, "little") for _, wide in shapes)
        return bytes([1]).ljust(16, b"\0") + widths.ljust(32, b"\0") + bytes(h for h, _ in shapes).ljust(16, b"\0")


def tiling(product: Product, unit: int) -> Tiling | None:
    """Return how a product in pairs runs by tiles; None if no summed axis has pairs of neighbours.

    ``unit``: elements of a pair in the operand that is read number by number.
    """
    if product.down is None or product.along is not None or product.both:
        return None
    found = [a for a in product.summed if (a.right if product.swapped else a.left) == unit]
    if not found:
        return None
    axis = found[0]
    rows = min(product.down.size or SIDE, SIDE)
    depth = max(n for n in range(1, SIDE + 1) if axis.size % n == 0)
    return Tiling(axis, rows, min(product.across.size, SIDE), depth)


def cost_of(product: Product, target: Target, element: str, unit: int) -> float:
    """Return :meth:`._product.Product.cost` of a product in pairs, by tiles or by vectors."""
    how = faster(product, target, element, unit) if product.paired else None
    return product.cost(target, element) if how is None else _tile_cost(product, how)


def faster(product: Product, target: Target, element: str, unit: int) -> Tiling | None:
    """Return how a product in pairs runs by tiles; None if vectors take less time."""
    how = tiling(product, unit) if target.tiles else None
    return how if how is not None and _tile_cost(product, how) < product.cost(target, element) else None


def _tile_cost(product: Product, how: Tiling) -> float:
    """Return the cost for one token. If tokens are summed, a tile takes pairs of them."""
    turns = math.prod(a.size or 0.5 for a in product.summed) / how.depth
    outer = math.prod(a.size or 1 for a in (*product.outer, *product.near))
    rows = product.down.size if product.down and product.down.size else 1  # of all tokens, one is this token's
    tiles = math.ceil(product.across.size / SIDE) * outer
    ends = ENDS / (BLOCK if any(a.size == 0 for a in product.summed) else 1)
    return tiles * rows * (turns * ROW * max(1, LEAST_ROWS / how.rows) + ends)


@dataclass(frozen=True)
class Turn:
    """A copy of each row of an activation.

    Its pairs, or numbers, ``(outer, middle, inner, unit)`` become ``(inner, middle, outer, unit)``.
    """

    outer: int
    inner: int
    unit: int
    middle: int = 1

    @property
    def cost(self) -> float:
        pairs = self.outer * self.middle * self.inner * self.unit
        return pairs * SQUARE / SIDE**2 if self.unit <= 2 else 2 * pairs / min(self.unit, SIDE)

    def write(self, emitter: Emitter, source: Memory, row: int, target: Memory, tokens: Int) -> None:
        """``row``: elements from row to row of both; ``tokens``: how many rows to copy.

        Numbers of 16 bits in a kept activation are converted.
        """
        code, converts = emitter.code, source.element in BITS and target.element == emitter.element
        kind = target.element if converts else "i64" if self.unit == 2 else "i32"
        vectors = Emitter(code, emitter.target, kind, emitter.tokens, emitter.block)
        here, there = source if converts else Memory(source.pointer, kind), Memory(target.pointer, kind)
        steps = [row * BYTES[memory.element] // BYTES[to.element] for memory, to in ((source, here), (target, there))]
        by, to_by = self.middle * self.inner, self.middle * self.outer  # along ``outer``, and ``inner`` of the copy

        def runs(start: Int, to: Int) -> None:
            def run(i: Int, j: Int) -> None:
                first = code.add(start, code.multiply(code.add(code.multiply(i, by), j), self.unit))
                place = code.add(to, code.multiply(code.add(code.multiply(j, to_by), i), self.unit))
                for k in range(0, self.unit, vectors.lanes):
                    count = min(vectors.lanes, self.unit - k)
                    held = vectors.load_some(here, code.add(first, k), count)
                    vectors.store_some(there, code.add(place, k), held, count)

            code.parts(self.outer, 1, lambda i, _: code.parts(self.inner, 1, lambda j, _: run(i, j)))

        def squares(start: Int, to: Int) -> None:
            def square(i: Int, high: int, j: Int, wide: int) -> None:
                first, place = (
                    code.add(a, code.add(code.multiply(b, step), c))
                    for a, b, step, c in ((start, i, by, j), (to, j, to_by, i))
                )
                held = [vectors.load(here, code.add(first, r * by), wide) for r in range(high)]
                rows = vectors.transposed([*held, *["zeroinitializer"] * (vectors.lanes - high)])
                for r, found in enumerate(rows[:wide]):
                    vectors.store(there, code.add(place, r * to_by), found, high)

            lanes = vectors.lanes
            code.parts(
                self.outer, lanes,
                lambda i, high: code.parts(self.inner, lanes, lambda j, wide: square(i, high, j, wide)),
            )  # fmt: skip

        body = runs if self.unit > (1 if converts else 2) else squares

        def row_of(n: Int, _: Values) -> None:
            start, to = (code.multiply(n, step) for step in steps)
            part, to_part = self.inner * self.unit, self.outer * self.unit
            code.loop(
                0, self.middle, 1,
                lambda m, _: body(code.add(start, code.multiply(m, part)), code.add(to, code.multiply(m, to_part))),
            )  # fmt: skip

        code.loop(0, tokens, 1, row_of, once=True)


def with_turn(product: Product, target: Target, element: str, unit: int) -> tuple[Product, Turn] | None:
    """Return what :func:`turned` finds for a product in pairs, where it is faster."""
    found = turned(product, unit) if product.paired else None
    if found is None:
        return None
    how = tiling(found[0], 1)
    assert how is not None
    return found if _tile_cost(found[0], how) + found[1].cost < cost_of(product, target, element, unit) else None


def turned(product: Product, unit: int) -> tuple[Product, Turn] | None:
    """Return a product that reads a copy of its activation with the summed axes last; None if there is none.

    ``unit``: as in :func:`tiling`. The activation is ``(outer, middle, inner, unit)``, whose summed axes are all but
    ``inner``, and the copy, in pairs, ``(inner, middle, outer * unit)``. Each summed axis but ``inner`` may be missing.
    """
    if product.swapped or product.down is None or product.down.size:
        return None
    summed = [replace(a, left=(a.left or 0) // unit) for a in product.summed]
    others = [a for a in (*product.outer, *product.near) if a.left]
    if len(others) != 1 or not 1 <= len(summed) <= 3 or not all(a.size and a.right for a in summed):
        return None
    inner = replace(others[0], left=(others[0].left or 0) // unit)
    last = next((a for a in summed if a.left == 1), None)
    rest = sorted((a for a in summed if a is not last), key=lambda a: a.left or 0, reverse=True)
    none = Axis(1, None, 0, 0)
    first, between = (*rest, none)[:2] if rest else (none, none)
    run = last.size if last else 1
    order = [a for a in (between, first, last) if a is not None and a is not none]  # of the copy, and of the factor
    steps = [(a.right or 0) for a in order]
    sizes = [a.size for a in order]
    if len(rest) > 2 or not rest or any(steps[k] != steps[k + 1] * sizes[k + 1] for k in range(len(order) - 1)):
        return None
    part = inner.size * run
    if inner.left != run or first.left != part * between.size or between.left not in (0, part):
        return None
    whole = Axis(math.prod(sizes), None, 1, steps[-1])

    found = product.moved(lambda a: replace(a, left=whole.size) if a is others[0] else a)
    found = replace(found, summed=(whole,))
    return found, Turn(first.size, inner.size, run, between.size)


def tiles_pay(product: Product, width: int, target: Target, element: str) -> bool:
    """Whether a product that sums over pairs of tokens is faster by tiles, with a copy of :func:`turn_tokens`.

    ``width``: of the activation that is copied, the one that the product reads number by number.
    """
    found = gradient_cost(product, width)
    return found is not None and found < product.cost(target, element) / 2  # vectors take pairs too


def gradient_cost(product: Product, width: int) -> float | None:
    """Return :func:`cost_of` of a product by tiles that sums over pairs of tokens; None if it cannot run so."""
    turned = tokens_last(product, BLOCK)
    how = tiling(turned, 1)
    return None if how is None else _tile_cost(turned, how) + width * SQUARE / SIDE**2 / 2


def tokens_last(product: Product, block: int) -> Product:
    """Return the product with that copy, which has all pairs of tokens of a ``block`` for each number."""
    side, pairs = "right" if product.swapped else "left", block // 2

    def moved(axis: Axis) -> Axis:
        stride = getattr(axis, side)
        return axis if stride is None else replace(axis, **{side: stride * pairs if axis.size else 1})

    return product.moved(moved)


def clear_after(emitter: Emitter, memory: Memory, row: int, width: int) -> None:
    """Set the rows of pairs of tokens to 0 that follow the last one, up to a whole tile."""
    code, lanes = emitter.code, emitter.lanes

    def line(number: Int, _: Values) -> None:
        start = code.multiply(number, row)
        for k in range(0, width, lanes):
            emitter.store(memory, code.add(start, k), "zeroinitializer", min(lanes, width - k))

    pairs = code.value(f"lshr i64 {emitter.even}, 1")
    code.loop(pairs, code.whole(code.add(pairs, SIDE - 1), SIDE), 1, line)


def turn_tokens(emitter: Emitter, source: Memory, row: int, width: int, target: Memory) -> None:
    """Copy (pairs of tokens, width) to (width, pairs of tokens); rows are there for whole tiles."""
    code, step = emitter.code, emitter.block // 2
    vectors = Emitter(code, emitter.target, "i32", emitter.tokens, emitter.block)
    pairs = code.value(f"lshr i64 {emitter.even}, 1")

    def square(i: Int, j: Int, wide: int) -> None:
        first, place = code.add(code.multiply(i, row), j), code.add(code.multiply(j, step), i)
        rows = [vectors.load(source, code.add(first, r * row), wide) for r in range(SIDE)]
        for r, found in enumerate(vectors.transposed(rows)[:wide]):
            vectors.store(target, code.add(place, r * step), found, SIDE)

    def rows(i: Int, _: Values) -> None:
        code.parts(width, SIDE, lambda j, wide: square(i, j, wide))

    code.loop(0, pairs, SIDE, rows, once=True)


@dataclass(frozen=True)
class _Span:
    """Rows or columns of a tile, from ``start`` of the product on: those before ``first`` were written before."""

    start: int
    first: int
    count: Int  # of tokens, those that are there


def _spans(size: int, tile: int) -> list[_Span]:
    """Return starts of tiles of one size; the last one begins earlier if less than a whole tile remains."""
    found = [_Span(k, 0, tile) for k in range(0, size - tile + 1, tile)]
    done = len(found) * tile
    return found if done == size else [*found, _Span(size - tile, tile - (size - done), tile)]


def release(code: Code) -> None:
    """Release the tiles after all products of a pass."""
    if any("llvm.x86.ldtilecfg" in line for line in code.declarations):
        code.call("void", "llvm.x86.tilerelease")


def write_product(
    emitter: Emitter, product: Product, out: Sequence[Memory], left: Memory, right: Memory, *, add: bool = False,
    bias: Memory | None = None, tokens: Int | None = None, zipped: Axis | None = None, buffer: str | None = None,
) -> None:  # fmt: skip
    """Write a product by tiles if that takes less time; ``buffer`` is scratch memory for the sums."""
    how = None
    if buffer is not None and "i32" in (left.element, right.element):
        unit = BYTES["i32"] // BYTES[(right if product.swapped else left).element]
        how = faster(product, emitter.target, emitter.element, unit)
    if how is None:
        return write_by_vectors(emitter, product, out, left, right, add=add, bias=bias, tokens=tokens, zipped=zipped)
    zipped = zipped if any(memory.zipped for memory in out) else None
    count = emitter.tokens if tokens is None else tokens
    assert buffer is not None
    return _TileLoops(emitter, product, out, left, right, add, bias, count, zipped, how, buffer).write()


class _TileLoops(Loops):
    def __init__(self, *given: Any) -> None:
        *others, self.how, buffer = given
        super().__init__(*others)
        self.buffer = Memory(buffer, "float")
        self.down = self._strides(self.product.down)
        self.apart = self._strides(self.zipped)

    def _tile_call(self, name: str, *numbers: int, at: tuple[Memory, Int, Int] | None = None) -> None:
        """Write an instruction for tiles of these numbers; ``at``: array, offset, row stride in elements."""
        operands: list[tuple[str, Int]] = [("i8", n) for n in numbers]
        if at is not None:
            memory, offset, step = at
            operands.append(("ptr", self.code.at(memory.element, memory.pointer, offset)))
            operands.append(("i64", self.code.multiply(step, BYTES[memory.element])))
        self.code.call("void", f"llvm.x86.{name}", *operands)

    def write(self) -> None:
        text = "".join(f"\\{byte:02X}" for byte in self.how.configuration)
        name = f"@tiles.{self.how.rows}.{self.how.columns}.{self.how.depth}"
        self.code.declarations.add(f'{name} = private unnamed_addr constant [64 x i8] c"{text}", align 64')
        self.code.call("void", "llvm.x86.ldtilecfg", ("ptr", name))
        product = self.product
        columns = _spans(product.across.size, self.how.columns)
        self._each([*product.outer, *product.near], Places(), lambda at: self._groups(at, product.across, columns))

    def _groups(self, at: Places, axis: Axis, columns: list[_Span]) -> None:
        """All columns, for two tiles at a time, and all rows of each."""
        self._pairs(at, axis, columns, 2, lambda at, spans: self._rows(at, spans))

    def _pairs(
        self, at: Places, axis: Axis, spans: list[_Span], together: int, body: Callable[[Places, list[_Span]], None]
    ) -> None:  # fmt: skip
        """``body`` with as many spans as there are ``together``: first those that are whole, in a loop."""
        whole = sum(span.first == 0 for span in spans) // together * together
        if whole:
            stop = spans[whole].start + spans[whole].first if whole < len(spans) else axis.size
            step, group = stop // (whole // together), spans[:together]
            self.code.loop(0, stop, step, lambda i, _: body(self._moved(at, axis, i), group))
        if rest := spans[whole:]:
            body(
                self._moved(at, axis, rest[0].start), [replace(span, start=span.start - rest[0].start) for span in rest]
            )

    def _rows(self, at: Places, columns: list[_Span]) -> None:
        axis, together = self.product.down, 1 if self.zipped else 2
        assert axis is not None
        if axis.size:
            return self._pairs(
                at, axis, _spans(axis.size, self.how.rows), together, lambda at, rows: self._tiles(at, rows, columns)
            )
        code, full = self.code, [_Span(k * SIDE, 0, SIDE) for k in range(together)]
        whole = code.whole(self.tokens, together * SIDE)
        code.loop(0, whole, together * SIDE, lambda i, _: self._tiles(self._moved(at, axis, i), full, columns))

        def rest(i: Int, _: Values) -> None:
            count = code.least(code.subtract(self.tokens, i), SIDE)
            self._tiles(self._moved(at, axis, i), [_Span(0, 0, count)], columns)

        code.loop(whole, self.tokens, SIDE, rest)
        return None

    def _tiles(self, at: Places, rows: list[_Span], columns: list[_Span]) -> None:
        """Up to four tiles of sums: of rows and columns, or of columns of two items that are to be zipped."""
        if self.emitter.ahead is not None:
            self.emitter.ahead()
        items = range(2 if self.zipped else 1)
        cells = [(z, r, c) for z in items for r in range(len(rows)) for c in range(len(columns))]

        def place(which: str, start: Int, z: int, row: Int, column: Int) -> Int:
            moved = self._offset(which, start, (z, self.apart))
            return self.code.add(self.code.add(moved, self.code.multiply(row, getattr(self.down, which))), column)

        def corner(which: str, start: Int, cell: tuple[int, int, int]) -> Int:
            z, r, c = cell
            return place(which, start, z, rows[r].start, columns[c].start)

        whole = all(span.first == 0 and span.count == size for spans, size in
                    ((rows, self.how.rows), (columns, self.how.columns)) for span in spans)  # fmt: skip
        direct = whole and self.bias is None and [memory.element for memory in self.out] == ["float"]
        for number, cell in enumerate(cells):
            if direct and self.add:
                self._tile_call("tileloadd64", number, at=(self.out[0], corner("out", at.out, cell), self.down.out))
            else:
                self._tile_call("tilezero", number)

        def turn(vector: Int, single: Int) -> None:
            step, down = self._strides(self.how.axis).vector, self.down.single
            for number, (z, r, c) in enumerate(cells):
                if c == 0:
                    start = place("single", single, z, rows[r].start, 0)
                    self._tile_call("tileloadd64", FIRST + r, at=(self.single, start, down))
                if r == 0:
                    start = place("vector", vector, z, 0, columns[c].start)
                    self._tile_call("tileloadd64", SECOND + c, at=(self.vector, start, step))
                self._tile_call("tdpbf16ps", number, FIRST + r, SECOND + c)

        self._run_through(list(self.product.summed), at.vector, at.single, turn)
        for number, cell in enumerate(cells):
            if direct:
                self._tile_call("tilestored64", number, at=(self.out[0], corner("out", at.out, cell), self.down.out))
            else:
                self._tile_call("tilestored64", number, at=(self.buffer, number * SIDE**2, SIDE))
        if direct:
            return
        for r, span in enumerate(rows):
            whole = all(column.first == 0 for column in columns) and self.how.columns == SIDE
            groups = [range(len(columns))] if whole else [[c] for c in range(len(columns))]
            for group in groups:
                numbers = [[cells.index((z, r, c)) for c in group] for z in items]
                self._ends(at, numbers, span, columns[group[0]])

    def _run_through(
        self, axes: Sequence[Axis], vector: Int, single: Int, turn: Callable[[Int, Int], None]
    ) -> None:  # fmt: skip
        """Write the loops over summed axes; that of the tiles advances by ``depth`` pairs."""
        if not axes:
            return turn(vector, single)
        code, (axis, *rest), by = self.code, axes, self._strides(axes[0])
        step = self.how.depth if axis is self.how.axis else 1
        # Of pairs of tokens the last ones are zeros, up to a whole tile.
        size = axis.size or code.whole(code.add(self.tokens, SIDE - 1), SIDE)

        def body(i: Int, _: Values) -> None:
            self._run_through(
                rest, code.add(vector, code.multiply(i, by.vector)), code.add(single, code.multiply(i, by.single)), turn
            )

        code.loop(0, size, step, body, once=True)
        return None

    def _ends(self, at: Places, numbers: Sequence[Sequence[int]], rows: _Span, columns: _Span) -> None:
        """Write sums from the buffer to the arrays.

        ``numbers``: of tiles beside each other, the first one with these ``columns``; of two items if they are zipped.
        Of several all columns are written.
        """
        code, emitter, lanes = self.code, self.emitter, self.how.columns - columns.first
        shift = columns.start + columns.first
        pairs = any(out.element == "i32" and not out.zipped for out in self.out)
        beside = range(len(numbers[0]))

        def place(which: str, start: Int, row: Int, c: int, z: int = 0) -> Int:
            moved = code.multiply(code.add(row, rows.start), getattr(self.down, which))
            found = code.add(code.add(start, moved), shift + c * SIDE)
            return self._offset(which, found, (z, self.apart))

        def held(z: int, row: Int, c: int) -> str:
            first = code.add(code.multiply(row, SIDE), numbers[z][c] * SIDE**2 + columns.first)
            found = emitter.load(self.buffer, first, lanes)
            if self.bias is None and not self.add:
                return found
            which = "out" if self.bias is None else "bias"
            more = emitter.load(self.bias or self.out[0], place(which, getattr(at, which), row, c, z), lanes)
            return code.value(f"fadd {emitter.vector} {found}, {more}")

        def line(first: Int) -> None:
            lines = [code.add(first, k) for k in range(2 if pairs else 1)]
            sums = [[[held(z, row, c) for c in beside] for row in lines] for z in range(len(numbers))]
            for out in self.out:
                if out.zipped:
                    for row, *both in zip(lines, *sums, strict=True):
                        for c in beside:
                            to = place("zipped", at.zipped, row, c)
                            emitter.store_pairs(out, to, (both[0][c], both[1][c]), lanes)
                    continue
                for z, found in enumerate(sums):
                    if out.element == "i32":
                        for c in beside:
                            to = place("pair", at.pair, first, c, z)
                            emitter.store_pairs(out, to, (found[0][c], found[1][c]), lanes)
                        continue
                    for row, values in zip(lines, found, strict=True):
                        to = place("out", at.out, row, 0, z)
                        if len(values) == 2:
                            emitter.store_two(out, to, (values[0], values[1]))
                        else:
                            emitter.store(out, to, values[0], lanes)

        step, count = 2 if pairs else 1, rows.count
        together = UNROLLED if isinstance(count, int) and (count - rows.first) % (step * UNROLLED) == 0 else 1

        def several(first: Int, _: Values) -> None:
            for k in range(together):
                line(code.add(first, k * step))

        code.loop(rows.first, count, step * together, several)
