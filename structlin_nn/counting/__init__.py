"""Compute accounting: what models cost in parameters, multiply-accumulates, bytes and, at least, time.

:func:`count` counts any torch model from the calls of a forward pass, :func:`count_model` the named models with their
structures, learning rates and, optionally, training runs. 1 MAC = 2 FLOPs. Nothing is estimated from the number of
parameters: every operation is counted, listed as one without products, or named as unknown.
"""

from structlin.execution.devices import DEVICES, Device
from structlin_nn.counting._memory import DTYPES, OPTIMIZER_STATES, count_loss, training_bytes
from structlin_nn.counting._named import count_model, format_count
from structlin_nn.counting._roofline import Roofline, device, measure_cpu, roofline
from structlin_nn.torch.counting import (
    CallCount,
    Counting,
    ModelCount,
    ModuleCount,
    Product,
    UnknownOperationError,
    backward_macs,
    classify,
    classify_name,
    count,
    operation_names,
    register_no_product,
    register_product,
    time_modules,
)

__all__ = [
    "DEVICES", "DTYPES", "OPTIMIZER_STATES", "CallCount", "Counting", "Device", "ModelCount", "ModuleCount", "Product",
    "Roofline", "UnknownOperationError", "backward_macs", "classify", "classify_name", "count", "count_loss",
    "count_model", "device", "format_count", "measure_cpu", "operation_names", "register_no_product",
    "register_product", "roofline", "time_modules", "training_bytes",
]  # fmt: skip
