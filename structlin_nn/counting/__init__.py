"""Compute accounting: parameters, multiply-accumulates (MACs), bytes, and a lower bound of the time of models.

:func:`count` counts any torch model. :func:`count_model` counts a named model with its structures and learning rates,
and optionally a training run. 1 MAC = 2 FLOPs. Nothing is estimated from the number of parameters. Every operation is
counted, listed as one without products, or reported as unknown.
"""

from structlin.execution.devices import DEVICES, Device
from structlin_nn.counting._costs import (
    DTYPES,
    OPTIMIZER_STATES,
    Roofline,
    count_loss,
    device,
    measure_cpu,
    roofline,
    training_bytes,
)
from structlin_nn.counting._named import count_model, format_count
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
