"""The learning rate as a function of the step: linear warm-up, then cosine or constant."""

import math

__all__ = ["cosine", "learning_rate"]


def cosine(step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """The share of the base learning rate that step `step` takes.

    The warm-up rises linearly and reaches 1 at step `warmup`; from there on,
    ``final + (1 - final) (1 + cos(pi * t)) / 2`` with t going from 0 to 1, so that the share would be `final` at
    step `total`, which is never taken. A function of the step alone, there is no state to save.

    Args:
        step: from 0 to total - 1 (`total` itself is allowed and gives `final`).
        total: steps of the whole run, at least 1.
        warmup: steps of the warm-up, from 0 to below `total`.
        final: share at the end, from 0 to 1.

    Raises:
        ValueError: a step outside the run, a warm-up as long as the run, or a share outside its range.

    Source: Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017, equation 5.

    Example:
        >>> [round(cosine(step, 6, warmup=2), 3) for step in range(7)]
        [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= step <= total or not 0 <= warmup < total or not 0 <= final <= 1:
        raise ValueError(
            f"0 <= step <= total, 0 <= warmup < total and 0 <= final <= 1, got {step}, {total}, {warmup}, {final}"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    fallen = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return fallen if final == 0 else final + (1 - final) * fallen


def learning_rate(schedule: str, step: int, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """The share by a schedule's name: ``cosine``, or ``constant`` after the same warm-up.

    Raises:
        ValueError: as `cosine`; an unknown schedule.

    >>> [learning_rate("constant", step, 4, warmup=1) for step in range(3)]
    [0.5, 1.0, 1.0]
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"the schedule must be cosine or constant, got {schedule!r}")
    return cosine(step, total, warmup, final if schedule == "cosine" else 1.0)
