"""Replacement of the linear layers of a model by structured ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

import structlin
from structlin.structure import AbstractStructure
from structlin_nn._patterns import Pattern, Patterns, as_patterns, show
from structlin_nn._replacement import (
    PRESETS,
    Replacement,
    ReplacementReport,
    check_choices,
    matching,
    names_of,
    select,
    untied,
)
from structlin_nn.torch._modules import (
    as_before,
    changed,
    check_model,
    linear_sizes,
    num_experts,
    places_of,
    pointwise_sizes,
    put_structured,
    sizes_of,
    structured_kind,
)
from structlin_nn.torch._roles import role_of
from structlin_nn.torch._step_check import replaced
from structlin_nn.torch.blocks import fuse_mlps
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.unpack import unpacked

__all__ = ["PRESETS", "Replacement", "ReplacementReport", "replace_linear"]

_LAYER_OPTIONS = ("rms_cap", "gain", "rule", "checkpoint", "zero_init")
Selection = Patterns | Callable[[str, nn.Module], bool]


def replace_linear(
    model: nn.Module,
    structure: str | AbstractStructure | Callable[[str, nn.Module], AbstractStructure],
    *,
    layers: Selection = "all_but_last",
    exclude: Patterns = (),
    overrides: Mapping[Pattern, Mapping[str, Any]] | None = None,
    min_features: int = 0,
    impossible: str = "skip",
    dearer: str = "warn",
    convolutions: bool = False,
    zero_init: Patterns = (),
    shared_weights: str = "error",
    rms_cap: bool = False,
    gain: bool | None = None,
    rule: str = "paper",
    checkpoint: bool = False,
    fuse: bool = False,
    unpack: bool = False,
    **options: Any,
) -> ReplacementReport:
    """Replace linear layers of ``model``, in place, by newly initialised :class:`StructuredLinear` layers.

    Linear layers are ``nn.Linear`` and the Conv1D of transformers. A new layer has the dtype, device, training mode and
    ``requires_grad`` of the old one, and a bias if the old one has a bias. It does not have the old values: factors are
    drawn from the global generator of torch at the scale of their structure, biases are 0. All checks precede the first
    replacement.

    A pattern is a glob for the full name of the layer, in which ``*`` also matches dots, or a compiled regular
    expression for the whole name. A module that is used at several places is selected (excluded) by any of its names,
    and is replaced by one layer at all places.

    Parameters
    ----------
    model
        Any module that contains linear layers.
    structure
        Name or class of a registered structure, a structure, if all layers have its shape, or a function that takes
        name and layer and returns a structure.
    layers
        Selection of layers: ``"all"``, ``"all_but_last"``, ``"intermediate"``, one or several patterns, or a predicate
        of name and layer. ``"all_but_last"`` leaves the head dense; a model whose last layer belongs to the last of
        several blocks has no head. ``"intermediate"`` leaves the first and the last layer dense, in the order of
        registration, which the report shows.
    exclude
        Patterns of layers that are not replaced.
    overrides
        Options for layers that match a pattern, such as ``{"*.attn.*": {"rank": 4}}``; the first matching pattern
        applies. They are added to ``options``. With the key ``structure`` they replace all options:
        ``{"*.fc1": {"structure": "monarch", "blocks": 4}}``.
    min_features
        Do not replace layers with fewer input or output features than this.
    impossible
        Action for a layer that cannot be replaced, because the structure does not have its size or its parent does not
        call it. ``"skip"`` leaves it dense, and the report states the reason; ``"error"`` raises. If no layer can be
        replaced, the first error is raised.
    dearer
        Action if a structured layer has more parameters or MACs than the dense one: ``"warn"``, ``"error"``, ``"skip"``
        (it stays dense), or ``"allow"``.
    convolutions
        Also replace convolutions of kernel size 1 without groups and padding.
    zero_init
        Patterns of layers whose last factor is initialised with zeros.
    shared_weights
        Action for a layer that shares its weight or bias with another module (a head that is tied to its embedding),
        which a replacement would untie: ``"error"``, or ``"skip"``, which leaves it dense.
    rms_cap, gain, rule, checkpoint
        As in :class:`StructuredLinear`.
    fuse
        Also replace each MLP of a known form by a :class:`StructuredMLP`, which runs its layers as one pass
        (:func:`structlin_nn.torch.fuse_mlps`). The report lists them.
    unpack
        First replace modules that pack weights into one parameter (experts of transformers, ``nn.MultiheadAttention``)
        by modules with linear layers (:func:`structlin_nn.torch.unpack_linear`). The layers of all experts are one
        module, which is replaced by :class:`StructuredExperts`.
    **options
        Options of the named structure.

    Returns
    -------
    ReplacementReport
        The replaced layers with parameters and MACs before and after, and every weight matrix that was not replaced.

    Raises
    ------
    ValueError
        If no layer is selected or can be replaced, a pattern matches no layer (the message lists the layers), or
        weights are tied. With ``impossible="error"``, if a selected layer cannot be replaced: the structure does not
        have its size, it belongs to ``nn.MultiheadAttention``, it is a subclass with another forward pass, or it has
        hooks or parametrizations.
    TypeError
        If ``model``, ``structure``, ``layers`` or a pattern has a wrong type.

    Notes
    -----
    A parent that reads the ``weight`` of a layer gets the dense matrix. The fused inference path of
    ``nn.TransformerEncoderLayer`` does so. It is switched off, and the report states this.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> print(replace_linear(model, "block_tensor_train", rank=2))
    layer  shape     params  structured    MACs  structured
    0      128 x 64   8,320       3,200   8,192       3,072
    2      64 x 128   8,256       4,160   8,192       4,096
    total            16,576       7,360  16,384       7,168
    stays dense: *.weight (not chosen, 640 parameters)
    >>> replace_linear(model, "block_tensor_train", layers="head")
    Traceback (most recent call last):
    ...
    ValueError: layers: no linear layer matches 'head'; the linear layers are 4
    """
    check_model(model, "replace_linear")
    check_choices(
        shared_weights=(shared_weights, ("error", "skip")), impossible=(impossible, ("skip", "error")),
        dearer=(dearer, ("warn", "error", "skip", "allow")),
    )  # fmt: skip
    common = {"rms_cap": rms_cap, "gain": gain, "rule": rule, "checkpoint": checkpoint}
    with unpacked(model, unpack) as restore:
        places, chosen = selected(
            model, layers, exclude, lambda module: linear_sizes(module) or (convolutions and pointwise_sizes(module))
        )
        zeroed = matching(chosen, as_patterns(zero_init), "zero_init")
        by_pattern = _overrides(overrides or {}, chosen, structure)
        owners = _owners(model)
        expensive: list[tuple[str, str]] = []
        skipped: list[tuple[str, str]] = []
        errors: list[ValueError] = []
        made: dict[nn.Module, StructuredLinear] = {}

        def cannot(name: str, error: ValueError, final: bool) -> None:
            if impossible == "error" or final:
                raise error
            errors.append(error)
            skipped.append((name, str(error)))

        for linear, names in chosen.items():
            name, sizes = names[0], sizes_of(linear)
            try:
                _check_is_called(model, names, linear)
            except ValueError as error:
                cannot(name, error, False)
                continue
            if others := others_of(linear, names, owners):
                if shared_weights == "error":
                    raise untied(name, others)
                skipped.append((name, f"shares {', '.join(others)}"))
                continue
            if min(sizes) < min_features:
                skipped.append((name, f"it has fewer than {min_features} features: {sizes[0]} -> {sizes[1]}"))
                continue
            own = dict(by_pattern.get(linear, {}))
            kind, rest = (own.pop("structure"), {}) if "structure" in own else (structure, options)
            try:
                found = as_structure(kind)
                found = found(name, linear) if callable(found) else found
                given = {"structure": found, **common, "zero_init": linear in zeroed, **rest, **own}
                new = _structured(name, linear, given)
            except ValueError as error:
                cannot(name, error, isinstance(kind, AbstractStructure))  # which is meant for these layers
                continue
            if dearer != "allow" and (costs := _dearer(new)):
                if dearer == "error":
                    raise ValueError(f"layer {name!r} ({sizes[0]} -> {sizes[1]}) would cost more than dense: {costs}")
                if dearer == "skip":
                    skipped.append((name, f"a structured layer would cost more: {costs}"))
                    continue
                expensive.append((name, costs))
            made[linear] = new
        if not made and errors:
            raise errors[0]
        if not made:
            told = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
            raise ValueError(f"no selected layer can be replaced ({told}); the linear layers are {names_of(places)}")
        if expensive:
            name, costs = expensive[0]
            warnings.warn(
                f"{len(expensive)} of {len(made)} structured layers cost more than dense, the first of them {name}: "
                f"{costs}; choose a smaller form, or dearer='skip' to leave them dense",
                stacklevel=2,
            )

        notes = install(model, made, chosen)
        restore()
        changed(model)
        if fuse:
            fused = fuse_mlps(model)
            notes |= dict.fromkeys(f"MLP {name}: {outcome}" for name, outcome in fused.items())
            if not fused:
                notes["no MLP of a known form was found to fuse"] = None
        rows = tuple(
            Replacement(
                chosen[linear], new.structure, num_params(linear), num_params(new), math.prod(sizes_of(linear)),
                new.structure.macs, num_experts(linear),
            )
            for linear, new in made.items()
        )  # fmt: skip
        return ReplacementReport(rows, tuple(skipped), tuple(notes), tuple(_dense(model, {n for n, _ in skipped})))


def selected(
    model: nn.Module, layers: Selection, exclude: Patterns, wanted: Callable[[nn.Module], Any] = linear_sizes
) -> tuple[dict[Any, list[str]], dict[Any, tuple[str, ...]]]:
    """Return the names of the linear layers of a model, and those of the chosen ones."""
    if linear_sizes(model) is not None:
        raise ValueError("the model itself is a linear layer and cannot be replaced in place; put it in a container")
    places = places_of(model, wanted)
    return places, select(places, layers, as_patterns(exclude), "nn.Linear, or Conv1D of transformers")


def install(
    model: nn.Module, made: Mapping[nn.Module, StructuredLinear], places: Mapping[nn.Module, Sequence[str]]
) -> dict[str, None]:
    """Set new layers in the places of old ones, and return notes on the other changes of the model."""
    notes: dict[str, None] = {}
    replaced(p for linear in made for p in linear.parameters())
    for linear, new in made.items():
        notes |= put_structured(model, places[linear], new)
    return notes


def as_structure(given: Any) -> Any:
    """Return the name of the class of a registered structure; any other value unchanged."""
    if isinstance(given, type) and issubclass(given, structlin.NamedOperator):
        return given.name
    return given


def _overrides(
    overrides: Mapping[Pattern, Mapping[str, Any]], chosen: Mapping[nn.Module, Sequence[str]], structure: Any
) -> dict[nn.Module, Mapping[str, Any]]:
    """Return the options of the layers that match a pattern; the first matching pattern applies."""
    found: dict[nn.Module, Mapping[str, Any]] = {}
    for pattern, own in overrides.items():
        if not isinstance(own, Mapping):
            raise TypeError(f"overrides[{show(pattern)}] must be a mapping of options, got {own!r}")
        kind = as_structure(own.get("structure", structure))
        known = ("structure", *_LAYER_OPTIONS, *(structlin.structure_options(kind) if isinstance(kind, str) else ()))
        if unknown := [key for key in own if key not in known]:
            raise ValueError(f"overrides[{show(pattern)}] has the unknown option {', '.join(unknown)}; known are "
                             f"{', '.join(known)}")  # fmt: skip
        for linear in matching(chosen, as_patterns(pattern), "overrides"):
            found.setdefault(linear, own)
    return found


def _dearer(new: StructuredLinear) -> str:
    """Return a description of the costs that exceed those of the dense matrix; "" if there are none."""
    dense = new.in_features * new.out_features
    costs = (("multiply-accumulates", new.structure.macs), ("parameters", new.structure.num_params))
    return ", ".join(f"{own:,} {what} instead of {dense:,}" for what, own in costs if own > dense)


def _dense(model: nn.Module, skipped: Collection[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and role of each weight matrix outside structured layers, except for skipped layers."""
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear) or name in skipped:
            continue
        if name and isinstance(model.get_submodule(name.rpartition(".")[0]), StructuredLinear):
            continue
        stacked = num_experts(module) is not None
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 + (stacked and key == "bias") and parameter not in seen:
                seen.add(parameter)
                yield f"{name}.{key}" if name else key, tuple(parameter.shape), role_of(module, key, parameter)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the full names of each parameter, one for each module that contains it."""
    owners: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{module_name}.{name}" if module_name else name)
    return owners


def others_of(linear: nn.Module, names: Sequence[str], owners: Mapping[nn.Parameter, Sequence[str]]) -> list[str]:
    """Return the names under which other modules contain the parameters of a layer."""
    return [other for p in linear.parameters() for other in owners[p] if other.rpartition(".")[0] not in names]


def num_params(layer: nn.Module) -> int:
    """Return the number of parameters of a layer, trainable or not."""
    return sum(p.numel() for p in layer.parameters())


def structured_like(linear: nn.Module, device: Any, options: Mapping[str, Any]) -> StructuredLinear:
    """Return a structured layer with the sizes and the dtype of a linear layer, and a bias if it has one."""
    bias = linear._parameters.get("bias") is not None
    dtype = linear.get_parameter("weight").dtype
    return structured_kind(linear)(*sizes_of(linear), bias=bias, device=device, dtype=dtype, **options)


def _structured(name: str, linear: nn.Module, options: Mapping[str, Any]) -> StructuredLinear:
    try:
        new = structured_like(linear, linear.get_parameter("weight").device, options)
    except (TypeError, ValueError) as error:
        d_in, d_out = sizes_of(linear)
        raise type(error)(f"layer {name!r} ({d_in} -> {d_out}): {error}") from error
    return as_before(linear, new)


def _check_is_called(model: nn.Module, names: Sequence[str], linear: nn.Module) -> None:
    """Raise ValueError for a layer whose parent does not call it, or that differs from nn.Linear."""
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) or isinstance(linear, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"layer {name!r} belongs to a {type(parent).__qualname__}, which reads its weight and does not call "
                "it; exclude it, or pass unpack=True"
            )
    if parametrize.is_parametrized(linear):
        raise ValueError(f"layer {names[0]!r} has parametrizations, which would be lost; remove them first")
    if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
        kind = type(linear).__qualname__
        raise ValueError(
            f"layer {names[0]!r} is a {kind}, whose forward pass differs from that of nn.Linear; exclude it"
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(linear, kind) for kind in hooks):
        raise ValueError(f"layer {names[0]!r} has hooks, which would be lost; remove them first")
