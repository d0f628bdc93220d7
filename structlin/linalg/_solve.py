"""Solutions, determinants, quadratic forms and least squares."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import cola
import numpy as np
from cola.annotations import SelfAdjoint, Unitary
from cola.linalg import slogdet as cola_slogdet
from cola.linalg.algorithm_base import Algorithm, Auto
from cola.ops import KronSum, LinearOperator, Sum

from structlin._arrays import Array, backend_of, over_same_axes
from structlin._cola_compat import is_array, library_of
from structlin._implicit import Solver, adjoint, backward_error, frozen, is_at_roundoff, nan_where_bad, solution
from structlin._lapack import as_tensors, eps, follows, is_half, is_known, is_transformed, known, lapack
from structlin._spectra import once_differentiable
from structlin.linalg import _spectral as spectral
from structlin.linalg import _woodbury
from structlin.linalg._common import (
    NO_INVERSE,
    dense_inverse,
    dtypes_of,
    fits_dense,
    in_dtype,
    is_matrix,
    on_host,
    probe,
    require_operator,
    require_square,
)
from structlin.linalg._inverse import structured_inverse
from structlin.linalg._iterative import lsmr
from structlin.linalg._likelihood import quadratic_and_logdet
from structlin.linalg._stochastic import PROBES, STEPS, estimate_logdet
from structlin.operators import StructuredOperator
from structlin.verdicts import Answer, Determinant, Verdict

_AUTO = Auto()
SLACK = 1000  # times machine epsilon: the largest backward error of a verified solution


def solve(A: LinearOperator, b: Array, alg: Algorithm = _AUTO, *, full_output: bool = False) -> Any:
    """Solve ``A x = b``. Importing structlin replaces ``cola.linalg.solve`` by this function.

    The result equals ``cola.inv(A, alg) @ b``. If ``alg`` is Auto and the structure has a direct method (listed in
    ``docs/linalg.md``), no inverse is built. The blocks are factored by LU, or by Cholesky if A is dense or block
    diagonal and annotated PSD. For few columns this takes about half the work. To solve with one A many times, keep
    ``cola.inv(A)``.

    Formulas with possible cancellation are refined and verified for this b. These are the Woodbury identity,
    eigenvectors of non-normal matrices, and padded chains.

    Parameters
    ----------
    A
        Operator of shape (n, n).
    b
        Right-hand sides, (n,), (n, k), or (batch, n, k) for a stack of them.
    alg
        Algorithm of CoLA.
    full_output
        Return an :class:`structlin.verdicts.Answer`. Its error is the backward error
        ``|A x - b| / (|A| |x| + |b|)``.

    Returns
    -------
    Array or Answer
        The solution, with the shape of b; differentiable in A and b.

    Raises
    ------
    ValueError
        If A is not square, or the shape of b does not match.
    TypeError
        If A is not an operator, or b is not an array.
    LinAlgError
        If A is singular to working precision.
    ConvergenceError
        If A is too large for a dense matrix and the iteration does not converge.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import BlockDiagonal
    >>> solve(BlockDiagonal(np.array([[[2.0]], [[4.0]]])), np.ones(2))
    array([0.5 , 0.25])
    """
    require_operator(A)
    if not is_array(b):
        raise TypeError(f"b must be an array of NumPy, torch or jax, got {type(b).__qualname__}")
    n = require_square(A, "solving", NO_INVERSE)
    b, A = over_same_axes(*_in_one_dtype(A, b)[::-1])
    axis = 1 if b.ndim == 3 else 0
    if b.ndim not in (1, 2, 3) or b.shape[axis] != n:
        raise ValueError(
            f"solving with an operator of shape {tuple(A.shape)} needs an array of shape ({n},), ({n}, k) or "
            f"(batch, {n}, k), got {tuple(b.shape)}"
        )
    if b.ndim == 3:
        batch, _, k = b.shape
        wide = lapack(b).permute(b, (1, 0, 2)).reshape((n, batch * k))
        found = _solve(A, wide, alg)
        x = lapack(b).permute(found.reshape((n, batch, k)), (1, 0, 2))
        return x if not full_output else _judged(A, found, wide, x)
    x = _solve(A, b, alg)
    return x if not full_output else _judged(A, x, b, x)


def _judged(A: LinearOperator, x: Array, b: Array, shaped: Array) -> Answer[Array]:
    fixed, xp = frozen(A), lapack(b)
    size = _size(fixed)
    error = backward_error(fixed, xp.stop_gradient(x), xp.stop_gradient(b), size)
    worst = known(lapack(error).max(error))
    if worst is None:
        return Answer(shaped, Verdict.NOT_VERIFIED)
    verdict = Verdict.VERIFIED if worst <= SLACK * eps(b.dtype) else Verdict.ESTIMATED
    return Answer(shaped, verdict, worst)


def _size(A: LinearOperator) -> Array:
    """Return a lower bound of the spectral norm by one power iteration, so that no error is underestimated."""
    w = A @ probe(A)
    xp = lapack(w)
    length = xp.norm(w)
    return xp.norm(adjoint(A) @ (w / xp.where(length == 0, length * 0 + 1, length)))


def _solve(A: LinearOperator, b: Array, alg: Algorithm) -> Array:
    if type(alg) is Auto and 0 not in b.shape and (A.dtype == b.dtype or str(A.dtype) == str(b.dtype)):
        found = _directly(A, b)
        if found is not None:
            return found
    return cola.inv(A, alg) @ b


def _in_one_dtype(A: LinearOperator, b: Array) -> tuple[LinearOperator, Array]:
    """Return both in the common dtype of b, of A and of its arrays, in which the solution is accurate.

    They are unchanged if a dtype has half precision, and if A holds functions. If A holds no floating arrays, b keeps
    its dtype, as in ``A @ b``.
    """
    own = dtypes_of(A)
    if own == {b.dtype}:
        return A, b
    dtypes = (*(own or {A.dtype}), b.dtype)
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(names) == 1 or any(map(is_half, names)) or library_of(A.xnp) != backend_of(b):
        return A, b
    common = reduce(A.xnp.promote_types, dtypes)
    wide = in_dtype(A, common)
    return (A, b) if wide is None else (wide, A.xnp.cast(b, common) if own else b)


def _directly(A: LinearOperator, b: Array) -> Array | None:
    if isinstance(A, StructuredOperator):
        if A.backend != backend_of(b) or A.isa(Unitary):
            return None
        host = on_host(A, b)
        if host is not None:
            with np.errstate(all="ignore"):  # as in torch
                answer = A.structure.solve(host[0], *host[1])
            if answer is not None:
                return as_tensors(answer.value)[0]
        answer = A.structure.solve(A, b) if host is None else None
        return _with_padding(A, b) if answer is None else answer.value
    fixed = frozen(A)
    constant = fixed is A and not follows(b)
    if isinstance(A, KronSum | Sum):
        found = spectral.solver(fixed)
        if found is not None and constant and found[1]:
            return found[0].solve(b)
        if found is not None:
            return solution(A, b, found[0]) if found[1] else _verified(A, b, found[0])
    if isinstance(A, Sum):
        formula = _woodbury.solver(fixed)
        if formula is None:
            return None
        try:
            return formula.solve(b) if constant else solution(A, b, formula)
        except np.linalg.LinAlgError:
            if not fits_dense(A):
                raise
            return dense_inverse(A) @ b
    return None


def _with_padding(A: StructuredOperator, b: Array) -> Array | None:
    """Solve by an inverse with possible cancellation; the solution is refined and verified for this b."""
    if is_matrix(A):
        return None
    found = frozen(A)
    inverse = structured_inverse(found)
    if inverse is None:
        return None
    return _verified(A, b, Solver(inverse.__matmul__, inverse.H.__matmul__))


def _verified(A: LinearOperator, b: Array, solver: Solver) -> Array | None:
    """Return the refined solution; None, or NaN under tracing, if its backward error is above roundoff."""
    fixed, xp = frozen(A), lapack(b)
    size = _size(fixed)

    def refined(solve: Any, M: Any) -> Any:
        def run(b: Array) -> Array:
            x = solve(b)
            for _ in range(2):
                good = is_at_roundoff(backward_error(M, x, b, size), b.dtype, 10)
                if good:
                    return x
                x = x + solve(b - M @ x)
            error = backward_error(M, x, b, size)
            return x if is_known(b) and is_known(error) else nan_where_bad(x, error, SLACK * eps(b.dtype))

        return run

    x = solution(A, b, Solver(refined(solver.solve, fixed), refined(solver.adjoint, adjoint(fixed))))
    error = backward_error(fixed, xp.stop_gradient(x), xp.stop_gradient(b), size)
    good = is_at_roundoff(error, b.dtype, SLACK)
    return None if good is False and known(abs(b - b).sum()) == 0 else x


# -- determinants, least squares ---------------------------------------------------------------------------------------


def slogdet(A: LinearOperator) -> Determinant:
    """Return sign and logarithm of the determinant, as :func:`numpy.linalg.slogdet` does.

    A structure without a method uses the dense matrix up to the limit (:class:`dense_limit`). Above the limit the
    logarithm is an estimate, as in :func:`logdet`, and a warning is issued.

    Returns
    -------
    Determinant
        (0, -inf) if A is singular. The sign of an estimate is NaN unless A is annotated PSD.

    Raises
    ------
    ValueError
        If A is not square.
    """
    require_operator(A)
    require_square(A, "the determinant")
    return Determinant(*cola_slogdet(A, _AUTO, _AUTO))


def logdet(
    A: LinearOperator, *, probes: int = PROBES, steps: int = STEPS, seed: int = 0, full_output: bool = False,
    estimate: bool = False,
) -> Any:  # fmt: skip
    """Return ``log |det A|``; an estimate if A has no method and more rows than :class:`dense_limit`.

    An estimate needs memory for a few vectors for each of 8 probes at a time.

    Parameters
    ----------
    A
        Operator of shape (n, n).
    probes, steps, seed
        Number of random vectors, number of Lanczos steps for each, and seed of an estimate.
    estimate
        Always estimate.
    full_output
        Return an :class:`structlin.verdicts.Answer` with the standard error of an estimate.

    Returns
    -------
    Array or Answer
        A real 0-d array, differentiable; -inf if A is singular.

    Raises
    ------
    ValueError
        If A is not square, if ``probes`` or ``steps`` is below 2, or if an estimate is traced.

    References
    ----------
    Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Diagonal
    >>> print(round(float(logdet(Diagonal(np.array([1.0, 2.0, 4.0])))), 6))
    2.079442
    """
    require_operator(A)
    require_square(A, "the determinant")
    if estimate or not _has_determinant(A):
        answer = estimate_logdet(A, probes=probes, steps=steps, seed=seed)
        return answer if full_output else answer.value
    value = slogdet(A).logabsdet
    if not full_output:
        return value
    number = known(value)
    if number is None:
        return Answer(value, Verdict.NOT_VERIFIED)
    return Answer(value, Verdict.SINGULAR if number == -math.inf else Verdict.VERIFIED)


def inv_quad_logdet(A: LinearOperator, b: Array, *, full_output: bool = False) -> Any:
    """Return ``b^H A^-1 b`` and ``log |det A|``, the terms of the likelihood of a Gaussian vector with covariance A.

    If A is annotated SelfAdjoint or PSD, this takes less work than :func:`solve` and :func:`logdet`, because the
    gradient needs no second solution. One decomposition gives both terms for Hermitian Kronecker products and sums
    (plus a multiple of the identity), positive definite dense and block-diagonal matrices, and ``D + U U^H`` with a
    positive diagonal D. Second derivatives of these raise an error on torch.

    Parameters
    ----------
    A
        Operator of shape (n, n).
    b
        Vector of shape (n,).
    full_output
        Return an :class:`structlin.verdicts.Answer`, whose verdict and error are those of the solution ``A^-1 b``.

    Returns
    -------
    quadratic, logdet
        Two 0-d arrays, differentiable in A and b.

    Raises
    ------
    ValueError
        If A is not square, or b is not a vector of n numbers.
    LinAlgError
        If A is singular to working precision.

    Notes
    -----
    If A is not Hermitian and complex, the first result is the real part of the quadratic form.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Diagonal
    >>> quadratic, log = inv_quad_logdet(Diagonal(np.array([1.0, 2.0, 4.0])), np.ones(3))
    >>> print(float(quadratic), round(float(log), 6))
    1.75 2.079442
    """
    require_operator(A)
    n = require_square(A, "the likelihood", NO_INVERSE)
    if not is_array(b) or tuple(b.shape) != (n,):
        got = tuple(b.shape) if is_array(b) else type(b).__qualname__
        raise ValueError(f"a quadratic form of an operator of shape {tuple(A.shape)} needs a vector ({n},), got {got}")
    A, b = _in_one_dtype(A, b)
    xp = lapack(b)
    if not A.isa(SelfAdjoint) or backend_of(b) == "jax" or is_transformed(b) or str(A.dtype) != str(b.dtype):
        answer = solve(A, b, full_output=True) if full_output else Answer(solve(A, b))
        pair = xp.real((xp.conj(b) * answer.value).sum()), logdet(A)
        return Answer(pair, answer.verdict, answer.error) if full_output else pair
    found = quadratic_and_logdet(A, b)
    if found is None:
        x = _solve(frozen(A), xp.stop_gradient(b), _AUTO)
        # b^H A^-1 b = 2 Re(b^H x) - x^H A x, with x constant: its error enters squared, first derivatives are right.
        found = x, once_differentiable(xp.real((xp.conj(x) * (2 * b - A @ x)).sum())), logdet(A)
    x, quadratic, log = found
    if not full_output:
        return quadratic, log
    answer = _judged(frozen(A), x, xp.stop_gradient(b), x)
    return Answer((quadratic, log), answer.verdict, answer.error)


def _has_determinant(A: LinearOperator) -> bool:
    """Whether the determinant has a closed form or A fits the dense limit."""
    if fits_dense(A) or is_matrix(A):
        return True
    if isinstance(A, StructuredOperator):
        return A.structure.slogdet(A) is not None
    if isinstance(A, Sum):
        return (spectral.slogdet(A) or spectral.pair_slogdet(A) or _woodbury.split(A)) is not None
    return not isinstance(A, cola.ops.Sliced)


def lstsq(A: LinearOperator, b: Array, *, tolerance: float = 1e-10, max_iterations: int | None = None) -> Array:
    """Return the least-squares solution of least norm, ``A^+ b``, for an operator of any shape.

    The pseudo-inverse is used if the structure has one in closed form or A fits :class:`dense_limit`. Otherwise
    :func:`lsmr` iterates.

    Parameters
    ----------
    A
        Operator of shape (n, m).
    b
        Right-hand sides, (n,) or (n, k).
    tolerance, max_iterations
        Parameters of :func:`lsmr`.

    Returns
    -------
    Array
        The solution, (m,) or (m, k).

    Raises
    ------
    ValueError
        If the shape of b does not match.
    ConvergenceError
        If LSMR reaches ``max_iterations``.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Dense
    >>> lstsq(Dense(np.array([[1.0], [1.0]])), np.array([1.0, 3.0])).round(12)
    array([2.])
    """
    require_operator(A)
    if not is_array(b) or b.ndim not in (1, 2) or b.shape[0] != A.shape[0]:
        shape = tuple(b.shape) if is_array(b) else type(b).__qualname__
        raise ValueError(
            f"least squares with an operator of shape {tuple(A.shape)} need an array of shape ({A.shape[0]},) or "
            f"({A.shape[0]}, k), got {shape}"
        )
    A, b = _in_one_dtype(A, b)
    if fits_dense(A) or (isinstance(A, StructuredOperator) and A.structure.pinv(A) is not None):
        return cola.pinv(A) @ b
    return lsmr(A, b, tolerance=tolerance, max_iterations=max_iterations)


def inverse(A: LinearOperator) -> LinearOperator:
    """Return ``A^-1`` as an operator: ``cola.inv(A)``.

    LinAlgError, a ValueError, if A is singular; ValueError if A is not square.
    """
    require_operator(A)
    return cola.inv(A)


def pinv(A: LinearOperator) -> LinearOperator:
    """Return the pseudo-inverse ``A^+`` as an operator: ``cola.pinv(A)``.

    ValueError if A has no closed form and exceeds :class:`dense_limit`; :func:`lstsq` applies it then.
    """
    require_operator(A)
    return cola.pinv(A)
