"""Rates of this machine, from which the times of ways are estimated.

A few products and copies are timed once for each library, dtype and number of threads. This takes about a second, and
several in dtypes whose products are slow, such as float16 on most processors. The result is stored on disk
(:mod:`.wisdom`), so all processes on a machine use the same rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from structlin._arrays import Array, ops
from structlin.execution import wisdom

BLOCKS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Sides of the square blocks whose products are timed."""
COLUMNS = 256  # vectors that each block multiplies: so many tokens share the reading of a block
NUMBERS = 1 << 17  # of all blocks of one product: they stay in the second level of cache
COPIED = 1 << 20  # numbers that are copied; they exceed the second level of cache
LONG = 0.02  # seconds after which no further call is made
LARGE = 64 << 20  # bytes of an array that stays in no cache, and that no allocator keeps
ROUNDS = 5  # the least time counts, because other processes only add to it
ROUNDS_JAX = 3  # beside the time that XLA takes to compile


@dataclass(frozen=True)
class Rates:
    """Seconds, in one dtype on so many threads.

    - ``columns[k]``: one MAC of a batched product ``(block, block) @ (block, tokens)`` with blocks of side
      ``BLOCKS[k]``; ``rows[k]``: the same with the tokens first, ``(tokens, block) @ (block, block)``;
    - ``run``: copying one number of an array whose axes are permuted except for the last one; ``single``: the same if
      the last axis moves too;
    - ``read``: reading one number of a matrix that multiplies a single vector;
    - ``fresh``: writing and reading one number of an array in new memory that does not stay in cache;
    - ``call``: a call of the library; ``item``: one more item in the batch of a product, of any size.
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
        """Return the seconds of one MAC with blocks of this size, interpolated between the sides that were timed."""
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
        """Return the seconds of a batched product of blocks with ``count`` vectors each, without its call."""
        macs = batch * contracted * free * count
        least = batch * contracted * free * self.read  # however few the vectors, all blocks are read
        return max(macs * self.mac(contracted, free, rows=rows), least) + (batch - 1) * self.item


@lru_cache(maxsize=64)
def rates(dtype: str, threads: int, library: str = "torch") -> Rates:
    """Return the rates of a library, torch or jax, on this CPU: from memory, from disk, or measured."""
    key = f"rates {library} {dtype} {threads}"
    found = wisdom.read(key)
    if not isinstance(found, dict) or len(found.get("columns", ())) != len(BLOCKS):
        found = wisdom.write(key, asdict(_measured(dtype, threads, library)), keep=True)
    tables: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Rates(**tables)


def clock(threads: int, library: str = "torch", device: str = "cpu") -> Callable[[], float]:
    """Return the clock for timings: that of the calling thread if it does all the work.

    Unlike wall-clock time, it does not include other processes on the core.
    """
    return time.thread_time if (threads, library, device) == (1, "torch", "cpu") else time.perf_counter


def least_seconds(
    function: Callable[[], object], rounds: int = ROUNDS, now: Callable[[], float] = time.perf_counter
) -> float:
    """Return the least time of some calls after a warm-up call; of a single call if it takes long."""
    function()
    best, began = math.inf, time.perf_counter()
    for _ in range(rounds):
        start = now()
        function()
        best = min(best, now() - start)
        if time.perf_counter() - began > LONG:
            break
    return best


@dataclass(frozen=True)
class _Stopwatch:
    """How a library makes arrays of ones and times a function of arrays, and the sizes of blocks to time.

    ``written``: an array whose axes were permuted, in memory in its new order. ``alike``: products with the tokens
    first take as long as others, and nothing asks for copies of single numbers: neither is timed.
    """

    ones: Callable[..., Array]
    seconds: Callable[..., float]
    written: Callable[[Array], Array]
    sides: tuple[int, ...]
    alike: bool


@contextmanager
def _torch(dtype: str, threads: int) -> Iterator[_Stopwatch]:
    import torch

    kind, before = getattr(torch, dtype), torch.get_num_threads()

    def seconds(function: Callable[..., object], *arrays: Array, rounds: int = ROUNDS) -> float:
        return least_seconds(lambda: function(*arrays), rounds, clock(threads))

    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            ones = lambda *shape: torch.ones(shape, dtype=kind, device="cpu")  # noqa: E731
            yield _Stopwatch(ones, seconds, torch.Tensor.contiguous, BLOCKS, False)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _jax(dtype: str, threads: int) -> Iterator[_Stopwatch]:
    """XLA has as many threads as it has."""
    import jax

    device = jax.devices("cpu")[0]

    def seconds(function: Callable[..., object], *arrays: Array, rounds: int = ROUNDS_JAX) -> float:
        jitted = jax.jit(function)
        return least_seconds(lambda: jax.block_until_ready(jitted(*arrays)), rounds)

    with jax.enable_x64(dtype == "float64"):
        ones = lambda *shape: jax.device_put(np.ones(shape, jax.numpy.dtype(dtype)), device)  # noqa: E731
        # XLA takes some hundredths of a second to compile each product.
        yield _Stopwatch(ones, seconds, lambda x: x, BLOCKS[::3], True)


def _measured(dtype: str, threads: int, library: str) -> Rates:
    permute = ops(library).permute
    with {"torch": _torch, "jax": _jax}[library](dtype, threads) as watch:
        ones, seconds = watch.ones, watch.seconds

        def mac(side: int, rows: bool) -> float:
            batch = max(2, NUMBERS // side**2)  # torch copies a batch of one in bfloat16 where it is transposed
            blocks, x = ones(batch, side, side), ones(batch, *((COLUMNS, side) if rows else (side, COLUMNS)))
            taken = seconds((lambda b, x: x @ b.mT) if rows else (lambda b, x: b @ x), blocks, x)
            return taken / (batch * side**2 * COLUMNS)

        columns = _filled({side: mac(side, False) for side in watch.sides})
        rows = columns if watch.alike else _filled({side: mac(side, True) for side in watch.sides})
        side = math.isqrt(COPIED // COLUMNS)
        wide, flat = ones(side, side, COLUMNS), ones(COLUMNS, side, side)
        large, matrix, vector = ones(LARGE // wide.dtype.itemsize), ones(1024, 1024), ones(1, 1024)
        product: Callable[[Array, Array], Array] = lambda a, b: a @ b  # noqa: E731
        call = seconds(product, ones(1, 8, 8), ones(1, 8, 1), rounds=20)
        many = seconds(product, ones(64, 32, 32), ones(64, 32, 1), rounds=20)  # blocks that the BLAS is called for
        run = seconds(lambda x: watch.written(permute(x, (1, 0, 2))), wide) / COPIED
        single = run if watch.alike else seconds(lambda x: watch.written(permute(x, (0, 2, 1))), flat) / COPIED
        return Rates(
            columns,
            rows,
            run=run,
            single=single,
            read=seconds(lambda v, m: v @ m.mT, vector, matrix) / 1024**2,
            fresh=seconds(lambda x: x + 1, large, rounds=3) / len(large),
            call=call,
            item=max(0.0, many - call) / 63,
        )


def _filled(found: dict[int, float]) -> tuple[float, ...]:
    """Return the seconds of every side, interpolated between those that were timed."""
    known = [BLOCKS.index(side) for side in found]
    logs = np.interp(range(len(BLOCKS)), known, np.log(list(found.values())))
    return tuple(np.exp(logs).tolist())
