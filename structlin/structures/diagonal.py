"""Diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from structlin._arrays import Array
from structlin.registry import NamedOperator, register
from structlin.structure import AbstractStructure, Factor


@dataclass(frozen=True)
class DiagonalStructure(AbstractStructure):
    """A ``size`` x ``size`` diagonal matrix: ``size`` blocks of 1 x 1, applied by an elementwise product."""

    size: int
    factors: tuple[Factor, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", (Factor("diagonal", (self.size,), fan_in=1, fan_out=1, blocks=self.size),))

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def macs(self) -> int:
        return 0

    @property
    def other_flops(self) -> dict[str, int]:
        return {"elementwise": self.size}

    def transpose(self) -> DiagonalStructure:
        return self

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
        if shape[0] != shape[1]:
            raise ValueError(f"a diagonal matrix is square, got shape {shape}; ({min(shape)}, {min(shape)}) would do")
        return DiagonalStructure(shape[0])

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> DiagonalStructure:
        if len(shapes) != 1 or len(shapes[0]) != 1:
            raise ValueError(f"Diagonal takes one vector, got arrays of shape {', '.join(map(str, shapes)) or 'none'}")
        return DiagonalStructure(shapes[0][0])
