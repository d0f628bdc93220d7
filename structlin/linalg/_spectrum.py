"""Eigenvalues and singular values: of the parts, where the structure has parts; of the dense matrix otherwise.

``cola.eig(A, k, which)`` returns k eigenvalues in ascending order of magnitude, those of largest ("LM", CoLA's default)
or of smallest magnitude ("SM"), and their eigenvectors as the columns of an operator. The rules apply for CoLA's Auto
(the default), Eig and Eigh.
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
    """Return a = U V has the eigenvalues of V U besides zeros; if V U y = c y with c != 0, then U y is A's eigenvector.

    Vectors x with V x = 0 belong to the eigenvalue 0: they stand in for those of values that are zero to roundoff, of
    which U y is only roundoff, too. Hermitian matrices in an orthonormal basis of the range of U, where no U y is
    small.
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
    """All eigenvalues, in no order, and eigenvectors as an operator, in closed form or from the parts."""
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
        raise ValueError("Eigh is for self-adjoint operators; annotate with cola.SelfAdjoint if it is one, or take Eig")
    return _selected(*_dense_eigenpairs(A), k, which)


@rule("eig")
def _eig_of_triangular(A: Triangular, k: int, which: str, alg: Auto | Eig):
    """By back substitution, with vectors that end with 1 as CoLA's do; of the dense matrix where values repeat."""
    n = _check(A, k, which)
    matrix = dense_matrix(A, "an eigenvalue")
    xp = lapack(matrix)
    values = xp.diagonal(matrix)
    if not is_known(matrix) or follows(matrix):
        return _selected(*_dense_eigenpairs(A), k, which)
    numbers = np.asarray(matrix.detach().cpu() if hasattr(matrix, "detach") else matrix)
    # From the entries: the flag of CoLA's operator is "lower" by default, for an upper triangle too.
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
    """Thin singular value decomposition, as operators that apply as fast as the structure allows.

    Of a Kronecker product from the SVDs of its members, of a block-diagonal matrix from those of the blocks, of a
    circulant matrix by FFT (its vectors are complex), of a product with a bottleneck of width w (low rank) from two QR
    decompositions and an SVD of (w, w); diagonal, permutation and transform matrices as they are; everything else from
    the dense matrix, up to 8192 rows or columns. ``r`` counts the singular values that are not zero by structure: a
    low-rank matrix has w, a Kronecker product the product of its members' numbers, any other min(d_out, d_in).

    Parameters
    ----------
    A
        An operator.
    k
        Only the k largest: by ARPACK, with products alone, where the structure has no closed form and k is small.
    tolerance, seed
        Of ARPACK, relative to the singular value (0: roundoff); no part of a closed form.

    Notes
    -----
    Raises TypeError for what is no operator, ValueError for half precision, for a k out of range and for what is too
    large without k.

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
        require_dense(A, "the singular value decomposition", "k = 10, say, gives the ten largest")
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
    """All eigenvalues, without eigenvectors, in ascending order of magnitude; real where A is annotated SelfAdjoint.

    In closed form or from the parts, as :func:`cola.eig`; else of the dense matrix, up to 8192 rows.

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
        require_dense(A, "the spectrum", "structlin.linalg.eigsh gives some of it")
        matrix = dense_matrix(A, "an eigenvalue")
        xp = lapack(matrix)
        values = xp.eigvalsh(matrix) if A.isa(SelfAdjoint) else xp.eig(matrix)[0]
    xp = lapack(values)
    return values[xp.argsort(xp.abs(values))]


def eigsh(
    A: LinearOperator, k: int, which: str = "LM", *, tolerance: float = 0.0, max_iterations: int | None = None,
    seed: int = 0,
) -> tuple[Array, LinearOperator]:  # fmt: skip
    """K eigenvalues of a Hermitian operator in ascending order of magnitude, and eigenvectors as an operator (n, k).

    Parameters
    ----------
    A
        Annotated ``cola.SelfAdjoint`` or ``cola.PSD``.
    k
        Their number.
    which
        "LM" or "SM", the largest or the smallest magnitude.
    tolerance, max_iterations, seed
        Of ARPACK, which takes over, with products alone, where there is no closed form and the matrix is too large to
        be dense or k is small; for "SM" it solves with A.

    Notes
    -----
    Raises ValueError for an operator that is not annotated, and ConvergenceError.
    """
    require_operator(A)
    n = _check(A, k, which)
    if not A.isa(SelfAdjoint):
        raise ValueError("eigsh is for self-adjoint operators; annotate with cola.SelfAdjoint if it is one")
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
    """Whether all of the spectrum follows from parts."""
    if isinstance(A, StructuredOperator):
        return chains.thin(A) is not None or A.structure.eig(A) is not None
    return members(A) is not None


def eig(A: LinearOperator, k: int | None = None, which: str = "LM") -> tuple[Array, LinearOperator]:
    """K eigenvalues (default: all) in ascending order of magnitude, and eigenvectors as an operator: ``cola.eig``."""
    require_operator(A)
    require_square(A, "an eigenvalue")
    return cola.eig(A, A.shape[0] if k is None else k, which, Auto())
