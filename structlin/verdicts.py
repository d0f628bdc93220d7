"""Results of the algebra of a structure: a value, with a verdict on its accuracy.

A method of :class:`structlin.structure.AbstractStructure` returns an :class:`Answer`, or None if the structure has no
method for the problem. A dense or iterative method is then used instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from structlin._arrays import Array

T = TypeVar("T")


class Verdict(Enum):
    """Verdict on the accuracy of an answer."""

    #: A closed form without cancellation, or the residual of this problem is at roundoff.
    VERIFIED = "verified"
    #: Values are traced, so they cannot be checked at this point. A check in the traced code gives NaN if it fails.
    #: Also, a right-hand side is not finite, and so its solution is NaN.
    NOT_VERIFIED = "not verified"
    #: The matrix is singular to working precision.
    SINGULAR = "singular"
    #: ``Answer.error`` is the error: a relative residual above roundoff, or the standard error of a random estimate.
    ESTIMATED = "estimated"


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A value with its verdict.

    Attributes
    ----------
    value
        The result.
    verdict
        Its accuracy.
    error
        Relative residual, or standard error of an estimate; None if not known.
    statistics
        Numbers of ``iterations``, ``products`` and ``probes`` of an iterative method.
    """

    value: T
    verdict: Verdict = Verdict.VERIFIED
    error: float | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


class Determinant(NamedTuple):
    """Determinant of a square matrix.

    Attributes
    ----------
    sign
        1 or -1, a number of magnitude 1 for a complex matrix, or 0 for a singular one.
    logabsdet
        Logarithm of the absolute value.
    """

    sign: Array
    logabsdet: Array


class SVD(NamedTuple):
    """Thin singular value decomposition ``A = U diag(S) Vh``.

    Attributes
    ----------
    U
        Operator of shape (d_out, r) with orthonormal columns.
    S
        Singular values, real and descending, shape (r,).
    Vh
        Operator of shape (r, d_in) with orthonormal rows.
    """

    U: Any
    S: Array
    Vh: Any


@dataclass(frozen=True)
class Eigen:
    """Complete eigendecomposition ``A = vectors diag(values) vectors^-1``, in no particular order.

    Attributes
    ----------
    values
        Eigenvalues, shape (n,).
    vectors
        Eigenvectors, the columns of an operator.
    inverse
        Function that returns ``vectors^-1`` as an operator, or None if A is defective.
    normal
        True if the vectors are unitary.
    """

    values: Array
    vectors: Any
    inverse: Callable[[], Any]
    normal: bool = False


class Nearest(NamedTuple):
    """Nearest matrix of a structure.

    Attributes
    ----------
    factors
        Its factors, NumPy arrays in float64 or complex128.
    method
        Name of the method that found them.
    """

    factors: tuple[np.ndarray, ...]
    method: str
