"""Checks of the sizes in model configurations."""

from __future__ import annotations

from typing import Any


def check_positive(config: Any, *names: str) -> None:
    """ValueError unless the named attributes of ``config`` are positive integers."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_shape(shape: Any) -> tuple[int, int, int]:
    """(channels, height, width) as a tuple of positive integers, or a ValueError."""
    shape = tuple(shape)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape is (channels, height, width) in positive integers, got {shape}")
    return shape


def resolve_head_dim(config: Any) -> None:
    """Fill in ``config.head_dim``: the width divided by the number of heads, rounded down."""
    check_positive(config, "width", "heads")
    if config.head_dim is None:
        if config.heads > config.width:
            raise ValueError(f"a width of {config.width} has no room for {config.heads} heads; give head_dim")
        object.__setattr__(config, "head_dim", config.width // config.heads)
    check_positive(config, "head_dim")
