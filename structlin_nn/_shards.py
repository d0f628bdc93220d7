"""Tensors in files of `torch.distributed.checkpoint`, written by any number of processes, and read by any other.

The table of contents is a pickle. It is read with a list of allowed classes, and only tensors are read.
"""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

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


_DAMAGE = (CheckpointException, EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _NAMES.get(module, ())
        known |= module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not known:
            raise ValueError(f"it refers to {module}.{name}, which a table of contents must not contain")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds {type(metadata).__name__} in place of a table of contents")
        if not all(isinstance(entry, TensorStorageMetadata) for entry in metadata.state_dict_metadata.values()):
            raise ValueError("it holds entries that are not tensors")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def write_tensors(folder: Path, tensors: dict[str, Any], processes: Any = None) -> None:
    """Write nested dictionaries of tensors, sharded over a group of processes or whole; all processes call it.

    OSError if the disk is full, or the folder cannot be written.
    """
    try:
        with _alone_is_fine():
            writer = FileSystemWriter(folder)
            save(tensors, storage_writer=writer, process_group=processes, no_dist=processes is None)
    except (CheckpointException, RuntimeError) as error:
        causes = [cause for cause, *_ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        found = next((cause for cause in causes if isinstance(cause, OSError)), None)
        # torch reports a failed write only as a file of unexpected length.
        short = any("unexpected pos" in str(cause) for cause in causes)
        reason = found.strerror if found else "the disk is full, or files cannot be larger" if short else str(error)
        raise OSError(found.errno if found else errno.ENOSPC if short else None, reason) from error


def read_tensors(folder: Path, tensors: dict[str, Any], processes: Any = None) -> None:
    """Fill nested dictionaries of tensors from a checkpoint, whose sharding may differ.

    ValueError for damaged files, or a tensor that is missing or has another shape.
    """
    try:
        with _alone_is_fine():
            load(tensors, storage_reader=_Reader(folder), process_group=processes, no_dist=processes is None)
    except _DAMAGE as error:
        raise ValueError(f"the checkpoint {folder} is damaged or of another model: {error}") from error


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Suppress torch's warning that there is no group of processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
