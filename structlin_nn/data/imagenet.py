"""ImageNet, or any labelled images of its kind: image trees, WebDataset shards, Hugging Face `datasets`.

timm's transforms and torch's DataLoader do the work; images reach the device as uint8. What is added here, because no
loader of timm, webdataset or torchdata has it: a batch is a function of the seed and the number of the step alone, so
that a run resumes by its step, with any number of processes and workers.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from structlin_nn.data import augment
from structlin_nn.data._checks import natural, share
from structlin_nn.data.image_sources import FORMATS, Split, open_splits
from structlin_nn.data.images import batch_rows
from structlin_nn.data.tokens import IGNORE

__all__ = ["FORMATS", "IMAGENET_MEAN", "IMAGENET_STD", "ImageNetData", "ImageRecipe", "decode", "open_imagenet"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RETRIES = 50  # as in timm: so many broken images after each other are no accident
_FILL = -1


def decode(raw: bytes, name: str) -> Image.Image:
    """An image file as an RGB image, all its pixels read.

    Raises:
        ValueError: the file is truncated, damaged or of no known format; the message names it.

    Example:
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
        # A damaged file can fail in any way at all: Pillow raises OSError, SyntaxError, struct.error and others.
        raise ValueError(f"{name} ({len(raw)} bytes) is a broken image ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class ImageRecipe:
    """Training augmentation of ImageNet; the defaults are those of Compute Better Spent (ICML 2024) for ViT/32.

    timm crops, resizes, flips, jitters and applies RandAugment to each image, in worker processes (`transform`).
    On the device, `finish` normalises, erases (timm's), smooths the labels and mixes.

    Attributes:
        size: height and width of the result.
        crop_scale, crop_ratio: ranges of the share of the area and of width / height of the crop.
        interpolation: ``bilinear``, ``bicubic``, or ``random``: either, drawn for each image.
        flip: probability of mirroring.
        rand_augment: configuration of timm's RandAugment, None for none.
        color_jitter: strength in brightness, contrast and saturation. As in timm, only without RandAugment.
        random_erasing: probability of erasing a box with noise, 0 for none.
        mixup: alpha of mixup, 0 for none.
        smoothing: label smoothing.

    Raises:
        ValueError: a value outside its range.

    Source: Cubuk et al., RandAugment, 2020; Zhong et al., Random Erasing, 2020; Zhang et al., mixup, 2018.

    Example:
        >>> ImageRecipe.plain(size=64).rand_augment is None
        True
    """

    size: int = 224
    crop_scale: tuple[float, float] = augment.CROP_SCALE
    crop_ratio: tuple[float, float] = augment.CROP_RATIO
    interpolation: str = "random"
    flip: float = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    mixup: float = 0.2
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        natural("size", self.size, 1)
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, got {(low, high)}")
        if self.interpolation not in ("random", "bilinear", "bicubic"):
            raise ValueError(f"interpolation must be random, bilinear or bicubic, got {self.interpolation!r}")
        for name, highest in (
            ("flip", 1),
            ("random_erasing", 1),
            ("smoothing", 1),
            ("color_jitter", 1e9),
            ("mixup", 1e9),
        ):
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} must be from 0 to {highest:g}, got {getattr(self, name)}")

    @classmethod
    def plain(cls, size: int = 224, **changes: Any) -> ImageRecipe:
        """Crops and flips alone."""
        off = {"rand_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0, "smoothing": 0.0}
        return cls(size=size, **{**off, **changes})

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's transform of one image: RGB image to uint8 tensor (3, size, size); it draws from global generators."""
        made = _timm("transforms_factory").transforms_imagenet_train(
            self.size,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            hflip=self.flip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.rand_augment,
            interpolation=self.interpolation,
            mean=IMAGENET_MEAN,
            use_prefetcher=True,
        )
        for step in made.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        return made

    def finish(
        self, images: Tensor, labels: Tensor, keys: Tensor, num_classes: int, seed: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """What is done on the device, without waiting for it.

        Args:
            images: uint8 (n, 3, size, size), as `ImageNetData.train_batches` gives them.
            labels: int64 (n,), on the same device.
            keys: int64 (n,), on the CPU: what is erased depends on them alone.
            num_classes: K.
            seed: non-negative integers, such as (seed, step): the proportion of mixup depends on them alone.

        Returns:
            (inputs, targets): float32 (n, 3, size, size), and (n, K), each row summing to 1.
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
    """A module of timm.data, which is optional."""
    try:
        return importlib.import_module(f"timm.data.{name}")
    except ImportError as error:
        raise ImportError(f"ImageNet needs torchvision and timm: pip install 'structlin[vision]' ({error})") from error


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, which asks Pillow to keep 0 bits at full strength: black before Pillow 13, a ValueError since."""
    return Image.new(image.mode, image.size) if bits == 0 else _timm("auto_augment").posterize(image, bits)


@dataclass(eq=False)
class ImageNetData:
    """Labelled image files with a training and a validation split; made by `open_imagenet`.

    It holds names and labels, no images, and can be pickled: one process can open it for all.

    Attributes:
        classes, num_classes: name of each class, in the order of the labels, and their number.
        train_size, val_size: numbers of images.
        digest: sha256 of the names and labels of all samples (of fingerprints, for Hugging Face data); images
            themselves are not read.
        format: ``folder``, ``shards`` or ``datasets``.
        source: as given.
        broken: what was broken so far: name of the sample -> error.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    digest: str
    format: str
    source: str
    on_broken: str = "error"
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_classes = len(self.classes)
        self.train_size, self.val_size = (len(self.splits[split].labels) for split in ("train", "val"))

    def __repr__(self) -> str:
        return (
            f"ImageNetData({self.source!r}: {self.train_size:,} training and {self.val_size:,} validation images, "
            f"{self.num_classes} classes, from {self.format})"
        )

    def train_steps(self, batch_size: int) -> int:
        """Steps of an epoch; the samples that are left are left out of that epoch."""
        return self.train_size // natural("batch_size", batch_size, 1)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        recipe: ImageRecipe,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        accumulate: int = 1,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Training batches without end, from a step on; the same workers go on from epoch to epoch.

        What is in a batch, and what is drawn for a sample, depend on the seed and the step alone.

        Args:
            batch_size: images of a step, of all processes and parts together.
            seed: of the order and of what is drawn, not negative.
            recipe: the augmentation.
            rank, world_size: number of this process, and of all.
            workers: processes that read, decode and augment; 0: this one.
            start_step: number of the first step.
            accumulate: parts of a step, which come one after the other.
            pin_memory: batches in page-locked memory, for an asynchronous copy to CUDA.

        Yields:
            (images, labels, keys): uint8 (n, 3, size, size), int64 (n,) and int64 (n,), for `ImageRecipe.finish`, with
            n = batch_size / world_size / accumulate.

        Raises:
            ValueError: an argument out of range, a batch that cannot be shared equally, fewer images than one batch,
                or (with ``on_broken="error"``) a broken image.
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

        samples = _Samples(self, "train", recipe.transform(), recipe.size, seed)
        return self._checked(self._loader(samples, _Endless(chosen), workers, pin_memory), training=True)

    def val_batches(
        self,
        batch_size: int,
        *,
        size: int = 224,
        crop: float = 0.875,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Validation:
        """Every validation image once, in order: resized (bicubic), the centre cut out, by timm's transform.

        All processes get equally many batches of one shape, as collective forward passes need. What a process lacks in
        the last batch, and broken images with ``on_broken="skip"``, are zeros with the label ``IGNORE`` (-100), which
        torch's cross-entropy leaves out of a sum. With one process nothing is filled.

        Args:
            batch_size: images in a batch, of all processes together.
            size: height and width of the views.
            crop: side of the view divided by the shortest side of the resized image, above 0, at most 1.
            rank, world_size, workers, pin_memory: as in `train_batches`.

        Returns:
            An object to iterate over in each evaluation, by the same workers, of (images, labels): uint8
            (n, 3, size, size) and int64 (n,).

        Raises:
            ValueError: an argument out of range, or a broken image.
        """
        _, rank, world = share(batch_size, rank, world_size)
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {crop}")
        chosen = []
        for first in range(0, self.val_size, batch_size):
            count = min(batch_size, self.val_size - first)
            each = -(-count // world)
            rows = range(first + min(rank * each, count), first + min((rank + 1) * each, count))
            chosen.append([(0, row) for row in [*rows, *[_FILL] * (each - len(rows))]])
        make = _timm("transforms_factory").transforms_imagenet_eval
        view = make(natural("size", size, 1), crop_pct=crop, interpolation="bicubic", use_prefetcher=True)
        samples = _Samples(self, "val", view, size, None)
        return Validation(self, self._loader(samples, chosen, workers, pin_memory, persistent_workers=workers > 0))

    @staticmethod
    def _loader(samples: _Samples, chosen: Any, workers: int, pin_memory: bool, **options: Any) -> DataLoader:
        # A generator of its own, because a loader draws from torch's global one otherwise.
        return DataLoader(
            samples,
            batch_sampler=chosen,
            num_workers=natural("workers", workers),
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_one_thread,
            **options,
        )

    def _checked(self, loader: DataLoader, training: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, labels, keys, broken in loader:
            if broken and self.on_broken == "error":
                raise ValueError(broken[0][1])
            if training and bool((labels == IGNORE).any()):
                raise ValueError(f"{_RETRIES} images after each other are broken, the last: {broken[-1][1]}")
            for name, message in broken:
                if name not in self.broken:
                    self.broken[name] = message
                    warnings.warn(f"{message}; left out", stacklevel=2)
            yield images, labels, keys


@dataclass
class Validation:
    """The validation batches of `ImageNetData.val_batches`, to be iterated over again and again."""

    data: ImageNetData
    loader: DataLoader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, labels) for images, labels, _ in self.data._checked(self.loader))


def open_imagenet(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    image: str = "image",
    label: str = "label",
    num_classes: int | None = None,
    on_broken: str = "error",
) -> ImageNetData:
    """Open a data set of labelled images; images are read when batches are made.

    Args:
        source: a folder with ``train/`` and ``val/`` (or ``validation/``) that have one folder for each class; or
            with shards ``*train*.tar`` and ``*val*.tar``, or ``train/*.tar`` and ``val/*.tar``, uncompressed, of
            members ``KEY.jpg`` and ``KEY.cls``; or a data set saved by Hugging Face `datasets`; or its name on the
            hub.
        format: ``folder``, ``shards`` or ``datasets``; None: what is found.
        image: column of the images, of Hugging Face data.
        label: column of the labels, likewise.
        num_classes: classes there should be. Shards hold only numbers: without it, the largest label is the last
            class, and each class must have a training image.
        on_broken: what is done about an image that cannot be read, decoded or transformed. ``"error"``: ValueError
            that names it. ``"skip"``: a warning names it, ``broken`` notes it, and in training the next image of the
            data set takes its place, as in timm; in validation its label is ``IGNORE``.

    Raises:
        FileNotFoundError: nothing of the kind at ``source``.
        ValueError: an unknown format, an empty class or split, validation classes that have no training images,
            a shard that is damaged, cut or compressed, a label outside the classes.
        ImportError: Hugging Face data without `datasets` installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
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
    if on_broken not in ("error", "skip"):
        raise ValueError(f"on_broken must be 'error' or 'skip', got {on_broken!r}")
    if num_classes is not None:
        natural("num_classes", num_classes, 1)
    splits, classes, digest, kind = open_splits(source, format, image=image, label=label, num_classes=num_classes)
    return ImageNetData(splits, classes, digest, kind, os.fspath(source), on_broken)


@dataclass
class _Endless:
    """A batch sampler that begins anew with each iteration and never ends."""

    chosen: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.chosen()


class _Samples(Dataset):
    """(epoch, number) -> (uint8 view, label, key of `ImageRecipe.finish`, what was broken on the way to it)."""

    def __init__(self, data: ImageNetData, split: str, transform: Any, size: int, seed: int | None) -> None:
        self.split, self.transform, self.size, self.seed = data.splits[split], transform, size, seed
        self.retries = _RETRIES if data.on_broken == "skip" and seed is not None else 1

    def __getitems__(self, places: list[tuple[int, int]]) -> list[tuple[Tensor, int, int, list[tuple[str, str]]]]:
        with _generators_kept():
            return [self[place] for place in places]

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, int, list[tuple[str, str]]]:
        epoch, first = place
        broken: list[tuple[str, str]] = []
        for index in range(first, first + self.retries):
            if index == _FILL:
                break
            index %= len(self.split.labels)
            name = self.split.name(index)
            try:
                image = decode(self.split.read(index), name)
                if self.seed is None:
                    return self.transform(image), int(self.split.labels[index]), 0, broken
                *words, key = _words((self.seed, epoch, index), 4)
                random.seed(words[0])
                np.random.seed(words[1] % 2**32)  # noqa: NPY002
                torch.default_generator.manual_seed(words[2])
                return self.transform(image), int(self.split.labels[index]), key, broken
            except Exception as error:
                # Whatever an image makes of Pillow, timm and torchvision; `decode` and `read` name the image.
                message = str(error)
                if name not in message:
                    message = f"{name} cannot be transformed ({type(error).__name__}: {error})"
                broken.append((name, message))
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), IGNORE, 0, broken


def _collate(samples: list[tuple[Tensor, int, int, list[tuple[str, str]]]]) -> tuple[Any, ...]:
    views, labels, keys, broken = zip(*samples, strict=True)
    return (
        default_collate(list(views)),
        torch.tensor(labels),
        torch.tensor(keys),
        [found for each in broken for found in each],
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _words(seed: tuple[int, ...], count: int) -> list[int]:
    """Independent seeds of 63 bits."""
    return [int(word >> np.uint64(1)) for word in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


@contextmanager
def _generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators, which timm draws from, afterwards as they were before."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
