"""Rates of this machine, measured once for each dtype and number of threads: what estimates of ways are made from.

A few products and copies are timed, which takes about a tenth of a second, and the result is kept on disk
(:mod:`.wisdom`): all processes on a machine estimate from the same figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from structlin.execution import wisdom

BLOCKS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Sides of the square blocks whose products are timed."""
COLUMNS = 256  # vectors that each block multiplies: so many tokens share the reading of a block
NUMBERS = 1 << 17  # of all blocks of one product: they stay in the second level of cache
COPIED = 1 << 20  # numbers that are copied: more than the second level of cache holds
LARGE = 64 << 20  # bytes of an array that stays in no cache, and that no allocator keeps
ROUNDS = 5  # the least time counts, since other processes only add to it


@dataclass(frozen=True)
class Rates:
    """Seconds, in one dtype on so many threads.

    ``columns[k]``: of one MAC of a batched product ``(block, block) @ (block, tokens)`` with blocks of side
    ``BLOCKS[k]``; ``rows[k]``: the same with the tokens first, ``(tokens, block) @ (block, block)``. ``run``: to copy a
    number of an array whose axes are permuted but for the last one, ``single``: the same where the last one moves too.
    ``read``: to read a number of a matrix that meets a single vector. ``fresh``: to write and read a number of an array
    that does not stay in cache, and whose memory comes from the system. ``call``: of a call of the library, and
    ``item``: of one more item in the batch of a product, whatever its size.
    """

    columns: tuple[float, ...]
    rows: tuple[float, ...]
    run: float
    single: float
    read: float
    fresh: float
    call: float
    item: float

    def mac(self, contracted: int, free: int, *, rows: bool = False) -> float:
        """Seconds of one MAC with blocks of this size, interpolated between the sides that were timed."""
        table = self.rows if rows else self.columns
        side = math.sqrt(contracted * free)
        if side <= BLOCKS[0]:  # the time of a small block is that of its rows
            return table[0] * BLOCKS[0] / max(side, 1.0)
        for k, (low, high) in enumerate(pairwise(BLOCKS)):
            if side <= high:
                part = math.log(side / low) / math.log(high / low)
                return float(table[k] ** (1 - part) * table[k + 1] ** part)
        return table[-1]

    @property
    def fastest(self) -> float:
        """Seconds of a MAC at the highest rate that was seen."""
        return min(*self.columns, *self.rows)

    def product(self, batch: int, contracted: int, free: int, count: int, *, rows: bool = False) -> float:
        """Seconds of a batched product of blocks with ``count`` vectors each, without its call."""
        macs = batch * contracted * free * count
        least = batch * contracted * free * self.read  # however few the vectors, all blocks are read
        return max(macs * self.mac(contracted, free, rows=rows), least) + (batch - 1) * self.item


@lru_cache(maxsize=64)
def rates(dtype: str, threads: int) -> Rates:
    """The rates of torch on this CPU: from memory, from disk, or measured."""
    key = f"rates torch {dtype} {threads}"
    found = wisdom.read(key)
    if not isinstance(found, dict) or len(found.get("columns", ())) != len(BLOCKS):
        found = wisdom.write(key, asdict(_measured(dtype, threads)), keep=True)
    tables: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Rates(**tables)


def least_seconds(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least time of some calls, after one that is not counted."""
    function()
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _measured(dtype: str, threads: int) -> Rates:
    import torch

    kind = getattr(torch, dtype)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=kind, device="cpu")

    def mac(side: int, rows: bool) -> float:
        batch = max(1, NUMBERS // side**2)
        blocks, x = ones(batch, side, side), ones(batch, *((COLUMNS, side) if rows else (side, COLUMNS)))
        return least_seconds(lambda: x @ blocks.mT if rows else blocks @ x) / (batch * side**2 * COLUMNS)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            columns, rows = (tuple(mac(side, kind_) for side in BLOCKS) for kind_ in (False, True))
            side = math.isqrt(COPIED // COLUMNS)
            wide, flat = ones(side, side, COLUMNS), ones(COLUMNS, side, side)
            tiny, many, one, few = ones(1, 8, 8), ones(64, 8, 8), ones(1, 8, 1), ones(64, 8, 1)
            call = least_seconds(lambda: tiny @ one, 20)
            large = ones(LARGE // wide.element_size())
            matrix, vector = ones(1024, 1024), ones(1, 1024)
            return Rates(
                columns,
                rows,
                run=least_seconds(lambda: wide.permute(1, 0, 2).contiguous()) / COPIED,
                single=least_seconds(lambda: flat.permute(0, 2, 1).contiguous()) / COPIED,
                read=least_seconds(lambda: vector @ matrix.mT) / matrix.numel(),
                fresh=least_seconds(lambda: large.add(1), 3) / large.numel(),
                call=call,
                item=max(0.0, least_seconds(lambda: many @ few, 20) - call) / (len(many) - 1),
            )
    finally:
        torch.set_num_threads(before)
