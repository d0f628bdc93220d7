"""ImageNet, or any labelled images of its kind, in batches that depend on seed and epoch alone.

Sources are an ImageFolder tree (``train/CLASS/*.jpg``, ``val/CLASS/*.jpg``), WebDataset shards, and Hugging Face
`datasets`; see `structlin_nn.data.image_sources`. Nothing is read before it is used.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structlin_nn.data._checks import natural, share
from structlin_nn.data.batches import epoch_order
from structlin_nn.data.image_sources import FORMATS, FolderSplit, Split, open_splits
from structlin_nn.data.image_transforms import ImageRecipe, TrainingView, decode, evaluation_view
from structlin_nn.data.tokens import IGNORE

__all__ = ["FORMATS", "ImageNetData", "ImageRecipe", "open_imagenet"]

BROKEN = ("error", "skip")


@dataclass(eq=False)
class ImageNetData:
    """Labelled image files with a training and a validation split; made by `open_imagenet`.

    Attributes:
        classes: name of each class, in the order of the labels.
        digest: sha256 of names, sizes and labels of all samples (of fingerprints, for Hugging Face data); images
            themselves are not read.
        format: ``folder``, ``shards`` or ``datasets``.
        source: as given.
        broken: what was skipped so far (``on_broken="skip"``): name of the sample -> error.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...]
    digest: str
    format: str
    source: str
    on_broken: str = "error"
    broken: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"ImageNetData({self.source!r}: {self.train_size:,} training and {self.val_size:,} validation images, "
            f"{self.num_classes} classes, from {self.format})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.splits["train"].labels)

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return len(self.splits["val"].labels)

    @property
    def ignored(self) -> list[str]:
        """Files of an image tree that are no images by their names, and are left out."""
        return [path for split in self.splits.values() if isinstance(split, FolderSplit) for path in split.ignored]

    def train_steps(self, batch_size: int) -> int:
        """Whole batches in an epoch; what is left is left out of that epoch."""
        return self.train_size // natural("batch_size", batch_size, 1)

    def train_batches(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_batch: int = 0,
        recipe: ImageRecipe | None = None,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of one epoch, from a batch on.

        The order depends on the seed and the epoch (`structlin_nn.data.epoch_order`), and what is drawn for a
        sample on the seed, the epoch and the sample: the number of processes and workers, and where the epoch was
        resumed, change nothing.

        Args:
            epoch: number of the epoch, from 0.
            batch_size: images in a batch, of all processes together.
            seed: non-negative integer.
            rank: number of this process.
            world_size: number of processes, a divisor of ``batch_size``.
            workers: processes that read, decode and augment; 0: this one.
            start_batch: number of the first batch, to resume within an epoch.
            recipe: the augmentation; None: `ImageRecipe()`, which needs the extra ``vision``.
            pin_memory: batches in page-locked memory, for an asynchronous copy to CUDA.

        Yields:
            (images, labels): float32 (n, 3, size, size), normalised, and int64 (n,), with n the batch size
            divided by the number of processes (less where broken images are skipped). Mixup and label smoothing
            are `ImageRecipe.mix`, on the device that trains.

        Raises:
            ValueError: an argument out of range, fewer images than one batch, or a broken image.
            ImportError: the recipe needs the extra ``vision``.
        """
        local, place, _ = share(batch_size, rank, world_size)
        steps = self.train_steps(batch_size)
        if not steps:
            raise ValueError(f"{self.train_size} images are less than one batch of {batch_size}")
        if natural("start_batch", start_batch) > steps:
            raise ValueError(f"start_batch {start_batch} is outside an epoch of {steps} batches")
        recipe = ImageRecipe() if recipe is None else recipe
        if not isinstance(recipe, ImageRecipe):
            raise TypeError(f"recipe must be an ImageRecipe, got {recipe!r}")
        order = epoch_order(seed, epoch, self.train_size)
        firsts = range(start_batch * batch_size + place * local, steps * batch_size, batch_size)
        skip = self.on_broken == "skip"
        samples = _Samples(self.splits["train"], TrainingView(recipe), recipe.size, (seed, epoch), skip)
        return self._load(samples, [order[first : first + local].tolist() for first in firsts], workers, pin_memory)

    def val_batches(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        size: int = 224,
        crop: float = 0.875,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every validation image once, in order: resized, the centre cut out (`evaluation_view`).

        With several processes all get equally many batches of one shape, as collective forward passes need. What
        a process lacks in the last batch is filled with zeros whose label is ``IGNORE`` (-100), which torch's
        cross-entropy leaves out of a sum and no prediction equals. With one process nothing is filled.

        Args:
            batch_size: images in a batch, of all processes together.
            rank: number of this process.
            world_size: number of processes, a divisor of ``batch_size``.
            workers: processes that read and decode; 0: this one.
            size: height and width of the views.
            crop: side of the view divided by the shortest side of the resized image, above 0, at most 1.
            pin_memory: as in `train_batches`.

        Yields:
            (images, labels): float32 (n, 3, size, size) and int64 (n,).

        Raises:
            ValueError: an argument out of range, or a broken image.
        """
        _, place, world = share(batch_size, rank, world_size)
        natural("size", size, 1)
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {crop}")
        chosen = []
        for first in range(0, self.val_size, batch_size):
            count = min(batch_size, self.val_size - first)
            each = -(-count // world)
            rows = range(first + min(place * each, count), first + min((place + 1) * each, count))
            chosen.append([*rows, *[_FILL] * (each - len(rows))])
        view = _View(size, crop)
        samples = _Samples(self.splits["val"], view, size, (), self.on_broken == "skip")
        return self._load(samples, chosen, workers, pin_memory)

    def _load(
        self, samples: _Samples, chosen: Sequence[list[int]], workers: int, pin_memory: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        natural("workers", workers)
        # A generator of its own, because a loader draws from torch's global one otherwise.
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=chosen,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_one_thread,
        )
        return self._report(loader)

    def _report(self, loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, broken in loader:
            for name, message in broken:
                if name not in self.broken:
                    warnings.warn(f"skipped: {message}", stacklevel=2)
                self.broken[name] = message
            if images is None:
                raise ValueError(f"all {len(broken)} images of a batch are broken, the first: {broken[0][1]}")
            yield images, labels


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
            members ``KEY.jpg`` and ``KEY.cls``; or a data set saved by Hugging Face datasets; or its name on the
            hub.
        format: ``folder``, ``shards`` or ``datasets``; None: what is found.
        image: column of the images, of Hugging Face data.
        label: column of the labels, likewise.
        num_classes: classes there should be. Shards tell only labels: without it, their number is the largest
            label plus one.
        on_broken: ``"error"``: a broken image ends the iteration, and the error names it. ``"skip"``: it is left
            out of its batch, with a warning, and noted in ``broken``.

    Raises:
        FileNotFoundError: nothing of the kind at ``source``.
        ValueError: an unknown format, an empty class or split, validation classes that have no training images,
            a shard that is damaged, truncated or compressed, a label outside the classes.
        ImportError: Hugging Face data without `datasets` installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
        ...         path = Path(folder, name)
        ...         path.parent.mkdir(parents=True)
        ...         Image.new("RGB", (20, 30)).save(path)
        ...     data = open_imagenet(folder)
        ...     images, labels = next(data.train_batches(0, batch_size=2, seed=0, recipe=ImageRecipe.plain(16)))
        >>> data.classes, data.train_size, data.val_size, images.shape
        (('cat', 'dog'), 2, 1, torch.Size([2, 3, 16, 16]))
    """
    if on_broken not in BROKEN:
        raise ValueError(f"on_broken must be 'error' or 'skip', got {on_broken!r}")
    if num_classes is not None:
        num_classes = natural("num_classes", num_classes, 1)
    splits, classes, kind = open_splits(source, format, image=image, label=label, num_classes=num_classes)
    digest = hashlib.sha256("\n".join(classes).encode())
    for name, split in splits.items():
        digest.update(f"\n{name}\n".encode())
        for line in split.sizes():
            digest.update(line + b"\n")
        digest.update(split.labels.astype("<i8").tobytes())
    return ImageNetData(splits, classes, digest.hexdigest(), kind, os.fspath(source), on_broken)


_FILL = -1


class _View:
    """`evaluation_view` with its sizes, as a function that other processes can be given."""

    def __init__(self, size: int, crop: float) -> None:
        self.size, self.crop = size, crop

    def __call__(self, image: Any, seed: tuple[int, ...]) -> Tensor:
        return evaluation_view(image, self.size, self.crop)


class _Samples(torch.utils.data.Dataset):
    """Decoded and transformed samples by number, (view, label), or (name, message) of a broken one."""

    def __init__(self, split: Split, transform: Any, size: int, seed: tuple[int, ...], skip: bool) -> None:
        self.split, self.transform, self.size, self.seed, self.skip = split, transform, size, seed, skip

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index == _FILL:
            return torch.zeros(3, self.size, self.size), IGNORE
        try:
            image = decode(self.split.read(index), self.split.name(index))
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            return self.split.name(index), str(error)
        return self.transform(image, (*self.seed, index)), int(self.split.labels[index])


def _collate(samples: list[tuple[Any, Any]]) -> tuple[Tensor | None, Tensor | None, list[tuple[str, str]]]:
    broken = [(view, label) for view, label in samples if isinstance(view, str)]
    kept = [(view, label) for view, label in samples if not isinstance(view, str)]
    if not kept:
        return None, None, broken
    return torch.stack([view for view, _ in kept]), torch.tensor([label for _, label in kept]), broken


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
