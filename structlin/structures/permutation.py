"""Permutation matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import cola
import numpy as np
from cola.annotations import Unitary
from scipy.optimize import linear_sum_assignment

from structlin._arrays import Array, backend_of, dtype_name, ops
from structlin._cola_compat import functions_of, parity
from structlin._lapack import lapack
from structlin.registry import NamedOperator, register
from structlin.structure import AbstractStructure, Factor
from structlin.structures._square import SquareStructure, size_of
from structlin.structures.diagonal import Diagonal
from structlin.verdicts import SVD, Answer, Determinant, Nearest


class PermutationStructure(SquareStructure):
    """Structure of a (size, size) permutation matrix: one index array, no parameters, no FLOPs."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("index", (size,), fan_in=1, fan_out=1, blocks=size, trainable=False)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Return the index of the inverse permutation."""
        return (factors[0].argsort(),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x[:, factors[0]]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return x[factors[0]]

    # -- algebra

    def inverse(self, A: Any) -> Answer[Any]:
        """Return the transpose."""
        return Answer(A.T)

    pinv = inverse

    def slogdet(self, A: Any) -> Answer[Determinant]:
        """Return the parity of the permutation."""
        zero = A._eye(1)[0, 0] * 0
        return Answer(Determinant(zero + parity(A.factors[0]), lapack(zero).real(zero)))

    def diagonal(self, A: Any, k: int) -> Answer[Array]:
        """Return 1 where a row of the k-th diagonal selects its column."""
        index, start, count = A.factors[0], max(-k, 0), self.size - abs(k)
        rows = lapack(index).index(np.arange(start, start + count), index)
        return Answer(A.xnp.cast(index[start : start + count] == rows + k, A.dtype))

    def svd(self, A: Any) -> Answer[SVD]:
        """Return ones, with the permutation as left singular vectors."""
        ones = A._eye(1)[0, 0] + lapack(A.factors[0]).zeros((self.size,), A._eye(1))
        return Answer(SVD(Unitary(A), lapack(ones).real(ones), Unitary(Diagonal(ones))))

    def power(self, A: Any, k: int) -> Answer[Any]:
        """Compose the index with itself, by squaring."""
        index, result = A.factors[0], None
        while k:
            if k & 1:
                result = index if result is None else result[index]
            index, k = index[index], k >> 1
        return Answer(Permutation._build(self, (result,), A.dtype))

    def frobenius_norm(self, A: Any) -> Answer[Array]:
        """Return sqrt(d)."""
        one = lapack(A._eye(1)).real(A._eye(1)[0, 0])
        return Answer(one * math.sqrt(self.size))

    def spectral_norm(self, A: Any) -> Answer[Array]:
        """Return 1."""
        return Answer(lapack(A._eye(1)).real(A._eye(1)[0, 0]))

    def product(self, A: Any, B: Any) -> Answer[Any] | None:
        """Compose two permutations."""
        if not isinstance(B.structure, PermutationStructure):
            return None
        dtype = A.xnp.promote_types(A.dtype, B.dtype)
        return Answer(Permutation._build(self, (B.factors[0][A.factors[0]],), dtype))

    def kron(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the permutation of pairs of indices."""
        if not isinstance(B.structure, PermutationStructure):
            return None
        n = self.size * B.shape[0]
        index = (A.factors[0][:, None] * B.shape[0] + B.factors[0][None, :]).reshape((n,))
        dtype = A.xnp.promote_types(A.dtype, B.dtype)
        return Answer(Permutation._build(PermutationStructure(n), (index,), dtype))

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        """Solve a linear assignment problem.

        ``|| target - A ||^2`` is a constant minus the sum of ``2 Re target[i, index[i]]``. With a covariance, the
        weights of the columns are added.
        """
        if covariance is None:
            cost = -target.real
        else:
            cost = np.diagonal(covariance).real - 2 * (target @ covariance).real
        return Nearest((linear_sum_assignment(cost)[1],), "linear assignment")

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Permute the rows of the identity."""
        return np.eye(self.size)[factors[0]]


def _indices(index: Array) -> Array:
    """Convert other integer dtypes to int64 (jax: int32).

    torch treats a uint8 index as a mask, and products of narrow integers overflow.
    """
    if dtype_name(index.dtype) in ("int32", "int64"):
        return index
    name = backend_of(index)
    if name == "numpy":
        return index.astype(np.int64)
    return ops(name).astype(index, functions_of("torch").int64 if name == "torch" else np.int32)


@register("permutation")
class Permutation(NamedOperator):
    r"""Permutation matrix: selects one entry of the input for each output.

    .. math:: (A x)_i = x_{\mathrm{index}(i)}

    The array ``index`` holds each of the integers 0, ..., d-1 once. There are no parameters, MACs or FLOPs. An index
    has no floating dtype, so ``dtype`` states the dtype of the operator; the default is the library's default float.

    Parameters
    ----------
    index
        Array of shape (d,) that holds each of the integers 0, ..., d-1 once.
    dtype
        Dtype of the operator. Default: the default floating dtype of the library.

    Examples
    --------
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
                raise ValueError(
                    f"index must be a vector that holds each of the integers 0, ..., d-1 once, got {values!r}"
                )
        super(NamedOperator, self).__init__(PermutationStructure(int(index.shape[0])), (_indices(index),), dtype)

    @staticmethod
    def design(shape: tuple[int, int], /) -> PermutationStructure:
        """Return the structure of a (d, d) permutation matrix; ValueError if ``shape`` is not square."""
        return PermutationStructure(size_of(shape, "a permutation"))

    @classmethod
    def _own_annotations(cls, structure: AbstractStructure) -> frozenset[type]:
        return frozenset({cola.Unitary})
