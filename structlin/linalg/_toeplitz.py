"""Inverse, solution and determinant of square Toeplitz matrices in O(n^2), from two columns of the inverse.

The recursion of Levinson (1946) and Durbin (1960), for matrices that need not be symmetric, extends the first and the
last column from one leading submatrix to the next; the determinants of neighbours have the ratios that it divides by.
The formula of Gohberg and Semencul (1972) makes of them an inverse that four Toeplitz matrices apply by FFT.

The recursion is stable where all leading submatrices are well conditioned, which a Toeplitz matrix need not have to be
well conditioned itself. So its pivots are looked at, the inverse is tried on a fixed random vector, every solution's
residual is computed, and None is returned where one of them is bad: the dense matrix, pivoted, then takes over. It also
does where numbers can not be looked at (in transformations, but for solutions in those of jax, where the choice is
compiled), away from the CPU, and for fewer rows than ``LEAST``, where it is as fast.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import scipy.linalg
from cola.ops import LinearOperator, Product, Sum
from scipy.linalg import blas

from structlin._arrays import Array, backend_of, ops, to_backend
from structlin.linalg._common import fits_dense, is_backward_stable
from structlin.linalg._lapack import eps, is_known, is_plain, lapack, needs_grad, require_precision
from structlin.operators import StructuredOperator
from structlin.structures.toeplitz import Toeplitz

LEAST = 256
"""Rows from which on the recursion is faster than LAPACK: measured, 0.7 to 1.2 ms at 256 and 17 to 1300 at 4096."""

_ROUNDOFF = 100  # times the distance of neighbouring numbers: the relative residual that a refined solution may have


@dataclass(frozen=True)
class Columns:
    """The first and the last column of the inverse, in double precision, and the ratios of the leading determinants."""

    first: np.ndarray
    last: np.ndarray
    pivots: np.ndarray

    def adjoint(self) -> Columns:
        """Of the conjugate transpose: turned by half a turn, a Toeplitz matrix is its own transpose."""
        return Columns(self.last[::-1].conj(), self.first[::-1].conj(), self.pivots.conj())


def recursion(kernel: np.ndarray) -> Columns | None:
    """From all 2 n - 1 diagonals; None where a leading submatrix is nearly singular."""
    n = (kernel.shape[0] + 1) // 2
    lower, upper = np.ascontiguousarray(kernel[n:][::-1]), np.ascontiguousarray(kernel[: n - 1][::-1])
    complex_ = np.iscomplexobj(kernel)
    dot, axpy = (blas.zdotu, blas.zaxpy) if complex_ else (blas.ddot, blas.daxpy)
    # Up to the pivot, the columns for m rows: ``first`` stands in the first m places, ``last`` in the last m.
    first, last, old = (np.zeros(n, kernel.dtype) for _ in range(3))
    first[0] = last[-1] = 1
    pivot, pivots = kernel[n - 1].item(), np.empty(n, kernel.dtype)
    smallest = eps(kernel.dtype) ** 0.25 * float(np.abs(kernel).max())
    for m in range(n):
        if m:
            below, above = dot(lower, first, n=m, offx=n - 1 - m) / pivot, dot(upper, last, n=m, offy=n - m) / pivot
            old[:m] = first[:m]
            axpy(last, first, n=m + 1, a=-below, offx=n - 1 - m)
            axpy(old, last, n=m, a=-above, offy=n - 1 - m)
            pivot *= 1 - below * above
        pivots[m] = pivot
        if not abs(pivot) > smallest:  # also where it is NaN
            return None
    return Columns(first / pivot, last / pivot, pivots)


def inverse_from(first: Array, last: Array) -> LinearOperator:
    """The inverse from its first and last column: the formula of Gohberg and Semencul."""
    xp = ops(backend_of(first))
    none, forth, back = first[1:] * 0, xp.flip(first), xp.flip(last)
    scaled, zero = first / first[0], first[:1] * 0
    left = Product(Toeplitz(scaled, none), Toeplitz(xp.concat([back[:1], none]), back[1:]))
    shifted = xp.concat([zero, last[:-1] / -first[0]])
    return Sum(left, Product(Toeplitz(shifted, none), Toeplitz(xp.concat([zero, none]), forth[:-1])))


def columns(A: StructuredOperator) -> Columns | None:
    """None for few rows, where numbers can not be looked at, and where they are not accurate."""
    kernel = A.factors[0]
    require_precision(kernel, "an inverse")
    if A.shape[0] < LEAST or not _on_the_host(kernel):
        return None
    numbers = _numbers(kernel)
    found = recursion(numbers)
    if found is None:
        return None
    matrix, inverse = Toeplitz.from_kernel(numbers, A.shape[0]), inverse_from(found.first, found.last)
    return found if is_backward_stable(matrix, inverse.__matmul__) else None


def inverse(A: StructuredOperator) -> LinearOperator | None:
    found = columns(A)
    if found is None:
        return None
    kernel = A.factors[0]
    if needs_grad(kernel):
        ends = np.zeros((A.shape[0], 2), found.first.dtype)
        ends[0, 0] = ends[-1, 1] = 1
        both = _functions().solution.apply(found, kernel, to_backend(ends, "torch", kernel.dtype))
        made = inverse_from(both[:, 0], both[:, 1])
    else:
        made = inverse_from(_like(found.first, kernel), _like(found.last, kernel))
    return made if is_backward_stable(A, made.__matmul__) else None


def solve(A: StructuredOperator, b: Array) -> Array | None:
    """A^-1 b for b of shape (n,) or (n, k): O(n^2 + k n log n)."""
    kernel = A.factors[0]
    if backend_of(b) == "jax" and not (is_known(kernel) and is_known(b)):
        return _traced_solution(kernel, b) if b.shape[0] >= LEAST and fits_dense(A) else None
    found = columns(A) if _on_the_host(b) else None
    if found is None:
        return None
    if needs_grad(kernel) or needs_grad(b):
        return _functions().solution.apply(found, kernel, b)
    x = _refined(found, _numbers(kernel), _numbers(b))
    return None if x is None else _like(x, b)


def slogdet(A: StructuredOperator) -> tuple[Array, Array] | None:
    found = columns(A)
    if found is None:
        return None
    kernel = A.factors[0]
    if needs_grad(kernel):
        return _functions().determinant.apply(found, kernel)
    sign, log = _determinant(found)
    real = lapack(kernel).real(kernel)
    return _like(sign, kernel), _like(log, real)


def _determinant(found: Columns) -> tuple[np.ndarray, np.ndarray]:
    size = np.abs(found.pivots)
    return np.prod(found.pivots / size).reshape(()), np.log(size).sum().reshape(())


def _refined(found: Columns, kernel: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """With one step of iterative refinement; None where the residual of a column is more than roundoff."""
    A, inverse = Toeplitz.from_kernel(kernel, b.shape[0]), inverse_from(found.first, found.last)
    x = inverse @ b
    x = x + inverse @ (b - A @ x)
    bound = np.abs(kernel).sum() * np.linalg.norm(x, axis=0) + np.linalg.norm(b, axis=0)  # the sum exceeds |A|
    good = np.linalg.norm(b - A @ x, axis=0) <= _ROUNDOFF * eps(kernel.dtype) * bound
    return x if np.all(good) else None


def _on_the_host(x: Array) -> bool:
    """Whether NumPy can have the numbers without a copy between devices."""
    backend = backend_of(x)
    if backend == "torch":
        return is_plain(x.detach())
    return is_known(x) and (backend == "numpy" or next(iter(x.devices())).platform == "cpu")


def _numbers(x: Array) -> np.ndarray:
    """In double precision."""
    x = np.asarray(x.detach() if hasattr(x, "detach") else x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64, copy=False)


def _like(x: np.ndarray, example: Array) -> Array:
    return to_backend(np.array(x), backend_of(example), example.dtype)


# -- transformations of jax --------------------------------------------------------------------------------------------


def _traced_solution(kernel: Array, b: Array) -> Array:
    """Differentiable as the solution of a linear system, however it was found."""
    import jax.numpy as jnp
    from jax import lax

    n, tolerance = b.shape[0], _ROUNDOFF * eps(b.dtype)

    def multiply(kernel: Array, x: Array) -> Array:
        return Toeplitz.from_kernel(kernel, n) @ x

    def dense(kernel: Array, b: Array) -> Array:
        rows = jnp.arange(n)
        return jnp.linalg.solve(kernel[rows[:, None] - rows + n - 1], b)

    def fast(kernel: Array, b: Array) -> Array:
        first, last, regular = _traced_recursion(kernel)
        inverse = inverse_from(first, last)
        x = inverse @ b
        x = x + inverse @ (b - multiply(kernel, x))
        norm = jnp.linalg.norm
        bound = jnp.abs(kernel).sum() * norm(x, axis=0) + norm(b, axis=0)
        good = regular & jnp.all(norm(b - multiply(kernel, x), axis=0) <= tolerance * bound)
        return lax.cond(good, lambda: x, lambda: dense(kernel, b))

    def solve(kernel: Array) -> Any:
        return lambda _, b: lax.platform_dependent(kernel, b, cpu=fast, default=dense)

    return lax.custom_linear_solve(partial(multiply, kernel), b, solve(kernel), solve(kernel[::-1]))


def _traced_recursion(kernel: Array) -> tuple[Array, Array, Array]:
    """As :func:`recursion`: the two columns, and whether they were found."""
    import jax.numpy as jnp
    from jax import lax

    n = (kernel.shape[0] + 1) // 2
    descending, zeros = kernel[::-1], jnp.zeros(n, kernel.dtype)
    smallest = eps(kernel.dtype) ** 0.25 * jnp.abs(kernel).max()

    def extend(m: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        first, last, pivot, least = state
        below = lax.dynamic_slice(descending, (n - 1 - m,), (n,)) @ first / pivot
        above = lax.dynamic_slice(descending, (m,), (n,)) @ last / pivot
        forward = lax.dynamic_slice(jnp.concatenate([last, zeros]), (n - 1 - m,), (n,))
        backward = lax.dynamic_slice(jnp.concatenate([zeros, first]), (m + 1,), (n,))
        pivot = pivot * (1 - below * above)
        return first - below * forward, last - above * backward, pivot, jnp.minimum(least, jnp.abs(pivot))

    pivot = kernel[n - 1]
    state = (zeros.at[0].set(1), zeros.at[-1].set(1), pivot, jnp.abs(pivot))
    first, last, pivot, least = lax.fori_loop(1, n, extend, state)
    return first / pivot, last / pivot, least > smallest


# -- gradients of torch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Functions:
    solution: Any
    determinant: Any


@cache
def _functions() -> _Functions:
    torch: Any = sys.modules["torch"]

    class Solution(torch.autograd.Function):
        """By implicit differentiation: dx = A^-1 (db - dA x)."""

        @staticmethod
        def forward(ctx: Any, found: Columns, kernel: Array, b: Array) -> Array:
            numbers, right = _numbers(kernel), _numbers(b)
            x = _refined(found, numbers, right)
            if x is None:
                n = right.shape[0]
                x = np.linalg.solve(scipy.linalg.toeplitz(numbers[n - 1 :], numbers[:n][::-1]), right)
            made = _like(x, b)
            ctx.found = found
            ctx.save_for_backward(kernel, made)
            return made

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> tuple[Any, ...]:
            kernel, x = ctx.saved_tensors
            adjoint = kernel.flip(0).conj().resolve_conj()
            carried = Solution.apply(ctx.found.adjoint(), adjoint, gradient.resolve_conj())
            if not ctx.needs_input_grad[1]:
                return None, None, carried
            wide, rows = (carried[:, None], x[:, None]) if x.ndim == 1 else (carried, x)
            return None, -_diagonal_sums(wide, rows.conj()).sum(1), carried

    class Determinant(torch.autograd.Function):
        """d log det A = tr(A^-1 dA): the sums of the diagonals of the inverse."""

        @staticmethod
        def forward(ctx: Any, found: Columns, kernel: Array) -> tuple[Array, Array]:
            sign, log = _determinant(found)
            made = _like(sign, kernel)
            ctx.found = found
            ctx.save_for_backward(kernel, made)
            return made, _like(log, lapack(kernel).real(kernel))

        @staticmethod
        def backward(ctx: Any, of_sign: Array, of_log: Array) -> tuple[Any, ...]:
            kernel, sign = ctx.saved_tensors
            n = (kernel.shape[0] + 1) // 2
            ends = torch.zeros((n, 2), dtype=kernel.dtype)
            ends[0, 0] = ends[-1, 1] = 1
            both = Solution.apply(ctx.found, kernel, ends)
            sums = _sums_of_inverse(both[:, 0], both[:, 1]).flip(0).conj()
            if kernel.is_complex():
                turned = 1j * (of_sign.conj() * 1j * sign).real
                return None, (of_log + turned) * sums
            return None, of_log * sums

    return _Functions(Solution, Determinant)


def _diagonal_sums(x: Array, y: Array) -> Array:
    """Of the matrix x y^T: entry n - 1 + d is the sum of all x_i y_j with i - j = d; columns by themselves."""
    torch: Any = sys.modules["torch"]
    n, fft = x.shape[0], torch.fft
    forth, back = (fft.fft, fft.ifft) if x.is_complex() else (fft.rfft, fft.irfft)
    return back(forth(x, 2 * n, 0) * forth(y.flip(0), 2 * n, 0), 2 * n, 0)[: 2 * n - 1]


def _sums_of_inverse(first: Array, last: Array) -> Array:
    """The sums of the diagonals of the inverse, ordered as a kernel.

    A product of a lower and an upper triangular Toeplitz matrix, of the vectors x and y, has the sums of
    (n - max(i, j)) x_i y_j over i - j = d.
    """
    torch: Any = sys.modules["torch"]
    n = first.shape[0]
    zero = first[:1] * 0
    lower = torch.stack([first, torch.cat([zero, -last[:-1]])], 1)
    upper = torch.stack([last.flip(0), torch.cat([zero, first.flip(0)[:-1]])], 1)
    weights = torch.arange(n, 0, -1, dtype=first.real.dtype)[:, None]
    below, above = _diagonal_sums(lower * weights, upper), _diagonal_sums(lower, upper * weights)
    return torch.cat([above[: n - 1], below[n - 1 :]]).sum(1) / first[0]
