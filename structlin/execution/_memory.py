"""Memory of large tensors in huge pages.

The C library returns large arrays to the system when they are freed. At the first use of each page of a new array, the
system then clears the page. With pages of 4 KB this takes longer than the products of a structured matrix that writes
the array. Linux uses pages of 2 MB where it is asked to, which takes a fourth of the time or less.

NumPy asks for huge pages for arrays of the same size; the variable that disables it there also does so here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["advised"]

LEAST = 1 << 22  # bytes of an array: two huge pages, as in NumPy
VARIABLE = "NUMPY_MADVISE_HUGEPAGE"


def advised(tensor: Tensor) -> Tensor:
    """Return a new tensor that nothing was written to, after asking for huge pages for its memory if it is large."""
    if tensor.nbytes >= LEAST and tensor.is_cpu:
        _advise(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _advise(start: int, size: int) -> None:
    """Ask for huge pages for whole pages in a range of memory. The system may ignore it: errors do not matter."""
    call = _madvise()
    if call is not None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        call(first, (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    """Return the function of the C library, or None if the system has no huge pages for it or they are disabled."""
    if platform.system() != "Linux" or not hasattr(mmap, "MADV_HUGEPAGE") or os.environ.get(VARIABLE, "1") == "0":
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return found
