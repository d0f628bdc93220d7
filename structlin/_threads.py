"""Threads of OpenBLAS, the library of NumPy and SciPy.

OpenBLAS shares the work on a matrix of some dozens of rows among all threads. On a stack of such matrices this takes
longer than one thread, and many times longer where other programs use the cores, because its threads wait for each
other in loops. It also does not know `torch.set_num_threads`, which should hold for NumPy's views of tensors as well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import numpy as np

# On two free cores of a Xeon, one thread took 0.3 to 1.1 times the time of two for matrices of 64 to 256 rows, and 1.3
# to 1.5 for inverses of 128 and 256 rows; on busy cores it took a tenth.
_ROWS = 256
# Numbers times columns of a stack from which on a decomposition takes several times the 40 us that a limit takes.
_WORK = 2**22


@cache
def _controller() -> Any:
    import scipy.linalg  # noqa: F401  (its OpenBLAS is another than NumPy's)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")


def limited(threads: int) -> AbstractContextManager[Any]:
    """Return a context that limits OpenBLAS to a number of threads, for the whole process."""
    controller = _controller()
    now = [library.num_threads for library in controller.lib_controllers]
    if not now or max(now) <= threads:
        return nullcontext()
    return controller.limit(limits=min(threads, *now))  # no library gets more threads than it had


def of_stack(matrices: np.ndarray) -> AbstractContextManager[Any]:
    """Return a context with one thread for a stack of small matrices; for other arrays one that changes nothing."""
    return limited(1) if _is_slower_in_threads(matrices) else nullcontext()


def _is_slower_in_threads(matrices: np.ndarray) -> bool:
    return matrices.ndim > 2 and matrices.shape[-1] <= _ROWS and matrices.size * matrices.shape[-1] >= _WORK


def stacked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a stack of matrices, its first argument, that runs in :func:`of_stack`."""

    @wraps(function)
    def run(matrices: np.ndarray, *more: Any, **options: Any) -> Any:
        if not _is_slower_in_threads(matrices):
            return function(matrices, *more, **options)
        with limited(1):
            return function(matrices, *more, **options)

    return run


def of_torch(matrices: Any) -> AbstractContextManager[Any]:
    """Return a context for NumPy's views of tensors of this shape: with torch's threads, or one for small matrices."""
    torch: Any = sys.modules["torch"]
    size = math.prod(matrices.shape)
    if size * min(matrices.shape[-2:]) < _WORK:
        return nullcontext()
    return limited(1 if max(matrices.shape[-2:]) <= _ROWS else torch.get_num_threads())


#: Functions of `numpy.linalg` that run stacks in :func:`of_stack`.
linalg = SimpleNamespace(**{name: stacked(getattr(np.linalg, name)) for name in ("cholesky", "eigh", "qr", "svd")})
