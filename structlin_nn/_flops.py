"""FLOPs of LAPACK's factorisations and of FFTs.

The formulas are those of Golub and Van Loan, *Matrix Computations* (4th edition, 2013), to leading order, with the
sections named below; LAPACK Working Note 41 (Blackford and Dongarra, 1999) has the same with lower orders. Iterations
(eigenvalues, singular values) take the usual number of steps. A multiply-accumulate is two FLOPs. An FFT of n complex
numbers takes ``5 n log2(n)`` FLOPs and one of real numbers half of that, by the convention of Frigo and Johnson (*The
design and implementation of FFTW3*, 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

_third = Fraction(1, 3)

FLOPS: dict[str, Callable[..., Fraction | int]] = {
    "lu": lambda m, n: min(m, n) ** 2 * (max(m, n) - min(m, n) * _third),  # section 3.2
    "lu_solve": lambda n, columns: 2 * n**2 * columns,  # section 3.1: two triangles
    "triangular_solve": lambda n, columns: n**2 * columns,
    "inverse": lambda n: 2 * n**3,  # Working Note 41: 2/3 n^3 for the factors and 4/3 n^3 for the rest
    "cholesky": lambda n: n**3 * _third,  # section 4.2
    "cholesky_inverse": lambda n: 2 * n**3 * _third,  # Working Note 41
    "ldl": lambda n: n**3 * _third,  # section 4.4
    "qr": lambda m, n: 2 * min(m, n) ** 2 * (max(m, n) - min(m, n) * _third),  # section 5.2.2
    # Section 5.1.6: the first columns of k reflectors of length m, and k reflectors on a matrix of n columns.
    "householder_product": lambda m, n, k: 4 * m * n * k - 2 * (m + n) * k**2 + 4 * k**3 * _third,
    "householder_apply": lambda m, n, k: 2 * n * k * (2 * m - k),
    "eigh": lambda n: 9 * n**3,  # section 8.3.5
    "eigvalsh": lambda n: 4 * n**3 * _third,
    "eig": lambda n: 25 * n**3,  # section 7.5.6
    "eigvals": lambda n: 10 * n**3,
    "hessenberg": lambda n: 10 * n**3 * _third,  # section 7.4.3
    "tridiagonal": lambda n: 4 * n**3 * _third,  # section 8.3.1
    "cholesky_update": lambda n: 3 * n**2,  # n rotations, each of 6 FLOPs for the numbers behind it
    # Section 8.6.3, by Golub and Reinsch, m >= n: singular values; thin factors; square ones.
    "svdvals": lambda m, n: 4 * m * n**2 - 4 * n**3 * _third,
    "svd": lambda m, n: 14 * m * n**2 + 8 * n**3,
    "svd_full": lambda m, n: 4 * m**2 * n + 8 * m * n**2 + 9 * n**3,
}
"""FLOPs of one matrix: m x n, or n x n; exact to leading order."""


def qr_flops(m: int, n: int, columns: int) -> Fraction | int:
    """Return the FLOPs of a QR decomposition with so many columns of Q."""
    return FLOPS["qr"](m, n) + (FLOPS["householder_product"](m, columns, min(m, n)) if columns else 0)


def svd_flops(m: int, n: int, vectors: bool, full: bool) -> Fraction | int:
    """Return the FLOPs of a singular value decomposition, with thin or full factors or the values alone."""
    return FLOPS["svdvals" if not vectors else "svd_full" if full else "svd"](max(m, n), min(m, n))


def fft_flops(n: int, real: bool = False) -> int:
    """Return the FLOPs of one transform of n numbers."""
    return math.ceil((2.5 if real else 5) * n * math.log2(n)) if n > 1 else 0
