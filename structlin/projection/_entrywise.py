"""Structures that are no chains: entries tied together (circulant, Toeplitz, diagonal), and permutations."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from structlin.structure import AbstractStructure
from structlin.structures.circulant import CirculantStructure
from structlin.structures.diagonal import DiagonalStructure
from structlin.structures.permutation import PermutationStructure
from structlin.structures.toeplitz import ToeplitzStructure


def supported(structure: AbstractStructure) -> bool:
    """Whether :func:`nearest` can fit this structure."""
    return isinstance(structure, CirculantStructure | DiagonalStructure | PermutationStructure | ToeplitzStructure)


def nearest(structure: AbstractStructure, target: np.ndarray, covariance: np.ndarray | None) -> np.ndarray:
    """The one factor of the nearest matrix; all of these have a closed form, weighted too."""
    if isinstance(structure, PermutationStructure):
        return _permutation(target, covariance)
    rows, columns = (np.asarray(i) for i in np.indices(target.shape))
    if isinstance(structure, DiagonalStructure):
        if covariance is None:
            return np.diagonal(target).copy()
        weights = np.diagonal(covariance).real
        return np.divide(
            np.diagonal(target @ covariance), weights, where=weights > 0, out=np.zeros(len(target), target.dtype)
        )
    if isinstance(structure, CirculantStructure):
        index = (rows - columns) % structure.size
    else:
        index = rows - columns + structure.d_in - 1
    return _tied(index, structure.factors[0].numel, target, covariance)


def _tied(index: np.ndarray, count: int, target: np.ndarray, covariance: np.ndarray | None) -> np.ndarray:
    """Least squares for ``A[i, j] = v[index[i, j]]``: averages, or the normal equations where weighted."""
    values = target if covariance is None else target @ covariance
    sums = np.zeros(count, dtype=target.dtype)
    np.add.at(sums, index, values)
    if covariance is None:
        return sums / np.bincount(index.ravel(), minlength=count)
    normal = np.zeros((count, count), dtype=covariance.dtype)
    for row in index:
        normal[np.ix_(row, row)] += covariance.T
    return np.linalg.lstsq(normal, sums, rcond=None)[0]


def _permutation(target: np.ndarray, covariance: np.ndarray | None) -> np.ndarray:
    """``|| target - A ||^2`` is a constant minus ``2 Re target[i, index[i]]`` (plus the weight of that column)."""
    if covariance is None:
        cost = -target.real
    else:
        cost = np.diagonal(covariance).real - 2 * (target @ covariance).real
    return linear_sum_assignment(cost)[1]
