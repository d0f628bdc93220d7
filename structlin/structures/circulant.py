"""Circulant matrices, applied by FFT."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from structlin._arrays import Array, backend_of, ops
from structlin.registry import NamedOperator, register
from structlin.structure import Factor
from structlin.structures._convolution import fft_product, product_flops, real_fft_flops
from structlin.structures._square import SquareStructure, length_of, size_of


class CirculantStructure(SquareStructure):
    """A ``size`` x ``size`` circulant matrix; its counts are those of real data."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("column", (size,), fan_in=size, fan_out=size)

    @property
    def other_flops(self) -> dict[str, int]:
        return product_flops(self.size)

    @property
    def setup_flops(self) -> dict[str, int]:
        return {"fft": real_fft_flops(self.size)}

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        xp = ops(backend_of(factors[0]))
        return (xp.roll(xp.flip(factors[0]), 1),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return fft_product(factors[0], x, self.size, -1, xp)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return fft_product(factors[0], x, self.size, 0, xp)


@register("circulant")
class Circulant(NamedOperator):
    """``A[i, j] = c[(i - j) mod d]``, from its first column c of shape (d,).

    Parameters d. Work for a real vector: two real FFTs of length d (``2.5 d log2 d`` FLOPs each) and an elementwise
    product; once for each application, the FFT of the column. Scale: every output sums d inputs, so both fans are d;
    with independent entries of deviation ``1 / sqrt(d)`` the spectral norm is of order ``sqrt(log d)``.

    >>> import numpy as np
    >>> Circulant(np.array([0.0, 1.0, 0.0])).to_dense().round()
    array([[0., 0., 1.],
           [1., 0., 0.],
           [0., 1., 0.]])
    """

    formula = "y_i = sum_j c_(i - j mod d) x_j"
    parameters = "d"
    source = "Gray (2006), Toeplitz and Circulant Matrices: A Review"
    examples = (((5, 5), {}), ((6, 6), {}), ((1, 1), {}))

    @staticmethod
    def design(shape: tuple[int, int], /) -> CirculantStructure:
        """A square circulant matrix; ValueError for any other shape."""
        return CirculantStructure(size_of(shape, "a circulant matrix"))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> CirculantStructure:
        return CirculantStructure(length_of(shapes, "Circulant takes its first column"))
