"""Checks and sizes that several named structures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from structlin.factorize import factorize

Factorization = str | tuple[Sequence[int], Sequence[int]]


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int of at least 1, or a ValueError that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def split_shape(
    shape: tuple[int, int], cores: int, factorization: Factorization
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split (d_out, d_in) into ``cores`` factors each: a rule's name, or ``(output sizes, input sizes)``."""
    cores = positive_int("cores", cores)
    if isinstance(factorization, str):
        return factorize(shape[0], cores, factorization), factorize(shape[1], cores, factorization)
    if len(factorization) != 2 or any(isinstance(part, int) for part in factorization):
        raise ValueError(f"an explicit factorization is a pair (output sizes, input sizes), got {factorization!r}")
    return factorize(shape[0], cores, factorization[0]), factorize(shape[1], cores, factorization[1])


def bond_sizes(rank: int | Sequence[int], cores: int) -> tuple[int, ...]:
    """Return the ``cores - 1`` inner ranks: one for all, or one each."""
    if hasattr(rank, "__index__") and not isinstance(rank, bool):
        return (positive_int("rank", rank),) * (cores - 1)
    if isinstance(rank, bool) or not isinstance(rank, Sequence) or len(rank) != cores - 1:
        raise ValueError(f"rank must be a positive integer or {cores - 1} of them for {cores} cores, got {rank!r}")
    return tuple(positive_int("rank", r) for r in rank)


def exact_bonds(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """For each bond, ``min(prod left, prod right)`` of the sizes before it and those behind it."""
    before = accumulate(left, mul)
    after = [*accumulate(right[::-1], mul)][::-1]
    return tuple(min(a, b) for a, b in zip(before, after[1:], strict=False))


def matrix_rank(shape: tuple[int, int], rank: int | None, rank_fraction: float | None) -> int:
    """Return a rank from itself, from a fraction of min(d_out, d_in), or ceil(sqrt(min(d_out, d_in)))."""
    small = min(shape)
    if rank is not None and rank_fraction is not None:
        raise ValueError(f"give rank or rank_fraction, not both (got {rank} and {rank_fraction})")
    if rank is not None:
        return positive_int("rank", rank)
    if rank_fraction is None:
        return math.isqrt(small - 1) + 1
    if not 0 < rank_fraction <= 1:
        raise ValueError(f"rank_fraction must lie in (0, 1], got {rank_fraction}")
    return math.ceil(rank_fraction * small)


def divide(name: str, size: int, blocks: int) -> int:
    """``size / blocks``, or a ValueError naming the nearest sizes that divide."""
    if size % blocks:
        below, above = size // blocks * blocks, -(-size // blocks) * blocks
        near = f"{below} and {above}" if below else str(above)
        raise ValueError(f"{name} = {size} does not split into {blocks} blocks; the nearest sizes that do are {near}")
    return size // blocks
