"""Parameters, multiply-accumulates (MACs) and saved activations of torch models, counted while they run.

A structured layer costs the MACs of its structure for each vector. Every other operation of torch is in one of three
lists (:mod:`structlin_nn.torch.counting._lists`). FLOPs of FFTs are not MACs (``other_flops``). The conventions for the
backward pass, attention and complex numbers are in ``docs/accounting.md``.
"""

from structlin_nn.torch.counting import _formulas, _linalg  # these modules register the formulas
from structlin_nn.torch.counting._lists import (
    Product,
    UnknownOperationError,
    classify,
    classify_name,
    operation_names,
    register_no_product,
    register_product,
)
from structlin_nn.torch.counting._recorder import backward_macs
from structlin_nn.torch.counting._result import CallCount, ModelCount, ModuleCount
from structlin_nn.torch.counting._run import Counting, count, time_modules

__all__ = [
    "CallCount", "Counting", "ModelCount", "ModuleCount", "Product", "UnknownOperationError", "backward_macs",
    "classify", "classify_name", "count", "operation_names", "register_no_product", "register_product",
    "time_modules",
]  # fmt: skip

del _formulas, _linalg
