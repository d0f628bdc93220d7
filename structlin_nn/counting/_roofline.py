"""Devices by their data sheets, and the least time of counted work on them.

In the roofline model (Williams, Waterman and Patterson 2009, Roofline: an insightful visual performance model), an
operation takes at least its FLOPs over the peak rate, and at least its bytes over the bandwidth.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from structlin.execution.devices import DEVICES, Device
from structlin.execution.rates import least_seconds
from structlin_nn.counting._memory import itemsize, states_of
from structlin_nn.torch.counting import ModelCount


def measure_cpu(dtype: str = "float32") -> Device:
    """Measure this CPU with torch's threads, by a product of 1024 x 1024 matrices and a copy of 64 MiB.

    The least time of some repetitions counts. ValueError for an unknown dtype, or a dtype of one byte.
    """
    import torch

    if itemsize(dtype) == 1:
        raise ValueError(f"a CPU can be measured in float64, float32, bfloat16 or float16, got {dtype}")
    a, b = torch.ones(2, 1024, 1024, dtype=getattr(torch, dtype))
    out = torch.empty_like(a)
    source, target = torch.ones(2, 1 << 24, dtype=torch.float32)
    product = least_seconds(lambda: torch.mm(a, b, out=out))
    copy = least_seconds(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores"
    return Device(name, {dtype: 2 * 1024**3 / product}, 2 * 4 * (1 << 24) / copy, None, "measured now")


def device(name: str, dtype: str = "float32") -> Device:
    """Return a device of :data:`DEVICES` by name; ``cpu`` is measured. ValueError for any other name.

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
    """The least time of a training step of one batch, in seconds.

    Attributes
    ----------
    device, dtype
        Name of the device, and dtype of the products.
    forward, backward
        Seconds of the products, each limited by compute or by memory.
    compute
        Seconds of the same products at the peak rate.
    intensity
        FLOPs per byte of the products, forward and backward.
    ridge
        Least intensity at which the device reaches its peak rate.
    other
        Seconds of operations without products in the forward pass, if each reads and writes memory. Fusion by a
        compiler takes less.
    update
        Seconds in which the optimizer reads and writes weights, gradients and states.
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
        """Seconds of products and update, a lower bound of the time of a step."""
        return self.forward + self.backward + self.update


def roofline(
    counted: ModelCount, on: Device, dtype: str | None = None, *, optimizer: str = "adam",
    weight_dtype: str | None = None, shares: int = 1,
) -> Roofline:  # fmt: skip
    """Return the least time of a training step of a counted batch on a device.

    Parameters
    ----------
    counted
        Count of the whole batch.
    on
        Device (:func:`device`).
    dtype
        Dtype of the products, also ``tfloat32``; default: that of the parameters. Other FLOPs (FFTs) have the same
        rate.
    optimizer
        As in :func:`structlin_nn.counting.training_bytes`.
    weight_dtype
        Dtype of weights, gradients and states in the update; default: that of the parameters.
    shares
        Number of devices that share the update (ZeRO).

    Raises
    ------
    ValueError
        For an unknown dtype or optimizer; without ``dtype`` if the parameters have several.

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
        raise ValueError("the parameters have several dtypes; pass dtype, the dtype of the products")
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
    update = (3 + 2 * states_of(optimizer)) * weights / bandwidth / shares
    return Roofline(
        on.name, dtype, forward, backward, compute, flops / moved if moved else 0.0, peak / bandwidth,
        counted.uncounted_moved * size / bandwidth, update,
    )  # fmt: skip
