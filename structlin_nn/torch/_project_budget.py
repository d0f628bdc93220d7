"""Allocation of a budget of MACs or parameters to layers, by a choice of one point on the error curve of each layer.

The sum of squared errors is minimised under a bound on the sum of costs. This is a knapsack problem with one choice for
each layer. The Lagrangian relaxation is solved exactly: follow the lower convex hulls of the curves, and take the step
with the largest decrease of the error per unit of cost first, up to the first step that exceeds the budget. The result
differs from the optimum by at most that step. The rest of the budget is allocated in the same way, along the hulls of
the points that still fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

Curve = Sequence[tuple[int, float]]
"""(cost, loss) of each choice, in ascending order of cost."""


def hull(curve: Curve) -> list[int]:
    """Return the indices of the lower convex hull, from the cheapest point to the point with the smallest loss."""
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
    """Return the index of the chosen point on each curve; ValueError if the cheapest points exceed the budget."""
    at = [hull(curve)[0] for curve in curves]
    left = budget - sum(curve[i][0] for curve, i in zip(curves, at, strict=True))
    if left < 0:
        raise ValueError(f"the cheapest choices need {budget - left:,}, more than the budget of {budget:,}")
    queue: list[tuple[float, int, int]] = []

    def push(layer: int, limit: float) -> None:
        """Queue the next step of a layer along the hull of its points up to a cost."""
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
