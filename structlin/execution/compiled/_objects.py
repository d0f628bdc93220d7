"""Compiled modules on disk, so that later processes need not compile them again.

Each file holds the object code of one module. Its name is a hash of everything that LLVM compiles the code from: the
text of the module, the target, the options and the versions. A checksum is in front of the code; a damaged file is
ignored, and its module is compiled again. Because the code is executed, a file is only read if it and its folder belong
to the user and nobody else may write to them.

The folder is beside the records of timings (:mod:`structlin.execution.wisdom`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from structlin.execution import wisdom

FORMAT = 1
LIMIT = 64 << 20  # bytes on disk, about: those not used for the longest time are deleted first
PRUNED = 256  # a process checks the limit once in so many writes
_DIGEST = hashlib.sha256().digest_size
_WRITES = count()


def key_of(*parts: object) -> str:
    """Return the name of what is compiled from these parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def folder() -> Path:
    """Return the folder of the files; RuntimeError if the user has no home."""
    return wisdom.root() / f"code-{FORMAT}"


def read(key: str) -> bytes | None:
    """Return object code, or None if there is none that may be executed."""
    with suppress(OSError, RuntimeError), _opened(folder(), os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)) as place:
        path = folder() / key if place is None else Path(key)
        with _opened(path, os.O_RDONLY | getattr(os, "O_BINARY", 0), place) as file:
            found = path.read_bytes() if file is None else _content(file)
        digest, code = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(code).digest() == digest:
            with suppress(OSError):
                os.utime(folder() / key)  # used now
            return code
    return None


def write(key: str, code: bytes) -> None:
    """Store object code; nothing happens if the folder cannot be written."""
    with suppress(OSError, RuntimeError):
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(place, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)):
            if next(_WRITES) % PRUNED == 0:
                _prune(place)
            descriptor, name = tempfile.mkstemp(dir=place, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                os.replace(name, place / key)
            except OSError:
                os.unlink(name)
                raise


@contextmanager
def _opened(path: Path, flags: int, place: int | None = None) -> Iterator[int | None]:
    """Open a file or folder, in the open folder ``place`` if given; None where there are no POSIX permissions.

    Raises PermissionError if it belongs to another user, or if others may write to it.
    """
    if os.name != "posix":
        yield None
        return
    descriptor = os.open(path, flags, dir_fd=place)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path} belongs to another user, or others may write to it")
        yield descriptor
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


def _prune(path: Path) -> None:
    """Delete the files that were not used for the longest time, if all take more than LIMIT."""
    files = []
    for entry in os.scandir(path):
        found = entry.stat()
        files.append((found.st_mtime, 512 * getattr(found, "st_blocks", 0) or found.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, name in sorted(files):
        if total <= LIMIT:
            break
        with suppress(FileNotFoundError):  # another process deletes too
            os.unlink(name)
        total -= size
