"""Read a pickled dictionary of uint8 arrays and plain values without running any code from it.

The official python version of CIFAR is pickled, and unpickling in the ordinary way runs whatever a file
asks for. Here a pickle can name nothing but the few functions NumPy writes into it, and even those are
stand-ins that only keep shape and raw bytes; the arrays are made afterwards.
"""

import io
import pickle
from typing import Any

import numpy as np

__all__ = ["load_plain"]

_PLAIN = (bytes, str, int, float, list, tuple, dict, type(None))
_UINT8 = {"u1", "uint8", "|u1", b"u1"}


def load_plain(raw: bytes) -> dict[str, Any]:
    """Decode a pickled dictionary whose values are uint8 arrays, text, numbers and plain containers.

    Pickles of Python 2 (protocol 2, as the official files are) and of Python 3, protocols 0 to 5, are read.

    Args:
        raw: the whole pickle.

    Returns:
        The dictionary, keys as str, arrays as read-only uint8 NumPy arrays. Other values are as pickled,
        with byte strings left as bytes; arrays inside containers are not made, and what containers hold is
        for the caller to check.

    Raises:
        ValueError: the pickle is damaged, is no dictionary, holds an array of another dtype, or names
            anything beyond the reconstruction of arrays (which is then neither imported nor called).

    Example:
        >>> import pickle
        >>> load_plain(pickle.dumps({"labels": [1, 2]}))
        {'labels': [1, 2]}
        >>> load_plain(pickle.dumps({"labels": print}))
        Traceback (most recent call last):
            ...
        ValueError: the pickle asks for builtins.print, which no image file needs; it was not loaded
    """

    # Made anew for every pickle: a hostile one could otherwise leave attributes behind on them.
    class Array:
        shape: tuple[int, ...]
        order: str
        raw: bytes

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _version, shape, dtype, fortran, content = state
            self.fill(shape, dtype, "F" if fortran else "C", content)

        def fill(self, shape: tuple[int, ...], dtype: Any, order: str, content: bytes) -> None:
            if not isinstance(dtype, Dtype):
                raise ValueError("the pickle holds an array without a dtype")
            if not isinstance(content, (bytes, bytearray)):
                raise ValueError(f"the pickle holds an array of {type(content).__name__}, not of raw bytes")
            self.shape, self.order, self.raw = tuple(shape), order, bytes(content)

    class Dtype:
        def __init__(self, name: Any, *_flags: Any) -> None:
            if name not in _UINT8:
                raise ValueError(f"the pickle holds an array of dtype {name!r}, expected uint8")

        def __setstate__(self, state: Any) -> None:
            """Byte order and fields: of no meaning for single bytes."""

    def reconstruct(kind: Any, _shape: Any, _dtype: Any) -> Array:
        if kind is not Array:
            raise ValueError("the pickle reconstructs something that is no array")
        return Array()

    def from_buffer(content: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> Array:
        array = Array()
        array.fill(shape, dtype, order, content)
        return array

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"the pickle asks for the encoding {encoding!r}, expected 'latin1'")
        return text.encode("latin1")

    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        # How Python 3 writes bytes in protocols below 3.
        ("_codecs", "encode"): encode,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.numeric", "_frombuffer"] = from_buffer

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise _Refused(f"the pickle asks for {module}.{name}, which no image file needs; it was not loaded")
            return allowed[module, name]

    try:
        content = Reader(io.BytesIO(raw), encoding="bytes").load()
    except _Refused as refusal:
        raise ValueError(str(refusal)) from None
    except Exception as error:
        # A damaged pickle can fail in any way at all: these are the bytes of a stranger.
        raise ValueError(f"the pickle is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"the pickle holds a {type(content).__name__}, expected a dictionary")
    read: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(value, (Array, *_PLAIN)):
            raise ValueError(f"the pickle holds something that is no data under {key!r}")
        read[_text(key)] = _array(value) if isinstance(value, Array) else value
    return read


class _Refused(Exception):
    pass


def _text(key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("latin1")
    if isinstance(key, str):
        return key
    raise ValueError(f"the pickle has the key {key!r}, expected text")


def _array(stand_in: Any) -> np.ndarray:
    if not hasattr(stand_in, "raw"):
        raise ValueError("the pickle holds an array without content")
    flat = np.frombuffer(stand_in.raw, dtype=np.uint8)
    shape, order = stand_in.shape, stand_in.order
    if not all(type(n) is int and n >= 0 for n in shape) or order not in ("C", "F"):
        raise ValueError(f"the pickle holds an array of shape {shape!r}, order {order!r}")
    if np.prod(shape, dtype=object) != flat.size:
        raise ValueError(f"the pickle holds an array of shape {shape} with {flat.size} bytes")
    return flat.reshape(shape, order=order)
