"""One product of three strided arrays, ``out[...] (+)= sum left[...] * right[...]``, as a loop nest around a tile.

The tile of ``out`` stays in registers during the loops over all summed axes. It has some vectors along one axis, which
is contiguous in memory, and some rows along another. Each iteration of the innermost loop loads a few vectors of one
operand, broadcasts one number of the other for each row, and multiplies and adds. So each number that is loaded is used
for a whole row or column of the tile. If the arrays are in cache, the multipliers limit the speed.

If no axis is contiguous in both ``out`` and an operand, the vectors run along a summed axis. Each number of the tile is
then a vector of partial sums, which are added at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from structlin.execution.compiled._target import Target

TOKENS = "*"
VECTORS = 3  # along a row of the tile, at most: with 9 rows they are loaded the least, with 32 registers
BLOCK = 36  # tokens, about: what a block's sums of partial sums are shared by
NEAR = 16  # elements, about a cache line
BYTES = {"float": 4, "double": 8, "bfloat": 2, "half": 2, "i32": 4, "i64": 8}
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
    """The axes of a product by their roles in the loops.

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

    def moved(self, to: Callable[[Axis], Axis]) -> Product:
        """Return the product with other axes."""
        summed, outer, near = (tuple(map(to, axes)) for axes in (self.summed, self.outer, self.near))
        down = None if self.down is None else to(self.down)
        return replace(self, across=to(self.across), down=down, summed=summed, outer=outer, near=near)

    def pairs(self) -> Product | None:
        """Return the product with numbers of 16 bits; it reads two neighbours along the innermost summed axis at once.

        The operand that is read number by number (left) has them side by side; of the other one pairs are the elements,
        in the order of axes that its numbers had. None where that is not so.
        """
        if not self.summed or self.along is not None or self.swapped or self.both:
            return None
        last = self.summed[-1]
        if last.left != 1 or last.size == 0 or last.size % 2 or last.right != self.across.size:
            return None

        return replace(self, summed=(*self.summed[:-1], replace(last, size=last.size // 2, left=2)))._halved()

    def zipped(self, before: Product | None) -> tuple[Product, Axis, Axis] | None:
        """Return :meth:`pairs` if ``before`` writes the left operand and can put the numbers side by side.

        Two neighbours along a summed axis, or a part of one, are items of an outer axis of ``before``, whose tiles are
        computed together. This axis of ``before`` is returned too, and the summed one as it was: the right operand has
        to be arranged anew, with this axis next to the one of the vectors. Where there is nothing ``before``, it is an
        input, and the pairs are made when it is copied.
        """
        if self.along is not None or self.both or (before is not None and not before.zips):
            return None
        if self.swapped:
            return self._zipped_vectors(before)
        for whole in reversed(self.summed):
            for axis in _pairable(before, whole):
                parts = None if axis.size % 2 else _split(whole, axis)
                if parts is None:
                    continue
                summed = [part for a in self.summed for part in (parts if a is whole else [a]) if part.size > 1]
                inner, step = next(a for a in summed if a.left == axis.out), self.across.size

                def moved(a: Axis, inner: Axis = inner, step: int = step) -> Axis:
                    between = a.right is not None and step <= a.right < (inner.right or 0)
                    return replace(a, right=(a.right or 0) * inner.size) if between else a

                rest = replace(self, summed=tuple(a for a in summed if a is not inner)).moved(moved)
                pairs = replace(inner, size=inner.size // 2, right=step)
                found = replace(rest, across=self.across, summed=(*rest.summed, pairs))
                return found._halved(), axis, inner
        return None

    def _zipped_vectors(self, before: Product | None) -> tuple[Product, Axis, Axis] | None:
        """Where it is the left operand that is read in vectors: the summed axis has to be the last of the right one."""
        for inner in reversed(self.summed):
            for axis in _pairable(before, inner):
                if inner.size == axis.size and inner.size % 2 == 0 and inner.left == axis.out and inner.right:
                    return self._with_last(inner), axis, inner
        return None

    def _with_last(self, inner: Axis) -> Product:
        """Return the product in pairs, with a summed axis that comes last in the right operand."""
        start = inner.right or 0

        def moved(a: Axis) -> Axis:
            return replace(a, right=a.right * inner.size) if a.right is not None and a.right < start else a

        rest = replace(self, summed=tuple(a for a in self.summed if a is not inner)).moved(moved)
        pairs = replace(inner, size=inner.size // 2, right=2)
        return replace(rest, summed=(*rest.summed, pairs), paired=True)

    @property
    def zips(self) -> bool:
        """Whether two tiles can be computed together, for two items of an outer axis."""
        return self.along is None and not self.swapped and self.down is not None

    def _halved(self) -> Product:
        """Return the product with pairs as elements of the right operand, except along the innermost summed axis."""

        def halved(axis: Axis) -> Axis:
            return replace(axis, right=None if axis.right is None else axis.right // 2)

        *rest, last = self.summed
        found = replace(self, summed=tuple(rest)).moved(halved)
        return replace(found, across=self.across, down=self.down, summed=(*found.summed, last), paired=True)

    @property
    def stores_pairs(self) -> bool:
        """Whether the rows of a tile are tokens, so that two of them can be stored side by side."""
        return self.along is None and self.down is not None and self.down.size == 0

    def tiles(self, target: Target, element: str, tokens: int) -> int:
        """Return the approximate number of tiles for this number of tokens; 0 if their numbers are vectors."""
        if self.along is not None:
            return 0
        vectors = math.ceil(self.across.size * BYTES[element] / target.width)
        rows = 1 if self.down is None else (self.down.size or tokens) / max_rows(target, min(vectors, VECTORS))
        outer = math.prod(a.size or tokens for a in (*self.outer, *self.near))
        return math.ceil(vectors / VECTORS) * math.ceil(rows) * outer

    def cost(self, target: Target, element: str) -> float:
        """Return the estimated instructions for one token: loads, and vector multiplications including unused lanes."""
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
        rows, columns = min((self.down.size or rows) if self.down else 1, rows), min(along.size, columns)
        turns = vectors * math.prod(a.size or 1 for a in self.summed)
        sums = math.prod(a.size or 1 for a in (*self.outer, along, *([self.down] if self.down else ())))
        # About three instructions for each sum of lanes (Emitter.totals), and one or two to store it.
        ends = (3 + (along.out != 1)) / (BLOCK if any(a.size == 0 for a in self.summed) else 1)
        return sums * (turns * (max(1, 4 / (rows * columns)) + 0.5 / rows + 0.5 / columns) + ends)


def dot_tile(target: Target, single: bool) -> tuple[int, int]:
    """Return rows and columns of a tile whose numbers are vectors; ``single``: only one row."""
    many = target.registers >= 32
    return (1, 16 if many else 8) if single else ((4, 4) if many else (2, 4))


def max_rows(target: Target, vectors: int) -> int:
    """Return the rows of a tile: sums, a row's vectors and a broadcast number fill the registers."""
    most = (target.registers - 1) // vectors - 1
    return max(n for n in (4, 6, 9, 12) if n <= most)


def make_products(
    sizes: Mapping[str, int], out: Strides, left: Strides, right: Strides, few: bool = False
) -> list[Product]:  # fmt: skip
    """Return the ways to give each axis its part. Axes that lie in memory as one become one.

    ``few``: there are few tokens, and ``right`` is read as it is stored. Sums along an axis then share it by tokens.
    """
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
            if few and rows is None:
                rows = next((a for a in axes if not a.size and a.out is not None and a.right is None), None)
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


def _split(axis: Axis, by: Axis) -> list[Axis] | None:
    """Split a summed axis into the part outside of ``by`` (of the product that writes it), ``by``, and the part inside.

    None where ``by`` is no part of it.
    """
    if not (axis.left and axis.right and axis.size and by.out and by.size) or by.out % axis.left:
        return None
    inside = by.out // axis.left
    if axis.size % (inside * by.size):
        return None
    sizes, found, step = (inside, by.size, axis.size // (inside * by.size)), [], 1
    for size in sizes:
        found.append(replace(axis, size=size, left=axis.left * step, right=axis.right * step))
        step *= size
    return found[::-1]


def _pairable(before: Product | None, summed: Axis) -> tuple[Axis, ...]:
    """Return the axes along which two items of an activation can be written side by side; any for an input."""
    return (Axis(summed.size, summed.left, None, None),) if before is None else (*before.outer, *before.near)


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
