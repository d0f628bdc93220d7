"""Small image trees and shards of real images: the embedded ones, in colour and of several sizes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from structlin_nn.data import load_images

CLASSES = ("bag", "boot", "coat")
SIZES = ((60, 40), (40, 52), (48, 48))


def pictures() -> dict[str, list[tuple[str, int, Image.Image]]]:
    """(path in its split, label, image): 5, 6 and 7 training images of three classes, and 2, 3, 4 to validate."""
    data = load_images("fashion")
    found: dict[str, list[tuple[str, int, Image.Image]]] = {"train": [], "val": []}
    for split, images, labels, least in (
        ("train", data.train_images, data.train_labels, 5),
        ("val", data.test_images, data.test_labels, 2),
    ):
        for label, (name, original) in enumerate(zip(CLASSES, (8, 9, 4), strict=True)):
            for number, index in enumerate(np.flatnonzero(labels == original)[: least + label]):
                grey = images[index, 0]
                colour = np.stack([grey, 255 - grey, np.roll(grey, 5, 1)], axis=-1)
                image = Image.fromarray(colour).resize(SIZES[number % 3], Image.Resampling.BICUBIC)
                found[split].append((f"{name}/{number}.{'png' if number % 2 else 'jpg'}", label, image))
    return found


def encoded(path: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    if path.endswith("jpg"):
        image.save(file, "JPEG", quality=95)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def write_tree(root: Path) -> Path:
    for split, samples in pictures().items():
        for path, _, image in samples:
            place = root / split / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(encoded(path, image))
    return root


def write_shards(root: Path, per_shard: int = 7) -> Path:
    """The same samples in the same order, in shards without compression."""
    root.mkdir(parents=True, exist_ok=True)
    for split, samples in pictures().items():
        for number in range(0, len(samples), per_shard):
            with tarfile.open(root / f"toy-{split}-{number // per_shard:04d}.tar", "w") as archive:
                for path, label, image in samples[number : number + per_shard]:
                    key, _, suffix = path.rpartition(".")
                    for name, raw in ((f"{key}.cls", str(label).encode()), (f"{key}.{suffix}", encoded(path, image))):
                        member = tarfile.TarInfo(name)
                        member.size = len(raw)
                        archive.addfile(member, io.BytesIO(raw))
    return root


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with the classes bag, boot and coat: 18 and 9 images. Not to be changed: copy it."""
    return write_tree(tmp_path_factory.mktemp("images") / "tree")


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `image_tree` in the same order, as shards. Not to be changed: copy it."""
    return write_shards(tmp_path_factory.mktemp("images") / "shards")
