"""The learning rate as a function of the step: linear warm-up, then cosine to 0."""

import math

__all__ = ["cosine"]


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """The share of the base learning rate that step `step` takes.

    The warm-up rises linearly and reaches 1 at step `warmup`; from there on,
    ``(1 + cos(pi * t)) / 2`` with t going from 0 to 1, so that the rate would be 0 at step `total`, which is
    never taken. A function of the step alone, there is no state to save.

    Args:
        step: from 0 to total - 1 (`total` itself is allowed and gives 0).
        total: steps of the whole run, at least 1.
        warmup: steps of the warm-up, from 0 to below `total`.

    Raises:
        ValueError: a step outside the run, or a warm-up as long as the run.

    Source: Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017, equation 5.

    Example:
        >>> [round(cosine(step, 6, warmup=2), 3) for step in range(7)]
        [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= step <= total or not 0 <= warmup < total:
        raise ValueError(f"0 <= step <= total and 0 <= warmup < total, got {step}, {total}, {warmup}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
