"""Conversion to and from SciPy's linear operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from cola.ops import LinearOperator

from structlin._arrays import dtype_name, to_backend
from structlin._cola_compat import functions_of, is_array, library_of
from structlin.interop._arrays import host, require_operator
from structlin.operators import StructuredOperator
from structlin.structures.dense import Dense


class _ToSciPy(scipy.sparse.linalg.LinearOperator):
    """An operator of CoLA or of this package with the interface of SciPy; vectors are NumPy arrays."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        name = dtype_name(operator.dtype)
        super().__init__(np.dtype("float32" if name in ("bfloat16", "float16") else name), tuple(operator.shape))

    def _apply(self, A: LinearOperator, x: np.ndarray) -> np.ndarray:
        real = not np.issubdtype(self.dtype, np.complexfloating)
        if real and np.iscomplexobj(x):
            return self._apply(A, x.real) + 1j * self._apply(A, x.imag)
        x = np.ascontiguousarray(x.reshape((x.shape[0], math.prod(x.shape[1:]))))
        return host(A @ to_backend(x, _library(A), A.dtype, A.device if _library(A) == "torch" else None))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._apply(self.operator, X)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._apply(self.operator, x)[:, 0]

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self._apply(self.operator.H, X)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._apply(self.operator.H, x)[:, 0]

    def _adjoint(self) -> _ToSciPy:
        return _ToSciPy(self.operator.H)

    def _transpose(self) -> _ToSciPy:
        return _ToSciPy(self.operator.T)


def _library(A: LinearOperator) -> str:
    return A.backend if isinstance(A, StructuredOperator) else library_of(A.xnp)


def to_scipy(A: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """Return ``A`` as a ``scipy.sparse.linalg.LinearOperator``, for the solvers of SciPy.

    Each vector is converted to the library, device and dtype of the operator, and the result to a NumPy array. So
    operators of torch and jax work, but without gradients and not under ``jax.jit``. The dtype of an operator in half
    precision is float32 in SciPy. Products from the left, ``.H``, ``.T`` and products with several vectors use the
    methods of the operator.

    Raises
    ------
    TypeError
        If A is not an operator.

    Examples
    --------
    >>> from structlin import Diagonal
    >>> A = to_scipy(Diagonal(np.array([1.0, 2.0, 4.0])))
    >>> x, info = scipy.sparse.linalg.cg(A, np.ones(3))
    >>> x.round(6), info
    (array([1.  , 0.5 , 0.25]), 0)
    """
    require_operator(A)
    return A.operator if isinstance(A, FromSciPy) else _ToSciPy(A)


def _scipy_method(name: str) -> Any:
    def method(self: LinearOperator, x: np.ndarray) -> np.ndarray:
        return getattr(to_scipy(self), name)(x)

    method.__name__ = name
    method.__doc__ = f"Return the result of ``{name}`` of SciPy's linear operators; takes and returns NumPy arrays."
    return method


# scipy.sparse.linalg.aslinearoperator uses these methods. It does not accept dtypes of torch; to_scipy does.
for _name in ("matvec", "matmat", "rmatvec", "rmatmat"):
    setattr(LinearOperator, _name, _scipy_method(_name))


class FromSciPy(LinearOperator):
    """Operator of CoLA that wraps a linear operator of SciPy; :func:`from_scipy` returns it."""

    def __init__(self, operator: scipy.sparse.linalg.LinearOperator) -> None:
        self.operator = operator
        super().__init__(np.dtype(operator.dtype), tuple(operator.shape))
        self.xnp, self.device = functions_of("numpy"), None

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self.operator.matmat(X)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        # X A = (A^H X^H)^H
        return self.operator.rmatmat(X.conj().T).conj().T

    def to_dense(self) -> np.ndarray:
        return self._matmat(np.eye(self.shape[1], dtype=self.dtype))


def from_scipy(x: Any) -> LinearOperator:
    """Return a linear operator or sparse matrix of SciPy as an operator of CoLA.

    Everything that ``scipy.sparse.linalg.aslinearoperator`` accepts is allowed. The result works on NumPy arrays. For
    the result of :func:`to_scipy`, the original operator is returned.

    Raises
    ------
    TypeError
        For any other object.
    ValueError
        If the operator has no dtype or an integer dtype.

    Examples
    --------
    >>> A = from_scipy(scipy.sparse.diags_array([1.0, 2.0]))
    >>> A.T @ np.ones(2)
    array([1., 2.])
    """
    if isinstance(x, _ToSciPy):
        return x.operator
    if isinstance(x, LinearOperator):
        raise TypeError(f"{type(x).__qualname__} is already an operator of CoLA; use it as it is")
    try:
        operator = scipy.sparse.linalg.aslinearoperator(x)
    except TypeError:
        raise TypeError(
            f"expected a linear operator or a sparse matrix of SciPy, got {type(x).__module__}.{type(x).__qualname__}"
        ) from None
    if operator.dtype is None:
        raise ValueError("the SciPy operator has no dtype; pass dtype=... when you build it")
    if not np.issubdtype(operator.dtype, np.inexact):
        raise ValueError(f"an operator's dtype must be floating or complex, got {operator.dtype}; convert it first")
    return FromSciPy(operator)


def as_operator(x: Any) -> LinearOperator:
    """Return a matrix of any kind as an operator.

    An operator is returned as it is. A matrix of NumPy, torch or jax becomes a :class:`structlin.Dense` that shares its
    memory. Sparse matrices and linear operators of SciPy are converted by :func:`from_scipy`.

    Raises
    ------
    TypeError
        For any other object.
    ValueError
        For arrays that do not have two axes or hold integers.

    Examples
    --------
    >>> as_operator(np.eye(2)) @ np.array([3.0, 4.0])
    array([3., 4.])
    """
    if isinstance(x, LinearOperator):
        return x
    if is_array(x):
        if x.ndim != 2:
            raise ValueError(f"x must be a matrix of shape (d_out, d_in), got an array of shape {tuple(x.shape)}")
        return Dense(x)
    return from_scipy(x)
