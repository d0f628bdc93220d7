"""Iterations for linear systems, on any array library: conjugate gradients and BiCGSTAB, all columns at once.

A start returns the first state and the function that makes the next one. A state is ``(x, r, ...)``: the solution x of
``A x = b - r``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from structlin._arrays import Array, over_same_axes
from structlin._lapack import known

State = tuple[Any, ...]
Step = Callable[[State], State]
Apply = Callable[[Array], Array]


def dots(x: Array, y: Array) -> Array:
    """Return the inner product of each pair of columns."""
    return (x.conj() * y).sum(0)


def _safe(x: Array) -> Array:
    """Return x, with 1 in place of 0."""
    return x + (x == 0)


def _start(b: Array) -> State:
    return b * 0, b, b * 0, b[:1].sum(0) * 0


def conjugate_gradients(A: Apply, M: Apply, b: Array) -> tuple[State, Step]:
    """Start the method of Hestenes and Stiefel (1952), for a Hermitian positive definite A preconditioned by M."""

    def step(state: State) -> State:
        x, r, p, old = state
        z = M(r)
        rho = dots(r, z)
        p = z + (rho / _safe(old)) * p
        q = A(p)
        alpha = rho / _safe(dots(p, q))
        return x + alpha * p, r - alpha * q, p, rho

    return _start(b), step


def bicgstab(A: Apply, M: Apply, b: Array) -> tuple[State, Step]:
    """Start the method of van der Vorst (1992), for any A, with the preconditioner M."""

    def step(state: State) -> State:
        x, r, d, old = state
        rho = dots(b, r)
        p = r + (rho / _safe(old)) * d
        p_hat = M(p)
        v = A(p_hat)
        alpha = rho / _safe(dots(b, v))
        s = r - alpha * v
        s_hat = M(s)
        t = A(s_hat)
        omega = dots(t, s) / _safe(dots(t, t))
        x = x + alpha * p_hat + omega * s_hat
        return x, s - omega * t, (alpha / _safe(omega)) * (p - omega * v), rho

    return _start(b), step


def iterate(step: Step, unfinished: Callable[[State], Array], state: State, limit: int, traced: bool) -> State:
    """Return the state after at most ``limit`` steps, followed by their number; stop when it is finished.

    ``traced``: use a loop of jax.
    """
    if traced:
        from jax import lax

        def go_on(state: State) -> Any:
            return (state[-1] < limit) & unfinished(state)

        start = over_same_axes(*state, lax.full((), 0, "int32"))
        return lax.while_loop(go_on, lambda state: (*step(state[:-1]), state[-1] + 1), start)
    count = 0
    while count < limit and known(unfinished(state)) != 0:
        state, count = step(state), count + 1
    return *state, count
