"""The Walsh-Hadamard transform, orthonormal and symmetric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import cola
import numpy as np
import scipy.linalg

from structlin._arrays import Array
from structlin._lapack import lapack
from structlin.structure import AbstractStructure
from structlin.structures._square import size_of
from structlin.structures._transform import Transform, TransformStructure
from structlin.verdicts import Answer, Determinant


class HadamardStructure(TransformStructure):
    """Structure of Sylvester's Hadamard matrix of ``size`` = 2^k rows, divided by sqrt(size)."""

    @property
    def other_flops(self) -> dict[str, int]:
        """FLOPs of log2(d) rounds of additions and of the scaling."""
        return {"additions": self.size * (self.size.bit_length() - 1), "elementwise": self.size}

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return self._columns(factors, x.swapaxes(0, 1), xp).swapaxes(0, 1)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        shape, half = tuple(x.shape), 1
        functions = lapack(x)
        y = x * (1 / math.sqrt(self.size))
        while half < self.size:
            y = y.reshape((self.size // (2 * half), 2, half, shape[1]))
            y = functions.concat_axis((y[:, :1] + y[:, 1:], y[:, :1] - y[:, 1:]), 1)
            half *= 2
        return y.reshape(shape)

    # -- algebra: half of the eigenvalues are -1, the others 1

    def slogdet(self, A: Any) -> Answer[Determinant]:
        """Return the sign: -1 for d = 2, otherwise 1."""
        one = A._eye(1)[0, 0]
        return Answer(Determinant(one * (-1 if self.size == 2 else 1), lapack(one).real(one) * 0))

    def trace(self, A: Any) -> Answer[Array]:
        """Return 1 for d = 1, otherwise 0."""
        return Answer(A._eye(1)[0, 0] * (1 if self.size == 1 else 0))

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return Sylvester's matrix divided by sqrt(d)."""
        return scipy.linalg.hadamard(self.size) / math.sqrt(self.size)


class Hadamard(Transform):
    r"""Orthonormal Walsh-Hadamard transform in Sylvester's order, for a size that is a power of two.

    .. math:: A_{ij} = \frac{1}{\sqrt d} (-1)^{\operatorname{popcount}(i \mathbin{\&} j)}

    The exponent is the number of binary digits that are 1 in both i and j. The matrix is symmetric and its own inverse.
    There are no parameters. A product costs :math:`d \log_2 d` additions.

    Parameters
    ----------
    size
        Number of rows d, a power of two.
    backend, dtype, device
        Array library, dtype and device of the operator.

    Examples
    --------
    >>> import numpy as np
    >>> Hadamard(4) @ np.array([1.0, 0.0, 0.0, 1.0])
    array([1., 0., 0., 1.])
    """

    name = "hadamard"
    formula = "y_i = sum_j (-1)^popcount(i & j) x_j / sqrt(d)"
    source = "Fino and Algazi (1976), Unified matrix treatment of the fast Walsh-Hadamard transform"
    examples = (((8, 8), {}), ((2, 2), {}), ((1, 1), {}))

    @classmethod
    def _own_annotations(cls, structure: AbstractStructure) -> frozenset[type]:
        return frozenset({cola.Unitary, cola.SelfAdjoint})

    @staticmethod
    def design(shape: tuple[int, int], /) -> HadamardStructure:
        """Return the structure of a (d, d) transform.

        Parameters
        ----------
        shape
            Shape ``(d, d)`` of the matrix, where d is a power of two.

        Returns
        -------
        AbstractStructure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If the matrix is not square or d is not a power of two.
        """
        n = size_of(shape, "a Hadamard transform")
        if n & (n - 1):
            below, above = 1 << (n.bit_length() - 1), 1 << n.bit_length()
            raise ValueError(f"a Hadamard transform has 2^k rows, got {n}; the nearest sizes are {below} and {above}")
        return HadamardStructure(n)
