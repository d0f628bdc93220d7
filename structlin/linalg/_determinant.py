"""Signs and logarithms of determinants, registered with ``cola.linalg.slogdet`` (and so with ``cola.logdet``).

They apply where the algorithm for the logarithm is CoLA's ``Auto`` (the default).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import cola
from cola.annotations import PSD
from cola.linalg import slogdet
from cola.linalg.algorithm_base import Algorithm, Auto
from cola.linalg.decompositions.decompositions import Arnoldi, Lanczos
from cola.ops import Adjoint, BlockDiag, Identity, LinearOperator, Permutation, Product, ScalarMul, Transpose
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array
from structlin._cola_compat._repair import implementation, rule
from structlin._cola_compat._values import _parity
from structlin.linalg import _chain as chain
from structlin.linalg import _toeplitz as toeplitz
from structlin.linalg._common import fits_dense, require_square
from structlin.linalg._inverse import padded_inverse
from structlin.linalg._lapack import lapack, require_precision
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.circulant import CirculantStructure
from structlin.structures.diagonal import DiagonalStructure
from structlin.structures.permutation import PermutationStructure
from structlin.structures.toeplitz import ToeplitzStructure

Determinant = tuple[Array, Array]


@rule("slogdet")
def _slogdet_rule(A: StructuredOperator, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    found = structured_slogdet(A)
    return general_slogdet(A, log_alg, trace_alg) if found is None else found


def structured_slogdet(A: StructuredOperator) -> Determinant | None:
    """(sign or phase, log of the absolute value) in closed form; None where there is none."""
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        zero = A._eye(1)[0, 0] * 0
        return zero + _parity(factors[0], A.xnp), lapack(zero).real(zero)
    require_precision(factors[0], "a determinant")
    xp = lapack(factors[0])
    if isinstance(structure, DiagonalStructure):
        return of_numbers(factors[0], xp)
    if isinstance(structure, CirculantStructure):
        return _of_circulant(factors[0], xp)
    if isinstance(structure, ToeplitzStructure):
        return toeplitz.slogdet(A)
    if chain.rank_bound(structure) < structure.d_in:
        zero = (factors[0] * 0).sum()
        return zero, xp.real(zero) - math.inf
    if isinstance(structure, Structure) and chain.is_square_chain(structure):
        if A.isa(PSD) and (blocks := chain.diagonal_blocks(structure, factors)) is not None:
            return xp.positive_slogdet(blocks)
        # The members of a real symmetric Kronecker product are symmetric, or in pairs antisymmetric: with zeros on the
        # diagonal, so that Cholesky gives them back to LU.
        symmetric = A.isa(PSD) and not xp.is_complex(factors[0]) and chain.kronecker_parts(structure) is not None
        return _of_chain(structure, factors, xp, symmetric)
    padded = padded_inverse(A)
    if padded is None:
        return None
    # det A = det M det D, with D the bottom right block of M^-1.
    first, second = _of_chain(padded.full, factors, xp), xp.slogdet(padded.corner)
    return first[0] * second[0], first[1] + second[1]


def of_numbers(values: Array, xp: Any) -> Determinant:
    """Of a diagonal matrix. A zero gives (0, -inf), as for every library's dense matrices."""
    size = xp.abs(values)
    if not xp.is_complex(values):
        return xp.prod(xp.sign(values)), xp.log(size).sum()
    zero = size == 0
    signs = xp.where(zero, values * 0, values / xp.where(zero, size * 0 + 1, size))
    return xp.prod(signs), xp.log(size).sum()


def _of_circulant(column: Array, xp: Any) -> Determinant:
    n = column.shape[0]
    if xp.is_complex(column):
        return of_numbers(xp.fft(column, n, 0), xp)
    # Eigenvalues of a real circulant matrix are real at frequency 0 and n / 2, and come in conjugate pairs between.
    spectrum = xp.rfft(column, n, 0)
    paired = spectrum[1 : (n + 1) // 2]
    alone = spectrum[:1] if n % 2 else xp.concat([spectrum[:1], spectrum[n // 2 :]])
    sign, log = of_numbers(xp.real(alone), xp)
    if paired.shape[0] == 0:
        return sign, log
    pairs = xp.abs(paired)
    regular = xp.prod(xp.where(pairs == 0, pairs * 0, pairs * 0 + 1))
    return sign * regular, log + 2 * xp.log(pairs).sum()


def _of_chain(structure: Structure, factors: Iterable[Array], xp: Any, symmetric: bool = False) -> Determinant:
    sign: Any = chain.permutation_sign(structure)
    log: Any = 0
    for number, factor in enumerate(factors):
        carried = structure.factors[number].carried
        blocks = chain.blocks_of(structure, number, factor)
        if symmetric:
            signs, logs = xp.positive_slogdet(blocks)
        else:
            signs, logs = xp.slogdet(blocks)
            signs, logs = xp.prod(signs), logs.sum()
        sign, log = sign * signs**carried, log + carried * logs
    return sign, log


def general_slogdet(A: LinearOperator, log_alg: Auto, trace_alg: Algorithm) -> Determinant:
    """From the dense matrix up to the limit; beyond, CoLA's iterative estimate, with a warning."""
    if fits_dense(A):
        matrix = A.to_dense()
        require_precision(matrix, "a determinant")
        if A.isa(PSD):
            return lapack(matrix).positive_slogdet(matrix)
        sign, log = lapack(matrix).slogdet(matrix)
        return sign, log
    iterative = Lanczos if A.isa(PSD) else Arnoldi
    warnings.warn(
        f"the determinant of {type(A).__name__} of shape {tuple(A.shape)} has no fast form and is estimated by "
        f"{iterative.__name__}; pass an algorithm to choose, for example cola.linalg.LU()",
        stacklevel=3,
    )
    sign, log = slogdet(A, iterative(**vars(log_alg)), trace_alg)
    return sign, log


# CoLA's operators.


@rule("slogdet", precedence=-0.5)
def _slogdet_of_any(A: LinearOperator, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    return general_slogdet(A, log_alg, trace_alg)


@rule("slogdet")
def _slogdet_of_transpose(A: Transpose, log_alg: Auto, trace_alg: Algorithm):
    return slogdet(A.A, log_alg, trace_alg)


@rule("slogdet")
def _slogdet_of_adjoint(A: Adjoint, log_alg: Auto, trace_alg: Algorithm):
    sign, log = slogdet(A.A, log_alg, trace_alg)
    return lapack(sign).conj(sign), log


def _zero(A: LinearOperator) -> Determinant:
    """The determinant of a matrix that is singular by its structure."""
    zero = A.xnp.zeros((1,), dtype=A.dtype, device=A.device)[0]
    return zero, lapack(zero).real(zero) - math.inf


def _of_powers(determinants: Iterable[Determinant], powers: Iterable[int]) -> Determinant:
    sign: Any = 1
    log: Any = 0
    for (s, value), power in zip(determinants, powers, strict=True):
        sign, log = sign * s**power, log + power * value
    return sign, log


def _real_log(A: LinearOperator, kind: type, trace_alg: Algorithm) -> Determinant:
    """What CoLA's rule for ``kind`` gives, with a logarithm that is real for complex operators too."""
    sign, log = implementation("slogdet", kind, Algorithm, Algorithm)(A, Auto(), trace_alg)
    return sign, lapack(log).real(log)


@rule("slogdet")
def _slogdet_of_identity(A: Identity, log_alg: Auto, trace_alg: Algorithm):
    return _real_log(A, Identity, trace_alg)


@rule("slogdet")
def _slogdet_of_scalar(A: ScalarMul, log_alg: Auto, trace_alg: Algorithm):
    return _real_log(A, ScalarMul, trace_alg)


@rule("slogdet")
def _slogdet_of_permutation(A: Permutation, log_alg: Auto, trace_alg: Algorithm):
    return _real_log(A, Permutation, trace_alg)


@rule("slogdet")
def _slogdet_of_product(A: Product, log_alg: Auto, trace_alg: Algorithm):
    n = require_square(A, "the determinant")
    if all(M.shape == (n, n) for M in A.Ms):
        return _of_powers([slogdet(M, log_alg, trace_alg) for M in A.Ms], [1] * len(A.Ms))
    return _zero(A) if min(M.shape[0] for M in A.Ms) < n else general_slogdet(A, log_alg, trace_alg)


@rule("slogdet")
def _slogdet_of_kronecker(A: ColaKronecker, log_alg: Auto, trace_alg: Algorithm):
    n = require_square(A, "the determinant")
    if any(M.shape[0] != M.shape[1] for M in A.Ms):
        return _zero(A)
    return _of_powers([slogdet(M, log_alg, trace_alg) for M in A.Ms], [n // M.shape[0] for M in A.Ms])


@rule("slogdet")
def _slogdet_of_blocks(A: BlockDiag, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    if any(M.shape[0] != M.shape[1] for M in A.Ms):
        return _zero(A)
    return _of_powers([slogdet(M, log_alg, trace_alg) for M in A.Ms], A.multiplicities)


@rule("slogdet")
def _slogdet_of_diagonal(A: cola.ops.Diagonal, log_alg: Auto, trace_alg: Algorithm):
    return of_numbers(A.diag, lapack(A.diag))
