"""Batched products of small matrices by NumPy, where that is faster than torch.

A product of a structure's blocks is small: 32 x 32 x 128 at d = 1024. Most BLAS copy their operands into a packed form
first, which costs as much as the product itself. OpenBLAS, with which NumPy's wheels come, has products for AVX-512
that pack nothing, for at most ``LIMIT`` multiply-accumulates; larger ones are cut into parts here. torch's wheels come
with MKL, which packs. The arrays share torch's memory. OpenBLAS runs such a product in the thread that calls it, and
NumPy does without Python's lock meanwhile.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np

LIMIT = 1_000_000
DTYPES = ("torch.float32", "torch.float64")


@cache
def is_faster() -> bool:
    """Whether NumPy's products are OpenBLAS's, and the machine has AVX-512."""
    import torch

    built: Any = np.show_config(mode="dicts")
    blas = str(built.get("Build Dependencies", {}).get("blas", {}).get("name", ""))
    return "openblas" in blas.lower() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@lru_cache(maxsize=4096)
def parts(rows: int, inner: int, columns: int) -> int:
    """Into how many parts to cut the rows of a product, so that each is small; 0 where that can not be."""
    for count in range(1, rows // 16 + 1 if rows > 16 else 2):
        if rows % count == 0 and rows // count * inner * columns <= LIMIT:
            return count
    return 0


def multiply(left: Any, right: Any, out: Any) -> None:
    """``out = left @ right`` for tensors (batch, rows, inner), (batch, inner, columns), in parts of the rows.

    Every tensor has unit stride in one of its last two axes.
    """
    count = parts(left.shape[1], left.shape[2], right.shape[2])
    if count > 1:
        left, out = left.unflatten(1, (count, -1)), out.unflatten(1, (count, -1))
        right = right.unsqueeze(1)
    # `Tensor.numpy` would fix the size of the storage for good, and FSDP frees its weights by resizing theirs.
    np.matmul(np.from_dlpack(left), np.from_dlpack(right), out=out.numpy())


def add(total: Any, more: Any) -> None:
    """``total += more`` for tensors."""
    array = total.numpy()
    np.add(array, np.from_dlpack(more), out=array)


def pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process: not those of one that it was forked from."""
    return _pool(threads, os.getpid())


@lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="structlin")
