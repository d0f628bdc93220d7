"""Checkpoints: one file with tensors and plain values, replaced as a whole, and read without running its code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from structlin_nn._files import atomic_write

__all__ = ["load_checkpoint", "save_checkpoint"]

VERSION = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state, in place of the last checkpoint if there is one; an error leaves that one as it was.

    Args:
        path: the file.
        state: tensors, numbers, strings, and dictionaries, lists and tuples of them.

    Raises:
        OSError: the disk is full, or the file cannot be written.

    Example:
        >>> save_checkpoint(Path("x.pt"), {"step": 3})
        >>> load_checkpoint(Path("x.pt"))
        {'step': 3}
    """
    try:
        with atomic_write(path) as file:
            torch.save({"version": VERSION, "state": state}, file)
    except RuntimeError as error:  # how torch reports that writing failed
        raise OSError(f"the checkpoint {path} could not be written: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state, with tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged (its checksums are verified), that is no checkpoint of this
            version, or that holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a checkpoint of version {VERSION}, got {found!r}")
    return content["state"]
