"""Compute accounting: what models cost in parameters, multiply-accumulates, bytes and, at least, time.

:func:`count` counts any torch model from the calls of a forward pass, :func:`count_model` the named models with their
structures, learning rates and, asked for, training runs. 1 MAC = 2 FLOPs. Nothing is estimated from the number of
parameters: every operation is counted, or listed as not counted.
"""

from structlin_nn.counting._named import count_model, format_count
from structlin_nn.torch.counting import CallCount, ModelCount, backward_macs, count

__all__ = ["CallCount", "ModelCount", "backward_macs", "count", "count_model", "format_count"]
