"""Asking for the input of the next block of tokens while the products of a block run.

What a pass reads first of a block comes from far away, unless something has just written it, and its copy to scratch
memory would wait for it. A few cache lines are asked for with each tile of a product instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from structlin.execution.compiled._forms import Array
from structlin.execution.compiled._ir import Code, Int
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._schedule import LINE

SECOND_LEVEL = 2  # of LLVM's degrees of locality


class Ahead:
    """``arrays`` have contiguous rows; the products of a block of so many tokens have ``tiles`` tiles of sums."""

    def __init__(self, code: Code, arrays: Sequence[Array], block: int, tiles: int) -> None:
        self._code, self._arrays, self._block, self._tiles = code, arrays, block, tiles
        self._places = [code.value("alloca ptr") for _ in arrays]  # what is asked for next

    def start(self, first: Int) -> None:
        """Start a block with this token."""
        code = self._code
        for array, place in zip(self._arrays, self._places, strict=True):
            offset = code.multiply(code.add(first, self._block), array.row)
            code.put(f"store ptr {code.at(array.element, array.pointer, offset)}, ptr {place}")

    def ask(self) -> None:
        """For the share of a tile. Nothing is read beyond an array: what is asked for need not be there."""
        code = self._code
        for array, place in zip(self._arrays, self._places, strict=True):
            lines = math.ceil(self._block * array.row * BYTES[array.element] / (LINE * self._tiles))
            pointer = code.value(f"load ptr, ptr {place}")
            for k in range(lines):
                line = code.at("i8", pointer, k * LINE)
                code.call("void", "llvm.prefetch.p0", ("ptr", line), ("i32", 0), ("i32", SECOND_LEVEL), ("i32", 1))
            code.put(f"store ptr {code.at('i8', pointer, lines * LINE)}, ptr {place}")
