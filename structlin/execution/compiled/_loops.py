"""The loops of a product: around a tile of sums that is held in registers (:mod:`._product`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._ir import Int, Values
from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._product import BYTES, NEAR, VECTORS, Axis, Product, dot_tile, max_rows

TOGETHER = 8  # vectors of one row that are read before those of the next one: such runs are fetched ahead by processors
UNROLLED = 4  # turns of the innermost loop: its end takes less than a tenth of their time


def write_product(
    emitter: Emitter, product: Product, out: Sequence[Memory], left: Memory, right: Memory, *, add: bool = False,
    bias: Memory | None = None, tokens: Int | None = None, zipped: Axis | None = None,
) -> None:  # fmt: skip
    """Write the loops of a product.

    ``out``: the same array, in one form or several. ``add``: to what is in it. ``bias`` has the strides of ``out`` and
    no tokens. ``tokens``: how many, where other than all. ``zipped``: the outer axis of which two items are stored side
    by side in arrays that are so.
    """
    zipped = zipped if any(memory.zipped for memory in out) else None
    count = emitter.tokens if tokens is None else tokens
    Loops(emitter, product, out, left, right, add, bias, count, zipped).write()


class Places(NamedTuple):
    """Offsets into the arrays of a product, or the strides of an axis in them."""

    out: Int = 0
    vector: Int = 0  # the operand read in vectors
    single: Int = 0  # the one read number by number
    bias: Int = 0
    pair: Int = 0  # out, of two tokens
    zipped: Int = 0  # out, of two items of an axis


class Loops:
    def __init__(
        self, emitter: Emitter, product: Product, out: Sequence[Memory], left: Memory, right: Memory, add: bool,
        bias: Memory | None, tokens: Int, zipped: Axis | None,
    ) -> None:  # fmt: skip
        self.tokens, self.zipped = tokens, zipped
        self.emitter, self.code, self.product = emitter, emitter.code, product
        self.out, self.bias, self.add = out, bias, add
        self.vector, self.single = (left, right) if product.swapped else (right, left)
        self.paired = "i32" in (left.element, right.element)

    def _strides(self, axis: Axis | None) -> Places:
        if axis is None:
            return Places()
        vector, single = (axis.left, axis.right) if self.product.swapped else (axis.right, axis.left)
        out, tokens = axis.out or 0, axis.size == 0
        return Places(out, vector or 0, single or 0, 0 if tokens else out, out // 2 if tokens else out, out)

    def _moved(self, at: Places, axis: Axis, index: Int, items: int = 1) -> Places:
        """``index`` counts by ``items``, except in what is zipped."""
        code, by = self.code, self._strides(axis)
        moved = [code.add(p, code.multiply(index, code.multiply(s, items))) for p, s in zip(at, by, strict=True)]
        return Places(*moved)._replace(zipped=code.add(at.zipped, code.multiply(index, by.zipped)))

    def _offset(self, which: str, start: Int, *moves: tuple[int, Places]) -> Int:
        """``start`` in one of the arrays, so many steps on by each of some strides."""
        for count, strides in moves:
            start = self.code.add(start, self.code.multiply(count, getattr(strides, which)))
        return start

    def _load(self, at: Memory, place: Int, lanes: int) -> str:
        found = self.emitter.load(at, place, lanes)
        return self.emitter.as_pairs(found) if self.paired else found

    def _multiply_add(self, a: str, b: str, c: str) -> str:
        emitter = self.emitter
        return (emitter.multiply_add_pairs if self.paired else emitter.multiply_add)(a, b, c)

    def _size(self, axis: Axis) -> Int:
        return axis.size or self.tokens

    def write(self) -> None:
        product, start = self.product, Places()
        if product.along is not None:
            self._each(product.outer, start, self._dots)
        elif product.near:  # rows, neighbours, vectors
            wide = _even(math.ceil(product.across.size / self.emitter.lanes), VECTORS)[0]

            def inside(at: Places, rows: int) -> None:
                self._each(near, at, lambda at: self._across(at, lambda at, held: self._tile(at, rows, held)))

            parts, near = self._parts()
            self._each([*product.outer, *parts], start, lambda at: self._down(at, wide, inside))
        else:  # vectors, rows: what is read in vectors stays where it is for all rows

            def rows(at: Places, held: Sequence[int]) -> None:
                self._down(at, len(held), lambda at, rows: self._tile(at, rows, held))

            self._each(product.outer, start, lambda at: self._across(at, rows))

    def _parts(self) -> tuple[list[Axis], list[Axis]]:
        """``near``, and an axis to run outside of the rows: parts of it for which the vectors stay in cache.

        They are read again for each tile of rows. A part is a cache line of what is read number by number, at least.
        """
        first, *rest = self.product.near
        by = self._strides(first)
        single = by.single
        if first is self.zipped or not isinstance(single, int) or not (single and by.vector):
            return [], [first, *rest]
        read = [a for a in (self.product.across, *self.product.summed, *rest) if self._strides(a).vector]
        item = math.prod(a.size or self.emitter.block for a in read) * BYTES[self.vector.element]
        least = min(math.ceil(NEAR / single), first.size)
        sizes = [n for n in range(least, first.size + 1) if first.size % n == 0]
        size = max((n for n in sizes if n * item <= limits().vectors), default=sizes[0])
        if size == first.size:
            return [], [first, *rest]

        def spaced(stride: int | None) -> int | None:
            return None if stride is None else stride * size

        outer = Axis(first.size // size, *map(spaced, first.strides))
        return [outer], [replace(first, size=size), *rest]

    def _each(self, axes: Sequence[Axis], at: Places, body: Callable[[Places], None]) -> None:
        if not axes:
            return body(at)
        first, *rest = axes

        items = 2 if first is self.zipped else 1

        def once(index: Int, _: Values) -> None:
            self._each(rest, self._moved(at, first, index, items), body)

        size = self._size(first) if items == 1 else first.size // 2
        self.code.loop(0, size, 1, once, once=first.size == 0)
        return None

    def _across(self, at: Places, body: Callable[[Places, Sequence[int]], None]) -> None:
        """Write all vectors of a row, at most ``VECTORS`` at a time, in parts of similar size."""
        lanes, axis = self.emitter.lanes, self.product.across
        vectors = math.ceil(axis.size / lanes)
        parts = _even(vectors, VECTORS)
        short = bool(axis.size % lanes)
        widest = parts[0]
        whole = parts.count(widest) - (short and parts[-1] == widest)
        step = widest * lanes
        self.code.loop(0, whole * step, step, lambda i, _: body(self._moved(at, axis, i), [lanes] * widest))
        done = whole * step
        for part in parts[whole:]:
            held = [min(lanes, axis.size - done - k * lanes) for k in range(part)]
            body(self._moved(at, axis, done), held)
            done += part * lanes

    def _down(self, at: Places, vectors: int, body: Callable[[Places, int], None]) -> None:
        """Write all rows, as many at a time as registers permit in addition to ``vectors``."""
        axis, most = self.product.down, max_rows(self.emitter.target, vectors * (2 if self.zipped else 1))
        if axis is None:
            return body(at, 1)

        def tiles(start: Int, stop: Int, rows: int) -> None:
            self.code.loop(start, stop, rows, lambda i, _: body(self._moved(at, axis, i), rows))

        if axis.size:
            parts = _even(axis.size, most)
            whole = parts.count(parts[0]) * parts[0]
            tiles(0, whole, parts[0])
            if whole < axis.size:
                tiles(whole, axis.size, axis.size - whole)
            return None
        # As many rows as divide the usual number of tokens, if these are not too few; then fewer for the last tokens.
        least = 2 if any(out.element == "i32" and not out.zipped for out in self.out) else 1
        sizes = range(most - most % least, 0, -least)
        most = next((n for n in sizes if self.emitter.block % n == 0 and 2 * n > most), sizes[0])
        start: Int = 0
        for rows in dict.fromkeys((most, 4, least)):
            if rows <= most:
                stop = self.code.add(start, self.code.whole(self.code.subtract(self.tokens, start), rows))
                tiles(start, stop, rows)
                start = stop
        return None

    def _tile(self, at: Places, rows: int, lanes: Sequence[int]) -> None:
        """Write the sums of rows and vectors; those of two tiles at once if they are to be zipped."""
        if self.emitter.ahead is not None:
            self.emitter.ahead()
        emitter, code, width = self.emitter, self.code, self.emitter.lanes
        down, apart = self._strides(self.product.down), self._strides(self.zipped)
        cells = [(z, r, k) for z in range(2 if self.zipped else 1) for r in range(rows) for k in range(len(lanes))]

        def place(which: str, start: Int, z: int, r: int, k: int) -> Int:
            return code.add(self._offset(which, start, (z, apart), (r, down)), k * width)

        if self.bias is not None:
            sums = [emitter.load(self.bias, place("bias", at.bias, *cell), lanes[cell[2]]) for cell in cells]
        elif self.add:
            sums = [emitter.load(self.out[0], place("out", at.out, *cell), lanes[cell[2]]) for cell in cells]
        else:
            sums = ["zeroinitializer"] * len(cells)
        spread = emitter.spread_pair if self.paired else emitter.spread

        def turn(vector: Int, single: Int, sums: Values) -> Values:
            found, vectors, number = list(sums), [""] * len(lanes), ""
            for here, (z, r, k) in enumerate(cells):
                if r == 0:
                    vectors[k] = self._load(self.vector, place("vector", vector, z, 0, k), lanes[k])
                if self.product.both:
                    number = self._load(self.single, place("single", single, z, r, k), lanes[k])
                elif k == 0:
                    number = spread(self.single, place("single", single, z, r, 0))
                found[here] = self._multiply_add(number, vectors[k], found[here])
            return found

        sums = self._sum(self.product.summed, at.vector, at.single, sums, turn)
        beside, below = rows * len(lanes), len(lanes)  # to the cell of the other tile, and of the next row
        for out in self.out:
            for here, (z, r, k) in enumerate(cells):
                if out.zipped:
                    if z == 0:
                        both = sums[here], sums[here + beside]
                        emitter.store_pairs(out, place("zipped", at.zipped, 0, r, k), both, lanes[k])
                elif out.element == "i32":
                    if r % 2 == 0:
                        both = sums[here], sums[here + below]
                        emitter.store_pairs(out, place("pair", at.pair, z, r, k), both, lanes[k])
                else:
                    emitter.store(out, place("out", at.out, z, r, k), sums[here], lanes[k])

    def _sum(
        self, axes: Sequence[Axis], vector: Int, single: Int, sums: Values, turn: Callable[[Int, Int, Values], Values]
    ) -> Values:  # fmt: skip
        """Return the loops over summed axes, with the sums in registers; the innermost is unrolled."""
        if not axes:
            return turn(vector, single, sums)
        code, (axis, *rest) = self.code, axes
        by = self._strides(axis)
        unrolled = 1
        if not rest and axis.size:
            unrolled = next(n for n in range(UNROLLED, 0, -1) if axis.size % n == 0)

        def body(i: Int, sums: Values) -> Values:
            v, s = code.add(vector, code.multiply(i, by.vector)), code.add(single, code.multiply(i, by.single))
            for u in range(unrolled):
                ahead = code.add(v, code.multiply(u, by.vector)), code.add(s, code.multiply(u, by.single))
                sums = self._sum(rest, *ahead, sums, turn)
            return sums

        return code.loop(0, self._size(axis), unrolled, body, sums, self.emitter.vector, once=True)

    # -- vectors along a summed axis -----------------------------------------------------------------------------------

    def _dots(self, at: Places) -> None:
        down, along, target = self.product.down, self.product.along, self.emitter.target
        assert along is not None

        def columns(at: Places, rows: int, most: int) -> None:
            for starts, count in _runs(along.size, most):

                def tile(i: Int, _: Values, count: int = count) -> None:
                    self._dot(self._moved(at, along, i), rows, count)

                self.code.loop(starts.start, starts.stop, count, tile)

        single = dot_tile(target, True)[1]
        if down is None:
            return columns(at, 1, single)

        def tiles(start: Int, stop: Int, rows: int, most: int) -> None:
            self.code.loop(start, stop, rows, lambda i, _: columns(self._moved(at, down, i), rows, most))

        most, widest = dot_tile(target, False)
        if down.size:
            for starts, count in _runs(down.size, most):
                tiles(starts.start, starts.stop, count, widest)
        else:
            whole = self.code.whole(self.tokens, most)
            tiles(0, whole, most, widest)
            tiles(whole, self.tokens, 1, single)
        return None

    def _dot(self, at: Places, rows: int, columns: int) -> None:
        product, emitter, code = self.product, self.emitter, self.code
        assert product.along is not None
        down, along = self._strides(product.down), self._strides(product.along)
        size, width = product.across.size, emitter.lanes

        def place(which: str, start: Int, r: int, c: int) -> Int:
            return self._offset(which, start, (r, down), (c, along))

        def turn(vector: Int, single: Int, sums: Values) -> Values:
            def step(i: Int, sums: Values, parts: Sequence[int]) -> Values:
                """Add the products of vectors with ``parts`` lanes, one column after the other, as in memory."""
                found, v = list(sums), code.add(vector, i)
                starts = range(0, width * len(parts), width)
                left = [
                    [self._load(self.single, code.add(place("single", code.add(single, i), r, 0), k), lanes)
                     for k, lanes in zip(starts, parts, strict=True)]
                    for r in range(rows)
                ]  # fmt: skip
                for c in range(columns):
                    for number, (k, lanes) in enumerate(zip(starts, parts, strict=True)):
                        right = self._load(self.vector, code.add(place("vector", v, 0, c), k), lanes)
                        for r in range(rows):
                            here = r * columns + c
                            found[here] = self._multiply_add(left[r][number], right, found[here])
                return found

            together = TOGETHER * width if rows == 1 else width
            whole, short = size // together * together, size % width
            sums = code.loop(0, whole, together, lambda i, held: step(i, held, [width] * (together // width)), sums,
                             emitter.vector)  # fmt: skip
            rest = [width] * ((size - whole) // width) + ([short] if short else [])
            return step(whole, sums, rest) if rest else sums

        sums = self._sum(product.summed, at.vector, at.single, ["zeroinitializer"] * (rows * columns), turn)
        wide = min(1 << (columns - 1).bit_length(), width)  # sums of a row that become one vector
        for c in range(0, columns, wide):
            count = min(wide, columns - c)
            for r in range(0, rows, width // wide):
                some = range(r, min(rows, r + width // wide))
                cells = [s * columns + c + k if k < count else -1 for s in some for k in range(wide)]
                totals = emitter.totals([sums[cell] if cell >= 0 else "zeroinitializer" for cell in cells])
                together = count if product.along.out == 1 else 1  # sums that are neighbours in memory
                for s in some:
                    for k in range(0, count, together):
                        total = emitter.lanes_of(totals, (s - r) * wide + k, together)
                        self._put(total, together, place("out", at.out, s, c + k), place("bias", at.bias, s, c + k))

    def _put(self, value: str, size: int, here: Int, at_bias: Int) -> None:
        """Store some sums, plus bias or what is there."""
        emitter, before = self.emitter, None
        if self.bias is not None:
            before = emitter.load_some(self.bias, at_bias, size)
        elif self.add:
            before = emitter.load_some(self.out[0], here, size)
        if before is not None:
            value = emitter.sum_of(before, value, size)
        for out in self.out:
            emitter.store_some(out, here, value, size)


def _runs(total: int, most: int) -> list[tuple[range, int]]:
    """Return ranges of starts of tiles of equal size, with the size."""
    parts = _even(total, most)
    whole = parts.count(parts[0]) * parts[0]
    found = [(range(0, whole), parts[0])]
    return found if whole == total else [*found, (range(whole, total), total - whole)]


def _even(total: int, most: int) -> list[int]:
    """Return the fewest parts of ``total`` of at most ``most`` each, of equal size except for the last."""
    size = math.ceil(total / math.ceil(total / most))
    return [size] * (total // size) + ([total % size] if total % size else [])
