"""What replacement and parameter groups both need to know of a model's modules and their names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

Pattern = str | re.Pattern[str]
Patterns = Pattern | Sequence[Pattern]


def as_patterns(given: Patterns) -> tuple[Pattern, ...]:
    """One or several patterns as a tuple. Raises TypeError for what is no pattern."""
    patterns = (given,) if isinstance(given, str | re.Pattern) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"a pattern is a string (glob) or a compiled regular expression, got {pattern!r}")
    return patterns


def matches(pattern: Pattern, name: str) -> bool:
    """Whether all of ``name`` matches: a string is a glob, in which ``*`` also runs over dots.

    >>> matches("blocks.*.fc1", "blocks.3.mlp.fc1"), matches(re.compile(r"blocks\\.\\d+\\.fc1"), "blocks.3.mlp.fc1")
    (True, False)
    """
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    return pattern.fullmatch(name) is not None


def show(pattern: Pattern) -> str:
    """A pattern as it stands in an error message."""
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)


def listed(names: Iterable[str], most: int = 40) -> str:
    """Names joined by commas, the first ``most`` of them.

    >>> listed("abcd", most=2)
    'a, b, ... (2 more)'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers' GPT-2, which stores its weight as (in, out)."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of an ``nn.Linear`` or a Conv1D of transformers; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None
