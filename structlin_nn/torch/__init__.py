"""Structured layers for torch: layers, their replacement in models, projection, learning rates, counts and files."""

from structlin_nn.torch._muon import Muon
from structlin_nn.torch.blocks import StructuredMLP, fuse_mlps, mlp, projections
from structlin_nn.torch.counting import (
    CallCount,
    Counting,
    ModelCount,
    ModuleCount,
    Product,
    UnknownOperationError,
    count,
    register_no_product,
    register_product,
    time_modules,
)
from structlin_nn.torch.experts import ExpertLinear, StructuredExperts
from structlin_nn.torch.files import StructuredFile, load_structured, read_structured, save_structured
from structlin_nn.torch.groups import ParameterGroups, ParameterRule, format_groups, parameter_groups
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.pointwise import StructuredPointwise
from structlin_nn.torch.project import LayerProjection, ProjectionReport, project_linear, to_dense_linear
from structlin_nn.torch.replace import Replacement, ReplacementReport, replace_linear
from structlin_nn.torch.schedules import (
    MuAdamW,
    MultiplierScheduler,
    RatesWarning,
    trainer_optimizer,
    with_multipliers,
)
from structlin_nn.torch.unpack import pack_linear, unpack_linear

__all__ = [
    "CallCount", "Counting", "ExpertLinear", "LayerProjection", "ModelCount", "ModuleCount", "MuAdamW",
    "MultiplierScheduler", "Muon", "ParameterGroups", "ParameterRule", "Product", "ProjectionReport", "RatesWarning",
    "Replacement", "ReplacementReport", "StructuredExperts", "StructuredFile", "StructuredLinear", "StructuredMLP",
    "StructuredPointwise", "UnknownOperationError", "count", "format_groups", "fuse_mlps", "load_structured", "mlp",
    "pack_linear", "parameter_groups", "project_linear", "projections", "read_structured", "register_no_product",
    "register_product", "replace_linear", "save_structured", "time_modules", "to_dense_linear", "trainer_optimizer",
    "unpack_linear",
    "with_multipliers",
]  # fmt: skip
