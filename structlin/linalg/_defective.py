"""The logarithm and powers of matrices that may be defective, by the Schur decompositions of SciPy, verified.

A result is NaN unless it stays the same, to a hundredth of its largest entry, if each entry of the matrix changes by
one roundoff of the dtype in which the matrix was given. A logarithm may also change by roundoff, as that of 1 does.
Both are computed in double precision, for a balanced matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from structlin import _spectra as spectra
from structlin._lapack import eps

Matrix = np.ndarray


def logarithm(matrix: Matrix, dtype: Any) -> Matrix:
    """Return the principal logarithm of a matrix."""

    def function(matrix: Matrix) -> Matrix:
        return scipy.linalg.logm(matrix) if _range(matrix, dtype, 0.0) is None else _nan(matrix)

    return _verified(function, matrix, dtype, spectra.ROUNDOFF * eps(dtype))  # roundoff of x changes log x by eps


def power(matrix: Matrix, alpha: Any, dtype: Any) -> Matrix:
    """Return the principal power of a matrix, which may be singular if the real part of alpha is positive."""

    def function(matrix: Matrix) -> Matrix:
        found = _singular_power(matrix, alpha, dtype, 0.0)
        return _regular_power(matrix, alpha) if found is None else found

    return _verified(function, matrix, dtype)


def _verified(function: Callable[[Matrix], Matrix], matrix: Matrix, dtype: Any, floor: float = 0.0) -> Matrix:
    balanced, (scale, _) = scipy.linalg.matrix_balance(matrix, permute=False, separate=True)
    unit = eps(dtype) / eps(matrix.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this check replaces the warnings of SciPy
        value = function(balanced)
        others = [function(balanced + unit * spectra.rounding(balanced, seed)) for seed in range(2)]
    if not all(bool(spectra.is_small(other - value, value, floor)) for other in others):  # False for NaN
        return _nan(matrix)
    return scale[:, None] * value / scale


def _singular_power(matrix: Matrix, alpha: Any, dtype: Any, scale: float) -> Matrix | None:
    """Return the power of a singular matrix; None if it is regular, or 0 is not clearly a semisimple eigenvalue.

    For A = L R of rank r it is ``L (R L)^(alpha - 1) R``. ``scale`` is the size of the matrix that A comes from.
    """
    parts = _range(matrix, dtype, scale)
    if parts is None or alpha.real <= 0:
        return None
    left, right, size = parts
    core = right @ left
    if not len(core) or np.linalg.svd(core, compute_uv=False)[-1] > (spectra.ROUNDOFF * eps(dtype)) ** 0.5 * size:
        middle = _regular_power(core, alpha - 1) if len(core) else core
    else:
        middle = _singular_power(core, alpha - 1, dtype, size)
    return None if middle is None else left @ middle @ right


def _regular_power(matrix: Matrix, alpha: Any) -> Matrix:
    if alpha == 0.5:
        return scipy.linalg.sqrtm(matrix)
    if isinstance(alpha, complex):
        return scipy.linalg.expm(alpha * scipy.linalg.logm(matrix))
    return scipy.linalg.fractional_matrix_power(matrix, alpha)


def _range(matrix: Matrix, dtype: Any, scale: float) -> tuple[Matrix, Matrix, float] | None:
    """Return L and R with ``A = L R`` of the rank of A and the largest singular value; None if A is regular.

    A rank below n counts only if what is left out is roundoff in each entry, which small entries of a graded matrix
    are not; ``scale`` is the size of the matrix that A comes from, whose roundoff A has.
    """
    u, s, vh = np.linalg.svd(matrix)
    size = max(scale, s.max(initial=0.0))
    roundoff = spectra.ROUNDOFF * eps(dtype)
    rank = int((s > roundoff * size).sum())
    rest = abs((u[:, rank:] * s[rank:]) @ vh[rank:])
    rows, columns = abs(matrix).max(1), abs(matrix).max(0)
    if rank == len(matrix) or (rest > roundoff * np.maximum(np.minimum.outer(rows, columns), scale)).any():
        return None
    return u[:, :rank] * s[:rank], vh[:rank], size


def _nan(matrix: Matrix) -> Matrix:
    return np.full(matrix.shape, np.nan)
