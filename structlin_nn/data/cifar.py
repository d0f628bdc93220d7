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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structlin_nn.data.images import ImageDataset

__all__ = ["load_cifar"]

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


def load_cifar(name: str, root: str | os.PathLike[str], *, verify: bool = True) -> ImageDataset:
    """Load CIFAR-10, or CIFAR-100 with its 100 fine labels.

    Parameters
    ----------
    name
        ``cifar10`` or ``cifar100``.
    root
        The folder of the official files (binary or python version), or a folder that holds that folder; there, binary
        comes before python.
    verify
        Compare with the published md5 sums. With False, binary files with other content or another number of images are
        read too; pickles are not.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing, truncated, damaged, or not the official one.

    Examples
    --------
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
