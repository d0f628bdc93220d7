"""Sums of an operator with a fast inverse and operators of low rank: Woodbury and the matrix determinant lemma.

For A = B + U V, with U of shape (n, r) and V of shape (r, n):
``A^-1 = B^-1 - B^-1 U (I + V B^-1 U)^-1 V B^-1`` and ``det A = det B det(I + V B^-1 U)``
(Woodbury 1950, Inverting Modified Matrices). Where B is a positive diagonal D and V is U^H, half of the middle matrix
need be computed, and Cholesky factors it.

The formula is not backward stable: where B is much smaller than U V, numbers cancel. So every solution is refined
(Higham 2002, Accuracy and Stability of Numerical Algorithms, chapter 12) until its own residual is at roundoff. Where
that does not come, and V is U^H, with ``D^-1/2 U = Q R``

    D^1/2 A^-1 D^1/2 = (I - Q Q^H) + Q (I + R R^H)^-1 Q^H,

in which the projection is applied twice (Kahan's "twice is enough") and no numbers cancel. Where that fails, too, None
is returned, and something denser takes over. Under tracing nobody can look: refined twice, and NaN where the residual
is bad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from cola.annotations import PSD
from cola.ops import LinearOperator, Sum

from structlin._arrays import Array
from structlin._implicit import Solver, backward_error, is_at_roundoff, nan_where_bad
from structlin._lapack import (
    as_array,
    as_tensors,
    determinant_of_numbers,
    eps,
    inverse_values,
    is_known,
    is_transpose,
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

_WIDEST = 0.5  # of n: above this total rank, the dense matrix costs no more
_THREE = "i,ri->r; r,sr->s; s,os->o"
SLACK = 100  # times the distance of neighbouring numbers: the backward error that a solution may have
_REFINEMENTS = 3
_MOST = 2**62  # numbers: NumPy's products with thin matrices are at least as fast as torch's at every size


def split(A: Sum) -> tuple[StructuredOperator | Array, Array, Array] | None:
    """(B, U, V) with ``A = B + U V`` and B easy to invert; None where A is no such sum."""
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

    ``base`` = B^-1, ``left`` = B^-1 U and ``capacitance`` = I + V B^-1 U. B and ``base`` are operators, or the numbers
    of diagonal matrices.

    ``symmetric``: B is a positive diagonal, as far as can be seen, and V is U^H.
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
        xp = lapack(self.U)
        half = xp.gram(_times(xp.sqrt(self.base), self.U)) if self.symmetric else self.V @ self.left
        return half + xp.eye(self.U.shape[1], self.U)

    @cached_property
    def lower(self) -> Array:
        """Cholesky's factor of the capacitance."""
        return lapack(self.U).cholesky(self.capacitance)

    def formula(self, b: Array) -> Array:
        """(B + U V)^-1 b, for a vector or columns, by the identity as it stands."""
        w = _times(self.base, b)
        small = self.V @ w
        small = small if small.ndim == 2 else small[:, None]
        xp = lapack(small)
        c = xp.substitute(self.lower, small) if self.symmetric else xp.solve(self.capacitance, small)
        x = self.U @ -c
        x = x if w.ndim == 2 else x[:, 0]
        # In place: new memory costs as much as the arithmetic. x depends on all arrays, as torch.func.vmap requires.
        if isinstance(self.base, LinearOperator):
            x = self.base @ x
        else:
            x *= _beside(self.base, x)
        x += w
        return x

    @cached_property
    def _orthogonal(self) -> tuple[Array, Array, Array]:
        """(D^1/2, Q, the lower Cholesky factor of I + R R^H)."""
        xp = lapack(self.U)
        root = xp.sqrt(xp.real(self.B))
        q, r = xp.qr(self.U / root[:, None])
        return root, q, xp.cholesky(r @ xp.conj(r).T + xp.eye(r.shape[0], r))

    def projected(self, b: Array) -> Array:
        """Return the same where B is a positive diagonal and V is U^H, in a way in which no numbers cancel."""
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
        """Return a bound of |B| + |U| |V|, to which residuals are compared."""
        xp = lapack(self.U)
        if isinstance(self.B, LinearOperator):  # a random vector of numbers of deviation 1: the Frobenius norm
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
        """As an operator: B^-1 and one product of low rank. None where the capacitance is singular; not verified."""
        n, r = self.U.shape
        base = self.base if isinstance(self.base, LinearOperator) else Diagonal(self.base)
        try:
            core = lapack(self.U).inv(self.capacitance)
        except (np.linalg.LinAlgError, RuntimeError):
            return None
        return base + StructuredOperator(_correction(n, r), (self.V @ base, core, -self.left))

    def hosted(self) -> Woodbury:
        """Return the same on NumPy's views, for few numbers of torch that no derivative follows; else this one."""
        if isinstance(self.B, LinearOperator):
            return self
        views = small_views(self.B, self.U, self.V, self.base, most=_MOST)
        if views is None:
            return self
        B, U, V, base = views
        return Woodbury(B, U, V, base, self.symmetric)

    def slogdet(self, A: Sum) -> Determinant | None:
        """None where B has no determinant in closed form, and where numbers cancel."""
        if self.symmetric and (host := self.hosted()) is not self:
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
    """Whether B is a positive diagonal of numbers of like size; True of PSD sums whose values are traced."""
    (values,) = seen(values)
    values = lapack(values).real(values)
    least, most = known(values.min()), known(values.max())
    if least is None or most is None:
        return bool(A.isa(PSD))
    return least > 0 and most < least * eps(A.dtype) ** -0.5


def woodbury(A: Sum) -> Woodbury | None:
    """None where A does not split, or where B is singular."""
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
    except ValueError:  # B may be singular where the sum is not
        return None
    if base is None:
        return None
    return Woodbury(B, U, V, base, positive and (is_transpose(V, U) or _is_adjoint(A, V, U)))


def _is_adjoint(A: Sum, V: Array, U: Array) -> bool:
    """Whether V is U^H: from the numbers, or, where they are traced, because the sum and its diagonal are Hermitian."""
    if V.shape != U.shape[::-1] or not is_known(V) or not is_known(U):
        return False
    V, U = seen(V, U)
    return bool((V == lapack(U).conj(U).T).all())


def solver(A: Sum) -> Solver | None:
    """Return a solver for a frozen A, whose numbers no derivative reaches.

    Each solution is refined and verified; LinAlgError is raised where its residual is not at roundoff.
    """
    found = woodbury(A)
    if found is None:
        return None
    return Solver(_hosted(found), lambda b: _hosted(found.adjoint())(b))


def _hosted(found: Woodbury) -> Callable[[Array], Array]:
    """Return the verified solution, on NumPy's views for few numbers of torch."""
    host = found.hosted()
    if host is found:
        return verified(found)

    def solve(b: Array) -> Array:
        views = small_views(b, most=_MOST)
        return verified(found)(b) if views is None else as_tensors(verified(host)(views[0]))[0]

    return solve


def verified(found: Woodbury) -> Callable[[Array], Array]:
    def solve(b: Array) -> Array:
        ways = [found.formula, found.projected] if found.symmetric else [found.formula]
        if not is_known(b) or not is_known(found.U):
            return _traced(found, ways[-1], b, found.size())
        for way in ways:
            try:
                x = way(b)
                for _ in range(_REFINEMENTS):  # until the residual is that of b alone, or no more can be had
                    if is_at_roundoff(backward_error(found, x, b, 0.0), b.dtype, SLACK):
                        return x
                    x = x + way(b - found @ x)
            except (np.linalg.LinAlgError, RuntimeError):
                continue
            if is_at_roundoff(backward_error(found, x, b, found.size()), b.dtype, SLACK):
                return x
        raise np.linalg.LinAlgError("structlin: the Woodbury identity is not accurate here")

    return solve


def _traced(found: Woodbury, way: Callable[[Array], Array], b: Array, size: Array) -> Array:
    x = way(b)
    for _ in range(2):
        x = x + way(b - found @ x)
    return nan_where_bad(x, backward_error(found, x, b, size), SLACK * eps(b.dtype))
