"""The unitary discrete Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from structlin._arrays import Array
from structlin._lapack import lapack
from structlin.structures._square import size_of
from structlin.structures._transform import Transform, TransformStructure


@dataclass(frozen=True)
class FourierStructure(TransformStructure):
    """Structure of the transform F or, if ``backward``, of its conjugate; both matrices are symmetric."""

    backward: bool = False

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return self._along(x, -1)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return self._along(x, 0)

    def _along(self, x: Array, axis: int) -> Array:
        xp, n = lapack(x), self.size
        x = xp.to_complex(x)
        if 0 in x.shape:
            return x
        return xp.ifft(x, n, axis) * math.sqrt(n) if self.backward else xp.fft(x, n, axis) / math.sqrt(n)

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the matrix of the unitary Fourier transform."""
        i = np.arange(self.size)
        turns = i[:, None] * i % self.size / self.size
        return np.exp((2j if self.backward else -2j) * np.pi * turns) / math.sqrt(self.size)


class Fourier(Transform):
    r"""Unitary discrete Fourier transform, as ``scipy.linalg.dft(d, scale="sqrtn")``.

    .. math:: A_{jt} = \frac{1}{\sqrt d} \exp\left(-\frac{2 \pi i}{d} j t\right)

    There are no parameters. A product costs :math:`5 d \log_2 d` FLOPs. The dtype is always complex: a real ``dtype``
    gives the complex one of the same precision.

    Parameters
    ----------
    size
        Number of rows d.
    backend, dtype, device
        Array library, dtype and device of the operator.

    Examples
    --------
    >>> import numpy as np
    >>> Fourier(4) @ np.array([1.0, 0.0, 0.0, 0.0])
    array([0.5+0.j, 0.5+0.j, 0.5+0.j, 0.5+0.j])
    """

    name = "fourier"
    formula = "y_j = sum_t exp(-2 pi i j t / d) x_t / sqrt(d)"
    source = "Cooley and Tukey (1965), An algorithm for the machine calculation of complex Fourier series"
    examples = (((5, 5), {}), ((8, 8), {}), ((1, 1), {}))

    def __init__(self, size: int, *, backend: str = "numpy", dtype: Any = "complex128", device: Any = None) -> None:
        super().__init__(size, backend=backend, dtype=_complex(dtype), device=device)

    @classmethod
    def _build(cls, structure: Any, factors: tuple[Array, ...], dtype: Any = None) -> Self:
        return super()._build(structure, factors, _complex(dtype))

    def conj(self) -> Self:
        """Return the transform in the other direction."""
        structure = FourierStructure(self.structure.size, not self.structure.backward)  # type: ignore[attr-defined]
        return self._with(structure, self.factors, self._annotations)

    @staticmethod
    def design(shape: tuple[int, int], /) -> FourierStructure:
        """Return the structure of a (d, d) transform; ValueError if ``shape`` is not square."""
        return FourierStructure(size_of(shape, "a Fourier transform"))


def _complex(dtype: Any) -> str:
    """Return the complex dtype of the same precision, by name."""
    text = "complex128" if dtype is None else str(np.dtype(dtype)) if isinstance(dtype, type) else str(dtype)
    return (
        "complex64" if text.removeprefix("torch.") in ("float16", "bfloat16", "float32", "complex64") else "complex128"
    )
