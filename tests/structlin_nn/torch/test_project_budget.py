"""Sharing out a budget, against all choices there are."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin_nn.torch._project_curve import allocate, hull

CURVE = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=5).map(
    lambda points: sorted((cost, float(loss)) for cost, loss in dict(points).items())
)


def total(curves, at, part):
    return sum(curve[i][part] for curve, i in zip(curves, at, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.lists(CURVE, min_size=1, max_size=4), st.integers(0, 100))
def test_budget_is_kept_and_the_loss_is_near_the_smallest(curves, budget):
    fitting = [at for at in product(*(range(len(c)) for c in curves)) if total(curves, at, 0) <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="more than the budget"):
            allocate(curves, budget)
        return
    found = allocate(curves, budget)
    assert total(curves, found, 0) <= budget
    best, loss = min(total(curves, at, 1) for at in fitting), total(curves, found, 1)
    steps = [c[i][1] - c[j][1] for c in curves for i, j in zip(hull(c), hull(c)[1:], strict=False)]
    assert best <= loss <= best + max(steps, default=0.0)
    for layer, curve in enumerate(curves):  # nothing more fits that would help
        left = budget - total(curves, found, 0) + curve[found[layer]][0]
        assert all(cost > left or loss >= curve[found[layer]][1] for cost, loss in curve)


@settings(max_examples=200, deadline=None)
@given(CURVE)
def test_hull_is_the_lower_convex_one(curve):
    found = hull(curve)
    costs, losses = np.array(curve).T
    assert found[0] == 0
    assert losses[found[-1]] == losses.min()
    slopes = np.diff(losses[found]) / np.diff(costs[found])
    assert (slopes < 0).all()
    assert (np.diff(slopes) > 0).all()
    below = np.interp(costs, costs[found], losses[found])
    assert (losses >= below - 1e-9).all()
