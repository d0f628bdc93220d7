"""Toeplitz matrices, applied by FFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Self

from scipy.fft import next_fast_len

from structlin._arrays import Array, backend_of, common_backend, ops
from structlin.registry import NamedOperator, register
from structlin.structure import AbstractStructure, Factor
from structlin.structures._convolution import fft_product, product_flops, real_fft_flops


@dataclass(frozen=True)
class ToeplitzStructure(AbstractStructure):
    """A ``d_out`` x ``d_in`` Toeplitz matrix inside a circulant one; its counts are those of real data.

    ``fft_size``: length of the transforms, the next one with small prime factors.
    """

    d_out: int
    d_in: int
    factors: tuple[Factor, ...] = field(init=False, compare=False, repr=False)
    fft_size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kernel = Factor("kernel", (self.d_out + self.d_in - 1,), fan_in=self.d_in, fan_out=self.d_out)
        object.__setattr__(self, "factors", (kernel,))
        # Not a property: torch.compile can not trace into SciPy.
        object.__setattr__(self, "fft_size", next_fast_len(self.d_out + self.d_in - 1))

    @property
    def macs(self) -> int:
        return 0

    @property
    def other_flops(self) -> dict[str, int]:
        return product_flops(self.fft_size)

    @property
    def setup_flops(self) -> dict[str, int]:
        return {"fft": real_fft_flops(self.fft_size)}

    def transpose(self) -> ToeplitzStructure:
        return ToeplitzStructure(self.d_in, self.d_out)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        return (ops(backend_of(factors[0])).flip(factors[0]),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        y = fft_product(factors[0], x, self.fft_size, -1, xp)
        return y[:, self.d_in - 1 : self.d_in - 1 + self.d_out]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        y = fft_product(factors[0], x, self.fft_size, 0, xp)
        return y[self.d_in - 1 : self.d_in - 1 + self.d_out]


@register("toeplitz")
class Toeplitz(NamedOperator):
    """``A[i, j] = kernel[i - j + d_in - 1]``, from its diagonals, the upper right corner first.

    ``Toeplitz(column, row)`` takes the first column, of shape (d_out,), and the first row without the corner that
    both share, of shape (d_in - 1,). Parameters ``d_out + d_in - 1``. Work for a real vector: two real FFTs of
    length N, the next fast one from d_out + d_in - 1, and an elementwise product; once for each application, the FFT
    of the kernel. Scale: as a dense matrix, since every output sums d_in inputs.

    >>> import numpy as np
    >>> Toeplitz(np.array([1.0, 4.0]), np.array([2.0, 3.0])).to_dense().round()
    array([[1., 2., 3.],
           [4., 1., 2.]])
    """

    formula = "y_i = sum_j kernel_(i - j) x_j"
    parameters = "d_out + d_in - 1"
    source = "Gray (2006), Toeplitz and Circulant Matrices: A Review"
    examples = (((5, 7), {}), ((7, 4), {}), ((1, 3), {}))

    def __init__(self, column: Array, row: Array) -> None:
        xp = ops(common_backend((column, row)))
        if column.ndim != 1 or row.ndim != 1 or column.shape[0] == 0:
            raise ValueError(
                f"Toeplitz takes a first column and the rest of the first row, "
                f"got shapes {tuple(column.shape)} and {tuple(row.shape)}"
            )
        structure = ToeplitzStructure(column.shape[0], row.shape[0] + 1)
        super(NamedOperator, self).__init__(structure, (xp.concat([xp.flip(row), column]),))

    @classmethod
    def from_kernel(cls, kernel: Array, d_out: int) -> Self:
        """From all diagonals, ``kernel[i - j + d_in - 1]``, and the number of rows.

        Raises ValueError unless ``kernel`` is a vector of at least ``d_out`` entries.
        """
        if kernel.ndim != 1 or not 1 <= d_out <= kernel.shape[0]:
            raise ValueError(
                f"a kernel of at least d_out = {d_out} >= 1 entries is needed, got shape {tuple(kernel.shape)}"
            )
        structure = ToeplitzStructure(d_out, kernel.shape[0] - d_out + 1)
        structure.check((kernel,))
        return cls._build(structure, (kernel,))

    @staticmethod
    def design(shape: tuple[int, int], /) -> ToeplitzStructure:
        """A (d_out, d_in) Toeplitz matrix; no options."""
        return ToeplitzStructure(*shape)
