"""What the algebra of a structure answers: a value, and how sure it is.

A method of :class:`structlin.structure.AbstractStructure` that does not know an answer returns None, and something
denser or iterative takes over. Every other answer is an :class:`Answer`.
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
    """How sure an answer is.

    ``VERIFIED``: a closed form without cancellation, or the residual of this very problem is at roundoff.
    ``NOT_VERIFIED``: the values are traced, so nobody could look; what is checked there gives NaN instead.
    ``SINGULAR``: the matrix is singular to working precision. ``ESTIMATED``: within ``Answer.error``.
    """

    VERIFIED = "verified"
    NOT_VERIFIED = "not verified"
    SINGULAR = "singular"
    ESTIMATED = "estimated"


@dataclass(frozen=True)
class Answer(Generic[T]):
    """A value with its verdict.

    ``error``: the relative residual or the standard error, where one is known. ``statistics``: of an iteration
    (``iterations``, ``products``, ``probes``).
    """

    value: T
    verdict: Verdict = Verdict.VERIFIED
    error: float | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


class Determinant(NamedTuple):
    """The sign (a number of magnitude 1 where complex, 0 where singular) and the logarithm of the magnitude."""

    sign: Array
    logabsdet: Array


class SVD(NamedTuple):
    """``A = U diag(S) Vh``.

    U is an operator (d_out, r) with orthonormal columns, S an array (r,), real and descending, and Vh an operator
    (r, d_in) with orthonormal rows.
    """

    U: Any
    S: Array
    Vh: Any


@dataclass(frozen=True)
class Eigen:
    """``A = vectors diag(values) vectors^-1``, all of it, in no order.

    ``inverse`` returns ``vectors^-1`` as an operator; None where the vectors do not reproduce A (it is defective).
    ``normal``: the vectors are unitary.
    """

    values: Array
    vectors: Any
    inverse: Callable[[], Any]
    normal: bool = False


class Nearest(NamedTuple):
    """Factors (NumPy, float64 or complex128) of the nearest matrix of a structure, and how they were found."""

    factors: tuple[np.ndarray, ...]
    method: str
