"""Layout of a model: a description of its structured layers as plain values, from which another model gets them.

A layout has two entries. ``layers`` describes each structured layer, except for the values of its factors. ``linear``
lists the names of ``nn.Linear`` layers and dense layers of experts: a model with a structured layer or a Conv1D of
transformers there gets a dense layer instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

import structlin
from structlin.structure import AbstractStructure, Structure
from structlin_nn._layer import tuples
from structlin_nn._patterns import listed
from structlin_nn.torch._modules import (
    as_before,
    dense_layer,
    is_conv1d,
    linear_sizes,
    num_experts,
    places_of,
    pointwise_sizes,
    put_structured,
    sizes_of,
    structured_kind,
)
from structlin_nn.torch._operator import from_text, to_text
from structlin_nn.torch.experts import ExpertLinear
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.replace import _check_is_called
from structlin_nn.torch.unpack import unpack_linear

_TYPES: dict[str, type | tuple[type, ...]] = {
    "names": list, "in_features": int, "out_features": int, "structure": (str, type(None)), "options": dict,
    "chain": (dict, type(None)), "factors": list, "bias": bool, "rms_cap": bool, "gain": bool, "rule": str,
    "zero_init": bool, "checkpoint": bool,
}  # fmt: skip
_EXPERTS = "experts"  # the number of experts; other layers have no such entry


def layout_of(model: nn.Module) -> dict[str, Any]:
    """Return the layout of a model."""
    if isinstance(model, StructuredLinear):
        raise ValueError("the model itself is a structured layer; put it in a container")
    places = places_of(model, lambda module: isinstance(module, StructuredLinear))
    plain = [n for n, m in model.named_modules(remove_duplicate=False) if type(m) in (nn.Linear, ExpertLinear) and n]
    return {"layers": [_form(layer, names) for layer, names in places.items()], "linear": plain}


def _form(layer: StructuredLinear, names: Sequence[str]) -> dict[str, Any]:
    if any(parametrize.is_parametrized(module) for module in layer.modules()):
        raise ValueError(f"layer {names[0]!r} has parametrizations, which a layout cannot describe; remove them first")
    kind, structure = layer._plan.operator_class, layer.structure
    named = issubclass(kind, structlin.NamedOperator)
    if not named and not isinstance(structure, Structure):
        raise ValueError(f"layer {names[0]!r}: {structure!r} is neither a registered structure nor a chain of einsums")
    return {
        "names": list(names),
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "structure": kind.name if named else None,
        "options": {key: _plain(value, names[0], key) for key, value in layer.options.items()},
        "chain": json.loads(to_text(structure)) if isinstance(structure, Structure) else None,
        "factors": [list(factor.shape) for factor in structure.factors],
        "bias": layer.bias is not None,
        "rms_cap": layer.rms_cap,
        "gain": layer.gains is not None,
        "rule": layer.rule,
        "zero_init": layer.zero_init,
        "checkpoint": layer.checkpoint,
        **({} if num_experts(layer) is None else {_EXPERTS: num_experts(layer)}),
    }


def _plain(value: Any, layer: str, option: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, layer, option) for entry in value]
    if hasattr(value, "__index__"):
        return value.__index__()
    raise ValueError(f"layer {layer!r}: option {option}={value!r} cannot be represented in JSON")


def check_layout(layout: Any) -> None:
    """Raise ValueError unless this is a layout of structures that exist and have factors of the stated shapes."""
    if not isinstance(layout, Mapping) or not {"layers", "linear"} <= layout.keys():
        raise ValueError(f"a layout must have the entries layers and linear, got {_short(layout)}")
    if not isinstance(layout["linear"], list) or not all(isinstance(name, str) for name in layout["linear"]):
        raise ValueError(f"linear must be a list of names, got {_short(layout['linear'])}")
    if not isinstance(layout["layers"], list):
        raise ValueError(f"layers must be a list, got {_short(layout['layers'])}")
    for form in layout["layers"]:
        _check_form(form)
    names = [name for form in layout["layers"] for name in form["names"]] + layout["linear"]
    if len(set(names)) < len(names):
        raise ValueError(f"layer {next(n for n in names if names.count(n) > 1)!r} is described twice")


def _check_form(form: Any) -> None:
    if not isinstance(form, Mapping) or form.keys() - {_EXPERTS} != _TYPES.keys():
        raise ValueError(f"a layer must be described by {', '.join(_TYPES)}, got {_short(form)}")
    for key, kind in {**_TYPES, **({_EXPERTS: int} if _EXPERTS in form else {})}.items():
        value = form[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"entry {key} of a layer has the wrong type, got {_short(value)}")
    if not form["names"] or not all(isinstance(name, str) and name for name in form["names"]):
        raise ValueError(f"names of a layer must not be empty, got {_short(form['names'])}")
    try:
        structure = _structure(form)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {form['names'][0]!r}: {error}") from error
    shapes = [list(factor.shape) for factor in structure.factors]
    same_chain = form["chain"] is None or (
        isinstance(structure, Structure) and json.loads(to_text(structure)) == form["chain"]
    )
    if shapes != form["factors"] or not same_chain:
        raise ValueError(
            f"layer {form['names'][0]!r}: {form['structure']} with {form['options']} has factors of shape {shapes} "
            f"here, but {_short(form['factors'])} in the file, which another version of this structure wrote"
        )


def _structure(form: Mapping[str, Any]) -> AbstractStructure:
    shape = form["out_features"], form["in_features"]
    if form["structure"] is None:
        made: AbstractStructure = from_text(json.dumps(form["chain"]))
        if made.shape != shape:
            raise ValueError(f"a chain of shape {made.shape} in a layer of shape {shape}")
        return made
    if form["structure"] not in structlin.structure_names():
        raise ValueError(f"structure {form['structure']!r} is not registered; import the module that registers it")
    options = {name: tuples(value) for name, value in form["options"].items()}
    return structlin.design(form["structure"], shape, **options)


@dataclass(frozen=True)
class Change:
    """A layer to replace: its names, the old module, and the new module on the meta device."""

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module

    def apply(self, model: nn.Module) -> None:
        """Replace the old layer by the new one, without values."""
        held = [*self.old.parameters(), *self.old.buffers()]
        made = self.new.to_empty(device=held[0].device) if held else self.new
        put_structured(model, self.names, made)


def changes(model: nn.Module, layout: Mapping[str, Any]) -> list[Change]:
    """Return the replacements after which ``model`` has a layout, without making them, on the meta device.

    Packed weights are unpacked (:func:`structlin_nn.torch.unpack_linear`). Layers that agree with the layout stay.
    """
    unpack_linear(model, [name for form in layout["layers"] for name in form["names"]])
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model, lambda module: True)
    found = []
    for form in layout["layers"]:
        names = tuple(form["names"])
        old = _layer_at(names, modules, places)
        own = (*sizes_of(old), old._parameters.get("bias") is not None, num_experts(old))
        given = (form["in_features"], form["out_features"], form["bias"], form.get(_EXPERTS))
        if own != given:
            raise ValueError(
                f"layer {names[0]!r} is a {_described(*given)} in the file, but a {_described(*own)} in the model"
            )
        if isinstance(old, StructuredLinear):
            if _form(old, names) == dict(form):
                continue
        else:
            _check_is_called(model, names, old)
        found.append(Change(names, old, as_before(old, _structured(form, old))))
    for old in dict.fromkeys(modules[name] for name in layout["linear"] if name in modules):
        if isinstance(old, StructuredLinear) or is_conv1d(old):
            bias = old._parameters.get("bias") is not None
            new = dense_layer(num_experts(old), *sizes_of(old), bias, _dtype(old))
            found.append(Change(tuple(places[old]), old, as_before(old, new)))
    return found


def _layer_at(
    names: Sequence[str], modules: Mapping[str, nn.Module], places: Mapping[nn.Module, list[str]]
) -> nn.Module:
    old = modules.get(names[0])
    if old is None or not (linear_sizes(old) or pointwise_sizes(old) or isinstance(old, StructuredLinear)):
        linear = [n for n, m in modules.items() if n and (linear_sizes(m) or isinstance(m, StructuredLinear))]
        what = "no layer" if old is None else f"a {type(old).__name__}, not a linear layer,"
        raise ValueError(f"the model has {what} at {names[0]!r}; its linear layers are {listed(linear) or 'none'}")
    if sorted(places[old]) != sorted(names):
        raise ValueError(
            f"a layer has the names {', '.join(names)} in the file, but {', '.join(places[old])} in the model"
        )
    return old


def _structured(form: Mapping[str, Any], old: nn.Module) -> StructuredLinear:
    options = {name: tuples(value) for name, value in form["options"].items()} if form["structure"] else {}
    return structured_kind(old)(
        form["in_features"], form["out_features"], form["bias"], device="meta", dtype=_dtype(old),
        structure=form["structure"] or _structure(form), rms_cap=form["rms_cap"],
        gain=form["gain"] if form["rms_cap"] else None, rule=form["rule"], zero_init=form["zero_init"],
        checkpoint=form["checkpoint"], **options,
    )  # fmt: skip


def _dtype(layer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in layer.parameters()), torch.get_default_dtype())


def _described(d_in: int, d_out: int, bias: bool, experts: int | None) -> str:
    number = "" if experts is None else f" of {experts} experts"
    return f"layer of {d_in} -> {d_out} {'with' if bias else 'without'} a bias{number}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
