"""Files that are there as a whole or not at all, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "sync_folder"]


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file to write to; it replaces `path` when the block ends without an error.

    The content is on the disk before the name is: after a power failure there is the old file or the new one.
    An error in the block leaves the old file, and no other; a process that is killed may leave
    ``.NAME.partial`` beside it, which the next write replaces.

    Examples
    --------
    >>> with atomic_write(Path("numbers.txt")) as file:
    ...     _ = file.write(b"1 2 3")
    >>> Path("numbers.txt").read_text()
    '1 2 3'
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names of the files in a folder on the disk; does nothing where folders cannot be synchronised."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
