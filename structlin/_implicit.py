"""Solutions of linear systems with derivatives that do not depend on the method: dx = A^-1 (db - dA x).

The method may be an iteration, iterative refinement, or a decomposition whose eigenvectors have no derivative.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cola.annotations import SelfAdjoint

from structlin._arrays import Array, backend_of
from structlin._lapack import eps, follows, known, lapack, nan_unless, seen


@dataclass(frozen=True)
class Solver:
    """``solve(b)`` is A^-1 b and ``adjoint(b)`` is A^-H b, both linear in b; no derivative reaches the values of A."""

    solve: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]

    @property
    def flipped(self) -> Solver:
        return Solver(self.adjoint, self.solve)


def frozen(A: Any) -> Any:
    """Return the operator with detached arrays; A itself if no array needs a gradient."""
    leaves, unflatten = A.flatten()
    if not any(map(_is_followed, leaves)):
        return A
    return unflatten([lapack(x).stop_gradient(x) if hasattr(x, "dtype") else x for x in leaves])


def is_followed(A: Any) -> bool:
    """Return whether derivatives with respect to the arrays of an operator may be needed."""
    return any(map(_is_followed, A.flatten()[0]))


def _is_followed(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and follows(leaf)


def adjoint(A: Any) -> Any:
    """Return ``A.H``; if A is annotated as self-adjoint, return A without CoLA's search for a rule."""
    return A if A.isa(SelfAdjoint) else A.H


def solution(A: Any, b: Array, solver: Solver) -> Array:
    """Return ``A^-1 b`` with derivatives of every order; inside transformations of ``torch.func``, of order 1 and 2."""
    if backend_of(b) == "numpy" or not (follows(b) or is_followed(A)):
        return solver.solve(b)
    if backend_of(b) == "jax":
        from jax import lax

        def adjoint_of_conjugate(_: Any, b: Array) -> Array:  # the transpose, from the adjoint
            return solver.adjoint(b.conj()).conj()

        return lax.custom_linear_solve(lambda x: A @ x, b, lambda _, b: solver.solve(b), adjoint_of_conjugate)
    torch: Any = sys.modules["torch"]
    if torch._C._are_functorch_transforms_active():
        # One step of refinement, differentiated, gives the first derivative of the solution; two steps the second.
        x = solver.solve(b)
        for _ in range(2):
            x = x + solver.solve(b - A @ x)
        return x
    leaves, unflatten = A.flatten()
    return _torch_function().apply(unflatten, solver, b, *leaves)


@cache
def _torch_function() -> Any:
    torch: Any = sys.modules["torch"]

    class Solution(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, unflatten: Any, solver: Solver, b: Array, *leaves: Any) -> Array:
            x = solver.solve(b)
            ctx.unflatten, ctx.solver = unflatten, solver
            ctx.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            ctx.others = list(leaves)
            ctx.save_for_backward(x, *(leaves[i] for i in ctx.places))
            for i in ctx.places:
                ctx.others[i] = None
            return x

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> tuple[Any, ...]:
            x, *tensors = ctx.saved_tensors
            again = torch.is_grad_enabled()  # whether a derivative of this gradient may be needed
            wanted = [ctx.needs_input_grad[3 + i] for i in ctx.places]
            if not again:
                tensors = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            found: list[Any] = [None] * len(ctx.others)
            with torch.enable_grad():
                # Views, because x depends on the tensors too, but is a constant in this derivative of A x.
                tensors = [t.view_as(t) for t in tensors]
                leaves = list(ctx.others)
                for i, t in zip(ctx.places, tensors, strict=True):
                    leaves[i] = t
                A = ctx.unflatten(leaves)
                with torch.set_grad_enabled(again):
                    w = solution(adjoint(A), gradient.resolve_conj(), ctx.solver.flipped)
                if any(wanted):
                    needed = [t for t, w_ in zip(tensors, wanted, strict=True) if w_]
                    product = A @ (x if again else x.detach())
                    grads = torch.autograd.grad(product, needed, -w, create_graph=again, allow_unused=True)
                    at = [i for i, w_ in zip(ctx.places, wanted, strict=True) if w_]
                    for i, g in zip(at, grads, strict=True):
                        found[i] = g
            return None, None, w if ctx.needs_input_grad[2] else None, *found

    return Solution


def backward_error(A: Any, x: Array, b: Array, size: Array | float) -> Array:
    """Return the normwise backward error ``|A x - b| / (size |x| + |b|)`` of each column."""
    return _relative(A.residual(x, b) if hasattr(A, "residual") else A @ x - b, x, b, size)


def _relative(rest: Array, x: Array, b: Array, size: Array | float) -> Array:
    rest, x, b, size = seen(rest, x, b, size) if hasattr(size, "dtype") else (*seen(rest, x, b), size)
    xp = lapack(b)
    norms = _few_norms(rest, x, b) if isinstance(b, np.ndarray) else None
    if norms is None:
        norms = [xp.norms(y) for y in (rest, x, b)]
    bound = size * norms[1] + norms[2]
    return norms[0] / xp.where(bound == 0, bound * 0 + 1, bound)


def is_relatively_small(rest: Array, b: Array, slack: float) -> bool:
    """Whether the columns of a residual are at roundoff relative to those of b; the values are known."""
    host = seen(rest, b)
    if isinstance(host[1], np.ndarray) and host[0].flags.c_contiguous and host[0].dtype == host[1].dtype:
        whole = host[0].ravel()
        if is_small_square(np.vdot(whole, whole).real, squares_of_columns(host[1]), b.dtype, slack):
            return True
    return bool(is_at_roundoff(_relative(rest, rest, b, 0.0), b.dtype, slack))


def squares_of_columns(x: np.ndarray) -> np.ndarray:
    """Return the sums of squares of the columns without a temporary array."""
    return np.einsum("i...,i...->...", x.conj(), x).real


def is_small_square(rest: float, columns: np.ndarray, dtype: Any, slack: float) -> bool:
    """Whether a residual with the sum of squares ``rest`` is at roundoff relative to columns with these squares.

    The norm of all columns together bounds each. Squares near the ends of the range are left to the full test: False.
    """
    least, most = columns.min(initial=np.inf), columns.max(initial=0.0)
    limit = float(np.finfo(columns.dtype).max) ** 0.5
    return bool(1 / limit < least and most < limit and rest <= (slack * eps(dtype)) ** 2 * least)


def _few_norms(rest: np.ndarray, x: np.ndarray, b: np.ndarray) -> list[np.ndarray] | None:
    """Return the norms of the columns without temporary arrays; None if a square may have left the range."""
    squares = [squares_of_columns(y) for y in (rest, x, b)]
    limit = float(np.finfo(squares[2].dtype).max) ** 0.5
    if not all(s.max(initial=0.0) < limit for s in squares):
        return None
    if squares[2].min(initial=limit) <= 1 / limit:  # columns of zeros have the square 0
        small = np.where(squares[2] == 0, b.any(0), squares[2] <= 1 / limit)
        if np.any(small):
            return None
    return [np.sqrt(s) for s in squares]


def nan_where_bad(x: Array, error: Array, bound: float) -> Array:
    """Return x with NaN in the columns whose error exceeds the bound: traced values allow no exception."""
    bad = nan_unless(error <= bound, x)
    return x + bad


def is_at_roundoff(error: Array, dtype: Any, slack: float) -> bool | None:
    """Return whether the largest backward error is at roundoff; None while values are traced."""
    worst = known(lapack(error).max(error))
    return None if worst is None else worst <= slack * eps(dtype)
