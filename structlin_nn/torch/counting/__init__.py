"""Parameters, multiply-accumulates (MACs) and saved activations of torch models, counted while they run.

Structured layers are counted by their structure times the vectors they are called on; every other operation of torch
is in one of three lists (:mod:`structlin_nn.torch.counting._lists`): those that compute products have a formula,
those that compute none (norms, activations, softmax, lookups) are listed by name and number of calls, and those that
are unknown are named first, because their products are missing from the totals. Nothing is estimated from parameter
counts. Run models on the meta device to count them without allocating anything.

1 MAC = 2 FLOPs. A complex MAC is one MAC. FFTs are no products; their FLOPs count apart (``other_flops``).

Training: the backward pass is run, and counts as it runs: one product for each operand of a product that needs a
gradient, so that a training step costs three times the forward pass, less the gradients that are not needed, and
more where checkpointing computes again. ``scaled_dot_product_attention`` counts alike on every device: two products
forward and four backward, in full unless a causal mask is to be discounted. Those are the products of the
mathematics, which model FLOPs utilisation divides by; fused kernels compute the scores once more in the backward
pass (2.5 times the forward pass and not 2 times), which ``flash_backward`` adds.
"""

from structlin_nn.torch.counting import _formulas, _linalg  # they register the formulas
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
