"""Base of square structures with one vector as their only factor: circulant, diagonal, permutation, transforms."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Self

from structlin.structure import AbstractStructure, Factor


@dataclass(frozen=True)
class SquareStructure(AbstractStructure):
    """Structure of a (size, size) matrix with one vector as factor, whose transpose has the same structure."""

    size: int
    factors: tuple[Factor, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"{type(self).__name__}: the size must be at least 1, got {self.size}")
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
    """Return the number of rows of a square shape; ValueError for any other shape."""
    if shape[0] != shape[1]:
        raise ValueError(f"{what} is square, got shape {shape}; use ({min(shape)}, {min(shape)})")
    return shape[0]


def length_of(shapes: tuple[tuple[int, ...], ...], takes: str) -> int:
    """Return the length of the only array; ValueError unless there is one array and it is a vector."""
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"{takes}, got arrays of shape {', '.join(map(str, shapes)) or 'none'}")
    return shapes[0][0]
