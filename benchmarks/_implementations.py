"""The implementations of a structured layer that are compared, each as a module ``(tokens, d_in) -> (tokens, d_out)``.

``structlin`` is the layer of this library. ``einsum`` runs the same chain by one ``torch.einsum`` for each step, and
``einsum_compiled`` does so under ``torch.compile``. The others are layers of other libraries that are installed and
have the structure.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

import structlin as sl
from structlin_nn.torch import StructuredLinear

__all__ = ["IMPLEMENTATIONS", "AbsentError", "Implementation", "build"]


class AbsentError(Exception):
    """The implementation does not support this row; the message states the reason."""


Implementation = Callable[[StructuredLinear, str, Mapping[str, object]], nn.Module]


class Einsum(nn.Module):
    """The chain of a layer as plain einsums, on copies of its factors."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        structure = layer.structure
        assert isinstance(structure, sl.Structure)
        self.factors = nn.ParameterList(nn.Parameter(f.detach().clone()) for f in layer.factors)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        sizes = dict(structure.sizes)
        self.steps = [
            (f"...{s.input},{s.factor}->...{s.output}", tuple(sizes[a] for a in s.input)) for s in structure.steps
        ]
        self.padding, self.cut = structure.padding[0], structure.d_out

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if self.padding:
            x = nn.functional.pad(x, (0, self.padding))
        for (equation, shape), factor in zip(self.steps, self.factors, strict=True):
            x = torch.einsum(equation, x.reshape(tokens, *shape), factor)
        x = x.reshape(tokens, -1)[:, : self.cut]
        return x if self.bias is None else x + self.bias


def _imported(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name} cannot be imported: {error}") from None


def _structlin(layer: StructuredLinear, name: str, options: Mapping[str, object]) -> nn.Module:
    return layer


def _einsum(layer: StructuredLinear, name: str, options: Mapping[str, object]) -> nn.Module:
    return Einsum(layer)


def _einsum_compiled(layer: StructuredLinear, name: str, options: Mapping[str, object]) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(Einsum(layer), dynamic=False)


def _torch_structured(layer: StructuredLinear, name: str, options: Mapping[str, object]) -> nn.Module:
    if name == "monarch":
        blocks = int(str(options["blocks"]))
    elif name == "block_tensor_train" and options.get("rank") == 1 and layer.in_features == layer.out_features:
        blocks = math.isqrt(layer.in_features)  # the same matrices
        if blocks**2 != layer.in_features:
            raise AbsentError(f"{layer.in_features} is not a square")
    else:
        raise AbsentError("torch-structured does not have this structure")
    module = _imported("torch_structured")
    peer = module.make_linear(
        "monarch", layer.in_features, layer.out_features, bias=layer.bias is not None, nblocks=blocks
    )
    return peer.to(layer.factors[0])


def _tltorch(implementation: str) -> Implementation:
    def make(layer: StructuredLinear, name: str, options: Mapping[str, object]) -> nn.Module:
        if name != "tensor_train":
            raise AbsentError("tensorly-torch does not have this structure")
        module = _imported("tltorch")
        shapes = [factor.shape for factor in layer.structure.factors]  # (rank, out, in, rank)
        return module.FactorizedLinear(
            tuple(s[2] for s in shapes), tuple(s[1] for s in shapes), bias=layer.bias is not None,
            factorization="blocktt",
            rank=int(str(options["rank"])), implementation=implementation,
            device=layer.factors[0].device, dtype=layer.factors[0].dtype,
        )  # fmt: skip

    return make


IMPLEMENTATIONS: dict[str, Implementation] = {
    "structlin": _structlin,
    "einsum": _einsum,
    "einsum_compiled": _einsum_compiled,
    "torch_structured": _torch_structured,
    "tltorch": _tltorch("factorized"),
    "tltorch_reconstructed": _tltorch("reconstructed"),
}


def build(implementation: str, layers: list[StructuredLinear], name: str, options: Mapping[str, object]) -> nn.Module:
    """Build the implementation's modules for ``layers`` as one sequence; raise :class:`AbsentError` if it has none."""
    return nn.Sequential(*(IMPLEMENTATIONS[implementation](layer, name, options) for layer in layers))
