"""Threads that share a pass: the OpenMP team of torch, or a pool.

After a loop of torch, the threads of OpenMP spin for some milliseconds until the next one. Separate threads would
compete with them for the cores, and two would be slower than one. So the shares of a pass run in the same team, by
``GOMP_parallel``, the function that compilers call for a parallel region.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._target import Target, address, load

_PROCESS = os.getpid()  # OpenMP's threads do not live on in a process that is forked from it, but it waits for them


def run_shares(
    run: Callable[..., None], tables: Sequence[Sequence[int]], cuts: Sequence[int], total: int, target: Target
) -> None:  # fmt: skip
    """``run(tables[k], cuts[k], cuts[k + 1], total)`` for all k at the same time; tables are of addresses."""
    if len(tables) == 1:
        (table,) = tables
        return run((ctypes.c_void_p * len(table))(*table), cuts[0], cuts[1], total)
    arrays = [(ctypes.c_void_p * len(table))(*table) for table in tables]
    team = _team(target) if os.getpid() == _PROCESS else None
    if team is not None:
        words = [len(arrays), address(run), total, *map(ctypes.addressof, arrays), *cuts]
        return team((ctypes.c_int64 * len(words))(*words), len(arrays))
    pool = _pool(len(arrays) - 1, os.getpid())
    others = [pool.submit(run, arrays[k], cuts[k], cuts[k + 1], total) for k in range(1, len(arrays))]
    run(arrays[0], cuts[0], cuts[1], total)
    for other in others:
        other.result()
    return None


@cache
def _team(target: Target) -> Callable[..., None] | None:
    """Run a job, which is a table of words, in so many threads; None where torch has another OpenMP, or none."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    library = _torch_library()
    if library is None or not all(hasattr(library, name) for name in names):
        return None
    parallel, number, count = (getattr(library, name) for name in names)
    member = _member(address(number), address(count), target)
    parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return lambda job, threads: parallel(address(member), job, threads, 0)


def _member(number: int, count: int, target: Target) -> Callable[..., None]:
    """Return what each member of a team does; the functions at these addresses say which it is, and of how many.

    A job: how many shares there are, the pass, tokens in all, the table of each share, and where each starts, with the
    end of the last. A team may have fewer members than shares: then some run several.
    """
    code = Code()

    def word(at: Int, kind: str = "i64") -> str:
        return code.value(f"load {kind}, ptr {code.at('i64', '%job', at)}")

    first, members = (code.value(f"call i32 inttoptr (i64 {f} to ptr)()") for f in (number, count))
    start, step = (code.value(f"zext i32 {n} to i64") for n in (first, members))
    shares, run, total = word(0), word(1, "ptr"), word(2)
    cuts = code.add(shares, 3)

    def share(k: Int, _: Values) -> None:
        table, cut = word(code.add(k, 3), "ptr"), code.add(cuts, k)
        code.put(f"call void {run}(ptr {table}, i64 {word(cut)}, i64 {word(code.add(cut, 1))}, i64 {total})")

    code.loop(start, shares, step, share)
    return load(code.function("member", "ptr %job", "nounwind"), "member", target, [ctypes.c_void_p], False)


def _torch_library() -> ctypes.CDLL | None:
    """Return what torch computes with; names are looked up in it and in what it was linked with."""
    import torch

    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


@lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: not those of one that it was forked from."""
    return ThreadPoolExecutor(threads, thread_name_prefix="structlin")
