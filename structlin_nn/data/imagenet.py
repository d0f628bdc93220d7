"""ImageNet, or any labelled images of its kind: image trees, WebDataset shards, Hugging Face `datasets`.

torchvision lists trees, `datasets` reads shards and its own formats, timm transforms, and torch's DataLoader makes
batches of uint8. This module adds what no loader of timm, webdataset or torchdata has: a batch is a function of the
seed and the number of the step alone. So a run resumes by its step, with any number of processes and workers.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from structlin_nn._on_import import needed
from structlin_nn.data import augment
from structlin_nn.data._splits import Split, open_folders, open_hub, recognise
from structlin_nn.data.images import batch_rows
from structlin_nn.data.tokens import IGNORE, natural, share

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageNetData", "ImageRecipe", "decode", "open_imagenet"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FILL = -1


def decode(raw: bytes, name: str) -> Image.Image:
    """Return an image file as an RGB image, all its pixels read; ValueError that names it where that fails.

    Examples
    --------
    >>> decode(b"GIF89a", "cat.gif")
    Traceback (most recent call last):
        ...
    ValueError: cat.gif (6 bytes) is a broken image (...)
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy
    except Exception as error:
        # Pillow raises OSError, SyntaxError, struct.error and others for damaged files.
        raise ValueError(f"{name} ({len(raw)} bytes) is a broken image ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class ImageRecipe:
    """Training augmentation of ImageNet; the defaults are those of Compute Better Spent (ICML 2024) for ViT/32.

    timm crops, resizes, flips, jitters and applies RandAugment to each image, in worker processes (`transform`).
    On the device, `finish` normalises, erases (by timm), smooths the labels and mixes.

    Attributes
    ----------
    size
        Height and width of the result.
    rand_augment
        Configuration of timm's RandAugment, None for none.
    color_jitter
        Strength in brightness, contrast and saturation. As in timm, only without RandAugment.
    random_erasing
        Probability of erasing a box with noise, 0 for none.
    mixup
        Alpha of mixup, 0 for none.
    smoothing
        Label smoothing.

    Notes
    -----
    Source: Cubuk et al., RandAugment, 2020; Zhong et al., Random Erasing, 2020; Zhang et al., mixup, 2018.

    Examples
    --------
    >>> ImageRecipe.plain(size=64).rand_augment is None
    True
    """

    size: int = 224
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    mixup: float = 0.2
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        natural("size", self.size, 1)
        limits = {"random_erasing": 1, "smoothing": 1, "color_jitter": 1e9, "mixup": 1e9}
        for name, highest in limits.items():
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} must be from 0 to {highest:g}, got {getattr(self, name)}")

    @classmethod
    def plain(cls, size: int = 224, **changes: Any) -> ImageRecipe:
        """Return a recipe of crops and flips alone."""
        off = {"rand_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0, "smoothing": 0.0}
        return cls(size=size, **{**off, **changes})

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return timm's transform of an RGB image to uint8 (3, size, size), which draws from global generators."""
        made = _timm("transforms_factory").transforms_imagenet_train(
            self.size, scale=augment.CROP_SCALE, ratio=augment.CROP_RATIO, hflip=0.5, interpolation="random",
            color_jitter=self.color_jitter or None, auto_augment=self.rand_augment, mean=IMAGENET_MEAN,
            use_prefetcher=True,
        )  # fmt: skip
        for step in made.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return made

    def finish(
        self, images: Tensor, labels: Tensor, keys: Tensor, num_classes: int, seed: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch on its device without synchronization.

        Parameters
        ----------
        images
            uint8 (n, 3, size, size), as `ImageNetData.train_batches` gives them.
        labels
            int64 (n,), on the same device.
        keys
            int64 (n,), on the CPU. Erased boxes depend on them alone.
        num_classes
            K.
        seed
            Non-negative integers, such as (seed, step). The proportion of mixup depends on them alone.
        """
        inputs = augment.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
        if self.random_erasing:
            erase = _timm("random_erasing").RandomErasing(1.0, mode="pixel", device=inputs.device)
            with _generators_kept(inputs.device):
                for image, key in zip(inputs, keys.tolist(), strict=True):
                    random.seed(key)
                    if random.random() < self.random_erasing:
                        torch.manual_seed(key)
                        erase(image)
        targets = augment.soft_targets(labels, num_classes, self.smoothing)
        if not self.mixup:
            return inputs, targets
        generator = torch.Generator().manual_seed(_words(seed, 1)[0])
        return augment.mixup(inputs, targets, generator, alpha=self.mixup, neighbours=True)


def _timm(name: str) -> Any:
    """Return a module of timm.data, which is optional."""
    return needed(f"timm.data.{name}", "ImageNet needs torchvision and timm", "vision")


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Posterize as timm, which keeps 0 bits at full strength: black before Pillow 13, a ValueError since."""
    return Image.new(image.mode, image.size) if bits == 0 else _timm("auto_augment").posterize(image, bits)


@dataclass(eq=False)
class ImageNetData:
    """Labelled image files with a training and a validation split; made by `open_imagenet`.

    It holds names and labels, no images. It can be pickled: one process opens it for all.

    Attributes
    ----------
    classes, num_classes
        Name of each class, in the order of the labels, and their number.
    train_size, val_size
        Numbers of images.
    digest
        sha256 of the names and labels of all samples (of fingerprints, for Hugging Face data), not of the images.
    format, source
        ``folder``, ``shards`` or ``datasets``, and the source as given.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    digest: str
    format: str
    source: str

    def __post_init__(self) -> None:
        self.num_classes = len(self.classes)
        self.train_size, self.val_size = (len(self.splits[split].labels) for split in ("train", "val"))

    def __repr__(self) -> str:
        return (
            f"ImageNetData({self.source!r}: {self.train_size:,} training and {self.val_size:,} validation images, "
            f"{self.num_classes} classes, from {self.format})"
        )

    def train_steps(self, batch_size: int) -> int:
        """Return the number of steps of an epoch, which leaves out samples of an incomplete batch."""
        return self.train_size // natural("batch_size", batch_size, 1)

    def train_batches(
        self, *, batch_size: int, seed: int, recipe: ImageRecipe, rank: int = 0, world_size: int = 1, workers: int = 0,
        start_step: int = 0, accumulate: int = 1, pin_memory: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """Iterate over training batches without end, from a step on, with the same workers in all epochs.

        The samples of a batch and the draws for a sample depend on the seed and the step alone.

        Parameters
        ----------
        batch_size
            Images of a step, of all processes and parts together.
        seed
            Seed of the order and of the draws, not negative.
        recipe
            The augmentation.
        rank, world_size
            Number of this process, and of all.
        workers
            Processes that read, decode and augment; 0: this one.
        start_step
            Number of the first step.
        accumulate
            Parts of a step, which come one after the other.
        pin_memory
            Batches in page-locked memory, for an asynchronous copy to CUDA.

        Yields
        ------
        Iterator[tuple[Tensor, Tensor, Tensor]]
            (images, labels, keys): uint8 (n, 3, size, size), int64 (n,) and int64 (n,), for `ImageRecipe.finish`, with
            n = batch_size / world_size / accumulate.
        """
        local, rank, world = share(batch_size, rank, world_size)
        if local % natural("accumulate", accumulate, 1) or (recipe.mixup and local // accumulate % 2):
            raise ValueError(
                f"{local} images of a process cannot be shared by {accumulate} parts of a step in equal"
                f"{' and even' if recipe.mixup else ''} numbers"
            )
        natural("start_step", start_step)
        batch_rows(self.train_size, batch_size, seed, 0)  # the errors of it

        def chosen() -> Iterator[list[tuple[int, int]]]:
            steps = self.train_steps(batch_size)
            for step in itertools.count(start_step):
                rows = batch_rows(self.train_size, batch_size, seed, step)
                for part in rows.reshape(accumulate, world, -1)[:, rank]:
                    yield [(step // steps, row) for row in part.tolist()]

        samples = _Samples(self.splits["train"], recipe.transform(), recipe.size, seed)
        return iter(_Batches(samples, chosen(), 3, workers, pin_memory))

    def val_batches(
        self, batch_size: int, *, size: int = 224, rank: int = 0, world_size: int = 1,
        workers: int = 0, pin_memory: bool = False,
    ) -> _Batches:  # fmt: skip
        """Return the validation images in order: resized (bicubic), then the central seven eighths, by timm.

        The batches are (images, labels), uint8 (n, 3, size, size) and int64 (n,), of `batch_size` images in all
        processes together; the same workers serve all evaluations. Other arguments are those of `train_batches`.

        All processes get equally many batches of one shape, as collective forward passes need. Missing rows of the last
        batch are zeros with the label ``IGNORE`` (-100), which torch's cross-entropy leaves out of a sum. With one
        process there are none.
        """
        _, rank, world = share(batch_size, rank, world_size)
        chosen = []
        for first in range(0, self.val_size, batch_size):
            count = min(batch_size, self.val_size - first)
            each = -(-count // world)
            rows = range(first + min(rank * each, count), first + min((rank + 1) * each, count))
            chosen.append([(0, row) for row in [*rows, *[_FILL] * (each - len(rows))]])
        make = _timm("transforms_factory").transforms_imagenet_eval
        view = make(natural("size", size, 1), crop_pct=0.875, interpolation="bicubic", use_prefetcher=True)
        samples = _Samples(self.splits["val"], view, size, None)
        return _Batches(samples, chosen, 2, workers, pin_memory, persistent_workers=workers > 0)


def open_imagenet(source: str | os.PathLike[str], *, num_classes: int | None = None) -> ImageNetData:
    """Open a data set of labelled images; images are read when batches are made.

    Parameters
    ----------
    source
        A folder with ``train/`` and ``val/`` (or ``validation/``) that have one folder for each class; or with
        WebDataset shards ``train/*.tar`` and ``val/*.tar``, or ``*.tar`` with ``train`` and ``val`` (or ``validation``)
        as a word of their names, of members ``KEY.jpg`` (or another image format, the same for all) and ``KEY.cls``,
        which Hugging Face `datasets` copies to its cache; or a data set saved by `datasets`; or its name on the hub.
    num_classes
        Expected number of classes. Numeric labels need it if a class has no training image.

    Raises
    ------
    FileNotFoundError, ValueError
        No such data at ``source``; an empty class or split, validation classes without training images, a shard that is
        damaged, cut or of both splits, a sample without its image or label, a label outside the classes.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
    ...         path = Path(folder, name)
    ...         path.parent.mkdir(parents=True)
    ...         Image.new("RGB", (20, 30)).save(path)
    ...     data = open_imagenet(folder)
    ...     batches = data.train_batches(batch_size=2, seed=0, recipe=ImageRecipe.plain(16))
    ...     images, labels, keys = next(batches)
    >>> data.classes, data.train_size, data.val_size, images.shape
    (('cat', 'dog'), 2, 1, torch.Size([2, 3, 16, 16]))
    """
    place = Path(source).expanduser()
    kind = recognise(place)
    splits, classes = open_folders(place) if kind == "folder" else open_hub(source, kind)
    if classes is not None and num_classes not in (None, len(classes)):
        raise ValueError(f"{source} has {len(classes)} classes, num_classes is {num_classes}")
    if classes is None:
        present = np.unique(splits["train"].labels)
        if num_classes is None and len(present) != present[-1] + 1:
            raise ValueError(
                f"{source} has training images of {len(present)} classes, and the largest label is {present[-1]}: "
                "state num_classes if there are classes without images"
            )
        classes = tuple(map(str, range(len(present) if num_classes is None else natural("classes", num_classes, 1))))
    digest = hashlib.sha256("\n".join(classes).encode())
    for name, split in splits.items():
        if (wrong := np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))).size:
            raise ValueError(
                f"{split.name(wrong[0])} has the label {split.labels[wrong[0]]}, outside the {len(classes)} classes "
                f"({wrong.size} such labels)"
            )
        digest.update(f"\n{name}\n".encode() + split.identity() + split.labels.astype("<i8").tobytes())
    return ImageNetData(splits, classes, digest.hexdigest(), kind, os.fspath(source))


@dataclass
class _Samples(Dataset):
    """(epoch, number) -> (uint8 view, label, key of `ImageRecipe.finish`, or 0), or what was wrong with the image."""

    split: Split
    transform: Any
    size: int
    seed: int | None

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        with _generators_kept():
            return [self[place] for place in places]

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        if index == _FILL:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), IGNORE, 0
        name, key = self.split.name(index), 0
        try:
            image = decode(self.split.read(index), name)
            if self.seed is not None:
                *words, key = _words((self.seed, epoch, index), 4)
                random.seed(words[0])
                np.random.seed(words[1] % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(words[2])
            return self.transform(image), int(self.split.labels[index]), key
        except Exception as error:
            # Errors of Pillow, timm and torchvision; `decode` and `read` name the image.
            message = str(error)
            return message if name in message else f"{name} cannot be transformed ({type(error).__name__}: {error})"


def _collate(samples: list[Any]) -> Any:
    """Return a batch, or the first message of an error."""
    wrong = next((sample for sample in samples if isinstance(sample, str)), None)
    return default_collate(samples) if wrong is None else wrong


class _Batches(DataLoader):
    """The batches of `chosen` samples, by their first `fields`; ValueError for a message in place of a batch."""

    def __init__(
        self, samples: _Samples, chosen: Any, fields: int, workers: int, pin_memory: bool, **options: Any
    ) -> None:
        # A generator of its own, because a loader draws from torch's global one otherwise.
        super().__init__(
            samples, batch_sampler=chosen, num_workers=natural("workers", workers), collate_fn=_collate,
            pin_memory=pin_memory, generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip
        self.fields = fields

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, str):
                raise ValueError(batch)
            yield tuple(batch[: self.fields])


def _words(seed: tuple[int, ...], count: int) -> list[int]:
    """Return independent seeds of 63 bits."""
    return [int(word >> np.uint64(1)) for word in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


@contextmanager
def _generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global generators, from which timm draws, after the block."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
