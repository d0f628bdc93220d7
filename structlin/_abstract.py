"""The base of all structures: what operators, layers, counts and scale rules use of a structure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from structlin._arrays import Array, backend_of, common_backend, dtype_name, ops
from structlin.verdicts import SVD, Answer, Determinant, Eigen, Nearest


@dataclass(frozen=True)
class Factor:
    """Description of one factor of a structure, without its values.

    Attributes
    ----------
    name
        Name of the factor in messages.
    shape
        Shape of the array.
    fan_in
        Number of inputs that contribute to one output.
    fan_out
        Number of outputs to which one input contributes.
    blocks
        Number of independent matrices of shape (fan_out, fan_in) in the array.
    carried
        Number of positions of the vector to which the same weights are applied.
    trainable
        False for index arrays.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    blocks: int = 1
    carried: int = 1
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class AbstractStructure(ABC):
    """Base of all structures, with the interface that operators, layers, counts and scale rules use.

    A subclass is frozen and hashable. It sets ``d_in``, ``d_out`` and ``factors``, in the order in which they are
    applied to a vector. It implements ``macs``, ``transpose``, ``transpose_factors``, ``_rows`` and ``_columns``.
    """

    d_in: int
    d_out: int
    factors: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return (self.d_out, self.d_in)

    @property
    def num_params(self) -> int:
        """Number of trainable parameters."""
        return sum(f.numel for f in self.factors if f.trainable)

    @property
    @abstractmethod
    def macs(self) -> int:
        """Number of multiply-accumulates for one vector."""

    @property
    def other_flops(self) -> Mapping[str, int]:
        """FLOPs for one vector beyond the multiply-accumulates, by name of the operation."""
        return {}

    @property
    def setup_flops(self) -> Mapping[str, int]:
        """FLOPs once for each call, independent of the number of vectors, by name of the operation."""
        return {}

    @property
    def flops(self) -> int:
        """FLOPs for one vector: ``2 * macs`` plus the sum of ``other_flops``."""
        return 2 * self.macs + sum(self.other_flops.values())

    @property
    def rank_bound(self) -> int:
        """Upper bound of the rank of the matrix."""
        return min(self.shape)

    @abstractmethod
    def transpose(self) -> AbstractStructure:
        """Return the structure of the transposed matrix."""

    @abstractmethod
    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Return the factors of the transposed matrix, whose structure is ``transpose()``."""

    @abstractmethod
    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        """Apply the matrix to rows, (tokens, d_in) -> (tokens, d_out). Nothing is checked."""

    @abstractmethod
    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        """Apply the matrix to columns, (d_in, k) -> (d_out, k). Nothing is checked."""

    # -- algebra: optional; None if the structure has no better method than the dense matrix ---------------------------

    # ``A`` is the operator (:class:`structlin.StructuredOperator`) of this structure. It has the factors and
    # annotations such as ``cola.PSD``. Matrices are returned as operators of CoLA.

    def inverse(self, A: Any) -> Answer[Any] | None:
        """Return the inverse as an operator; LinAlgError if A is singular to working precision."""
        return None

    def pinv(self, A: Any) -> Answer[Any] | None:
        """Return the pseudo-inverse as an operator."""
        return None

    def solve(self, A: Any, b: Array) -> Answer[Array] | None:
        """Return ``A^-1 b`` for b of shape (n,) or (n, k), if that costs less than :meth:`inverse`."""
        return None

    def slogdet(self, A: Any) -> Answer[Determinant] | None:
        """Return sign and logarithm of the absolute value of the determinant of a square matrix."""
        return None

    def diagonal(self, A: Any, k: int) -> Answer[Array] | None:
        """Return the k-th diagonal."""
        return None

    def trace(self, A: Any) -> Answer[Array] | None:
        """Return the sum of the diagonal of a square matrix, if that costs less than :meth:`diagonal`."""
        return None

    def eig(self, A: Any) -> Answer[Eigen] | None:
        """Return all eigenvalues and eigenvectors of a square matrix; matrix functions and shifts use them."""
        return None

    def svd(self, A: Any) -> Answer[SVD] | None:
        """Return the thin singular value decomposition."""
        return None

    def function(self, A: Any, f: Any) -> Answer[Any] | None:
        """Return f(A) as an operator, if there is a better method than :meth:`eig`."""
        return None

    def power(self, A: Any, k: int) -> Answer[Any] | None:
        """Return ``A^k`` as one operator, for an integer k > 1."""
        return None

    def frobenius_norm(self, A: Any) -> Answer[Array] | None:
        """Return the square root of the sum of squared absolute values of the entries."""
        return None

    def spectral_norm(self, A: Any) -> Answer[Array] | None:
        """Return the largest singular value."""
        return None

    def product(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return ``A @ B`` as one operator; B is an operator of any structure."""
        return None

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return ``A + B`` as one operator; B is an operator of any structure."""
        return None

    def shifted(self, A: Any, value: Any) -> Answer[Any] | None:
        """Return ``A + diag(value)`` as one operator; ``value`` has shape (n,), or () for one number."""
        return None

    def kron(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the Kronecker product as one operator; B is an operator of any structure."""
        return None

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest | None:
        """Return the matrix A of this structure that is nearest to ``target``, of shape (d_out, d_in).

        The distance is the Frobenius norm of ``target - A`` or, with a covariance, of
        ``(target - A) covariance^(1/2)``. Arrays are float64 or complex128.
        """
        return None

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return the (d_out, d_in) matrix of NumPy factors by its definition, to test the products against."""
        return None

    def check(self, factors: Sequence[Array]) -> str:
        """Check the number, shapes, array library and dtypes of factors.

        Parameters
        ----------
        factors
            Arrays in the order in which they are applied.

        Returns
        -------
        str
            Name of the library: ``numpy``, ``torch`` or ``jax``.

        Raises
        ------
        ValueError
            If the number, a shape or a dtype is wrong, or dtypes are mixed.
        TypeError
            If a factor is not an array, or factors belong to different libraries.
        """
        if len(factors) != len(self.factors):
            raise ValueError(f"{self!r} has {len(self.factors)} factors, got {len(factors)}")
        name = common_backend(factors)
        if self._are_alike(factors) and not ops(name).is_integer(factors[0]):
            return name
        for spec, array in zip(self.factors, factors, strict=True):
            if tuple(array.shape) != spec.shape:
                raise ValueError(f"factor {spec.name} of {self!r} has shape {spec.shape}, got {tuple(array.shape)}")
            if ops(name).is_integer(array) == spec.trainable:
                wanted = "a floating or complex dtype" if spec.trainable else "an integer dtype"
                raise ValueError(f"factor {spec.name} of {self!r} must have {wanted}, got {array.dtype}")
            # uint8 is a mask to torch, and sums of narrow integers overflow.
            if not spec.trainable and dtype_name(array.dtype) not in ("int32", "int64"):
                raise ValueError(f"factor {spec.name} of {self!r} must have dtype int32 or int64, got {array.dtype}")
        dtypes = {a.dtype for spec, a in zip(self.factors, factors, strict=True) if spec.trainable}
        if len(dtypes) > 1:
            raise ValueError(f"all factors must have the same dtype, got {', '.join(sorted(map(str, dtypes)))}")
        return name

    def _are_alike(self, factors: Sequence[Array]) -> bool:
        """Whether all factors are trainable, of one dtype, and of the right shapes: then one of them needs a check."""
        dtype = factors[0].dtype
        for spec, array in zip(self.factors, factors, strict=True):
            if not spec.trainable or array.shape != spec.shape or array.dtype != dtype:
                return False
        return True

    def _check_input(self, factors: Sequence[Array], x: Array, axis: int) -> SimpleNamespace:
        name = self.check(factors)
        if backend_of(x) != name:
            raise TypeError(f"the factors are {name} arrays, the input is a {backend_of(x)} array")
        if x.ndim == 0 or x.shape[axis] != self.d_in:
            place = "last" if axis == -1 else "first"
            raise ValueError(
                f"the {place} axis of the input must have size d_in = {self.d_in}, got shape {tuple(x.shape)}"
            )
        xp = ops(name)
        if not xp.promotes and factors[0].dtype != x.dtype:
            weights = [a.dtype for spec, a in zip(self.factors, factors, strict=True) if spec.trainable]
            if weights and weights[0] != x.dtype:
                raise ValueError(f"the factors are {weights[0]}, the input is {x.dtype}: convert one of them")
        return xp

    def apply(self, factors: Sequence[Array], x: Array) -> Array:
        """Apply the matrix to the vectors along the last axis.

        The product is differentiable and can be used inside ``jax.jit``, ``jax.vmap`` and ``torch.compile``. NumPy and
        jax promote dtypes; torch requires equal dtypes.

        Parameters
        ----------
        factors
            Arrays in the order in which they are applied.
        x
            Array of shape (..., d_in), of the same library.

        Returns
        -------
        Array
            Array of shape (..., d_out).

        Raises
        ------
        ValueError
            If a shape or dtype is wrong.
        TypeError
            If the arrays belong to different libraries.

        Examples
        --------
        >>> import structlin as sl
        >>> sl.Structure.parse("i,oi->o", i=3, o=2).apply((np.ones((2, 3)),), np.arange(3.0))
        array([3., 3.])
        """
        xp = self._check_input(factors, x, -1)
        lead = tuple(x.shape[:-1])
        return self._rows(factors, x.reshape((math.prod(lead), self.d_in)), xp).reshape((*lead, self.d_out))

    def apply_columns(self, factors: Sequence[Array], x: Array) -> Array:
        """Apply the matrix to the columns of x.

        Parameters
        ----------
        factors
            Arrays in the order in which they are applied.
        x
            Array of shape (d_in, k), of the same library.

        Returns
        -------
        Array
            Array of shape (d_out, k).

        Raises
        ------
        TypeError, ValueError
            As for :meth:`apply`.
        """
        xp = self._check_input(factors, x, 0)
        if x.ndim != 2:
            raise ValueError(f"x must have shape (d_in, k) = ({self.d_in}, k), got {tuple(x.shape)}")
        return self._columns(factors, x, xp)
