"""CIFAR-10 and CIFAR-100 from their standard files, wherever these are.

Four forms of each data set are read: the folder of the binary version (``cifar-10-batches-bin``,
``cifar-100-binary``), the folder of the python version (``cifar-10-batches-py``, ``cifar-100-python``), and
the .tar.gz archive of either, under its official name. The place given may be the folder or archive itself,
or the folder that holds it; there, folders come before archives and binary before python.

Pickles are decoded without running code from them, and archives are read member by member in memory: nothing
is extracted to disk.

Source: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import hashlib
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from structlin_nn.data._pickle import load_plain
from structlin_nn.data.images import ImageDataset

__all__ = ["load_cifar10", "load_cifar100"]

_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_FINE_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
    maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100_COARSE_NAMES = """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
"""
CIFAR10_CLASSES = tuple(_CIFAR10_NAMES.split())
CIFAR100_FINE_CLASSES = tuple(_CIFAR100_FINE_NAMES.split())
CIFAR100_COARSE_CLASSES = tuple(_CIFAR100_COARSE_NAMES.split())
_LICENCE = (
    "no licence is stated by the authors; they ask to cite: A. Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009"
)
_PIXELS = 3 * 32 * 32
# Far above any official file; keeps a hostile archive from filling the memory.
_MAX_BYTES = 512 * 2**20
_CHUNK = 2**20


@dataclass(frozen=True)
class _File:
    """One official file: its name, size in bytes (None: not known) and md5 sum."""

    name: str
    size: int | None
    md5: str


@dataclass(frozen=True)
class _Form:
    """One official form of a data set: the test file is the last of its files."""

    folder: str
    archive: str
    archive_md5: str
    label_names: tuple[str, ...]
    pickled: bool
    files: tuple[_File, ...]


def _binary(label_names: tuple[str, ...], sums: dict[str, tuple[int, str]], **names: str) -> _Form:
    record = len(label_names) + _PIXELS
    files = tuple(_File(f"{name}.bin", n * record, md5) for name, (n, md5) in sums.items())
    return _Form(label_names=label_names, pickled=False, files=files, **names)


_CIFAR10 = (
    _binary(
        ("labels",),
        {
            "data_batch_1": (10000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
            "data_batch_2": (10000, "5ea93a67294ea407fff1d09f752e9692"),
            "data_batch_3": (10000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
            "data_batch_4": (10000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
            "data_batch_5": (10000, "53f37980c15c3d472c316c40844f3f0d"),
            "test_batch": (10000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
        },
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    ),
    _Form(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        label_names=("labels",),
        pickled=True,
        files=(
            _File("data_batch_1", 31035704, "c99cafc152244af753f735de768cd75f"),
            _File("data_batch_2", 31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
            _File("data_batch_3", 31035999, "54ebc095f3ab1f0389bbae665268c751"),
            _File("data_batch_4", 31035696, "634d18415352ddfa80567beed471001a"),
            _File("data_batch_5", 31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
            _File("test_batch", 31035526, "40351d587109b95175f43aff81a1287e"),
        ),
    ),
)
_CIFAR100 = (
    _binary(
        ("coarse_labels", "fine_labels"),
        {
            "train": (50000, "6172c7755cfe09b2fe270c85cebc1b15"),
            "test": (10000, "4499cfba6c016c1be1438163640a0898"),
        },
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        archive_md5="03b5dce01913d631647c71ecec9e9cb8",
    ),
    _Form(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        label_names=("coarse_labels", "fine_labels"),
        pickled=True,
        files=(
            _File("train", 155249918, "16019d7e3df5f24257cddd939b257f8d"),
            _File("test", None, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        ),
    ),
)


BINARY_FORMS = {"cifar10": _CIFAR10[0], "cifar100": _CIFAR100[0]}


def load_cifar10(root: str | os.PathLike[str], *, verify: bool = True) -> ImageDataset:
    """Load CIFAR-10: 50,000 training and 10,000 test images of shape (3, 32, 32), 10 classes.

    Args:
        root: folder or archive, see the module's description.
        verify: compare the md5 sum of every file (or of the archive) with that of the official one. With
            False, files of the same layout with other content or another number of images are read too.

    Returns:
        The data set, named ``cifar10``, training images in the order of the files.

    Raises:
        FileNotFoundError: nothing of the data set at ``root``, or one of its files is missing.
        ValueError: a file that is truncated, damaged, not the official one (``verify=True``) or hostile; the
            message names it.

    Example:
        >>> load_cifar10("/nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: /nowhere does not exist; expected cifar-10-batches-bin, cifar-10-batches-py, ...
    """
    return _data_set("cifar10", "fine", *_read(_CIFAR10, Path(root), (len(CIFAR10_CLASSES),), verify))


def load_cifar100(root: str | os.PathLike[str], *, labels: str = "fine", verify: bool = True) -> ImageDataset:
    """Load CIFAR-100: 50,000 training and 10,000 test images of shape (3, 32, 32).

    Args:
        root: folder or archive, see the module's description.
        labels: ``"fine"`` (100 classes) or ``"coarse"`` (20 superclasses).
        verify: as for `load_cifar10`.

    Returns:
        The data set, named ``cifar100`` or ``cifar100-coarse``.

    Raises:
        FileNotFoundError: nothing of the data set at ``root``, or one of its files is missing.
        ValueError: unknown labels, or a file that is truncated, damaged, not the official one
            (``verify=True``) or hostile.

    Example:
        >>> load_cifar100("/nowhere", labels="medium")
        Traceback (most recent call last):
            ...
        ValueError: labels must be 'fine' or 'coarse', got 'medium'
    """
    if labels not in ("fine", "coarse"):
        raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
    limits = (len(CIFAR100_COARSE_CLASSES), len(CIFAR100_FINE_CLASSES))
    return _data_set("cifar100", labels, *_read(_CIFAR100, Path(root), limits, verify))


def decode_records(dataset: str, train: np.ndarray, test: np.ndarray, labels: str, source: str) -> ImageDataset:
    """The data set whose binary files hold these records: uint8 (N, labels and 3072 pixels).

    `dataset`, `labels` as for `load_images`; labels are in range. `source` is for the reader.
    """
    if labels not in ("fine", "coarse"):
        raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
    form = BINARY_FORMS[dataset]
    parts = [_decode_binary(form, form.files[n], source, records.tobytes()) for n, records in ((0, train), (-1, test))]
    return _data_set(dataset, labels, parts[0], parts[1], source)


_Part = tuple[np.ndarray, np.ndarray]


def _data_set(dataset: str, labels: str, train: _Part, test: _Part, source: str) -> ImageDataset:
    name, column, classes = {
        ("cifar10", "fine"): ("cifar10", 0, CIFAR10_CLASSES),
        ("cifar100", "coarse"): ("cifar100-coarse", 0, CIFAR100_COARSE_CLASSES),
        ("cifar100", "fine"): ("cifar100", 1, CIFAR100_FINE_CLASSES),
    }[dataset, labels]
    train_labels, test_labels = (np.ascontiguousarray(part[1][:, column]) for part in (train, test))
    return ImageDataset(name, train[0], train_labels, test[0], test_labels, classes, source, _LICENCE)


def _read(forms: tuple[_Form, ...], root: Path, limits: tuple[int, ...], verify: bool) -> tuple[_Part, _Part, str]:
    """Training part, test part (images and a column for each kind of label) and a line about the source."""
    form, place = _locate(forms, root.expanduser())
    contents = _from_archive(form, place, verify) if place.is_file() else _from_folder(form, place, verify)
    parts: dict[str, _Part] = {}
    for file, origin, raw in contents:
        decode = _decode_pickled if form.pickled else _decode_binary
        parts[file.name] = part = decode(form, file, origin, raw)
        labels = part[1]
        for column, (kind, limit) in enumerate(zip(form.label_names, limits, strict=True)):
            wrong = np.flatnonzero((labels[:, column] < 0) | (labels[:, column] >= limit))
            if wrong.size:
                raise ValueError(
                    f"{origin}: image {wrong[0]} has {kind} {labels[wrong[0], column]}, outside 0 to {limit - 1}"
                )
    ordered = [parts[file.name] for file in form.files]
    train = (
        np.concatenate([images for images, _ in ordered[:-1]]),
        np.concatenate([labels for _, labels in ordered[:-1]]),
    )
    checked = "md5 sums verified" if verify else "not verified"
    return train, ordered[-1], f"{place} ({checked})"


def _locate(forms: tuple[_Form, ...], root: Path) -> tuple[_Form, Path]:
    wanted = ", ".join([f.folder for f in forms] + [f.archive for f in forms])
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; expected {wanted}, or a folder with one of them")
    if root.is_file():
        for form in forms:
            if root.name == form.archive:
                return form, root
        raise ValueError(f"{root} has not the name of an official archive; expected one of {wanted}")
    for form in forms:
        if (root / form.folder).is_dir():
            return form, root / form.folder
    for form in forms:
        if (root / form.archive).is_file():
            return form, root / form.archive
    for form in forms:
        if root.name == form.folder or any((root / file.name).is_file() for file in form.files):
            return form, root
    raise FileNotFoundError(f"{root} holds none of {wanted}, nor the files of one of them")


def _from_folder(form: _Form, folder: Path, verify: bool) -> Iterator[tuple[_File, str, bytes]]:
    missing = [file.name for file in form.files if not (folder / file.name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    for file in form.files:
        path = folder / file.name
        _check_size(str(path), path.stat().st_size, file, verify)
        raw = path.read_bytes()
        if verify:
            _check_md5(str(path), hashlib.md5(raw, usedforsecurity=False).hexdigest(), file.md5)
        yield file, str(path), raw


def _from_archive(form: _Form, path: Path, verify: bool) -> Iterator[tuple[_File, str, bytes]]:
    wanted = {f"{form.folder}/{file.name}": file for file in form.files}
    with path.open("rb") as stream:
        if verify:
            _check_md5(str(path), _md5_of(stream), form.archive_md5)
            stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:gz") as archive:
                for member in archive:
                    file = wanted.pop(posixpath.normpath(member.name), None)
                    if file is None:
                        continue
                    origin = f"{path}: {member.name}"
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise ValueError(f"{origin} is no regular file")
                    _check_size(origin, member.size, file, verify)
                    raw = content.read()
                    if len(raw) != member.size:
                        raise ValueError(f"{origin} is truncated: {member.size} bytes expected, got {len(raw)}")
                    yield file, origin, raw
                    if not wanted:
                        return
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            size = path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is damaged or truncated ({type(error).__name__}: {error})"
            ) from error
    raise FileNotFoundError(f"{path} lacks {', '.join(wanted)}")


def _check_size(origin: str, size: int, file: _File, verify: bool) -> None:
    if verify and file.size is not None and size != file.size:
        raise ValueError(
            f"{origin} has {size} bytes, the official file has {file.size}: it is truncated, damaged or "
            "another file. Pass verify=False if you know that the data are different"
        )
    if size > _MAX_BYTES:
        raise ValueError(f"{origin} has {size} bytes, more than the {_MAX_BYTES} that are read at most")


def _check_md5(origin: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ValueError(
            f"{origin} has the md5 sum {actual}, the official file has {expected}: it is damaged or another "
            "file. Pass verify=False if you know that the data are different"
        )


def _md5_of(stream: BinaryIO) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _decode_binary(form: _Form, file: _File, origin: str, raw: bytes) -> _Part:
    record = len(form.label_names) + _PIXELS
    count, rest = divmod(len(raw), record)
    if rest or not count:
        raise ValueError(
            f"{origin} has {len(raw)} bytes, expected a multiple of {record} "
            f"({file.size} in the official file): it is truncated or no binary file of this data set"
        )
    records = np.frombuffer(raw, dtype=np.uint8).reshape(count, record)
    labels, pixels = np.split(records, [len(form.label_names)], axis=1)
    return np.ascontiguousarray(pixels).reshape(count, 3, 32, 32), labels.astype(np.int64)


def _decode_pickled(form: _Form, file: _File, origin: str, raw: bytes) -> _Part:
    try:
        content = load_plain(raw)
    except ValueError as error:
        raise ValueError(f"{origin} ({len(raw)} bytes): {error}") from error
    pixels = content.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        found = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{origin}: 'data' must be a uint8 array of shape (N, {_PIXELS}) with N >= 1, got {found}")
    labels = np.empty((len(pixels), len(form.label_names)), dtype=np.int64)
    for column, kind in enumerate(form.label_names):
        values = content.get(kind)
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ValueError(f"{origin}: {kind!r} must be a list of integers")
        if len(values) != len(pixels):
            raise ValueError(f"{origin}: {len(pixels)} images and {len(values)} {kind}")
        # Out of the range of any label set, and of int64 perhaps: report it as the label it is.
        if values and not 0 <= min(values) <= max(values) < 2**31:
            raise ValueError(f"{origin}: {kind} range from {min(values)} to {max(values)}")
        labels[:, column] = values
    # A copy: the decoded array is read-only, and a part of the pickle.
    return np.array(pixels, order="C").reshape(len(pixels), 3, 32, 32), labels
