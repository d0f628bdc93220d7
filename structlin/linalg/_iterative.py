"""Iterative solves whose result is checked, with what they cost: CG, MINRES, LSMR, and CoLA's GMRES.

The residual of every solution is computed, not the one of the recurrence. Above ten times the tolerance
ConvergenceError is raised; under tracing, where no value can be looked at, such columns are NaN. Solutions are
differentiable as those of linear systems (:mod:`structlin._implicit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
from cola.annotations import PSD
from cola.linalg.algorithm_base import Auto, IterativeOperatorWInfo
from cola.linalg.inverse.cg import CG
from cola.linalg.inverse.gmres import GMRES
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of
from structlin._implicit import Solver, frozen, solution
from structlin._iterations import conjugate_gradients, dots, iterate
from structlin._lapack import eps, is_known, known, lapack, nan_unless
from structlin.linalg._common import like, require_limits, require_operator, require_square
from structlin.verdicts import Answer, Verdict

_SLACK = 10  # how far the true residual may lie above the tolerance that the algorithm met by its own recurrence
_INSTEAD = "raise max_iterations, give a preconditioner, or solve densely with cola.linalg.LU()"


class ConvergenceError(ArithmeticError):
    """An iteration has not reached its tolerance."""


# -- our own -----------------------------------------------------------------------------------------------------------


def cg(
    A: LinearOperator, b: Array, *, preconditioner: LinearOperator | None = None, tolerance: float = 1e-8,
    max_iterations: int = 1000, full_output: bool = False,
) -> Any:  # fmt: skip
    """``A^-1 b`` for a Hermitian positive definite A by preconditioned conjugate gradients, all columns at once.

    Parameters
    ----------
    A
        An operator; that it is positive is not checked, but the residual is.
    b
        (n,) or (n, k), an array of its library; values may be traced by jax.
    preconditioner
        An operator that approximates ``A^-1``, Hermitian positive definite too.
    tolerance
        Of ``|A x - b| / |b|``, for each column.
    max_iterations
        Products with A, one for all columns.
    full_output
        Return an :class:`structlin.verdicts.Answer` with the residual and the number of iterations.

    Notes
    -----
    Raises ConvergenceError, ValueError for shapes that do not fit, TypeError for what is no operator.
    Source: Hestenes and Stiefel (1952); Golub and Van Loan (2013), Matrix Computations, section 11.5.

    Examples
    --------
    >>> from structlin import Diagonal
    >>> cg(Diagonal(np.array([1.0, 2.0, 4.0])), np.ones(3)).round(9)
    array([1.  , 0.5 , 0.25])
    """
    _check_system(A, b, tolerance, max_iterations)
    statistics: dict[str, Any] = {}
    fixed = frozen(A)
    M = None if preconditioner is None else frozen(preconditioner)

    def solve(b: Array) -> Array:
        x, statistics["iterations"] = _conjugate_gradients(fixed, b, M, tolerance, max_iterations)
        return _refused(fixed, x, b, tolerance, "conjugate gradients", statistics["iterations"])

    return _finished(A, b, Solver(solve, solve), statistics, full_output)


def _columns(b: Array) -> Array:
    return b if b.ndim == 2 else b[:, None]


def _conjugate_gradients(A: Any, b: Array, M: Any, tolerance: float, limit: int) -> tuple[Array, Any]:
    xp, wide = lapack(b), _columns(b)
    traced = not (is_known(b) and is_known((A @ wide)[:1]))
    if traced and backend_of(b) != "jax":
        raise ValueError("conjugate gradients under torch.func have no number of iterations that depends on values")
    target = (tolerance**2) * xp.real(dots(wide, wide))

    def unfinished(state: Any) -> Array:
        return (xp.real(dots(state[1], state[1])) > target).any()

    state, step = conjugate_gradients(A.__matmul__, (lambda r: r) if M is None else M.__matmul__, wide)
    state = iterate(step, unfinished, state, limit, traced)
    return state[0].reshape(tuple(b.shape)), state[-1]


# -- SciPy's -----------------------------------------------------------------------------------------------------------


def minres(
    A: LinearOperator, b: Array, *, preconditioner: LinearOperator | None = None, tolerance: float = 1e-8,
    max_iterations: int = 1000, full_output: bool = False,
) -> Any:  # fmt: skip
    """``A^-1 b`` for a Hermitian A, indefinite too, by MINRES (Paige and Saunders 1975), as SciPy runs it.

    Column by column, on the host. Arguments, results and errors as of :func:`cg`; a preconditioner has to be positive
    definite. Raises ValueError for complex operators, and for traced values.

    Examples
    --------
    >>> from structlin import Diagonal
    >>> minres(Diagonal(np.array([1.0, -2.0, 4.0])), np.ones(3)).round(9)
    array([ 1.  , -0.5 ,  0.25])
    """
    _check_system(A, b, tolerance, max_iterations)
    if "complex" in str(A.dtype):
        raise ValueError(f"MINRES is for real symmetric operators, got {A.dtype}")
    M = None if preconditioner is None else host_operator(preconditioner)

    def one(H: Any, column: np.ndarray, count: Callable[[Any], None]) -> np.ndarray:
        # SciPy stops at rtol times |A| |x|: asked for less, so that the residual is below that of b
        return sparse.minres(H, column, rtol=tolerance / 100, maxiter=max_iterations, M=M, callback=count)[0]

    return _on_the_host(A, b, one, tolerance, "MINRES", full_output)


def lsmr(
    A: LinearOperator, b: Array, *, damp: float = 0.0, tolerance: float = 1e-10, max_iterations: int | None = None,
    full_output: bool = False,
) -> Any:  # fmt: skip
    """Return the least-squares solution of ``A x = b`` for any shape of A by LSMR (Fong and Saunders 2011) of SciPy.

    Minimises ``|A x - b|^2 + damp^2 |x|^2``, column by column, on the host; x is the one of least norm.

    Parameters
    ----------
    A
        An operator of shape (n, m).
    b
        (n,) or (n, k).
    damp
        Of Tikhonov.
    tolerance
        Of ``|A^H r| / (|A| |r|)`` and of ``|r| / |b|``, whichever comes first.
    max_iterations
        Of each column; default 4 min(n, m).
    full_output
        Return an :class:`structlin.verdicts.Answer` with ``|A^H r| / (|A| |b|)`` as its error.

    Notes
    -----
    Raises ConvergenceError, and ValueError for shapes that do not fit and for traced values.

    Examples
    --------
    >>> from structlin import Dense
    >>> lsmr(Dense(np.array([[1.0], [1.0]])), np.array([1.0, 3.0])).round(9)
    array([2.])
    """
    require_operator(A)
    _check_right_side(A, b)
    limit = 4 * min(A.shape) + 20 if max_iterations is None else max_iterations
    H, iterations, norms = host_operator(A), 0, []
    columns = []
    for column in _host(_columns(b)).T:
        x, reason, count, _, normal, size, *_ = sparse.lsmr(H, column, damp, tolerance, tolerance, 0, limit)
        if reason == 7:
            raise ConvergenceError(f"LSMR left |A^H r| = {normal:.1e} after {limit} iterations; raise max_iterations")
        iterations = max(iterations, count)
        norms.append(normal / max(size * np.linalg.norm(column), np.finfo(float).tiny))
        columns.append(x)
    x = like(np.array(columns).T.copy(), A).reshape((A.shape[1], *tuple(b.shape[1:])))
    if not full_output:
        return x
    return Answer(x, Verdict.ESTIMATED, float(max(norms, default=0.0)), {"iterations": iterations})


def _on_the_host(A: LinearOperator, b: Array, one: Any, tolerance: float, name: str, full_output: bool) -> Any:
    fixed = frozen(A)
    statistics: dict[str, Any] = {"iterations": 0}

    def solve(b: Array) -> Array:
        H = host_operator(fixed)
        columns = []
        for column in _host(_columns(b)).T:
            count = [0]

            def counted(_: Any, count: list[int] = count) -> None:
                count[0] += 1

            columns.append(one(H, column, counted))
            statistics["iterations"] = max(statistics["iterations"], count[0])
        x = like(np.array(columns).T.copy(), fixed).reshape(tuple(b.shape))
        return _refused(fixed, x, b, tolerance, name, statistics["iterations"])

    return _finished(A, b, Solver(solve, solve), statistics, full_output)


def host_operator(A: LinearOperator) -> Any:
    """Return a as SciPy's LinearOperator, whatever its library; ValueError where its numbers are traced."""
    dtype = np.dtype(str(A.dtype).removeprefix("torch."))

    def multiply(B: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: _host(B @ like(np.ascontiguousarray(x, dtype=dtype), A))

    forward, backward = multiply(A), multiply(A.H)
    return sparse.LinearOperator(A.shape, forward, backward, forward, dtype, backward)


def _host(x: Array) -> np.ndarray:
    if not is_known(x):
        raise ValueError("this runs on the host, and cannot be traced; structlin.linalg.cg can, by jax")
    return np.asarray(x.detach().cpu().resolve_conj() if hasattr(x, "detach") else x)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_right_side(A: LinearOperator, b: Array) -> None:
    n = A.shape[0]
    if b.ndim not in (1, 2) or b.shape[0] != n:
        raise ValueError(
            f"an operator of shape {tuple(A.shape)} needs a right-hand side of shape ({n},) or ({n}, k), "
            f"got {tuple(b.shape)}"
        )


def _check_system(A: LinearOperator, b: Array, tolerance: float, limit: int) -> None:
    require_operator(A)
    require_square(A, "solving", "; structlin.linalg.lsmr takes any shape")
    _check_right_side(A, b)
    require_limits(tolerance, limit)


def _residuals(A: Any, x: Array, b: Array) -> Array:
    """Of each column, squared and relative; 0 where b and the residual are zero."""
    size = (abs(b) ** 2).sum(0)
    residual = (abs(A @ x - b) ** 2).sum(0)
    xp = lapack(b)
    return xp.where(residual == 0, size * 0, residual / xp.where(size == 0, size * 0 + 1, size))


def _refused(A: Any, x: Array, b: Array, tolerance: float, name: str, count: Any) -> Array:
    """x, where its residual is small enough."""
    xp = lapack(x)
    columns = _residuals(A, x, b)
    bound = (_SLACK * max(tolerance, eps(b.dtype))) ** 2
    worst = known(xp.max(xp.stop_gradient(columns)))
    if worst is None:
        return x + nan_unless(columns <= bound, x)
    if not worst <= bound and known(abs(b - b).sum()) == 0:  # NaN in b passes
        raise ConvergenceError(
            f"{name} left a relative residual of {worst**0.5:.1e} after {known(count):.0f} iterations, "
            f"the tolerance is {tolerance:.0e}; {_INSTEAD}"
        )
    return x


def _finished(A: Any, b: Array, solver: Solver, statistics: dict[str, Any], full_output: bool) -> Any:
    x = solution(A, b, solver)
    if not full_output:
        return x
    worst = known(lapack(b).max(_residuals(frozen(A), x, b)))
    if worst is None:
        return Answer(x, Verdict.NOT_VERIFIED, None, statistics)
    return Answer(x, Verdict.VERIFIED, worst**0.5, statistics)


# -- the inverse -------------------------------------------------------------------------------------------------------


class VerifiedInverse(LinearOperator):
    """The inverse of A by an iterative algorithm of CoLA; the residual of every solve is computed and compared.

    Above ten times the algorithm's tolerance, relative to the right-hand side, a product raises ConvergenceError;
    under ``jax.jit`` and the like, where no value can be looked at, the column is filled with NaN.
    """

    def __init__(self, A: LinearOperator, alg: Any) -> None:
        self.A = A
        self.alg = alg
        super().__init__(A.dtype, A.shape)
        self.device = A.device

    def _matmat(self, X: Array) -> Array:
        return _checked(self.A, self.alg, X)

    def _rmatmat(self, X: Array) -> Array:
        # X A^-1 = (A^-T X^T)^T
        return _checked(self.A.T, self.alg, X.T).T


def _checked(A: LinearOperator, alg: Any, X: Array) -> Array:
    name, fixed, xp = type(alg).__name__, frozen(A), lapack(X)

    def conjugate_gradients(b: Array) -> Array:
        x, count = _conjugate_gradients(fixed, b, alg.P, alg.tol, alg.max_iters)
        return _refused(fixed, x, b, alg.tol, name, count)

    if isinstance(alg, CG) and alg.x0 is None:
        return solution(A, X, Solver(conjugate_gradients, conjugate_gradients))
    zero = (abs(X) ** 2).sum(0) == 0  # CoLA's divides by the norm of each column
    try:
        Y = IterativeOperatorWInfo(A, alg) @ xp.where(zero, X * 0 + 1, X)
    except RuntimeError as error:  # torch's LinAlgError
        raise ConvergenceError(f"{name} broke down ({error}); {_INSTEAD}") from error
    return _refused(A, xp.where(zero, Y * 0, Y), X, alg.tol, name, alg.max_iters)


def verified_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """CG for what is annotated PSD, else GMRES, with the options that ``alg`` carries."""
    if A.isa(PSD):
        return PSD(VerifiedInverse(A, CG(**vars(alg))))
    chosen = GMRES(**vars(alg))
    chosen.max_iters = min(chosen.max_iters, A.shape[0])  # CoLA's breaks down where it goes on beyond
    return VerifiedInverse(A, chosen)
