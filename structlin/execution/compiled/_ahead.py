"""Prefetch the input and the output of the next block of tokens while the products of a block run.

The input of a block usually comes from memory, and its copy to scratch memory would wait for it. A processor also reads
each cache line of the output before it writes to it. Each tile of a product prefetches a few cache lines instead.
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
    """``arrays`` have contiguous rows; the products of a block of so many tokens have ``tiles`` tiles of sums.

    The last ``outputs`` arrays are written.
    """

    def __init__(self, code: Code, arrays: Sequence[Array], outputs: int, block: int, tiles: int) -> None:
        self._code, self._arrays, self._block, self._tiles = code, arrays, block, tiles
        self._inputs = len(arrays) - outputs
        self._places = [code.value("alloca ptr") for _ in arrays]  # what is asked for next

    def start(self, first: Int) -> None:
        """Start the block whose first token is ``first``."""
        code = self._code
        for array, place in zip(self._arrays, self._places, strict=True):
            offset = code.multiply(code.add(first, self._block), array.row)
            code.put(f"store ptr {code.at(array.element, array.pointer, offset)}, ptr {place}")

    def ask(self) -> None:
        """Prefetch the share of one tile; an address beyond the array does no harm."""
        code = self._code
        for number, (array, place) in enumerate(zip(self._arrays, self._places, strict=True)):
            write = int(number >= self._inputs)
            lines = math.ceil(self._block * array.row * BYTES[array.element] / (LINE * self._tiles))
            pointer = code.value(f"load ptr, ptr {place}")
            for k in range(lines):
                line = code.at("i8", pointer, k * LINE)
                code.call("void", "llvm.prefetch.p0", ("ptr", line), ("i32", write), ("i32", SECOND_LEVEL), ("i32", 1))
            code.put(f"store ptr {code.at('i8', pointer, lines * LINE)}, ptr {place}")
