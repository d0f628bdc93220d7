"""Where the image files of a labelled data set come from: folders, WebDataset shards, Hugging Face `datasets`.

Each gives its samples by number, as undecoded bytes, so that any order, any number of processes and any place to
resume from are the same for all. Shards are indexed once, and then read in place: they must not be compressed.
"""

from __future__ import annotations

import os
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from structlin_nn.data import _cache
from structlin_nn.data.hub import is_saved, load_hub

__all__ = ["FORMATS", "FolderSplit", "HubSplit", "ShardSplit", "Split", "open_splits"]

FORMATS = ("folder", "shards", "datasets")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
INDEX_VERSION = 1
_TRAIN, _VAL = ("train",), ("val", "validation")
_COLUMNS = ("members", "labels", "shard", "offsets", "bytes_")


class Split(Protocol):
    """The samples of one split, numbered from 0."""

    labels: np.ndarray
    """int64 (N,)"""

    def name(self, index: int) -> str:
        """What a message calls a sample: its path, or shard and member."""

    def read(self, index: int) -> bytes:
        """The undecoded image file of a sample."""

    def sizes(self) -> Iterator[bytes]:
        """A line for each sample that differs where the sample does, without reading images."""


@dataclass
class FolderSplit:
    """Image files in one folder for each class; `paths` below the root as `os.fsencode` has them."""

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    bytes_: np.ndarray
    ignored: list[str] = field(default_factory=list)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def sizes(self) -> Iterator[bytes]:
        for path, size in zip(self.paths, self.bytes_, strict=True):
            yield b"%b %d" % (path, size)


@dataclass
class ShardSplit:
    """Members of uncompressed tar files: ``KEY.jpg`` (or another image format) beside ``KEY.cls``."""

    shards: list[Path]
    members: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    offsets: np.ndarray
    bytes_: np.ndarray

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}: {os.fsdecode(self.members[index])}"

    def read(self, index: int) -> bytes:
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(int(self.offsets[index]))
            raw = file.read(int(self.bytes_[index]))
        if len(raw) != self.bytes_[index]:
            raise ValueError(f"{self.name(index)} is truncated: {self.bytes_[index]} bytes expected, got {len(raw)}")
        return raw

    def sizes(self) -> Iterator[bytes]:
        names = [os.fsencode(shard.name) for shard in self.shards]
        for number, member, size in zip(self.shard, self.members, self.bytes_, strict=True):
            yield b"%b %b %d" % (names[number], member, size)


@dataclass
class HubSplit:
    """One split of a Hugging Face data set, with an image and a label column."""

    dataset: Any
    title: str
    image: str
    labels: np.ndarray

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def read(self, index: int) -> bytes:
        cell = self.dataset[int(index)][self.image]
        if cell["bytes"] is not None:
            return cell["bytes"]
        return Path(cell["path"]).read_bytes()

    def sizes(self) -> Iterator[bytes]:
        # Changes with every transformation, and with the files that the data set was made of.
        yield f"{self.dataset._fingerprint} {len(self.dataset)}".encode()


def open_splits(
    source: str | os.PathLike[str], kind: str | None, *, image: str, label: str, num_classes: int | None
) -> tuple[dict[str, Split], tuple[str, ...], str]:
    """Training and validation split, the names of the classes, and what was found: one of `FORMATS`.

    Arguments and errors are those of `structlin_nn.data.imagenet.open_imagenet`.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; one of {', '.join(FORMATS)}")
    place = Path(source).expanduser()
    if kind is None:
        kind = _recognise(place)
    if kind != "datasets" and not place.is_dir():
        raise FileNotFoundError(f"{place} is no folder; it should hold train/ and val/, or shards")
    if kind == "folder":
        folders, classes = _open_folders(place)
        if num_classes is not None and num_classes != len(classes):
            raise ValueError(f"{place} has {len(classes)} classes, num_classes is {num_classes}")
        return dict(folders), classes, kind
    if kind == "shards":
        splits, count = _open_shards(place)
    else:
        hub, names = _open_hub(source, image, label)
        if names is not None:
            if num_classes is not None and num_classes != len(names):
                raise ValueError(f"{source} has {len(names)} classes, num_classes is {num_classes}")
            return hub, names, kind
        splits, count = hub, 1 + max(int(split.labels.max()) for split in hub.values())
    if num_classes is not None and count > num_classes:
        raise ValueError(f"{source} has the label {count - 1}, outside num_classes {num_classes}")
    return splits, tuple(str(number) for number in range(num_classes or count)), kind


def _recognise(place: Path) -> str:
    if not place.is_dir() or is_saved(place):
        return "datasets"
    if _shards(place, _TRAIN):
        return "shards"
    if any((place / name).is_dir() for name in _TRAIN):
        return "folder"
    raise FileNotFoundError(
        f"{place} holds no train/ and val/ folder with one folder for each class, no *train*.tar, and no data set "
        "saved by Hugging Face datasets"
    )


def _open_folders(place: Path) -> tuple[dict[str, FolderSplit], tuple[str, ...]]:
    roots = {"train": _subfolder(place, _TRAIN), "val": _subfolder(place, _VAL)}
    names = {split: sorted(entry.name for entry in root.iterdir() if entry.is_dir()) for split, root in roots.items()}
    for split, root in roots.items():
        if not names[split]:
            raise ValueError(f"{root} holds no folders; one for each class is needed, with its images")
    classes = names["train"]
    if extra := sorted(set(names["val"]) - set(classes)):
        raise ValueError(
            f"{roots['val']} has {len(extra)} classes that {roots['train']} lacks, the first of them {extra[0]!r}"
        )
    number = {name: index for index, name in enumerate(classes)}
    return {split: _list_folder(root, names[split], number) for split, root in roots.items()}, tuple(classes)


def _list_folder(root: Path, names: list[str], number: dict[str, int]) -> FolderSplit:
    paths: list[bytes] = []
    labels: list[int] = []
    sizes: list[int] = []
    ignored: list[str] = []
    top = len(os.path.join(root, ""))
    for name in names:
        before = len(paths)
        for folder, folders, files in os.walk(root / name, followlinks=True):
            folders.sort()
            for file in sorted(files):
                path = os.path.join(folder, file)
                if os.path.splitext(file)[1].lower() not in SUFFIXES:
                    ignored.append(path)
                    continue
                paths.append(os.fsencode(path[top:].replace(os.sep, "/")))
                labels.append(number[name])
                sizes.append(os.stat(path).st_size)
        if len(paths) == before:
            raise ValueError(f"{root / name} holds no image ({', '.join(SUFFIXES)})")
    # Arrays, because processes that share a list copy it as soon as they look at it.
    return FolderSplit(root, np.array(paths), np.array(labels, np.int64), np.array(sizes, np.int64), ignored)


def _subfolder(place: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (place / name).is_dir():
            return place / name
    raise FileNotFoundError(f"{place} lacks the folder {' or '.join(names)}")


def _shards(place: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if found := sorted((place / name).glob("*.tar")):
            return found
    return sorted(path for path in place.glob("*.tar") if any(name in path.name for name in names))


def _open_shards(place: Path) -> tuple[dict[str, Split], int]:
    splits: dict[str, Split] = {}
    for split, names in (("train", _TRAIN), ("val", _VAL)):
        shards = _shards(place, names)
        if not shards:
            raise FileNotFoundError(f"{place} holds no shards *{names[0]}*.tar, nor {names[0]}/*.tar")
        splits[split] = _indexed(shards)
    return splits, 1 + max(int(split.labels.max()) for split in splits.values())


def _indexed(shards: list[Path]) -> ShardSplit:
    """The samples of shards, from an index of an earlier call where it took long to make and nothing changed."""
    known = _cache.cache_file("shards", ".npz", shards, INDEX_VERSION)
    if known.exists():
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(known, allow_pickle=False) as found:
            return ShardSplit(shards, *(found[name] for name in _COLUMNS))
    start = time.monotonic()
    split = _index_shards(shards)
    if time.monotonic() - start > _cache.SLOW_SECONDS:
        _cache.keep(known, lambda file: np.savez(file, **{name: getattr(split, name) for name in _COLUMNS}))
    return split


def _index_shards(shards: list[Path]) -> ShardSplit:
    members: list[bytes] = []
    rows: list[tuple[int, int, int, int]] = []
    for number, shard in enumerate(shards):
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if f".{suffix.lower()}" in SUFFIXES:
                        if key in images:
                            raise ValueError(
                                f"{shard} holds {images[key][0]} and {member.name}: two images of one sample"
                            )
                        images[key] = (member.name, member.offset_data, member.size)
                    elif suffix == "cls":
                        content = archive.extractfile(member)
                        assert content is not None
                        labels[key] = _class(content.read(64), f"{shard}: {member.name}")
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{shard} is damaged, truncated or compressed ({type(error).__name__}: {error})"
            ) from error
        if lonely := sorted(images.keys() ^ labels.keys()):
            lacks = "a label (.cls)" if lonely[0] in images else "an image"
            raise ValueError(f"{shard}: {lonely[0]} lacks {lacks}; so do or lack {len(lonely)} of its samples")
        if not images:
            raise ValueError(f"{shard} holds no image")
        size = shard.stat().st_size
        for key, (member_name, offset, length) in images.items():
            if offset + length > size:
                raise ValueError(f"{shard} is truncated: {member_name} should end at byte {offset + length} of {size}")
            members.append(os.fsencode(member_name))
            rows.append((labels[key], number, offset, length))
    columns = np.array(rows, dtype=np.int64)
    return ShardSplit(shards, np.array(members), *(np.ascontiguousarray(column) for column in columns.T))


def _class(raw: bytes, name: str) -> int:
    text = raw.decode("ascii", "replace").strip()
    if not text.isdigit():
        raise ValueError(f"{name} must hold the number of a class, got {text!r}")
    return int(text)


def _open_hub(source: Any, image: str, label: str) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    loaded = load_hub(source)
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{source} is one split; a data set with {_TRAIN[0]} and {_VAL[0]} is needed")
    splits: dict[str, Split] = {}
    names: tuple[str, ...] | None = None
    for split, candidates in (("train", _TRAIN), ("val", _VAL)):
        found = next((name for name in candidates if name in loaded), None)
        if found is None:
            raise ValueError(f"{source} has the splits {', '.join(loaded)}; {' or '.join(candidates)} is needed")
        rows = loaded[found]
        for column in (image, label):
            if column not in rows.column_names:
                raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}, not {column!r}")
        if len(rows) == 0:
            raise ValueError(f"{source}: {found} is empty")
        feature = rows.features[label]
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
        labels = np.array(rows[label][:], dtype=np.int64)
        limit = len(names) if names is not None else np.iinfo(np.int64).max
        if (wrong := np.flatnonzero((labels < 0) | (labels >= limit))).size:
            raise ValueError(
                f"{source}: {found}[{wrong[0]}] has the label {labels[wrong[0]]} ({wrong.size} such labels)"
            )
        rows = rows.cast_column(image, datasets.Image(decode=False))
        splits[split] = HubSplit(rows, f"{source}/{found}", image, labels)
    return splits, names
