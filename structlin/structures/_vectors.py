"""Helpers for the algebra of several structures: permuted columns, sorted singular values, tied entries."""

from __future__ import annotations

from typing import Any

import numpy as np
from cola.annotations import Stiefel

from structlin._arrays import Array
from structlin._lapack import lapack
from structlin.registry import structure_class
from structlin.verdicts import SVD, Nearest


def permutation(order: Array, dtype: Any) -> Any:
    """Return the operator ``(P x)[i] = x[order[i]]`` with the given dtype, without checks."""
    cls = structure_class("permutation")
    return cls._build(cls.design((order.shape[0],) * 2), (order,), dtype)


def permuted_columns(V: Any, order: Array) -> Any:
    """Return ``V[:, order]`` as an operator."""
    return V @ permutation(order, V.dtype).T


def descending(U: Any, values: Array, Vh: Any) -> SVD:
    """Return the decomposition with singular values, and their vectors, in descending order."""
    order = lapack(values).argsort(-values)
    pick = permutation(order, U.dtype)
    return SVD(Stiefel(U @ pick.T), values[order], pick @ Vh)


def tied_nearest(index: np.ndarray, count: int, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
    """Return the least-squares v for ``A[i, j] = v[index[i, j]]``: averages or, with a covariance, normal equations."""
    values = target if covariance is None else target @ covariance
    sums = np.zeros(count, dtype=values.dtype)
    np.add.at(sums, index, values)
    if covariance is None:
        return Nearest((sums / np.bincount(index.ravel(), minlength=count),), "averages")
    normal = np.zeros((count, count), dtype=covariance.dtype)
    for row in index:
        np.add.at(normal, (row[:, None], row[None, :]), covariance.T)
    return Nearest((np.linalg.lstsq(normal, sums, rcond=None)[0],), "least squares")
