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
import scipy.fft
import scipy.linalg
from scipy.linalg import blas, lapack

LEAST = 64
"""Least number of rows at which these functions are used."""

SMALL = 96
"""Largest number of rows at which LAPACK is the fastest."""

ITERATED = 512
"""Least number of rows at which the iteration is tried first."""

COMPILED = 1024
"""Largest number of rows at which SciPy's recursion follows a failed iteration for one right-hand side."""

LONGEST = 32768
"""Largest number of rows for which the recursion in Python follows a failed iteration; it takes a minute there."""

SLACK = 100  # times the distance of neighbouring numbers: the backward error that a refined solution may have
ITERATIONS = 60  # of a run of conjugate gradients
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
    """Product with the Toeplitz matrix of a kernel whose transform is computed once."""

    def __init__(self, kernel: np.ndarray, rows: int) -> None:
        self.rows, self.columns = rows, kernel.shape[0] - rows + 1
        self.real = not np.iscomplexobj(kernel)
        self.size = scipy.fft.next_fast_len(kernel.shape[0], self.real)
        self.transform = (scipy.fft.rfft if self.real else scipy.fft.fft)(kernel, self.size)[:, None]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the product with x of shape (columns, k), of shape (rows, k)."""
        if self.real and np.iscomplexobj(x):
            return self(x.real) + 1j * self(x.imag)
        forth, back = (scipy.fft.rfft, scipy.fft.irfft) if self.real else (scipy.fft.fft, scipy.fft.ifft)
        y = back(self.transform * forth(x, self.size, axis=0), self.size, axis=0)
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
    return bool(np.array_equal(kernel, kernel[::-1].conj()))


def solve(kernel: np.ndarray, b: np.ndarray, found: Columns | None = None) -> np.ndarray | None:
    """Return the solution for b of shape (n, k); None if no method reaches a backward error at roundoff."""
    n, k = b.shape
    size = float(np.abs(kernel).sum())  # exceeds |A|
    if found is None and n <= SMALL:
        return _by_lapack(kernel, b, size)
    A = Convolution(kernel, n)
    if found is None and n >= ITERATED:
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


def _norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->j", x.conj(), x).real)


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
    n = b.shape[0]
    j = np.arange(1, n)
    # T. Chan: the average of each wrapped diagonal, which is the nearest circulant matrix in the Frobenius norm.
    column = np.concatenate([kernel[n - 1 : n], ((n - j) * kernel[n:] + j * kernel[: n - 1]) / n])
    real = A.real
    forth, back = (scipy.fft.rfft, scipy.fft.irfft) if real else (scipy.fft.fft, scipy.fft.ifft)
    values = forth(column)[:, None]
    if not np.abs(values).min() > 1e-10 * np.abs(values).max():
        return None
    hermitian = is_hermitian(kernel) and bool((values.real > 0).all())

    def precondition(r: np.ndarray) -> np.ndarray:
        if real and np.iscomplexobj(r):
            return precondition(r.real) + 1j * precondition(r.imag)
        return back(forth(r, axis=0) / values, n, axis=0)

    step = _conjugate_gradients if hermitian else _bicgstab
    x = np.zeros(b.shape, np.result_type(kernel, b))
    limit = min(ITERATIONS, n // 48)  # with few rows, SciPy's recursion costs no more than so many iterations
    for _ in range(4):  # each restart reduces the residual by about 1e-8
        r = b - A(x)
        if np.all(_norms(r) <= 10 * _EPS * (size * _norms(x) + _norms(b))):
            return x if _is_good(A, x, b, size) else None
        correction = step(A, precondition, r, limit)
        if correction is None:
            return None
        x = x + correction
    return x if _is_good(A, x, b, size) else None


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->j", x.conj(), y)


def _safe(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def _conjugate_gradients(A: Convolution, M: Callable[..., np.ndarray], b: np.ndarray, limit: int) -> np.ndarray | None:
    x, r = np.zeros_like(b), b
    p = z = M(r)
    rho, target = _dots(r, z), 1e-8 * _norms(b)
    for _ in range(limit):
        q = A(p)
        alpha = rho / _safe(_dots(p, q))
        x, r = x + alpha * p, r - alpha * q
        if np.all(_norms(r) <= target):
            return x
        z = M(r)
        rho, old = _dots(r, z), rho
        p = z + rho / _safe(old) * p
    return None


def _bicgstab(A: Convolution, M: Callable[..., np.ndarray], b: np.ndarray, limit: int) -> np.ndarray | None:
    x, r, shadow = np.zeros_like(b), b, b
    p, rho, target = r, _dots(b, b), 1e-8 * _norms(b)
    for _ in range(limit // 2):
        p_hat = M(p)
        v = A(p_hat)
        alpha = rho / _safe(_dots(shadow, v))
        s = r - alpha * v
        s_hat = M(s)
        t = A(s_hat)
        omega = _dots(t, s) / _safe(_dots(t, t))
        x, r = x + alpha * p_hat + omega * s_hat, s - omega * t
        size = _norms(r)
        if np.all(size <= target):
            return x
        if not np.isfinite(size).all():
            return None
        rho, old = _dots(shadow, r), rho
        p = r + rho / _safe(old) * (alpha / _safe(omega)) * (p - omega * v)
    return None
