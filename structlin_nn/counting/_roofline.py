"""Devices by their data sheets, and the least time that counted work takes on them.

The roofline model (Williams, Waterman and Patterson, *Roofline: an insightful visual performance model*, 2009): an
operation takes at least as long as its FLOPs at the peak rate, and at least as long as its bytes at the bandwidth.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from structlin.execution.devices import DEVICES, Device
from structlin_nn.counting._memory import itemsize, states_of
from structlin_nn.torch.counting import ModelCount


def measure_cpu(dtype: str = "float32", seconds: float = 0.3) -> Device:
    """Return the CPU that this runs on, with torch's threads: a square product of 1024, and a copy of 64 MiB.

    The best of the repeats that fit into ``seconds``, for each of both: what the machine does where nothing
    disturbs it. Raises ValueError for an unknown dtype or a time that is not positive.
    """
    import torch

    if itemsize(dtype) == 1:
        raise ValueError(f"this CPU is measured in float64, float32, bfloat16 or float16, not in {dtype}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    kind = getattr(torch, dtype)
    a, b = torch.ones(2, 1024, 1024, dtype=kind)
    out = torch.empty_like(a)
    source, target = torch.ones(2, 1 << 24, dtype=torch.float32)
    product = _best(lambda: torch.mm(a, b, out=out), seconds / 2)
    copy = _best(lambda: target.copy_(source), seconds / 2)
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores"
    return Device(name, {dtype: 2 * 1024**3 / product}, 2 * 4 * (1 << 24) / copy, None, "measured now")


def _best(call: object, seconds: float) -> float:
    assert callable(call)
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def device(name: str, dtype: str = "float32") -> Device:
    """Return a device by name; ``cpu`` is measured. Raises ValueError for another name.

    Examples
    --------
    >>> device("h200").bandwidth
    4800000000000.0
    """
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; one of {', '.join((*DEVICES, 'cpu'))}")
    return DEVICES[name]


@dataclass(frozen=True)
class Roofline:
    """The minimum time of a training step of one batch, in seconds, and what bounds it.

    ``forward`` and ``backward`` are the products, each at the slower of compute and memory. ``compute`` is their time
    at the peak rate, ``intensity`` their FLOPs for each byte, and ``ridge`` the intensity from which the device
    computes at its peak. ``other`` are the operations without products, forward, each reading and writing memory; a
    compiler that fuses them takes less. ``update`` is the optimiser, which reads and writes weights, gradients and
    states.
    """

    device: str
    dtype: str
    forward: float
    backward: float
    compute: float
    intensity: float
    ridge: float
    other: float
    update: float

    @property
    def step(self) -> float:
        """Products and update, without ``other``: no step can be faster."""
        return self.forward + self.backward + self.update


def roofline(
    counted: ModelCount, on: Device, dtype: str | None = None, *, optimizer: str = "adam", states: int | None = None,
    weight_dtype: str | None = None, shares: int = 1,
) -> Roofline:  # fmt: skip
    """Return the minimum time that a counted batch takes on a device.

    Parameters
    ----------
    counted, on
        Count of the batch, and the device (:func:`device`).
    dtype
        Dtype of the products, ``tfloat32`` too; None: that of the parameters. FLOPs that are no products (FFTs) have
        the same rate.
    optimizer, states
        As in :func:`structlin_nn.counting.training_bytes`.
    weight_dtype
        Dtype of weights, gradients and states, for the update; None: that of the parameters.
    shares
        Number of devices that share the update (ZeRO).

    Examples
    --------
    >>> from torch import nn, zeros
    >>> from structlin_nn.counting import count
    >>> layer = nn.Linear(4096, 4096, bias=False, device="meta")
    >>> found = roofline(count(layer, zeros(65536, 4096, device="meta")), DEVICES["h100"], "bfloat16")
    >>> round(1e3 * found.forward, 3), found.backward == found.forward, found.intensity > found.ridge
    (2.223, True, True)
    """
    if dtype is None and counted.dtype is None and counted.params:
        raise ValueError("the parameters have several dtypes: name the one that products are carried out in")
    dtype = dtype or counted.dtype or "float32"
    peak, bandwidth = on.rate(dtype), on.bandwidth
    size = itemsize("float32" if dtype == "tfloat32" else dtype)
    forward = backward = compute = 0.0
    flops = moved = 0
    for call in counted.calls:
        work = 2 * call.macs + call.other_flops
        back = 2 * call.backward_macs + call.backward_other_flops
        forward += max(work / peak, call.moved * size / bandwidth)
        backward += max(back / peak, call.backward_moved * size / bandwidth)
        compute += (work + back) / peak
        flops += work + back
        moved += (call.moved + call.backward_moved) * size
    # Read weight, gradient and states, write weight and states.
    weights = counted.trainable_bytes
    if weight_dtype is not None:
        weights = counted.trainable_params * itemsize(weight_dtype)
    update = (3 + 2 * states_of(optimizer, states)) * weights / bandwidth / shares
    return Roofline(
        on.name, dtype, forward, backward, compute, flops / moved if moved else 0.0, peak / bandwidth,
        counted.uncounted_moved * size / bandwidth, update,
    )  # fmt: skip
