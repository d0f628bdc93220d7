"""Bytes of a training step: weights, gradients, states of the optimiser, activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin._arrays import dtype_name
from structlin_nn._text import check_integer
from structlin_nn.torch.counting import ModelCount, count

DTYPES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1,
}  # fmt: skip
"""Bytes of a number."""
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sign": 1, "sgd": 1}
"""Numbers that an optimiser keeps for each parameter: both moments; the momentum of Lion, and that of SGD."""


def itemsize(dtype: Any) -> int:
    """Return the bytes of a number; ValueError for a dtype that is not in :data:`DTYPES`."""
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def states_of(optimizer: str, states: int | None = None) -> int:
    """Return the numbers that an optimiser keeps for each parameter, or ``states`` if given; ValueError if unknown."""
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZER_STATES)}")
    kept = OPTIMIZER_STATES[optimizer] if states is None else states
    check_integer("states", kept, 0)
    return kept


class _CrossEntropy(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)


def count_loss(shape: Sequence[int], soft: bool = False) -> ModelCount:
    """Count what the cross-entropy of logits of a shape (..., classes) keeps for the backward pass.

    With `soft`, targets are probabilities of all classes (mixup), otherwise numbers of classes.

    Examples
    --------
    >>> count_loss((4, 16, 50)).saved, count_loss((64, 10), soft=True).saved
    (3201, 1280)
    """
    *lead, classes = shape
    logits = torch.empty(torch.Size(lead).numel(), classes, device="meta", requires_grad=True)
    kind = logits.dtype if soft else torch.int64
    targets = torch.empty(logits.shape if soft else logits.shape[:1], device="meta", dtype=kind)
    return count(_CrossEntropy(), logits, targets)


def training_bytes(
    counted: ModelCount,
    *,
    loss: ModelCount | None = None,
    optimizer: str = "adam",
    states: int | None = None,
    dtype: str | None = None,
    activation_dtype: str | None = None,
    zero_stage: int = 0,
    devices: int = 1,
) -> dict[str, int]:
    """Return the bytes that a training step holds at the end of its forward pass, on each device.

    Parameters
    ----------
    counted
        Count of the batch of one device (:func:`structlin_nn.counting.count`).
    loss
        Count of the loss of the batch (:func:`count_loss`), which autocast computes in the dtype of the weights. None
        if it is part of ``counted``, or left out.
    optimizer
        ``adam``, ``adamw``, ``sign`` or ``sgd``, which keep 2, 2, 1 and 1 numbers for each trainable parameter.
    states
        Another number of these: 0 for SGD without momentum.
    dtype
        Dtype of weights, gradients and states; None: those of the model.
    activation_dtype
        Dtype of all floating activations (mixed precision). None: ``dtype``, or else what the forward pass kept. Copies
        of the weights in it are not counted.
    zero_stage
        What data-parallel devices share (Rajbhandari et al., *ZeRO*, 2020): 0 nothing, 1 the states of the optimiser, 2
        the gradients too, 3 the weights too (the default of FSDP).
    devices
        Number of these devices; the largest share counts.

    Returns
    -------
    dict[str, int]
        ``weights`` with frozen ones, ``buffers``, ``gradients``, ``optimizer_states``, ``activations``
        (``ModelCount.saved``), ``loss`` and their ``total``. Temporary arrays, such as weights that are gathered for a
        layer, and fragmentation are not included. ValueError if the activations were not counted.

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
            raise ValueError("what the forward pass keeps was not counted: inside a context, or under torch.func")
    own = counted.dtype if counted.dtype in DTYPES else "float32"
    size, frozen = itemsize(dtype or own), counted.params - counted.trainable_params
    trainable, rest = counted.trainable_params * size, frozen * size
    if dtype is None:
        trainable, rest = counted.trainable_bytes, counted.param_bytes - counted.trainable_bytes
    given = activation_dtype or dtype
    kept = counted.saved_float_bytes if given is None else counted.saved * itemsize(given)
    shares = [devices if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    found = {
        "weights": -(-(trainable + rest) // shares[0]),
        "buffers": counted.buffer_bytes,
        "gradients": -(-trainable // shares[1]),
        "optimizer_states": -(-states_of(optimizer, states) * trainable // shares[2]),
        "activations": kept + counted.saved_bytes,
        "loss": 0 if loss is None else loss.saved * size + loss.saved_bytes,
    }
    return found | {"total": sum(found.values())}
