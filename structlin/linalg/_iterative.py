"""Iterative solvers with verified results: CG, MINRES, LSMR, and CoLA's GMRES.

The true residual of every solution is computed, not the residual of the recurrence. If it exceeds ten times the
tolerance, ConvergenceError is raised; under tracing the column is NaN instead. Derivatives are those of the solution of
a linear system (:mod:`structlin._implicit`).
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

_SLACK = 10  # largest ratio of the true residual to the tolerance, which the residual of the recurrence has met
_INSTEAD = "raise max_iterations, give a preconditioner, or solve densely with cola.linalg.LU()"


class ConvergenceError(ArithmeticError):
    """An iteration has not reached its tolerance."""


# -- conjugate gradients on any library --------------------------------------------------------------------------------


def cg(
    A: LinearOperator, b: Array, *, preconditioner: LinearOperator | None = None, tolerance: float = 1e-8,
    max_iterations: int = 1000, full_output: bool = False,
) -> Any:  # fmt: skip
    """Solve ``A x = b`` for a Hermitian positive definite A by preconditioned conjugate gradients.

    All columns of b are iterated together, with one product with A per iteration.

    Parameters
    ----------
    A
        Operator of shape (n, n). That it is positive definite is not checked; the residual is.
    b
        Right-hand sides, (n,) or (n, k). Values may be traced by jax.
    preconditioner
        Hermitian positive definite operator that approximates ``A^-1``.
    tolerance
        Bound of ``|A x - b| / |b|`` for each column, between 0 and 1.
    max_iterations
        Largest number of iterations.
    full_output
        Return an :class:`structlin.verdicts.Answer` with the residual and the number of iterations.

    Returns
    -------
    Array or Answer
        The solution, with the shape of b; differentiable in A and b.

    Raises
    ------
    ConvergenceError
        If a residual exceeds ten times the tolerance; NaN under tracing.
    ValueError
        If shapes do not match or a limit is out of range, and for values traced by torch.func.

    References
    ----------
    Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems; Golub and Van Loan (2013),
    Matrix Computations, section 11.5.

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
        raise ValueError(
            "conjugate gradients cannot be traced by torch.func, because the number of iterations depends on values"
        )
    target = (tolerance**2) * xp.real(dots(wide, wide))

    def unfinished(state: Any) -> Array:
        return (xp.real(dots(state[1], state[1])) > target).any()

    state, step = conjugate_gradients(A.__matmul__, (lambda r: r) if M is None else M.__matmul__, wide)
    state = iterate(step, unfinished, state, limit, traced)
    return state[0].reshape(tuple(b.shape)), state[-1]


# -- solvers of SciPy, on the host -------------------------------------------------------------------------------------


def minres(
    A: LinearOperator, b: Array, *, preconditioner: LinearOperator | None = None, tolerance: float = 1e-8,
    max_iterations: int = 1000, full_output: bool = False,
) -> Any:  # fmt: skip
    """Solve ``A x = b`` for a real symmetric A, which may be indefinite, by MINRES of SciPy.

    Parameters, results and errors are those of :func:`cg`. The preconditioner must be positive definite. The columns
    are solved one by one on the host. Complex operators and traced values raise ValueError.

    References
    ----------
    Paige and Saunders (1975), Solution of sparse indefinite systems of linear equations.

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
        # SciPy compares the residual with rtol |A| |x|, which may exceed tolerance |b|; a smaller rtol allows for that
        return sparse.minres(H, column, rtol=tolerance / 100, maxiter=max_iterations, M=M, callback=count)[0]

    return _on_the_host(A, b, one, tolerance, "MINRES", full_output)


def lsmr(
    A: LinearOperator, b: Array, *, damp: float = 0.0, tolerance: float = 1e-10, max_iterations: int | None = None,
    full_output: bool = False,
) -> Any:  # fmt: skip
    """Return the x of least norm that minimizes ``|A x - b|^2 + damp^2 |x|^2``, by LSMR of SciPy.

    The columns are solved one by one on the host. The result is not differentiable.

    Parameters
    ----------
    A
        Operator of shape (n, m).
    b
        Right-hand sides, (n,) or (n, k).
    damp
        Coefficient of the Tikhonov regularization.
    tolerance
        An iteration stops if ``|A^H r| / (|A| |r|)`` or ``|r| / |b|`` is below it, for ``r = b - A x``.
    max_iterations
        Largest number of iterations for each column; default ``4 min(n, m) + 20``.
    full_output
        Return an :class:`structlin.verdicts.Answer` whose error is ``|A^H r| / (|A| |b|)``.

    Returns
    -------
    Array or Answer
        The solution, (m,) or (m, k).

    Raises
    ------
    ConvergenceError
        If the iteration reaches ``max_iterations``.
    ValueError
        If shapes do not match, and for traced values.

    References
    ----------
    Fong and Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems.

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
    """Return A as a LinearOperator of SciPy, from any library; ValueError if its values are traced."""
    dtype = np.dtype(str(A.dtype).removeprefix("torch."))

    def multiply(B: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: _host(B @ like(np.ascontiguousarray(x, dtype=dtype), A))

    forward, backward = multiply(A), multiply(A.H)
    return sparse.LinearOperator(A.shape, forward, backward, forward, dtype, backward)


def _host(x: Array) -> np.ndarray:
    if not is_known(x):
        raise ValueError(
            "this solver runs on the host, so it cannot be traced; structlin.linalg.cg can be traced by jax"
        )
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
    require_square(A, "solving", "; structlin.linalg.lsmr accepts any shape")
    _check_right_side(A, b)
    require_limits(tolerance, limit)


def _residuals(A: Any, x: Array, b: Array) -> Array:
    """Return the squared relative residual of each column; 0 if b and the residual are zero."""
    size = (abs(b) ** 2).sum(0)
    residual = (abs(A @ x - b) ** 2).sum(0)
    xp = lapack(b)
    return xp.where(residual == 0, size * 0, residual / xp.where(size == 0, size * 0 + 1, size))


def _refused(A: Any, x: Array, b: Array, tolerance: float, name: str, count: Any) -> Array:
    """Return x; ConvergenceError if a residual is too large, or NaN under tracing."""
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
    """The inverse of A by an iterative algorithm of CoLA; the residual of every product is verified."""

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
    zero = (abs(X) ** 2).sum(0) == 0  # CoLA divides by the norm of each column
    try:
        Y = IterativeOperatorWInfo(A, alg) @ xp.where(zero, X * 0 + 1, X)
    except RuntimeError as error:  # torch's LinAlgError
        raise ConvergenceError(f"{name} broke down ({error}); {_INSTEAD}") from error
    return _refused(A, xp.where(zero, Y * 0, Y), X, alg.tol, name, alg.max_iters)


def verified_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """Return the inverse by CG if A is annotated PSD, otherwise by GMRES, with the options of ``alg``."""
    if A.isa(PSD):
        return PSD(VerifiedInverse(A, CG(**vars(alg))))
    chosen = GMRES(**vars(alg))
    chosen.max_iters = min(chosen.max_iters, A.shape[0])  # GMRES of CoLA breaks down after n iterations
    return VerifiedInverse(A, chosen)
