"""Functions of matrices, registered with ``cola.exp``, ``log``, ``pow`` (so ``sqrt``, ``isqrt``) and ``apply_unary``.

They are the primary functions, with principal branches, and apply for CoLA's Auto (the default). A function that takes
negative numbers to complex ones (log, powers that are no integers) gives a complex operator, unless A is annotated PSD
or diagonal with numbers known to be positive. Where a function goes through eigenvectors it is checked that these
reproduce the matrix; defective matrices raise ArithmeticError (inside jit they give NaN), except in exp and integer
powers, which need no eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from numbers import Number
from typing import Any

import cola
import numpy as np
from cola.annotations import PSD, SelfAdjoint
from cola.linalg.algorithm_base import Auto
from cola.ops import Adjoint, BlockDiag, I_like, Identity, KronSum, LinearOperator, ScalarMul, Transpose
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array
from structlin._cola_compat._repair import rule
from structlin.linalg import _chain as chain
from structlin.linalg._cola import scalar_like
from structlin.linalg._common import require_dense, require_square, singular
from structlin.linalg._lapack import eps, is_known, known, lapack, nan_unless, require_precision
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.circulant import Circulant, CirculantStructure
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal, DiagonalStructure
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.permutation import Permutation, PermutationStructure

_THREE = "i,ri->r; r,sr->s; s,os->o"


@dataclass(frozen=True)
class Function:
    """A function of numbers, made a function of matrices.

    ``values``: on an array. ``real``: whether it keeps real matrices real. ``positive``: whether it makes real numbers
    positive. ``keeps_positive``: whether it leaves them so. ``matrix``: on a stack of square matrices without
    eigenvectors, where there is such a way. ``at_zero``: f(0); None if not known. ``thin``: ``M^-1 (f(M) - f(0))``
    without eigenvectors, which gives ``f(U V) = f(0) I + U thin(V U) V``.
    """

    name: str
    values: Callable[[Array], Array]
    real: bool = False
    positive: bool = False
    keeps_positive: bool = False
    matrix: Callable[[Array], Array] | None = None
    at_zero: float | None = None
    thin: Callable[[Array], Array] | None = None


def evaluate(A: LinearOperator, f: Function) -> LinearOperator:
    """f(A)."""
    require_square(A, f.name)
    found = _structured(A, f) if isinstance(A, StructuredOperator) else _composite(A, f)
    found = _dense(A, f) if found is None else found
    if (f.positive and A.isa(SelfAdjoint)) or (f.keeps_positive and A.isa(PSD)):
        return PSD(found)
    return SelfAdjoint(found) if A.isa(SelfAdjoint) and (f.real or A.isa(PSD)) else found


# -- on numbers ------------------------------------------------------------------------------------------------------


def _finite(f: Function, values: Array) -> Array:
    """f(values); ArithmeticError where that is not finite, as the logarithm of zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = f.values(values)
    distance = known(abs(found - found).sum())
    if distance is not None and distance != 0:
        raise ArithmeticError(f"{f.name} is not finite at an eigenvalue of this matrix")
    return found


def _spectrum(values: Array, A: LinearOperator, f: Function) -> Array:
    """f on eigenvalues of A, made complex where f may need it, and cleaned of roundoff where A is Hermitian."""
    xp = lapack(values)
    if A.isa(PSD):
        values = xp.real(values)
        return _finite(f, xp.where(values < 0, values * 0, values))
    if A.isa(SelfAdjoint):
        values = xp.real(values)
    return _finite(f, values if f.real else xp.to_complex(values))


def _on_diagonal(values: Array, A: LinearOperator, f: Function) -> Array:
    xp = lapack(values)
    if f.real or xp.is_complex(values) or A.isa(PSD) or not is_known(values) or float(values.min()) >= 0:
        return _finite(f, values)
    return _finite(f, xp.to_complex(values))


# -- by structure ----------------------------------------------------------------------------------------------------


def _composite(A: LinearOperator, f: Function) -> LinearOperator | None:
    if isinstance(A, ColaDiagonal):
        return ColaDiagonal(_on_diagonal(A.diag, A, f))
    if isinstance(A, Identity | ScalarMul):
        one = A.xnp.ones((1,), dtype=A.dtype, device=A.device) if isinstance(A, Identity) else A.c.reshape((1,))
        return scalar_like(A, _on_diagonal(one, A, f)[0])
    if isinstance(A, Transpose):
        return evaluate(A.A, f).T
    if isinstance(A, BlockDiag) and all(M.shape[0] == M.shape[1] for M in A.Ms):
        return BlockDiag(*(evaluate(M, f) for M in A.Ms), multiplicities=A.multiplicities)
    return None


def _structured(A: StructuredOperator, f: Function) -> LinearOperator | None:
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        return None
    require_precision(factors[0], f.name)
    if isinstance(structure, DiagonalStructure):
        return Diagonal(_on_diagonal(factors[0], A, f))
    if isinstance(structure, CirculantStructure):
        return Circulant(_of_circulant(factors[0], A, f))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return BlockDiagonal(_of_matrices(blocks, A, f))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None and len(matrices) > 1 and all(m.shape[0] == m.shape[1] for m in matrices):
        return _of_kronecker(matrices, A, f)
    found = chain.bottleneck(structure)
    if found is not None and 2 * found[0] <= structure.d_in:
        return _of_low_rank(A, f)
    return None


def _of_circulant(column: Array, A: LinearOperator, f: Function) -> Array:
    xp, n = lapack(column), column.shape[0]
    if not xp.is_complex(column) and (f.real or A.isa(PSD)):
        return xp.irfft(_spectrum(xp.rfft(column, n, 0), A, f) + 0j, n, 0)
    return xp.ifft(_spectrum(xp.fft(column, n, 0), A, f) + 0j, n, 0)


def _of_kronecker(matrices: list[Array], A: LinearOperator, f: Function) -> LinearOperator | None:
    """V f(L) V^-1, where V and L are made of the members' eigenvectors and eigenvalues."""
    xp = lapack(matrices[0])
    if A.isa(SelfAdjoint):
        if not all(_is_hermitian(m) for m in matrices):
            return None
        pairs = [xp.eigh(m) for m in matrices]
        inverses = [xp.conj(vectors).T for _, vectors in pairs]
    else:
        found = [_checked_eig(m) for m in matrices]
        if any(triple is None for triple in found):
            return None
        pairs = [triple[:2] for triple in found if triple is not None]
        inverses = [triple[2] for triple in found if triple is not None]
    values = pairs[0][0]
    for more, _ in pairs[1:]:
        values = (values[:, None] * more[None, :]).reshape((-1,))
    middle = Diagonal(_spectrum(values, A, f))
    return Kronecker(*(vectors for _, vectors in pairs)) @ middle @ Kronecker(*inverses)


def _of_low_rank(A: StructuredOperator, f: Function) -> LinearOperator | None:
    if f.at_zero is not None and not math.isfinite(f.at_zero):
        raise singular(A, A.structure.rank_bound)
    thin = chain.thin_factors(A)
    assert thin is not None
    U, V = thin
    core = V @ U
    xp, at_zero = lapack(core), f.at_zero
    if f.thin is not None:
        middle = f.thin(core)
    else:
        at_zero = known(f.values(core[:1, 0] * 0)[0]) if at_zero is None else at_zero
        found = _checked_eig(core)
        if found is None or at_zero is None or not math.isfinite(at_zero):
            return None
        values, vectors, inverse = found
        smallest, largest = known(xp.abs(values).min()), known(xp.abs(values).max())
        if smallest is not None and largest is not None and smallest <= eps(core.dtype) ** 0.75 * largest:
            return None  # then zero may be a defective eigenvalue of U V
        middle = (vectors * ((_finite(f, values) - at_zero) / values)) @ inverse
        U, V = xp.to_complex(U), xp.to_complex(V)
        if A.isa(PSD) and not xp.is_complex(core):
            U, middle, V = xp.real(U), xp.real(middle), xp.real(V)
    chain_of_three = Structure.parse(_THREE, i=V.shape[1], r=V.shape[0], s=V.shape[0], o=U.shape[0])
    product = StructuredOperator(chain_of_three, (V, middle, U))
    return product if at_zero == 0 else product + scalar_like(product, at_zero)


# -- on dense matrices -----------------------------------------------------------------------------------------------


def _dense(A: LinearOperator, f: Function) -> LinearOperator:
    require_dense(A, f.name, "pass cola.linalg.Lanczos() or cola.linalg.Arnoldi()")
    matrix = A.to_dense()
    require_precision(matrix, f.name)
    return Dense(_of_matrices(matrix, A, f))


def _of_matrices(matrices: Array, A: LinearOperator, f: Function) -> Array:
    """f on one square matrix or on a stack of them, Hermitian where A is."""
    xp = lapack(matrices)
    if A.isa(SelfAdjoint):
        values, vectors = xp.eigh(matrices)
        values = _spectrum(values, A, f)
        scaled = vectors * values[..., None, :]
        return scaled @ xp.astype(xp.conj(vectors), scaled.dtype).swapaxes(-1, -2)
    if f.matrix is not None:
        return f.matrix(matrices)
    found = _checked_eig(matrices)
    if found is None:
        raise ArithmeticError(
            f"{f.name} goes through eigenvectors, and those of this matrix do not reproduce it: "
            "it is defective, or nearly so"
        )
    values, vectors, inverse = found
    return (vectors * _finite(f, values)[..., None, :]) @ inverse


def _checked_eig(matrices: Array) -> tuple[Array, Array, Array] | None:
    """(L, V, V^-1) of one matrix or a stack; None if V L V^-1 is not the matrix, or NaN where values are traced."""
    xp = lapack(matrices)
    values, vectors = xp.eig(matrices)
    inverse = xp.inv(vectors)
    again = (vectors * values[..., None, :]) @ inverse
    size = (xp.abs(matrices) ** 2).sum((-2, -1))
    square = (xp.abs(again - matrices) ** 2).sum((-2, -1)) / xp.where(size == 0, size * 0 + 1, size)
    square = xp.stop_gradient(square)
    bound = eps(matrices.dtype) ** 1.2  # of the square
    worst = known(xp.max(square))
    if worst is None:
        return values + nan_unless(square <= bound, values)[..., None], vectors, inverse
    return (values, vectors, inverse) if worst <= bound else None


def _is_hermitian(matrix: Array) -> bool:
    xp = lapack(matrix)
    distance = known(xp.norm(xp.stop_gradient(matrix - xp.conj(matrix).T)))
    size = known(xp.norm(xp.stop_gradient(matrix)))
    return distance is not None and size is not None and distance <= 100 * eps(matrix.dtype) * size


# -- the functions ---------------------------------------------------------------------------------------------------


def _exp_of(A: LinearOperator) -> Function:
    xp = _lapack_of(A)
    return Function(
        "the exponential", xp.exp, real=True, positive=True, keeps_positive=True, matrix=xp.expm, at_zero=1.0,
        thin=_phi,
    )  # fmt: skip


def _phi(core: Array) -> Array:
    """``M^-1 (exp(M) - I)``, the corner of ``exp([[M, I], [0, 0]])``; M may be singular."""
    xp, r = lapack(core), core.shape[0]
    eye = xp.eye(r, core)
    upper = xp.concat_axis((core, eye), 1)
    return xp.expm(xp.concat_axis((upper, upper * 0), 0))[:r, r:]


def _log_of(A: LinearOperator) -> Function:
    return Function("the logarithm", _lapack_of(A).log, at_zero=-math.inf)


def _power(alpha: Any) -> Function:
    # 0 ** alpha is 0 for what has a positive real part, and not finite otherwise.
    return Function(
        f"the power {alpha}", lambda x: x**alpha, keeps_positive=True, at_zero=0.0 if alpha.real > 0 else math.inf
    )


def _lapack_of(A: LinearOperator) -> Any:
    return lapack(A.xnp.zeros((1,), dtype=A.dtype, device=A.device))


@rule("exp", precedence=0.5)
def _exp_default(A: LinearOperator):
    return cola.exp(A, Auto())


@rule("exp", precedence=-0.5)
def _exp_rule(A: LinearOperator, alg: Auto):
    return evaluate(A, _exp_of(A))


@rule("exp")
def _exp_of_kronecker_sum(A: KronSum, alg: Auto):
    return ColaKronecker(*(cola.exp(M, alg) for M in A.Ms))


@rule("log", precedence=0.5)
def _log_default(A: LinearOperator):
    return cola.linalg.log(A, Auto())


@rule("log", precedence=1)
def _log_rule(A: LinearOperator, alg: Auto):
    return evaluate(A, _log_of(A))


@rule("apply_unary", precedence=-0.5)
def _apply_unary_of_any(f: Callable, A: LinearOperator, alg: Auto):
    return evaluate(A, Function("a function of a matrix", f))


@rule("apply_unary")
def _apply_unary_rule(f: Callable, A: StructuredOperator, alg: Auto):
    return evaluate(A, Function("a function of a matrix", f))


@rule("pow", precedence=0.5)
def _pow_default(A: LinearOperator, alpha: Number):
    return cola.linalg.pow(A, alpha, Auto())


@rule("pow", precedence=-0.5)
def _pow_rule(A: LinearOperator, alpha: Number, alg: Auto):
    return power(A, alpha)


@rule("pow")
def _pow_of_kronecker(A: ColaKronecker, alpha: Number, alg: Auto):
    return power(A, alpha)


def power(A: LinearOperator, alpha: Any) -> LinearOperator:
    """A to a power; without eigenvectors for integers."""
    require_square(A, "a power")
    if isinstance(alpha, complex) or not float(alpha).is_integer():
        if isinstance(A, ColaKronecker) and all(M.isa(PSD) for M in A.Ms):
            return ColaKronecker(*(power(M, alpha) for M in A.Ms))
        return evaluate(A, _power(alpha))
    k = int(alpha)
    if k == 0:
        return I_like(A)
    if k < 0:
        inverse = cola.inv(A, Auto())
        return inverse if k == -1 else power(inverse, -k)
    return A if k == 1 else _annotated_power(A, _integer_power(A, k), k)


def _annotated_power(A: LinearOperator, found: LinearOperator, k: int) -> LinearOperator:
    if A.isa(PSD) or (A.isa(SelfAdjoint) and k % 2 == 0):
        return PSD(found)
    return SelfAdjoint(found) if A.isa(SelfAdjoint) else found


def _integer_power(A: LinearOperator, k: int) -> LinearOperator:
    found = _structured_power(A, k) if isinstance(A, StructuredOperator) else None
    if found is not None:
        return found
    if isinstance(A, ColaKronecker) and all(M.shape[0] == M.shape[1] for M in A.Ms):
        return ColaKronecker(*(power(M, k) for M in A.Ms))
    if isinstance(A, BlockDiag) and all(M.shape[0] == M.shape[1] for M in A.Ms):
        return BlockDiag(*(power(M, k) for M in A.Ms), multiplicities=A.multiplicities)
    if isinstance(A, ColaDiagonal):
        return ColaDiagonal(A.diag**k)
    if isinstance(A, Transpose):
        return power(A.A, k).T
    if isinstance(A, Adjoint):
        return power(A.A, k).H
    if k < 10:
        return reduce(lambda x, y: x @ y, [A] * k)
    require_dense(A, "a power", "multiply it out with @")
    matrix = A.to_dense()
    return Dense(lapack(matrix).matrix_power(matrix, k))


def _structured_power(A: StructuredOperator, k: int) -> LinearOperator | None:
    structure, factors = A.structure, A.factors
    if isinstance(structure, PermutationStructure):
        index, result = factors[0], None
        while k:  # by squaring: k may be large
            if k & 1:
                result = index if result is None else result[index]
            index, k = index[index], k >> 1
        return Permutation._build(structure, (result,), A.dtype)
    xp = lapack(factors[0])
    if isinstance(structure, DiagonalStructure):
        return Diagonal(factors[0] ** k)
    if isinstance(structure, CirculantStructure):
        n = structure.size
        if xp.is_complex(factors[0]):
            return Circulant(xp.ifft(xp.fft(factors[0], n, 0) ** k, n, 0))
        return Circulant(xp.irfft(xp.rfft(factors[0], n, 0) ** k, n, 0))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return BlockDiagonal(xp.matrix_power(blocks, k))
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None and all(m.shape[0] == m.shape[1] for m in matrices):
        powers = [xp.matrix_power(m, k) for m in matrices]
        return Kronecker(*powers) if len(powers) > 1 else Dense(powers[0])
    found = chain.bottleneck(structure)
    if found is not None and 2 * found[0] <= structure.d_in:
        thin = chain.thin_factors(A)
        assert thin is not None
        U, V = thin
        return LowRank(V, U @ xp.matrix_power(V @ U, k - 1))
    return None
