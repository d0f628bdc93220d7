"""torch layers with structured weights, replacement of layers in any model, and parameter groups."""

from structlin_nn.torch.groups import format_groups, parameter_groups
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.replace import Replacement, ReplacementReport, replace_linear

__all__ = [
    "Replacement",
    "ReplacementReport",
    "StructuredLinear",
    "format_groups",
    "parameter_groups",
    "replace_linear",
]
