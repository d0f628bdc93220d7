"""Compute accounting: what models cost in parameters, multiply-accumulates, bytes and, at least, time.

:func:`count` counts any torch model from the calls of a forward pass, :func:`count_model` the named models with their
structures, learning rates and, asked for, training runs. 1 MAC = 2 FLOPs. Nothing is estimated from the number of
parameters: every operation is counted, or listed as not counted.
"""

from structlin_nn.counting._memory import DTYPES, OPTIMIZER_STATES, count_loss, training_bytes
from structlin_nn.counting._named import count_model, format_count
from structlin_nn.counting._roofline import DEVICES, Device, Roofline, device, measure_cpu, roofline
from structlin_nn.torch.counting import CallCount, ModelCount, backward_macs, count

__all__ = [
    "DEVICES", "DTYPES", "OPTIMIZER_STATES", "CallCount", "Device", "ModelCount", "Roofline", "backward_macs", "count",
    "count_loss", "count_model", "device", "format_count", "measure_cpu", "roofline", "training_bytes",
]  # fmt: skip
