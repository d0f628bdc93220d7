"""Parameters, multiply-accumulates (MACs) and saved activations of torch models, counted while they run.

A structured layer costs the MACs of its structure for each vector. Every other operation of torch is in one of three
lists (:mod:`structlin_nn.torch.counting._lists`). Operations that compute products have a formula. Operations without
products (norms, activations, softmax, lookups) are listed by name and number of calls. Unknown operations are reported
first, because their products are missing from the totals. Nothing is estimated from the number of parameters. On the
meta device, a model is counted without allocation.

1 MAC = 2 FLOPs. A complex MAC is one MAC. The FLOPs of FFTs are separate (``other_flops``), because they are not
products.

The backward pass is run and counted. Each operand that needs a gradient costs one product. So a training step costs
three times the forward pass, less the gradients that are not needed, plus what checkpointing computes again.
``scaled_dot_product_attention`` has two products forward and four backward on every device, for all pairs unless
``causal_discount`` is set. These are the products of the mathematics, by which model FLOPs utilization is defined.
Fused kernels compute the scores again in the backward pass; ``flash_backward`` adds these.
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
from structlin_nn.torch.counting._run import Counting, count
from structlin_nn.torch.counting._timing import time_modules

__all__ = [
    "CallCount", "Counting", "ModelCount", "ModuleCount", "Product", "UnknownOperationError", "backward_macs",
    "classify", "classify_name", "count", "operation_names", "register_no_product", "register_product",
    "time_modules",
]  # fmt: skip

del _formulas, _linalg
