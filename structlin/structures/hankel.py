"""Hankel matrices: Toeplitz matrices with their columns in reverse order."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from structlin._arrays import Array, backend_of, ops
from structlin._lapack import lapack
from structlin.registry import NamedOperator, register
from structlin.structures._vectors import permutation, tied_nearest
from structlin.structures.toeplitz import Toeplitz, ToeplitzStructure
from structlin.verdicts import Answer, Determinant, Nearest


class HankelStructure(ToeplitzStructure):
    """Structure of a (d_out, d_in) Hankel matrix ``A = T J``: T is Toeplitz with the same kernel, J reverses x."""

    def transpose(self) -> HankelStructure:
        """Exchange the numbers of rows and columns."""
        return HankelStructure(self.d_in, self.d_out)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Return the factors as they are."""
        return tuple(factors)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return super()._rows(factors, self._columns_reversed(x.swapaxes(0, 1)).swapaxes(0, 1), xp)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return super()._columns(factors, self._columns_reversed(x), xp)

    @staticmethod
    def _columns_reversed(x: Array) -> Array:
        return ops(backend_of(x)).flip(x)

    # -- algebra: from that of T; J is its own inverse

    def inverse(self, A: Any) -> Answer[Any] | None:
        """Return ``J T^-1``."""
        found = super().inverse(_toeplitz(A))
        if found is None:
            return None
        index = lapack(A.factors[0]).index(np.arange(self.d_in)[::-1], A.factors[0])
        return Answer(permutation(index, A.dtype) @ found.value, found.verdict)

    def solve(self, A: Any, b: Array) -> Answer[Array] | None:
        """Solve with T and reverse the result."""
        found = super().solve(_toeplitz(A), b)
        return None if found is None else Answer(ops(backend_of(b)).flip(found.value))

    def slogdet(self, A: Any) -> Answer[Determinant] | None:
        """Multiply the determinant of T by that of J."""
        found = super().slogdet(_toeplitz(A))
        if found is None:
            return None
        sign = -1 if self.d_in // 2 % 2 else 1  # of J
        return Answer(Determinant(found.value.sign * sign, found.value.logabsdet))

    def diagonal(self, A: Any, k: int) -> Answer[Array]:
        """Return every second entry of the kernel, from entry abs(k) on."""
        count = min(self.d_out + min(k, 0), self.d_in - max(k, 0))
        return Answer(A.factors[0][abs(k) : abs(k) + 2 * count - 1 : 2])

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Add the kernels of two Hankel matrices."""
        if not isinstance(B.structure, HankelStructure):
            return None
        return Answer(Hankel._build(self, (A.factors[0] + B.factors[0],)))

    def shifted(self, A: Any, value: Any) -> None:
        """Return None: the sum of a Hankel and a diagonal matrix is not a Hankel matrix."""
        return None

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        """Average the entries of each antidiagonal; with a covariance, solve least squares."""
        index = np.arange(self.d_out)[:, None] + np.arange(self.d_in)
        return tied_nearest(index, self.factors[0].numel, target, covariance)

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the matrix with entries ``kernel[i + j]``."""
        return factors[0][np.arange(self.d_out)[:, None] + np.arange(self.d_in)]


def _toeplitz(A: Any) -> Toeplitz:
    """Return T, where ``A = T J``."""
    return Toeplitz.from_kernel(A.factors[0], A.shape[0])


@register("hankel")
class Hankel(NamedOperator):
    r"""Hankel matrix: constant along each antidiagonal, applied by FFT.

    .. math:: A_{ij} = \mathrm{kernel}_{i + j}

    The kernel has :math:`d_\text{out} + d_\text{in} - 1` parameters. ``Hankel(column, row)`` takes the first column, of
    shape (d_out,), and the last row, of shape (d_in,). Both contain the lower left corner: the first entry of the row
    is ignored, as in :func:`scipy.linalg.hankel`. Cost and scale are those of a Toeplitz matrix.

    Parameters
    ----------
    column
        First column, of shape (d_out,).
    row
        Last row, of shape (d_in,); the first entry is ignored.

    Examples
    --------
    >>> import numpy as np
    >>> Hankel(np.array([1.0, 2.0]), np.array([2.0, 3.0, 4.0])).to_dense().round()
    array([[1., 2., 3.],
           [2., 3., 4.]])
    """

    formula = "y_i = sum_j kernel_(i + j) x_j"
    parameters = "d_out + d_in - 1"
    source = "Golub and Van Loan (2013), Matrix Computations, section 4.8"
    examples = (((5, 7), {}), ((7, 4), {}), ((1, 3), {}))

    def __init__(self, column: Array, row: Array) -> None:
        if column.ndim != 1 or row.ndim != 1 or 0 in (column.shape[0], row.shape[0]):
            raise ValueError(
                f"Hankel takes a first column and a last row, (d_out,) and (d_in,), got shapes {tuple(column.shape)} "
                f"and {tuple(row.shape)}"
            )
        kernel = ops(backend_of(column)).concat([column, row[1:]])
        super(NamedOperator, self).__init__(HankelStructure(column.shape[0], row.shape[0]), (kernel,))

    @staticmethod
    def design(shape: tuple[int, int], /) -> HankelStructure:
        """Return the structure of a (d_out, d_in) Hankel matrix. There are no options.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.

        Returns
        -------
        AbstractStructure
            The structure, without arrays.
        """
        return HankelStructure(*shape)
