"""Checkpoints of runs: list and verify them, without torch or jax.

``checkpoints/STEP/`` in the folder of a run holds files with tensors, and ``state.json`` with everything else, the
sizes and sha256 sums of these files, and a checksum of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from structlin_nn.records import unsealed

__all__ = ["CHECKPOINTS", "checkpoints", "file_sha256", "read_checkpoint", "read_state"]

CHECKPOINTS = "checkpoints"
STATE_KEYS = (
    "recipe", "config", "data", "outputs", "step", "seconds", "sums", "probe", "last", "record_size", "execution",
    "files", "tensors", "build", "layout", "init_from",
)  # fmt: skip


def checkpoints(folder: Path) -> list[str]:
    """Return the names of the checkpoints in the folder of a run, the newest last."""
    place = folder / CHECKPOINTS
    return sorted(path.name for path in place.iterdir() if path.name.isdigit()) if place.is_dir() else []


def read_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return folder and state of the newest checkpoint of a run, with the checksums of all files verified.

    FileNotFoundError for no checkpoint, ValueError for a damaged one, or one of another version.
    """
    names = checkpoints(folder)
    if not names:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    place = folder / CHECKPOINTS / names[-1]
    state = read_state(place)
    for name, (size, digest) in state["files"].items():
        path = place / name
        found = path.stat().st_size if path.is_file() else None
        what = None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, and {size} were written"
        elif file_sha256(path) != digest:
            what = "has another checksum than when it was written"
        if what is not None:
            raise ValueError(f"{path} {what}: the checkpoint is damaged")
    return place, state


def read_state(place: Path) -> dict[str, Any]:
    """Return the state of a checkpoint; ValueError where it is damaged or of another version."""
    path = place / "state.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is damaged")
    state = unsealed(path, path.read_bytes())
    if missing := [key for key in STATE_KEYS if key not in state]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is a checkpoint of another version")
    return state


def file_sha256(path: Path) -> str:
    """Return the sha256 sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
