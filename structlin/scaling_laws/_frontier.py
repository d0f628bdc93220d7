"""The Pareto frontier of compute and error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pareto_frontier(compute: npt.ArrayLike, error: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the indices of the points that no other point beats, in order of compute.

    A point is beaten where another has no more compute and no more error, and less of one of them. Of points that
    are equal the first is kept, so that along the frontier compute rises and error falls, both strictly.

    Parameters
    ----------
    compute
        Shape (n,), lower is better.
    error
        Shape (n,), lower is better.

    Raises
    ------
    ValueError
        Arrays of other shapes, of different lengths, or with a NaN.

    Examples
    --------
    >>> pareto_frontier([1, 2, 2, 3, 4], [9, 5, 6, 5, 1]).tolist()
    [0, 1, 4]
    """
    x, y = as_points(compute, error)
    order = np.lexsort((np.arange(len(x)), y, x))
    best = np.minimum.accumulate(y[order])
    falls = np.concatenate([[True], best[1:] < best[:-1]]) if len(x) else np.zeros(0, bool)
    return order[falls]


def as_points(compute: npt.ArrayLike, error: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both as float64 arrays of one shape (n,), without NaN; ValueError where they are not that."""
    x, y = np.asarray(compute, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"compute and error must have one shape (n,), got {x.shape} and {y.shape}")
    for name, values in (("compute", x), ("error", y)):
        if np.isnan(values).any():
            raise ValueError(f"{name} has a NaN at place {int(np.flatnonzero(np.isnan(values))[0])}")
    return x, y
