"""Search for the widest model, or the largest rank, whose cost is within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from structlin.planning import largest_within
from structlin_nn._planned import Choice

__all__ = ["WIDEST", "Reasons", "TooLargeError", "largest_rank", "nth_width", "widest", "widest_of"]

WIDEST = 2**20
_SMALL = 64  # all widths up to this one are tried
_BEYOND = 16  # widths above the largest that fits that are tried too, because the cost may rise unevenly

Share = Callable[[Choice], float | None]


class TooLargeError(Exception):
    """Even the widest model fits."""


class Reasons:
    """The cheapest choice that can be built, and one that cannot, for the message where nothing fits."""

    def __init__(self) -> None:
        self.cheapest: Choice | None = None
        self.unbuilt: Choice | None = None
        self._least = float("inf")

    def note(self, choice: Choice, share: float | None) -> None:
        if share is None:
            self.unbuilt = self.unbuilt or choice
        elif share < self._least:
            self.cheapest, self._least = choice, share


def largest_rank(share: Share, at: Choice, reasons: Reasons) -> tuple[Choice | None, int | None]:
    def cost(rank: int) -> float | None:
        found = share(at.with_options(rank=rank))
        reasons.note(at.with_options(rank=rank), found)
        return found

    rank = largest_within(cost, 1.0)
    if rank is None:
        return None, None
    return at.with_options(rank=rank), rank + 1 if cost(rank + 1) is not None else None


def widest_of(
    share: Share, at: Choice, widths: Sequence[int], reasons: Reasons
) -> tuple[Choice | None, int | None]:  # fmt: skip
    after = None
    for width in reversed(widths):
        choice = Choice(width, at.depth, at.options)
        found = share(choice)
        reasons.note(choice, found)
        if found is not None and found <= 1:
            return choice, after
        after = width if found is not None else after
    return None, None


def widest(
    share: Share, may_fit: Callable[[Choice], bool], at: Choice, multiple_of: int, parts: int, even: bool,
    reasons: Reasons,
) -> tuple[Choice | None, int | None]:  # fmt: skip
    """Return the widest that fits, and the next that can be built."""

    def cost(width: int) -> float | None:
        if width > WIDEST:
            raise TooLargeError
        choice = Choice(width, at.depth, at.options)
        found = share(choice)
        reasons.note(choice, found)
        return found

    def fits(width: int) -> bool:
        found = cost(width)
        return found is not None and found <= 1

    last = _last_that_fits(lambda n: cost(nth_width(n, multiple_of, parts)))
    if even:
        if last is None:
            return None, None
        after = next(
            (n for n in range(last + 1, last + 64) if cost(nth_width(n, multiple_of, parts)) is not None), None
        )
        found = Choice(nth_width(last, multiple_of, parts), at.depth, at.options)
        return found, None if after is None else nth_width(after, multiple_of, parts)
    # Candidates are n times multiple_of. With factors: all below the third power from there and up to twice the width
    # (a layer of fixed inputs may cost less at a larger width while that is small); else a few beyond.
    low = 0 if last is None else nth_width(last, multiple_of, parts) // multiple_of
    high = low + _BEYOND + 1
    if parts > 1:
        high = max(
            nth_width((last or 0) + 3, multiple_of, parts) // multiple_of, 2 * low, _SMALL // multiple_of, low + 2
        )
    # Some widths of all residues, that say how the sizes of the layers go with the width.
    near = (n for n in range(max(low, 1), high) if cost(n * multiple_of) is not None)
    list(itertools.islice(near, 4))
    best = next(
        (
            n
            for n in range(high - 1, max(low, 1) - 1, -1)
            if may_fit(Choice(n * multiple_of, at.depth, at.options)) and fits(n * multiple_of)
        ),
        None,
    )
    if best is None:
        return None, None
    after = next((n for n in range(best + 1, high + 64) if cost(n * multiple_of) is not None), None)
    return Choice(best * multiple_of, at.depth, at.options), None if after is None else after * multiple_of


def nth_width(n: int, multiple_of: int, parts: int) -> int:
    """Return the n-th width: multiples, or for several factors the powers that are multiples."""
    if parts == 1:
        return n * multiple_of
    root = next(k for k in range(1, multiple_of + 1) if k**parts % multiple_of == 0)
    return (root * (n + (root == 1))) ** parts  # 1 cannot be split


def _last_that_fits(cost: Callable[[int], float | None]) -> int | None:
    """Return the last n whose cost is at most 1. The cost rises with n; it is None for some, mostly small, n."""
    start = next((n for n in range(1, 64) if cost(n) is not None), None)
    if start is None:
        return None

    def fits(n: int) -> bool:
        found = cost(n)
        return found is not None and found <= 1

    if not fits(start):
        return None
    low, high = start, 2 * start
    while True:
        found = cost(high)
        if found is None:
            high += 1
        elif found > 1:
            break
        else:
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        # The nearest n to the middle that can be built, first downwards, then upwards.
        near = next(
            (n for n in itertools.chain(range(middle, low, -1), range(middle + 1, high)) if cost(n) is not None), None
        )
        if near is None:
            break
        low, high = (near, high) if fits(near) else (low, near)
    return low
