"""Compiled modules on disk, so that later processes need not compile them again.

Each file holds the object code of one module. Its name is a hash of everything that LLVM compiles the code from: the
text of the module, the target, and the versions. A checksum is in front of the code; a damaged file is ignored, and its
module is compiled again. Because the code is executed, files are only read from a folder that belongs to the user and
that nobody else may write to.

The folder is beside the records of timings (:mod:`structlin.execution.wisdom`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from structlin.execution import wisdom

FORMAT = 1
LIMIT = 64 << 20  # bytes of all files, about 8,000 modules; those not used for the longest time are deleted first
_DIGEST = hashlib.sha256().digest_size


def key_of(*parts: object) -> str:
    """Return the name of what is compiled from these parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def folder() -> Path:
    """Return the folder of the files."""
    return wisdom.root() / f"code-{FORMAT}"


def read(key: str) -> bytes | None:
    """Return object code, or None if there is none that may be executed."""
    path = folder() / key
    try:
        if not _is_own(path.parent):
            return None
        found = path.read_bytes()
        digest, code = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(code).digest() != digest:
            path.unlink()
            return None
    except OSError:
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    return code


def write(key: str, code: bytes) -> None:
    """Store object code; nothing happens if the folder cannot be written."""
    path = folder() / key
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(path.parent):
            return
        _prune(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)


def _is_own(path: Path) -> bool:
    """Whether a folder belongs to this user, and nobody else may write to it."""
    if os.name != "posix":
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _prune(path: Path) -> None:
    """Delete the files that were not used for the longest time, once in a process, if all take more than LIMIT."""
    files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(path))
    total = sum(size for _, size, _ in files)
    for _, size, name in files:
        if total <= LIMIT:
            break
        os.unlink(name)
        total -= size
