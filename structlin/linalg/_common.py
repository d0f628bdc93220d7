"""Checks and small constructions that the rules share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache

import cola
import numpy as np
from cola.annotations import PSD, SelfAdjoint
from cola.ops import LinearOperator

from structlin._arrays import Array, to_backend
from structlin.linalg._lapack import eps, known, lapack, singular_to_roundoff
from structlin.operators import StructuredOperator

DENSE_LIMIT = 8192
"""Up to this many rows or columns, what has no fast form is computed from the dense matrix."""


def require_square(A: LinearOperator, what: str, instead: str = "") -> int:
    """The size of a square operator; ValueError for any other."""
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"{what} needs a square operator, got shape {tuple(A.shape)}{instead}")
    return int(A.shape[0])


def singular(A: LinearOperator, rank: int) -> ValueError:
    return ValueError(
        f"{type(A).__name__} of shape {tuple(A.shape)} has rank {rank} at most and so no inverse; "
        "use cola.pinv, or add a multiple of the identity"
    )


def fits_dense(A: LinearOperator) -> bool:
    return bool(max(A.shape) <= DENSE_LIMIT)


def require_dense(A: LinearOperator, what: str, instead: str) -> None:
    """ValueError where a dense matrix would be too large to be built unasked."""
    if not fits_dense(A):
        raise ValueError(
            f"{what} of {type(A).__name__} of shape {tuple(A.shape)} has no fast form, and above {DENSE_LIMIT} rows "
            f"or columns no dense matrix is built unasked; {instead}"
        )


def annotated(A: LinearOperator, kept: Iterable[type]) -> LinearOperator:
    """``A`` with more annotations."""
    for annotation in kept:
        A = annotation(A)
    return A


def hermitian(A: LinearOperator) -> set[type]:
    """SelfAdjoint and PSD, where A is annotated so: what its inverse, among others, is too."""
    return {a for a in A.annotations if issubclass(a, SelfAdjoint)}


def like(x: np.ndarray, A: LinearOperator) -> Array:
    """A NumPy array in the library and dtype, and on the device, of ``A``."""
    if isinstance(A, StructuredOperator):
        return to_backend(x, A.backend, A.dtype, A.device)
    return A.xnp.array(x, dtype=A.dtype, device=A.device)


@lru_cache(maxsize=32)
def _probe(n: int) -> np.ndarray:
    v = np.random.default_rng(0).standard_normal(n)
    return v / np.linalg.norm(v)


def probe(A: LinearOperator) -> Array:
    """A fixed random vector of length 1, of A's library and dtype."""
    return like(_probe(A.shape[0]), A)


def accuracy(A: LinearOperator) -> float:
    """The relative residual up to which a formula in which numbers may have cancelled is trusted."""
    return eps(A.dtype) ** 0.75


def is_backward_stable(A: LinearOperator, solve: Callable[[Array], Array]) -> bool:
    """Whether such a formula has solved with A or with a close neighbour that is regular. True while values are traced.

    For x = solve(v), whether ``|A x - v| <= tol (|A| |x| + |v|)``, with |A| replaced by its action on v, which it
    exceeds, and whether x is smaller than roundoff alone can make it.
    """
    v = probe(A)
    x = solve(v)
    norm = lapack(v).norm
    residual, size, action = (known(norm(y)) for y in (A @ x - v, x, A @ v))
    if residual is None or size is None or action is None:
        return True
    return residual <= accuracy(A) * (action * size + 1) and action * size < largest_growth(A)


def largest_growth(A: LinearOperator) -> float:
    """Where ``|A| |A^-1|`` is as large, as far as can be seen, A is singular to working precision."""
    return 0.1 / eps(A.dtype)


def dense_inverse(A: LinearOperator) -> LinearOperator:
    """By LU, or by Cholesky where A is annotated PSD: triangular solves, in CoLA's operators.

    A pivot that is only roundoff, and a solution as large as roundoff makes it, raise LinAlgError.
    """
    matrix = cola.ops.Dense(A.to_dense())
    with warnings.catch_warnings():
        # CoLA applies the permutation of a complex LU to complex numbers and casts what are whole numbers.
        warnings.filterwarnings("ignore", message="Casting complex values to real", category=UserWarning)
        if A.isa(PSD):
            return PSD(cola.inv(PSD(matrix), cola.linalg.Cholesky()))
        inverse = cola.inv(matrix, cola.linalg.LU())
    pivots = abs(lapack(matrix.A).diagonal(inverse.Ms[0].A))
    least, most = known(pivots.min()), known(pivots.max())
    if least is not None and most is not None and not least > eps(A.dtype) * most:
        raise singular_to_roundoff(
            f"{type(A).__name__} of shape {tuple(A.shape)} with pivots {least:.1e} to {most:.1e}"
        )
    v = probe(A)
    norm = lapack(v).norm
    growth = known(norm(inverse @ v) * norm(matrix @ v))
    if growth is not None and not growth < largest_growth(A):
        raise singular_to_roundoff(
            f"{type(A).__name__} of shape {tuple(A.shape)} with a condition number above {growth:.0e}"
        )
    return annotated(inverse, hermitian(A))
