"""Operators as dense arrays of NumPy, torch and jax, and what NumPy's and SciPy's users expect of a matrix.

Importing this module gives every operator of CoLA and of this package

- ``__array__``, so that ``np.asarray(A)`` is the dense matrix instead of an array that holds one Python object;
- ``A ** n``;
- ``matvec``, ``matmat``, ``rmatvec``, ``rmatmat`` on NumPy arrays, so that SciPy's solvers take it.

Nothing else of NumPy densifies an operator behind one's back: operators refuse NumPy's elementwise functions
(``__array_ufunc__`` is None), and ``x @ A``, ``c * A``, ``x + A`` go to the operator as before.
"""

from __future__ import annotations

from typing import Any

import cola
import numpy as np
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, dtype_name, to_backend


def host(x: Array) -> np.ndarray:
    """Return a writable NumPy array without gradients from an array on any device; bfloat16 becomes float32."""
    library, half = backend_of(x), dtype_name(x.dtype) == "bfloat16"
    if library == "torch":
        x = x.detach().cpu().resolve_conj()
        return (x.float() if half else x).numpy()
    if library == "jax":  # those that look into jax's memory are read-only
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
    return np.array(host(A.to_dense()), dtype=dtype)  # a copy: CoLA's Dense gives out its own memory


def to_torch(A: LinearOperator, dtype: Any = None, device: Any = None) -> Array:
    """Return the matrix as a torch tensor; of a torch operator with its gradients, of others without."""
    require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "torch":
        return matrix.to(dtype=dtype, device=device)
    return to_backend(host(matrix), "torch", matrix.dtype if dtype is None else dtype, device)


def to_jax(A: LinearOperator, dtype: Any = None) -> Array:
    """Return the matrix as a jax array; of a jax operator differentiable, of others not.

    Raises ValueError where jax would give another precision than the operator's own or ``dtype``: float64 needs
    ``jax.config.update("jax_enable_x64", True)``, or ``dtype="float32"``.
    """
    require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "jax" and dtype is None:
        return matrix
    return to_backend(matrix if backend_of(matrix) == "jax" else host(matrix), "jax", dtype or matrix.dtype)


def _array(self: LinearOperator, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """For ``np.asarray``: always a new array, so that ``copy=False`` cannot be had."""
    if copy is False:
        raise ValueError("an operator has to be multiplied out to become an array, which is a copy")
    return to_numpy(self, dtype)


def _power(self: LinearOperator, exponent: Any) -> LinearOperator:
    """Return ``A ** n`` by squaring, of the inverse for negative n; ``cola.linalg.pow`` for other numbers."""
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
