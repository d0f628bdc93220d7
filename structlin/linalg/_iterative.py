"""Iterative solves whose result is checked: CoLA's, for what is too large for a dense matrix and has no fast form."""

from __future__ import annotations

from typing import Any

from cola.annotations import PSD
from cola.linalg.algorithm_base import Auto, IterativeOperatorWInfo
from cola.linalg.inverse.cg import CG
from cola.linalg.inverse.gmres import GMRES
from cola.ops import LinearOperator

from structlin._arrays import Array
from structlin.linalg._lapack import known, lapack, nan_unless

_SLACK = 10  # how far the true residual may lie above the tolerance that the algorithm met by its own recurrence
_INSTEAD = "raise max_iters, give a preconditioner P, or solve densely with cola.linalg.LU()"


class ConvergenceError(ArithmeticError):
    """An iteration has not reached its tolerance."""


class VerifiedInverse(LinearOperator):
    """The inverse of A by an iterative algorithm; the residual of every solve is computed and compared.

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
    try:
        Y = IterativeOperatorWInfo(A, alg) @ X
    except RuntimeError as error:  # torch's LinAlgError
        raise ConvergenceError(f"{type(alg).__name__} broke down ({error}); {_INSTEAD}") from error
    xp = lapack(Y)
    columns = (abs(A @ Y - X) ** 2).sum(0) / (abs(X) ** 2).sum(0)
    bound = (_SLACK * alg.tol) ** 2
    worst = known(xp.max(xp.stop_gradient(columns)))
    if worst is None:
        return Y + nan_unless(columns <= bound, Y)
    if not worst <= bound:  # also where it is NaN
        raise ConvergenceError(
            f"{type(alg).__name__} left a relative residual of {worst**0.5:.1e} after {alg.max_iters} iterations, "
            f"the tolerance is {alg.tol:.0e}; {_INSTEAD}"
        )
    return Y


def verified_inverse(A: LinearOperator, alg: Auto) -> LinearOperator:
    """CG for what is annotated PSD, else GMRES, with the options that ``alg`` carries."""
    if A.isa(PSD):
        return PSD(VerifiedInverse(A, CG(**vars(alg))))
    chosen = GMRES(**vars(alg))
    chosen.max_iters = min(chosen.max_iters, A.shape[0])  # CoLA's breaks down where it goes on beyond
    return VerifiedInverse(A, chosen)
