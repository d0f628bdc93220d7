"""Low rank plus an operator with a fast inverse: the Woodbury identity and the matrix determinant lemma.

For A = B + U V, with U of shape (n, r) and V of shape (r, n):
``A^-1 = B^-1 - B^-1 U (I + V B^-1 U)^-1 V B^-1`` and ``det A = det B det(I + V B^-1 U)``
(Woodbury 1950, Inverting modified matrices). The matrix ``I + V B^-1 U`` is called the capacitance. If B is a positive
diagonal D and V is U^H, it is factored by Cholesky.

The formula is not backward stable: numbers cancel if B is much smaller than U V. So every solution is refined (Higham
2002, Accuracy and Stability of Numerical Algorithms, chapter 12) until its residual is at roundoff. If refinement does
not succeed and V is U^H, a second formula is tried. With ``D^-1/2 U = Q R`` it is

    D^1/2 A^-1 D^1/2 = (I - Q Q^H) + Q (I + R R^H)^-1 Q^H,

in which the projection is applied twice and no numbers cancel. If this fails too, the caller uses the dense matrix.
Under tracing, solutions are refined twice, and are NaN if the residual is above roundoff.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from cola.annotations import PSD
from cola.ops import LinearOperator, Sum

from structlin import _threads
from structlin._arrays import Array, as_array, backend_of
from structlin._implicit import (
    Solver,
    backward_error,
    is_at_roundoff,
    is_relatively_small,
    nan_where_bad,
    squares_of_columns,
)
from structlin._lapack import (
    FEW,
    as_tensors,
    determinant_of_numbers,
    eps,
    inverse_values,
    is_known,
    is_plain,
    known,
    lapack,
    nan_unless,
    require_precision,
    seen,
    small_views,
)
from structlin.linalg._common import is_backward_stable
from structlin.linalg._forms import diagonal_of, thin
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.diagonal import Diagonal
from structlin.verdicts import Determinant

_WIDEST = 0.5  # largest total rank relative to n; above it the dense matrix costs no more
_THREE = "i,ri->r; r,sr->s; s,os->o"
SLACK = 100  # times machine epsilon: the largest backward error of a solution
_REFINEMENTS = 3
_ROWS = 512  # of a block: OpenBLAS multiplies thin matrices of more rows at half the rate, and it stays in a cache


def split(A: Sum) -> tuple[StructuredOperator | Array, Array, Array] | None:
    """Return (B, U, V) with ``A = B + U V`` and B easy to invert; None if A is not such a sum."""
    n = A.shape[0]
    room = int(_WIDEST * n)
    diagonals, thins, others = [], [], []
    for M in A.Ms:
        value = diagonal_of(M)
        if value is not None:
            diagonals.append(value)
            continue
        found = thin(M, room)
        if found is None:
            others.append(M)
        else:
            thins.append(found)
            room -= found[0].shape[1]
    if not thins or len(others) > 1 or (others and diagonals) or not (others or diagonals):
        return None
    xp = lapack(thins[0][0])
    U = _joined([u for u, _ in thins], 1, A.dtype, xp)
    V = _joined([v for _, v in thins], 0, A.dtype, xp)
    if others:
        base = others[0]
        return (base.to(dtype=A.dtype), U, V) if isinstance(base, StructuredOperator) else None
    values = [as_array(value, U) for value in diagonals]
    whole = values[0] if len(values) == 1 else sum(values[1:], start=values[0])
    return whole if whole.ndim else whole + xp.zeros((n,), U), U, V


def _joined(arrays: list[Array], axis: int, dtype: Any, xp: Any) -> Array:
    arrays = [x if x.dtype == dtype else xp.astype(x, dtype) for x in arrays]
    return arrays[0] if len(arrays) == 1 else xp.concat_axis(arrays, axis)


@lru_cache(maxsize=256)
def _correction(n: int, r: int) -> Structure:
    return Structure.parse(_THREE, i=n, r=r, s=r, o=n)


@dataclass(frozen=True)
class Woodbury:
    """A sum B + U V, and the parts of its inverse and determinant.

    ``base`` = B^-1, ``left`` = B^-1 U and ``capacitance`` = I + V B^-1 U. B and ``base`` are operators, or the
    diagonals of diagonal matrices. ``symmetric``: B is known to be a positive diagonal, and V is U^H.
    """

    B: StructuredOperator | Array
    U: Array
    V: Array
    base: LinearOperator | Array
    symmetric: bool = False

    @cached_property
    def left(self) -> Array:
        return _times(self.base, self.U)

    @cached_property
    def capacitance(self) -> Array:
        whole = lapack(self.U).eye(self.U.shape[1], self.U)
        if not isinstance(self.U, np.ndarray) or not isinstance(self.base, np.ndarray):
            return self.V @ self.left + whole
        for rows, left in self._left_in_blocks():
            whole += self.V[:, rows] @ left
        return whole

    def _left_in_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield blocks of rows of B^-1 U in the same memory: new memory costs as much as the arithmetic."""
        n, r = self.U.shape
        room = np.empty((min(n, _ROWS), r), self.U.dtype)
        for i in range(0, n, _ROWS):
            U = self.U[i : i + _ROWS]
            yield slice(i, i + len(U)), np.multiply(U, self.base[i : i + _ROWS, None], out=room[: len(U)])

    @cached_property
    def lower(self) -> Array:
        """Cholesky's factor of the capacitance."""
        return lapack(self.U).cholesky(self.capacitance)

    def formula(self, b: Array) -> Array:
        """Return (B + U V)^-1 b for a vector or columns by the Woodbury identity, without refinement."""
        wide = b if b.ndim == 2 else b[:, None]
        xp, operator = lapack(self.U), isinstance(self.base, LinearOperator)
        small = self._shortened(wide)
        c = xp.substitute(self.lower, small) if self.symmetric else xp.solve(self.capacitance, small)
        x = xp.minus_product(wide, self.U, c)
        if operator:
            x = self.base @ x
        else:
            x *= self.base[:, None]  # in place: new memory costs as much as the arithmetic
        return x.reshape(b.shape)

    def _shortened(self, b: Array) -> Array:
        """Return V B^-1 b."""
        if not self.symmetric:
            return self.V @ _times(self.base, b)
        return lapack(self.U).conj(self.left).T @ b

    def in_blocks(self, b: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return ``formula(b)`` for NumPy arrays, and whether its residual is at roundoff; needs ``symmetric``.

        There are two passes over blocks of rows, and no array of n rows but the solution.
        """
        wide = b if b.ndim == 2 else b[:, None]
        (n, r), k = self.U.shape, wide.shape[1]
        middle, short, squares = np.eye(r, dtype=b.dtype), np.zeros((r, k), b.dtype), np.zeros(k, b.real.dtype)
        for rows, left in self._left_in_blocks():
            middle += self.V[:, rows] @ left
            short += left.conj().T @ wide[rows]
            squares += squares_of_columns(wide[rows])
        c = lapack(b).substitute(lapack(b).cholesky(middle), short)
        x, few = np.empty(wide.shape, b.dtype), np.zeros_like(short)
        for i in range(0, n, _ROWS):
            rows = slice(i, i + _ROWS)
            y = np.subtract(wide[rows], self.U[rows] @ c, out=x[rows])
            y *= self.base[rows, None]
            few += self.V[:, rows] @ y
        # B x = b - U c up to roundoff, so the residual is U (c - V x) and the roundoff of U c, which is sqrt(r) of
        # its terms with high probability (Higham and Mary 2019). The trace of V B^-1 U bounds the norm of U.
        size = math.sqrt(float(self.B.real.max()) * max(0.0, float(np.trace(middle).real) - r))
        norm = np.sqrt(squares)
        spread = (4 + math.sqrt(r)) * eps(b.dtype) * (size * np.sqrt(squares_of_columns(c)) + norm)
        bound = size * np.sqrt(squares_of_columns(c - few)) + spread
        limit = float(np.finfo(norm.dtype).max) ** 0.25  # beyond it squares leave the range
        sure = bound.max(initial=0.0) < limit and 1 / limit < norm.min(initial=limit)
        return x.reshape(b.shape), bool(sure and (bound <= SLACK * eps(b.dtype) * norm).all())

    def residual(self, x: Array, b: Array) -> Array:
        """Return b - A x."""
        xp = lapack(self.U)
        rest = b - self.B @ x if isinstance(self.B, LinearOperator) else xp.minus_scaled(b, _beside(self.B, x), x)
        rest, few = (rest, self.V @ x) if b.ndim == 2 else (rest[:, None], (self.V @ x)[:, None])
        if isinstance(rest, np.ndarray):
            rest -= self.U @ few
        elif hasattr(rest, "addmm_") and is_plain(rest):  # torch: without another array for the product
            rest.addmm_(self.U, few, alpha=-1)
        else:
            rest = xp.minus_product(rest, self.U, few)
        return rest.reshape(b.shape)

    @cached_property
    def _orthogonal(self) -> tuple[Array, Array, Array]:
        """D^1/2, Q and the lower Cholesky factor of I + R R^H."""
        xp = lapack(self.U)
        root = xp.sqrt(xp.real(self.B))
        q, r = xp.qr(self.U / root[:, None])
        return root, q, xp.cholesky(r @ xp.conj(r).T + xp.eye(r.shape[0], r))

    def projected(self, b: Array) -> Array:
        """Return (B + U V)^-1 b by the second formula, without cancellation; needs ``symmetric``."""
        root, q, middle = self._orthogonal
        xp = lapack(b)
        root = root if b.ndim == 1 else root[:, None]
        adjoint, c = xp.conj(q).T, b / root
        y = adjoint @ c
        rest = c - q @ y
        more = adjoint @ rest
        rest, y = rest - q @ more, y + more
        inner = xp.substitute(middle, y if y.ndim == 2 else y[:, None])
        return (rest + q @ (inner if y.ndim == 2 else inner[:, 0])) / root

    def size(self) -> Array:
        """Return an estimate of ``|B| + |U| |V|``, to which residuals are relative."""
        xp = lapack(self.U)
        if isinstance(self.B, LinearOperator):  # E |B v|^2 is the squared Frobenius norm
            v = np.random.default_rng(0).standard_normal(self.B.shape[0])
            base = xp.norm(self.B @ self.B.xnp.array(v, dtype=self.B.dtype, device=self.B.device))
        else:
            base = xp.max(xp.abs(self.B))
        return base + xp.norm(self.U) * xp.norm(self.V)

    def __matmul__(self, x: Array) -> Array:
        y = self.U @ (self.V @ x)
        y += _times(self.B, x)
        return y

    def adjoint(self) -> Woodbury:
        xp = lapack(self.U)
        if self.symmetric and not xp.is_complex(self.B):
            return self
        flip = (lambda y: y.H) if isinstance(self.B, LinearOperator) else xp.conj
        return Woodbury(flip(self.B), xp.conj(self.V).T, xp.conj(self.U).T, flip(self.base), self.symmetric)

    def inverse(self) -> LinearOperator | None:
        """Return B^-1 plus a product of low rank, not verified; None if the capacitance is singular."""
        n, r = self.U.shape
        base = self.base if isinstance(self.base, LinearOperator) else Diagonal(self.base)
        try:
            core = lapack(self.U).inv(self.capacitance)
        except (np.linalg.LinAlgError, RuntimeError):
            return None
        return base + StructuredOperator(_correction(n, r), (self.V @ base, core, -self.left))

    def hosted(self) -> Woodbury:
        """Return this sum on NumPy views of torch tensors without gradients; self if there are none."""
        if isinstance(self.B, LinearOperator):
            return self
        # Calls of NumPy alone take less time for up to 2^15 numbers. Its products of more are fast in blocks only.
        views = small_views(self.B, self.U, self.V, self.base, most=math.inf if self.symmetric else 8 * FEW)
        if views is None:
            return self
        B, U, V, base = views
        return Woodbury(B, U, V, base, self.symmetric)

    def slogdet(self, A: Sum) -> Determinant | None:
        """Return the determinant; None if B has none in closed form, or if numbers cancel."""
        if self.symmetric and (host := self.hosted()) is not self:
            with _threads.of_torch(self.U):
                found = host.slogdet(A)
            return None if found is None else Determinant(*as_tensors(*found))
        xp = lapack(self.U)
        try:
            sign, log = (xp.positive_slogdet if self.symmetric else xp.slogdet)(self.capacitance)
        except (np.linalg.LinAlgError, RuntimeError):
            return None
        if self.symmetric:
            return Determinant(sign, log + xp.log(xp.real(self.B)).sum())
        if isinstance(self.B, StructuredOperator):
            answer = self.B.structure.slogdet(self.B)
            if answer is None:
                return None
            first = answer.value
        else:
            first = determinant_of_numbers(self.B)
        good = is_backward_stable(A, self.formula)
        if good is False:
            return None
        if good is not True:
            log = log + nan_unless(good, log)
        return Determinant(first[0] * sign, first[1] + log)


def _times(base: LinearOperator | Array, x: Array) -> Array:
    return base @ x if isinstance(base, LinearOperator) else _beside(base, x) * x


def _beside(numbers: Array, x: Array) -> Array:
    """Return numbers as factors of the rows of x, a vector or columns."""
    return numbers if x.ndim == 1 else numbers[:, None]


def _is_positive(A: Sum, values: Array) -> bool:
    """Whether the diagonal B is positive and well conditioned; True for traced values of a PSD sum."""
    (values,) = seen(values)
    whole, values = values, lapack(values).real(values)
    least, most = known(values.min()), known(values.max())
    if least is None or most is None:
        return bool(A.isa(PSD))
    if lapack(whole).is_complex(whole) and known(abs(whole - values).max()) != 0:
        return False
    return least > 0 and most < least * eps(A.dtype) ** -0.5


def woodbury(A: Sum) -> Woodbury | None:
    """Return the parts of A = B + U V; None if A is not such a sum, or B is singular."""
    parts = split(A)
    if parts is None:
        return None
    B, U, V = parts
    require_precision(U, "an inverse")
    positive, base = False, None
    try:
        if isinstance(B, StructuredOperator):
            answer = B.structure.inverse(B)
            base = None if answer is None else answer.value
        else:
            positive = _is_positive(A, B)
            base = inverse_values(B, 0.0)
    except ValueError:  # B may be singular although the sum is not
        return None
    if base is None:
        return None
    return Woodbury(B, U, V, base, positive and (_is_transpose(V, U) or _is_adjoint(A, V, U)))


def _is_transpose(x: Array, y: Array) -> bool:
    """Return whether the matrix ``x`` is real and a view of the same memory as ``y^T``; always False on jax."""
    if x.shape != y.shape[::-1] or lapack(x).is_complex(x):
        return False
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        same = x.__array_interface__["data"] == y.__array_interface__["data"]
        return same and x.dtype == y.dtype and x.strides == y.strides[::-1]
    if backend_of(x) != "torch" or not (is_plain(x.detach()) and is_plain(y.detach())):
        return False
    return bool(x.dtype == y.dtype and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()[::-1])


def _is_adjoint(A: Sum, V: Array, U: Array) -> bool:
    """Whether V is known to be U^H by its values; False if they are traced."""
    if V.shape != U.shape[::-1] or not is_known(V) or not is_known(U):
        return False
    V, U = seen(V, U)
    return bool((V == lapack(U).conj(U).T).all())


def solver(A: Sum) -> Solver | None:
    """Return a solver for an A without gradients, or None.

    Each solution is refined and verified; LinAlgError if its residual is above roundoff.
    """
    found = woodbury(A)
    if found is None:
        return None
    return Solver(_hosted(found), lambda b: _hosted(found.adjoint())(b))


def _hosted(found: Woodbury) -> Callable[[Array], Array]:
    """Return the verified solution, on NumPy views of torch tensors."""
    host = found.hosted()
    if host is found:
        return verified(found)

    def solve(b: Array) -> Array:
        if (views := small_views(b, most=math.inf)) is None:
            return verified(found)(b)
        with np.errstate(all="ignore"), _threads.of_torch(host.U):  # as in torch
            return as_tensors(verified(host)(views[0]))[0]

    return solve


def verified(found: Woodbury) -> Callable[[Array], Array]:
    def solve(b: Array) -> Array:
        if not is_known(b) or not is_known(found.U):
            return _traced(replace(found), b)  # a copy: what a trace computes must not be kept for another
        for way in (found.formula, found.projected) if found.symmetric else (found.formula,):
            try:
                if found.symmetric and way == found.formula and isinstance(b, np.ndarray) and b.dtype == found.U.dtype:
                    x, done = found.in_blocks(b)
                    if done:
                        return x
                else:
                    x = way(b)
                for _ in range(_REFINEMENTS):  # until the residual is at roundoff relative to b alone
                    rest = found.residual(x, b)
                    if is_relatively_small(rest, b, SLACK):
                        return x
                    x = x + way(rest)
            except (np.linalg.LinAlgError, RuntimeError):
                continue
            if is_at_roundoff(backward_error(found, x, b, found.size()), b.dtype, SLACK):
                return x
        raise np.linalg.LinAlgError("structlin: the Woodbury identity is not accurate for this sum")

    return solve


def _traced(found: Woodbury, b: Array) -> Array:
    way, size = found.projected if found.symmetric else found.formula, found.size()
    x = way(b)
    for _ in range(2):
        x = x + way(found.residual(x, b))
    return nan_where_bad(x, backward_error(found, x, b, size), SLACK * eps(b.dtype))
