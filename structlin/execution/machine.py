"""Properties of the machine: the sizes of its caches, and the name of its GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Caches", "caches", "gpu"]

_LINUX = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Caches:
    """Bytes of the data caches available to one core: its own two, and its share of the last one.

    Two hardware threads count as one core, because compute libraries start one thread for each core.
    """

    l1: int
    l2: int
    l3: int


# If the system does not state them: sizes that x86 and Arm cores of the last ten years have or exceed.
DEFAULT = Caches(l1=32 << 10, l2=512 << 10, l3=2 << 20)


def gpu() -> str:
    """Return the name of the current device of CUDA; nothing where there is none, or torch is not imported."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else ""


@cache
def caches() -> Caches:
    """Return the caches of the first core."""
    if sys.platform.startswith("linux"):
        found = _linux(_LINUX)
    elif sys.platform == "darwin":
        found = _darwin()
    else:
        found = {}
    l1 = found.get(1, DEFAULT.l1)
    l2 = found.get(2, max(l1, DEFAULT.l2))
    return Caches(l1, l2, found.get(3, max(l2, DEFAULT.l3)))


def _linux(folder: Path) -> dict[int, int]:
    found: dict[int, tuple[int, int]] = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size, shared = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
            total = int(size.rstrip("KMG")) * units.get(size[-1:], 1)
            if kind != "Instruction":
                found[int(level)] = total, _cores(shared)
        except (OSError, ValueError):
            continue
    threads = found.get(1, (0, 1))[1]  # of a core: they share its first cache
    return {level: total // max(1, sharing // threads) for level, (total, sharing) in found.items()}


def _cores(text: str) -> int:
    """Return the number of processors in a list such as ``0-3,8``."""
    ends = [part.split("-") for part in text.split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def _darwin() -> dict[int, int]:
    found = {}
    for level, name in ((1, "hw.perflevel0.l1dcachesize"), (2, "hw.perflevel0.l2cachesize"), (3, "hw.l3cachesize")):
        asked = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
        if asked.isdigit() and int(asked):
            found[level] = int(asked)
    return found
