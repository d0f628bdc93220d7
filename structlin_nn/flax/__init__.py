"""Structured layers for flax.nnx: the layer, its replacement in models, learning rates and counts."""

from structlin_nn.flax.counting import JaxCount, UnknownPrimitiveError, count, register_no_product, register_primitive
from structlin_nn.flax.linear import Index, StructuredLinear
from structlin_nn.flax.rates import ParameterRates, ParameterRule, optimizer_for, parameter_rates, scale_by_rates
from structlin_nn.flax.replace import Replacement, ReplacementReport, replace_linear, to_dense_linear

__all__ = [
    "Index", "JaxCount", "ParameterRates", "ParameterRule", "Replacement", "ReplacementReport", "StructuredLinear",
    "UnknownPrimitiveError", "count", "optimizer_for", "parameter_rates", "register_no_product", "register_primitive",
    "replace_linear", "scale_by_rates", "to_dense_linear",
]  # fmt: skip
