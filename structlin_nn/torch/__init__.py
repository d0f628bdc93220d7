"""Structured layers for torch: the layer, its place in existing models, and learning rates by structure."""

from structlin_nn.torch.groups import ParameterGroups, ParameterRule, format_groups, parameter_groups
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.replace import Replacement, ReplacementReport, replace_linear

__all__ = [
    "ParameterGroups",
    "ParameterRule",
    "Replacement",
    "ReplacementReport",
    "StructuredLinear",
    "format_groups",
    "parameter_groups",
    "replace_linear",
]
