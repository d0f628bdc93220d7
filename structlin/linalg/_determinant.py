"""Signs and logarithms of determinants, registered with ``cola.linalg.slogdet`` (and so with ``cola.logdet``).

The rules apply if the algorithm for the logarithm is ``Auto`` of CoLA (the default).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import cola
import numpy as np
from cola.annotations import PSD
from cola.linalg import slogdet
from cola.linalg.algorithm_base import Algorithm, Auto
from cola.ops import (
    Adjoint,
    BlockDiag,
    Identity,
    KronSum,
    LinearOperator,
    Permutation,
    Product,
    ScalarMul,
    Sum,
    Transpose,
)
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array
from structlin._cola_compat import parity, rule
from structlin._lapack import as_tensors, determinant_of_numbers, lapack, zero_determinant
from structlin.linalg import _spectral as spectral
from structlin.linalg._common import dense_matrix, fits_dense, has_square_members, is_matrix, on_host, require_square
from structlin.linalg._stochastic import estimate_logdet
from structlin.linalg._woodbury import woodbury
from structlin.operators import RealPart, StructuredOperator


@rule("slogdet")
def _slogdet_rule(A: StructuredOperator, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    host = on_host(A)
    if host is not None:
        with np.errstate(all="ignore"):
            found = _slogdet_of_structure(host[0], log_alg)
        if not np.isnan(found[1]):  # for which the libraries have other signs and errors
            return tuple(as_tensors(*found))
    return _slogdet_of_structure(A, log_alg)


def _slogdet_of_structure(A: StructuredOperator, log_alg: Auto) -> tuple[Array, Array]:
    answer = A.structure.slogdet(A)
    return general_slogdet(A, log_alg) if answer is None else tuple(answer.value)


def general_slogdet(A: LinearOperator, log_alg: Auto) -> tuple[Array, Array]:
    """Return the determinant of the dense matrix; above the limit, a stochastic estimate with a warning."""
    if fits_dense(A) or is_matrix(A):
        matrix = dense_matrix(A, "a determinant")
        xp = lapack(matrix)
        sign, log = xp.positive_slogdet(matrix) if A.isa(PSD) else xp.slogdet(matrix)
        return sign, log
    answer = estimate_logdet(A)
    warnings.warn(
        f"the determinant of {type(A).__name__} of shape {tuple(A.shape)} has no fast form; its logarithm is estimated "
        f"with a standard error of {answer.error:.1e}; pass probes to structlin.linalg.logdet for a smaller error, or "
        "cola.linalg.LU() for the exact value",
        stacklevel=3,
    )
    sign = answer.value * 0 + (1 if A.isa(PSD) else float("nan"))  # the sign of an estimate is not known
    return sign, answer.value


# -- operators of CoLA -------------------------------------------------------------------------------------------------


@rule("slogdet", precedence=-0.5)
def _slogdet_of_any(A: LinearOperator, log_alg: Auto, trace_alg: Algorithm):
    require_square(A, "the determinant")
    return general_slogdet(A, log_alg)


@rule("slogdet")
def _slogdet_of_transpose(A: Transpose | Adjoint, log_alg: Auto, trace_alg: Algorithm):
    sign, log = slogdet(A.A, log_alg, trace_alg)
    return sign if isinstance(A, Transpose) else lapack(sign).conj(sign), log


@rule("slogdet")
def _slogdet_of_real_part(A: RealPart, log_alg: Auto, trace_alg: Algorithm):
    sign, log = slogdet(A.A, log_alg, trace_alg)
    return lapack(sign).sign(sign.real), log


def _zero(A: LinearOperator) -> tuple[Array, Array]:
    """Return the determinant of a matrix that is singular by its structure."""
    return tuple(zero_determinant(A.xnp.zeros((1,), dtype=A.dtype, device=A.device)))


def _of_powers(determinants: Iterable[tuple[Array, Array]], powers: Iterable[int]) -> tuple[Array, Array]:
    sign: Any = 1
    log: Any = 0
    for (s, value), power in zip(determinants, powers, strict=True):
        sign, log = sign * s**power, log + power * value
    return sign, log


@rule("slogdet")
def _slogdet_of_identity(A: Identity, log_alg: Auto, trace_alg: Algorithm):
    one = A.xnp.ones((1,), dtype=A.dtype, device=A.device)[0]
    return one, lapack(one).real(one) * 0


@rule("slogdet")
def _slogdet_of_scalar(A: ScalarMul, log_alg: Auto, trace_alg: Algorithm):
    c = A.c.reshape((1,))
    sign, log = determinant_of_numbers(c)
    return sign ** A.shape[0], log * A.shape[0]


@rule("slogdet")
def _slogdet_of_permutation(A: Permutation, log_alg: Auto, trace_alg: Algorithm):
    zero = A.xnp.zeros((1,), dtype=A.dtype, device=A.device)[0]
    return zero + parity(A.perm), lapack(zero).real(zero)


@rule("slogdet")
def _slogdet_of_sum(A: Sum | KronSum, log_alg: Auto, trace_alg: Algorithm):
    """Use the closed form of K + c I, of two Kronecker products, or of low rank plus another operator."""
    require_square(A, "the determinant")
    found = spectral.slogdet(A) or spectral.pair_slogdet(A)
    if found is None and isinstance(A, Sum) and (formula := woodbury(A)) is not None:
        found = formula.slogdet(A)
    return general_slogdet(A, log_alg) if found is None else tuple(found)


@rule("slogdet")
def _slogdet_of_product(A: Product, log_alg: Auto, trace_alg: Algorithm):
    n = require_square(A, "the determinant")
    if all(M.shape == (n, n) for M in A.Ms):
        return _of_powers([slogdet(M, log_alg, trace_alg) for M in A.Ms], [1] * len(A.Ms))
    return _zero(A) if min(M.shape[0] for M in A.Ms) < n else general_slogdet(A, log_alg)


@rule("slogdet")
def _slogdet_of_members(A: ColaKronecker | BlockDiag, log_alg: Auto, trace_alg: Algorithm):
    n = require_square(A, "the determinant")
    if not has_square_members(A):
        return _zero(A)
    powers = A.multiplicities if isinstance(A, BlockDiag) else [n // M.shape[0] for M in A.Ms]
    return _of_powers([slogdet(M, log_alg, trace_alg) for M in A.Ms], powers)


@rule("slogdet")
def _slogdet_of_diagonal(A: cola.ops.Diagonal, log_alg: Auto, trace_alg: Algorithm):
    return tuple(determinant_of_numbers(A.diag))
