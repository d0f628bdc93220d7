"""Every image of a data set read once: to check it, or to write it smaller."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn.data._checks import natural
from structlin_nn.data.image_transforms import decode, shortest_side
from structlin_nn.data.imagenet import ImageNetData
from structlin_nn.data.shards import run_parallel
from structlin_nn._files import atomic_write

__all__ = ["ImageReport", "check_images", "resize_images"]

JOB = ".structlin-resize.json"
_CHUNK = 64


@dataclass
class ImageReport:
    """What was found: for each split the number of images, of classes, of images in the smallest and the largest
    class, and of broken images; and the broken images by name, with the error."""

    splits: dict[str, dict[str, int]]
    broken: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"splits": self.splits, "broken": self.broken}


def check_images(
    data: ImageNetData, *, workers: int | None = None, advance: Callable[[int, int], None] | None = None
) -> ImageReport:
    """Decode every image, and report those that are broken.

    Args:
        data: the data set.
        workers: processes; None: one for each core.
        advance: called with the images done and all images.

    Raises:
        structlin_nn.data.shards.Interrupted: a signal came.
    """
    return _each(data, _Check(data), workers, advance)


def resize_images(
    data: ImageNetData,
    out: str | os.PathLike[str],
    *,
    size: int,
    quality: int = 90,
    remove_broken: bool = False,
    workers: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> ImageReport:
    """Write an image tree whose images have a shortest side of `size` pixels, from any source.

    Its classes have the names of those of an image tree, and are numbers otherwise: names may sort in another order
    than the labels have.

    Images that are no larger are copied as they are. Others are resized (bicubic) and written as PNG where they
    were PNG, as JPEG otherwise. Files appear as a whole or not at all, and those that are there are not made again:
    an interrupted call is taken up by the same call.

    Args:
        data: the data set.
        out: folder of the new tree; gets ``train/CLASS/`` and ``val/CLASS/``.
        size: shortest side in pixels.
        quality: of JPEG files, 1 to 95.
        remove_broken: leave broken images out, and report them. Without, the first one is an error.
        workers: processes; None: one for each core.
        advance: called with the images done and all images.

    Raises:
        FileExistsError: the folder holds something else, or the tree of other settings.
        ValueError: a size or quality out of range, a broken image.
        OSError: the disk is full.
        structlin_nn.data.shards.Interrupted: a signal came; what was written stays.
    """
    natural("size", size, 1)
    if natural("quality", quality, 1) > 95:
        raise ValueError(f"quality must be from 1 to 95, got {quality}")
    root = Path(out).expanduser()
    folders = _folders(data)
    job = {"source": data.digest, "size": size, "quality": quality, "classes": list(data.classes)}
    if (root / JOB).exists():
        if json.loads((root / JOB).read_text(encoding="utf-8")) != job:
            raise FileExistsError(f"{root} holds images of another source or other settings: choose another folder")
    elif root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty, and was not made by an earlier call: choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    with atomic_write(root / JOB) as file:
        file.write(json.dumps(job).encode())
    for split in data.splits:
        for name in folders:
            (root / split / name).mkdir(parents=True, exist_ok=True)
    return _each(data, _Resize(data, root, size, quality, remove_broken), workers, advance)


def _each(
    data: ImageNetData, work: Any, workers: int | None, advance: Callable[[int, int], None] | None
) -> ImageReport:
    chunks = [
        (split, first, min(first + _CHUNK, len(part.labels)))
        for split, part in data.splits.items()
        for first in range(0, len(part.labels), _CHUNK)
    ]
    broken: dict[str, dict[str, str]] = {split: {} for split in data.splits}
    total, done = data.train_size + data.val_size, 0

    def note(chunk: tuple[str, int, int], found: dict[str, str]) -> None:
        nonlocal done
        done += chunk[2] - chunk[1]
        broken[chunk[0]].update(found)
        if advance is not None:
            advance(done, total)

    if advance is not None:
        advance(0, total)
    run_parallel(work, chunks, workers=workers, done=note)
    splits = {}
    for split, part in data.splits.items():
        sizes = np.bincount(part.labels, minlength=data.num_classes)
        splits[split] = {
            "images": len(part.labels),
            "classes": int((sizes > 0).sum()),
            "smallest_class": int(sizes.min()),
            "largest_class": int(sizes.max()),
            "broken": len(broken[split]),
        }
    return ImageReport(splits, {name: text for found in broken.values() for name, text in found.items()})


def _folders(data: ImageNetData) -> list[str]:
    digits = len(str(data.num_classes - 1))
    return [name if data.format == "folder" else f"{label:0{digits}d}" for label, name in enumerate(data.classes)]


class _Check:
    """(split, first, stop) -> broken images."""

    def __init__(self, data: ImageNetData) -> None:
        self.data = data

    def __call__(self, chunk: tuple[str, int, int]) -> dict[str, str]:
        split, first, stop = chunk
        part, broken = self.data.splits[split], {}
        for index in range(first, stop):
            try:
                self.handle(split, index)
            except ValueError as error:
                broken[part.name(index)] = str(error)
        return broken

    def handle(self, split: str, index: int) -> None:
        part = self.data.splits[split]
        decode(part.read(index), part.name(index))


class _Resize(_Check):
    """The same, writing the others."""

    def __init__(self, data: ImageNetData, root: Path, size: int, quality: int, remove_broken: bool) -> None:
        super().__init__(data)
        self.root, self.size, self.quality, self.remove_broken = root, size, quality, remove_broken
        self.folders = _folders(data)

    def __call__(self, chunk: tuple[str, int, int]) -> dict[str, str]:
        broken = super().__call__(chunk)
        if broken and not self.remove_broken:
            raise ValueError(next(iter(broken.values())))
        return broken

    def handle(self, split: str, index: int) -> None:
        part = self.data.splits[split]
        folder = self.root / split / self.folders[part.labels[index]]
        # A number keeps samples of one name in different folders or shards apart.
        stem = f"{index:08d}"
        if any((folder / f"{stem}{suffix}").exists() for suffix in (".jpg", ".png")):
            return
        raw = part.read(index)
        image = decode(raw, part.name(index))
        kind = _kind(raw)
        if min(image.size) > self.size or kind is None:
            kind = kind if kind == ".png" else ".jpg"
            file = io.BytesIO()
            options = {"format": "PNG"} if kind == ".png" else {"format": "JPEG", "quality": self.quality}
            shortest_side(image, min(self.size, *image.size)).save(file, **options)
            raw = file.getvalue()
        with atomic_write(folder / f"{stem}{kind}") as out:
            out.write(raw)


def _kind(raw: bytes) -> str | None:
    """The suffix of a JPEG or PNG file, by how it starts."""
    if raw.startswith(b"\xff\xd8"):
        return ".jpg"
    return ".png" if raw.startswith(b"\x89PNG") else None
