"""Checked points, and the Pareto frontier of compute and error."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pareto_frontier(compute: npt.ArrayLike, error: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the indices of the points on the Pareto frontier, in order of compute.

    A point is on the frontier unless another point has at most its compute and at most its error, and less of one of
    them. Of equal points the first is returned. Along the frontier, compute increases and error decreases strictly.

    Parameters
    ----------
    compute, error
        Coordinates of the points, shape (n,). Lower is better.

    Returns
    -------
    numpy.ndarray
        Indices of the points.

    Raises
    ------
    ValueError
        If the arrays are not vectors of equal length, or contain a NaN.

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
    """Return both as float64 arrays; ValueError unless they are vectors of equal length without NaN."""
    x, y = np.asarray(compute, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"compute and error must have the same shape (n,), got {x.shape} and {y.shape}")
    for name, values in (("compute", x), ("error", y)):
        if np.isnan(values).any():
            raise ValueError(
                f"{name} must not contain NaN, got one at index {int(np.flatnonzero(np.isnan(values))[0])}"
            )
    return x, y


def positive(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return values as a float64 vector; ValueError unless all are positive and finite."""
    found = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if found.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {found.shape}")
    if not (np.isfinite(found) & (found > 0)).all():
        bad = found[~(np.isfinite(found) & (found > 0))][0]
        raise ValueError(f"{name} must be positive and finite to have a logarithm, got {bad:g}")
    return found
