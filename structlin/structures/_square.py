"""What circulant, diagonal and permutation matrices share: they are square, and made of one vector without products."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Self

from structlin.structure import AbstractStructure, Factor


@dataclass(frozen=True)
class SquareStructure(AbstractStructure):
    """A ``size`` x ``size`` matrix of one vector of that length, whose transpose is of the same kind."""

    size: int
    factors: tuple[Factor, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", (self._factor(self.size),))

    @staticmethod
    @abstractmethod
    def _factor(size: int) -> Factor:
        """Return the one factor."""

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def macs(self) -> int:
        return 0

    def transpose(self) -> Self:
        return self


def size_of(shape: tuple[int, int], what: str) -> int:
    """Rows of a square shape; ValueError for any other."""
    if shape[0] != shape[1]:
        raise ValueError(f"{what} is square, got shape {shape}; ({min(shape)}, {min(shape)}) would do")
    return shape[0]


def length_of(shapes: tuple[tuple[int, ...], ...], takes: str) -> int:
    """Length of the only array, a vector; ValueError for anything else."""
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"{takes}, got arrays of shape {', '.join(map(str, shapes)) or 'none'}")
    return shapes[0][0]
