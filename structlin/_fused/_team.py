"""Threads that share a pass: the team of the OpenMP that torch runs its own loops with, or else a pool.

After a loop of torch's, OpenMP's threads wait busily for the next one, and hold the cores for some milliseconds.
Threads of our own would have to share the cores with them: two would be slower than one. So the shares of a pass run in
the same team, by way of ``GOMP_parallel``, the function that compilers call for a parallel region.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from structlin._fused._target import Target, load

_PROCESS = os.getpid()  # OpenMP's threads do not live on in a process that is forked from it, but it waits for them

# A job is a table of words: how many shares there are, the pass, tokens in all, the table of each share, and where each
# starts, with the end of the last. A team may have fewer members than shares: then some run several.
_TEXT = """
define internal void @member(ptr %job) #0 {{
entry:
  %me = call i32 {number}()
  %members = call i32 {count}()
  %first = zext i32 %me to i64
  %step = zext i32 %members to i64
  %shares = load i64, ptr %job
  %pass.at = getelementptr i64, ptr %job, i64 1
  %pass = load ptr, ptr %pass.at
  %total.at = getelementptr i64, ptr %job, i64 2
  %total = load i64, ptr %total.at
  %tables = getelementptr i64, ptr %job, i64 3
  %cuts = getelementptr i64, ptr %tables, i64 %shares
  br label %head
head:
  %share = phi i64 [ %first, %entry ], [ %next, %body ]
  %more = icmp ult i64 %share, %shares
  br i1 %more, label %body, label %done
body:
  %table.at = getelementptr i64, ptr %tables, i64 %share
  %table = load ptr, ptr %table.at
  %start.at = getelementptr i64, ptr %cuts, i64 %share
  %start = load i64, ptr %start.at
  %stop.at = getelementptr i64, ptr %start.at, i64 1
  %stop = load i64, ptr %stop.at
  call void %pass(ptr %table, i64 %start, i64 %stop, i64 %total)
  %next = add i64 %share, %step
  br label %head
done:
  ret void
}}

define void @team(ptr %job) #0 {{
  %shares = load i64, ptr %job
  %members = trunc i64 %shares to i32
  call void {parallel}(ptr @member, ptr %job, i32 %members, i32 0)
  ret void
}}

attributes #0 = {{ nounwind }}
"""


def run_shares(
    run: Callable[..., None], tables: Sequence[Sequence[int]], cuts: Sequence[int], total: int, target: Target
) -> None:  # fmt: skip
    """``run(tables[k], cuts[k], cuts[k + 1], total)`` for all k at the same time; tables are of addresses."""
    arrays = [(ctypes.c_void_p * len(table))(*table) for table in tables]
    if len(arrays) == 1:
        return run(arrays[0], cuts[0], cuts[1], total)
    team = _team(target) if os.getpid() == _PROCESS else None
    if team is not None:
        words = [len(arrays), _address(run), total, *map(ctypes.addressof, arrays), *cuts]
        return team((ctypes.c_int64 * len(words))(*words))
    pool = _pool(len(arrays) - 1, os.getpid())
    others = [pool.submit(run, arrays[k], cuts[k], cuts[k + 1], total) for k in range(1, len(arrays))]
    run(arrays[0], cuts[0], cuts[1], total)
    for other in others:
        other.result()
    return None


@cache
def _team(target: Target) -> Callable[..., None] | None:
    """None where torch has another OpenMP, or none."""
    names = {"parallel": "GOMP_parallel", "number": "omp_get_thread_num", "count": "omp_get_num_threads"}
    library = _torch_library()
    if library is None or not all(hasattr(library, name) for name in names.values()):
        return None
    places = {key: f"inttoptr (i64 {_address(getattr(library, name))} to ptr)" for key, name in names.items()}
    return load(_TEXT.format(**places), "team", target, [ctypes.c_void_p])


def _torch_library() -> ctypes.CDLL | None:
    """What torch computes with; names are looked up in it and in what it was linked with."""
    import torch

    if not torch.backends.openmp.is_available():
        return None
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


def _address(function: Any) -> Any:
    return ctypes.cast(function, ctypes.c_void_p).value


@lru_cache(maxsize=8)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: not those of one that it was forked from."""
    return ThreadPoolExecutor(threads, thread_name_prefix="structlin")
