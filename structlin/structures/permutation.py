"""Permutation matrices."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import cola
import numpy as np

from structlin._arrays import Array, backend_of
from structlin.registry import NamedOperator, register
from structlin.structure import AbstractStructure, Factor
from structlin.structures._square import SquareStructure, size_of


class PermutationStructure(SquareStructure):
    """A ``size`` x ``size`` permutation: no parameters and no FLOPs, one index array."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("index", (size,), fan_in=1, fan_out=1, blocks=size, trainable=False)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        return (factors[0].argsort(),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x[:, factors[0]]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x[factors[0]]


@register("permutation")
class Permutation(NamedOperator):
    """``(A x)[i] = x[index[i]]``, with ``index`` an integer array that holds 0, ..., d-1 once each.

    The dtype that the operator counts as having is given as ``dtype`` (default: the library's default float).

    >>> import numpy as np
    >>> Permutation(np.array([2, 0, 1])) @ np.array([1.0, 2.0, 3.0])
    array([3., 1., 2.])
    """

    formula = "y_i = x_index(i)"
    parameters = "0"
    source = "-"
    examples = (((5, 5), {}), ((1, 1), {}))

    def __init__(self, index: Array, dtype: Any = None) -> None:
        if backend_of(index) != "jax":  # values of jax arrays may be traced
            values = np.asarray(index)
            if (
                values.ndim != 1
                or values.dtype.kind not in "iu"
                or not np.array_equal(np.sort(values), np.arange(len(values)))
            ):
                raise ValueError(f"a permutation holds the integers 0, ..., d-1 once each, got {values!r}")
        super(NamedOperator, self).__init__(PermutationStructure(int(index.shape[0])), (index,), dtype)

    @staticmethod
    def design(shape: tuple[int, int], /) -> PermutationStructure:
        """A square permutation matrix; ValueError for any other shape."""
        return PermutationStructure(size_of(shape, "a permutation"))

    @classmethod
    def _own_annotations(cls, structure: AbstractStructure) -> frozenset[type]:
        return frozenset({cola.Unitary})
