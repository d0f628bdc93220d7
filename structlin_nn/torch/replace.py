"""Replacing the linear layers of a model by structured ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from structlin.structure import AbstractStructure
from structlin_nn._patterns import Patterns, as_patterns
from structlin_nn._replacement import PRESETS, Replacement, ReplacementReport, matching, names_of, select
from structlin_nn.torch._modules import changed, check_model, is_conv1d, linear_sizes
from structlin_nn.torch._step_check import replaced
from structlin_nn.torch.blocks import fuse_mlps
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["PRESETS", "Replacement", "ReplacementReport", "replace_linear"]

Selection = Patterns | Callable[[str, nn.Module], bool]


def replace_linear(
    model: nn.Module,
    structure: str | AbstractStructure | Callable[[str, nn.Module], AbstractStructure],
    *,
    layers: Selection = "all_but_last",
    exclude: Patterns = (),
    zero_init: Patterns = (),
    shared_weights: str = "error",
    rms_cap: bool = False,
    gain: bool | None = None,
    rule: str = "paper",
    checkpoint: bool = False,
    fuse: bool = False,
    **options: Any,
) -> ReplacementReport:
    """Replace linear layers of ``model``, in place, by freshly drawn :class:`StructuredLinear` layers.

    Linear layers are ``nn.Linear`` and the Conv1D of transformers' GPT-2. Missing biases, dtype, device (the meta
    device too), training mode and ``requires_grad`` are kept. The old values are not: factors are drawn from torch's
    global generator at the scale of their structure, biases start at zero. The model is changed only when every
    layer has passed every check.

    A pattern is a glob on the layer's full name (``*`` also runs over dots) or a compiled regular expression that
    matches all of it. A module that stands at several places has several names, counts as chosen if one of them is
    (as excluded likewise), and is replaced by one layer at all of them.

    Args:
        model: any module with linear layers inside.
        structure: name of a registered structure, with its options as further keywords; or a structure, if all
            layers have its shape; or a function from name and layer to a structure.
        layers: which layers. ``"all"``; ``"all_but_last"`` leaves the head dense; ``"intermediate"`` leaves the first
            and the last dense, where first and last go by the order of registration, which the report shows; one or
            several patterns; or a predicate of name and layer.
        exclude: patterns of layers to leave alone.
        zero_init: patterns of layers whose factor applied last starts at zero.
        shared_weights: a layer whose weight or bias is a parameter of another module too (a head tied to its
            embedding) cannot be replaced without untying it: ``"error"``, or ``"skip"`` to leave such layers alone.
        rms_cap, gain, rule, checkpoint: as in :class:`StructuredLinear`.
        fuse: also put a :class:`StructuredMLP` in the place of each MLP of a known shape
            (:func:`structlin_nn.torch.fuse_mlps`), which runs its layers as one pass. The report says which.
        **options: of the named structure.

    Returns:
        A report of what was replaced, with parameters and multiply-accumulates (MACs) before and after.

    Raises:
        ValueError: nothing is chosen, or a pattern matches no layer (the message lists the layers there are); a size
            that the structure cannot have (the message names the layer); tied weights; a layer that is not simply
            called by its parent, and so cannot be replaced: those of ``nn.MultiheadAttention``, subclasses with a
            forward pass of their own, layers with hooks or parametrizations.
        TypeError: ``structure`` or a pattern of another type.

    Parents that read the ``weight`` of a layer that they also call fail with an AttributeError when they do so. The
    fused inference path of ``nn.TransformerEncoderLayer`` does; it is switched off, and the report says so.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> print(replace_linear(model, "block_tensor_train", rank=2))
    layer  shape     params  structured    MACs  structured
    0      128 x 64   8,320       3,200   8,192       3,072
    2      64 x 128   8,256       4,160   8,192       4,096
    total            16,576       7,360  16,384       7,168
    >>> replace_linear(model, "block_tensor_train", layers="head")
    Traceback (most recent call last):
    ...
    ValueError: layers: no linear layer matches 'head'; the linear layers are 4
    """
    check_model(model, "replace_linear")
    if shared_weights not in ("error", "skip"):
        raise ValueError(f"shared_weights must be 'error' or 'skip', got {shared_weights!r}")
    if linear_sizes(model) is not None:
        raise ValueError("the model itself is a linear layer and cannot be replaced in place; put it in a container")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if linear_sizes(module) is not None:
            places.setdefault(module, []).append(name)
    chosen = select(places, layers, as_patterns(exclude), "nn.Linear, or Conv1D of transformers")
    zeroed = matching(chosen, as_patterns(zero_init), "zero_init")

    owners = _owners(model)
    skipped, made = [], {}
    for linear, names in chosen.items():
        _check_is_called(model, names, linear)
        others = [o for p in linear.parameters() for o in owners[p] if o.rpartition(".")[0] not in names]
        if not others:
            new_structure = structure(names[0], linear) if callable(structure) else structure
            common = {"rms_cap": rms_cap, "gain": gain, "rule": rule, "checkpoint": checkpoint}
            common |= {"zero_init": linear in zeroed, **options}
            made[linear] = _structured(names[0], linear, new_structure, common)
        elif shared_weights == "skip":
            skipped.append((names[0], f"shares {', '.join(others)}"))
        else:
            raise ValueError(
                f"layer {names[0]!r} shares {', '.join(others)}, and replacing it would untie them: "
                "exclude it, or pass shared_weights='skip' to leave such layers alone"
            )
    if not made:
        raise ValueError(f"every layer that is chosen shares its weight; the linear layers are {names_of(places)}")

    notes: dict[str, None] = {}
    replaced(p for linear in made for p in linear.parameters())
    for linear, new in made.items():
        for name in chosen[linear]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
            notes |= dict.fromkeys(_switch_off_fast_paths(model, name))
    changed(model)
    if fuse:
        fused = fuse_mlps(model)
        notes |= dict.fromkeys(f"MLP {name}: {outcome}" for name, outcome in fused.items())
        if not fused:
            notes["no MLP of a known shape was found to be fused"] = None
    rows = tuple(
        Replacement(
            tuple(chosen[linear]),
            new.structure,
            sum(p.numel() for p in linear.parameters()),
            sum(p.numel() for p in new.parameters()),
            linear.get_parameter("weight").numel(),
            new.structure.macs,
        )
        for linear, new in made.items()
    )
    return ReplacementReport(rows, tuple(skipped), tuple(notes))


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Full names of each parameter, one for each module that holds it."""
    owners: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{module_name}.{name}" if module_name else name)
    return owners


def _structured(name: str, linear: nn.Module, structure: Any, options: Mapping[str, Any]) -> StructuredLinear:
    sizes = linear_sizes(linear)
    assert sizes is not None, name
    parameters = dict(linear.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    try:
        new = StructuredLinear(
            *sizes, bias=bias is not None, device=weight.device, dtype=weight.dtype, structure=structure, **options
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r} ({sizes[0]} -> {sizes[1]}): {error}") from error
    for parameter in (*new.factors, *(new.gains or ())):
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None and new.bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    return new.train(linear.training)


def _check_is_called(model: nn.Module, names: Sequence[str], linear: nn.Module) -> None:
    """Refuse a layer that is used in another way than by calling it."""
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) or isinstance(linear, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"layer {name!r} belongs to a {type(parent).__qualname__}, which reads its weight and does not call "
                "it; exclude it, or use an attention module that calls its projections"
            )
    if parametrize.is_parametrized(linear):
        raise ValueError(f"layer {names[0]!r} has parametrizations, which would be lost; remove them first")
    if not is_conv1d(linear) and type(linear).forward is not nn.Linear.forward:
        kind = type(linear).__qualname__
        raise ValueError(f"layer {names[0]!r} is a {kind}, whose forward pass is not that of nn.Linear; exclude it")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(linear, kind) for kind in hooks):
        raise ValueError(f"layer {names[0]!r} has hooks, which would be lost; remove them first")


def _switch_off_fast_paths(model: nn.Module, name: str) -> list[str]:
    """Keep torch's Transformer from reading the weight of a replaced layer in its fused inference path."""
    notes = []
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
            notes.append(f"fused inference path switched off: {name or 'the model'}")
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
            notes.append(f"nested tensors switched off: {name or 'the model'}")
    return notes
