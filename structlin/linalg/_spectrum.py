"""Eigenvalues and singular values: of the parts, where the structure has parts; of the dense matrix otherwise.

``cola.eig(A, k, which)`` returns k eigenvalues in ascending order of magnitude, those of largest ("LM", CoLA's default)
or of smallest magnitude ("SM"), and their eigenvectors as the columns of an operator. The rules apply for CoLA's Auto
(the default), Eig and Eigh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cola.annotations import SelfAdjoint, Stiefel, Unitary
from cola.linalg.algorithm_base import Auto
from cola.linalg.unary.unary import Eig, Eigh
from cola.ops import FFT, LinearOperator, Triangular
from cola.ops import Diagonal as ColaDiagonal

from structlin._arrays import Array
from structlin._cola_compat._repair import rule
from structlin.linalg import _chain as chain
from structlin.linalg._common import require_dense, require_square
from structlin.linalg._inverse import thin_orthogonal
from structlin.linalg._lapack import lapack, require_precision
from structlin.operators import StructuredOperator
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.circulant import CirculantStructure
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal, DiagonalStructure
from structlin.structures.kronecker import Kronecker
from structlin.structures.permutation import Permutation, PermutationStructure

_NAME_ONE = "pass cola.linalg.Lanczos() or cola.linalg.Arnoldi()"


def fourier(A: LinearOperator) -> LinearOperator:
    """The unitary Fourier transform, F[j, t] = exp(-2 pi i j t / n) / sqrt(n), for the size and library of A."""
    xnp = A.xnp
    transform = FFT(A.shape[0], dtype=xnp.promote_types(A.dtype, xnp.complex64))
    transform.xnp, transform.device = xnp, A.device
    return transform


def permuted_columns(V: LinearOperator, order: Array) -> LinearOperator:
    """``V[:, order]``."""
    return V @ Permutation._build(Permutation.design((order.shape[0],) * 2), (order,), V.dtype).T


# -- eigenvalues -----------------------------------------------------------------------------------------------------


@rule("eig")
def _eig_rule(A: StructuredOperator, k: int, which: str, alg: Auto):
    n = _check(A, k, which)
    require_precision(A.factors[0] if A.dtype == A.factors[0].dtype else A._eye(1), "an eigenvalue")
    found = chain.bottleneck(A.structure)
    if which == "LM" and found is not None and k <= found[0] and 2 * found[0] <= n and not A.isa(SelfAdjoint):
        return _eig_of_low_rank(A, k)
    pairs = eigenpairs(A)
    return _selected(*(_dense_eigenpairs(A) if pairs is None else pairs), k, which)


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
    kind = Stiefel if vectors.isa(Stiefel) else None
    if isinstance(vectors, Dense):
        chosen: LinearOperator = Dense(vectors.factors[0][:, order])
        return values[order], chosen if kind is None else kind(chosen)
    whole = xp.argsort(xp.abs(values))
    columns = permuted_columns(vectors, whole)
    if k < n:
        columns = columns[:, :k] if which == "SM" else columns[:, n - k :]
    return values[order], columns if kind is None else kind(columns)


def eigenpairs(A: StructuredOperator) -> tuple[Array, LinearOperator] | None:
    """All eigenvalues, in no order, and eigenvectors as an operator, in closed form or from the parts."""
    structure, factors = A.structure, A.factors
    xp = lapack(factors[0])
    hermitian = A.isa(SelfAdjoint)
    if isinstance(structure, DiagonalStructure):
        ones = factors[0] * 0 + 1
        return (xp.real(factors[0]) if hermitian else factors[0]), Unitary(Diagonal(ones))
    if isinstance(structure, CirculantStructure):
        values = xp.fft(factors[0], structure.size, 0)
        return (xp.real(values) if hermitian else values), Unitary(fourier(A).H)
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        values, vectors = (xp.eigh if hermitian else xp.eig)(blocks)
        found = BlockDiagonal(vectors)
        return values.reshape((structure.d_in,)), Unitary(found) if hermitian else found
    if hermitian:  # the members of a Hermitian Kronecker product need not be Hermitian
        return None
    matrices = chain.part_matrices(structure, factors)
    if matrices is None or len(matrices) < 2 or any(m.shape[0] != m.shape[1] for m in matrices):
        return None
    pairs = [xp.eig(m) for m in matrices]
    values = pairs[0][0]
    for more, _ in pairs[1:]:
        values = (values[:, None] * more[None, :]).reshape((-1,))
    return values, Kronecker(*(vectors for _, vectors in pairs))


def _eig_of_low_rank(A: StructuredOperator, k: int) -> tuple[Array, LinearOperator]:
    """A = U V has the eigenvalues of V U besides zeros; if V U y = c y with c != 0, then U y is A's eigenvector."""
    thin = chain.thin_factors(A)
    assert thin is not None
    U, V = thin
    xp = lapack(U)
    values, small = xp.eig(V @ U)
    order = xp.argsort(xp.abs(values))[values.shape[0] - k :]
    vectors = xp.to_complex(U) @ small[:, order]
    return values[order], Dense(vectors / xp.sqrt((xp.abs(vectors) ** 2).sum(0)))


def _dense_eigenpairs(A: LinearOperator) -> tuple[Array, LinearOperator]:
    require_dense(A, "the spectrum", _NAME_ONE)
    matrix = A.to_dense()
    require_precision(matrix, "an eigenvalue")
    if A.isa(SelfAdjoint):
        values, vectors = lapack(matrix).eigh(matrix)
        return values, Stiefel(Dense(vectors))
    values, vectors = lapack(matrix).eig(matrix)
    return values, Dense(vectors)


@rule("eig", precedence=-0.5)
def _eig_of_any(A: LinearOperator, k: int, which: str, alg: Auto):
    _check(A, k, which)
    return _selected(*_dense_eigenpairs(A), k, which)


@rule("eig", precedence=-0.5)
def _eig_of_any_by_eig(A: LinearOperator, k: int, which: str, alg: Eig):
    _check(A, k, which)
    matrix = A.to_dense()
    require_precision(matrix, "an eigenvalue")
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
    # CoLA's own rule gives the eigenvectors of upper triangular matrices for lower ones.
    _check(A, k, which)
    return _selected(*_dense_eigenpairs(A), k, which)


@rule("eig")
def _eig_of_diagonal(A: ColaDiagonal, k: int, which: str, alg: Auto):
    _check(A, k, which)
    return _selected(A.diag, Unitary(Diagonal(A.diag * 0 + 1)), k, which)


# -- singular values ---------------------------------------------------------------------------------------------------


class SVD(NamedTuple):
    """``A = U diag(S) Vh``. U: (d_out, r) with orthonormal columns, S: (r,) real and descending, Vh: (r, d_in) with
    orthonormal rows; U and Vh are operators."""

    U: LinearOperator
    S: Array
    Vh: LinearOperator


def svd(A: LinearOperator) -> SVD:
    """Thin singular value decomposition, as operators that apply as fast as the structure allows.

    Of a Kronecker product from the SVDs of its members, of a block-diagonal matrix from those of the blocks, of a
    circulant matrix by FFT (its vectors are complex), of a product with a bottleneck of width w (low rank) from two QR
    decompositions and an SVD of (w, w); diagonal and permutation matrices as they are; everything else from the dense
    matrix, up to 8192 rows or columns. ``r`` counts the singular values that are not zero by structure: a low-rank
    matrix has w, a Kronecker product the product of its members' numbers, any other min(d_out, d_in).

    Raises TypeError for what is no operator, ValueError for half precision and for what is too large.

    >>> import numpy as np
    >>> from structlin import Kronecker
    >>> U, S, Vh = svd(Kronecker(np.diag([1.0, 2.0]), np.diag([3.0, 5.0, 7.0])))
    >>> S
    array([14., 10.,  7.,  6.,  5.,  3.])
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(f"A must be a linear operator, got {type(A).__qualname__}; wrap an array in cola.ops.Dense")
    found = _structured_svd(A) if isinstance(A, StructuredOperator) else None
    if found is not None:
        return found
    require_dense(A, "the singular value decomposition", "cola.linalg.Lanczos() on A.H @ A gives some of it")
    matrix = A.to_dense()
    require_precision(matrix, "a singular value")
    u, s, vh = lapack(matrix).svd(matrix)
    return SVD(Stiefel(Dense(u)), s, Dense(vh))


def _structured_svd(A: StructuredOperator) -> SVD | None:
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        ones = A._eye(1)[0, 0] + lapack(factors[0]).zeros((structure.size,), A._eye(1))
        return SVD(Unitary(A), lapack(ones).real(ones), Unitary(Diagonal(ones)))
    require_precision(factors[0], "a singular value")
    xp = lapack(factors[0])
    if isinstance(structure, DiagonalStructure):
        size, phases = _phases(factors[0], xp)
        return _descending(Diagonal(phases), size, Diagonal(factors[0] * 0 + 1))
    if isinstance(structure, CirculantStructure):
        transform = fourier(A)
        size, phases = _phases(xp.fft(factors[0], structure.size, 0), xp)
        return _descending(transform.H @ Diagonal(phases), size, transform)
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        u, s, vh = xp.svd(blocks)
        return _descending(BlockDiagonal(u), s.reshape((-1,)), BlockDiagonal(vh))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None and len(matrices) > 1:
        parts = [xp.svd(m) for m in matrices]
        values = parts[0][1]
        for _, more, _ in parts[1:]:
            values = (values[:, None] * more[None, :]).reshape((-1,))
        return _descending(Kronecker(*(p[0] for p in parts)), values, Kronecker(*(p[2] for p in parts)))
    found = chain.bottleneck(structure)
    if found is not None and 2 * found[0] <= min(A.shape):
        left, core, right = thin_orthogonal(A)
        u, s, vh = xp.svd(core)
        return SVD(Stiefel(Dense(left @ u)), s, Dense(vh @ right))
    return None


def _phases(values: Array, xp: Any) -> tuple[Array, Array]:
    """Absolute values, and values divided by them (1 for zeros)."""
    size = xp.abs(values)
    zero = size == 0
    return size, xp.where(zero, values * 0 + 1, values / xp.where(zero, size * 0 + 1, size))


def _descending(U: LinearOperator, values: Array, Vh: LinearOperator) -> SVD:
    xp = lapack(values)
    order = xp.argsort(-values)
    pick = Permutation._build(Permutation.design((order.shape[0],) * 2), (order,), U.dtype)
    return SVD(Stiefel(U @ pick.T), values[order], pick @ Vh)
