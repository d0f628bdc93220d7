"""The discrete cosine transform (DCT-II), orthonormal, by an FFT of the same length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from structlin._arrays import Array
from structlin._lapack import lapack
from structlin.structures._square import size_of
from structlin.structures._transform import Transform, TransformStructure


@dataclass(frozen=True)
class CosineStructure(TransformStructure):
    """The transform C, or its transpose if ``backward`` (the DCT-III)."""

    backward: bool = False

    def transpose(self) -> CosineStructure:
        """Exchange the transform and its inverse."""
        return CosineStructure(self.size, not self.backward)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return self._forth_or_back(x)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return self._forth_or_back(x.swapaxes(0, 1)).swapaxes(0, 1)

    def _forth_or_back(self, x: Array) -> Array:
        """Transform the rows of x. Half precision is transformed in float32, since FFTs do not support it."""
        xp = lapack(x)
        if 0 in x.shape:
            return x
        low = xp.is_low_precision(x)
        wide = xp.to_float32(x) if low else x
        transform = self._backward if self.backward else self._forward
        if xp.is_complex(wide):
            y = transform(wide.real, xp) + 1j * transform(wide.imag, xp)
        else:
            y = transform(wide, xp)
        return xp.astype(y, x.dtype) if low else y

    def _forward(self, x: Array, xp: SimpleNamespace) -> Array:
        """Return the DCT by one FFT (Makhoul 1980): reorder the entries, transform, multiply by phases.

        The order is: entries of even index, then those of odd index in reverse.
        """
        phases, order, _ = self._constants(x, xp)
        return xp.real(xp.fft(x[:, order], self.size, -1) * phases)

    def _backward(self, y: Array, xp: SimpleNamespace) -> Array:
        # The transpose of the real-linear map above: the conjugate phases, a transform back, and the order undone.
        phases, _, inverse = self._constants(y, xp)
        return xp.real(xp.ifft(y * xp.conj(phases), self.size, -1) * self.size)[:, inverse]

    def _constants(self, x: Array, xp: SimpleNamespace) -> tuple[Array, Array, Array]:
        n = self.size
        order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])
        phases = np.exp(-0.5j * np.pi * np.arange(n) / n) * math.sqrt(2 / n)
        phases[0] /= math.sqrt(2)
        made = xp.astype(xp.index(phases, x), xp.to_complex(x[:1, :1]).dtype)
        return made, xp.index(order, x), xp.index(np.argsort(order), x)

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the matrix of the orthonormal cosine transform of type 2, or its transpose."""
        k, t = np.arange(self.size)[:, None], np.arange(self.size)
        matrix = np.cos(np.pi * k * (2 * t + 1) / (2 * self.size)) * math.sqrt(2 / self.size)
        matrix[0] /= math.sqrt(2)
        return matrix.T if self.backward else matrix


class Cosine(Transform):
    r"""Orthonormal discrete cosine transform of type 2, as ``scipy.fft.dct(x, norm="ortho")``.

    .. math:: A_{kt} = c_k \cos\left(\frac{\pi k (2 t + 1)}{2 d}\right), \quad
        c_0 = \sqrt{1 / d}, \quad c_k = \sqrt{2 / d} \text{ for } k > 0

    The inverse is the transpose, ``A.T``. There are no parameters. A product costs :math:`5 d \log_2 d` FLOPs.

    Parameters
    ----------
    size
        Number of rows d.
    backend, dtype, device
        Array library, dtype and device of the operator.

    Examples
    --------
    >>> import numpy as np
    >>> (Cosine(4) @ np.ones(4)).round(12) + 0.0
    array([2., 0., 0., 0.])
    """

    name = "cosine"
    formula = "y_k = c_k sum_t cos(pi k (2 t + 1) / (2 d)) x_t"
    source = "Makhoul (1980), A fast cosine transform in one and two dimensions"
    examples = (((5, 5), {}), ((8, 8), {}), ((1, 1), {}))

    @staticmethod
    def design(shape: tuple[int, int], /) -> CosineStructure:
        """Return the structure of a (d, d) transform; ValueError if ``shape`` is not square."""
        return CosineStructure(size_of(shape, "a cosine transform"))
