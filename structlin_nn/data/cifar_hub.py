"""CIFAR from Hugging Face `datasets`, and the official archives from the network.

What `datasets` gives is put into the records of the official binary files, so that the official md5 sums tell whether
it is CIFAR, and into their order: the arrays are those that `structlin_nn.data.cifar` reads.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn.data.cifar import BINARY_FORMS, decode_records
from structlin_nn.data.hub import load_hub
from structlin_nn.data.image_transforms import decode
from structlin_nn.data.images import ImageDataset
from structlin_nn._files import atomic_write

__all__ = ["HUB", "URL", "download_cifar", "load_cifar_hub"]

URL = "https://www.cs.toronto.edu/~kriz/"
HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_COLUMNS = {"cifar10": ("label",), "cifar100": ("coarse_label", "fine_label")}
_CHUNK = 2**18


def load_cifar_hub(
    dataset: str, source: str | os.PathLike[str], *, labels: str = "fine", verify: bool = True
) -> ImageDataset:
    """CIFAR-10 or CIFAR-100 as Hugging Face `datasets` has it.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        source: name on the hub (`HUB`), or a folder; see `structlin_nn.data.hub.load_hub`. It has the splits
            ``train`` and ``test`` and the columns ``img`` and ``label``, or ``coarse_label`` and ``fine_label``.
        labels: ``fine`` or ``coarse``, of CIFAR-100.
        verify: compare with the md5 sums of the official binary files.

    Raises:
        ImportError, FileNotFoundError: see `load_hub`.
        ValueError: splits or columns that are missing, images of another size, labels out of range, or
            (``verify=True``) other content than the official files.
    """
    form = BINARY_FORMS[dataset]
    found = load_hub(source)
    if not isinstance(found, dict):
        raise ValueError(f"{source} is one split; a data set with train and test is needed")
    parts: dict[str, np.ndarray] = {}
    for split, files in (("train", form.files[:-1]), ("test", form.files[-1:])):
        if split not in found:
            raise ValueError(f"{source} has the splits {', '.join(found)}, not {split!r}")
        records = _records(dataset, found[split], f"{source}/{split}")
        parts[split] = _official_order(records, files, f"{source}/{split}") if verify else records
    origin = f"{source} by Hugging Face datasets ({'md5 sums verified' if verify else 'not verified'})"
    return decode_records(dataset, parts["train"], parts["test"], labels, origin)


def _records(dataset: str, rows: Any, name: str) -> np.ndarray:
    """Rows as records of the official binary files: labels, then red, green and blue pixels; uint8."""
    import datasets

    columns = ("img", *_COLUMNS[dataset])
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(f"{name} has the columns {', '.join(rows.column_names)}, not {missing[0]!r}")
    if not len(rows):
        raise ValueError(f"{name} is empty")
    limits = {"label": 10, "coarse_label": 20, "fine_label": 100}
    numbers = []
    for column in columns[1:]:
        values = np.array(rows[column][:], dtype=np.int64)
        if (wrong := np.flatnonzero((values < 0) | (values >= limits[column]))).size:
            raise ValueError(f"{name}[{wrong[0]}] has {column} {values[wrong[0]]}, outside 0 to {limits[column] - 1}")
        numbers.append(values.astype(np.uint8)[:, None])
    pixels = np.empty((len(rows), 3 * 32 * 32), dtype=np.uint8)
    for place, row in enumerate(rows.select_columns(["img"]).cast_column("img", datasets.Image(decode=False))):
        cell = row["img"]
        raw = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        image = decode(raw, f"{name}[{place}]")
        if image.size != (32, 32):
            raise ValueError(f"{name}[{place}] has {image.width} x {image.height} pixels, not 32 x 32")
        pixels[place] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
    return np.hstack([*numbers, pixels])


def _official_order(records: np.ndarray, files: Any, name: str) -> np.ndarray:
    """The records in the order of the official files; ValueError unless each piece of that size is one of them."""
    assert files[0].size is not None
    size = files[0].size // records.shape[1]
    wanted = {file.md5: place for place, file in enumerate(files)}
    pieces: dict[int, np.ndarray] = {}
    for first in range(0, len(records), size):
        piece = np.ascontiguousarray(records[first : first + size])
        found = hashlib.md5(piece.tobytes(), usedforsecurity=False).hexdigest()
        if found not in wanted:
            raise ValueError(
                f"{name}: images {first} to {first + len(piece) - 1} are those of no official file (md5 sum {found}). "
                "Pass verify=False if you know that the data are different"
            )
        pieces[wanted[found]] = piece
    if len(pieces) != len(files) or len(records) != size * len(files):
        raise ValueError(f"{name} has {len(records)} images, the official files have {size * len(files)}")
    return np.concatenate([pieces[place] for place in range(len(files))])


def download_cifar(
    dataset: str,
    folder: str | os.PathLike[str],
    *,
    advance: Callable[[int, int], None] | None = None,
    url: str = URL,
) -> Path:
    """Download the official binary archive, verified by its md5 sum.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        folder: where to; the file appears as a whole or not at all. One that is there is verified instead.
        advance: called with the bytes read so far and all bytes (0 where the server does not tell).
        url: where the archive is, without its name.

    Returns:
        The path of the archive, which `structlin_nn.data.load_images` reads.

    Raises:
        ValueError: an unknown data set, or a file (downloaded or there) that is not the official one.
        ConnectionError: no network, or an error of the server; the message says how to get the file otherwise.
        OSError: the disk is full, or the folder cannot be written.
    """
    if dataset not in BINARY_FORMS:
        raise ValueError(f"unknown data set {dataset!r}; one of {', '.join(BINARY_FORMS)}")
    form = BINARY_FORMS[dataset]
    path = Path(folder).expanduser() / form.archive
    if path.exists():
        _verify(path, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(), form.archive_md5)
        return path
    address = url.rstrip("/") + "/" + form.archive
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, done = hashlib.md5(usedforsecurity=False), 0
    with atomic_write(path) as file:
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                total = int(answer.headers.get("Content-Length") or 0)
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if advance is not None:
                        advance(done, total)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ConnectionError(
                f"{address} cannot be downloaded ({error}). Put the file into {path.parent} by other means: it is "
                "read, and verified, from there"
            ) from error
        if done < total:
            raise ConnectionError(f"{address} broke off after {done} of {total} bytes; try again")
        _verify(address, digest.hexdigest(), form.archive_md5)
    return path


def _verify(origin: Any, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{origin} has the md5 sum {found}, the official archive has {expected}: it is damaged")
