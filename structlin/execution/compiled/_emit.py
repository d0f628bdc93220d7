"""Vectors, single numbers and rows of arrays in memory, as instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._target import Target

BITS = {"bfloat": "i16", "half": "i16"}  # as what numbers are loaded and stored that nothing is computed with


@dataclass(frozen=True)
class Memory:
    """The start of an array, and the type of its elements (``bfloat`` and ``half`` are converted to ``float``).

    An array of activations in ``i32`` holds the numbers of two tokens in bfloat16, side by side: half as many rows.
    Where it is ``zipped`` they are those of two items of an axis.
    """

    pointer: str
    element: str
    zipped: bool = False


class Emitter:
    """Writes products for a target and a type to compute in."""

    def __init__(self, code: Code, target: Target, element: str, tokens: Int, block: int) -> None:
        self.code, self.target, self.element, self.tokens, self.block = code, target, element, tokens, block
        self.even = code.whole(code.add(tokens, 1), 2)
        self.lanes = target.width // BYTES[element]
        self.short = {"float": "f32", "double": "f64", "bfloat": "i16", "half": "i16", "i32": "i32", "i64": "i64"}
        self.vector = f"<{self.lanes} x {element}>"
        self.ahead: Callable[[], None] | None = None  # asks for memory that is used later; for each tile of a product

    # -- memory --------------------------------------------------------------------------------------------------------

    def load(self, at: Memory, offset: Int, lanes: int, mask: tuple[str, str] | None = None) -> str:
        """Return a vector; beyond ``lanes``, or else where a ``mask`` is false, it is 0, and nothing is read there."""
        kind = f"<{self.lanes} x {BITS.get(at.element, at.element)}>"
        pointer = self.code.at(at.element, at.pointer, offset)
        if lanes == self.lanes and mask is None:
            found = self.code.value(f"load {kind}, ptr {pointer}, align {BYTES[at.element]}")
        else:
            name = f"llvm.masked.load.v{self.lanes}{self.short[at.element]}.p0"
            there = mask or self._mask(lanes)
            found = self.code.call(
                kind, name, ("ptr", pointer), ("i32", BYTES[at.element]), there, (kind, "zeroinitializer")
            )
        return found if at.element in (self.element, "i32") else self._widened(found, self.lanes, at.element)

    def store(self, at: Memory, offset: Int, value: str, lanes: int, mask: tuple[str, str] | None = None) -> None:
        kind = f"<{self.lanes} x {BITS.get(at.element, at.element)}>"
        pointer = self.code.at(at.element, at.pointer, offset)
        if at.element not in (self.element, "i32"):
            value = self._narrowed(value, self.lanes, at.element)
        if lanes == self.lanes and mask is None:
            self.code.put(f"store {kind} {value}, ptr {pointer}, align {BYTES[at.element]}")
        elif self.target.width == 32 and mask is None:  # AVX2, whose masked stores are slow on processors of AMD
            part = f"<{lanes} x {BITS.get(at.element, at.element)}>"
            some = ", ".join(f"i32 {k}" for k in range(lanes))
            part_of = self.code.value(f"shufflevector {kind} {value}, {kind} poison, <{lanes} x i32> <{some}>")
            self.code.put(f"store {part} {part_of}, ptr {pointer}, align {BYTES[at.element]}")
        else:
            name = f"llvm.masked.store.v{self.lanes}{self.short[at.element]}.p0"
            there = mask or self._mask(lanes)
            self.code.call("void", name, (kind, value), ("ptr", pointer), ("i32", BYTES[at.element]), there)

    def store_two(self, at: Memory, offset: Int, vectors: tuple[str, str]) -> None:
        """Store two whole vectors, one after the other."""
        if at.element != "bfloat" or not self._converts_two:
            for k, vector in enumerate(vectors):
                self.store(at, self.code.add(offset, k * self.lanes), vector, self.lanes)
            return
        pointer = self.code.at(at.element, at.pointer, offset)
        self.code.put(f"store <{2 * self.lanes} x bfloat> {self._both(vectors)}, ptr {pointer}, align 2")

    def store_pairs(self, at: Memory, offset: Int, rows: tuple[str, str], lanes: int) -> None:
        """Store two vectors in bfloat16, interleaved."""
        order = ", ".join(f"i32 {k}, i32 {k + self.lanes}" for k in range(self.lanes))
        if self._converts_two:
            kind = f"<{2 * self.lanes} x bfloat>"
            both, kind = f"{kind} {self._both(rows)}, {kind} poison", "bfloat"
        else:
            short = [f"<{self.lanes} x i16> {self._narrowed(row, self.lanes, 'bfloat')}" for row in rows]
            both, kind = ", ".join(short), "i16"
        joined = self.code.value(f"shufflevector {both}, <{2 * self.lanes} x i32> <{order}>")
        whole = self.code.value(f"bitcast <{2 * self.lanes} x {kind}> {joined} to <{self.lanes} x i32>")
        self.store(at, offset, whole, lanes)

    @property
    def _converts_two(self) -> bool:
        """Whether one instruction converts two vectors of float32 to bfloat16."""
        return self.target.half_products and self.element == "float"

    def _both(self, vectors: tuple[str, str]) -> str:
        name = f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * self.lanes}"
        first, second = ((self.vector, vector) for vector in vectors)
        return self.code.call(f"<{2 * self.lanes} x bfloat>", name, second, first)

    def load_some(self, at: Memory, offset: Int, count: int) -> str:
        """Return some neighbours, as a vector of this length; a single one as a number."""
        pointer = self.code.at(at.element, at.pointer, offset)
        kind = _of(count, BITS.get(at.element, at.element))
        found = self.code.value(f"load {kind}, ptr {pointer}, align {BYTES[at.element]}")
        return found if at.element == self.element else self._widened(found, count, at.element)

    def store_some(self, at: Memory, offset: Int, value: str, count: int) -> None:
        if at.element != self.element:
            value = self._narrowed(value, count, at.element)
        pointer = self.code.at(at.element, at.pointer, offset)
        kind = _of(count, BITS.get(at.element, at.element))
        self.code.put(f"store {kind} {value}, ptr {pointer}, align {BYTES[at.element]}")

    def lanes_of(self, vector: str, first: int, count: int) -> str:
        """Return some lanes as a shorter vector; a single one as a number."""
        if count == 1:
            return self.code.value(f"extractelement {self.vector} {vector}, i64 {first}")
        return self._shuffled(vector, vector, range(first, first + count))

    def sum_of(self, a: str, b: str, count: int) -> str:
        return self.code.value(f"fadd {_of(count, self.element)} {a}, {b}")

    def totals(self, vectors: Sequence[str]) -> str:
        """Return a vector whose lane k is the sum of the lanes of vector k; of at most as many vectors as lanes.

        Each pass adds, of each two vectors, the lanes that differ in one bit of their number, and keeps the sums of the
        first one where the bit is 0, of the second one where it is 1. So half as many vectors are left, and their sums
        are in order. It takes a third of the instructions of one sum after the other.
        """
        size, lanes = 1, range(self.lanes)
        while size < self.lanes:
            pairs = [(a, b) for a, b in zip(vectors[::2], [*vectors[1::2], "zeroinitializer"], strict=False)]
            if len(vectors) == 1:
                pairs = [(vectors[0], vectors[0])]
            vectors = [
                self.sum_of(
                    self._shuffled(a, b, [k + (self.lanes if k & size else 0) for k in lanes]),
                    self._shuffled(a, b, [(k ^ size) + (self.lanes if k & size else 0) for k in lanes]),
                    self.lanes,
                )
                for a, b in pairs
            ]
            size *= 2
        return vectors[0]

    def _shuffled(self, a: str, b: str, order: Sequence[int]) -> str:
        chosen = ", ".join(f"i32 {k}" for k in order)
        two = f"{self.vector} {a}, {self.vector} {b}"
        return self.code.value(f"shufflevector {two}, <{len(order)} x i32> <{chosen}>")

    def _widened(self, value: str, lanes: int, element: str) -> str:
        """Return as float32 what these 16 bits are in ``element``; bfloat16 has the upper bits of float32."""
        i16, i32, float32 = (_of(lanes, kind) for kind in ("i16", "i32", "float"))
        if element == "half":
            half = _of(lanes, element)
            return self.code.value(f"fpext {half} {self.code.value(f'bitcast {i16} {value} to {half}')} to {float32}")
        wide = self.code.value(f"zext {i16} {value} to {i32}")
        return self.code.value(f"bitcast {i32} {self.code.value(f'shl {i32} {wide}, {_all(lanes, 16)}')} to {float32}")

    def _narrowed(self, value: str, lanes: int, element: str) -> str:
        """Return float32 as the bits of bfloat16 or float16, rounded to the nearest, ties to even.

        A NaN stays one, and becomes quiet. Where the processor has no instruction for bfloat16, LLVM calls a function
        that no library of the process need have; integers do the same. That instruction takes subnormal numbers for
        zero. All targets have one for float16.
        """
        code, (i16, bits16, i32, float32) = self.code, (_of(lanes, kind) for kind in ("i16", element, "i32", "float"))
        if element == "half" or self.target.half_products:
            return code.value(f"bitcast {bits16} {code.value(f'fptrunc {float32} {value} to {bits16}')} to {i16}")

        def do(operation: str, first: str, second: str) -> str:
            return code.value(f"{operation} {i32} {first}, {second}")

        bits = code.value(f"bitcast {float32} {value} to {i32}")
        upper = do("lshr", bits, _all(lanes, 16))
        # Half of the last place that is kept, less one where that is even: the sum carries into it if it is to grow.
        half = do("add", do("and", upper, _all(lanes, 1)), _all(lanes, 0x7FFF))
        rounded, quiet = do("lshr", do("add", bits, half), _all(lanes, 16)), do("or", upper, _all(lanes, 0x40))
        is_nan = code.value(f"fcmp uno {float32} {value}, {value}")
        found = code.value(f"select {_of(lanes, 'i1')} {is_nan}, {i32} {quiet}, {i32} {rounded}")
        return code.value(f"trunc {i32} {found} to {i16}")

    def spread(self, at: Memory, offset: Int) -> str:
        """Return a number in all lanes."""
        return self._spread(self.load_some(at, offset, 1), self.element)

    def spread_pair(self, at: Memory, offset: Int) -> str:
        """Return two neighbours of 16 bits, repeated in all lanes."""
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
        """Return each lane of float32 plus the products of two pairs of bfloat16."""
        name, kind = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", f"<{2 * self.lanes} x bfloat>"
        return self.code.call(self.vector, name, (self.vector, c), (kind, a), (kind, b))

    def _mask(self, lanes: int) -> tuple[str, str]:
        bits = ", ".join(f"i1 {'true' if k < lanes else 'false'}" for k in range(self.lanes))
        return f"<{self.lanes} x i1>", f"<{bits}>"

    # -- rows ----------------------------------------------------------------------------------------------------------

    def copy(
        self, source: Memory, stride: int, target: Memory, to_stride: int, width: int, wanted: int, even: bool = False
    ) -> None:  # fmt: skip
        """Load the rows of all tokens; elements from ``width`` up to ``wanted`` are set to 0.

        ``even``: after an odd number of tokens, one of zeros follows, as it always does where the target has pairs.
        """
        same = source.element == target.element and source.element in BITS
        if same and not any(n % 2 for n in (stride, to_stride, width, wanted)):
            # Nothing is converted: two numbers are copied as one.
            ends = [Memory(end.pointer, "float") for end in (source, target)]
            return self.copy(ends[0], stride // 2, ends[1], to_stride // 2, width // 2, wanted // 2, even)
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
        return None

    def zip(
        self, source: Memory, stride: int, target: Memory, to_stride: int, width: int, axis: tuple[int, int],
        even: bool = False,
    ) -> None:  # fmt: skip
        """Load the rows of all tokens, with two neighbours along an axis of this size and stride side by side.

        Each pair is where the numbers would be of the item that is half as far along the axis. ``even``: as in
        :meth:`copy`.
        """
        code, (size, inside) = self.code, axis

        def row(clear: bool, number: Int) -> None:
            start, to = code.multiply(number, stride), code.multiply(number, to_stride)

            def pair(at: Int, p: Int) -> None:
                first = code.add(code.add(start, at), code.multiply(p, 2 * inside))
                there = code.add(code.add(to, at), code.multiply(p, inside))

                def vector(k: Int, lanes: int) -> None:
                    place = code.add(there, k)
                    if clear:
                        return self.store(target, place, "zeroinitializer", lanes)
                    held = [self.load(source, code.add(first, code.add(k, more)), lanes) for more in (0, inside)]
                    return self.store_pairs(target, place, (held[0], held[1]), lanes)

                code.parts(inside, self.lanes, vector)

            def pairs(at: Int, _: Values) -> None:
                code.loop(0, size // 2, 1, lambda p, _: pair(at, p))

            code.loop(0, width, size * inside, pairs)

        code.loop(0, self.tokens, 1, lambda number, _: row(False, number))
        if even:
            code.loop(self.tokens, self.even, 1, lambda number, _: row(True, number))

    def add_rows(self, source: Memory, stride: int, target: Memory, width: int) -> None:
        """Add the rows of all tokens to one row of ``width`` numbers, some vectors at a time."""
        code, together = self.code, 4

        def vectors(k: Int, lanes: Sequence[int]) -> None:
            places = [code.add(k, number * self.lanes) for number in range(len(lanes))]
            sums = [self.load(target, place, there) for place, there in zip(places, lanes, strict=True)]

            def row(number: Int, sums: Values) -> Values:
                start, found = code.multiply(number, stride), []
                for held, place, there in zip(sums, places, lanes, strict=True):
                    more = self.load(source, code.add(start, place), there)
                    found.append(code.value(f"fadd {self.vector} {held}, {more}"))
                return found

            sums = code.loop(0, self.tokens, 1, row, sums, self.vector, once=True)
            for held, place, there in zip(sums, places, lanes, strict=True):
                self.store(target, place, held, there)

        step = together * self.lanes
        whole = width // step * step
        code.loop(0, whole, step, lambda k, _: vectors(k, [self.lanes] * together))
        for k in range(whole, width, self.lanes):
            vectors(k, [min(self.lanes, width - k)])

    # -- columns -------------------------------------------------------------------------------------------------------

    def from_columns(self, source: Memory, total: Int, target: Memory, stride: int, width: int, wanted: int) -> None:
        """Copy as :meth:`copy` does, from an array where the numbers of a token are ``total`` apart.

        They come as many at a time as a vector has lanes; those that are not there become 0.
        """
        code, lanes = self.code, self.lanes

        def square(first: Int, mask: tuple[str, str], k: Int, there: int, kept: int) -> None:
            held = []
            for r in range(lanes):
                place = code.add(code.multiply(code.add(k, r), total), first)
                held.append(self.load(source, place, lanes, mask) if r < there else "zeroinitializer")
            for r, row in enumerate(self.transposed(held)):
                self.store(target, code.add(code.multiply(code.add(first, r), stride), k), row, kept)

        def tokens(first: Int, _: Values) -> None:
            mask, whole = self._active(first), width // lanes * lanes
            code.loop(0, whole, lanes, lambda k, _: square(first, mask, k, lanes, lanes))
            for k in range(whole, wanted, lanes):
                square(first, mask, k, width - k, min(lanes, wanted - k))

        code.loop(0, self.tokens, lanes, tokens)

    def to_columns(self, source: Memory, stride: int, target: Memory, total: Int, width: int) -> None:
        """Invert :meth:`from_columns`, for the first ``width`` numbers of each row."""
        code, lanes = self.code, self.lanes

        def square(first: Int, mask: tuple[str, str], k: Int, count: int) -> None:
            held = [
                self.load(source, code.add(code.multiply(code.add(first, r), stride), k), count) for r in range(lanes)
            ]
            for r, row in enumerate(self.transposed(held)[:count]):
                self.store(target, code.add(code.multiply(code.add(k, r), total), first), row, lanes, mask)

        def tokens(first: Int, _: Values) -> None:
            mask = self._active(first)
            code.parts(width, lanes, lambda k, count: square(first, mask, k, count))

        code.loop(0, self.tokens, lanes, tokens)

    def _active(self, first: Int) -> tuple[str, str]:
        """Return the lanes of tokens that are there."""
        name, kind = f"llvm.get.active.lane.mask.v{self.lanes}i1.i64", f"<{self.lanes} x i1>"
        return kind, self.code.call(kind, name, ("i64", first), ("i64", self.tokens))

    def transposed(self, rows: list[str]) -> list[str]:
        """Return a square of vectors, by shuffling each with the one half the square away, as often as halves fit."""
        count = len(rows)
        for _ in range(count.bit_length() - 1):
            found = []
            for first, second in zip(rows[: count // 2], rows[count // 2 :], strict=True):
                for start in (0, count // 2):
                    order = [k + other for k in range(start, start + count // 2) for other in (0, count)]
                    found.append(self._shuffled(first, second, order))
            rows = found
        return rows


def _of(lanes: int, kind: str) -> str:
    """Return the type of a number, or of a vector."""
    return kind if lanes == 1 else f"<{lanes} x {kind}>"


def _all(lanes: int, number: int) -> str:
    """Return a constant in all lanes."""
    return str(number) if lanes == 1 else f"splat (i32 {number})"
