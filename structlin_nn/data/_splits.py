"""Sources of labelled image files: image trees, WebDataset shards, and data sets of Hugging Face `datasets`."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn._on_import import needed


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
    datasets = needed("datasets", f"{source} needs Hugging Face datasets", "text")
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
    except (ImportError, ValueError) as error:
        if shards is not None and (found := _incomplete(path for paths in shards.values() for path in paths)):
            raise ValueError(found) from error
        raise
    except Exception as error:
        # Errors of the network, the hub or the files: the library has no common exception.
        what = f"Hugging Face datasets cannot load {source} ({type(error).__name__}: {error.__cause__ or error})"
        raise (FileNotFoundError if shards is None else ValueError)(what) from error


_NAMES = {"train": ("train",), "val": ("val", "validation")}


@dataclass
class FolderSplit:
    """Image files in one folder for each class; `paths` below the root as `os.fsencode` has them.

    They are an array, because reading a shared list copies it in each process (by its reference counts).
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()

    def identity(self) -> bytes:
        return b"\n".join(self.paths.tolist())


@dataclass
class HubSplit:
    """One split of a Hugging Face data set, with an undecoded image column."""

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


Split = FolderSplit | HubSplit
"""The samples of one split, numbered from 0: int64 labels (N,), names for messages, and undecoded files.

`identity` distinguishes the samples from others, besides their labels, without reading images.
"""


def recognise(place: Path) -> str:
    if not place.is_dir() and (place.is_absolute() or len(place.parts) < 2):
        raise FileNotFoundError(f"{place} is neither a folder nor a name on the Hugging Face hub (owner/name)")
    if not place.is_dir() or any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "datasets"
    if _shards(place)["train"]:
        return "shards"
    if (place / "train").is_dir():
        return "folder"
    raise FileNotFoundError(
        f"{place} holds no train/ and val/ folder with one folder for each class, no .tar with the word train in its "
        "name, and no data set saved by Hugging Face datasets"
    )


def open_folders(place: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    image_folder = needed("torchvision.datasets", "ImageNet needs torchvision and timm", "vision").ImageFolder
    splits: dict[str, Split] = {}
    classes: list[str] = []
    for split, names in _NAMES.items():
        root = next((place / name for name in names if (place / name).is_dir()), None)
        if root is None:
            raise FileNotFoundError(f"{place} lacks the folder {' or '.join(names)}")
        try:
            found = image_folder(root)
        except FileNotFoundError as error:
            raise ValueError(f"{root}: {error}") from error
        classes = classes or found.classes
        if extra := sorted(set(found.classes) - set(classes)):
            raise ValueError(f"{root} has {len(extra)} classes that train lacks, the first of them {extra[0]!r}")
        number = np.array([classes.index(name) for name in found.classes])
        paths = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in found.samples])
        splits[split] = FolderSplit(root, paths, number[[label for _, label in found.samples]].astype(np.int64))
    return splits, tuple(classes)


def _shards(place: Path) -> dict[str, list[str]]:
    """Return the shards of each split: those in its folder, or else those with one of its names as a word."""
    found = {}
    for split, names in _NAMES.items():
        inside = [path for name in names for path in sorted((place / name).glob("*.tar"))]
        words = {path: re.findall("[a-zA-Z]+", path.stem) for path in sorted(place.glob("*.tar"))}
        found[split] = inside or [path for path in words if any(name in words[path] for name in names)]
    if both := [path for path in found["train"] if path in found["val"]]:
        raise ValueError(f"{both[0]} has words of both splits in its name: a shard is for train or for val")
    return {split: [str(path) for path in paths] for split, paths in found.items()}


def _check_whole(path: str) -> None:
    # Two blocks of zeros end an archive. Without them it was cut, perhaps between two members.
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1024))
        if file.read() != bytes(1024):
            raise ValueError(f"{path} ({size} bytes) is cut: the end of the archive is missing")


def _incomplete(shards: Iterable[str]) -> str | None:
    """Return a message about a sample that lacks a file, among the first ones of each shard, which `datasets` compares.

    The key of a sample ends at the first point of its files' names.
    """
    for path in shards:
        samples: dict[str, set[str]] = {}
        with suppress(tarfile.TarError), tarfile.open(path) as archive:
            for member in archive:
                key, _, kind = os.path.basename(member.name).partition(".")
                key = os.path.join(os.path.dirname(member.name), key)
                if len(samples) == 5 and key not in samples:
                    break
                if kind:
                    samples.setdefault(key, set()).add(kind)
        kinds = set().union(*samples.values())
        for key, held in samples.items():
            if lacking := sorted(kinds - held):
                return f"the sample {key!r} in {path} lacks {', '.join(lacking)}: it has {', '.join(sorted(held))}"
    return None


def open_hub(source: Any, kind: str) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    shards = _shards(Path(source).expanduser()) if kind == "shards" else None
    if shards is not None and not shards["val"]:
        raise FileNotFoundError(f"{source} holds no .tar with the word {' or '.join(_NAMES['val'])} in its name")
    for path in (path for paths in (shards or {}).values() for path in paths):
        _check_whole(path)
    loaded = load_hub(source, shards=shards)
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{source} is one split; a data set with train and val is needed")
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] | None = None
    for split, names in _NAMES.items():
        rows = next((loaded[name] for name in names if name in loaded), None)
        if rows is None or len(rows) == 0:
            raise ValueError(f"{source} has the splits {', '.join(loaded)}; {' or '.join(names)} is needed, not empty")
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        label = next((name for name in ("label", "cls") if name in rows.column_names), None)
        if len(images) != 1 or label is None:
            raise ValueError(
                f"{source} has the columns {', '.join(rows.column_names)}: one of images, and label or cls are needed"
            )
        if isinstance(rows.features[label], datasets.ClassLabel):
            classes = tuple(rows.features[label].names)
        undecoded = rows.cast_column(images[0], datasets.Image(decode=False))
        for what, column in (("image", images[0]), ("label", label)):
            if undecoded.data.column(column).null_count:
                index = undecoded.data.column(column).is_null().index(True).as_py()
                row = undecoded[index]
                sample = (
                    f"the sample {row['__key__']!r} in {row['__url__']}" if shards else f"{source}/{split}[{index}]"
                )
                raise ValueError(f"{sample} lacks its {what}: {column} is empty")
        splits[split] = HubSplit(undecoded, f"{source}/{split}", images[0], np.array(rows[label][:], dtype=np.int64))
    return splits, classes
