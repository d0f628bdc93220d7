"""``b^H A^-1 b`` and ``log |det A|`` from one decomposition of a Hermitian A, with their gradients in closed form.

For A(t) and x = A^-1 b, the derivatives are ``-x^H dA x`` and ``tr(A^-1 dA)``. Both follow from the decomposition that
gave x, so autograd records one operation, not those of the solution and of the determinant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cola.annotations import PSD
from cola.ops import LinearOperator, Sum

from structlin import _spectra as spectra
from structlin._arrays import Array, backend_of
from structlin._lapack import (
    FEW,
    as_tensors,
    determinant_of_numbers,
    eps,
    inverse_values,
    is_known,
    lapack,
    small_views,
)
from structlin.algebra import chains, kronecker
from structlin.linalg import _woodbury
from structlin.linalg._forms import members
from structlin.operators import StructuredOperator
from structlin.structures.kronecker import Kronecker


@dataclass(frozen=True)
class Terms:
    """``x = A^-1 b``, ``log |det A|``, and gradients with respect to the arrays of A.

    ``gradients(p, q)`` are those of ``p b^H x + q log |det A|``. The gradient with respect to b is ``2 p x``.
    """

    x: Array
    log: Array
    gradients: Callable[[Any, Any], Sequence[Array]]


def quadratic_and_logdet(A: LinearOperator, b: Array) -> tuple[Array, Array, Array] | None:
    """Return x without derivatives, and the two terms; None if A has no such form, or if values are traced."""
    if not is_known(b):
        return None
    found = _of_blocks(A) or _of_kronecker(A) or _of_members(A) or _of_low_rank(A)
    if found is None:
        return None
    arrays, compute = found
    fixed = [lapack(b).stop_gradient(a) for a in (b, *arrays)]
    views = small_views(*fixed, most=FEW)
    try:
        terms = compute(lapack(fixed[0]), *fixed) if views is None else _in_torch(compute(lapack(views[0]), *views))
    except (np.linalg.LinAlgError, RuntimeError):  # not positive definite; `solve` raises the error
        return None
    if backend_of(b) == "torch":
        return (terms.x, *_torch_terms().apply(terms, b, *arrays))
    return terms.x, lapack(b).real(b.conj() @ terms.x), terms.log


def _in_torch(terms: Terms) -> Terms:
    x, log = as_tensors(terms.x, terms.log)
    return Terms(x, log, lambda p, q: as_tensors(*terms.gradients(p.item(), q.item())))


@cache
def _torch_terms() -> Any:
    torch: Any = sys.modules["torch"]

    class LikelihoodTerms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, terms: Terms, b: Array, *arrays: Array) -> tuple[Array, Array]:
            ctx.terms = terms
            ctx.save_for_backward(b, *arrays)  # the gradients read their memory: torch raises if it has changed
            quadratic = torch.vdot(b, terms.x)
            return quadratic.real if b.is_complex() else quadratic, terms.log

        @staticmethod
        def backward(ctx: Any, p: Array, q: Array) -> tuple[Any, ...]:
            spectra.refuse_second_derivatives(torch)
            _, *arrays = ctx.saved_tensors
            gradients = ctx.terms.gradients(p, q) if any(ctx.needs_input_grad[2:]) else [None] * len(arrays)
            return None, 2 * p * ctx.terms.x, *gradients

    return LikelihoodTerms


def _log_of_pivots(xp: Any, lower: Array) -> Array:
    return 2 * xp.log(xp.real(xp.diagonal(lower))).sum()


def _adjoint(xp: Any, x: Array) -> Array:
    return xp.conj(x).swapaxes(-1, -2)


# -- positive definite: by Cholesky's decomposition --------------------------------------------------------------------


def _of_blocks(A: LinearOperator) -> Any:
    blocks = chains.matrix_blocks(A) if isinstance(A, StructuredOperator) and A.isa(PSD) else None

    def compute(xp: Any, b: Array, blocks: Array) -> Terms:
        lower = xp.cholesky(blocks)
        right = b.reshape((*blocks.shape[:2], 1))
        x = chains.require_regular(blocks, right, xp.substitute(lower, right))

        def gradients(p: Any, q: Any) -> list[Array]:
            return [q * xp.inverse_from_cholesky(lower) - p * (x @ _adjoint(xp, x))]

        return Terms(x.reshape(b.shape), _log_of_pivots(xp, lower), gradients)

    return None if blocks is None else ([blocks], compute)


def _of_kronecker(A: LinearOperator) -> Any:
    matrices = chains.kronecker_members(A, square=True) if isinstance(A, StructuredOperator) and A.isa(PSD) else None
    if matrices is None or not all(map(chains.is_positive_diagonal, matrices)):
        return None  # an even number of members may be negative definite or antisymmetric
    sizes = tuple(m.shape[0] for m in matrices)

    def compute(xp: Any, b: Array, *matrices: Array) -> Terms:
        lowers = [xp.cholesky(m) for m in matrices]

        def substituted(x: Array, k: int) -> Array:
            """Return the solution with member k, for a matrix whose rows belong to axis k."""
            y = xp.substitute(lowers[k], x)
            return chains.require_regular(matrices[k][None], x[None], y[None])[0]

        x = b
        for k in range(len(sizes)):
            x = _folded(xp, substituted(_unfolded(xp, x, sizes, k), k), sizes, k)

        def gradients(p: Any, q: Any) -> list[Array]:
            found = []
            for k, lower in enumerate(lowers):
                # This member maps the image to b, so the image is the product of the other members with x.
                image = xp.substitute(lower, _unfolded(xp, b, sizes, k))
                slope = q * (b.shape[0] // sizes[k]) * xp.inverse_from_cholesky(lower)
                found.append(slope - p * (_unfolded(xp, x, sizes, k) @ _adjoint(xp, image)))
            return found

        log = sum(b.shape[0] // n * _log_of_pivots(xp, lower) for n, lower in zip(sizes, lowers, strict=True))
        return Terms(x, log, gradients)

    return matrices, compute


def _unfolded(xp: Any, x: Array, sizes: tuple[int, ...], k: int) -> Array:
    """Return a vector as a matrix whose rows belong to axis k."""
    order = (k, *(j for j in range(len(sizes)) if j != k))
    return xp.permute(x.reshape(sizes), order).reshape((sizes[k], -1))


def _folded(xp: Any, x: Array, sizes: tuple[int, ...], k: int) -> Array:
    """Return the vector of a matrix of :func:`_unfolded`."""
    others = (*sizes[:k], *sizes[k + 1 :])
    order = (*range(1, k + 1), 0, *range(k + 1, len(sizes)))
    return xp.permute(x.reshape((sizes[k], *others)), order).reshape((-1,))


# -- Kronecker products and sums, plus a multiple of the identity ------------------------------------------------------


def _of_members(A: LinearOperator) -> Any:
    form = members(A)
    if form is None or not is_known(form.matrices[0]) or not form.hermitian:
        return None
    shift = [form.shift] if hasattr(form.shift, "dtype") else []
    sizes = tuple(m.shape[0] for m in form.matrices)

    def compute(xp: Any, b: Array, *arrays: Array) -> Terms:
        pairs = [xp.eigh(m) for m in arrays[: len(sizes)]]
        values = kronecker.outer([w for w, _ in pairs], form.add) + (arrays[-1] if shift else form.shift)
        scale = inverse_values(values, eps(values.dtype))
        vectors = Kronecker(*(v for _, v in pairs))
        y = scale * (vectors.H @ b)

        def gradients(p: Any, q: Any) -> list[Array]:
            """Return gradients, computed in the coordinates of the eigenvectors."""
            found = []
            for k, (_, v) in enumerate(pairs):
                weights = kronecker.outer([w * 0 + 1 if form.add or j == k else w for j, (w, _) in enumerate(pairs)])
                mine, image, slopes = (_unfolded(xp, z, sizes, k) for z in (y, y * weights, scale * weights))
                core = spectra.diagonal_matrices(q * slopes.sum(1)) - p * (mine @ _adjoint(xp, image))
                found.append(v @ core @ _adjoint(xp, v))
            more = [q * scale.sum() - p * (xp.abs(y) ** 2).sum()] if shift else []
            return [*found, *more]

        return Terms(vectors @ y, determinant_of_numbers(values).logabsdet, gradients)

    return [*form.matrices, *shift], compute


# -- a positive diagonal and U U^H -------------------------------------------------------------------------------------


def _of_low_rank(A: LinearOperator) -> Any:
    parts = _woodbury.woodbury(A) if isinstance(A, Sum) else None
    if parts is None or not parts.symmetric:
        return None

    def compute(xp: Any, b: Array, D: Array, U: Array, V: Array) -> Terms:
        base = inverse_values(D, 0.0)
        found = _woodbury.Woodbury(D, U, V, base, True)
        x = _woodbury.verified(found)(b)

        def gradients(p: Any, q: Any) -> list[Array]:
            left = base[:, None] * U
            inner = _adjoint(xp, xp.substitute(found.lower, _adjoint(xp, left)))  # A^-1 U
            of_diagonal = q * (base - (inner * xp.conj(left)).sum(1)) - p * xp.abs(x) ** 2
            of_left = q * inner - p * (x[:, None] * xp.conj(V @ x))
            return [of_diagonal, of_left, _adjoint(xp, of_left)]

        return Terms(x, xp.log(xp.real(D)).sum() + _log_of_pivots(xp, found.lower), gradients)

    return [parts.B, parts.U, parts.V], compute
