"""Sharded checkpoints: every process writes its parts, and any number of processes can read them again.

The format is that of torch.distributed.checkpoint. Its table of contents is a pickle; here it can name nothing but
the few classes that such a table is made of, and tensors are all that is read.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from structlin_nn._files import sync_folder
from structlin_nn.training.distributed import Processes

__all__ = ["load_shards", "remove_shards", "save_shards"]

SLOTS = ("shards-0", "shards-1")
"""Folders of shards, written by turns: the last good one is never written to."""

_PART = "torch.distributed.checkpoint"
_NAMES = {
    f"{_PART}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_PART}.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _NAMES.get(module, ())
        known |= module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not known:
            raise ValueError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds {type(metadata).__name__} in place of a table of contents")
        entries = metadata.state_dict_metadata.values()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise ValueError("it holds something that is no tensor")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def save_shards(folder: Path, current: str | None, tensors: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Write tensors, sharded over the processes or whole; all processes call it.

    Args:
        folder: of the run.
        current: name of the slot that the last good checkpoint is in, which is left alone.
        tensors: nested dictionaries of tensors.
        processes: of the run.

    Returns:
        ``slot``, the name of the folder that was written, and ``files``, names and sizes of the files in it.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    slot = SLOTS[1] if current == SLOTS[0] else SLOTS[0]
    if processes.main:
        shutil.rmtree(folder / slot, ignore_errors=True)
    processes.barrier()
    try:
        with _alone_is_fine():
            dcp.save(
                tensors,
                storage_writer=dcp.FileSystemWriter(folder / slot),
                process_group=processes.control,
                no_dist=processes.size == 1,
            )
    except (CheckpointException, OSError, RuntimeError) as error:
        raise OSError(f"the checkpoint in {folder / slot} could not be written: {error}") from error
    sync_folder(folder / slot)
    sizes = {path.name: path.stat().st_size for path in sorted((folder / slot).iterdir())}
    return {"slot": slot, "files": sizes}


def load_shards(folder: Path, saved: dict[str, Any], tensors: dict[str, Any], processes: Processes) -> None:
    """Read tensors into `tensors`, whatever their sharding is now and was when `saved` was returned.

    Raises:
        ValueError: files that are missing, cut off or damaged, a tensor that is missing or has another shape.
    """
    place = folder / saved["slot"]
    for name, size in saved["files"].items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{place / name} {has}, {size} bytes were written: the checkpoint is damaged")
    try:
        with _alone_is_fine():
            dcp.load(
                tensors,
                storage_reader=_Reader(place),
                process_group=processes.control,
                no_dist=processes.size == 1,
            )
    except (CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"the checkpoint in {place} is damaged or of another model: {error}") from error


def remove_shards(folder: Path, kept: str | None) -> None:
    """Remove the slots that no checkpoint refers to."""
    for slot in SLOTS:
        if slot != kept:
            shutil.rmtree(folder / slot, ignore_errors=True)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns where there is no group of processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
