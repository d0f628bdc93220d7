"""Data sets of Hugging Face `datasets`: by name on the hub, as a folder of files, or saved on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["load_hub"]


def load_hub(
    source: str | os.PathLike[str], *, split: str | None = None, workers: int | None = None,
    shards: Mapping[str, Sequence[str]] | None = None,
) -> Any:  # fmt: skip
    """Return a data set, or one split of it; ImportError where `datasets` is not installed.

    Parameters
    ----------
    source
        A name on the hub, a folder of parquet, JSON, text or image files, or a folder that ``save_to_disk`` wrote.
        FileNotFoundError: nothing there, or no network to look.
    split
        Name of the split; None: all of them, by name. ValueError: a saved data set without it.
    workers
        Processes that download and convert.
    shards
        WebDataset files of each split, to be read in place of `source`; ValueError for damaged ones.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source} needs Hugging Face datasets: pip install 'structlin[text]' ({error})") from error
    folder = Path(source).expanduser()
    try:
        if shards is not None:
            return datasets.load_dataset("webdataset", data_files=dict(shards))
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
            if split is not None and isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"{source} has the splits {', '.join(found)}, not {split!r}")
                found = found[split]
            return found
        place = str(folder) if folder.is_dir() else os.fspath(source)
        return datasets.load_dataset(place, split=split, num_proc=workers if workers and workers > 1 else None)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        # Errors of the network, the hub or the files: the library has no common exception.
        what = f"Hugging Face datasets cannot load {source} ({type(error).__name__}: {error.__cause__ or error})"
        raise (FileNotFoundError if shards is None else ValueError)(what) from error
