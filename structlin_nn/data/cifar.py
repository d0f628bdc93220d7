"""CIFAR-10 and CIFAR-100 from their official files, as archives or unpacked, and from Hugging Face `datasets`.

Kept by hand, because torchvision reads only the python version, which it unpacks to disk and unpickles without any
restriction, and needs torch where flax needs none. Here archives are read in memory, and a pickle is decoded only
after its md5 sum was found to be the published one, by a reader that knows the names of NumPy's arrays alone.

Source: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import posixpath
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from structlin_nn._files import sync_folder
from structlin_nn.data.images import ImageDataset

__all__ = ["HUB", "URL", "download_cifar", "load_cifar"]

URL = "https://www.cs.toronto.edu/~kriz/"
HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_LICENCE = (
    "no licence is stated by the authors; they ask to cite: A. Krizhevsky, Learning Multiple Layers of "
    "Features from Tiny Images, 2009"
)
_CLASSES = {
    "label": "airplane automobile bird cat deer dog frog horse ship truck",
    "fine_label": """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
    maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm""",
    "coarse_label": """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2""",
}
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 256 * 2**20  # above any official file (185 MB); a hostile archive cannot fill the memory


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
_BATCH = {"cifar10": 10_000, "cifar100": 50_000}  # training images of a binary file
_TEST = 10_000


def load_cifar(name: str, root: str | os.PathLike[str], *, labels: str = "fine", verify: bool = True) -> ImageDataset:
    """Load CIFAR-10 or CIFAR-100.

    Args:
        name: ``cifar10`` or ``cifar100``.
        root: an official archive (.tar.gz, of the binary or the python version) or the folder of its files, or a
            folder that holds one of these; there, folders come before archives and binary before python. Or, of
            Hugging Face `datasets`, ``hf:NAME`` or a folder that ``save_to_disk`` wrote.
        labels: ``"fine"`` (100 classes) or ``"coarse"`` (20 classes), of CIFAR-100.
        verify: compare with the published md5 sums. With False, binary files with other content or another number
            of images are read too; pickles are not.

    Raises:
        FileNotFoundError: nothing of the data set at ``root``, or one of its files is missing.
        ImportError: Hugging Face data without `datasets` installed.
        ValueError: unknown labels, or a file that is truncated, damaged, or not the official one.

    Example:
        >>> load_cifar("cifar10", "/nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: /nowhere does not exist; expected cifar-10-batches-bin, cifar-10-binary.tar.gz, ...
    """
    if labels not in ("fine", "coarse"):
        raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
    kinds = _KINDS[name]
    hub = os.fspath(root).removeprefix("hf:")
    saved = (Path(hub).expanduser() / "dataset_dict.json").is_file()
    train, test, source = (_hub if saved or hub != os.fspath(root) else _files)(name, hub, verify)
    kind = kinds[-1] if labels == "fine" else kinds[0]
    for records, what in ((train, "training"), (test, "test")):
        for column, known in enumerate(kinds):
            limit = len(_CLASSES[known].split())
            if (wrong := np.flatnonzero(records[:, column] >= limit)).size:
                found = records[wrong[0], column]
                raise ValueError(f"{source}: {what} image {wrong[0]} has {known} {found}, outside 0 to {limit - 1}")
    (images, train_labels), (test_images, test_labels) = (
        (
            np.ascontiguousarray(records[:, len(kinds) :]).reshape(-1, 3, 32, 32),
            records[:, kinds.index(kind)].astype(np.int64),
        )
        for records in (train, test)
    )
    title = "cifar100-coarse" if kind == "coarse_label" else name
    done = f"{source} ({'md5 sums verified' if verify else 'not verified'})"
    return ImageDataset(
        title, images, train_labels, test_images, test_labels, tuple(_CLASSES[kind].split()), done, _LICENCE
    )


def _files(name: str, root: str, verify: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """Training and test records as the binary files have them (uint8: labels, then pixels), and their source."""
    form, place = _locate(_FORMS[name], Path(root).expanduser())
    if form.pickled and not verify:
        raise ValueError(f"{place} holds pickles, which are read only with verify=True: use the binary version")
    contents = _archive(form, place, verify) if place.is_file() else _folder(form, place)
    record = len(form.kinds) + _PIXELS
    parts = []
    for file, md5 in form.files.items():
        raw, origin = contents[file], f"{place}: {file}" if place.is_file() else str(place / file)
        if verify:
            _check_md5(origin, raw, md5)
        if form.pickled:
            parts.append(_unpickled(raw, form, origin))
            continue
        if not raw or len(raw) % record:
            raise ValueError(
                f"{origin} has {len(raw)} bytes, not a multiple of {record}: it is truncated or another file"
            )
        parts.append(np.frombuffer(raw, dtype=np.uint8).reshape(-1, record))
    return np.concatenate(parts[:-1]), parts[-1], str(place)


def _locate(forms: tuple[_Form, ...], root: Path) -> tuple[_Form, Path]:
    wanted = ", ".join(name for form in forms for name in (form.folder, form.archive))
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; expected {wanted}, or a folder with one of them")
    if root.is_file():
        for form in forms:
            if root.name == form.archive:
                return form, root
        raise ValueError(f"{root} does not have the name of an official archive; expected one of {wanted}")
    places = [(form, root / form.folder) for form in forms if (root / form.folder).is_dir()]
    places += [(form, root / form.archive) for form in forms if (root / form.archive).is_file()]
    places += [(form, root) for form in forms if any((root / file).is_file() for file in form.files)]
    if not places:
        raise FileNotFoundError(f"{root} holds none of {wanted}, nor the files of one of them")
    return places[0]


def _folder(form: _Form, folder: Path) -> dict[str, bytes]:
    if missing := [file for file in form.files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    for file in form.files:
        _check_size(f"{folder / file}", (folder / file).stat().st_size)
    return {file: (folder / file).read_bytes() for file in form.files}


def _archive(form: _Form, path: Path, verify: bool) -> dict[str, bytes]:
    """The wanted members. The whole archive is read, so that gzip compares its own checksum in any case."""
    if verify:
        with path.open("rb") as stream:
            _check_md5(str(path), stream, form.md5)
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                folder, _, file = posixpath.normpath(member.name).partition("/")
                if folder != form.folder or file not in form.files:
                    continue
                _check_size(f"{path}: {member.name}", member.size)
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise ValueError(f"{path}: {member.name} is not a regular file")
                found[file] = content.read()
            while unpacked.read(2**20):  # to the end, where gzip compares its sum; tarfile stops before
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is damaged or truncated ({what})") from error
    if missing := form.files.keys() - found.keys():
        raise FileNotFoundError(f"{path} lacks {', '.join(sorted(missing))}")
    return found


def _check_size(origin: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise ValueError(f"{origin} has {size} bytes, more than the {_MAX_BYTES} that are read at most")


def _check_md5(origin: str, content: bytes | io.BufferedReader, expected: str) -> None:
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    actual = hashlib.file_digest(stream, "md5").hexdigest()
    if actual != expected:
        raise ValueError(
            f"{origin} ({stream.seek(0, os.SEEK_END)} bytes) has the md5 sum {actual}, the official one is {expected}: "
            "it is truncated, damaged or another file. Pass verify=False if you know that the data are different"
        )


class _Unpickler(pickle.Unpickler):
    """Knows what NumPy writes for an array, and no other name. For content whose sum was checked before."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"the pickle asks for {module}.{name}, which no image file needs; it was not loaded")


def _unpickled(raw: bytes, form: _Form, origin: str) -> np.ndarray:
    content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    columns = [np.array(content[f"{kind}s"], dtype=np.uint8)[:, None] for kind in form.kinds]
    pixels = content["data"]
    if pixels.dtype != np.uint8 or pixels.shape != (len(columns[0]), _PIXELS):
        raise ValueError(f"{origin}: uint8 (N, {_PIXELS}) expected, got {pixels.dtype} of shape {pixels.shape}")
    return np.hstack([*columns, pixels])


def _hub(name: str, source: str, verify: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """As `_files`, from Hugging Face `datasets`, whose records have the sums of the official files."""
    from structlin_nn.data.hub import load_hub  # an optional library

    sums = list(_FORMS[name][0].files.values())
    found = []
    for split, expected, size in (("train", sums[:-1], _BATCH[name]), ("test", sums[-1:], _TEST)):
        rows = load_hub(source, split=split)
        columns = ("img", *_KINDS[name])
        if missing := set(columns) - set(rows.column_names):
            raise ValueError(f"{source} has the columns {', '.join(rows.column_names)}, not {min(missing)!r}")
        table = rows.with_format("numpy")[:]
        pixels = np.stack(list(table["img"]))
        if pixels.shape[1:] != (32, 32, 3):
            raise ValueError(f"{source}/{split} has images of shape {pixels.shape[1:]}, not (32, 32, 3)")
        for kind in _KINDS[name]:
            if (wrong := table[kind][(table[kind] < 0) | (table[kind] > 255)]).size:
                raise ValueError(f"{source}/{split} has the {kind} {wrong[0]}")
        labels = [table[kind].astype(np.uint8)[:, None] for kind in _KINDS[name]]
        records = np.hstack([*labels, pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)])
        if verify:
            # The hub has the files in the order of an archive.
            parts = [records[first : first + size] for first in range(0, len(records), size)]
            pieces = {hashlib.md5(part.tobytes(), usedforsecurity=False).hexdigest(): part for part in parts}
            if sorted(pieces) != sorted(expected):
                raise ValueError(
                    f"{source}/{split} with {len(records)} images is not official: a part has another md5 sum. Pass "
                    "verify=False if you know that the data are different"
                )
            records = np.concatenate([pieces[md5] for md5 in expected])
        found.append(records)
    return found[0], found[1], f"{source} by Hugging Face datasets"


def download_cifar(name: str, folder: str | os.PathLike[str], *, url: str = URL, progress: bool = True) -> Path:
    """Download the official binary archive (``torch.hub``) and verify it by its md5 sum.

    Args:
        name: ``cifar10`` or ``cifar100``.
        folder: where to; the file appears as a whole or not at all. One that is there is verified instead.
        url: folder of the archive.
        progress: show a progress bar.

    Returns:
        The path of the archive, which `structlin_nn.data.load_images` reads.

    Raises:
        ValueError: a file (downloaded or there) that is not the official one.
        ConnectionError: no network, or an error of the server; the message says how to get the file otherwise.
    """
    import urllib.error

    from torch.hub import download_url_to_file  # reading CIFAR needs no torch

    form = _FORMS[name][0]
    path = Path(folder).expanduser() / form.archive
    if path.exists():
        with path.open("rb") as file:
            _check_md5(str(path), file, form.md5)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    address = url.rstrip("/") + "/" + form.archive
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as place:
        unverified = Path(place, form.archive)
        try:
            download_url_to_file(address, str(unverified), progress=progress)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ConnectionError(
                f"{address} cannot be downloaded ({error}). Put the file into {path.parent} by other means: it is "
                "read, and verified, from there"
            ) from error
        with unverified.open("rb") as file:
            _check_md5(address, file, form.md5)
            os.fsync(file.fileno())
        unverified.replace(path)
    sync_folder(path.parent)
    return path
