"""The array operations that differ between NumPy, torch and jax.

All others (``reshape``, ``@``, ``*``, indexing) are the same methods in the three libraries. torch and jax are imported
only if a caller passes one of their arrays or their name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = Any
BACKENDS = ("numpy", "torch", "jax")
_LONG = 8192  # numbers in float32 from which SciPy transforms them faster than NumPy


def backend_of(x: Array) -> str:
    """Return the name of the library of an array, from its type: ``numpy``, ``torch`` or ``jax``.

    Examples
    --------
    >>> backend_of(np.zeros(3))
    'numpy'
    """
    found = library_of_array(x)
    if found is None:
        raise TypeError(
            f"expected a NumPy array, a torch tensor or a jax array, got {type(x).__module__}.{type(x).__qualname__}"
        )
    return found


def library_of_array(x: Any) -> str | None:
    """Return the name of the library of an array; None for any other object."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return "torch"
    if isinstance(x, np.ndarray):
        return "numpy"
    jax = sys.modules.get("jax")
    return "jax" if jax is not None and isinstance(x, jax.Array) else None


def common_backend(arrays: Sequence[Array]) -> str:
    """Return the name of the library of all ``arrays``; TypeError if they belong to different libraries."""
    names = [backend_of(a) for a in arrays]
    if len(set(names)) != 1:
        raise TypeError(f"arrays of one library are needed, got {', '.join(names)}")
    return names[0]


def over_same_axes(first: Array, *others: Any) -> tuple[Any, ...]:
    """Return an array and other trees of arrays; inside ``jax.shard_map`` all vary over the same axes of the mesh.

    jax requires this of the state of a loop, and of the right-hand side and the constants of a linear solve.
    """
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(first, jax.Array) or not jax.sharding.get_abstract_mesh().manual_axes:
        return first, *others
    leaves, structure = jax.tree.flatten((first, *others))
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    same = math.prod(((x.reshape(-1)[:1] == x.reshape(-1)[:1]).all() for x in arrays), start=True)
    found: tuple[Any, ...] = structure.unflatten(
        [jax.numpy.where(same, x, x) if isinstance(x, jax.Array) else x for x in leaves]
    )
    return found


def _numpy_ops() -> SimpleNamespace:
    import scipy.fft

    def rfft(x: Array, n: int, axis: int) -> Array:
        # NumPy transforms float32 in double precision. SciPy takes a fifth of the time, but 7 microseconds more a call
        # (AMD EPYC, family 25, model 1; one thread).
        library = scipy.fft if x.size >= _LONG and x.dtype == np.float32 else np.fft
        return library.rfft(x, n=n, axis=axis)

    return SimpleNamespace(
        name="numpy",
        permute=np.transpose,
        pad_last=lambda x, n: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)]),
        pad_first=lambda x, n: np.pad(x, [(0, n)] + [(0, 0)] * (x.ndim - 1)),
        conj=np.conj,
        flip=lambda x: x[::-1],
        roll=lambda x, n: np.roll(x, n),
        concat=lambda xs: np.concatenate(xs),
        argsort=np.argsort,
        fft=lambda x, n, axis: np.fft.fft(x, n=n, axis=axis),
        ifft=lambda x, n, axis: np.fft.ifft(x, n=n, axis=axis),
        rfft=rfft,
        irfft=lambda x, n, axis: np.fft.irfft(x, n=n, axis=axis),
        is_complex=np.iscomplexobj,
        is_integer=lambda x: x.dtype.kind in "iu",
        is_low_precision=lambda x: x.dtype == np.float16,
        astype=lambda x, dtype: x.astype(dtype, copy=False),
        to_float32=lambda x: x.astype(np.float32),
        mean_square=lambda x: np.mean(np.abs(x) ** 2),
        maximum_scalar=lambda x, s: np.maximum(x, s),
        promotes=True,
    )


def _pad(x: Array, pad: tuple[int, ...]) -> Array:
    import torch

    return torch.nn.functional.pad(x, pad)


def _concat(xs: Sequence[Array]) -> Array:
    import torch

    return torch.cat(tuple(xs))


def _transform(name: str, x: Array, n: int, axis: int) -> Array:
    import torch

    return getattr(torch.fft, name)(x, n=n, dim=axis)


def _is_compiling() -> bool:
    import torch

    return torch.compiler.is_compiling()


# Built at import, unlike the others: torch.compile may trace the first use, and it cannot trace the construction.
_TORCH = SimpleNamespace(
    name="torch",
    permute=lambda x, order: x.permute(order),
    pad_last=lambda x, n: _pad(x, (0, n)),
    pad_first=lambda x, n: _pad(x, (0, 0) * (x.ndim - 1) + (0, n)),
    conj=lambda x: x.conj().resolve_conj(),
    flip=lambda x: x.flip(0),
    roll=lambda x, n: x.roll(n, 0),
    concat=_concat,
    argsort=lambda x: x.argsort(),
    fft=lambda x, n, axis: _transform("fft", x, n, axis),
    ifft=lambda x, n, axis: _transform("ifft", x, n, axis),
    rfft=lambda x, n, axis: _transform("rfft", x, n, axis),
    irfft=lambda x, n, axis: _transform("irfft", x, n, axis),
    is_complex=lambda x: x.is_complex(),
    is_integer=lambda x: not (x.is_floating_point() or x.is_complex() or str(x.dtype) == "torch.bool"),
    is_low_precision=lambda x: x.is_floating_point() and x.element_size() < 4,
    astype=lambda x, dtype: x.to(dtype),
    to_float32=lambda x: x.float(),
    mean_square=lambda x: x.abs().square().mean(),
    maximum_scalar=lambda x, s: x.clamp(min=s),
    promotes=False,
    is_compiling=_is_compiling,
)


def _jax_ops() -> SimpleNamespace:
    import jax.numpy as jnp

    return SimpleNamespace(
        name="jax",
        permute=jnp.transpose,
        pad_last=lambda x, n: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n)]),
        pad_first=lambda x, n: jnp.pad(x, [(0, n)] + [(0, 0)] * (x.ndim - 1)),
        conj=jnp.conj,
        flip=lambda x: jnp.flip(x, 0),
        roll=lambda x, n: jnp.roll(x, n),
        concat=lambda xs: jnp.concatenate(xs),
        argsort=jnp.argsort,
        fft=lambda x, n, axis: jnp.fft.fft(x, n=n, axis=axis),
        ifft=lambda x, n, axis: jnp.fft.ifft(x, n=n, axis=axis),
        rfft=lambda x, n, axis: jnp.fft.rfft(x, n=n, axis=axis),
        irfft=lambda x, n, axis: jnp.fft.irfft(x, n=n, axis=axis),
        is_complex=jnp.iscomplexobj,
        is_integer=lambda x: jnp.issubdtype(x.dtype, jnp.integer),
        is_low_precision=lambda x: x.dtype in (jnp.float16, jnp.bfloat16),
        astype=lambda x, dtype: x.astype(dtype),
        to_float32=lambda x: x.astype(jnp.float32),
        mean_square=lambda x: jnp.mean(jnp.abs(x) ** 2),
        maximum_scalar=lambda x, s: jnp.maximum(x, s),
        promotes=True,
    )


_MAKERS = {"numpy": _numpy_ops, "jax": _jax_ops}
_CACHE: dict[str, SimpleNamespace] = {"torch": _TORCH}


def ops(name: str) -> SimpleNamespace:
    """Return the operations of one backend, by its name."""
    found = _CACHE.get(name)
    if found is None:
        if name not in _MAKERS:
            raise ValueError(f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
        found = _CACHE[name] = _MAKERS[name]()
    return found


def on_cpu(x: Array) -> Array:
    """Return a tensor without derivatives, on the CPU, whose memory NumPy can view: lazy conj and neg are computed."""
    return x.detach().cpu().resolve_conj().resolve_neg()


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any of the three libraries, such as ``float32``."""
    text = str(np.dtype(dtype)) if isinstance(dtype, type) else str(dtype)
    return text.removeprefix("torch.")


def to_backend(x: np.ndarray, backend: str, dtype: Any = None, device: Any = None) -> Array:
    """Copy a NumPy array to ``backend``, with a dtype given as a name, a NumPy, torch or jax dtype.

    Without ``dtype`` the dtype stays the same, except that jax converts 64 bits to 32 if 64 bits are not enabled.
    """
    if backend == "numpy":
        if device not in (None, "cpu"):
            raise ValueError(f"NumPy arrays live on the CPU, got device {device!r}")
        return x if dtype is None else x.astype(dtype_name(dtype))
    if backend == "torch":
        import torch

        target = getattr(torch, dtype_name(dtype)) if dtype is not None else None
        return torch.tensor(x, dtype=target, device=device)
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        name = None if dtype is None else dtype_name(dtype)
        if name is not None and (given := jax.dtypes.canonicalize_dtype(jnp.dtype(name))) != jnp.dtype(name):
            raise ValueError(
                f"jax would return {given} instead of {name}; enable 64 bits with "
                "jax.config.update('jax_enable_x64', True)"
            )
        made = jnp.asarray(x, dtype=name)
        return made if device is None else jax.device_put(made, device)
    raise ValueError(f"unknown backend {backend!r}; one of {', '.join(BACKENDS)}")


def as_array(x: Any, example: Array) -> Array:
    """Return a number, or an array of any library, with the library, dtype and device of ``example``; keeps gradients.

    CoLA's scalars can be jax arrays in an operator of NumPy arrays.
    """
    backend = backend_of(example)
    if backend == "torch":
        import torch

        return torch.as_tensor(x, dtype=example.dtype, device=example.device)
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.asarray(x, dtype=example.dtype)
    return np.asarray(x, dtype=example.dtype)


def in_library(x: Any, example: Array) -> Any:
    """Return ``x``, a number or an array, with the same values and dtype in the library of ``example``."""
    if not hasattr(x, "dtype") or isinstance(x, np.generic) or isinstance(example, np.generic):
        return x
    return x if backend_of(x) == backend_of(example) else to_backend(np.asarray(x), backend_of(example))
