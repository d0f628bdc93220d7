"""Patterns of names, by which layers and parameters are chosen; the same for every framework."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

Pattern = str | re.Pattern[str]
Patterns = Pattern | Sequence[Pattern]


def as_patterns(given: Patterns) -> tuple[Pattern, ...]:
    """Return one or several patterns as a tuple; TypeError for any other object."""
    alone = isinstance(given, str | re.Pattern) or not isinstance(given, Iterable)
    patterns: tuple[Any, ...] = (given,) if alone else tuple(cast(Sequence[Pattern], given))
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"a pattern is a string (glob) or a compiled regular expression, got {pattern!r}")
    return patterns


def matches(pattern: Pattern, name: str) -> bool:
    r"""Whether all of ``name`` matches: a string is a glob, in which ``*`` also runs over dots.

    Examples
    --------
    >>> matches("blocks.*.fc1", "blocks.3.mlp.fc1"), matches(re.compile(r"blocks\\.\\d+\\.fc1"), "blocks.3.mlp.fc1")
    (True, False)
    """
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    return pattern.fullmatch(name) is not None


def show(pattern: Pattern) -> str:
    """Return the form of a pattern for error messages."""
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)


def alike(name: str) -> str:
    """Return a name with ``*`` in place of its numbers: the same for all layers of a kind."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def listed(names: Iterable[str], most: int = 40) -> str:
    """Return the names joined by commas, the first ``most`` of them.

    Examples
    --------
    >>> listed("abcd", most=2)
    'a, b, ... (2 more)'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")
