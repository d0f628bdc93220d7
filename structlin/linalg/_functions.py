"""Functions of matrices, registered with ``cola.exp``, ``log``, ``pow`` (so ``sqrt``, ``isqrt``) and ``apply_unary``.

These are primary functions on principal branches, for the algorithm Auto of CoLA (the default). The logarithm and
non-integer powers give a complex operator, unless A is annotated PSD or is diagonal with values known to be positive.

A function that needs eigenvectors verifies that they reproduce the matrix. For defective matrices, log and powers use a
Schur decomposition of SciPy (Al-Mohy and Higham 2012, Improved inverse scaling and squaring algorithms for the matrix
logarithm; Higham and Lin 2013, An improved Schur-Pade algorithm). exp and integer powers need no eigenvectors. Any
other function of a defective matrix raises ArithmeticError, or gives NaN inside jit.

For log and powers, an eigenvalue that is zero to roundoff counts as zero. Every result is verified: roundoff in the
entries of the matrix must not change it by more than a hundredth of its largest entry (unless A is Hermitian).

Derivatives are correct if eigenvalues repeat (:mod:`structlin._spectra`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Number
from typing import Any

import cola
import numpy as np
from cola.annotations import PSD, SelfAdjoint
from cola.linalg.algorithm_base import Auto
from cola.ops import BlockDiag, I_like, Identity, KronSum, LinearOperator, ScalarMul, Sum, Transpose
from cola.ops import Diagonal as ColaDiagonal
from cola.ops import Kronecker as ColaKronecker

from structlin import _spectra as spectra
from structlin._arrays import Array, backend_of, to_backend
from structlin._cola_compat import rule
from structlin._lapack import eps, follows, is_known, known, lapack, nan_unless, require_precision
from structlin.algebra import kronecker
from structlin.linalg import _defective as defective
from structlin.linalg._common import (
    Composite,
    by_members,
    dense_matrix,
    has_square_members,
    lapack_of,
    require_dense,
    require_operator,
    require_square,
    scalar_like,
)
from structlin.linalg._forms import members, thin, without_shift
from structlin.operators import StructuredOperator
from structlin.structures.dense import Dense
from structlin.structures.low_rank import LowRank


@dataclass(frozen=True)
class Function:
    """A scalar function f and its extension to matrices.

    ``values`` applies f to each entry of an array. f maps real matrices to real ones (``real``), real numbers to
    positive ones (``positive``), or positive numbers to positive ones (``keeps_positive``). ``matrix`` is f of a stack
    of square matrices without eigenvectors; None if not known. ``host`` is f of one NumPy matrix in double precision,
    which may be defective, and the dtype in which it was given; None if not known. ``at_zero`` is f(0), or None if not
    known. ``thin`` maps M to ``M^-1 (f(M) - f(0))`` without eigenvectors, which gives ``f(U V) = f(0) I + U thin(V U)
    V``. ``kink`` is the number at which f is not smooth, or None.
    """

    name: str
    values: Callable[[Array], Array]
    real: bool = False
    positive: bool = False
    keeps_positive: bool = False
    matrix: Callable[[Array], Array] | None = None
    host: Callable[[np.ndarray, Any], np.ndarray] | None = None
    at_zero: float | None = None
    thin: Callable[[Array], Array] | None = None
    kink: Any = None

    def shifted(self, c: Any, real: bool) -> Function:
        """Return the function ``x -> f(x + c)``; ``real``: c is real."""

        def values(x: Array) -> Array:
            return self.values(x + c)

        kink = None if self.kink is None else self.kink - c
        real = real and self.real
        return replace(self, values=values, real=real, matrix=None, host=None, at_zero=None, thin=None, kink=kink)

    def finite(self, values: Array) -> Array:
        """Return f(values); ArithmeticError if it is not finite, such as the logarithm of zero."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found = self.values(values)
            distance = known(abs(found - found).sum())
        if distance is not None and distance != 0 and known(abs(values - values).sum()) == 0:
            least = known(abs(values).min())
            raise NoValueError(
                f"{self.name} is not finite at an eigenvalue of this matrix"
                + (": it is singular to working precision" if least == 0 else "")
            )
        return found

    def settled(self, values: Array, radius: Array) -> Array:
        """Return eigenvalues that are known up to ``radius``; those that may be at the kink are moved to it."""
        if self.kink is None:
            return values
        xp = lapack(values)
        distance = values - self.kink
        at = xp.abs(distance) <= radius + spectra.ROUNDOFF * eps(values.dtype) * abs(self.kink)
        return xp.where(at, values - distance, values)

    def on_spectrum(self, values: Array, A: LinearOperator) -> Array:
        """Return f of eigenvalues of A; these are cast to complex if f may need it, and to real if A is Hermitian."""
        xp = lapack(values)
        if A.isa(PSD):
            values = positive_part(xp.real(values))
        elif A.isa(SelfAdjoint):
            values = xp.real(values)
        if self.real or A.isa(PSD):
            return self.finite(values)
        return self.finite(xp.to_complex(values))

    def on_diagonal(self, values: Array, A: LinearOperator) -> Array:
        xp = lapack(values)
        require_precision(values, self.name)
        if A.isa(PSD):
            values = positive_part(xp.real(values)) if not xp.is_complex(values) else values
        elif not (self.real or xp.is_complex(values) or not is_known(values) or float(values.min()) >= 0):
            values = xp.to_complex(values)
        return self.finite(values)

    def on_matrices(self, matrices: Array, A: LinearOperator) -> Array:
        """Return f of a square matrix or of a stack of them, which are Hermitian if A is annotated so."""
        xp = lapack(matrices)
        if A.isa(SelfAdjoint):
            found = spectra.decompose((matrices + xp.conj(matrices).swapaxes(-1, -2)) / 2, True)
            assert found is not None
            values = found.values
            far = known(abs(self.settled(values, spectra.hermitian_bound(found)) - values).sum()) == 0
            values = values if far else self.settled(values, spectra.uncertainty(found, True))
            return spectra.of_matrices(replace(found, values=values), lambda x: self.on_spectrum(x, A))
        if self.matrix is not None:
            return self.matrix(matrices)
        found = self._by_eigenvectors(matrices)
        if found is not None:
            return found
        if self.host is None:
            raise NoValueError(
                f"{self.name} needs eigenvectors, and those of this matrix do not reproduce it: it is defective, or "
                "nearly so"
            )
        return self._on_host(matrices, self.host)

    def _by_eigenvectors(self, matrices: Array) -> Array | None:
        """Return f of matrices; None, or NaN for traced values, if eigenvectors do not determine it."""
        found = spectra.decompose(matrices, False)
        if found is not None and self.kink is not None:
            radius = spectra.uncertainty(found, False)
            found = spectra.with_values(found, self.settled(found.values, radius), radius)
        if found is None:
            return None
        value = spectra.of_matrices(found, self.finite)
        repeated = found.values == (math.nan if self.kink is None else self.kink)
        with np.errstate(all="ignore"):
            good = spectra.is_determined(found, self.values, value, repeated)
        if is_known(value):
            return value if bool(good.all()) else None
        return value + nan_unless(good, value)[..., None, None]

    def _on_host(self, matrices: Array, function: Callable[[np.ndarray, Any], np.ndarray]) -> Array:
        if follows(matrices):
            raise NoValueError(
                f"{self.name} of a defective or nearly defective matrix is not differentiable here; detach the matrix "
                "to compute its value"
            )
        given = np.asarray(matrices.detach().cpu() if hasattr(matrices, "detach") else matrices)
        wide = given.reshape((-1, *given.shape[-2:])).astype(np.result_type(given.dtype, np.float64))
        result = np.result_type(given.dtype, np.complex64)
        with np.errstate(all="ignore"):
            made = np.array([function(matrix, given.dtype) for matrix in wide]).astype(result)
        good = np.isfinite(made).all((-2, -1))
        if not good.all():
            sizes = np.linalg.svd(wide[np.argmin(good)], compute_uv=False)
            raise NoValueError(
                f"{self.name} of this matrix is not finite, or roundoff in the entries changes it: the matrix is "
                f"singular, or nearly so and defective; its singular values lie between {sizes[-1]:.1e} and "
                f"{sizes[0]:.1e}. If it is Hermitian, annotate it with cola.PSD or cola.SelfAdjoint, which is more "
                "accurate"
            )
        return to_backend(made.reshape(given.shape), backend_of(matrices), str(result))

    @staticmethod
    def multiple_of_identity(A: LinearOperator, c: Any) -> LinearOperator:
        """Return c times the identity, with the shape and library of A."""
        return scalar_like(A, c)


class NoValueError(np.linalg.LinAlgError, ArithmeticError):
    """A function of a matrix is not defined, or not determined by the matrix to working precision."""


def positive_part(values: Array) -> Array:
    """Return real eigenvalues of an operator annotated PSD, with 0 for those that are negative by roundoff.

    LinAlgError, or NaN under tracing, if one is more negative.
    """
    values = spectra.require_positive(values)
    return lapack(values).where(values < 0, values * 0, values)


def evaluate(A: LinearOperator, f: Function) -> LinearOperator:
    """Return f(A)."""
    require_square(A, f.name)
    if isinstance(A, StructuredOperator):
        answer = A.structure.function(A, f)
        found = None if answer is None else answer.value
    else:
        found = _composite(A, f)
    found = _dense(A, f) if found is None else found
    if (f.positive and A.isa(SelfAdjoint)) or (f.keeps_positive and A.isa(PSD)):
        return PSD(found)
    return SelfAdjoint(found) if A.isa(SelfAdjoint) and (f.real or A.isa(PSD)) else found


def _composite(A: LinearOperator, f: Function) -> LinearOperator | None:
    if isinstance(A, ColaDiagonal):
        return ColaDiagonal(f.on_diagonal(A.diag, A))
    if isinstance(A, Identity | ScalarMul):
        one = A.xnp.ones((1,), dtype=A.dtype, device=A.device) if isinstance(A, Identity) else A.c.reshape((1,))
        return scalar_like(A, f.on_diagonal(one, A)[0])
    if isinstance(A, Transpose) or (isinstance(A, BlockDiag) and has_square_members(A)):
        return by_members(A, lambda M: evaluate(M, f))
    form = members(A)
    if form is not None:
        require_precision(form.matrices[0], f.name)
        return kronecker.of_kronecker(form.matrices, A, f, add=form.add, shift=form.shift)
    if isinstance(A, Sum):
        return _of_shifted(A, f)
    return None


def _of_shifted(A: Sum, f: Function) -> LinearOperator | None:
    """Return f(K + c I) as the function f(x + c) of K; None if it has no closed form."""
    K, c = without_shift(A)
    if K is None or c is None:
        return None
    g = f.shifted(c, real="complex" not in str(A.dtype))
    if A.isa(PSD):  # K need not be positive; the sum is
        g = replace(g, values=lambda x: f.values(positive_part(lapack(x).real(x + c))), real=True)
    K = SelfAdjoint(K) if A.isa(SelfAdjoint) else K
    if not isinstance(K, StructuredOperator):
        found = thin(K, K.shape[0] // 2)  # a product with a narrow middle
        if found is None:
            return None
        made = LowRank(found[1], found[0])
        K = SelfAdjoint(made) if K.isa(SelfAdjoint) else made
    answer = K.structure.function(K, g)
    return None if answer is None else answer.value


def _dense(A: LinearOperator, f: Function) -> LinearOperator:
    matrix = dense_matrix(A, f.name, "pass cola.linalg.Lanczos() or cola.linalg.Arnoldi()")
    return Dense(f.on_matrices(matrix, A))


# -- the functions ---------------------------------------------------------------------------------------------------


def _exp_of(A: LinearOperator) -> Function:
    xp = lapack_of(A)
    return Function(
        "the exponential", xp.exp, real=True, positive=True, keeps_positive=True, matrix=xp.expm, at_zero=1.0,
        thin=_phi,
    )  # fmt: skip


def _phi(core: Array) -> Array:
    """Return ``M^-1 (exp(M) - I)``, the upper right block of ``exp([[M, I], [0, 0]])``; M may be singular."""
    xp, r = lapack(core), core.shape[0]
    eye = xp.eye(r, core)
    upper = xp.concat_axis((core, eye), 1)
    return xp.expm(xp.concat_axis((upper, upper * 0), 0))[:r, r:]


def _log_of(A: LinearOperator) -> Function:
    return Function("the logarithm", lapack_of(A).log, at_zero=-math.inf, host=defective.logarithm, kink=0.0)


def _power(alpha: Any) -> Function:
    # 0 ** alpha is 0 if alpha has a positive real part, and not finite otherwise.
    return Function(
        f"the power {alpha}", lambda x: x**alpha, keeps_positive=True,
        host=lambda matrix, dtype: defective.power(matrix, alpha, dtype),
        at_zero=0.0 if alpha.real > 0 else math.inf, kink=0.0,
    )  # fmt: skip


def _given(A: LinearOperator, f: Callable[[Array], Array]) -> Function:
    with np.errstate(all="ignore"):
        size = known(abs(f(A.xnp.zeros((1,), dtype=A.dtype, device=A.device))).sum())
    kink = None if size is None or math.isfinite(size) else 0.0
    return Function("a function of a matrix", f, kink=kink)


def reciprocal() -> Function:
    return Function("the inverse", lambda x: 1 / x, real=True, keeps_positive=True, at_zero=math.inf)


# CoLA's functions without an algorithm, and with the default one.
rule("exp", 0.5, types=(LinearOperator,))(lambda A: cola.exp(A, Auto()))
rule("exp", -0.5, types=(LinearOperator, Auto))(lambda A, alg: evaluate(A, _exp_of(A)))
rule("exp", types=(KronSum, Auto))(lambda A, alg: ColaKronecker(*(cola.exp(M, alg) for M in A.Ms)))
rule("log", 0.5, types=(LinearOperator,))(lambda A: cola.linalg.log(A, Auto()))
rule("log", types=(LinearOperator, Auto))(lambda A, alg: evaluate(A, _log_of(A)))
rule("pow", 0.5, types=(LinearOperator, Number))(lambda A, alpha: cola.linalg.pow(A, alpha, Auto()))
for _kind, _precedence in ((LinearOperator, -0.5), (StructuredOperator, 1)):
    rule("apply_unary", _precedence, types=(Callable, _kind, Auto))(lambda f, A, alg: apply(f, A))  # type: ignore[arg-type]


for _kind, _precedence in ((LinearOperator, -0.5), (ColaKronecker, 1)):
    rule("pow", _precedence, types=(_kind, Number, Auto))(lambda A, alpha, alg: power(A, alpha))


def power(A: LinearOperator, alpha: Any) -> LinearOperator:
    """Return A to a power; integer powers need no eigenvectors."""
    require_square(A, "a power")
    if isinstance(alpha, complex) or not float(alpha).is_integer():
        if isinstance(A, ColaKronecker) and all(M.isa(PSD) for M in A.Ms):
            return by_members(A, lambda M: power(M, alpha))
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
    if isinstance(A, StructuredOperator) and (answer := A.structure.power(A, k)) is not None:
        return answer.value
    if isinstance(A, Composite) and has_square_members(A):
        return by_members(A, lambda M: power(M, k))
    if isinstance(A, ColaDiagonal):
        return ColaDiagonal(A.diag**k)
    if k < 10:
        return reduce(lambda x, y: x @ y, [A] * k)
    require_dense(A, "a power", "multiply it out with @")
    matrix = A.to_dense()
    return Dense(lapack(matrix).matrix_power(matrix, k))


# -- by their names in NumPy and SciPy ---------------------------------------------------------------------------------


def apply(f: Callable[[Array], Array], A: LinearOperator) -> LinearOperator:
    """Return f(A): ``cola.apply_unary``.

    ``f`` maps arrays of the library of A elementwise. ArithmeticError if A is defective or f is not finite at an
    eigenvalue. ValueError if A is not square, or has no closed form and exceeds :class:`dense_limit`. The other
    functions below raise the same errors.
    """
    require_operator(A)
    return evaluate(A, _given(A, f))


def expm(A: LinearOperator) -> LinearOperator:
    """Return the matrix exponential: ``cola.exp``."""
    require_operator(A)
    return cola.exp(A, Auto())


def logm(A: LinearOperator) -> LinearOperator:
    """Return the principal logarithm, ``cola.log``; complex unless A is annotated PSD."""
    require_operator(A)
    return cola.linalg.log(A, Auto())


def sqrtm(A: LinearOperator) -> LinearOperator:
    """Return the principal square root, ``cola.sqrt``; complex unless A is annotated PSD."""
    require_operator(A)
    return power(A, 0.5)


def matrix_power(A: LinearOperator, exponent: Any) -> LinearOperator:
    """Return A to the power ``exponent``, an integer, real or complex number: ``cola.pow``."""
    require_operator(A)
    return power(A, exponent)
