"""Products with arrays of more than two axes, as in ``numpy.matmul``: leading axes become columns or rows."""

from __future__ import annotations

from math import prod
from typing import Any

import cola
from cola.ops import LinearOperator

from structlin._cola_compat._repair import replacing


def _matmul(self: Any, X: Any) -> Any:
    """Return ``self @ X`` for an operator, a vector, or an array of shape (..., d_in, k)."""
    shape, d_in = X.shape, self.shape[-1]
    if isinstance(X, LinearOperator):
        _check_inner(self, X)
        return cola.fns.dot(self, X)
    ndim = len(shape)
    if ndim == 2 and shape[0] == d_in:
        return self._matmat(X)
    if ndim == 1 and shape[0] == d_in:
        return self._matmat(X.reshape(-1, 1)).reshape(-1)
    if len(self.shape) > 2 and ndim > 2 and shape[0] == d_in:  # CoLA's Arnoldi makes stacks of matrices
        return self._matmat(X)
    if ndim < 3 or shape[-2] != d_in:
        raise ValueError(
            f"operator of shape {tuple(self.shape)} @ array needs an array of shape ({d_in},) or (..., {d_in}, k), "
            f"got {tuple(shape)}"
        )
    X = X.swapaxes(0, -2)
    rest = X.shape[1:]
    Y = self._matmat(X.reshape((d_in, prod(rest))))
    return Y.reshape((self.shape[-2], *rest)).swapaxes(0, -2)


def _rmatmul(self: Any, X: Any) -> Any:
    """Return ``X @ self`` for an operator, or an array of shape (..., d_out)."""
    shape, d_out = X.shape, self.shape[-2]
    if isinstance(X, LinearOperator):
        _check_inner(X, self)
        return cola.fns.dot(X, self)
    ndim = len(shape)
    if ndim == 0 or shape[-1] != d_out:
        raise ValueError(
            f"array @ operator of shape {tuple(self.shape)} needs an array of shape (..., {d_out}), got {tuple(shape)}"
        )
    if ndim == 1:
        return self._rmatmat(X.reshape(1, -1)).reshape(-1)
    if ndim == 2 or len(self.shape) > 2:
        return self._rmatmat(X)
    Y = self._rmatmat(X.reshape((prod(shape[:-1]), d_out)))
    return Y.reshape((*shape[:-1], self.shape[-1]))


def _check_inner(left: LinearOperator, right: LinearOperator) -> None:
    a, b = left.shape[-1], right.shape[-2]
    if a != b:
        shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
        raise ValueError(f"cannot multiply operators of shapes {shapes}: {a} != {b}")


STACKS = replacing(
    "stacks",
    (LinearOperator, "__matmul__", _matmul),
    (LinearOperator, "__rmatmul__", _rmatmul),
)
