"""The modules of an nnx model with their names, in the order in which they were set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any

from flax import nnx


@dataclass(frozen=True)
class Place:
    """A module with its name and the object that contains it; ``owner`` is None for the model itself."""

    name: str
    module: nnx.Module
    owner: Any = None
    key: Any = None

    def put(self, module: nnx.Module) -> None:
        """Replace the module; ValueError if the owner cannot be changed."""
        if isinstance(self.owner, nnx.Module):
            setattr(self.owner, self.key, module)
        elif isinstance(self.owner, MutableSequence | MutableMapping):
            self.owner[self.key] = module
        else:
            kind = type(self.owner).__name__
            raise ValueError(f"layer {self.name!r} is an entry of a {kind}, which cannot be changed; use nnx.List")


def named_modules(model: nnx.Module) -> Iterator[Place]:
    """Yield every module at each of its places, the model first (with an empty name), parents before children."""

    def visit(place: Place, above: tuple[int, ...]) -> Iterator[Place]:
        if id(place.module) in above:
            return
        yield place
        for name, owner, key, value in _held(place.module, place.module):
            if isinstance(value, nnx.Module):
                full = f"{place.name}.{name}" if place.name else name
                yield from visit(Place(full, value, owner, key), (*above, id(place.module)))

    yield from visit(Place("", model), ())


def own_variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the variables that a module owns, by name."""
    return {name: value for name, _, _, value in _held(module, module) if isinstance(value, nnx.Variable)}


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return all variables of a model by full name; shared variables have several names."""
    return {
        f"{place.name}.{name}" if place.name else name: variable
        for place in named_modules(model)
        for name, variable in own_variables(place.module).items()
    }


def _held(owner: Any, value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (name, owner, key, value) of attributes of a module, and of entries of its lists and dictionaries."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, nnx.Module):
        items = ((key, each) for key, each in vars(value).items() if not key.startswith("_pytree__"))
    elif isinstance(value, Mapping):
        items = value.items()
    else:
        items = enumerate(value)
    for key, each in items:
        name = f"{prefix}{key}"
        if isinstance(each, nnx.Module | nnx.Variable):
            yield name, value, key, each
        elif isinstance(each, list | tuple | dict):
            yield from _held(value, each, f"{name}.")
