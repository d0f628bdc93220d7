"""Where what took long to find out about large files is kept for the next time: the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from structlin_nn._files import atomic_write

__all__ = ["SLOW_SECONDS", "cache_file", "keep"]

SLOW_SECONDS = 10.0
"""What takes longer than this is kept."""


def cache_file(kind: str, suffix: str, files: Iterable[Path], *more: Any) -> Path:
    """The file for what is known of some files: another one as soon as one of them changes.

    Args:
        kind: what is known, the beginning of the name.
        suffix: of the name.
        files: whose places, sizes and times of change (in nanoseconds) decide.
        *more: plain values that decide too.
    """
    stats = [(path.resolve(), path.stat()) for path in files]
    state = [[os.fsdecode(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    key = hashlib.sha256(json.dumps([state, more]).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "structlin" / f"{kind}-{key}{suffix}"


def keep(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file of the cache. Only a matter of speed: no place to write to is no reason to fail."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            write(file)
