"""Diagonal matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Unitary

from structlin import _spectra as spectra
from structlin._arrays import Array
from structlin._cola_compat import entries_of_diagonal
from structlin._lapack import determinant_of_numbers, inverse_values, lapack, phases, promoted, reciprocals
from structlin.registry import NamedOperator, register
from structlin.structure import Factor
from structlin.structures._square import SquareStructure, length_of, size_of
from structlin.structures._vectors import descending
from structlin.verdicts import SVD, Answer, Determinant, Eigen, Nearest


class DiagonalStructure(SquareStructure):
    """Structure of a (size, size) diagonal matrix: blocks of shape (1, 1), applied by an elementwise product."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("diagonal", (size,), fan_in=1, fan_out=1, blocks=size)

    @property
    def other_flops(self) -> dict[str, int]:
        """FLOPs of the elementwise product."""
        return {"elementwise": self.size}

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Return the factors as they are."""
        return tuple(factors)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x * factors[0]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return factors[0][:, None] * x

    # -- algebra

    def inverse(self, A: Any) -> Answer[Any]:
        """Return the matrix of reciprocals; LinAlgError if an entry is zero."""
        return Answer(Diagonal(inverse_values(spectra.require_positive(A.factors[0], A.isa(PSD)), 0.0)))

    def pinv(self, A: Any) -> Answer[Any]:
        """Return the matrix of the reciprocals of nonzero entries; zeros stay."""
        return Answer(Diagonal(reciprocals(A.factors[0])))

    def slogdet(self, A: Any) -> Answer[Determinant]:
        """Multiply the entries."""
        return Answer(determinant_of_numbers(spectra.require_positive(A.factors[0], A.isa(PSD))))

    def diagonal(self, A: Any, k: int) -> Answer[Array]:
        """Return the entries for k = 0, otherwise zeros."""
        return Answer(A.factors[0] if k == 0 else A.factors[0][: self.size - abs(k)] * 0)

    def eig(self, A: Any) -> Answer[Eigen]:
        """Return the entries as eigenvalues, with the unit vectors."""
        values = A.factors[0]
        vectors = Unitary(Diagonal(values * 0 + 1))
        values = lapack(values).real(values) if A.isa(SelfAdjoint) else values
        return Answer(Eigen(values, vectors, lambda: vectors, normal=True))

    def svd(self, A: Any) -> Answer[SVD]:
        """Return the absolute values in descending order, with their singular vectors."""
        size, signs = phases(A.factors[0])
        return Answer(descending(Diagonal(signs), size, Diagonal(signs * 0 + 1)))

    def function(self, A: Any, f: Any) -> Answer[Any]:
        """Apply f to the entries."""
        return Answer(Diagonal(f.on_diagonal(A.factors[0], A)))

    def power(self, A: Any, k: int) -> Answer[Any]:
        """Raise the entries to the power k."""
        return Answer(Diagonal(A.factors[0] ** k))

    def frobenius_norm(self, A: Any) -> Answer[Array]:
        """Return the norm of the entries."""
        return Answer(lapack(A.factors[0]).norm(A.factors[0]))

    def spectral_norm(self, A: Any) -> Answer[Array]:
        """Return the largest absolute value."""
        return Answer(abs(A.factors[0]).max())

    def product(self, A: Any, B: Any) -> Answer[Any] | None:
        """Multiply two diagonal matrices."""
        if isinstance(B.structure, DiagonalStructure):
            return Answer(Diagonal(A.factors[0] * B.factors[0]))
        return None

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Add two diagonal matrices."""
        return self.shifted(A, B.factors[0]) if isinstance(B.structure, DiagonalStructure) else None

    def shifted(self, A: Any, value: Any) -> Answer[Any]:
        """Add ``value`` to the entries."""
        return Answer(Diagonal(A.factors[0] + value))

    def kron(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the products of all pairs of entries."""
        if not isinstance(B.structure, DiagonalStructure):
            return None
        x, y = promoted(A.factors[0], B.factors[0])
        return Answer(Diagonal((x[:, None] * y[None, :]).reshape((math.prod((A.shape[0], B.shape[0])),))))

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        """Return the diagonal of the target; with a covariance, solve weighted least squares."""
        if covariance is None:
            return Nearest((np.diagonal(target).copy(),), "averages")
        weights = np.diagonal(covariance).real
        weighted = np.einsum("ij,ji->i", target, covariance)
        found = np.divide(weighted, weights, where=weights > 0, out=np.zeros(len(target), weighted.dtype))
        return Nearest((found,), "least squares")

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Place the entries on the diagonal."""
        return np.diag(factors[0])


@register("diagonal")
class Diagonal(NamedOperator):
    r"""Diagonal matrix.

    .. math:: A_{ij} = \begin{cases} v_i & i = j \\ 0 & i \ne j \end{cases}

    The factor v has shape (d,): d parameters. A product costs d elementwise FLOPs and no MACs. For the scale rule the
    matrix consists of d blocks of shape (1, 1), so the initial deviation is 1.

    Parameters
    ----------
    *factors
        One array of shape (d,).

    Examples
    --------
    >>> import numpy as np
    >>> Diagonal(np.array([2.0, 3.0])) @ np.ones(2)
    array([2., 3.])
    """

    formula = "y_i = v_i x_i"
    parameters = "d"
    source = "-"
    examples = (((5, 5), {}), ((1, 1), {}))

    def _plus_product(self, y: Array, X: Array) -> Array:
        """Return ``y + self @ X`` in one pass over the arrays."""
        v = self.factors[0]
        if not v.dtype == X.dtype == y.dtype or type(v) is not type(X):
            return y + self @ X
        return lapack(X).plus_scaled(y, v[:, None], X)

    def _entries(self, i: np.ndarray, j: np.ndarray) -> Array:
        return entries_of_diagonal(self.factors[0], i, j)

    @staticmethod
    def design(shape: tuple[int, int], /) -> DiagonalStructure:
        """Return the structure of a (d, d) diagonal matrix; ValueError if ``shape`` is not square."""
        return DiagonalStructure(size_of(shape, "a diagonal matrix"))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> DiagonalStructure:
        return DiagonalStructure(length_of(shapes, "Diagonal takes one vector"))
