"""Slicing of operators: ``A[i]``, ``A[i, j]``, ``A[rows, columns]`` with slices and index arrays."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from cola.annotations import Stiefel, Unitary
from cola.ops import Dense, Diagonal, LinearOperator, Sliced

from structlin._arrays import Array
from structlin._cola_compat._repair import Repair, replacing, rule
from structlin._lapack import lapack

_NUMBERS = 2**22  # of the columns that are computed at a time for some of their entries


def _is_int(x: Any) -> bool:
    return hasattr(x, "__index__") and not isinstance(x, bool) and getattr(x, "shape", ()) == ()


def _position(index: Any, n: int, axis: int) -> int:
    i = operator.index(index)
    if not -n <= i < n:
        raise IndexError(f"index {i} is out of range for axis {axis} of size {n}")
    return i % n


def _positions(index: Any, n: int, axis: int) -> slice | tuple[int, ...]:
    """Return a slice as it is, anything else as integers: they are part of the structure, not of the arrays."""
    if isinstance(index, slice):  # torch takes no negative steps
        return index if index.step is None or index.step > 0 else tuple(range(*index.indices(n)))
    host = _host(index)
    if host.ndim != 1 or not (host.dtype.kind in "iub" or host.size == 0):
        raise IndexError(
            f"axis {axis} takes an integer, a slice or a vector of integers or booleans, "
            f"got {host.dtype} of shape {host.shape}"
        )
    return tuple(np.arange(n)[host if host.size else []].tolist())


def _host(index: Any) -> np.ndarray:
    return np.asarray(index.detach().cpu() if hasattr(index, "detach") else index)


def _getitem(self: Any, index: Any) -> Any:
    rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
    if isinstance(rows, tuple) or rows is None or columns is None or rows is ... or columns is ...:
        raise IndexError(f"an operator takes one or two indices, got {index!r}")
    d_out, d_in = self.shape
    xnp = self.xnp

    def unit(loc: int, n: int) -> Array:
        return xnp.canonical(loc=loc, shape=(n,), dtype=self.dtype, device=self.device)

    if not any(isinstance(index, slice) or _is_int(index) for index in (rows, columns)):
        rows, columns = _host(rows), _host(columns)
        if rows.ndim == columns.ndim == 2 and rows.shape[1] == columns.shape[0] == 1:  # numpy.ix_
            return Sliced(A=self, slices=(rows[:, 0], columns[0]))
        i = np.asarray(_positions(rows, d_out, 0), dtype=np.int64)
        j = np.asarray(_positions(columns, d_in, 1), dtype=np.int64)
        if len(i) != len(j):
            raise IndexError(
                f"two vectors of indices pick entries and must be equally long, got {len(i)} and {len(j)}; "
                "A[np.ix_(rows, columns)] is a submatrix"
            )
        return self._entries(i, j)
    if _is_int(columns):
        column = self @ unit(_position(columns, d_in, 1), d_in)
        return column[_entry(rows, d_out, 0)]
    if _is_int(rows):
        row = unit(_position(rows, d_out, 0), d_out) @ self
        return row[_entry(columns, d_in, 1)]
    return Sliced(A=self, slices=(rows, columns))


def _entries(self: Any, i: np.ndarray, j: np.ndarray) -> Array:
    """Return the entries at (i[k], j[k]) from the columns that occur, some at a time."""
    chosen, place = np.unique(j, return_inverse=True)
    step, units = max(1, _NUMBERS // max(self.shape)), np.arange(self.shape[1])[:, None]
    found, order = [], []
    for start in range(0, max(1, len(chosen)), step):
        part = self.xnp.array(units == chosen[start : start + step], dtype=self.dtype, device=self.device)
        held = np.flatnonzero(place // step == start // step)
        found.append((self @ part)[i[held], place[held] - start])
        order.append(held)
    return self.xnp.concat(found)[np.argsort(np.concatenate(order))]


def entries_of_diagonal(values: Array, i: np.ndarray, j: np.ndarray) -> Array:
    """Return the entries at (i[k], j[k]) of a diagonal matrix."""
    xp = lapack(values)
    return xp.where(xp.index(i == j, values), values[i], xp.zeros((len(i),), values))


def _entry(index: Any, n: int, axis: int) -> Any:
    return _position(index, n, axis) if _is_int(index) else _indexer(_positions(index, n, axis))


def _indexer(positions: slice | tuple[int, ...]) -> Any:
    return positions if isinstance(positions, slice) else np.asarray(positions, dtype=np.int64)


def _sliced_init(self: Any, A: LinearOperator, slices: tuple[Any, Any]) -> None:
    self.A = A
    self.slices = tuple(_positions(s, n, axis) for axis, (s, n) in enumerate(zip(slices, A.shape, strict=True)))
    shape = tuple(len(np.arange(n)[_indexer(s)]) for s, n in zip(self.slices, A.shape, strict=True))
    if shape == (0, 0):
        raise ValueError("a slice of an operator must have at least 1 row or 1 column, got shape (0, 0)")
    LinearOperator.__init__(self, dtype=A.dtype, shape=shape)
    self.device = A.device


def _spread(self: Any, X: Array, axis: int) -> Array:
    """Return X with its axis ``1 - axis`` at the chosen positions, and zeros at all others."""
    xnp, chosen, n = self.xnp, self.slices[axis], self.A.shape[axis]
    dtype, device = xnp.promote_types(self.dtype, X.dtype), xnp.get_device(X)
    if isinstance(chosen, tuple) and len(set(chosen)) < len(chosen):
        selection = xnp.array(np.arange(n)[:, None] == np.array(chosen), dtype=dtype, device=device)
        X = xnp.cast(X, dtype)
        return selection @ X if axis == 1 else X @ selection.T
    X = xnp.cast(X, dtype)
    if axis == 1:
        return xnp.update_array(xnp.zeros((n, X.shape[1]), dtype=dtype, device=device), X, _indexer(chosen))
    return xnp.update_array(xnp.zeros((X.shape[0], n), dtype=dtype, device=device), X, ..., _indexer(chosen))


def _sliced_columns(self: Any, X: Array) -> Array:
    return (self.A @ _spread(self, X, 1))[_indexer(self.slices[0])]


def _sliced_rows(self: Any, X: Array) -> Array:
    return (_spread(self, X, 0) @ self.A)[..., _indexer(self.slices[1])]


def _sliced_str(self: Any) -> str:
    def short(s: slice | tuple[int, ...]) -> str:
        if isinstance(s, slice):
            return ":".join("" if v is None else str(v) for v in (s.start, s.stop)) + (f":{s.step}" if s.step else "")
        return str(list(s)) if len(s) <= 5 else f"{len(s)} indices"

    return f"{self.A}[{short(self.slices[0])}, {short(self.slices[1])}]"


def _annotations_of_sliced(A: Sliced) -> set[type]:
    # A principal submatrix of a self-adjoint (positive) matrix is self-adjoint (positive).
    square = A.A.shape[0] == A.A.shape[1]
    return A.A.annotations - {Unitary, Stiefel} if square and A.slices[0] == A.slices[1] else set()


_REPLACED = replacing(
    "slicing",
    (LinearOperator, "__getitem__", _getitem),
    (LinearOperator, "_entries", _entries),
    (Dense, "_entries", lambda self, i, j: self.A[i, j]),
    (Diagonal, "_entries", lambda self, i, j: entries_of_diagonal(self.diag, i, j)),
    (Sliced, "__init__", _sliced_init),
    (Sliced, "_matmat", _sliced_columns),
    (Sliced, "_rmatmat", _sliced_rows),
    (Sliced, "__str__", _sliced_str),
)


def _repair() -> None:
    _REPLACED.apply()
    rule("get_annotations", types=(Sliced,))(_annotations_of_sliced)


SLICING = Repair("slicing", _REPLACED.broken, _repair)
