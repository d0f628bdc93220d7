"""Helpers on the modules of a model, used by replacement and by parameter groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from structlin_nn.torch.experts import ExpertLinear, StructuredExperts
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.pointwise import StructuredPointwise

Module = TypeVar("Module", bound=nn.Module)
_CONV1D = "replaces_conv1d"  # attribute of a structured layer in the place of a Conv1D of transformers
_listeners: list[Callable[[nn.Module], None]] = []


def on_change(listener: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Register a function that is called with each model whose layers were replaced; return the function."""
    _listeners.append(listener)
    return listener


def changed(model: nn.Module) -> None:
    """Call the registered functions with a model whose layers were replaced."""
    for listener in _listeners:
        listener(model)


def check_model(model: Any, what: str) -> None:
    """Raise TypeError unless ``model`` is a module of torch."""
    if isinstance(model, nn.Module):
        return
    hint = ""
    if isinstance(model, type):
        hint = f": it is a class; pass an instance, {model.__name__}(...)"
    elif callable(getattr(model, "__next__", None)) or isinstance(model, list | tuple):
        hint = ": pass the model, not its parameters; the roles of parameters follow from the modules"
    raise TypeError(f"{what} takes a torch.nn.Module, got a {type(model).__name__}{hint}")


def put(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Set ``new`` as the submodule of each of these names."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)


def put_structured(model: nn.Module, names: Iterable[str], new: nn.Module) -> dict[str, None]:
    """Set a layer without a weight, and return notes on fused paths of torch's Transformer that it switches off.

    The fused inference path would read the weight.
    """
    put(model, names, new)
    notes: dict[str, None] = {}
    for name in names:
        while name:
            name = name.rpartition(".")[0]
            module = model.get_submodule(name)
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
                notes[f"fused inference path switched off: {name or 'the model'}"] = None
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
                notes[f"nested tensors switched off: {name or 'the model'}"] = None
    return notes


def places_of(model: nn.Module, wanted: Callable[[nn.Module], Any]) -> dict[Any, list[str]]:
    """Return the modules for which ``wanted`` is true, with all their names, in the order of registration."""
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            found.setdefault(module, []).append(name)
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is the Conv1D of transformers, a linear layer with a weight of shape (in, out)."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer: ``nn.Linear``, a Conv1D of transformers, or experts.

    None for other modules.
    """
    if isinstance(module, nn.Linear | ExpertLinear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None


def pointwise_sizes(module: Any) -> tuple[int, int] | None:
    """Return (in_channels, out_channels) of a convolution that is a linear layer at each position; otherwise None."""
    if (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and set(module.kernel_size) == {1}
        and module.groups == 1
        and not isinstance(module.padding, str)
        and not any(module.padding)
    ):
        return module.in_channels, module.out_channels
    return None


def sizes_of(layer: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer, a structured layer, or a convolution that :func:`pointwise_sizes` knows."""
    return linear_sizes(layer) or pointwise_sizes(layer) or (layer.in_features, layer.out_features)


def num_experts(layer: nn.Module) -> int | None:
    """Return the number of experts of a layer of experts; None for other layers."""
    return layer.num_experts if isinstance(layer, ExpertLinear | StructuredExperts) else None


def dense_layer(
    experts: int | None, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
) -> nn.Linear | ExpertLinear:
    """Return a dense layer, or those of experts, on the meta device."""
    if experts is None:
        return nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
    return ExpertLinear(experts, in_features, out_features, bias, device="meta", dtype=dtype)


def structured_kind(old: nn.Module) -> Callable[..., StructuredLinear]:
    """Return the function of the arguments of ``StructuredLinear`` that makes the layer for the place of ``old``."""
    if (experts := num_experts(old)) is not None:
        return partial(StructuredExperts, experts)
    if isinstance(old, StructuredPointwise) or pointwise_sizes(old) is not None:
        return StructuredPointwise.like(old)
    return _like_conv1d if is_conv1d(old) or getattr(old, _CONV1D, False) else StructuredLinear


def _like_conv1d(*args: Any, **options: Any) -> StructuredLinear:
    made = StructuredLinear(*args, **options)
    setattr(made, _CONV1D, True)
    return made


def dense_kind(old: StructuredLinear, weight: torch.Tensor) -> nn.Module:
    """Return the dense layer for the place of ``old``, with a weight (out, in), and a bias on the meta device.

    It is of the kind that the structured layer replaced, which the code of the model builds when it loads a file.
    """
    if isinstance(old, StructuredPointwise):
        return old.to_convolution(weight)
    made: Any = dense_layer(num_experts(old), old.in_features, old.out_features, old.bias is not None, weight.dtype)
    if getattr(old, _CONV1D, False) and old.bias is not None:
        with torch.device("meta"):
            made = sys.modules["transformers.pytorch_utils"].Conv1D(old.out_features, old.in_features)
        weight = weight.mT.contiguous()
    made.weight = nn.Parameter(weight)
    return made


def as_before(old: nn.Module, new: Module) -> Module:
    """Give a new layer the training mode of the old one, and ``requires_grad`` of its weight and its bias."""
    bias = old._parameters.get("bias")
    weight = old._parameters.get("weight")
    weights = [p for p in old.parameters() if p is not bias] if weight is None else [weight]
    new.requires_grad_(any(p.requires_grad for p in weights) or not weights)
    if bias is not None:
        new.get_parameter("bias").requires_grad_(bias.requires_grad)
    return new.train(old.training)
