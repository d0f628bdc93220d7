"""NumPy arrays that count their multiplications, to check the stated MACs of structures that are not chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

_PRODUCTS = (np.einsum, np.dot, np.inner, np.vdot, np.tensordot, np.outer, np.kron, np.convolve, np.correlate)
_CURRENT: ContextVar[Counts] = ContextVar("_CURRENT")


@dataclass
class Counts:
    """Numbers of multiplications.

    ``macs``: those of matrix products and einsums. ``elementwise``: those of all other operations.
    """

    macs: int = 0
    elementwise: int = 0


class _Counted(np.ndarray):
    """An array that adds its multiplications to the current counts; results of operations have the same class."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if options.get("out"):
            options["out"] = tuple(map(_plain, options["out"]))
        found = getattr(ufunc, method)(*map(_plain, inputs), **options)
        counts = _CURRENT.get()
        if ufunc.signature is not None and ufunc is not np.matmul and not ufunc.__name__.startswith(("vec", "mat")):
            return _counting(found)  # FFTs are not counted: their FLOPs are a convention
        if ufunc.signature is not None:
            summed = np.shape(inputs[0])[-1]
            counts.macs += math.prod(np.shape(found)) * summed
        elif ufunc in (np.multiply, np.divide) and method != "reduce":
            counts.elementwise += math.prod(np.shape(found))
        return _counting(found)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func not in _PRODUCTS:
            return super().__array_function__(func, types, args, kwargs)
        found = func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
        counts, size = _CURRENT.get(), math.prod(np.shape(found))
        if func is np.einsum:
            terms, operands = args[0].replace(" ", "").split("->")[0].split(","), args[1:]
            pairs = (zip(term, np.shape(x), strict=True) for term, x in zip(terms, operands, strict=True))
            counts.macs += math.prod(dict(pair for p in pairs for pair in p).values()) * (len(operands) - 1)
        elif func in (np.outer, np.kron):
            counts.elementwise += size
        elif func in (np.convolve, np.correlate):
            counts.macs += np.size(args[0]) * np.size(args[1])
        else:  # m n k MACs, the square root of the product of the three sizes (m k), (k n) and (m n)
            counts.macs += math.isqrt(np.size(args[0]) * np.size(args[1]) * size)
        return _counting(found)

    def dot(self, *args: Any, **kwargs: Any) -> Any:
        return np.dot(self, *args, **kwargs)


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, _Counted) else x


def _counting(x: Any) -> Any:
    return x.view(_Counted) if type(x) is np.ndarray else x


def counted(function: Callable[..., Any], *arrays: Any) -> Counts:
    """Call ``function`` with these arrays, or tuples of arrays, and return its numbers of multiplications.

    Only operations of NumPy are counted, and FFTs are not.

    Examples
    --------
    >>> counted(lambda a, b: (a @ b) * 2, np.ones((2, 3)), np.ones((3, 4)))
    Counts(macs=24, elementwise=8)
    """

    def wrapped(x: Any) -> Any:
        return tuple(map(wrapped, x)) if isinstance(x, tuple | list) else np.array(x).view(_Counted)

    token = _CURRENT.set(counts := Counts())
    try:
        function(*map(wrapped, arrays))
    finally:
        _CURRENT.reset(token)
    return counts
