"""Where the files of labelled images come from: folders, WebDataset shards, Hugging Face `datasets`.

Each gives its samples by number, as undecoded bytes. Folders are listed by torchvision. Shards are indexed here and
then read in place, because webdataset reads them only as a stream, whose position depends on the workers.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from structlin_nn.data import _cache
from structlin_nn.data.hub import load_hub

__all__ = ["FORMATS", "FolderSplit", "HubSplit", "ShardSplit", "Split", "open_splits"]

FORMATS = ("folder", "shards", "datasets")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_NAMES = {"train": ("train",), "val": ("val", "validation")}


class Split(Protocol):
    """The samples of one split, numbered from 0: labels int64 (N,), what a message calls a sample, its undecoded file.

    `identity` tells the samples from others, besides their labels, without reading images.
    """

    labels: np.ndarray

    def name(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...
    def identity(self) -> bytes: ...

    def ignored(self) -> list[str]:
        """Files that are not images by their names, and are left out."""
        return []


# Paths and names are arrays, because processes that share a list copy it as soon as they look at it.
@dataclass
class FolderSplit(Split):
    """Image files in one folder for each class; `paths` below the root as `os.fsencode` has them."""

    root: Path
    paths: np.ndarray
    labels: np.ndarray

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def identity(self) -> bytes:
        return b"\n".join(self.paths.tolist())

    def ignored(self) -> list[str]:
        """Files that are not images by their names, and are left out."""
        return sorted(
            str(path) for path in self.root.rglob("*") if path.is_file() and path.suffix.lower() not in SUFFIXES
        )


@dataclass
class ShardSplit(Split):
    """Members of uncompressed tar files: ``KEY.jpg`` (or another image format) beside ``KEY.cls``."""

    shards: list[Path]
    members: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}: {os.fsdecode(self.members[index])}"

    def read(self, index: int) -> bytes:
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(int(self.offsets[index]))
            raw = file.read(int(self.sizes[index]))
        if len(raw) != self.sizes[index]:
            raise ValueError(f"{self.name(index)} is truncated: {self.sizes[index]} bytes expected, got {len(raw)}")
        return raw

    def identity(self) -> bytes:
        return b"\n".join(self.members.tolist()) + self.sizes.tobytes()


@dataclass
class HubSplit(Split):
    """One split of a Hugging Face data set, with an image and a label column."""

    dataset: Any
    title: str
    image: str
    labels: np.ndarray

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def read(self, index: int) -> bytes:
        cell = self.dataset[int(index)][self.image]
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]

    def identity(self) -> bytes:
        # Changes with every transformation, and with the files that the data set was made of.
        return f"{self.dataset._fingerprint} {len(self.dataset)}".encode()


def open_splits(
    source: str | os.PathLike[str], kind: str | None, *, image: str, label: str, num_classes: int | None
) -> tuple[dict[str, Split], tuple[str, ...], str, str]:
    """Training and validation split, the names of the classes, a sha256 sum, and the format that was found.

    Arguments and errors are those of `structlin_nn.data.imagenet.open_imagenet`.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; one of {', '.join(FORMATS)}")
    place = Path(source).expanduser()
    kind = kind or _recognise(place)
    if kind != "datasets" and not place.is_dir():
        raise FileNotFoundError(f"{place} is not a folder; it should hold train/ and val/, or shards")
    splits: dict[str, Split]
    classes: tuple[str, ...] | None
    if kind == "datasets":
        splits, classes = _open_hub(source, image, label)
    elif kind == "folder":
        splits, classes = _open_folders(place)
    else:
        shards = {split: _shards(place, split) for split in _NAMES}
        splits = {k: ShardSplit(v, **_cache.kept("shards", v, partial(_index_shards, v))) for k, v in shards.items()}
        classes = None
    if classes is not None and num_classes not in (None, len(classes)):
        raise ValueError(f"{source} has {len(classes)} classes, num_classes is {num_classes}")
    if classes is None:
        present = np.unique(splits["train"].labels)
        if num_classes is None and len(present) != present[-1] + 1:
            raise ValueError(
                f"{source} has training images of {len(present)} classes, and the largest label is {present[-1]}: "
                "state num_classes if there are classes without images"
            )
        classes = tuple(str(number) for number in range(num_classes or len(present)))
    digest = hashlib.sha256("\n".join(classes).encode())
    for name, split in splits.items():
        if (wrong := np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))).size:
            raise ValueError(
                f"{split.name(wrong[0])} has the label {split.labels[wrong[0]]}, outside the {len(classes)} classes "
                f"({wrong.size} such labels)"
            )
        digest.update(f"\n{name}\n".encode() + split.identity() + split.labels.astype("<i8").tobytes())
    return splits, classes, digest.hexdigest(), kind


def _recognise(place: Path) -> str:
    if not place.is_dir() or any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "datasets"
    if _shards(place, "train", missing_ok=True):
        return "shards"
    if (place / "train").is_dir():
        return "folder"
    raise FileNotFoundError(
        f"{place} holds no train/ and val/ folder with one folder for each class, no *train*.tar, and no data set "
        "saved by Hugging Face datasets"
    )


def _open_folders(place: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError(f"ImageNet needs torchvision and timm: pip install 'structlin[vision]' ({error})") from error
    splits: dict[str, Split] = {}
    classes: list[str] = []
    for split, names in _NAMES.items():
        root = next((place / name for name in names if (place / name).is_dir()), None)
        if root is None:
            raise FileNotFoundError(f"{place} lacks the folder {' or '.join(names)}")
        try:
            found = ImageFolder(root)
        except FileNotFoundError as error:
            raise ValueError(f"{root}: {error}") from error
        classes = classes or found.classes
        if extra := sorted(set(found.classes) - set(classes)):
            raise ValueError(f"{root} has {len(extra)} classes that train lacks, the first of them {extra[0]!r}")
        number = np.array([classes.index(name) for name in found.classes])
        paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in found.samples])
        splits[split] = FolderSplit(root, paths, number[[label for _, label in found.samples]].astype(np.int64))
    return splits, tuple(classes)


def _shards(place: Path, split: str, missing_ok: bool = False) -> list[Path]:
    names = _NAMES[split]
    inside = [path for name in names for path in sorted((place / name).glob("*.tar"))]
    found = inside or sorted(path for path in place.glob("*.tar") if any(name in path.name for name in names))
    if not found and not missing_ok:
        raise FileNotFoundError(f"{place} holds no shards *{names[0]}*.tar, nor {names[0]}/*.tar")
    return found


def _index_shards(shards: list[Path]) -> dict[str, np.ndarray]:
    members: list[bytes] = []
    rows: list[tuple[int, int, int, int]] = []
    for number, shard in enumerate(shards):
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}"
                    if member.isfile() and f".{suffix.lower()}" in SUFFIXES:
                        if key in images:
                            raise ValueError(
                                f"{shard} holds {images[key][0]} and {member.name}: two images of one sample"
                            )
                        images[key] = (member.name, member.offset_data, member.size)
                    elif member.isfile() and suffix == "cls":
                        content = archive.extractfile(member)
                        text = b"" if content is None else content.read(20).strip()
                        if not text.isdigit() or member.size > 18:
                            raise ValueError(f"{shard}: {member.name} must hold the number of a class, got {text!r}")
                        labels[key] = int(text)
                end = archive.offset
        except (tarfile.TarError, EOFError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{shard} is damaged, cut or compressed ({what})") from error
        # Two blocks of zeros end an archive. Without them it was cut, perhaps between two members.
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise ValueError(f"{shard} ({shard.stat().st_size} bytes) is cut: the end of the archive is missing")
        if lonely := sorted(images.keys() ^ labels.keys()):
            lacks = "a label (.cls)" if lonely[0] in images else "an image"
            raise ValueError(f"{shard}: {lonely[0]} lacks {lacks}; so do or lack {len(lonely)} of its samples")
        if not images:
            raise ValueError(f"{shard} holds no image")
        for key, (name, offset, length) in images.items():
            members.append(os.fsencode(name))
            rows.append((labels[key], number, offset, length))
    columns = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
    return {"members": np.array(members)} | dict(zip(("labels", "shard", "offsets", "sizes"), columns, strict=True))


def _open_hub(source: Any, image: str, label: str) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    loaded = load_hub(source)
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{source} is one split; a data set with train and val is needed")
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] | None = None
    for split, names in _NAMES.items():
        found = next((name for name in names if name in loaded), None)
        if found is None:
            raise ValueError(f"{source} has the splits {', '.join(loaded)}; {' or '.join(names)} is needed")
        rows = loaded[found]
        for column in (image, label):
            if column not in rows.column_names:
                raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}, not {column!r}")
        if len(rows) == 0:
            raise ValueError(f"{source}: {found} is empty")
        if isinstance(rows.features[label], datasets.ClassLabel):
            classes = tuple(rows.features[label].names)
        labels = np.array(rows[label][:], dtype=np.int64)
        undecoded = rows.cast_column(image, datasets.Image(decode=False))
        splits[split] = HubSplit(undecoded, f"{source}/{found}", image, labels)
    return splits, classes
