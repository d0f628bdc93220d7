"""Toeplitz systems on the CPU: recursions, the formula of Gohberg and Semencul, circulant preconditioning.

All functions take the 2 n - 1 diagonals of a square matrix, in double precision. There are four methods:

- LAPACK on the dense matrix is the fastest for few rows.
- SciPy's compiled recursion costs O(n^2) for each right-hand side. It follows for one right-hand side and up to
  some hundred rows.
- Conjugate gradients (for Hermitian positive definite matrices) or BiCGSTAB with the circulant preconditioner of
  T. Chan (1988) cost O(n log n) for each iteration. Few iterations suffice if the symbol is smooth and has no zero.
- The recursion of Levinson (1946) and Durbin (1960) extends the first and the last column of the inverse from one
  leading submatrix to the next, in O(n^2). Each right-hand side then costs O(n log n) (Gohberg and Semencul 1972). The
  pivots, by which the recursion divides, are the ratios of the determinants of successive leading submatrices.

The recursions are stable if all leading submatrices are well conditioned. A well-conditioned Toeplitz matrix can have
ill-conditioned leading submatrices. So the residual of every solution is computed, and None is returned if it exceeds
roundoff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.fft import next_fast_len
from scipy.linalg import blas, lapack

from structlin._arrays import Array, backend_of, ops
from structlin._iterations import Apply, bicgstab, conjugate_gradients, iterate

LEAST = 64
"""Least number of rows at which these functions are used."""

SMALL = 96
"""Largest number of rows at which LAPACK is the fastest."""

ITERATED = 512
"""Least number of rows at which the iteration is tried first."""

ITERATED_ALONE = 768
"""The same for one right-hand side, for which SciPy's recursion is faster on fewer rows (0.8 ms at 768)."""

COMPILED = 1024
"""Largest number of rows at which SciPy's recursion follows a failed iteration for one right-hand side."""

LONGEST = 32768
"""Largest number of rows for which the recursion in Python follows a failed iteration; it takes a minute there."""

SLACK = 100  # times the distance of neighbouring numbers: the backward error that a refined solution may have
ITERATIONS = 60  # of a run of an iteration
RESTARTS = 4
_EPS = 2.0**-52


@dataclass(frozen=True)
class Columns:
    """First and last column of the inverse, in double precision, and the ratios of successive leading determinants."""

    first: np.ndarray
    last: np.ndarray
    pivots: np.ndarray

    def adjoint(self) -> Columns:
        """Return those of the conjugate transpose: reversing rows and columns of a Toeplitz matrix transposes it."""
        return Columns(self.last[::-1].conj(), self.first[::-1].conj(), self.pivots.conj())


def recursion(kernel: np.ndarray) -> Columns | None:
    """Return the columns from all 2 n - 1 diagonals; None if a leading submatrix is nearly singular."""
    n = (kernel.shape[0] + 1) // 2
    lower, upper = np.ascontiguousarray(kernel[n:][::-1]), np.ascontiguousarray(kernel[: n - 1][::-1])
    complex_ = np.iscomplexobj(kernel)
    dot, axpy = (blas.zdotu, blas.zaxpy) if complex_ else (blas.ddot, blas.daxpy)
    # The columns for m rows times the pivot: ``first`` in its first m entries, ``last`` in its last m.
    first, last, old = (np.zeros(n, kernel.dtype) for _ in range(3))
    first[0] = last[-1] = 1
    pivot, pivots = kernel[n - 1].item(), np.empty(n, kernel.dtype)
    smallest = _EPS**0.25 * float(np.abs(kernel).max())
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


class Convolution:
    """Product with the Toeplitz matrix of a kernel of NumPy or jax whose transform is computed once."""

    def __init__(self, kernel: Array, rows: int) -> None:
        self.rows, self.columns = rows, kernel.shape[0] - rows + 1
        self.xp = ops(backend_of(kernel))
        self.real = not self.xp.is_complex(kernel)
        self.size = next_fast_len(kernel.shape[0], self.real)
        self.transform = (self.xp.rfft if self.real else self.xp.fft)(kernel, self.size, 0)[:, None]

    def __call__(self, x: Array) -> Array:
        """Return the product with x of shape (columns, k), of shape (rows, k)."""
        if self.real and self.xp.is_complex(x):
            return self(x.real) + 1j * self(x.imag)
        forth, back = (self.xp.rfft, self.xp.irfft) if self.real else (self.xp.fft, self.xp.ifft)
        y = back(self.transform * forth(x, self.size, 0), self.size, 0)
        return y[self.columns - 1 : self.columns - 1 + self.rows]


def inverse_product(found: Columns) -> Callable[[np.ndarray], np.ndarray]:
    """Return the product with the inverse by the formula of Gohberg and Semencul, with four triangular matrices."""
    first, last, none = found.first, found.last, np.zeros(len(found.first) - 1, found.first.dtype)
    zero = none[:1] if len(none) else np.zeros(1, first.dtype)
    a = Convolution(np.concatenate([none, first / first[0]]), len(first))
    b = Convolution(np.concatenate([last, none]), len(first))
    c = Convolution(np.concatenate([none, zero, last[:-1] / -first[0]]), len(first))
    d = Convolution(np.concatenate([first[1:], zero, none]), len(first))
    return lambda x: a(b(x)) + c(d(x))


def is_hermitian(kernel: np.ndarray) -> bool:
    return bool((kernel == kernel[::-1].conj()).all())


def solve(kernel: np.ndarray, b: np.ndarray, found: Columns | None = None) -> np.ndarray | None:
    """Return the solution for b of shape (n, k); None if no method reaches a backward error at roundoff."""
    n, k = b.shape
    size = float(np.abs(kernel).sum())  # exceeds |A|
    if found is None and n <= SMALL:
        return _by_lapack(kernel, b, size)
    A = Convolution(kernel, n)
    if found is None and n >= (ITERATED if k > 1 else ITERATED_ALONE):
        x = _preconditioned(kernel, A, b, size)
        if x is not None:
            return x
    if found is None and k == 1 and n <= COMPILED and kernel[n - 1] != 0:
        try:
            x = scipy.linalg.solve_toeplitz((kernel[n - 1 :], kernel[:n][::-1]), b)
        except np.linalg.LinAlgError:
            return None
        if _is_good(A, x, b, size):
            return x
    if found is None:
        found = recursion(kernel) if n <= LONGEST else None
    if found is None:
        return None
    inverse = inverse_product(found)
    x = inverse(b)
    for _ in range(2):
        x = x + inverse(b - A(x))
        if _is_good(A, x, b, size):
            return x
    return None


def _by_lapack(kernel: np.ndarray, b: np.ndarray, size: float) -> np.ndarray | None:
    """Solve with the dense matrix, by Cholesky's decomposition if it is Hermitian and positive."""
    n, step = b.shape[0], kernel.itemsize
    kernel = np.ascontiguousarray(kernel)
    # A view: entry (i, j) is kernel[n - 1 + i - j].
    matrix: np.ndarray = np.ndarray((n, n), kernel.dtype, kernel, (n - 1) * step, (step, -step))
    failed, x = 1, b
    if kernel[n - 1].real > 0 and is_hermitian(kernel):
        complex_ = np.iscomplexobj(kernel) or np.iscomplexobj(b)
        _, x, failed = (lapack.zposv if complex_ else lapack.dposv)(matrix, b, lower=1)
    if failed:
        try:
            x = np.linalg.solve(matrix, b)
        except np.linalg.LinAlgError:
            return None
    return x if _is_good(matrix.__matmul__, x, b, size) else None


def _norms(x: np.ndarray) -> np.ndarray | np.floating:
    if x.shape[1] == 1:  # one number: further operations take a fraction of the time of those of arrays
        return np.sqrt(np.vdot(x, x).real)
    return np.sqrt(np.einsum("ij,ij->j", x.conj() if np.iscomplexobj(x) else x, x).real)


def _is_good(A: Callable[[np.ndarray], np.ndarray], x: np.ndarray, b: np.ndarray, size: float) -> bool:
    """Whether the backward error is at roundoff, and x not as large as the roundoff of a singular matrix makes it."""
    lengths, right = _norms(x), _norms(b)
    if not np.isfinite(lengths).all():
        return bool(np.isnan(b).any())
    if not (size * lengths <= right * (0.1 / _EPS)).all():
        return False
    return bool((_norms(b - A(x)) <= SLACK * _EPS * (size * lengths + right)).all())


def _preconditioned(kernel: np.ndarray, A: Convolution, b: np.ndarray, size: float) -> np.ndarray | None:
    """Solve by conjugate gradients or BiCGSTAB, preconditioned by the nearest circulant matrix; refine by restarts."""
    values, precondition = circulant_preconditioner(kernel)
    if not np.abs(values).min() > 1e-10 * np.abs(values).max():
        return None
    positive = is_hermitian(kernel) and bool((values.real > 0).all())
    # A step of BiCGSTAB has two products.
    start, limit = (
        (conjugate_gradients, most_iterations(len(b))) if positive else (bicgstab, most_iterations(len(b)) // 2)
    )

    def run(r: np.ndarray) -> np.ndarray | None:
        (state, step), target = start(A, precondition, r), 1e-8 * _norms(r)
        state = iterate(step, lambda state: (_norms(state[1]) > target).any(), state, limit, False)
        return state[0] if (_norms(state[1]) <= target).all() else None

    x = np.zeros(b.shape, np.result_type(kernel, b))
    for _ in range(RESTARTS):  # each run gains about half of the digits
        r = b - A(x)
        if np.all(_norms(r) <= 10 * _EPS * (size * _norms(x) + _norms(b))):
            break
        more = run(r)
        if more is None:
            return None
        x = x + more
    return x if _is_good(A, x, b, size) else None


def most_iterations(n: int) -> int:
    """Return the limit of one run: with few rows, SciPy's recursion costs no more than so many iterations."""
    return min(ITERATIONS, n // 48)


def circulant_preconditioner(kernel: Array) -> tuple[Array, Apply]:
    """Return the eigenvalues of the circulant matrix of T. Chan, and the product with its inverse.

    It is the nearest one in the Frobenius norm: each entry is the average of a wrapped diagonal.
    """
    xp, n = ops(backend_of(kernel)), (kernel.shape[0] + 1) // 2
    j = np.arange(1, n).astype(str(kernel.real.dtype))
    column = xp.concat([kernel[n - 1 : n], ((n - j) * kernel[n:] + j * kernel[: n - 1]) / n])
    real = not xp.is_complex(kernel)
    forth, back = (xp.rfft, xp.irfft) if real else (xp.fft, xp.ifft)
    values = forth(column, n, 0)[:, None]

    def precondition(r: Array) -> Array:
        if real and xp.is_complex(r):
            return precondition(r.real) + 1j * precondition(r.imag)
        return back(forth(r, n, 0) / values, n, 0)

    return values, precondition
