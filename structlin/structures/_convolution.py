"""Products with FFTs, shared by circulant and Toeplitz matrices."""

from __future__ import annotations

import math
from types import SimpleNamespace

from structlin._arrays import Array
from structlin._lapack import promoted


def fft_product(kernel: Array, x: Array, size: int, axis: int, xp: SimpleNamespace) -> Array:
    """Return the circular convolution of ``kernel`` with ``x`` along ``axis``, both padded with zeros to ``size``.

    Half precision is transformed in float32 and rounded once, at the end. FFT libraries support half precision on some
    devices only, and the accumulated error would be large.
    """
    if 0 in x.shape:  # torch has no FFT of an empty batch
        empty = xp.pad_first(x, size - x.shape[0]) if axis == 0 else xp.pad_last(x, size - x.shape[-1])
        return empty * kernel[:1]
    if kernel.dtype != x.dtype:  # NumPy's FFT has the precision of its argument
        kernel, x = promoted(kernel, x)
    half = xp.is_low_precision(x) or xp.is_low_precision(kernel)
    result = (x[..., :1] * kernel[:1]).dtype if half else None
    if half:
        kernel, x = xp.to_float32(kernel), xp.to_float32(x)
    if xp.is_complex(kernel) or xp.is_complex(x):
        spectrum = xp.fft(kernel, size, 0)
        spectrum = spectrum[:, None] if axis == 0 else spectrum
        y = xp.ifft(spectrum * xp.fft(x, size, axis), size, axis)
    else:
        spectrum = xp.rfft(kernel, size, 0)
        spectrum = spectrum[:, None] if axis == 0 else spectrum
        y = xp.irfft(spectrum * xp.rfft(x, size, axis), size, axis)
    return xp.astype(y, result) if half else y


def real_fft_flops(n: int) -> int:
    """Return the FLOPs of a real FFT of length n, ``2.5 n log2(n)`` by convention: half of those of a complex FFT."""
    return math.ceil(2.5 * n * math.log2(n)) if n > 1 else 0


def product_flops(n: int) -> dict[str, int]:
    """Return the FLOPs for one real vector: an FFT, an inverse FFT, and a complex product of half spectra."""
    return {"fft": 2 * real_fft_flops(n), "elementwise": 6 * (n // 2 + 1)}
