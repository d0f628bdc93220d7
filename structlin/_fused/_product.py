"""One product of three strided arrays, ``out[...] (+)= sum left[...] * right[...]``, as a loop nest around a tile.

The tile of ``out`` is held in registers while all summed axes are run through: some vectors along one axis, whose
numbers are neighbours in memory, times some rows along another. Each turn of the innermost loop loads a few vectors of
one operand, spreads one number of the other for each row, and multiplies and adds. So a number that is loaded is used
for a whole row or column of the tile, and if the arrays are in cache the units that multiply are what limits the speed.

Where no axis of ``out`` lies next to each other in an operand too, the vectors run along a summed axis: each number of
the tile is then a vector of partial sums, which are added up in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from structlin._fused._ir import Code, Int, Values
from structlin._fused._target import Target

TOKENS = "*"
VECTORS = 3  # along a row of the tile, at most: with 9 rows they are loaded the least, with 32 registers
UNROLLED = 4
BLOCK = 36  # tokens, about: what a block's sums of partial sums are shared by
NEAR = 16  # elements, about a cache line
BYTES = {"float": 4, "double": 8, "bfloat": 2, "i32": 4}
Strides = Mapping[str, int]  # of the axes that an array has, in elements


@dataclass(frozen=True)
class Axis:
    """Size (0: as many as there are tokens) and the strides in the three arrays, None where one does not have it."""

    size: int
    out: int | None
    left: int | None
    right: int | None

    @property
    def strides(self) -> tuple[int | None, int | None, int | None]:
        return self.out, self.left, self.right


@dataclass(frozen=True)
class Product:
    """The axes of a product by what the loops do with them.

    ``across``: the axis of the vectors. ``swapped``: it is the left operand that is read in vectors, not the right one;
    ``both``: both are. ``down``: the axis of the rows of the tile, if any. ``along``: that of its columns, where
    ``across`` is summed. ``paired``: see :meth:`pairs`. ``summed``, ``outer`` and ``near``: outermost first. The loops
    over ``near`` run inside of that over rows: along these axes neighbours share cache lines.
    """

    across: Axis
    down: Axis | None
    summed: tuple[Axis, ...]
    outer: tuple[Axis, ...]
    near: tuple[Axis, ...]
    swapped: bool = False
    both: bool = False
    along: Axis | None = None
    paired: bool = False

    def pairs(self) -> Product | None:
        """The same with numbers of 16 bits, of which a product takes two neighbours along the innermost summed axis.

        The operand that is read number by number (left) has them side by side; of the other one pairs are the elements,
        in the order of axes that its numbers had. None where that is not so.
        """
        if not self.summed or self.along is not None or self.swapped or self.both:
            return None
        last = self.summed[-1]
        if last.left != 1 or last.size == 0 or last.size % 2 or last.right != self.across.size:
            return None

        def halved(axis: Axis) -> Axis:
            return replace(axis, right=None if axis.right is None else axis.right // 2)

        summed = (*map(halved, self.summed[:-1]), replace(last, size=last.size // 2, left=2))
        return replace(
            self, summed=summed, outer=tuple(map(halved, self.outer)), near=tuple(map(halved, self.near)), paired=True
        )

    @property
    def stores_pairs(self) -> bool:
        """Whether the rows of a tile are tokens, so that two of them can be stored side by side."""
        return self.along is None and self.down is not None and self.down.size == 0

    def cost(self, target: Target, element: str) -> float:
        """Estimated instructions for one token: loads, and multiplications of vectors with their unused lanes."""
        lanes = target.width // BYTES[element]
        vectors = math.ceil(self.across.size / lanes)
        if self.along is not None:
            return self._dot_cost(target, vectors, self.along)
        wide = min(vectors, VECTORS)
        rows = max_rows(target, wide)
        if self.down is None:
            rows = 1
        elif self.down.size:
            rows = min(rows, self.down.size)
        turns = math.prod(a.size or 1 for a in self.summed)
        count = (
            vectors
            * turns
            * math.prod(a.size or 1 for a in (*self.outer, *self.near, *([self.down] if self.down else ())))
        )
        spread = 0 if self.both else 1 / wide
        ends = (2 if any(a.size == 0 for a in self.summed) else 1) / turns
        return count * (max(1, 4 / (wide * rows)) + 0.5 * (spread + 1 / rows) + ends)

    def _dot_cost(self, target: Target, vectors: int, along: Axis) -> float:
        rows, columns = dot_tile(target, self.down is None)
        rows, columns = min(self.down.size if self.down else 1, rows), min(along.size, columns)
        turns = vectors * math.prod(a.size or 1 for a in self.summed)
        sums = math.prod(a.size or 1 for a in (*self.outer, along, *([self.down] if self.down else ())))
        ends = 6 / (BLOCK if any(a.size == 0 for a in self.summed) else 1)
        return sums * (turns * (max(1, 4 / (rows * columns)) + 0.5 / rows + 0.5 / columns) + ends)


def dot_tile(target: Target, single: bool) -> tuple[int, int]:
    """Rows and columns of a tile whose numbers are vectors; ``single``: there is but one row."""
    many = target.registers >= 32
    return (1, 12 if many else 6) if single else ((6, 4) if many else (3, 3))


def max_rows(target: Target, vectors: int) -> int:
    """Rows of a tile: the sums, a row's vectors and a spread number fill the registers."""
    most = (target.registers - 1) // vectors - 1
    return max(n for n in (4, 6, 9, 12) if n <= most)


def make_products(sizes: Mapping[str, int], out: Strides, left: Strides, right: Strides) -> list[Product]:
    """The ways to give each axis its part. Axes that lie in memory as one become one."""
    names = [a for a in dict.fromkeys((*out, *left, *right)) if a == TOKENS or sizes[a] > 1]
    axes = _merged([Axis(0 if a == TOKENS else sizes[a], out.get(a), left.get(a), right.get(a)) for a in names])
    found = []
    first = next((a for a in axes if a.out == 1 and a.size), None)
    if first is None:  # single numbers of each operand
        found.append(_with_vectors(axes, Axis(1, 1, None, 1)))
    elif first.left in (None, 1) and first.right in (None, 1):
        found.append(_with_vectors(axes, first))
    for axis in axes:
        if not (axis.size and axis.out is None and axis.left == axis.right == 1):
            continue
        rows, columns = (
            max(
                (a for a in axes if a.size and a.out is not None and (a.right, a.left)[k] is None),
                key=_size,
                default=None,
            )
            for k in range(2)
        )
        if columns is not None:
            found.append(_with_dots(axes, axis, rows, columns, False))
        elif rows is not None:
            found.append(_with_dots(axes, axis, None, rows, True))
    return found


def _size(axis: Axis) -> float:
    return axis.size or math.inf


def _with_vectors(axes: Sequence[Axis], across: Axis) -> Product:
    rest = [a for a in axes if a is not across]
    both = across.left is not None and across.right is not None
    swapped = any(a.size == 0 and a.right is not None for a in axes) if both else across.right is None

    def stride(a: Axis) -> int:
        return (a.right if swapped else a.left) or 0

    rows = [a for a in rest if a.out is not None and stride(a) and (a.left if swapped else a.right) is None]
    down = max(rows, key=_size, default=None)
    rest = [a for a in rest if a is not down]
    outer = _ordered([a for a in rest if a.out is not None])
    near = [a for a in outer if 0 < stride(a) < NEAR] if down is not None else []
    summed = sorted((a for a in rest if a.out is None), key=stride, reverse=True)
    return Product(across, down, tuple(summed), tuple(a for a in outer if a not in near), tuple(near), swapped, both)


def _with_dots(axes: Sequence[Axis], across: Axis, down: Axis | None, along: Axis, swapped: bool) -> Product:
    rest = [a for a in axes if a not in (across, down, along)]
    outer = _ordered([a for a in rest if a.out is not None])
    summed = sorted((a for a in rest if a.out is None), key=lambda a: a.left or 0, reverse=True)
    return Product(across, down, tuple(summed), tuple(outer), (), swapped, along=along)


def _ordered(axes: list[Axis]) -> list[Axis]:
    return sorted(axes, key=lambda a: (a.size == 0, a.out or 0), reverse=True)


def _merged(axes: list[Axis]) -> list[Axis]:
    for first in axes:
        for second in axes:
            if first is second or not first.size or not second.size:
                continue
            pairs = list(zip(first.strides, second.strides, strict=True))
            if all(
                (a is None and b is None) or (a is not None and b is not None and a == b * second.size)
                for a, b in pairs
            ):
                joined = Axis(first.size * second.size, *second.strides)
                return _merged([joined, *(a for a in axes if a is not first and a is not second)])
    return axes


@dataclass(frozen=True)
class Memory:
    """Where an array starts, and the type of its elements (``bfloat`` is computed with as ``float``).

    An array of activations in ``i32`` holds the numbers of two tokens in bfloat16, side by side: half as many rows.
    """

    pointer: str
    element: str


class Emitter:
    """Writes products for a target and a type to compute in."""

    def __init__(self, code: Code, target: Target, element: str, tokens: Int, block: int) -> None:
        self.code, self.target, self.element, self.tokens, self.block = code, target, element, tokens, block
        self.even = code.whole(code.add(tokens, 1), 2)
        self.lanes = target.width // BYTES[element]
        self.short = {"float": "f32", "double": "f64", "bfloat": "bf16", "i32": "i32"}
        self.vector = f"<{self.lanes} x {element}>"

    # -- memory --------------------------------------------------------------------------------------------------------

    def load(self, at: Memory, offset: Int, lanes: int) -> str:
        """A vector; beyond ``lanes`` it is 0, and nothing is read there."""
        kind = f"<{self.lanes} x {at.element}>"
        pointer = self.code.at(at.element, at.pointer, offset)
        if lanes == self.lanes:
            found = self.code.value(f"load {kind}, ptr {pointer}, align {BYTES[at.element]}")
        else:
            name = f"llvm.masked.load.v{self.lanes}{self.short[at.element]}.p0"
            found = self.code.call(
                kind, name, ("ptr", pointer), ("i32", BYTES[at.element]), self._mask(lanes), (kind, "zeroinitializer")
            )
        if at.element in (self.element, "i32"):
            return found
        return self.code.value(f"fpext {kind} {found} to {self.vector}")

    def store(self, at: Memory, offset: Int, value: str, lanes: int) -> None:
        kind = f"<{self.lanes} x {at.element}>"
        pointer = self.code.at(at.element, at.pointer, offset)
        if at.element not in (self.element, "i32"):
            value = self.code.value(f"fptrunc {self.vector} {value} to {kind}")
        if lanes == self.lanes:
            self.code.put(f"store {kind} {value}, ptr {pointer}, align {BYTES[at.element]}")
        else:
            name = f"llvm.masked.store.v{self.lanes}{self.short[at.element]}.p0"
            self.code.call("void", name, (kind, value), ("ptr", pointer), ("i32", BYTES[at.element]), self._mask(lanes))

    def store_pairs(self, at: Memory, offset: Int, rows: tuple[str, str], lanes: int) -> None:
        """Two vectors in bfloat16, number by number side by side."""
        kind = f"<{self.lanes} x bfloat>"
        short = [self.code.value(f"fptrunc {self.vector} {row} to {kind}") for row in rows]
        order = ", ".join(f"i32 {k}, i32 {k + self.lanes}" for k in range(self.lanes))
        both = f"{kind} {short[0]}, {kind} {short[1]}, <{2 * self.lanes} x i32> <{order}>"
        joined = self.code.value(f"shufflevector {both}")
        whole = self.code.value(f"bitcast <{2 * self.lanes} x bfloat> {joined} to <{self.lanes} x i32>")
        self.store(at, offset, whole, lanes)

    def number(self, at: Memory, offset: Int) -> str:
        pointer = self.code.at(at.element, at.pointer, offset)
        one = self.code.value(f"load {at.element}, ptr {pointer}, align {BYTES[at.element]}")
        return one if at.element == self.element else self.code.value(f"fpext {at.element} {one} to {self.element}")

    def put_number(self, at: Memory, offset: Int, value: str) -> None:
        if at.element != self.element:
            value = self.code.value(f"fptrunc {self.element} {value} to {at.element}")
        pointer = self.code.at(at.element, at.pointer, offset)
        self.code.put(f"store {at.element} {value}, ptr {pointer}, align {BYTES[at.element]}")

    def spread(self, at: Memory, offset: Int) -> str:
        """One number in all lanes."""
        one = self.number(at, offset)
        return self._spread(one, self.element)

    def spread_pair(self, at: Memory, offset: Int) -> str:
        """Two neighbours of 16 bits, again and again."""
        pointer = self.code.at(at.element, at.pointer, offset)
        align = BYTES[at.element]
        return self.as_pairs(self._spread(self.code.value(f"load i32, ptr {pointer}, align {align}"), "i32"))

    def as_pairs(self, vector: str) -> str:
        return self.code.value(f"bitcast <{self.lanes} x i32> {vector} to <{2 * self.lanes} x bfloat>")

    def _spread(self, one: str, element: str) -> str:
        kind, zeros = f"<{self.lanes} x {element}>", f"<{self.lanes} x i32> zeroinitializer"
        first = self.code.value(f"insertelement {kind} poison, {element} {one}, i64 0")
        return self.code.value(f"shufflevector {kind} {first}, {kind} poison, {zeros}")

    def multiply_add(self, a: str, b: str, c: str) -> str:
        name = f"llvm.fma.v{self.lanes}{self.short[self.element]}"
        return self.code.call(self.vector, name, (self.vector, a), (self.vector, b), (self.vector, c))

    def multiply_add_pairs(self, a: str, b: str, c: str) -> str:
        """Each lane of float32 plus the products of two pairs of bfloat16."""
        name, kind = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", f"<{2 * self.lanes} x bfloat>"
        return self.code.call(self.vector, name, (self.vector, c), (kind, a), (kind, b))

    def _mask(self, lanes: int) -> tuple[str, str]:
        bits = ", ".join(f"i1 {'true' if k < lanes else 'false'}" for k in range(self.lanes))
        return f"<{self.lanes} x i1>", f"<{bits}>"

    # -- loops ---------------------------------------------------------------------------------------------------------

    def copy(
        self, source: Memory, stride: int, target: Memory, to_stride: int, width: int, wanted: int, even: bool = False
    ) -> None:  # fmt: skip
        """The rows of all tokens; what is beyond ``width`` up to ``wanted`` is set to 0.

        ``even``: after an odd number of tokens, one of zeros follows, as it always does where the target has pairs.
        """
        code, last = self.code, self.code.whole(self.tokens, 2)

        def rows(count: int, clear: bool = False) -> Callable[[Int, Values], None]:
            """Copy that many rows, side by side if it is a pair; ``clear``: of the last one there is no source."""

            def move(number: Int, _: Values) -> None:
                to = code.multiply(code.value(f"lshr i64 {number}, 1") if pairs else number, to_stride)

                def vector(k: Int, lanes: int, there: int) -> None:
                    got = []
                    for r in range(count):
                        start = code.add(code.multiply(number, stride), code.add(r * stride, k))
                        gone = there <= 0 or (clear and r == count - 1)
                        got.append("zeroinitializer" if gone else self.load(source, start, there))
                    if pairs:
                        self.store_pairs(target, code.add(to, k), (got[0], got[1]), lanes)
                    else:
                        self.store(target, code.add(to, k), got[0], lanes)

                whole = width // self.lanes * self.lanes
                code.loop(0, whole, self.lanes, lambda k, _: vector(k, self.lanes, self.lanes))
                for k in range(whole, wanted, self.lanes):
                    vector(k, min(self.lanes, wanted - k), min(self.lanes, width - k))

            return move

        pairs = target.element == "i32"
        if pairs:
            code.loop(0, last, 2, rows(2))
            code.loop(last, self.tokens, 1, rows(2, clear=True))
        else:
            code.loop(0, self.tokens, 1, rows(1))
            if even:
                code.loop(self.tokens, self.even, 1, rows(1, clear=True))

    def product(
        self, product: Product, out: Sequence[Memory], left: Memory, right: Memory, *, add: bool = False,
        bias: Memory | None = None, tokens: Int | None = None,
    ) -> None:  # fmt: skip
        """Write the loops. ``out``: the same array, in one element type or several. ``add``: to what is in it.

        ``bias`` has the strides of ``out`` and no tokens. ``tokens``: how many, where other than all.
        """
        _Loops(self, product, out, left, right, add, bias, self.tokens if tokens is None else tokens).write()


@dataclass(frozen=True)
class _At:
    """Offsets into out, the operand read in vectors, and the one read number by number."""

    out: Int
    vector: Int
    single: Int
    bias: Int
    pair: Int  # into out, of two tokens


class _Loops:
    def __init__(
        self, emitter: Emitter, product: Product, out: Sequence[Memory], left: Memory, right: Memory, add: bool,
        bias: Memory | None, tokens: Int,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.emitter, self.code, self.product = emitter, emitter.code, product
        self.out, self.bias, self.add = out, bias, add
        self.vector, self.single = (left, right) if product.swapped else (right, left)

    def _strides(self, axis: Axis) -> tuple[int, int, int, int, int]:
        vector, single = (axis.left, axis.right) if self.product.swapped else (axis.right, axis.left)
        out, tokens = axis.out or 0, axis.size == 0
        return out, vector or 0, single or 0, 0 if tokens else out, out // 2 if tokens else out

    def _moved(self, at: _At, axis: Axis, index: Int) -> _At:
        places = (at.out, at.vector, at.single, at.bias, at.pair)
        moved = (
            self.code.add(p, self.code.multiply(index, s)) for p, s in zip(places, self._strides(axis), strict=True)
        )
        return _At(*moved)

    def _size(self, axis: Axis) -> Int:
        return axis.size or self.tokens

    def write(self) -> None:
        product, start = self.product, _At(0, 0, 0, 0, 0)
        if product.along is not None:
            self._each(product.outer, start, self._dots)
        elif product.near:  # rows, neighbours, vectors
            wide = _even(math.ceil(product.across.size / self.emitter.lanes), VECTORS)[0]

            def inside(at: _At, rows: int) -> None:
                self._each(product.near, at, lambda at: self._across(at, lambda at, held: self._tile(at, rows, held)))

            self._each(product.outer, start, lambda at: self._down(at, wide, inside))
        else:  # vectors, rows: what is read in vectors stays where it is for all rows

            def rows(at: _At, held: Sequence[int]) -> None:
                self._down(at, len(held), lambda at, rows: self._tile(at, rows, held))

            self._each(product.outer, start, lambda at: self._across(at, rows))

    def _each(self, axes: Sequence[Axis], at: _At, body: Callable[[_At], None]) -> None:
        if not axes:
            return body(at)
        first, *rest = axes

        def once(index: Int, _: Values) -> None:
            self._each(rest, self._moved(at, first, index), body)

        self.code.loop(0, self._size(first), 1, once, once=first.size == 0)
        return None

    def _across(self, at: _At, body: Callable[[_At, Sequence[int]], None]) -> None:
        """All vectors of a row, at most ``VECTORS`` at a time, in parts of about one size; the last may be short."""
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

    def _down(self, at: _At, vectors: int, body: Callable[[_At, int], None]) -> None:
        """All rows, as many at a time as there are registers for, beside ``vectors``."""
        axis, most = self.product.down, max_rows(self.emitter.target, vectors)
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
        # As many rows as divide the usual number of tokens, then fewer for the last tokens.
        least = 2 if any(out.element == "i32" for out in self.out) else 1
        most = max(n for n in range(least, most + 1, least) if self.emitter.block % n == 0)
        start: Int = 0
        for rows in dict.fromkeys((most, 4, least)):
            if rows <= most:
                stop = self.code.add(start, self.code.whole(self.code.subtract(self.tokens, start), rows))
                tiles(start, stop, rows)
                start = stop
        return None

    def _tile(self, at: _At, rows: int, lanes: Sequence[int]) -> None:
        emitter, code, width = self.emitter, self.code, self.emitter.lanes
        down = self._strides(self.product.down) if self.product.down else (0, 0, 0, 0, 0)

        def places(offset: Int, stride: int) -> list[list[Int]]:
            return [[code.add(offset, r * stride + k * width) for k in range(len(lanes))] for r in range(rows)]

        if self.bias is not None and not down[3]:
            row = [emitter.load(self.bias, code.add(at.bias, k * width), n) for k, n in enumerate(lanes)]
            sums = row * rows
        elif self.add or self.bias is not None:
            held, start = (
                (self.out[0], places(at.out, down[0])) if self.bias is None else (self.bias, places(at.bias, down[3]))
            )
            sums = [emitter.load(held, place, n) for row in start for place, n in zip(row, lanes, strict=True)]
        else:
            sums = ["zeroinitializer"] * (rows * len(lanes))

        paired = "i32" in (self.vector.element, self.single.element)
        multiply_add = emitter.multiply_add_pairs if paired else emitter.multiply_add

        def turn(vector: Int, single: Int, sums: Values) -> Values:
            found = list(sums)
            vectors = [emitter.load(self.vector, code.add(vector, k * width), n) for k, n in enumerate(lanes)]
            if paired:
                vectors = [emitter.as_pairs(v) for v in vectors]
            for r in range(rows):
                place = code.add(single, r * down[2])
                if not self.product.both:
                    numbers = [(emitter.spread_pair if paired else emitter.spread)(self.single, place)] * len(lanes)
                else:
                    numbers = [emitter.load(self.single, code.add(place, k * width), n) for k, n in enumerate(lanes)]
                    if paired:
                        numbers = [emitter.as_pairs(v) for v in numbers]
                for k, (number, other) in enumerate(zip(numbers, vectors, strict=True), start=r * len(lanes)):
                    found[k] = multiply_add(number, other, found[k])
            return found

        sums = self._sum(self.product.summed, at.vector, at.single, sums, turn)
        for r, starts in enumerate(places(at.out, down[0])):
            for k, (place, n) in enumerate(zip(starts, lanes, strict=True)):
                for out in self.out:
                    here = r * len(lanes) + k
                    if out.element != "i32":
                        emitter.store(out, place, sums[here], n)
                    elif r % 2 == 0:
                        pair = code.add(at.pair, r // 2 * down[0] + k * width)
                        emitter.store_pairs(out, pair, (sums[here], sums[here + len(lanes)]), n)

    def _sum(
        self, axes: Sequence[Axis], vector: Int, single: Int, sums: Values, turn: Callable[[Int, Int, Values], Values]
    ) -> Values:  # fmt: skip
        """The loops over summed axes, with the sums in registers; the innermost is unrolled."""
        if not axes:
            return turn(vector, single, sums)
        code, (axis, *rest) = self.code, axes
        _, by_vector, by_single, *_ = self._strides(axis)
        unrolled = 1
        if not rest and axis.size:
            unrolled = next(n for n in range(UNROLLED, 0, -1) if axis.size % n == 0)

        def body(i: Int, sums: Values) -> Values:
            v, s = code.add(vector, code.multiply(i, by_vector)), code.add(single, code.multiply(i, by_single))
            for u in range(unrolled):
                sums = self._sum(rest, code.add(v, u * by_vector), code.add(s, u * by_single), sums, turn)
            return sums

        return code.loop(0, self._size(axis), unrolled, body, sums, self.emitter.vector, once=True)

    # -- vectors along a summed axis -----------------------------------------------------------------------------------

    def _dots(self, at: _At) -> None:
        down, along = self.product.down, self.product.along
        assert along is not None
        most, widest = dot_tile(self.emitter.target, down is None)

        def columns(at: _At, rows: int) -> None:
            for starts, count in _runs(along.size, widest):

                def tile(i: Int, _: Values, count: int = count) -> None:
                    self._dot(self._moved(at, along, i), rows, count)

                self.code.loop(starts.start, starts.stop, count, tile)

        if down is None:
            return columns(at, 1)
        for starts, count in _runs(down.size, most):

            def row(i: Int, _: Values, count: int = count) -> None:
                columns(self._moved(at, down, i), count)

            self.code.loop(starts.start, starts.stop, count, row)
        return None

    def _dot(self, at: _At, rows: int, columns: int) -> None:
        product, emitter, code = self.product, self.emitter, self.code
        assert product.along is not None
        down, along = self._strides(product.down) if product.down else (0, 0, 0, 0, 0), self._strides(product.along)
        size, width = product.across.size, emitter.lanes
        paired = self.vector.element == "i32"
        multiply_add = emitter.multiply_add_pairs if paired else emitter.multiply_add

        def load(at: Memory, place: Int, lanes: int) -> str:
            found = emitter.load(at, place, lanes)
            return emitter.as_pairs(found) if paired else found

        def turn(vector: Int, single: Int, sums: Values) -> Values:
            def step(place: Int, sums: Values, lanes: int) -> Values:
                v, s = code.add(vector, place), code.add(single, place)
                right = [load(self.vector, code.add(v, c * along[1]), lanes) for c in range(columns)]
                found = []
                for r in range(rows):
                    left = load(self.single, code.add(s, r * down[2]), lanes)
                    for c in range(columns):
                        found.append(multiply_add(left, right[c], sums[r * columns + c]))
                return found

            whole = size // width * width
            sums = code.loop(0, whole, width, lambda i, held: step(i, held, width), sums, emitter.vector)
            return sums if whole == size else step(whole, sums, size - whole)

        sums = self._sum(product.summed, at.vector, at.single, ["zeroinitializer"] * (rows * columns), turn)
        kind = emitter.element
        for r in range(rows):
            for c in range(columns):
                name = f"llvm.vector.reduce.fadd.v{width}{emitter.short[kind]}"
                code.declarations.add(f"declare {kind} @{name}({kind}, {emitter.vector})")
                total = code.value(
                    f"call reassoc {kind} @{name}({kind} -0.0, {emitter.vector} {sums[r * columns + c]})"
                )
                place = code.add(at.out, r * down[0] + c * along[0])
                if self.bias is not None:
                    more = emitter.number(self.bias, code.add(at.bias, r * down[3] + c * along[3]))
                    total = code.value(f"fadd {kind} {more}, {total}")
                elif self.add:
                    total = code.value(f"fadd {kind} {emitter.number(self.out[0], place)}, {total}")
                for out in self.out:
                    emitter.put_number(out, place, total)


def _runs(total: int, most: int) -> list[tuple[range, int]]:
    """Ranges of starts of tiles of one size, and that size."""
    parts = _even(total, most)
    whole = parts.count(parts[0]) * parts[0]
    found = [(range(0, whole), parts[0])]
    return found if whole == total else [*found, (range(whole, total), total - whole)]


def _even(total: int, most: int) -> list[int]:
    """``total`` in parts of at most ``most``, as few as can be, of one size but for the last."""
    size = math.ceil(total / math.ceil(total / most))
    return [size] * (total // size) + ([total % size] if total % size else [])
