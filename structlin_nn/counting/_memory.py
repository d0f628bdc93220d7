"""Bytes of a training step: weights, gradients, states of the optimizer, activations."""

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
"""Bytes of a number, by dtype."""
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sign": 1, "sgd": 1}
"""Numbers that an optimizer keeps for each parameter: two moments of Adam, or the momentum of Lion and SGD."""


def itemsize(dtype: Any) -> int:
    """Return the bytes of a number; ValueError for a dtype that is not in :data:`DTYPES`."""
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def states_of(optimizer: str) -> int:
    """Return the numbers that an optimizer keeps for each parameter."""
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZER_STATES)}")
    return OPTIMIZER_STATES[optimizer]


class _CrossEntropy(nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)


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
    return count(_CrossEntropy(), logits, targets)


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
        "optimizer_states": -(-states_of(optimizer) * trainable // shares[2]),
        "activations": kept + counted.saved_bytes,
        "loss": 0 if loss is None else loss.saved * size + loss.saved_bytes,
    }
    return found | {"total": sum(found.values())}
