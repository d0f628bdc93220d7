"""Bytes of a training step (weights, gradients, states of the optimizer, activations), and its least time on a device.

In the roofline model (Williams, Waterman and Patterson 2009, Roofline: an insightful visual performance model), an
operation takes at least its FLOPs over the peak rate, and at least its bytes over the bandwidth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from structlin._arrays import dtype_name
from structlin.execution.devices import DEVICES, Device
from structlin.execution.rates import least_seconds
from structlin_nn._text import check_integer, check_known
from structlin_nn.torch.counting import ModelCount, count

DTYPES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1,
}  # fmt: skip
"""Bytes of a number, by dtype."""
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sign": 1, "sgd": 1}
"""Numbers that an optimizer keeps for each parameter: two moments of Adam, or the momentum of Lion and SGD."""


def itemsize(dtype: Any) -> int:
    """Return the bytes of a number; ValueError for a dtype that is not in :data:`DTYPES`."""
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    check_known("dtype", name, DTYPES)
    return DTYPES[name]


def states_of(optimizer: str) -> int:
    """Return the numbers that an optimizer keeps for each parameter."""
    check_known("optimizer", optimizer, OPTIMIZER_STATES)
    return OPTIMIZER_STATES[optimizer]


def count_loss(shape: Sequence[int], soft: bool = False) -> ModelCount:
    """Count the cross-entropy of torch, which keeps values for the backward pass (:func:`training_bytes`).

    Parameters
    ----------
    shape
        Shape (..., classes) of the logits of a batch.
    soft
        Whether the targets are probabilities of all classes (as with mixup) instead of class indices.

    Examples
    --------
    >>> count_loss((4, 16, 50)).saved, count_loss((64, 10), soft=True).saved
    (3201, 1280)
    """
    *lead, classes = shape
    logits = torch.empty(torch.Size(lead).numel(), classes, device="meta", requires_grad=True)
    kind = logits.dtype if soft else torch.int64
    targets = torch.empty(logits.shape if soft else logits.shape[:1], device="meta", dtype=kind)
    return count(nn.CrossEntropyLoss(), logits, targets)


def training_bytes(
    counted: ModelCount,
    *,
    loss: ModelCount | None = None,
    optimizer: str = "adam",
    dtype: str | None = None,
    activation_dtype: str | None = None,
    zero_stage: int = 0,
    devices: int = 1,
) -> dict[str, int]:
    """Return the bytes that each device holds at the end of the forward pass of a training step.

    Parameters
    ----------
    counted
        Count of the batch of one device (:func:`structlin_nn.counting.count`).
    loss
        Count of the loss of the batch (:func:`count_loss`), in the dtype of the weights as under autocast. Default: the
        loss is part of ``counted`` or is not included.
    optimizer
        ``adam``, ``adamw``, ``sign`` or ``sgd``, with 2, 2, 1 and 1 numbers for each trainable parameter.
    dtype
        Dtype of weights, gradients and states; default: their own.
    activation_dtype
        Dtype of all floating activations (mixed precision); default: ``dtype``, or their own. Copies of the weights in
        this dtype are not included.
    zero_stage
        Stage of ZeRO (Rajbhandari et al. 2020), that is, what data-parallel devices share: 0 nothing, 1 the states of
        the optimizer, 2 also the gradients, 3 also the weights (the default of FSDP).
    devices
        Number of devices that share it. The result is that of the largest share.

    Returns
    -------
    dict[str, int]
        ``weights`` (also frozen ones), ``buffers``, ``gradients``, ``optimizer_states``, ``activations`` (``saved`` of
        :class:`structlin_nn.counting.ModelCount`), ``loss`` and their ``total``. Temporary arrays are not included,
        such as the logits while the loss is computed, gathered weights, and fragmentation.

    Raises
    ------
    ValueError
        For an unknown optimizer, dtype or stage; if ``devices`` is too small; if activations were not
        counted.

    References
    ----------
    Rajbhandari et al. (2020), ZeRO: memory optimizations toward training trillion parameter models.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> from structlin_nn.counting import count
    >>> counted = count(nn.Linear(8, 5), zeros(3, 8))
    >>> training_bytes(counted)["activations"], training_bytes(counted, zero_stage=1, devices=2)["optimizer_states"]
    (96, 180)
    """
    if zero_stage not in (0, 1, 2, 3) or isinstance(zero_stage, bool):
        raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage!r}")
    check_integer("devices", devices)
    for part in (counted, loss):
        if part is not None and not part.saved_known:
            raise ValueError(
                "activations were not counted: Counting does not count them, and neither does count under torch.func; "
                "call count(model, input) outside of torch.func"
            )
    own = counted.dtype if counted.dtype in DTYPES else "float32"
    size = itemsize(dtype or own)
    weights, trainable = counted.param_bytes, counted.trainable_bytes
    if dtype is not None:
        weights, trainable = counted.params * size, counted.trainable_params * size
    given = activation_dtype or dtype
    kept = counted.saved_float_bytes if given is None else counted.saved * itemsize(given)

    def share(held: int, stage: int) -> int:
        return -(-held // (devices if zero_stage >= stage else 1))

    found = {
        "weights": share(weights, 3),
        "buffers": counted.buffer_bytes,
        "gradients": share(trainable, 2),
        "optimizer_states": share(states_of(optimizer) * trainable, 1),
        "activations": kept + counted.saved_bytes,
        "loss": 0 if loss is None else loss.saved * size + loss.saved_bytes,
    }
    return found | {"total": sum(found.values())}


def measure_cpu(dtype: str = "float32") -> Device:
    """Measure this CPU with torch's threads, by a product of 1024 x 1024 matrices and a copy of 64 MiB.

    The least time of some repetitions counts. ValueError for an unknown dtype, or a dtype of one byte.
    """
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
    check_known("device", name, (*DEVICES, "cpu"))
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
    intensity, ridge
        FLOPs per byte of the products, forward and backward, and least intensity at which the device reaches its peak
        rate.
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
