"""Timings of alternatives that run in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["race"]

# Each round runs every alternative once, and the least time counts, because other processes only add to it. There are
# at least LEAST_ROUNDS rounds, unless they take longer than PATIENCE times the budget.
LEAST_ROUNDS, MOST_ROUNDS, PATIENCE = 3, 60, 4.0
# After LEAST_ROUNDS, an alternative that takes HOPELESS times as long as the best one is not timed again.
HOPELESS = 3.0
# The order of alternatives whose least times differ by less than CLOSE is uncertain until each has been confirmed: its
# second least time is at most AGREE times the least. A host that runs slower for some rounds does not change the order
# then.
CLOSE, AGREE = 1.15, 1.04


def race(
    calls: Mapping[str, Callable[[], object]], now: Callable[[], float], budget: float,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Return the least seconds of each call.

    Parameters
    ----------
    calls
        The alternatives. Each has been called once, so that nothing is compiled any more.
    now
        The clock, in seconds.
    budget
        Seconds after which no round begins, once the order of the best alternatives is certain. After PATIENCE times as
        many seconds, none begins in any case.
    before
        Is called before each alternative, outside of its time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    racing, start = list(calls), time.perf_counter()
    for number in range(MOST_ROUNDS if calls else 0):
        spent = time.perf_counter() - start
        if number and spent > PATIENCE * budget:
            break
        if number >= LEAST_ROUNDS:
            best = min(min(found) for found in times.values())
            racing = [name for name in racing if min(times[name]) <= HOPELESS * best]
            if len(racing) < 2 or (spent > budget and _certain([sorted(times[name])[:2] for name in racing])):
                break
        for name in racing:
            before()
            begun = now()
            calls[name]()
            times[name].append(now() - begun)
    return {name: min(found) for name, found in times.items()}


def _certain(least_two: list[list[float]]) -> bool:
    """Whether all times close to the best one are confirmed."""
    best = min(first for first, _ in least_two)
    return all(second <= AGREE * first for first, second in least_two if first <= CLOSE * best)
