"""Copies of activations in which the numbers that a product reads one by one are neighbours.

A chain mixes the axes of an activation: what one step writes as neighbours, the next one sums over at a distance. A
product that reads single numbers at a distance has to run some rows for many items (:attr:`._product.Product.near`)
before it leaves their cache lines. So for each few rows it reads the vectors of all these items again, from the second
level of cache. If they do not stay there, a copy of the activation with its axes exchanged (:class:`._tiles.Turn`)
takes less time. The copy itself takes a tenth of the time of the product.

Measured on a core with AVX2 and 512 KB of second-level cache (AMD EPYC, family 25, model 1): the products of a layer
with 4096 hidden features ran at 36 to 50 GFLOP/s without copies and at 60 to 75 with them; those of a layer of width
1024 with blocks of side 32 were faster without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._product import BLOCK, BYTES, NEAR, Axis, Product
from structlin.execution.compiled._target import Target
from structlin.execution.compiled._tiles import Turn, turned


def with_copy(product: Product, target: Target, element: str, width: int) -> tuple[Product, Turn] | None:
    """Return a product that reads a copy of its activation, and that copy; None if it gains nothing.

    ``width``: numbers of the activation that it reads number by number, for one token.
    """
    # Numbers of other sizes would need another Turn. With more registers a tile has nine rows or more, not four.
    if element != "float" or target.registers >= 32 or product.paired or not product.near:
        return None
    tokens_down = product.down is not None and not product.down.size
    found = turned(product, 1) if tokens_down else _of_sums(product, width)
    if found is None or _read_again(product) < limits().vectors // 2:
        return None
    return _outside(found[0]), found[1]


def _read_again(product: Product) -> int:
    """Return the bytes that each few rows of a product read, of all items that share the cache lines of the rows.

    Where rows are numbers of the result, sums of gradients, these are read and written too.
    """
    vectors = math.prod(a.size or BLOCK for a in product.summed)
    if product.down is not None:
        vectors += product.down.size
    single, items = product.near[0].right if product.swapped else product.near[0].left, product.near[0].size
    items = min(items, math.ceil(NEAR / (single or 1)))
    return items * math.prod(a.size for a in product.near[1:]) * vectors * product.across.size * BYTES["float"]


def _of_sums(product: Product, width: int) -> tuple[Product, Turn] | None:
    """Return what :func:`._tiles.turned` does for a product that sums over tokens.

    The activation is ``(down, inner, unit)``, and the copy ``(inner, down, unit)``, where ``unit`` may be missing.
    """
    side, down = "right" if product.swapped else "left", product.down
    if down is None or not down.size or product.both:
        return None

    def stride(axis: Axis) -> int:
        return getattr(axis, side) or 0

    axes = [a for a in (*product.outer, *product.near) if stride(a)]
    inner = max(axes, key=stride)
    unit = math.prod(a.size for a in axes if a is not inner)
    apart = inner.size * unit
    if stride(inner) != unit or stride(down) != apart or down.size * apart != width:
        return None
    exchanged = {id(inner): down.size * unit, id(down): unit}

    def moved(axis: Axis) -> Axis:
        return replace(axis, **{side: exchanged[id(axis)]}) if id(axis) in exchanged else axis

    return product.moved(moved), Turn(down.size, inner.size, unit)


def _outside(product: Product) -> Product:
    """Return the product with the loops over axes whose items no longer share cache lines outermost."""

    def stride(axis: Axis) -> int:
        return (axis.right if product.swapped else axis.left) or 0

    near = [a for a in product.near if stride(a) < NEAR]
    outer: Sequence[Axis] = [*product.outer, *(a for a in product.near if a not in near)]
    return replace(product, outer=tuple(outer), near=tuple(near))
