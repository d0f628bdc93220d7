"""Image data in memory: `load_images`, `ImageDataset`, and the order in which training takes the samples.

CIFAR is read by hand, because torchvision reads only the python version, which it unpickles without any restriction,
and needs torch where flax needs none. Here a pickle is decoded only after its md5 sum was found to be the published
one, by a reader that knows the names of NumPy's arrays alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import pickle
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structlin_nn.data.tokens import natural

__all__ = ["DATASETS", "ImageDataset", "batch_rows", "channel_statistics", "epoch_order", "load_images"]

DATASETS = ("cifar10", "cifar100", "fashion")
"""The names that `load_images` knows."""

_FASHION = "fashion_mnist.npz"
_FASHION_SHA256 = "a7fb6544ddcfb8f231253bb2aae8d1f1d7dbb69442b935b349efaf143199a901"
_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, deviation) of each channel of uint8 images (N, C, H, W), in units of the full pixel range.

    Examples
    --------
    >>> channel_statistics(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    values = np.arange(256, dtype=object)
    mean, std = [], []
    for channel in range(images.shape[1]):
        # In chunks: bincount casts to int64.
        parts = (images[start : start + 4096, channel].reshape(-1) for start in range(0, len(images), 4096))
        counts = np.sum([np.bincount(part, minlength=256) for part in parts], axis=0)
        number, total, squares = int(counts.sum()), int((counts * values).sum()), int((counts * values**2).sum())
        mean.append(total / (255 * number))
        std.append((number * squares - total * total) ** 0.5 / (255 * number))
    return tuple(mean), tuple(std)


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Training and test images with their labels, held in memory.

    Attributes
    ----------
    name, source, licence
        Short name, such as ``"cifar10"`` (a suffix marks changed images); origin and changes; terms of use.
    train_images, test_images
        uint8 arrays (N, C, H, W) and (M, C, H, W); colour channels are red, green, blue.
    train_labels, test_labels
        int64 arrays (N,) and (M,), from 0 to ``num_classes - 1``.
    class_names
        The name of each class, in the order of the labels.
    mean, std
        Mean and deviation of each channel of the training images (`channel_statistics`; derived).

    Examples
    --------
    >>> pixels, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    >>> ImageDataset("toy", pixels, labels, pixels[:2], labels[:2], ("a", "b"), "made here", "none")
    ImageDataset('toy': 4 training and 2 test images of shape (1, 2, 2), 2 classes)
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    licence: str
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if (images.dtype, labels.dtype) != (np.uint8, np.int64):
                raise TypeError(f"{split}: uint8 images and int64 labels needed, got {images.dtype} and {labels.dtype}")
            if images.ndim != 4 or images.size == 0 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}: images (N, C, H, W) and labels (N,) needed, not empty, got {images.shape}, "
                    f"{labels.shape}"
                )
            if (wrong := np.flatnonzero((labels < 0) | (labels >= self.num_classes))).size:
                raise ValueError(
                    f"{split}_labels[{wrong[0]}] is {labels[wrong[0]]}, outside 0 to {self.num_classes - 1} "
                    f"({wrong.size} such labels)"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(f"shapes differ: {self.train_images.shape} to train, {self.test_images.shape} to test")
        for name, value in zip(("mean", "std"), channel_statistics(self.train_images), strict=True):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"ImageDataset({self.name!r}: {len(self.train_images)} training and {len(self.test_images)} "
            f"test images of shape {self.image_shape}, {self.num_classes} classes)"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return self.train_images.shape[1:]

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all arrays and their shapes."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def as_32x32_rgb(self) -> ImageDataset:
        """Return the data in the shape (3, 32, 32) of the CIFAR models, with ``-32x32-rgb`` added to the name.

        Smaller images are padded with zeros, equally on both sides (an odd line goes to the bottom or right), and a
        single channel is repeated three times. ValueError for larger images, or neither one nor three channels.

        Examples
        --------
        >>> load_images("fashion").as_32x32_rgb()
        ImageDataset('fashion-32x32-rgb': 10000 training and 2000 test images of shape (3, 32, 32), ...)
        """
        channels, height, width = self.image_shape
        if (channels, height, width) == (3, 32, 32):
            return self
        if height > 32 or width > 32 or channels not in (1, 3):
            raise ValueError(
                f"images of shape {self.image_shape} cannot be padded to (3, 32, 32): "
                "one or three channels of at most 32 x 32 pixels are needed"
            )
        top, left = (32 - height) // 2, (32 - width) // 2
        margins = ((0, 0), (0, 0), (top, 32 - height - top), (left, 32 - width - left))
        train, test = (
            np.pad(images, margins).repeat(3 // channels, axis=1) for images in (self.train_images, self.test_images)
        )
        done = f"{height}x{width} padded with zeros to 32x32"
        done += ", the one channel repeated three times" if channels == 1 else ""
        source = f"{self.source}; {done}"
        return dataclasses.replace(
            self, name=f"{self.name}-32x32-rgb", train_images=train, test_images=test, source=source
        )


def load_images(name: str, root: str | os.PathLike[str] | None = None, *, verify: bool = True) -> ImageDataset:
    """Load an image data set into memory.

    Parameters
    ----------
    name
        ``"cifar10"`` or ``"cifar100"`` (its 100 fine labels), or ``"fashion"``, the class-balanced subset of
        Fashion-MNIST that is part of this package.
    root
        The folder of the official files of CIFAR (binary or python version), or a folder that holds that folder; there,
        binary comes before python. Embedded data have no root.
    verify
        Compare CIFAR with the published md5 sums. With False, binary files with other content or another number of
        images are read too; pickles are not. Embedded data are always verified.

    Raises
    ------
    FileNotFoundError, ValueError
        No root; a file that is missing, truncated, damaged, or not the official one.

    Notes
    -----
    Source of CIFAR: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html

    Examples
    --------
    >>> data = load_images("fashion")
    >>> data.train_images.shape, data.train_labels.shape, data.num_classes
    ((10000, 1, 28, 28), (10000,), 10)
    """
    if name not in DATASETS:
        raise ValueError(f"unknown image data {name!r}; known: {', '.join(DATASETS)}")
    if name == "fashion":
        if root is not None or not verify:
            what = "always verified" if root is None else "takes no root"
            raise ValueError(f"fashion is embedded in the package and {what}: leave the option out")
        return _load_fashion()
    if not root:
        raise FileNotFoundError(
            f"no place given for {name}: pass root= (--data), the folder of the files from "
            'https://www.cs.toronto.edu/~kriz/cifar.html (the embedded data "fashion" need none)'
        )
    return _load_cifar(name, root, verify)


def _load_fashion() -> ImageDataset:
    """Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747; README.md beside this file describes its making."""
    place = files("structlin_nn.data") / _FASHION
    if not place.is_file():
        raise FileNotFoundError(f"{place} is missing: the package was installed without its data")
    raw = place.read_bytes()
    if (actual := hashlib.sha256(raw).hexdigest()) != _FASHION_SHA256:
        raise ValueError(f"{place} has the sha256 sum {actual}, expected {_FASHION_SHA256}: install structlin again")
    with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
        train, test = stored["train_images"][:, None], stored["test_images"][:, None]
        train_labels, test_labels = (stored[f"{split}_labels"].astype(np.int64) for split in ("train", "test"))
    return ImageDataset(
        "fashion", train, train_labels, test, test_labels, tuple(_FASHION_CLASSES.split(",")),
        "embedded class-balanced subset of Fashion-MNIST (10,000 of 60,000 training and 2,000 of 10,000 test images)",
        "MIT, copyright 2017 Zalando SE",
    )  # fmt: skip


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the permutation of ``range(size)`` that belongs to a seed and an epoch, int64 (size,).

    It is the order of `size` random 64-bit integers from the counter-based generator Philox, whose raw stream NumPy
    keeps the same in every release.

    Examples
    --------
    >>> epoch_order(seed=0, epoch=0, size=5).tolist()
    [0, 3, 1, 2, 4]
    """
    seed, epoch, size = natural("seed", seed), natural("epoch", epoch), natural("size", size)
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


_kept_order = functools.lru_cache(maxsize=2)(epoch_order)


def batch_rows(size: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the samples of one step of training: a function of its arguments, so that a run resumes by its step alone.

    An epoch has ``size // batch_size`` steps (ValueError for none), in the order of `epoch_order`; it leaves out the
    samples of an incomplete batch. Returns int64 (batch_size,).

    Examples
    --------
    >>> [batch_rows(5, 2, seed=0, step=step).tolist() for step in range(3)]
    [[0, 3], [1, 2], [3, 4]]
    """
    batch_size = natural("batch_size", batch_size, 1)
    steps = natural("size", size) // batch_size
    if not steps:
        raise ValueError(f"{size} samples are less than one batch of {batch_size}")
    epoch, place = divmod(natural("step", step), steps)
    return _kept_order(seed, epoch, size)[place * batch_size : (place + 1) * batch_size].copy()


_LICENCE = (
    "no licence is stated by the authors; they ask to cite: A. Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009"
)
_CLASSES = {"label": 10, "coarse_label": 20, "fine_label": 100}
_PIXELS = 3 * 32 * 32


class _Form(NamedTuple):
    """An official form of a data set, with md5 sums; the last of its files holds the test images."""

    folder: str
    pickled: bool
    kinds: tuple[str, ...]
    files: dict[str, str]


_FORMS = {
    "cifar10": (
        _Form("cifar-10-batches-bin", False, ("label",), {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        }),
        _Form("cifar-10-batches-py", True, ("label",), {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        }),
    ),
    "cifar100": (
        _Form("cifar-100-binary", False, ("coarse_label", "fine_label"), {
            "train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898",
        }),
        _Form("cifar-100-python", True, ("coarse_label", "fine_label"), {
            "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        }),
    ),
}  # fmt: skip


def _load_cifar(name: str, root: str | os.PathLike[str], verify: bool) -> ImageDataset:
    form, folder = _locate(_FORMS[name], Path(root).expanduser())
    if form.pickled and not verify:
        raise ValueError(f"{folder} holds pickles, which are read only with verify=True: use the binary version")
    if missing := [file for file in form.files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    parts = [_records(form, folder / file, md5 if verify else None) for file, md5 in form.files.items()]
    arrays: list[np.ndarray] = []
    for records, what in ((np.concatenate(parts[:-1]), "training"), (parts[-1], "test")):
        for column, kind in enumerate(form.kinds):
            if (wrong := np.flatnonzero(records[:, column] >= _CLASSES[kind])).size:
                found, last = records[wrong[0], column], _CLASSES[kind] - 1
                raise ValueError(f"{folder}: {what} image {wrong[0]} has {kind} {found}, outside 0 to {last}")
        pixels = np.ascontiguousarray(records[:, len(form.kinds) :]).reshape(-1, 3, 32, 32)
        arrays += [pixels, records[:, len(form.kinds) - 1].astype(np.int64)]
    classes = tuple(map(str, range(_CLASSES[form.kinds[-1]])))
    done = f"{folder} ({'md5 sums verified' if verify else 'not verified'})"
    train, train_labels, test, test_labels = arrays
    return ImageDataset(name, train, train_labels, test, test_labels, classes, done, _LICENCE)


def _records(form: _Form, path: Path, md5: str | None) -> np.ndarray:
    """Return the records of a file as the binary version has them: uint8, labels, then pixels."""
    raw, record = path.read_bytes(), len(form.kinds) + _PIXELS
    if md5 is not None and (actual := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(
            f"{path} ({len(raw)} bytes) has the md5 sum {actual}, the official one is {md5}: it is truncated, damaged "
            "or another file. Pass verify=False if you know that the data are different"
        )
    if form.pickled:
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        columns = [np.array(content[f"{kind}s"], dtype=np.uint8)[:, None] for kind in form.kinds]
        return np.hstack([*columns, content["data"]])
    if not raw or len(raw) % record:
        raise ValueError(f"{path} has {len(raw)} bytes, not a multiple of {record}: it is truncated or another file")
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, record)


def _locate(forms: tuple[_Form, ...], root: Path) -> tuple[_Form, Path]:
    wanted = ", ".join(form.folder for form in forms)
    if not root.is_dir():
        what = "is no folder: unpack it" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{root} {what}; expected {wanted}, or a folder with one of them")
    places = [(form, root / form.folder) for form in forms if (root / form.folder).is_dir()]
    places += [(form, root) for form in forms if any((root / file).is_file() for file in form.files)]
    if not places:
        raise FileNotFoundError(f"{root} holds none of {wanted}, nor the files of one of them")
    return places[0]


class _Unpickler(pickle.Unpickler):
    """Knows what NumPy writes for an array, and no other name. For content whose sum was checked before."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"the pickle asks for {module}.{name}, which no image file needs; it was not loaded")
