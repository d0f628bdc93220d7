"""Checks of arguments that several modules make."""

import operator
from typing import Any


def natural(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int of at least `least`; TypeError for what is no integer, ValueError for a smaller one."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        wanted = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {wanted}, got {number}")
    return number


def share(batch_size: Any, rank: Any, world_size: Any) -> tuple[int, int, int]:
    """(batch size of one process, rank, number of processes) for a global batch size.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: one out of range, or a batch that cannot be shared equally.
    """
    size, world = natural("batch_size", batch_size, 1), natural("world_size", world_size, 1)
    place = natural("rank", rank)
    if place >= world:
        raise ValueError(f"rank must be below world_size {world}, got {place}")
    if size % world:
        raise ValueError(f"batch_size {size} is that of all processes and cannot be shared equally by {world}")
    return size // world, place, world
