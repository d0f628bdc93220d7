"""Diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from structlin._arrays import Array
from structlin.registry import NamedOperator, register
from structlin.structure import Factor
from structlin.structures._square import SquareStructure, length_of, size_of


class DiagonalStructure(SquareStructure):
    """A ``size`` x ``size`` diagonal matrix: ``size`` blocks of 1 x 1, applied by an elementwise product."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("diagonal", (size,), fan_in=1, fan_out=1, blocks=size)

    @property
    def other_flops(self) -> dict[str, int]:
        return {"elementwise": self.size}

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(factors)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x * factors[0]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return factors[0][:, None] * x


@register("diagonal")
class Diagonal(NamedOperator):
    """``A = diag(v)``, with v of shape (d,).

    Parameters d; no products, d elementwise FLOPs. Scale: blocks of 1 x 1, so the deviation is 1.

    >>> import numpy as np
    >>> Diagonal(np.array([2.0, 3.0])) @ np.ones(2)
    array([2., 3.])
    """

    formula = "y_i = v_i x_i"
    parameters = "d"
    source = "-"
    examples = (((5, 5), {}), ((1, 1), {}))

    @staticmethod
    def design(shape: tuple[int, int], /) -> DiagonalStructure:
        """A square diagonal matrix; ValueError for any other shape."""
        return DiagonalStructure(size_of(shape, "a diagonal matrix"))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> DiagonalStructure:
        return DiagonalStructure(length_of(shapes, "Diagonal takes one vector"))
