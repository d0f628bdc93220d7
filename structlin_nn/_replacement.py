"""The framework-independent part of replacing linear layers: the choice of layers, and the report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from structlin.structure import AbstractStructure
from structlin_nn._patterns import Pattern, Patterns, alike, as_patterns, listed, matches, show
from structlin_nn._text import sizes_text, table

PRESETS = ("all", "all_but_last", "intermediate")
Layer = TypeVar("Layer", bound=Hashable)


@dataclass(frozen=True)
class Replacement:
    """One replaced layer, at each of its places (`names`); the shape of its `structure` is (d_out, d_in).

    Parameters are counted with biases and gains, and multiply-accumulates (MACs) for one vector. If the layer has a
    matrix for each of several `experts`, parameters are those of all experts, and MACs those of one.
    """

    names: tuple[str, ...]
    structure: AbstractStructure
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    experts: int | None = None


@dataclass(frozen=True)
class ReplacementReport:
    """Report of ``replace_linear``; ``print`` shows a table.

    Attributes
    ----------
    layers
        The replaced layers, in the order in which the model registers them.
    skipped
        Names of layers that were chosen and left alone, with the reason.
    notes
        What else was changed in the model.
    dense
        Name, shape and role of every other weight matrix of the model: layers that were not chosen, embeddings,
        convolutions, experts, packed projections.
    """

    layers: tuple[Replacement, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    dense: tuple[tuple[str, tuple[int, ...], str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rows = [{**plain(row), "shape": list(row.structure.shape)} for row in self.layers]
        dense = [dict(zip(("name", "shape", "role"), plain(entry), strict=True)) for entry in self.dense]
        return {"layers": rows, "skipped": plain(self.skipped), "dense": dense, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("layer", "shape", "params", "structured", "MACs", "structured")
        rows = [
            (" = ".join(r.names), sizes_text(r.experts, r.structure.shape),
             *(f"{n:,}" for n in (r.params_before, r.params_after, r.macs_before, r.macs_after)))
            for r in self.layers
        ]  # fmt: skip
        fields = ("params_before", "params_after", "macs_before", "macs_after")
        totals = (f"{sum(getattr(r, field) for r in self.layers):,}" for field in fields)
        lines = [table(head, [*rows, ("total", "", *totals)], left=2, rule=False)]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.skipped]
        rest: Counter[tuple[str, str]] = Counter()
        for name, shape, role in self.dense:
            rest[alike(name), role] += math.prod(shape)
        lines += [f"stays dense: {name} ({role}, {size:,} parameters)" for (name, role), size in rest.items()]
        return "\n".join([*lines, *self.notes])


def plain(value: Any) -> Any:
    """Return values for JSON: a structure as text, dataclasses as dictionaries, tuples as lists."""
    if isinstance(value, AbstractStructure):
        return repr(value)
    if is_dataclass(value) or isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in (value if isinstance(value, Mapping) else vars(value)).items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise ValueError for an argument whose value is not one of its choices."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def untied(name: str, others: Sequence[str]) -> ValueError:
    """Return the error for a layer that shares parameters with other modules."""
    return ValueError(
        f"layer {name!r} shares {', '.join(others)}; its replacement would untie them: "
        "exclude it, or pass shared_weights='skip' to leave such layers dense"
    )


def names_of(places: Mapping[Any, Sequence[str]]) -> str:
    """Return the first name of each layer, for a message."""
    return listed(names[0] for names in places.values())


def matching(places: Mapping[Layer, Sequence[str]], patterns: Sequence[Pattern], argument: str) -> set[Layer]:
    """Return layers that match any pattern; ValueError naming ``argument`` if a pattern matches none."""
    found: set[Layer] = set()
    for pattern in patterns:
        hits = {module for module, names in places.items() if any(matches(pattern, name) for name in names)}
        if not hits:
            raise ValueError(
                f"{argument}: no linear layer matches {show(pattern)}; the linear layers are {names_of(places)}"
            )
        found |= hits
    return found


def _is_repeated(names: Sequence[Sequence[str]]) -> bool:
    """Whether the last layer is one of a stack, as ``blocks.*.mlp.fc2``: another name differs in an inner number."""
    *earlier, last = (own[0] for own in names)
    inner = re.finditer(r"(?<![^.])\d+(?=\.)", last)
    forms = [re.escape(last[: n.start()]) + r"\d+" + re.escape(last[n.end() :]) for n in inner]
    return any(re.fullmatch(form, name) for form in forms for name in earlier)


def select(
    places: Mapping[Layer, Sequence[str]],
    layers: Patterns | Callable[[str, Any], bool],
    exclude: Sequence[Pattern],
    kinds: str,
) -> dict[Layer, tuple[str, ...]]:
    """Return the chosen layers with their names, in order: a preset, patterns, or a predicate of name and layer.

    ValueError where nothing is chosen or a pattern matches nothing; ``kinds`` says in it what a linear layer is.
    """
    if not places:
        raise ValueError(f"the model has no linear layers ({kinds})")
    if isinstance(layers, str) and layers in PRESETS:
        end = len(places) if _is_repeated(list(places.values())) else -1
        parts = {"all": slice(None), "all_but_last": slice(end), "intermediate": slice(1, end)}
        chosen = set(list(places)[parts[layers]])
    elif isinstance(layers, type):
        raise TypeError(
            f"layers must be {', '.join(map(repr, PRESETS))}, patterns of names, or a function of name and layer, got "
            f"the class {layers.__name__}; its instances are chosen by lambda name, layer: isinstance(layer, "
            f"{layers.__name__})"
        )
    elif isinstance(layers, Sequence) or not callable(layers):
        chosen = matching(places, as_patterns(layers), "layers")
    else:
        chosen = {module for module, names in places.items() if any(layers(name, module) for name in names)}
    excluded = matching(places, exclude, "exclude")
    chosen -= excluded
    if not chosen:
        raise ValueError(f"layers={layers!r} leaves no layer to replace; the linear layers are {names_of(places)}")
    return {module: tuple(names) for module, names in places.items() if module in chosen}
