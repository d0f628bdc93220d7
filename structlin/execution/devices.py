"""Devices by their data sheets, for the traffic model (:mod:`.traffic`) and the roofline of a whole model.

Peak rates, memory sizes and bandwidths are those of NVIDIA's data sheets, without sparsity. Other properties are
assumed, and are equal for all devices unless noted (:class:`Device`). ``benchmarks/gpu.py`` measures them on a device.

Add your own device with ``DEVICES["mine"] = Device(...)``. Commands and functions then accept its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ALIGNED", "DEVICES", "L2_SHARE", "Device", "named"]

ALIGNED = 16  # bytes of the widest load of a thread, on all devices of the last ten years
L2_SHARE = 0.5  # usable fraction of the L2: on an A100 or H100 each half of the chip keeps its own copy


@dataclass(frozen=True)
class Device:
    """The limits of a device.

    Attributes
    ----------
    name
        Name of the device.
    peak
        FLOPs per second of matrix products, by dtype, without sparsity.
    bandwidth
        Bytes per second of the main memory.
    memory
        Bytes of the main memory, or None.
    source
        Source of the numbers.
    l2
        Bytes of the last cache that all cores share; 0 if not known.
    l2_bandwidth
        Assumed bytes per second of this cache; 0 means that of the memory.
    capability
        CUDA capability, such as (9, 0); None for other devices.
    reached
        Assumed fractions of ``peak`` and ``bandwidth`` that large products and copies reach. On an H100 these are 700
        TFLOP/s in bfloat16 and 3.0 TB/s.
    cores
        Number of streaming multiprocessors.
    launch
        Assumed seconds between two short kernels that torch launches one by one from Python. In a CUDA graph it is
        less.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: int | None
    source: str
    l2: int = 0
    l2_bandwidth: float = 0.0
    capability: tuple[int, int] | None = None
    reached: tuple[float, float] = (0.71, 0.9)
    launch: float = 5e-6
    cores: int = 132

    def __post_init__(self) -> None:
        if not self.peak or min(*self.peak.values(), self.bandwidth, *self.reached) <= 0:
            raise ValueError(f"peaks, bandwidth and parts of them that are reached must be positive, got {self!r}")
        if self.l2 < 0 or self.l2_bandwidth < 0 or self.launch < 0 or (self.memory is not None and self.memory <= 0):
            raise ValueError(f"bytes, bandwidths and times must not be negative, got {self!r}")

    def rate(self, dtype: str) -> float:
        """Return the FLOPs per second in a dtype; ValueError if they are not known.

        Examples
        --------
        >>> DEVICES["a100"].rate("bfloat16")
        312000000000000.0
        """
        if dtype not in self.peak:
            raise ValueError(f"the rate of {self.name} in {dtype!r} is not known; one of {', '.join(self.peak)}")
        return self.peak[dtype]


def _device(
    name: str, peak: dict[str, float], bandwidth: float, gigabytes: int, source: str, l2: int, l2_bandwidth: float,
    capability: tuple[int, int], cores: int,
) -> Device:  # fmt: skip
    found = MappingProxyType(peak)
    memory = gigabytes * 10**9
    return Device(name, found, bandwidth, memory, source, l2 << 20, l2_bandwidth, capability, cores=cores)


def _bytewise(float8: float, int8: float) -> dict[str, float]:
    """Rates of numbers of one byte; those of integers are operations per second."""
    return {"float8_e4m3fn": float8, "float8_e5m2": float8, "int8": int8}


_HOPPER = {
    "bfloat16": 989e12, "float16": 989e12, "tfloat32": 494e12, "float32": 67e12, "float64": 67e12,
    **_bytewise(1979e12, 1979e12),
}  # fmt: skip
# The L2 of an H100 delivers about 5.5 TB/s in microbenchmarks that have been published; the figures of the others are
# assumed from it by their clocks and numbers of slices.
DEVICES: dict[str, Device] = {
    "a100": _device(
        "NVIDIA A100 SXM 80 GB",
        {"bfloat16": 312e12, "float16": 312e12, "tfloat32": 156e12, "float32": 19.5e12, "float64": 19.5e12,
         "int8": 624e12},
        2039e9, 80, "NVIDIA A100 Tensor Core GPU data sheet (2021)", 40, 4.4e12, (8, 0), 108,
    ),
    "h100": _device(
        "NVIDIA H100 SXM 80 GB", _HOPPER, 3.35e12, 80, "NVIDIA H100 Tensor Core GPU data sheet (2023)", 50, 5.5e12,
        (9, 0), 132,
    ),
    "h200": _device(
        "NVIDIA H200 SXM 141 GB", _HOPPER, 4.8e12, 141, "NVIDIA H200 Tensor Core GPU data sheet (2024)", 50, 5.5e12,
        (9, 0), 132,
    ),
    "b200": _device(
        "NVIDIA B200 SXM 180 GB",
        {"bfloat16": 2250e12, "float16": 2250e12, "tfloat32": 1100e12, "float32": 75e12, "float64": 37e12,
         **_bytewise(4500e12, 4500e12)},
        7.7e12, 180, "NVIDIA HGX B200 data sheet (2025)", 126, 8e12, (10, 0), 148,
    ),
    "l40s": _device(
        "NVIDIA L40S 48 GB",
        {"bfloat16": 362e12, "float16": 362e12, "tfloat32": 183e12, "float32": 91.6e12, **_bytewise(733e12, 733e12)},
        864e9, 48, "NVIDIA L40S data sheet (2023)", 96, 5e12, (8, 9), 142,
    ),
    "rtx4090": _device(
        "NVIDIA GeForce RTX 4090 24 GB",
        {"bfloat16": 165e12, "float16": 165e12, "tfloat32": 82.6e12, "float32": 82.6e12,
         **_bytewise(330e12, 661e12)},
        1008e9, 24, "NVIDIA Ada GPU architecture whitepaper (2023)", 72, 5e12, (8, 9), 128,
    ),
}  # fmt: skip
"""Rates of dense matrix products on tensor cores; ``float32`` without them, ``tfloat32`` for float32 rounded to it."""


def named(name: str | Device) -> Device:
    """Return a device of :data:`DEVICES`, or the given one; ValueError for any other name.

    Examples
    --------
    >>> named("h200").bandwidth
    4800000000000.0
    """
    if isinstance(name, Device):
        return name
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; one of {', '.join(DEVICES)}")
    return DEVICES[name]
