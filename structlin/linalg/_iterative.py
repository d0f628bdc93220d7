"""Iterative solvers with verified results: CG, GMRES, MINRES and LSMR.

The true residual of every solution is computed, not the residual of the recurrence. If it exceeds ten times the
tolerance, ConvergenceError is raised; under tracing the column is NaN instead. A column of b that is not finite has the
solution NaN. Derivatives are those of the solution of a linear system (:mod:`structlin._implicit`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
from cola.annotations import PSD
from cola.linalg.algorithm_base import Auto
from cola.linalg.inverse.cg import CG
from cola.linalg.inverse.gmres import GMRES
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, on_cpu, over_same_axes
from structlin._implicit import Solver, frozen, solution
from structlin._iterations import Apply, conjugate_gradients, dots, iterate
from structlin._lapack import eps, is_known, is_transformed, known, lapack, nan_unless, require_precision
from structlin.linalg._common import in_dtype, like, require_limits, require_operator, require_square
from structlin.verdicts import Answer, Verdict

_SLACK = 10  # largest ratio of the true residual to the tolerance, which the residual of the recurrence has met
_RESTART = 50  # vectors of the basis of GMRES
_ALL = slice(None)
_INSTEAD = "raise max_iterations, give a preconditioner, or solve densely with cola.linalg.LU()"


Run = Callable[[Any, Array], tuple[Array, Any]]


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
        Operator of shape (n, n). The residual and the sign of ``p^H A p`` for each search direction p are checked.
    b
        Right-hand sides, (n,) or (n, k). Values may be traced by jax.
    preconditioner
        Hermitian positive definite operator that approximates ``A^-1``.
    tolerance
        Bound of ``|A x - b| / |b|`` for each column, between 0 and 1.
    max_iterations
        Largest number of iterations.
    full_output
        Return an :class:`structlin.verdicts.Answer` with the residual and the number of iterations. If b is not
        finite, its error is NaN and its verdict NOT_VERIFIED.

    Returns
    -------
    Array or Answer
        The solution, with the shape of b; differentiable in A and b.

    Raises
    ------
    ConvergenceError
        If a residual exceeds ten times the tolerance; NaN under tracing.
    LinAlgError
        If ``p^H A p`` is not positive beyond roundoff for a search direction p; NaN under tracing.
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
    b, A, preconditioner = over_same_axes(b, A, preconditioner)
    run = partial(_conjugate_gradients, M=_product(preconditioner), tolerance=tolerance, limit=max_iterations)
    return _verified(A, b, run, run, tolerance, "conjugate gradients", full_output)


def _columns(b: Array) -> Array:
    return b if b.ndim == 2 else b[:, None]


def _product(M: LinearOperator | None) -> Apply:
    return (lambda r: r) if M is None else frozen(M).__matmul__


def _conjugate_gradients(A: Any, b: Array, M: Apply, tolerance: float, limit: int) -> tuple[Array, Any]:
    xp = lapack(b)
    first = A @ b
    traced = not (is_known(b) and is_known(first[:1]))
    if traced and backend_of(b) != "jax":
        raise ValueError(
            "conjugate gradients cannot be traced by torch.func, because the number of iterations depends on values"
        )
    length = _squares(b)
    target = tolerance**2 * length
    # a lower bound of the norm of A, times the roundoff
    least = eps(b.dtype) * xp.sqrt(_squares(first) / (length + (length == 0)))

    def product(p: Array) -> Array:
        q = A @ p
        size = _squares(p)
        curvature = xp.real(dots(p, q)) / (size + (size == 0))
        bad = (curvature <= least) & (size > 0)
        if known(bad.any()):
            raise np.linalg.LinAlgError(
                "A is not positive definite to working precision, as conjugate gradients need it: p^H A p is "
                f"{known(curvature.min()):.1e} for a search direction p of length 1 ({known(least.max()):.1e} would be "
                "roundoff); use structlin.linalg.minres for a symmetric and structlin.linalg.lsmr for a singular A"
            )
        return q + nan_unless(~bad, q)

    def advance(state: Any) -> Any:
        x, r, p, old = state
        return step((x, xp.where(_squares(r) > target, r, r * 0), p, old))  # a finished column stays as it is

    state, step = conjugate_gradients(product, M, b)
    state = iterate(advance, lambda state: (_squares(state[1]) > target).any(), state, limit, traced)
    return state[0], state[-1]


def _squares(x: Array) -> Array:
    """Return the squared norm of each column."""
    return lapack(x).real(dots(x, x))


# -- GMRES on any library ----------------------------------------------------------------------------------------------


def _gmres(A: Any, b: Array, M: Apply, tolerance: float, limit: int) -> tuple[Array, Any]:
    """Solve by the restarted GMRES of Saad and Schultz (1986), with the preconditioner M on the right.

    All columns are iterated together, until the residual of each meets the tolerance or after ``limit`` products.
    """
    require_precision(b, "GMRES")
    xp, first = lapack(b), A @ b
    b = xp.astype(b, first.dtype)
    jax, traced = backend_of(b) == "jax", not (is_known(b) and is_known(first[:1]))
    if not jax and (traced or is_transformed(b)):
        raise ValueError("GMRES cannot be traced by torch.func, because the number of iterations depends on values")
    (n, k), most, roundoff = b.shape, min(_RESTART, b.shape[0], limit), eps(b.dtype)
    target = tolerance**2 * _squares(b)

    def unfinished(state: Any) -> Array:
        g, size = state[2:4]  # the square of the residual is size / |g|^2, because g^T H = 0
        return size > target * (abs(g) ** 2).sum(1)

    def arnoldi(state: Any) -> Any:
        V, H, g, size, j = state
        width = most + 1 if jax else j + 1  # the vectors behind are zero; each width would be compiled
        w = (A @ M(V[:, j].T)).T
        length, h = _squares(w.T), H[:, 0, :width] * 0
        for _ in range(2):  # Gram and Schmidt, twice
            c = (V[:, :width] @ w.conj()[..., None])[..., 0].conj()
            w, h = w - (c[:, None] @ V[:, :width])[:, 0], h + c
        rest = _squares(w.T)
        done = rest <= roundoff**2 * length
        rest = xp.sqrt(xp.where(done, rest * 0 + 1, rest))
        V = _put(V, (_ALL, j + 1), xp.where(done[:, None], w * 0, w / rest[:, None]))
        H = _put(H, (_ALL, j, slice(0, width)), h)
        H = _put(H, (_ALL, j, j + 1), xp.where(done, rest * 0, rest))
        last = xp.where(done, c[:, 0] * 0 + 1 / roundoff**2, -(g[:, :width] * h).sum(1) / rest)
        g = _put(g, (_ALL, j + 1), xp.where(unfinished(state), last, last * 0))
        return V, H, g, size, j + 1

    def cycle(state: Any) -> Any:
        x, r, count = state
        size = _squares(r)
        size = xp.where(size > target, size, size * 0)
        beta = xp.sqrt(xp.where(size > 0, size, size * 0 + 1))
        V, H, g = (xp.zeros(s, b) for s in ((k, most + 1, n), (k, most, most + 1), (k, most + 1)))
        V = _put(V, (_ALL, 0), xp.where(size > 0, r / beta, r * 0).T)
        start = V, H, _put(g, (_ALL, 0), g[:, 0] + 1), size, count * 0
        V, H, *_, j, _ = iterate(
            arnoldi, lambda state: unfinished(state).any() & (state[4] + count < limit), start, most, traced
        )
        H = xp.permute(xp.where(H == H, H, H * 0), (0, 2, 1))  # NaN stays in V
        y = xp.pinv(H, most * roundoff)[:, :, 0] * beta[:, None]
        x = x + M((y[:, None] @ V[:, :most])[:, 0].T)
        return x, b - A @ x, count + j

    start = b * 0, b, (target * 0).sum().astype("int32") if jax else 0
    x, _, count, _ = iterate(
        cycle, lambda state: (_squares(state[1]) > target).any() & (state[2] < limit), start, limit, traced
    )
    return x, count


def _put(x: Array, where: Any, value: Array) -> Array:
    """Return x with other values in a place; x may be overwritten."""
    if backend_of(x) == "jax":
        return x.at[where].set(value)
    x[where] = value
    return x


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

    def run(A: Any, b: Array) -> tuple[Array, int]:
        wide = _with_dtype_of(b, A)
        H, columns, counts = host_operator(wide), [], [0]
        for column in host_array(b).T:
            count = itertools.count()
            # SciPy compares the residual with rtol |A| |x|, which may exceed tolerance |b|; a smaller rtol allows that
            options: Any = {"rtol": tolerance / 100, "maxiter": max_iterations, "M": M}
            columns.append(sparse.minres(H, column, callback=lambda _, count=count: next(count), **options)[0])
            counts.append(next(count))
        return like(np.array(columns).T.copy(), wide), max(counts)

    return _verified(A, b, run, run, tolerance, "MINRES", full_output)


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
    right, parts = _real_columns(A, _columns(_promoted(b, A)))
    wide = _with_dtype_of(right, A)
    H, iterations, norms = host_operator(wide), 0, []
    columns = []
    for column in host_array(right).T.copy():  # SciPy may write into it
        x, reason, count, _, normal, size, *_ = sparse.lsmr(H, column, damp, tolerance, tolerance, 0, limit)
        if reason == 7:
            raise ConvergenceError(f"LSMR left |A^H r| = {normal:.1e} after {limit} iterations; raise max_iterations")
        iterations = max(iterations, count)
        norms.append(normal / max(size * np.linalg.norm(column), np.finfo(float).tiny))
        columns.append(x)
    x = parts(like(np.array(columns).T.copy(), wide)).reshape((A.shape[1], *tuple(b.shape[1:])))
    if not full_output:
        return x
    return Answer(x, Verdict.ESTIMATED, float(max(norms, default=0.0)), {"iterations": iterations})


def host_operator(A: LinearOperator) -> Any:
    """Return A as a LinearOperator of SciPy, from any library; ValueError if its values are traced."""
    dtype = np.dtype(str(A.dtype).removeprefix("torch."))

    def multiply(B: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
        # A real operator raises TypeError for complex numbers
        return lambda x: host_array(B @ like(np.ascontiguousarray(x.astype(dtype, casting="same_kind")), A))

    forward, backward = multiply(A), multiply(A.H)
    return sparse.LinearOperator(A.shape, forward, backward, forward, dtype, backward)


def host_array(x: Array) -> np.ndarray:
    if not is_known(x) or is_transformed(x):
        raise ValueError(
            "this solver runs on the host, so it cannot be traced; structlin.linalg.cg can be traced by jax"
        )
    return np.asarray(on_cpu(x) if hasattr(x, "detach") else x)


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


def _promoted(b: Array, A: LinearOperator) -> Array:
    """Return b in the common dtype of b and A."""
    return lapack(b).astype(b, A.xnp.promote_types(A.dtype, b.dtype))


def _with_dtype_of(b: Array, A: LinearOperator) -> LinearOperator:
    """Return A in the dtype of b, or unchanged if A holds functions."""
    return A if A.dtype == b.dtype else in_dtype(A, b.dtype) or A


def _real_columns(A: LinearOperator, b: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the real and imaginary parts of complex columns if A is real, and the function that joins them again."""
    if "complex" in str(A.dtype) or "complex" not in str(b.dtype):
        return b, lambda x: x
    k = b.shape[1]
    return lapack(b).concat_axis([b.real, b.imag], 1), lambda x: x[:, :k] + 1j * x[:, k:]


def _scales(b: Array) -> tuple[Array, Array]:
    """Return the largest magnitude in each column, or 1 if it is 0 or not finite, and whether it is finite."""
    xp = lapack(b)
    size = xp.amax(abs(b).T)
    finite = size < math.inf
    return xp.where(finite & (size > 0), size, xp.zeros((1,), size) + 1), finite


def _residuals(A: Any, x: Array, b: Array) -> Array:
    """Return the relative residual of each column, or its norm if b is zero."""
    xp, scale = lapack(b), _scales(b)[0]
    residual, size = (xp.sqrt((abs(y / scale) ** 2).sum(0)) for y in (A @ x - b, b))
    return residual / xp.where((size > 0) & (size < math.inf), size, xp.zeros((1,), size) + 1)


def _verified(
    A: LinearOperator, b: Array, run: Run, adjoint: Run, tolerance: float, name: str, full_output: bool = False
) -> Any:
    """Return the solution by ``run(A, b)``, which returns x and the number of iterations, and its verdict.

    ``adjoint`` is the method for A.H.
    """
    fixed, xp = frozen(A), lapack(b)
    b = _promoted(b, A)
    bound = _SLACK * max(tolerance, eps(b.dtype))
    statistics: dict[str, Any] = {}

    def solver(operator: Callable[[], Any], run: Run) -> Callable[[Array], Array]:
        def solve(b: Array) -> Array:
            M = operator()
            wide, parts = _real_columns(M, _columns(b))
            scale, finite = _scales(wide)
            wide = xp.where(finite, wide, xp.zeros((1,), wide)) / scale
            x, count = run(M, wide)
            statistics["iterations"] = count
            residuals = _residuals(M, x, wide)
            good = residuals <= bound
            if known((~good).any()):
                worst = known(xp.max(xp.stop_gradient(residuals)))
                raise ConvergenceError(
                    f"{name} left a relative residual of {worst:.1e} after {known(count):.0f} iterations, "
                    f"the tolerance is {tolerance:.0e}; {_INSTEAD}"
                )
            return parts(x * scale + nan_unless(good & finite, x)).reshape(tuple(b.shape))

        return solve

    x = b * 0 if 0 in b.shape else solution(A, b, Solver(solver(lambda: fixed, run), solver(lambda: fixed.H, adjoint)))
    if not full_output:
        return x
    error = 0.0 if 0 in b.shape else known(xp.max(_residuals(fixed, *map(_columns, (x, b)))))
    good = error is not None and error <= bound  # not for NaN
    return Answer(x, Verdict.VERIFIED if good else Verdict.NOT_VERIFIED, error, statistics)


# -- the inverse -------------------------------------------------------------------------------------------------------


class VerifiedInverse(LinearOperator):
    """The inverse of A by CG or GMRES, with the options of CoLA; the residual of every product is verified."""

    def __init__(self, A: LinearOperator, alg: Any) -> None:
        self.A = A
        self.alg = alg
        super().__init__(A.dtype, A.shape)
        self.device = A.device

    def _matmat(self, X: Array) -> Array:
        x0 = self.alg.x0
        if x0 is None:
            return self._solve(self.A, X, self.alg.P)
        x0 = _columns(x0)
        return x0 + self._solve(self.A, X - self.A @ x0, self.alg.P)

    def _rmatmat(self, X: Array) -> Array:
        # X A^-1 = (A^-T X^T)^T
        return self._solve(self.A.T, X.T, None if self.alg.P is None else self.alg.P.T).T

    def _solve(self, A: LinearOperator, b: Array, P: LinearOperator | None) -> Array:
        b, A, P = over_same_axes(b, A, P)
        method = _conjugate_gradients if isinstance(self.alg, CG) else _gmres
        run, back = (
            partial(method, M=_product(M), tolerance=self.alg.tol, limit=self.alg.max_iters)
            for M in (P, None if P is None else P.H)
        )
        return _verified(A, b, run, back, self.alg.tol, type(self.alg).__name__)


def verified_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """Return the inverse by CG if A is annotated PSD, otherwise by GMRES, with the options of ``alg``."""
    if A.isa(PSD):
        return PSD(VerifiedInverse(A, CG(**vars(alg))))
    return VerifiedInverse(A, GMRES(**vars(alg)))
