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
    """Return ``value`` as an int; ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def split_shape(
    shape: tuple[int, int], cores: int, factorization: Factorization
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split d_out and d_in into ``cores`` factors each.

    ``factorization`` is the name of a rule or a pair ``(output sizes, input sizes)``.
    """
    cores = positive_int("cores", cores)
    if isinstance(factorization, str):
        return factorize(shape[0], cores, factorization), factorize(shape[1], cores, factorization)
    if len(factorization) != 2 or any(isinstance(part, int) for part in factorization):
        raise ValueError(
            f"factorization must be the name of a rule or a pair (output sizes, input sizes), got {factorization!r}"
        )
    return factorize(shape[0], cores, factorization[0]), factorize(shape[1], cores, factorization[1])


def bond_sizes(rank: int | Sequence[int], cores: int) -> tuple[int, ...]:
    """Return the ``cores - 1`` inner ranks from one integer for all, or from one for each."""
    if hasattr(rank, "__index__") and not isinstance(rank, bool):
        return (positive_int("rank", rank),) * (cores - 1)
    if isinstance(rank, bool) or not isinstance(rank, Sequence) or len(rank) != cores - 1:
        raise ValueError(f"rank must be a positive integer, or {cores - 1} of them for {cores} cores, got {rank!r}")
    return tuple(positive_int("rank", r) for r in rank)


def exact_bonds(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """Return ``min(prod(left[:k]), prod(right[k:]))`` for each place k between two cores."""
    before = accumulate(left, mul)
    after = [*accumulate(right[::-1], mul)][::-1]
    return tuple(min(a, b) for a, b in zip(before, after[1:], strict=False))


def matrix_rank(shape: tuple[int, int], rank: int | None, rank_fraction: float | None) -> int:
    """Return the rank: as given, as a fraction of min(d_out, d_in), or by default ceil(sqrt(min(d_out, d_in)))."""
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
    """Return ``size / blocks``; if that is not an integer, ValueError with the nearest sizes that can be divided."""
    if size % blocks:
        below, above = size // blocks * blocks, -(-size // blocks) * blocks
        near = f"{below} and {above}" if below else str(above)
        raise ValueError(f"{name} = {size} cannot be split into {blocks} blocks; the nearest sizes that can are {near}")
    return size // blocks
