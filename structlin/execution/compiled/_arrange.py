"""Copies of an array in another order of its axes, for factors and their gradients.

If neighbours in the copy are not neighbours in the original, squares with the size of a vector are transposed in
registers, because a factor is copied for each pass and the copy must not take longer than the products of a few tokens.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._ir import Code, Int
from structlin.execution.compiled._target import Target, load

Body = Callable[[Int, Int], None]  # of the offsets in both arrays
FIRST, LAST, TOTAL = "%first", "%last", "%total"  # which shares of how many to copy


@dataclass(frozen=True)
class _Axis:
    """Size, and strides in elements. Where two neighbours become one element, size and ``to`` are of such pairs."""

    size: int
    start: int
    to: int
    paired: bool = False


@dataclass(frozen=True)
class Arrangement:
    """Arrays of ``shape`` with their axes in the order ``order``, or the other way round if ``back``.

    ``paired``: the last axes of the copy, so many numbers, follow one of even size, and are stored in pairs of it:
    ``(..., k, n)`` as ``(..., k / 2, n, 2)``. ``whole``: the shape of the array that the original is a slice of.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    paired: int = 0
    back: bool = False
    whole: tuple[int, ...] | None = None

    @property
    def trivial(self) -> bool:
        """Whether the copy is like the original."""
        return not self.paired and all(size == 1 or start == to for size, start, to in self._strides())

    def write(self, emitter: Emitter, source: Memory, target: Memory) -> None:
        """Write the loops."""
        axes = [_Axis(size, start, to) for size, start, to in self._strides() if size > 1]
        if self.paired:
            axes = [self._halved(axis) for axis in axes]
        _Copy(emitter, source, target, _merged(axes)).write()

    def _halved(self, axis: _Axis) -> _Axis:
        if axis.to == self.paired:
            assert axis.size % 2 == 0
            return replace(axis, size=axis.size // 2, paired=True)
        return axis if axis.to < self.paired else replace(axis, to=axis.to // 2)

    def _strides(self) -> list[tuple[int, int, int]]:
        """Return the size of each axis, and its strides in the original and in the copy."""
        found, whole = [], self.whole or self.shape
        for axis, size in enumerate(self.shape):
            plain = math.prod(whole[axis + 1 :])
            moved = math.prod(self.shape[other] for other in self.order[self.order.index(axis) + 1 :])
            found.append((size, moved, plain) if self.back else (size, plain, moved))
        return found


def arrangeable(shape: Sequence[int], order: Sequence[int], across: int) -> bool:
    """Whether pairs before the last ``across`` numbers are pairs along one axis."""
    place, size = len(order), 1
    while place and size < across:
        place -= 1
        size *= shape[order[place]]
    while place and shape[order[place - 1]] == 1:
        place -= 1
    return size == across and place > 0 and shape[order[place - 1]] % 2 == 0


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Return the axes, merged if they are contiguous in both arrays."""
    for outer in axes:
        for inner in axes:
            follow = outer.start == inner.start * inner.size and outer.to == inner.to * inner.size
            if outer is not inner and follow and not outer.paired and not inner.paired:
                joined = replace(inner, size=outer.size * inner.size)
                return _merged([joined, *(a for a in axes if a is not outer and a is not inner)])
    return axes


class _Copy:
    def __init__(self, emitter: Emitter, source: Memory, target: Memory, axes: list[_Axis]) -> None:
        self.emitter, self.code, self.source, self.target = emitter, emitter.code, source, target
        one = _Axis(1, 1, 1)
        self.along = next((a for a in axes if a.start == 1), one)  # neighbours in the original
        self.across = next((a for a in axes if a.to == 1 and not a.paired), one)  # and in the copy
        self.pair = next((a for a in axes if a.paired), None)
        self.rest = sorted((a for a in axes if a not in (self.along, self.across)), key=lambda a: -a.to)
        self.shared = max(self.rest, key=lambda a: a.size, default=self.along)

    def write(self) -> None:
        if self.along is self.across:
            self._each(self.rest, 0, 0, self._rows)
        else:
            self._each(self.rest, 0, 0, self._squares)

    def _each(self, axes: Sequence[_Axis], start: Int, to: Int, body: Body) -> None:
        if not axes:
            return body(start, to)
        code, (axis, *rest) = self.code, axes
        by = axis.start * (2 if axis.paired else 1)

        def once(index: Int, _: list[str]) -> None:
            self._each(
                rest, code.add(start, code.multiply(index, by)), code.add(to, code.multiply(index, axis.to)), body
            )

        code.loop(*self._share(axis, axis.size), 1, once)
        return None

    def _parts(self, axis: _Axis, size: int, body: Callable[[Int, int], None]) -> None:
        """``body`` with the number of each group of as many as a vector has lanes, and how many of them there are."""
        code, lanes = self.code, self.emitter.lanes
        code.loop(*self._share(axis, size // lanes), 1, lambda k, _: body(k, lanes))
        if size % lanes and axis is self.shared:  # the last share has the rest
            last = code.value(f"icmp eq i64 {LAST}, {TOTAL}")
            code.loop(0, code.value(f"zext i1 {last} to i64"), 1, lambda _, __: body(size // lanes, size % lanes))
        elif size % lanes:
            body(size // lanes, size % lanes)

    def _share(self, axis: _Axis, size: int) -> tuple[Int, Int]:
        """Return the part of an axis that this call runs: of one, its shares ``FIRST`` to ``LAST``."""
        if axis is not self.shared:
            return 0, size
        ends = [self.code.value(f"udiv i64 {self.code.multiply(size, end)}, {TOTAL}") for end in (FIRST, LAST)]
        return ends[0], ends[1]

    def _rows(self, start: Int, to: Int) -> None:
        emitter, code, lanes = self.emitter, self.code, self.emitter.lanes

        def vector(k: Int, count: int) -> None:
            shift = code.multiply(k, lanes)
            found = [emitter.load(self.source, code.add(code.add(start, shift), more), count) for more in self._lines]
            self._store(code.add(to, shift), found, count)

        self._parts(self.across, self.across.size, vector)

    @property
    def _lines(self) -> tuple[int, ...]:
        """Where the numbers are that lie side by side in the copy."""
        return (0,) if self.pair is None or self.pair is self.along else (0, self.pair.start)

    def _squares(self, start: Int, to: Int) -> None:
        emitter, code, lanes, along, across = self.emitter, self.code, self.emitter.lanes, self.along, self.across
        step = 2 if along.paired else 1  # of rows that are stored together

        def square(i: Int, high: int, j: Int, wide: int) -> None:
            here = code.add(start, code.add(code.multiply(i, lanes), code.multiply(j, lanes * across.start)))
            columns = []
            for line in self._lines:
                held = [emitter.load(self.source, code.add(here, c * across.start + line), high) for c in range(wide)]
                columns.append(emitter.transposed([*held, *["zeroinitializer"] * (lanes - wide)]))
            there = code.add(to, code.add(code.multiply(i, lanes // step * along.to), code.multiply(j, lanes)))
            for r in range(0, high, step):
                rows = columns[0][r : r + step] if step == 2 else [column[r] for column in columns]
                self._store(code.add(there, r // step * along.to), rows, wide)

        self._parts(
            along,
            along.size * step,
            lambda i, high: self._parts(across, across.size, lambda j, wide: square(i, high, j, wide)),
        )

    def _store(self, to: Int, rows: Sequence[str], lanes: int) -> None:
        if len(rows) == 2:
            self.emitter.store_pairs(self.target, to, (rows[0], rows[1]), lanes)
        else:
            self.emitter.store(self.target, to, rows[0], lanes)


def load_copies(copies: Sequence[tuple[Arrangement, str, str]], target: Target, element: str) -> Callable[..., None]:
    """Write a function of a table of addresses (originals and copies in turn) and of the shares of the copies to make.

    Each comes with LLVM's names of the types of the original and of the copy; ``element`` is that of the vectors.
    """
    code = Code()
    emitter = Emitter(code, target, element, 0, 1)
    for k, (arrangement, *kinds) in enumerate(copies):
        places = [code.value(f"load ptr, ptr {code.at('ptr', '%table', 2 * k + side)}") for side in range(2)]
        arrangement.write(emitter, *(Memory(place, kind) for place, kind in zip(places, kinds, strict=True)))
    text = code.function("copies", f"ptr %table, i64 {FIRST}, i64 {LAST}, i64 {TOTAL}", target.attributes)
    return load(text, "copies", target, [ctypes.c_void_p, *[ctypes.c_int64] * 3])
