"""Checks and small constructions that the rules of this package use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import cola
import numpy as np
from cola.annotations import PSD, SelfAdjoint
from cola.ops import Adjoint, BlockDiag, LinearOperator, ScalarMul, Transpose
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, to_backend
from structlin._cola_compat import as_scalar, is_array, scalar_mul
from structlin._lapack import (
    eps,
    known,
    lapack,
    refusing_singular,
    require_precision,
    singular_to_roundoff,
    small_views,
)
from structlin.algebra import roles
from structlin.operators import RealPart, StructuredOperator, is_inexact

DENSE_LIMIT = 8192
_STATIC = ("xnp", "shape", "dtype", "device", "annotations")  # attributes of all operators of CoLA
_SMALL = 128  # rows up to which the condition number is computed, not bounded by a random vector


class dense_limit:
    """Set the largest size for which a dense matrix replaces an operator without a fast form.

    The limit holds until it is set again, or within a ``with`` statement.

    Parameters
    ----------
    rows
        Largest number of rows or columns; 8192 at import.

    Raises
    ------
    ValueError
        If ``rows`` is not a positive integer.

    Examples
    --------
    >>> with dense_limit(100):
    ...     pass
    """

    def __init__(self, rows: int) -> None:
        global DENSE_LIMIT
        if isinstance(rows, bool) or not hasattr(rows, "__index__") or rows < 1:
            raise ValueError(f"the limit must be a positive integer, got {rows!r}")
        self.before, DENSE_LIMIT = DENSE_LIMIT, int(rows)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global DENSE_LIMIT
        DENSE_LIMIT = self.before


NO_INVERSE = "; structlin.linalg.lstsq solves for any shape"


def require_operator(A: Any, name: str = "A") -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(
            f"{name} must be a linear operator, got {type(A).__qualname__}; wrap an array in cola.ops.Dense"
        )


def require_square(A: LinearOperator, what: str, instead: str = "") -> int:
    """Return the size of a square operator; ValueError for any other."""
    rows, columns = A.shape
    if rows != columns:
        raise ValueError(f"{what} needs a square operator, got shape {tuple(A.shape)}{instead}")
    return int(rows)


def require_limits(tolerance: float, max_iterations: int) -> None:
    """Raise ValueError unless 0 < tolerance < 1 and ``max_iterations`` is a positive integer."""
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    if isinstance(max_iterations, bool) or not hasattr(max_iterations, "__index__") or max_iterations < 1:
        raise ValueError(f"max_iterations must be a positive integer, got {max_iterations!r}")


def dense_matrix(A: LinearOperator, what: str, instead: str | None = None) -> Array:
    """Return the dense matrix; ValueError in half precision, and above the limit if ``instead`` names a remedy."""
    if instead is not None:
        require_dense(A, what, instead)
    matrix = A.to_dense()
    require_precision(matrix, what)
    return matrix


def lapack_of(A: LinearOperator) -> Any:
    """Return :func:`structlin._lapack.lapack` of the library of A."""
    return lapack(A.xnp.zeros((1,), dtype=A.dtype, device=A.device))


def fits_dense(A: LinearOperator) -> bool:
    return bool(max(A.shape) <= DENSE_LIMIT)


def require_dense(A: LinearOperator, what: str, instead: str) -> None:
    """Raise ValueError where a dense matrix is larger than the limit."""
    if not fits_dense(A):
        raise ValueError(
            f"{what} of {type(A).__name__} of shape {tuple(A.shape)} has no fast form, and above the limit of "
            f"{DENSE_LIMIT} rows or columns no dense matrix is built; {instead}"
        )


def is_matrix(A: LinearOperator) -> bool:
    """Whether A is stored as a dense matrix."""
    return isinstance(A, cola.ops.Dense) or (isinstance(A, StructuredOperator) and roles.is_dense(A.structure))


def annotated(A: LinearOperator, kept: Iterable[type]) -> LinearOperator:
    """Return ``A`` with more annotations."""
    for annotation in kept:
        A = annotation(A)
    return A


def hermitian(A: LinearOperator) -> set[type]:
    """Return the annotations SelfAdjoint and PSD of A, which its inverse and pseudo-inverse share."""
    return {a for a in A.annotations if issubclass(a, SelfAdjoint)}


def scalar_like(A: LinearOperator, c: Any) -> ScalarMul:
    """Return ``c`` times the identity, with the shape and library of A; complex if c is complex."""
    c, dtype = as_scalar(A, c)
    return scalar_mul(A, c, dtype, A.shape[0])


Composite: TypeAlias = ColaKronecker | BlockDiag | Transpose | Adjoint | RealPart
"""Operators whose inverse, pseudo-inverse and integer powers follow from those of their members."""


def by_members(A: LinearOperator, f: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
    """Return f(A) from f of each member of a :data:`Composite`, where f is the inverse or a similar function."""
    if isinstance(A, Transpose):
        return f(A.A).T
    if isinstance(A, Adjoint):
        return f(A.A).H
    if isinstance(A, RealPart):
        return RealPart(f(A.A), A.dtype)
    made = map(f, A.Ms)
    return BlockDiag(*made, multiplicities=A.multiplicities) if isinstance(A, BlockDiag) else ColaKronecker(*made)


def has_square_members(A: LinearOperator) -> bool:
    """Whether all members of a :data:`Composite` are square."""
    return all(M.shape[0] == M.shape[1] for M in getattr(A, "Ms", (A,)))


def dtypes_of(A: LinearOperator) -> set[Any]:
    """Return the dtypes of the floating and complex arrays of A."""
    if isinstance(A, StructuredOperator):
        return {A.dtype} if A._index_dtype is None else set()
    found = {x.dtype for x in A.flatten()[0] if hasattr(x, "dtype") and is_inexact(x.dtype)}
    if "complex" in str(A.dtype):
        return found
    return {A.dtype if "complex" in str(dtype) else dtype for dtype in found}  # a RealPart holds complex arrays


def in_dtype(A: LinearOperator, dtype: Any) -> LinearOperator | None:
    """Return A with its floating and complex arrays in another dtype; None if A holds functions or unknown objects."""
    try:
        return _in_dtype(A, dtype)
    except TypeError:
        return None


def _in_dtype(value: Any, dtype: Any) -> Any:
    if isinstance(value, StructuredOperator):
        return value.to(dtype=dtype)
    if isinstance(value, RealPart):
        return value.converted(dtype, _in_dtype)
    if isinstance(value, LinearOperator):
        copy = object.__new__(type(value))
        fields = vars(copy)
        for name, held in vars(value).items():
            fields[name] = held if name in _STATIC else _in_dtype(held, dtype)
        fields |= {"dtype": dtype, "annotations": set(value.annotations)}
        return copy
    if isinstance(value, tuple | list):
        return type(value)(_in_dtype(held, dtype) for held in value)
    if is_array(value):
        return lapack(value).astype(value, dtype) if is_inexact(value.dtype) else value
    if isinstance(value, int | float | complex | str | slice | None):
        return value
    raise TypeError(f"{type(value).__qualname__} has no dtype")


def on_host(A: StructuredOperator, *arrays: Array) -> tuple[StructuredOperator, list[np.ndarray]] | None:
    """Return A and arrays on NumPy's views, if they are small tensors of one dtype without gradients; else None."""
    if not type(A.structure).__module__.startswith("structlin."):  # others may be for tensors only
        return None
    views = small_views(*A.factors, *arrays)
    if views is None or views[0].dtype.char not in "fdFD" or any(x.dtype != views[0].dtype for x in views):
        return None
    count = len(A.factors)
    return A._with(A.structure, tuple(views[:count]), A._annotations), views[count:]


def like(x: np.ndarray, A: LinearOperator) -> Array:
    """Return a NumPy array in the library and dtype, and on the device, of ``A``."""
    if isinstance(A, StructuredOperator):
        return to_backend(x, A.backend, A.dtype, A.device)
    return A.xnp.array(x, dtype=A.dtype, device=A.device)


@lru_cache(maxsize=8)
def _probe(n: int) -> np.ndarray:
    v = np.random.default_rng(0).standard_normal(n)
    return v / np.linalg.norm(v)


def probe(A: LinearOperator) -> Array:
    """Return a fixed random vector of length 1, of A's library and dtype."""
    return like(_probe(A.shape[0]), A)


def accuracy(A: LinearOperator) -> float:
    """Return the largest relative residual at which a formula with possible cancellation is accepted."""
    return eps(A.dtype) ** 0.75


def largest_growth(A: LinearOperator) -> float:
    """Return the value of ``|A| |A^-1|`` at which A counts as singular to working precision."""
    return 0.1 / eps(A.dtype)


def is_backward_stable(A: LinearOperator, solve: Callable[[Array], Array]) -> Any:
    """Whether ``solve`` solves with A, or with a regular matrix close to A; a traced bool under tracing.

    For x = solve(v), the condition is ``|A x - v| <= tol (|A| |x| + |v|)`` and ``|A| |x| < largest_growth(A)``. The
    lower bound ``|A v|`` replaces ``|A|``, because v has length 1.
    """
    v = probe(A)
    x = solve(v)
    xp = lapack(v)
    residual, size, action = (xp.norm(xp.stop_gradient(y)) for y in (A @ x - v, x, A @ v))
    growth = action * size
    good = (residual <= accuracy(A) * (growth + 1)) & (growth < largest_growth(A))
    seen = known(xp.where(good, residual * 0 + 1, residual * 0))
    return good if seen is None else bool(seen == 1)


def _one_norm(matrix: Array) -> Array:
    return abs(lapack(matrix).stop_gradient(matrix)).sum(0).max()


def dense_inverse(A: LinearOperator) -> LinearOperator:
    """Return the inverse by LU, or by Cholesky if A is annotated PSD, as triangular operators of CoLA.

    LinAlgError if a pivot, or the condition number, shows that A is singular to working precision.
    """
    matrix = cola.ops.Dense(A.to_dense())
    name = f"{type(A).__name__} of shape {tuple(A.shape)}"
    with warnings.catch_warnings(), refusing_singular(matrix.A, positive=A.isa(PSD)):
        # CoLA stores the permutation of a complex LU as complex numbers, and casts them to integers.
        warnings.filterwarnings("ignore", message="Casting complex values to real", category=UserWarning)
        if A.isa(PSD):
            inverse = PSD(cola.inv(PSD(matrix), cola.linalg.Cholesky()))
            pivots = abs(lapack(matrix.A).diagonal(lapack(matrix.A).cholesky(matrix.A))) ** 2
        else:
            inverse = cola.inv(matrix, cola.linalg.LU())
            pivots = abs(lapack(matrix.A).diagonal(inverse.Ms[0].A))
    least, most = known(pivots.min()), known(pivots.max())
    if least is not None and most is not None and least <= eps(A.dtype) * most:
        raise singular_to_roundoff(f"{name} with pivots {least:.1e} to {most:.1e}")
    if A.shape[0] <= _SMALL:
        growth = known(_one_norm(inverse.to_dense()) * _one_norm(matrix.A))
    else:
        v = probe(A)
        norm = lapack(v).norm
        growth = known(norm(inverse @ v) * norm(matrix @ v))
    if growth is not None and growth >= largest_growth(A):
        raise singular_to_roundoff(f"{name} with a condition number above {growth:.0e}")
    return annotated(inverse, hermitian(A))
