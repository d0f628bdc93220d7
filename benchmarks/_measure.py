"""Time and memory of functions that are compared within one run."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["keep_memory", "machine", "medians", "peak_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt(3)
WARM, FEW_PAGES = 8, 64


def _pages() -> int:
    """That this process was given so far; 0 where that can not be known."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_memory() -> bool:
    """Let this process keep the memory that it frees; False where the C library has no such setting.

    Or else glibc gives freed arrays back to the system now and then, and what happens to be timed next waits for new
    pages: as long as a fast layer takes. All that is compared in a run is treated alike.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(_MMAP_MAX, 0))


def medians(
    functions: Sequence[Callable[[], object]], repeats: int, device: str = "cpu", clock: str = "wall"
) -> list[float]:
    """Median seconds of each function: all are called in turn, ``repeats`` times.

    Before, they are called in turn to warm up, until they get no new pages of memory, at most ``WARM`` times: a heap
    that large arrays are taken from grows for some rounds, and to clear a page takes as long as a fast layer.

    ``clock="cpu"`` counts the time that this process has spent on cores, which does not run while others have them:
    the right one for a single thread on a machine that is busy.
    """
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run(function: Callable[[], object]) -> float:
        wait()
        start = now()
        function()
        wait()
        return now() - start

    for _ in range(WARM):
        before = _pages()
        for function in functions:
            run(function)
        if _pages() - before <= FEW_PAGES * len(functions):
            break
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, found in zip(functions, times, strict=True):
            found.append(run(function))
    return [statistics.median(found) for found in times]


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that ``function`` allocates beyond what is there before it, at the moment when they are most.

    On a CPU from the profiler's record of torch's allocator, on CUDA from the allocator's own counter. Work space
    inside of the BLAS is not torch's and is not counted.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    live = most = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    found: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        found["cpu"] = names[0].partition(":")[2].strip() if names else platform.processor()
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
