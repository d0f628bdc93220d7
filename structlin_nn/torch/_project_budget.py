"""Sharing out a budget (of multiply-accumulates, or parameters) over layers: a point of each one's curve of errors.

To minimise the sum of squared errors under a bound on the sum of costs is a knapsack problem with one choice per layer.
Its Lagrangian relaxation is solved exactly by walking down the lower convex hulls of the curves, the step with the
largest decrease of the error per cost first, up to the first step that exceeds the budget: what is found is at most
that step away from the optimum. What is left of the budget is spent in the same way, along hulls of the points that
fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

Curve = Sequence[tuple[int, float]]
"""(cost, loss) of each choice, in ascending order of cost."""


def hull(curve: Curve) -> list[int]:
    """Return the indices of the lower convex hull, from the cheapest point to that of smallest loss.

    Examples
    --------
    >>> hull([(1, 9.0), (2, 8.0), (3, 2.0), (4, 2.0), (5, 1.0)])
    [0, 2, 4]
    """
    kept: list[int] = []
    for i, (cost, loss) in enumerate(curve):
        if kept and loss >= curve[kept[-1]][1]:
            continue
        while kept and cost <= curve[kept[-1]][0]:
            kept.pop()
        while len(kept) > 1:
            (a_cost, a_loss), (b_cost, b_loss) = curve[kept[-2]], curve[kept[-1]]
            if (a_loss - b_loss) * (cost - b_cost) > (b_loss - loss) * (b_cost - a_cost):
                break
            kept.pop()
        kept.append(i)
    return kept


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """Return the point of each curve to take. Raises ValueError where the cheapest points exceed the budget.

    Examples
    --------
    >>> allocate([[(1, 4.0), (2, 1.0)], [(1, 9.0), (3, 0.0)]], budget=4)
    [0, 1]
    """
    at = [hull(curve)[0] for curve in curves]
    left = budget - sum(curve[i][0] for curve, i in zip(curves, at, strict=True))
    if left < 0:
        raise ValueError(f"the smallest choices need {budget - left:,}, more than the budget of {budget:,}")
    queue: list[tuple[float, int, int]] = []

    def push(layer: int, limit: float) -> None:
        """Return the next step of a layer along the hull of its points up to a cost."""
        curve, start = curves[layer], at[layer]
        ahead = [i for i in range(start, len(curve)) if curve[i][0] <= limit]
        points = hull([curve[i] for i in ahead])
        if len(points) > 1 and points[0] == 0:
            (cost, loss), (more, less) = curve[start], curve[ahead[points[1]]]
            heapq.heappush(queue, (-(loss - less) / (more - cost), layer, ahead[points[1]]))

    for layer in range(len(curves)):
        push(layer, math.inf)
    while queue:
        _, layer, point = heapq.heappop(queue)
        cost, now = curves[layer][point][0], curves[layer][at[layer]][0]
        if cost - now > left:
            push(layer, now + left)
            continue
        left -= cost - now
        at[layer] = point
        push(layer, math.inf)
    return at
