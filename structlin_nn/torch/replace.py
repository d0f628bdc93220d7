"""Replacing the linear layers of a model by structured ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from structlin.structure import AbstractStructure
from structlin_nn.torch.linear import StructuredLinear

PRESETS = ("all", "all_but_last", "intermediate")
Selection = str | Sequence[str] | Callable[[str, nn.Linear], bool]


@dataclass(frozen=True)
class Replacement:
    """One replaced layer: its names (several where the module is shared), structure, and parameters before and after.

    ``params`` count weights and biases; ``macs`` are multiply-accumulates for one vector.
    """

    names: tuple[str, ...]
    structure: AbstractStructure
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class ReplacementReport:
    """What :func:`replace_linear` did; ``str()`` gives a table."""

    layers: tuple[Replacement, ...]

    def __str__(self) -> str:
        head = ("layer", "shape", "params before", "after", "MACs before", "after")
        rows = [
            (
                " = ".join(r.names),
                f"{r.structure.d_out} x {r.structure.d_in}",
                *map(str, (r.params_before, r.params_after, r.macs_before, r.macs_after)),
            )
            for r in self.layers
        ]
        totals = [sum(int(row[i]) for row in rows) for i in range(2, 6)]
        cells = [head, *rows, ("total", "", *map(str, totals))]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        return "\n".join(
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        )


def replace_linear(
    model: nn.Module,
    structure: str | Callable[[str, nn.Linear], AbstractStructure],
    *,
    layers: Selection = "all_but_last",
    exclude: str | Sequence[str] = (),
    zero_init: str | Sequence[str] = (),
    shared_weights: str = "error",
    rms_cap: bool = False,
    gain: bool | None = None,
    rule: str = "paper",
    **options: Any,
) -> ReplacementReport:
    """Replace ``nn.Linear`` layers of ``model``, in place, by freshly drawn :class:`StructuredLinear` layers.

    Biases, dtype, device (the meta device too), training mode and ``requires_grad`` are kept; the new factors are
    drawn at the scale of their structure and the old weights are dropped.

    Args:
        model: any module that holds linear layers.
        structure: name of a registered structure, with its options as further keywords; or a function from the
            layer's name and the layer to a structure.
        layers: ``all``; ``all_but_last`` (all but the layer registered last, most often the head); ``intermediate``
            (neither the first nor the last); one or several patterns of layer names as in :mod:`fnmatch`; or a
            predicate of name and layer.
        exclude: patterns of names to leave alone.
        zero_init: patterns of names whose last factor is zeroed.
        shared_weights: what to do with a layer whose weight is also a parameter of another module (a tied embedding):
            ``error``, or ``skip`` to leave it alone.
        rms_cap, gain, rule: as in :class:`StructuredLinear`.

    Returns:
        A report of what was replaced; ``print`` it for a table.

    Raises:
        ValueError: nothing matches (the message lists the linear layers), a pattern matches nothing, a size that the
            structure cannot have (the layer is named), tied weights, and layers whose weight is read by their parent
            rather than called (those of ``nn.MultiheadAttention``).

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> report = replace_linear(model, "block_tensor_train", rank=2)
    >>> [r.names[0] for r in report.layers], model[2].structure.num_params
    (['0', '2'], 4096)
    """
    if shared_weights not in ("error", "skip"):
        raise ValueError(f"shared_weights must be 'error' or 'skip', got {shared_weights!r}")
    if callable(structure) and options:
        raise ValueError(f"options {', '.join(options)} belong to a structure given by name, not to a function")
    places: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and name:
            places.setdefault(module, []).append(name)
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself an nn.Linear, which cannot be replaced in place; put it in a container")

    chosen = _select(places, layers, _patterns(exclude))
    zeroed = _matched(places, _patterns(zero_init), "zero_init")
    owners = _weight_owners(model)
    planned: list[tuple[nn.Linear, StructuredLinear]] = []
    for linear in chosen:
        name = places[linear][0]
        _refuse_read_weights(model, name, linear)
        if owners[id(linear.weight)] > 1:
            if shared_weights == "skip":
                continue
            raise ValueError(
                f"the weight of {name!r} is shared with another module (tied); exclude it, or pass "
                "shared_weights='skip' to leave tied layers alone"
            )
        try:
            made = structure(name, linear) if callable(structure) else structure
            planned.append(
                (
                    linear,
                    StructuredLinear(
                        linear.in_features,
                        linear.out_features,
                        bias=linear.bias is not None,
                        device=linear.weight.device,
                        dtype=linear.weight.dtype,
                        structure=made,
                        rms_cap=rms_cap,
                        gain=gain,
                        rule=rule,
                        zero_init=linear in zeroed,
                        **options,
                    ),
                )
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r} ({linear.in_features} -> {linear.out_features}): {error}") from error
    if not planned:
        raise ValueError(f"every layer that matches has a shared weight; {_list(places)}")

    rows = []
    for linear, new in planned:
        if linear.bias is not None:
            new.bias = linear.bias
        for parameter in (*new.factors, *(new.gains or ())):
            parameter.requires_grad_(linear.weight.requires_grad)
        new.train(linear.training)
        for name in places[linear]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        bias = 0 if linear.bias is None else linear.bias.numel()
        rows.append(
            Replacement(
                tuple(places[linear]),
                new.structure,
                linear.weight.numel() + bias,
                sum(p.numel() for p in new.parameters()),
                linear.weight.numel(),
                new.structure.macs,
            )
        )
    return ReplacementReport(tuple(rows))


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _list(places: Mapping[nn.Linear, list[str]]) -> str:
    names = [names[0] for names in places.values()]
    return f"the linear layers of the model are {', '.join(names)}" if names else "the model has no nn.Linear layer"


def _matched(places: Mapping[nn.Linear, list[str]], patterns: Sequence[str], argument: str) -> set[nn.Linear]:
    found: set[nn.Linear] = set()
    for pattern in patterns:
        hits = {m for m, names in places.items() if any(fnmatchcase(n, pattern) for n in names)}
        if not hits:
            raise ValueError(f"{argument}: no linear layer matches {pattern!r}; {_list(places)}")
        found |= hits
    return found


def _select(places: Mapping[nn.Linear, list[str]], layers: Selection, exclude: Sequence[str]) -> list[nn.Linear]:
    modules = list(places)
    if callable(layers):
        chosen = [m for m in modules if any(layers(name, m) for name in places[m])]
    elif isinstance(layers, str) and layers in PRESETS:
        chosen = {"all": modules, "all_but_last": modules[:-1], "intermediate": modules[1:-1]}[layers]
    else:
        matched = _matched(places, _patterns(layers), "layers")
        chosen = [m for m in modules if m in matched]
    left_out = _matched(places, exclude, "exclude")
    chosen = [m for m in chosen if m not in left_out]
    if not chosen:
        raise ValueError(f"no linear layer is selected by layers={layers!r}; {_list(places)}")
    return chosen


def _weight_owners(model: nn.Module) -> dict[int, int]:
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _refuse_read_weights(model: nn.Module, name: str, linear: nn.Linear) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"layer {name!r} belongs to an nn.MultiheadAttention, which reads its weight and does not call it; "
            "exclude it, or use an attention module that calls its projections"
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # its fast path of inference reads the weights of its linear layers
    if torch.nn.utils.parametrize.is_parametrized(linear):
        raise ValueError(f"layer {name!r} has a parametrization, which would be lost; remove it first")
