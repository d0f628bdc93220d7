"""Bounds, as shares of the caches, on the bytes that a pass reads repeatedly.

The shares were found on a core with caches of 32 KB, 1 MB and 16 MB (its share of the last level). There, halving or
doubling them changes times by a few per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from structlin.execution.machine import Caches, caches


@dataclass(frozen=True)
class Limits:
    """Bytes.

    In the second level of cache: ``vectors``, which the tiles of a product read again for each row of them, and the
    activations of a ``block`` of tokens, beside the factors of a step.

    In the share of the last level: ``sums`` of gradients of factors that the backward pass adds to for each block of
    tokens, and the ``factors`` that the forward pass reads for each. If there are more, blocks are larger, as long as
    their activations take at most ``sums_block`` and ``factors_block``; and passes run in slices, of whose sums and
    factors there are at most ``sums_slice`` and ``factors_slice``. From ``room`` on sums are worth slicing for the
    memory that it saves.

    ``kept``: activations for the backward pass that do not go through memory.
    """

    vectors: int
    block: int
    sums: int
    sums_block: int
    sums_slice: int
    room: int
    factors: int
    factors_block: int
    factors_slice: int
    kept: int

    @classmethod
    def of(cls, found: Caches) -> Limits:
        near, far = found.l2, found.l3
        return cls(
            vectors=near // 2, block=near * 3 // 16,
            sums=far * 3 // 8, sums_block=far * 3 // 2, sums_slice=far // 4, room=near,
            factors=far * 3 // 4, factors_block=far // 2, factors_slice=far // 2,
            kept=far,
        )  # fmt: skip


@cache
def limits() -> Limits:
    """Return the bounds for this machine."""
    return Limits.of(caches())
