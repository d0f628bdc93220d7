"""Data sets that Hugging Face `datasets` reads: by name on the hub, as a folder of files, or saved on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["is_saved", "load_hub"]


def is_saved(place: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by ``save_to_disk``: several splits, or one."""
    folder = Path(place).expanduser()
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def load_hub(source: str | os.PathLike[str], *, split: str | None = None, streaming: bool = False) -> Any:
    """A data set, or one split of it.

    Args:
        source: a name on the hub, a folder of parquet, JSON, text or image files, or a folder that
            ``save_to_disk`` wrote.
        split: name of the split; None: all of them, by name.
        streaming: rows as they come, without a copy on disk; what was saved on disk is mapped instead.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: nothing there, or no network to look.
        ValueError: no such split in a saved data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source} needs Hugging Face datasets: pip install 'structlin[text]' ({error})") from error
    folder = Path(source).expanduser()
    saved = is_saved(source)
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.is_dir() else os.fspath(source)
            found = datasets.load_dataset(where, split=split, streaming=streaming)
    except Exception as error:
        # Whatever the network, the hub or the files make of it: the library has no common exception.
        what = f"{type(error).__name__}: {error}"
        part = "" if split is None else f"the split {split!r} of "
        raise FileNotFoundError(f"Hugging Face datasets cannot load {part}{source} ({what})") from error
    if saved and split is not None and isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{source} has the splits {', '.join(found)}, not {split!r}")
        found = found[split]
    return found
