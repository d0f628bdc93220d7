"""Operators as dense arrays of NumPy, torch and jax, and the interface of matrices in NumPy and SciPy.

Importing this module adds methods to every operator of CoLA and of this package:

- ``__array__``, so that ``np.asarray(A)`` is the dense matrix, not an array of one Python object;
- ``A ** n``;
- ``matvec``, ``matmat``, ``rmatvec`` and ``rmatmat`` on NumPy arrays, so that SciPy's solvers accept an operator.

NumPy does not convert an operator to a dense array in other cases. Elementwise functions of NumPy raise TypeError
(``__array_ufunc__`` is None), and ``x @ A``, ``c * A`` and ``x + A`` call the methods of the operator.
"""

from __future__ import annotations

from typing import Any

import cola
import numpy as np
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, dtype_name, on_cpu, to_backend


def host(x: Array) -> np.ndarray:
    """Return an array of any library and device as a writable NumPy array; bfloat16 becomes float32."""
    library, half = backend_of(x), dtype_name(x.dtype) == "bfloat16"
    if library == "torch":
        x = on_cpu(x)
        return (x.float() if half else x).numpy()
    if library == "jax":  # a view of jax's memory would be read-only
        return np.array(x, dtype=np.float32 if half else None)
    return x


def to_numpy(A: LinearOperator, dtype: Any = None) -> np.ndarray:
    """Return the matrix as a NumPy array (d_out, d_in), as ``np.asarray(A)`` does; bfloat16 becomes float32.

    Examples
    --------
    >>> from structlin import Diagonal
    >>> to_numpy(Diagonal(np.array([1.0, 2.0])))
    array([[1., 0.],
           [0., 2.]])
    """
    require_operator(A)
    return np.array(host(A.to_dense()), dtype=dtype)  # a copy, because CoLA's Dense returns its own memory


def to_torch(A: LinearOperator, dtype: Any = None, device: Any = None) -> Array:
    """Return the matrix as a torch tensor (d_out, d_in), with gradients if the operator is one of torch."""
    require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "torch":
        return matrix.to(dtype=dtype, device=device)
    return to_backend(host(matrix), "torch", matrix.dtype if dtype is None else dtype, device)


def to_jax(A: LinearOperator, dtype: Any = None) -> Array:
    """Return the matrix as a jax array (d_out, d_in), differentiable if the operator is one of jax.

    Raises
    ------
    ValueError
        If jax cannot represent the dtype. A float64 operator needs either ``dtype="float32"`` or
        ``jax.config.update("jax_enable_x64", True)``.
    """
    require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "jax" and dtype is None:
        return matrix
    return to_backend(matrix if backend_of(matrix) == "jax" else host(matrix), "jax", dtype or matrix.dtype)


def _array(self: LinearOperator, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Return a new array, for ``np.asarray``; ValueError for ``copy=False``."""
    if copy is False:
        raise ValueError("the dense matrix of an operator is a new array, so copy=False is not possible; leave it out")
    return to_numpy(self, dtype)


def _power(self: LinearOperator, exponent: Any) -> LinearOperator:
    """Return ``A ** n`` by repeated squaring of A, or of its inverse if n < 0; other powers by ``cola.linalg.pow``."""
    if isinstance(exponent, bool) or not isinstance(exponent, int | float | np.integer | np.floating):
        return NotImplemented
    if self.shape[0] != self.shape[1]:
        raise ValueError(f"only square operators have powers, got shape {tuple(self.shape)}")
    if exponent != int(exponent):
        return cola.linalg.pow(self, float(exponent))
    base, left = (cola.linalg.inv(self) if exponent < 0 else self), abs(int(exponent))
    found = None
    while left:
        if left % 2:
            found = base if found is None else found @ base
        left //= 2
        base = base @ base if left else base
    if found is None:
        found = cola.ops.Identity(tuple(self.shape), self.dtype)
        found.xnp, found.device = self.xnp, self.device
    return found


LinearOperator.__array__ = _array
LinearOperator.__pow__ = _power


def require_operator(A: Any) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"expected a linear operator, got {type(A).__module__}.{type(A).__qualname__}")
