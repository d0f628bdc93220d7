"""The structured forms of a layer with their MACs and errors, and the allocation of a budget to several layers."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

import structlin
from structlin.projection import Problem, Settings, Solution, estimated_error, solve, spectrum
from structlin.structure import AbstractStructure, Structure

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
    """Return the index of the chosen point on each curve; ValueError if the cheapest points exceed the budget.

    The sum of losses (squared errors) is minimised under a bound on the sum of costs. This is a knapsack problem with
    one choice for each layer. The Lagrangian relaxation is solved exactly: follow the lower convex hulls of the curves,
    and take the step with the largest decrease of the loss per unit of cost first, up to the first step that exceeds
    the budget. The result differs from the optimum by at most that step. The rest of the budget is allocated in the
    same way, along the hulls of the points that still fit.
    """
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


CURVE_SWEEPS = 4
"""Sweeps of alternating least squares for a point on a curve of error against MACs that has no closed form."""
GROWTH = 1.5
"""Ratio of neighbouring ranks on such a curve."""


def saves(structure: AbstractStructure) -> bool:
    """Return whether the structure needs fewer MACs than a dense matrix of the same shape."""
    return structure.flops < 2 * structure.d_in * structure.d_out


def relative(error: float, problem: Problem) -> float:
    """Return an error divided by the norm of the target; 0 if both are zero."""
    scale = problem.norm(problem.target)
    return error / scale if scale else (0.0 if error == 0 else np.inf)


def _fits(name: str, shape: tuple[int, int], options: Mapping[str, Any]) -> bool:
    """Return whether the form exists and regroups no vector between steps, which makes fits slow."""
    try:
        found = structlin.design(name, shape, **options)
    except ValueError:
        return False
    return not isinstance(found, Structure) or all(a.output == b.input for a, b in pairwise(found.steps))


@dataclass(frozen=True)
class Forms:
    """Forms of a named structure that are cheaper than a dense (d_out, d_in) matrix, in ascending order of MACs.

    They differ in the option ``knob``: ranks 1, 2, ... (several bonds increase together, each up to its entry of
    ``limits``), or numbers of blocks that are powers of 2 (and divide the inner size of Monarch). If ``knob`` is None,
    there is at most one form. ``values`` are the values of this option, ``options`` the common options of all forms.
    """

    name: str
    shape: tuple[int, int]
    options: Mapping[str, Any]
    knob: str | None
    limits: tuple[int, ...]
    values: Sequence[int]

    @classmethod
    def of(cls, name: str, shape: tuple[int, int], options: Mapping[str, Any]) -> Forms:
        """Return the forms that differ in the rank, or without ranks in the number of blocks."""
        known = structlin.structure_options(name)
        fixed = {k: v for k, v in options.items() if k not in ("rank", "rank_fraction", "blocks") or v is not None}
        knob: str | None = None
        limits: tuple[int, ...] = ()
        values: Sequence[int] = range(1)
        if "rank" in known and not fixed.keys() & {"rank", "rank_fraction"}:
            knob, values = "rank", range(1, min(shape) + 1)
            if name in ("low_rank", "tensor_train", "block_tensor_train"):
                limit = structlin.exact_rank(name, shape, **fixed)
                limits = limit if isinstance(limit, tuple) else (limit,)
                values = range(1, max(limits, default=1) + 1)
        elif "rank" not in known and "blocks" in known and "blocks" not in fixed:
            knob, powers = "blocks", [2**k for k in range(min(shape).bit_length() - 1, -1, -1)]
            values = [n for n in powers if _fits(name, shape, {**fixed, "blocks": n})]
        widest = cls(name, shape, fixed, knob, limits, values)
        widest.design(0)  # raises the error of wrong options
        cheaper = bisect_left(range(len(values)), True, key=lambda i: not saves(widest.design(i)))
        return replace(widest, values=values[:cheaper])

    def __len__(self) -> int:
        return len(self.values)

    def choice(self, number: int) -> dict[str, Any]:
        """Return the chosen option of a form, by name."""
        if self.knob is None:
            return {}
        value = self.values[number]
        return {self.knob: tuple(min(value, n) for n in self.limits) if len(self.limits) > 1 else value}

    def design(self, number: int) -> AbstractStructure:
        """Return the structure of a form."""
        return structlin.design(self.name, self.shape, **self.options, **self.choice(number))

    def curve(self, problems: Sequence[Problem]) -> list[tuple[int, float]]:
        """Return (number, relative error) of forms, in ascending order of MACs and non-increasing error.

        The error is that of all problems together, which get the same form: one, or those of several experts. Without a
        closed form the ranks grow by factors of 1.5, and a few sweeps compute each form.
        """
        scales = np.array([problem.norm(problem.target) for problem in problems])
        whole = np.linalg.norm(scales) or 1.0
        errors = self._spectrum(problems)
        numbers = range(len(self)) if errors is not None else self._spread()
        if errors is not None:
            found = np.linalg.norm(errors * scales[:, None], axis=0)
        else:
            found = np.array([np.linalg.norm(self._estimates(i, problems) * scales) for i in numbers])
        return list(zip(numbers, np.minimum.accumulate(found / whole).tolist(), strict=True))

    def smallest_for(
        self, error: float, problems: Sequence[Problem], settings: Settings
    ) -> tuple[int, list[Solution]] | None:
        """Return the cheapest form with a relative error of at most ``error`` for each problem, and its solutions.

        None if there is none. Without a closed form, bisection with few sweeps gives a first result, and full solutions
        of cheaper forms refine it.
        """
        solved: dict[int, list[Solution]] = {}

        def meets(number: int) -> bool:
            if number not in solved:
                solved[number] = [solve(self.design(number), problem, settings) for problem in problems]
            return all(relative(s.error, problem) <= error for s, problem in zip(solved[number], problems, strict=True))

        errors = self._spectrum(problems)
        if errors is not None:
            found = next((i for i in range(len(self)) if errors[:, i].max() <= error), len(self))
        else:
            found = bisect_left(range(len(self)), True, key=lambda i: self._estimates(i, problems).max() <= error)
            while found and meets(found - 1):
                found -= 1
        while found < len(self) and not meets(found):  # roundoff, or few sweeps that end at another error
            found += 1
        return (found, solved[found]) if found < len(self) else None

    def _estimates(self, number: int, problems: Sequence[Problem]) -> np.ndarray:
        structure = self.design(number)
        return np.array([relative(estimated_error(structure, one, CURVE_SWEEPS), one) for one in problems])

    def _spectrum(self, problems: Sequence[Problem]) -> np.ndarray | None:
        """Return the relative errors (problems, ranks) if two factors have a closed form, otherwise None."""
        if len(self.limits) != 1 or not len(self):
            return None
        found = []
        for problem in problems:
            errors = spectrum(self.design(0), problem)
            if errors is None:
                return None
            found.append(errors[: len(self)] / (problem.norm(problem.target) or 1.0))
        return np.array(found)

    def _spread(self) -> Sequence[int]:
        if self.knob != "rank" or not len(self):
            return range(len(self))
        places, place = [], 0
        while place < len(self) - 1:
            places.append(place)
            place = max(place + 1, round((place + 1) * GROWTH) - 1)
        return [*places, len(self) - 1]
