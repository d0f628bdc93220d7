"""Records of measurements on disk: rates of this machine, and timings of ways to run a chain.

Each record is a JSON file, named by a hash of its key, in a folder for this processor and these versions of the
libraries. A record is written to a temporary file and then renamed, so that concurrent processes need no lock. It holds
a checksum: a damaged record is ignored with a warning and measured again.

The folder is ``$STRUCTLIN_CACHE``, otherwise the user's cache folder (platformdirs). If it is not writable, records
last as long as the process. The name is that of FFTW's records (Frigo and Johnson 2005, The design and implementation
of FFTW3).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

__all__ = ["clear", "export_wisdom", "folder", "import_wisdom", "machine_name", "read", "write"]

FORMAT = 1
LIBRARIES = ("structlin", "torch", "jax", "llvmlite")
_MEMORY: dict[str, Any] = {}


@cache
def processor() -> dict[str, str]:
    """Return the properties that identify the processor: its name, model and instruction sets."""
    found = {"machine": platform.machine(), "name": platform.processor()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
        for line in cpuinfo.read_text(errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found[name.strip()] = value.strip()
    elif sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        found["name"] = asked.stdout.strip() or found["name"]
    return found


@cache
def versions() -> dict[str, str]:
    """Return the versions of the installed libraries whose speed is measured."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_name() -> str:
    """Return the processor and the versions, as the name of a folder."""
    about = json.dumps([processor(), versions(), FORMAT], sort_keys=True)
    name = processor().get("model name") or processor()["name"] or processor()["machine"]
    short = "-".join("".join(c if c.isalnum() else " " for c in name).split())[:40].lower()
    return f"{short}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def root() -> Path:
    """Return the folder of all that is stored for later processes."""
    given = os.environ.get("STRUCTLIN_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("structlin")


def folder() -> Path:
    """Return the folder of the records of this processor and these versions of the libraries."""
    return root() / f"wisdom-{FORMAT}" / machine_name()


def _path(key: str) -> Path:
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _sealed(key: str, value: Any) -> str:
    text = json.dumps({"key": key, "value": value}, sort_keys=True)
    return json.dumps({"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def _opened(text: str) -> tuple[str, Any]:
    """Return key and value of a record; ValueError if it is damaged."""
    outer = json.loads(text)
    if not isinstance(outer, dict) or set(outer) != {"record", "sha256"} or not isinstance(outer["record"], str):
        raise ValueError("it is not a record of wisdom")
    if hashlib.sha256(outer["record"].encode()).hexdigest() != outer["sha256"]:
        raise ValueError("its checksum does not match")
    inner = json.loads(outer["record"])
    return inner["key"], inner["value"]


def read(key: str) -> Any:
    """Return the value of a record, or None."""
    if key in _MEMORY:
        return _MEMORY[key]
    path = _path(key)
    try:
        found, value = _opened(path.read_text(encoding="utf-8"))
        if found != key:
            raise ValueError(f"it is of {found!r}")
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is ignored and will be measured again: {error}", RuntimeWarning, stacklevel=2)
        return None
    _MEMORY[key] = value
    return value


def write(key: str, value: Any, *, keep: bool = False) -> Any:
    """Write a record and return its value; with ``keep``, an existing record is returned instead of replaced."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(_sealed(key, value))
        if keep:
            try:
                os.link(file.name, path)  # fails where the record exists
            except FileExistsError:
                _MEMORY.pop(key, None)
                value = read(key) or value
            finally:
                os.unlink(file.name)
        else:
            os.replace(file.name, path)
    except OSError:
        pass  # a folder that cannot be written: the record lasts as long as the process
    _MEMORY[key] = value
    return value


def clear() -> int:
    """Delete all records of this processor and these versions; return the number of deleted files."""
    _MEMORY.clear()
    deleted = 0
    for path in folder().glob("*.json"):
        path.unlink(missing_ok=True)
        deleted += 1
    return deleted


def export_wisdom(path: str | os.PathLike[str]) -> int:
    """Write all records of this processor to the JSON file ``path``, and return their number."""
    records = {}
    for file in sorted(folder().glob("*.json")):
        try:
            key, value = _opened(file.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{file} is left out of the export: {error}", RuntimeWarning, stacklevel=2)
            continue
        records[key] = value
    text = json.dumps({"format": FORMAT, "processor": processor(), "versions": versions(), "records": records})
    target = Path(path)
    beside = target.with_name(f".{target.name}.tmp")
    beside.write_text(_sealed("export", text), encoding="utf-8")
    beside.replace(target)
    return len(records)


def import_wisdom(path: str | os.PathLike[str], *, any_machine: bool = False) -> int:
    """Do what :func:`structlin.execution.import_wisdom` does, without new choices."""
    try:
        _, text = _opened(Path(path).read_text(encoding="utf-8"))
        found = json.loads(text)
        records: Mapping[str, Any] = found["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} is not an export of wisdom: {error}") from error
    if found["format"] != FORMAT:
        raise ValueError(
            f"{os.fspath(path)} has format {found['format']}, but this version reads format {FORMAT}; export it again"
        )
    if not any_machine and (found["processor"], found["versions"]) != (processor(), versions()):
        theirs = found["processor"].get("model name") or found["processor"]["name"]
        raise ValueError(
            f"{os.fspath(path)} was measured on {theirs!r} with {found['versions']}, this is {machine_name()!r} with "
            f"{versions()}; pass any_machine=True to import it anyway"
        )
    for key, value in records.items():
        write(key, value)
    return len(records)
