"""CIFAR-10 and CIFAR-100 from the folders of their official files, binary or python version.

Kept by hand, because torchvision reads only the python version, which it unpickles without any restriction, and needs
torch where flax needs none. Here a pickle is decoded only after its md5 sum was found to be the published one, by a
reader that knows the names of NumPy's arrays alone.

Source: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structlin_nn.data.images import ImageDataset

__all__ = ["URL", "download_cifar", "load_cifar"]

URL = "https://www.cs.toronto.edu/~kriz/"
_LICENCE = (
    "no licence is stated by the authors; they ask to cite: A. Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009"
)
_CLASSES = {"label": 10, "coarse_label": 20, "fine_label": 100}
_PIXELS = 3 * 32 * 32


class _Form(NamedTuple):
    """An official form of a data set; the last of its files holds the test images."""

    folder: str
    archive: str
    md5: str
    kinds: tuple[str, ...]
    files: dict[str, str]

    @property
    def pickled(self) -> bool:
        return "python" in self.archive


_KINDS = {"cifar10": ("label",), "cifar100": ("coarse_label", "fine_label")}
_FORMS = {
    "cifar10": (
        _Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _KINDS["cifar10"], {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        }),
        _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", _KINDS["cifar10"], {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        }),
    ),
    "cifar100": (
        _Form("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", _KINDS["cifar100"], {
            "train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898",
        }),
        _Form("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", _KINDS["cifar100"], {
            "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        }),
    ),
}  # fmt: skip


def load_cifar(name: str, root: str | os.PathLike[str], *, verify: bool = True) -> ImageDataset:
    """Load CIFAR-10, or CIFAR-100 with its 100 fine labels.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: the folder of the official files (binary or python version), or a folder that holds that folder; there,
            binary comes before python.
        verify: compare with the published md5 sums. With False, binary files with other content or another number
            of images are read too; pickles are not.

    Raises:
        FileNotFoundError: nothing of the data set at ``root``, or one of its files is missing.
        ValueError: a file that is truncated, damaged, or not the official one.

    Example:
        >>> load_cifar("cifar10", "/nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: /nowhere does not exist; expected cifar-10-batches-bin, cifar-10-batches-py, ...
    """
    form, folder = _locate(_FORMS[name], Path(root).expanduser())
    if form.pickled and not verify:
        raise ValueError(f"{folder} holds pickles, which are read only with verify=True: use the binary version")
    if missing := [file for file in form.files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    parts = [_records(form, folder / file, md5 if verify else None) for file, md5 in form.files.items()]
    split = []
    for records, what in ((np.concatenate(parts[:-1]), "training"), (parts[-1], "test")):
        for column, kind in enumerate(form.kinds):
            if (wrong := np.flatnonzero(records[:, column] >= _CLASSES[kind])).size:
                found, last = records[wrong[0], column], _CLASSES[kind] - 1
                raise ValueError(f"{folder}: {what} image {wrong[0]} has {kind} {found}, outside 0 to {last}")
        pixels = np.ascontiguousarray(records[:, len(form.kinds) :]).reshape(-1, 3, 32, 32)
        split += [pixels, records[:, len(form.kinds) - 1].astype(np.int64)]
    classes = tuple(map(str, range(_CLASSES[form.kinds[-1]])))
    done = f"{folder} ({'md5 sums verified' if verify else 'not verified'})"
    return ImageDataset(name, *split, classes, done, _LICENCE)


def _records(form: _Form, path: Path, md5: str | None) -> np.ndarray:
    """The records of a file as the binary version has them: uint8, labels, then pixels."""
    raw, record = path.read_bytes(), len(form.kinds) + _PIXELS
    if md5 is not None:
        _check_md5(str(path), raw, md5)
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


def _check_md5(origin: str, content: bytes, expected: str) -> None:
    if (actual := hashlib.md5(content, usedforsecurity=False).hexdigest()) != expected:
        raise ValueError(
            f"{origin} ({len(content)} bytes) has the md5 sum {actual}, the official one is {expected}: it is "
            "truncated, damaged or another file. Pass verify=False if you know that the data are different"
        )


class _Unpickler(pickle.Unpickler):
    """Knows what NumPy writes for an array, and no other name. For content whose sum was checked before."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"the pickle asks for {module}.{name}, which no image file needs; it was not loaded")


def download_cifar(name: str, folder: str | os.PathLike[str], *, url: str = URL, progress: bool = True) -> Path:
    """Download the official archive of the binary version (``torch.hub``), verify its md5 sum, and unpack it.

    Args:
        name: ``cifar10`` or ``cifar100``.
        folder: where to; files that are there are verified instead.
        url: folder of the archive.
        progress: show a progress bar.

    Returns:
        The folder of the files, which appears as a whole or not at all.

    Raises:
        ValueError: a file (downloaded or there) that is not the official one.
        ConnectionError: no network, or an error of the server; the message says how to get the file otherwise.
    """
    import urllib.error

    from torch.hub import download_url_to_file  # reading CIFAR needs no torch

    form, parent = _FORMS[name][0], Path(folder).expanduser()
    target = parent / form.folder
    if target.exists():
        load_cifar(name, target)
        return target
    parent.mkdir(parents=True, exist_ok=True)
    address = url.rstrip("/") + "/" + form.archive
    with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as place:
        archive = Path(place, form.archive)
        try:
            download_url_to_file(address, str(archive), progress=progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ConnectionError(
                f"{address} cannot be downloaded ({error}). Unpack the archive in {parent} by other means: its files "
                "are verified when they are read"
            ) from error
        _check_md5(address, archive.read_bytes(), form.md5)
        with tarfile.open(archive) as opened:
            opened.extractall(place, filter="data")
        Path(place, form.folder).rename(target)
    return target
