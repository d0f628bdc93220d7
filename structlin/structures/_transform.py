"""Base of the fixed fast transforms. They are unitary and have no parameters.

Their only factor is an array of one integer, which determines the array library and the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from cola.annotations import Unitary

from structlin._arrays import Array, to_backend
from structlin._lapack import lapack
from structlin.operators import is_inexact
from structlin.registry import NamedOperator
from structlin.structure import AbstractStructure, Factor
from structlin.structures._square import SquareStructure, size_of
from structlin.structures.diagonal import Diagonal
from structlin.verdicts import SVD, Answer, Nearest


class TransformStructure(SquareStructure):
    """Structure of a (size, size) unitary matrix without parameters."""

    @staticmethod
    def _factor(size: int) -> Factor:
        # The value has no meaning: an operator takes its library and device from its factors.
        return Factor("place", (1,), fan_in=1, fan_out=1, trainable=False)

    @property
    def other_flops(self) -> dict[str, int]:
        return {"transform": math.ceil(5 * self.size * math.log2(max(self.size, 2)))}

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(factors)

    # -- algebra

    def inverse(self, A: Any) -> Answer[Any]:
        return Answer(A.H)

    pinv = inverse

    def svd(self, A: Any) -> Answer[SVD]:
        one = self._one(A)
        values = one + lapack(one).zeros((self.size,), one)
        return Answer(SVD(Unitary(A), values, Unitary(Diagonal(values + 0 * A._eye(1)[0, 0]))))

    def frobenius_norm(self, A: Any) -> Answer[Array]:
        return Answer(self._one(A) * math.sqrt(self.size))

    def spectral_norm(self, A: Any) -> Answer[Array]:
        return Answer(self._one(A))

    @staticmethod
    def _one(A: Any) -> Array:
        return lapack(A._eye(1)).real(A._eye(1)[0, 0])

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        return Nearest((np.zeros(1, dtype=np.int64),), "fixed")


class Transform(NamedOperator):
    """Base of the transforms: ``Transform(n)`` in NumPy, or in the library named by ``backend``.

    Transforms have nothing to train, so they are not registered as structures of layers. Otherwise they behave as other
    structures; :func:`structlin.testing.check_structure` tests their classes.
    """

    parameters = "0"

    def __init__(self, size: int, *, backend: str = "numpy", dtype: Any = None, device: Any = None) -> None:
        structure = self.design((size, size))
        place = to_backend(np.zeros(1, dtype=np.int64), backend, None, device)
        super(NamedOperator, self).__init__(structure, (place,), dtype)

    @classmethod
    def like(cls, A: Any) -> Self:
        """Return the transform with the size, library, device and dtype of the square operator A."""
        first = A.factors[0]
        place = lapack(first).index(np.zeros(1, dtype=np.int64), first)
        return cls._build(cls.design((size_of(A.shape, "a transform"),) * 2), (place,), A.dtype)

    def _promoted(self, X: Array) -> tuple[tuple[Array, ...], Array]:
        """Return factors and operand, which keeps its precision; only integers take that of the operator."""
        if not is_inexact(X.dtype):
            X = self.xnp.cast(X, self.xnp.promote_types(self.dtype, X.dtype))
        return self.factors, X

    @classmethod
    def _own_annotations(cls, structure: AbstractStructure) -> frozenset[type]:
        return frozenset({Unitary})
