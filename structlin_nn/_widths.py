"""Search for the widest model, or the largest rank, whose cost is within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import structlin
from structlin.planning import largest_within
from structlin_nn._planned import Choice

WIDEST = 2**20
_SMALL = 64  # all widths up to this one are tried
_BEYOND = 16  # number of widths above the largest that fits that are tried too, because the cost may rise unevenly

Share = Callable[[Choice], float | None]
"""The used share of the budget; None for a choice that cannot be built."""
Found = tuple[Choice | None, int | None]
"""The largest choice that fits, and the next number that can be built."""


class TooLargeError(Exception):
    """Even the widest model fits."""


def largest_rank(share: Share, at: Choice) -> Found:
    def cost(rank: int) -> float | None:
        return share(at.with_options(rank=rank))

    rank = largest_within(cost, 1.0)
    if rank is None:
        return None, None
    return at.with_options(rank=rank), rank + 1 if cost(rank + 1) is not None else None


def widest_of(share: Share, at: Choice, widths: Sequence[int]) -> Found:
    after = None
    for width in reversed(widths):
        found = share(at.of_width(width))
        if _fits(found):
            return at.of_width(width), after
        after = width if found is not None else after
    return None, None


def widest(
    share: Share, may_fit: Callable[[Choice], bool], at: Choice, multiple_of: int, parts: int, even: bool
) -> Found:  # fmt: skip
    def cost(width: int) -> float | None:
        if width > WIDEST:
            raise TooLargeError
        return share(at.of_width(width))

    def nth(n: int) -> int:
        return nth_width(n, multiple_of, parts)

    last = _last_that_fits(lambda n: cost(nth(n)))
    if even:
        if last is None:
            return None, None
        after = _first(range(last + 1, last + 64), lambda n: cost(nth(n)) is not None)
        return at.of_width(nth(last)), None if after is None else nth(after)
    # Candidates are n times multiple_of. With factors: all below the third power from there and up to twice the width
    # (a layer of fixed inputs may cost less at a larger width while that is small); else a few beyond.
    low = 0 if last is None else nth(last) // multiple_of
    high = low + _BEYOND + 1
    if parts > 1:
        high = max(nth((last or 0) + 3) // multiple_of, 2 * low, _SMALL // multiple_of, low + 2)
    widths = range(max(low, 1) * multiple_of, high * multiple_of, multiple_of)
    # Some widths of all residues, which show how the sizes of the layers depend on the width.
    list(itertools.islice((width for width in widths if cost(width) is not None), 4))
    best = _first(reversed(widths), lambda width: may_fit(at.of_width(width)) and _fits(cost(width)))
    if best is None:
        return None, None
    beyond = range(best + multiple_of, (high + 64) * multiple_of, multiple_of)
    return at.of_width(best), _first(beyond, lambda width: cost(width) is not None)


def nth_width(n: int, multiple_of: int, parts: int) -> int:
    """Return the n-th multiple, or for several factors the n-th power that is a multiple."""
    if parts == 1:
        return n * multiple_of
    root = next(k for k in range(1, multiple_of + 1) if k**parts % multiple_of == 0)
    return (root * (n + (root == 1))) ** parts  # 1 cannot be split


def number_of_factors(structure: str, options: Mapping[str, Any]) -> int:
    """Return the number of factors that a structure splits sizes into."""
    known = structlin.structure_options(structure)
    return options.get("cores", known.get("cores", 2 if structure == "einsum" else 1))


def _fits(share: float | None) -> bool:
    return share is not None and share <= 1


def _first(numbers: Iterable[int], fine: Callable[[int], bool]) -> int | None:
    return next((n for n in numbers if fine(n)), None)


def _last_that_fits(cost: Callable[[int], float | None]) -> int | None:
    """Return the last n whose cost is at most 1. The cost rises with n. It is None for some n, most of them small."""
    start = _first(range(1, 64), lambda n: cost(n) is not None)
    if start is None or not _fits(cost(start)):
        return None
    low, high = start, 2 * start
    while (found := cost(high)) is None or found <= 1:
        low, high = (low, high + 1) if found is None else (high, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        # The nearest n to the middle that can be built, first downwards, then upwards.
        near = _first(itertools.chain(range(middle, low, -1), range(middle + 1, high)), lambda n: cost(n) is not None)
        if near is None:
            break
        low, high = (near, high) if _fits(cost(near)) else (low, near)
    return low
