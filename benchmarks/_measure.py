"""Time and memory of functions that are compared within one run, and files of results."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from structlin.execution import wisdom

__all__ = [
    "aligned",
    "describe",
    "keep_memory",
    "machine",
    "peak_memory",
    "peak_rate",
    "ratio",
    "result_path",
    "timings",
    "write_result",
]

RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt(3)
WARM, WARM_SECONDS, FEW_PAGES = 8, 3.0, 64
# Least seconds of one timing, which consists of several calls of a fast function, so that the clock and a cold cache
# have no influence; and least seconds of all rounds of a function, by which fast functions get more rounds.
LEAST_SECONDS, ROUND_SECONDS, MOST_ROUNDS = 2e-4, 0.03, 101


def _pages() -> int:
    """Return the number of memory pages given to this process so far, 0 where it is unknown."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_memory() -> bool:
    """Make this process keep the memory that it frees; return False if the C library has no such setting.

    By default glibc returns large freed arrays to the system, and the next function may wait for new pages.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(_MMAP_MAX, 0))


def timings(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    clock: str = "wall",
    around: Sequence[Callable[[], AbstractContextManager[object]]] | None = None,
) -> list[list[float]]:
    """Return the seconds of a call of each function in each round; all are timed in turn, at least ``repeats`` times.

    First, all functions are called in turn to warm up, until they allocate no new pages of memory, at most ``WARM``
    times, or twice if that takes ``WARM_SECONDS``. The heap grows for some rounds, and clearing a page takes as long as
    a fast layer. A short function is called several times for each timing.

    ``clock="cpu"`` counts the CPU time of this process, which other processes do not affect. It is suitable for a
    single thread on a busy machine. ``around``: a context for each function, which is entered outside the timed part.
    """
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    contexts = around or [nullcontext] * len(functions)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run(n: int, calls: int = 1) -> float:
        function = functions[n]
        with contexts[n]():
            wait()
            start = now()
            for _ in range(calls):
                function()
            wait()
            return now() - start

    every = range(len(functions))
    spent = 0.0
    for number in range(WARM):
        before = _pages()
        seconds = [run(n) for n in every]
        spent += sum(seconds)
        if _pages() - before <= FEW_PAGES * len(functions) or (number and spent > WARM_SECONDS):
            break
    calls = [1 for _ in every]
    for n in every:
        while seconds[n] < LEAST_SECONDS:
            more = 1.2 * LEAST_SECONDS / max(seconds[n], 1e-9)
            calls[n] = math.ceil(calls[n] * min(10.0, more))
            seconds[n] = run(n, calls[n])
    rounds = max(repeats, min(MOST_ROUNDS, int(ROUND_SECONDS * len(functions) / sum(seconds))))
    found: list[list[float]] = [[] for _ in every]
    for _ in range(rounds):
        for n in every:
            found[n].append(run(n, calls[n]) / calls[n])
    return found


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median over rounds of the first time divided by the second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def peak_rate(dtype: torch.dtype, clock: str = "wall") -> float:
    """Return the GFLOP/s of a dense product of 2048 x 2048 matrices, the fastest of some rounds."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    (seconds,) = timings([lambda: a @ b], 5, clock=clock)
    return 2e-9 * 2048**3 / min(seconds)


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak of the bytes that ``function`` allocates, relative to the memory in use before the call.

    On a CPU the profiler records the allocations of torch; on CUDA the allocator counts them. Work space of the BLAS is
    not counted, because torch does not allocate it.
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


def machine(device: str = "cpu") -> dict[str, object]:
    """Describe the processor, the libraries and the settings of a measurement."""
    facts = wisdom.processor()
    processor: dict[str, object] = {"name": facts.get("model name") or facts["name"] or facts["machine"]}
    processor |= {short: facts[long] for short, long in (("family", "cpu family"), ("model", "model"),
                                                         ("stepping", "stepping")) if long in facts}  # fmt: skip
    processor["flags"] = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    found: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def result_path(text: str, device: str = "cpu") -> Path:
    """Return the path of a result; a name such as ``layers`` is a file in the folder of this processor (or GPU)."""
    if Path(text).suffix:
        return Path(text)
    found = machine(device)
    processor: dict = found["processor"]  # type: ignore[assignment]
    name = str(found.get("gpu") or processor["name"])
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())[:40].strip("-")
    if "gpu" not in found:  # processors of one name may differ
        slug = "-".join([slug, *(processor[key] for key in ("family", "model") if key in processor)])
    return RESULTS / slug / f"{text}.json"


def write_result(path: Path, result: Mapping[str, object]) -> None:
    """Write a result as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def describe(result: Mapping[str, object]) -> str:
    """Return processor, dense rate, threads, dtype, allocator, clock and rounds of a result, if recorded, as a line."""
    place: dict = result.get("machine") or result  # type: ignore[assignment]
    setting: dict = {**result, **(result.get("setting") or {})}  # type: ignore[dict-item]
    processor = place.get("processor") or {"name": place.get("cpu", place.get("machine"))}
    details = [f"{k} {processor[k]}" for k in ("family", "model", "stepping") if k in processor]
    name = place.get("gpu") or f"{processor['name']} ({', '.join(details) or 'model not recorded'})"
    allocator = setting.get("allocator") or {True: "keeps freed memory"}.get(
        setting.get("memory_kept", place.get("memory_kept"))
    )
    threads = setting.get("threads", place.get("threads"))
    parts = [
        name, "peak_gflops" in result and f"dense product of 2048 x 2048: {result['peak_gflops']:.3g} GFLOP/s",
        setting.get("dtype"), f"{threads} thread{'s' * (threads != 1)}",
        allocator and f"allocator: {allocator}", setting.get("clock") == "cpu" and "time on cores",
        setting.get("compiled") and "under torch.compile", "repeats" in setting and f"{setting['repeats']} rounds",
        f"torch {place['torch']}", "jax" in place and f"jax {place['jax']}",
    ]  # fmt: skip
    return ", ".join(str(part) for part in parts if part)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text, with each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
