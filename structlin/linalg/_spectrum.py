"""Eigenvalues and singular values, from the parts of a structure or from the dense matrix.

``cola.eig(A, k, which)`` returns the k eigenvalues of largest ("LM", the default) or smallest ("SM") magnitude in
ascending order of magnitude, and their eigenvectors as the columns of an operator. The rules apply to the algorithms
Auto (the default), Eig and Eigh of CoLA.
"""

from __future__ import annotations

from typing import Any

import cola
import numpy as np
import scipy.linalg
import scipy.sparse.linalg as sparse
from cola.annotations import SelfAdjoint, Stiefel, Unitary
from cola.linalg.algorithm_base import Auto
from cola.linalg.unary.unary import Eig, Eigh
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import LinearOperator, Triangular

from structlin._arrays import Array
from structlin._cola_compat import rule
from structlin._lapack import eps, follows, is_known, known, lapack, require_precision
from structlin.algebra import chains, roles
from structlin.linalg import _spectral as spectral
from structlin.linalg._common import (
    dense_matrix,
    fits_dense,
    lapack_of,
    like,
    require_dense,
    require_operator,
    require_square,
)
from structlin.linalg._forms import members
from structlin.linalg._iterative import ConvergenceError, host_operator
from structlin.operators import StructuredOperator
from structlin.structures._vectors import permuted_columns
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal
from structlin.verdicts import SVD

_NAME_ONE = "pass cola.linalg.Lanczos() or cola.linalg.Arnoldi()"


# -- eigenvalues -----------------------------------------------------------------------------------------------------


@rule("eig")
def _eig_rule(A: StructuredOperator, k: int, which: str, alg: Auto):
    n = _check(A, k, which)
    require_precision(A.factors[0] if A.dtype == A.factors[0].dtype else A._eye(1), "an eigenvalue")
    width = chains.thin(A)
    if which == "LM" and width is not None and k <= width and 2 * width <= n:
        return _eig_of_low_rank(A, k)
    return _selected(*_all_pairs(A), k, which)


def _all_pairs(A: LinearOperator) -> tuple[Array, LinearOperator]:
    pairs = eigenpairs(A)
    return _dense_eigenpairs(A) if pairs is None else pairs


def _check(A: LinearOperator, k: int, which: str) -> int:
    n = require_square(A, "an eigenvalue")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and {n}, the size of the operator, got {k}")
    if which not in ("LM", "SM"):
        raise ValueError(f'which must be "LM" (largest) or "SM" (smallest magnitude), got {which!r}')
    return n


def _selected(values: Array, vectors: LinearOperator, k: int, which: str) -> tuple[Array, LinearOperator]:
    n = values.shape[0]
    xp = lapack(values)
    order = xp.argsort(xp.abs(values))
    order = order[:k] if which == "SM" else order[n - k :]
    if isinstance(vectors, Dense):
        chosen: LinearOperator = Dense(vectors.factors[0][:, order])
    else:
        chosen = permuted_columns(vectors, xp.argsort(xp.abs(values)))
        if k < n:
            chosen = chosen[:, :k] if which == "SM" else chosen[:, n - k :]
    return values[order], Stiefel(chosen) if vectors.isa(Stiefel) else chosen


def _eig_of_low_rank(A: StructuredOperator, k: int) -> tuple[Array, LinearOperator]:
    """Return the k largest eigenvalues and their vectors of A = U V from those of V U.

    A has the eigenvalues of V U, and zeros. If V U y = c y with c != 0, then U y is an eigenvector of A. If c is zero
    to roundoff, U y is only roundoff. A vector x with V x = 0 is used instead, which has eigenvalue 0. A Hermitian A is
    decomposed in an orthonormal basis of the range of U.
    """
    factors = roles.thin_factors(A)
    assert factors is not None
    U, V = factors
    xp = lapack(U)
    if A.isa(SelfAdjoint):
        Q, _ = xp.qr(U)
        values, small = xp.eigh(xp.conj(Q).T @ (A @ Q))
        order = xp.argsort(xp.abs(values))[values.shape[0] - k :]
        return values[order], Stiefel(Dense(Q @ small[:, order]))
    values, small = xp.eig(V @ U)
    order = xp.argsort(xp.abs(values))[values.shape[0] - k :]
    values, vectors = values[order], xp.to_complex(U) @ small[:, order]
    scale = known(xp.norm(xp.stop_gradient(U)) * xp.norm(xp.stop_gradient(V)))
    if scale is not None:
        zero = int((xp.abs(xp.stop_gradient(values)) <= 100 * U.shape[0] * eps(U.dtype) * scale).sum())
        if zero:  # they come first
            start = like(np.random.default_rng(0).standard_normal((A.shape[1], zero)), A)
            basis, _ = xp.qr(xp.conj(V).T)
            for _ in range(2):
                start = start - basis @ (xp.conj(basis).T @ start)
            null, _ = xp.qr(start)
            vectors = xp.concat_axis((xp.to_complex(null), vectors[:, zero:]), 1)
            values = xp.concat((values[:zero] * 0, values[zero:]))
    return values, Dense(vectors / xp.sqrt((xp.abs(vectors) ** 2).sum(0)))


def eigenpairs(A: LinearOperator) -> tuple[Array, LinearOperator] | None:
    """Return all eigenvalues, unordered, and eigenvectors as an operator; None without a closed form."""
    if isinstance(A, StructuredOperator):
        answer = A.structure.eig(A)
        found = None if answer is None else answer.value
    else:
        found = spectral.eigen(A)
    return None if found is None else (found.values, found.vectors)


def _dense_eigenpairs(A: LinearOperator) -> tuple[Array, LinearOperator]:
    require_dense(A, "the spectrum", _NAME_ONE)
    matrix = dense_matrix(A, "an eigenvalue")
    if A.isa(SelfAdjoint):
        values, vectors = lapack(matrix).eigh(matrix)
        return values, Stiefel(Dense(vectors))
    values, vectors = lapack(matrix).eig(matrix)
    return values, Dense(vectors)


@rule("eig", precedence=-0.5)
def _eig_of_any(A: LinearOperator, k: int, which: str, alg: Auto):
    _check(A, k, which)
    return _selected(*_all_pairs(A), k, which)


@rule("eig", precedence=-0.5)
def _eig_of_any_by_eig(A: LinearOperator, k: int, which: str, alg: Eig):
    _check(A, k, which)
    matrix = dense_matrix(A, "an eigenvalue")
    values, vectors = lapack(matrix).eig(matrix)
    return _selected(values, Dense(vectors), k, which)


@rule("eig", precedence=-0.5)
def _eig_of_any_by_eigh(A: LinearOperator, k: int, which: str, alg: Eigh):
    _check(A, k, which)
    if not A.isa(SelfAdjoint):
        raise ValueError(
            "the algorithm Eigh needs an operator annotated cola.SelfAdjoint; annotate A if it is self-adjoint, or use "
            "Eig"
        )
    return _selected(*_dense_eigenpairs(A), k, which)


@rule("eig")
def _eig_of_triangular(A: Triangular, k: int, which: str, alg: Auto | Eig):
    """Back substitution, with vectors whose last entry is 1 as in CoLA; the dense matrix if eigenvalues repeat."""
    n = _check(A, k, which)
    matrix = dense_matrix(A, "an eigenvalue")
    xp = lapack(matrix)
    values = xp.diagonal(matrix)
    if not is_known(matrix) or follows(matrix):
        return _selected(*_dense_eigenpairs(A), k, which)
    numbers = np.asarray(matrix.detach().cpu() if hasattr(matrix, "detach") else matrix)
    # The entries decide, because CoLA's operator is flagged "lower" by default.
    lower, upper = not np.triu(numbers, 1).any(), not np.tril(numbers, -1).any()
    turned = numbers if upper else numbers[::-1, ::-1]
    diagonal = np.diagonal(turned)
    gap = np.abs(diagonal[:, None] - diagonal)[~np.eye(n, dtype=bool)]
    if not (lower or upper) or not gap.min(initial=np.inf) > eps(A.dtype) ** 0.5 * np.abs(diagonal).max():
        return _selected(*_dense_eigenpairs(A), k, which)
    vectors = np.eye(n, dtype=numbers.dtype)
    for j in range(1, n):
        vectors[:j, j] = scipy.linalg.solve_triangular(turned[:j, :j] - diagonal[j] * np.eye(j), -turned[:j, j])
    vectors = vectors if upper else vectors[::-1, ::-1]
    return _selected(values, Dense(like(np.ascontiguousarray(vectors), A)), k, which)


@rule("eig")
def _eig_of_diagonal(A: ColaDiagonal, k: int, which: str, alg: Auto):
    _check(A, k, which)
    return _selected(A.diag, Unitary(Diagonal(A.diag * 0 + 1)), k, which)


# -- singular values ---------------------------------------------------------------------------------------------------


def svd(A: LinearOperator, k: int | None = None, *, tolerance: float = 0.0, seed: int = 0) -> SVD:
    """Return the thin singular value decomposition ``A = U diag(S) Vh``.

    U and Vh are operators that keep the structure where possible. The table in ``docs/linalg.md`` lists the method for
    each structure. A matrix of low rank w takes two QR decompositions and the SVD of a (w, w) matrix. The singular
    vectors of a circulant matrix are complex.

    Parameters
    ----------
    A
        Operator of shape (d_out, d_in).
    k
        Number of largest singular values; default all r values that are not zero by structure. r is w for low rank w,
        the product of the members' r for a Kronecker product, and min(d_out, d_in) otherwise. ARPACK is used if there
        is no closed form and k is below a quarter of min(d_out, d_in).
    tolerance, seed
        Relative tolerance (0 means roundoff) and seed of the start vector of ARPACK.

    Returns
    -------
    SVD
        (U, S, Vh) of :class:`structlin.verdicts.SVD`, with r or k singular values in descending order.

    Raises
    ------
    ValueError
        If k is out of range, or if k is not given and A has no closed form and exceeds :class:`dense_limit`.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Kronecker
    >>> U, S, Vh = svd(Kronecker(np.diag([1.0, 2.0]), np.diag([3.0, 5.0, 7.0])))
    >>> S
    array([14., 10.,  7.,  6.,  5.,  3.])
    """
    require_operator(A)
    answer = A.structure.svd(A) if isinstance(A, StructuredOperator) else None
    if k is not None:
        if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= min(A.shape):
            raise ValueError(f"k must lie between 1 and {min(A.shape)}, got {k!r}")
        if answer is None and 4 * k < min(A.shape):
            return _some_singular(A, int(k), tolerance, seed)
    if answer is not None:
        found = answer.value
    else:
        require_dense(A, "the singular value decomposition", "pass k for the k largest singular values")
        matrix = dense_matrix(A, "a singular value")
        u, s, vh = lapack(matrix).svd(matrix)
        found = SVD(Stiefel(Dense(u)), s, Dense(vh))
    if k is None or k >= found.S.shape[0]:
        return found
    return SVD(Stiefel(found.U[:, :k]), found.S[:k], found.Vh[:k])


def _some_singular(A: LinearOperator, k: int, tolerance: float, seed: int) -> SVD:
    start = np.random.default_rng(seed).standard_normal(min(A.shape))
    u, s, vh = sparse.svds(host_operator(A), k, v0=start, tol=tolerance)
    order = np.argsort(-s)
    values = lapack_of(A).real(like(s[order].copy(), A))
    return SVD(Stiefel(Dense(like(u[:, order].copy(), A))), values, Dense(like(vh[order].copy(), A)))


# -- some of the eigenvalues, and eigenvalues alone --------------------------------------------------------------------


def eigvals(A: LinearOperator) -> Array:
    """Return all eigenvalues in ascending order of magnitude; real if A is annotated SelfAdjoint.

    ValueError if A is not square, or has no closed form and exceeds :class:`dense_limit`.

    Examples
    --------
    >>> import numpy as np
    >>> import cola
    >>> from structlin import Kronecker
    >>> eigvals(cola.SelfAdjoint(Kronecker(np.diag([1.0, 2.0]), np.diag([3.0, 5.0]))))
    array([ 3.,  5.,  6., 10.])
    """
    require_operator(A)
    require_square(A, "an eigenvalue")
    pairs = eigenpairs(A)
    if pairs is not None:
        values = pairs[0]
    else:
        require_dense(A, "the spectrum", "structlin.linalg.eigsh computes k eigenvalues")
        matrix = dense_matrix(A, "an eigenvalue")
        xp = lapack(matrix)
        values = xp.eigvalsh(matrix) if A.isa(SelfAdjoint) else xp.eig(matrix)[0]
    xp = lapack(values)
    return values[xp.argsort(xp.abs(values))]


def eigsh(
    A: LinearOperator, k: int, which: str = "LM", *, tolerance: float = 0.0, max_iterations: int | None = None,
    seed: int = 0,
) -> tuple[Array, LinearOperator]:  # fmt: skip
    """Return k eigenvalues of a Hermitian operator, and eigenvectors as an operator of shape (n, k).

    ARPACK is used if there is no closed form, and A exceeds :class:`dense_limit` or k is small. For "SM" it solves with
    A.

    Parameters
    ----------
    A
        Operator annotated ``cola.SelfAdjoint`` or ``cola.PSD``.
    k
        Number of eigenvalues.
    which
        "LM" for the largest, "SM" for the smallest magnitude.
    tolerance, max_iterations, seed
        Relative tolerance (0 means roundoff), largest number of iterations and seed of the start vector of ARPACK.

    Returns
    -------
    values, vectors
        Real eigenvalues in ascending order of magnitude, and their vectors as columns.

    Raises
    ------
    ValueError
        If A is not annotated or not square, or if k or ``which`` is out of range.
    ConvergenceError
        If ARPACK finds fewer than k eigenvalues.
    """
    require_operator(A)
    n = _check(A, k, which)
    if not A.isa(SelfAdjoint):
        raise ValueError(
            "eigsh needs an operator annotated cola.SelfAdjoint or cola.PSD; annotate A if it is self-adjoint"
        )
    if eigenpairs_are_closed(A) or (fits_dense(A) and (n <= 512 or 4 * k >= n)):
        values, vectors = cola.eig(A, k, which, Auto())
        return values, vectors
    start = np.random.default_rng(seed).standard_normal(n)
    options: dict[str, Any] = {"v0": start, "tol": tolerance, "maxiter": max_iterations}
    if which == "SM":
        options |= {"sigma": 0.0, "OPinv": host_operator(cola.inv(A, Auto())), "which": "LM"}
    else:
        options["which"] = "LM"
    try:
        values, vectors = sparse.eigsh(host_operator(A), k, **options)
    except sparse.ArpackNoConvergence as error:
        raise ConvergenceError(
            f"ARPACK found {len(error.eigenvalues)} of {k} eigenvalues; raise max_iterations"
        ) from error
    order = np.argsort(np.abs(values))
    found = lapack_of(A).real(like(values[order].copy(), A))
    return found, Stiefel(Dense(like(vectors[:, order].copy(), A)))


def eigenpairs_are_closed(A: LinearOperator) -> bool:
    """Whether all eigenvalues have a closed form."""
    if isinstance(A, StructuredOperator):
        return chains.thin(A) is not None or A.structure.eig(A) is not None
    return members(A) is not None


def eig(A: LinearOperator, k: int | None = None, which: str = "LM") -> tuple[Array, LinearOperator]:
    """Return k eigenvalues (default all), ascending in magnitude, and their vectors as an operator: ``cola.eig``.

    ``which`` is as in :func:`eigsh`. ValueError if A is not square, or has no closed form and exceeds
    :class:`dense_limit`.
    """
    require_operator(A)
    require_square(A, "an eigenvalue")
    return cola.eig(A, A.shape[0] if k is None else k, which, Auto())
