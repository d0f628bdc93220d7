"""What took long to find out about large files is kept in the user's cache until one of them changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from structlin_nn._files import atomic_write

__all__ = ["SLOW_SECONDS", "kept"]

SLOW_SECONDS = 10.0
"""What takes longer than this is kept."""


def kept(
    kind: str, files: Iterable[Path], find: Callable[[], dict[str, np.ndarray]], *more: Any
) -> dict[str, np.ndarray]:
    """The arrays that `find` returns, from an earlier call where it took long and no file changed since.

    Args:
        kind: what is found, the beginning of the file's name.
        files: whose places, sizes and times of change (in nanoseconds) decide.
        find: makes the arrays; nothing that would have to be pickled.
        *more: plain values that decide too.
    """
    state = [[os.fsdecode(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = hashlib.sha256(json.dumps([state, more]).encode()).hexdigest()[:32]
    home = os.environ.get("STRUCTLIN_CACHE") or platformdirs.user_cache_path("structlin")
    path = Path(home, f"{kind}-{key}.npz")
    with suppress(OSError, ValueError, zipfile.BadZipFile), np.load(path, allow_pickle=False) as stored:
        return dict(stored)
    start = time.monotonic()
    found = find()
    if time.monotonic() - start > SLOW_SECONDS:
        buffer = io.BytesIO()
        np.savez(buffer, **found)  # type: ignore[arg-type]
        # Only a matter of speed: no place to write to is no reason to fail.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(buffer.getvalue())
    return found
