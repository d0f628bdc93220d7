"""Circulant matrices, applied by FFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Unitary

from structlin import _spectra as spectra
from structlin._arrays import Array, backend_of, ops
from structlin._lapack import (
    as_tensors,
    determinant_of_numbers,
    eps,
    inverse_values,
    lapack,
    phases,
    promoted,
    reciprocals,
    require_precision,
    small_views,
)
from structlin.registry import NamedOperator, register
from structlin.structure import Factor
from structlin.structures._convolution import fft_product, product_flops, real_fft_flops
from structlin.structures._square import SquareStructure, length_of, size_of
from structlin.structures._vectors import descending, tied_nearest
from structlin.structures.diagonal import Diagonal
from structlin.structures.fourier import Fourier
from structlin.verdicts import SVD, Answer, Determinant, Eigen, Nearest


class CirculantStructure(SquareStructure):
    """Structure of a (size, size) circulant matrix; counts hold for real data."""

    @staticmethod
    def _factor(size: int) -> Factor:
        return Factor("column", (size,), fan_in=size, fan_out=size)

    @property
    def other_flops(self) -> dict[str, int]:
        """FLOPs of two real FFTs and an elementwise product."""
        return product_flops(self.size)

    @property
    def setup_flops(self) -> dict[str, int]:
        """FLOPs of the transform of the column."""
        return {"fft": real_fft_flops(self.size)}

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Reverse the column, with its first entry in place."""
        xp = ops(backend_of(factors[0]))
        return (xp.roll(xp.flip(factors[0]), 1),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return fft_product(factors[0], x, self.size, -1, xp)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return fft_product(factors[0], x, self.size, 0, xp)

    # -- algebra: the eigenvalues are the Fourier transform of the column

    def inverse(self, A: Any) -> Answer[Any]:
        """Return the circulant matrix of the reciprocal eigenvalues."""
        column = A.factors[0]
        require_precision(column, "an inverse")
        forth, back = _transforms(column)
        values = spectra.require_positive(forth(column), A.isa(PSD))
        return Answer(Circulant(back(inverse_values(values, eps(column.dtype)))))

    def pinv(self, A: Any) -> Answer[Any]:
        """Return the circulant matrix of the reciprocals of the nonzero eigenvalues."""
        require_precision(A.factors[0], "a pseudo-inverse")
        xp = lapack(A.factors[0])
        column = xp.ifft(reciprocals(xp.fft(A.factors[0], self.size, 0)), self.size, 0)
        return Answer(Circulant(column if xp.is_complex(A.factors[0]) else xp.real(column)))

    def solve(self, A: Any, b: Array) -> Answer[Array]:
        """Divide the transform of b by the eigenvalues."""
        column = A.factors[0]
        require_precision(b, "solving")
        views = _views(column, b) if b.ndim == 1 or b.shape[1] == 1 else None
        positive = A.isa(PSD)
        return Answer(_divided(positive, column, b) if views is None else as_tensors(_divided(positive, *views))[0])

    def slogdet(self, A: Any) -> Answer[Determinant]:
        """Multiply the eigenvalues."""
        column = A.factors[0]
        require_precision(column, "a determinant")
        views = _views(column)
        if views is not None:
            return Answer(Determinant(*as_tensors(*_determinant(A.isa(PSD), *views))))
        return Answer(_determinant(A.isa(PSD), column))

    def diagonal(self, A: Any, k: int) -> Answer[Array]:
        """Repeat the entry of the k-th diagonal."""
        column = A.factors[0]
        return Answer(column[-k % self.size] + lapack(column).zeros((self.size - abs(k),), column))

    def eig(self, A: Any) -> Answer[Eigen]:
        """Return the transform of the column, with the Fourier vectors."""
        column = A.factors[0]
        xp = lapack(column)
        values = xp.fft(column, self.size, 0)
        forward = Fourier.like(A)
        vectors = Unitary(forward.H)
        values = xp.real(values) if A.isa(SelfAdjoint) else values
        return Answer(Eigen(values, vectors, lambda: forward, normal=True))

    def svd(self, A: Any) -> Answer[SVD]:
        """Return the absolute values of the eigenvalues, in descending order, with their vectors."""
        forward = Fourier.like(A)
        size, signs = phases(lapack(A.factors[0]).fft(A.factors[0], self.size, 0))
        return Answer(descending(forward.H @ Diagonal(signs), size, forward))

    def function(self, A: Any, f: Any) -> Answer[Any]:
        """Apply f to the eigenvalues."""
        column, n = A.factors[0], self.size
        require_precision(column, f.name)
        xp = lapack(column)
        real = not xp.is_complex(column) and (f.real or A.isa(PSD))
        values = (xp.rfft if real else xp.fft)(column, n, 0)
        radius = spectra.HERMITIAN_ROUNDOFF * eps(column.dtype) * abs(xp.stop_gradient(column)).sum()
        found = f.on_spectrum(f.settled(values, radius), A) + 0j
        return Answer(Circulant((xp.irfft if real else xp.ifft)(found, n, 0)))

    def power(self, A: Any, k: int) -> Answer[Any]:
        """Raise the eigenvalues to the power k."""
        forth, back = _transforms(A.factors[0])
        return Answer(Circulant(back(forth(A.factors[0]) ** k)))

    def frobenius_norm(self, A: Any) -> Answer[Array]:
        """Return sqrt(d) times the norm of the column."""
        return Answer(lapack(A.factors[0]).norm(A.factors[0]) * math.sqrt(self.size))

    def spectral_norm(self, A: Any) -> Answer[Array]:
        """Return the largest absolute value of the eigenvalues."""
        xp = lapack(A.factors[0])
        return Answer(xp.max(xp.abs(xp.fft(A.factors[0], self.size, 0))))

    def product(self, A: Any, B: Any) -> Answer[Any] | None:
        """Multiply the eigenvalues of two circulant matrices."""
        if not isinstance(B.structure, CirculantStructure):
            return None
        x, y = promoted(A.factors[0], B.factors[0])
        forth, back = _transforms(x)
        return Answer(Circulant(back(forth(x) * forth(y))))

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Add the columns of two circulant matrices."""
        if isinstance(B.structure, CirculantStructure):
            return Answer(Circulant(A.factors[0] + B.factors[0]))
        return None

    def shifted(self, A: Any, value: Any) -> Answer[Any] | None:
        """Add a number to the first entry of the column."""
        if getattr(value, "ndim", 0):
            return None
        column = A.factors[0]
        return Answer(Circulant(column + value * lapack(column).index(np.arange(self.size) == 0, column)))

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        """Average the entries of each cyclic diagonal; with a covariance, solve least squares."""
        i = np.arange(self.size)
        return tied_nearest((i[:, None] - i) % self.size, self.size, target, covariance)

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the matrix with entries ``column[(i - j) mod d]``."""
        i = np.arange(self.size)
        return factors[0][(i[:, None] - i) % self.size]


def _views(*arrays: Array) -> list[np.ndarray] | None:
    """Return NumPy's views of tensors without gradients: it transforms a vector in half the time of torch."""
    return small_views(*arrays, most=math.inf)


def _determinant(positive: bool, column: Array) -> Determinant:
    xp, n = lapack(column), column.shape[0]
    if xp.is_complex(column):
        return determinant_of_numbers(spectra.require_positive(xp.fft(column, n, 0), positive))
    # Eigenvalues of a real circulant matrix are real at frequency 0 and n / 2, and come in conjugate pairs between.
    spectrum = spectra.require_positive(xp.rfft(column, n, 0), positive)
    paired = spectrum[1 : (n + 1) // 2]
    alone = spectrum[:1] if n % 2 else xp.concat([spectrum[:1], spectrum[n // 2 :]])
    sign, log = determinant_of_numbers(xp.real(alone))
    if paired.shape[0]:
        regular, pairs = determinant_of_numbers(xp.abs(paired))
        sign, log = sign * regular, log + 2 * pairs
    return Determinant(sign, log)


def _divided(positive: bool, column: Array, b: Array) -> Array:
    forth, back = _transforms(column)
    scale = inverse_values(spectra.require_positive(forth(column), positive), eps(column.dtype))
    return back((scale if b.ndim == 1 else scale[:, None]) * forth(b))


def _transforms(column: Array) -> tuple[Any, Any]:
    """Return the Fourier transform along the first axis and its inverse; for real values, of half the spectrum."""
    xp, n = lapack(column), column.shape[0]
    forth, back = (xp.fft, xp.ifft) if xp.is_complex(column) else (xp.rfft, xp.irfft)
    return (lambda x: forth(x, n, 0)), (lambda x: back(x, n, 0))


@register("circulant")
class Circulant(NamedOperator):
    r"""Circulant matrix: each column is the one before it, shifted cyclically by one row; applied by FFT.

    .. math:: A_{ij} = c_{(i - j) \bmod d}

    The factor is the first column c, of shape (d,): d parameters. A product with a real vector costs two real FFTs of
    length d, of :math:`2.5 \, d \log_2 d` FLOPs each, and an elementwise product. The FFT of the column is computed
    once for each call.

    Each output is a sum over d inputs, so both fans are d. If the entries of c are independent with deviation
    :math:`1 / \sqrt d`, the spectral norm is of order :math:`\sqrt{\log d}`.

    Parameters
    ----------
    *factors
        The first column, of shape (d,).

    Examples
    --------
    >>> import numpy as np
    >>> Circulant(np.array([0.0, 1.0, 0.0])).to_dense().round()
    array([[0., 0., 1.],
           [1., 0., 0.],
           [0., 1., 0.]])
    """

    formula = "y_i = sum_j c_(i - j mod d) x_j"
    parameters = "d"
    source = "Gray (2006), Toeplitz and Circulant Matrices: A Review"
    examples = (((5, 5), {}), ((6, 6), {}), ((1, 1), {}))

    @staticmethod
    def design(shape: tuple[int, int], /) -> CirculantStructure:
        """Return the structure of a (d, d) circulant matrix; ValueError if ``shape`` is not square."""
        return CirculantStructure(size_of(shape, "a circulant matrix"))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> CirculantStructure:
        return CirculantStructure(length_of(shapes, "Circulant takes its first column"))
