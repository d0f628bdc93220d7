"""What the replacement of linear layers is in every framework: the choice of layers, and the report."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from structlin.structure import AbstractStructure
from structlin_nn._patterns import Pattern, Patterns, as_patterns, listed, matches, show
from structlin_nn._text import table

__all__ = ["PRESETS", "Replacement", "ReplacementReport", "matching", "names_of", "select"]

PRESETS = ("all", "all_but_last", "intermediate")
Layer = TypeVar("Layer", bound=Hashable)


@dataclass(frozen=True)
class Replacement:
    """One replaced layer.

    Attributes:
        names: where it stands; several names where one module is used at several places.
        structure: of the new layer, whose shape is (d_out, d_in).
        params_before, params_after: trainable or not, with biases and gains.
        macs_before, macs_after: multiply-accumulates for one vector.
    """

    names: tuple[str, ...]
    structure: AbstractStructure
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class ReplacementReport:
    """What ``replace_linear`` did; ``print`` it for a table.

    Attributes:
        layers: the replaced layers, in the order in which the model registers them.
        skipped: names of layers that were left alone on request, with the reason.
        notes: what else was changed in the model.
    """

    layers: tuple[Replacement, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("layer", "shape", "params", "structured", "MACs", "structured")
        rows = [
            (" = ".join(r.names), f"{r.structure.d_out} x {r.structure.d_in}",
             *(f"{n:,}" for n in (r.params_before, r.params_after, r.macs_before, r.macs_after)))
            for r in self.layers
        ]  # fmt: skip
        fields = ("params_before", "params_after", "macs_before", "macs_after")
        totals = (f"{sum(getattr(r, field) for r in self.layers):,}" for field in fields)
        lines = [table(head, [*rows, ("total", "", *totals)], left=2, rule=False)]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join([*lines, *self.notes])


def names_of(places: Mapping[Any, Sequence[str]]) -> str:
    """The first name of each layer, for a message."""
    return listed(names[0] for names in places.values())


def matching(places: Mapping[Layer, Sequence[str]], patterns: Sequence[Pattern], argument: str) -> set[Layer]:
    """Layers that match any of the patterns, each of which must match some; ValueError naming ``argument``."""
    found: set[Layer] = set()
    for pattern in patterns:
        hits = {module for module, names in places.items() if any(matches(pattern, name) for name in names)}
        if not hits:
            raise ValueError(
                f"{argument}: no linear layer matches {show(pattern)}; the linear layers are {names_of(places)}"
            )
        found |= hits
    return found


def select(
    places: Mapping[Layer, Sequence[str]],
    layers: Patterns | Callable[[str, Any], bool],
    exclude: Sequence[Pattern],
    kinds: str,
) -> dict[Layer, tuple[str, ...]]:
    """The chosen layers with their names, in order: a preset, patterns, or a predicate of name and layer.

    ``kinds`` says what a linear layer is, for the message of the ValueError where there is none. Raises ValueError
    too where nothing is chosen or a pattern matches nothing.
    """
    if not places:
        raise ValueError(f"the model has no linear layers ({kinds})")
    if isinstance(layers, str) and layers in PRESETS:
        ordered = list(places)
        chosen = set({"all": ordered, "all_but_last": ordered[:-1], "intermediate": ordered[1:-1]}[layers])
    elif isinstance(layers, Sequence) or not callable(layers):
        chosen = matching(places, as_patterns(layers), "layers")
    else:
        chosen = {module for module, names in places.items() if any(layers(name, module) for name in names)}
    chosen -= matching(places, exclude, "exclude")
    if not chosen:
        raise ValueError(f"layers={layers!r} leaves no layer to replace; the linear layers are {names_of(places)}")
    return {module: tuple(names) for module, names in places.items() if module in chosen}
