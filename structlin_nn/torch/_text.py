"""Structures as strings, for the nodes of exported and compiled graphs.

A graph that is saved, or compiled in one process and run in another, can hold no Python objects: an operator of torch
gets its structure as JSON text. Reading it back runs no code of the text's choosing: a chain is parsed again, and any
other structure must be of a class that is already defined in the process.
"""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any

from structlin.structure import AbstractStructure, Structure

__all__ = ["from_text", "to_text"]


@lru_cache(maxsize=4096)
def to_text(structure: AbstractStructure) -> str:
    """A structure as JSON text, from which :func:`from_text` makes an equal one.

    Raises TypeError for a structure that is neither a chain nor a dataclass of numbers, strings and tuples of them.

    >>> text = to_text(Structure.parse("i,ri->r; r,or->o", i=8, r=2, o=6))
    >>> text
    '{"chain": "i,ri->r; r,or->o", "sizes": {"i": 8, "r": 2, "o": 6}, "d_in": 8, "d_out": 6}'
    >>> from_text(text)
    Structure.parse('i,ri->r; r,or->o', i=8, r=2, o=6)
    """
    if type(structure) is Structure:
        content: dict[str, Any] = {
            "chain": "; ".join(map(str, structure.steps)),
            "sizes": dict(structure.sizes),
            "d_in": structure.d_in,
            "d_out": structure.d_out,
        }
    elif dataclasses.is_dataclass(structure):
        fields = {f.name: getattr(structure, f.name) for f in dataclasses.fields(structure) if f.init}
        content = {"class": _name(type(structure)), "fields": fields}
    else:
        raise TypeError(f"{structure!r} can not stand in a graph: its class is no dataclass")
    try:
        text = json.dumps(content)
        if from_text(text) == structure:
            return text
    except (TypeError, ValueError) as error:
        raise TypeError(f"{structure!r} can not stand in a graph: {error}") from error
    raise TypeError(f"{structure!r} can not stand in a graph: read back it is {from_text(text)!r}")


@lru_cache(maxsize=4096)
def from_text(text: str) -> AbstractStructure:
    """The structure that :func:`to_text` wrote down.

    Raises ValueError for other text, and for a class that no module imported so far defines.
    """
    try:
        content = json.loads(text)
        if "chain" in content:
            return Structure.parse(content["chain"], content["sizes"], d_in=content["d_in"], d_out=content["d_out"])
        name, fields = content["class"], content["fields"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{text!r} does not describe a structure: {error!r}") from error
    for cls in _subclasses(AbstractStructure):
        if _name(cls) == name:
            return cls(**{key: _hashable(value) for key, value in fields.items()})
    raise ValueError(f"the structure {name} is not defined: import the module that defines it first")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclasses(cls: type) -> list[type]:
    direct = cls.__subclasses__()
    return [*direct, *(deeper for c in direct for deeper in _subclasses(c))]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
