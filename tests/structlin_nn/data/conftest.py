"""Synthetic CIFAR files in all their official forms."""

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class Layout:
    """One official form, and the synthetic content its files get."""

    dataset: str
    folder: str
    archive: str
    files: dict[str, bytes]
    train_images: np.ndarray
    train_labels: dict[str, np.ndarray]
    test_images: np.ndarray
    test_labels: dict[str, np.ndarray]

    def write_folder(self, parent: Path) -> Path:
        folder = parent / self.folder
        folder.mkdir(parents=True)
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)
        return folder

    def write_archive(self, parent: Path, *, prefix: str = "") -> Path:
        """Members in another order than needed, beside others of no interest."""
        path = parent / self.archive
        with tarfile.open(path, "w:gz") as archive:
            for name, raw in [("readme.html", b"<html>"), *reversed(self.files.items())]:
                member = tarfile.TarInfo(f"{prefix}{self.folder}/{name}")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
        return path


def as_python2_pickle(content: dict[str, object]) -> bytes:
    """Pickle as Python 2 did for the official files: protocol 2, all text and bytes as 8-bit strings."""

    def string(raw: bytes) -> bytes:
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    out = b"\x80\x02}("
    for key, value in content.items():
        out += string(key.encode())
        if isinstance(value, np.ndarray):
            shape = b"(" + b"".join(integer(n) for n in value.shape) + b"t"
            dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR("
            dtype += integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
            out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
            out += string(b"b") + b"tR(" + integer(1) + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"
        elif isinstance(value, list):
            out += b"](" + b"".join(integer(n) if type(n) is int else string(n) for n in value) + b"e"
        else:
            assert isinstance(value, str)
            out += string(value.encode())
    return out + b"u."


def _pickle_of(protocol: int | str, content: dict[str, object]) -> bytes:
    if protocol == "python2":
        return as_python2_pickle(content)
    assert isinstance(protocol, int)
    return pickle.dumps(content, protocol=protocol)


def make_layout(dataset: str, form: str, protocol: int | str = "python2", images: int = 3) -> Layout:
    """Random images and labels in the files of an official form; file k holds `images` + k images."""
    rng = np.random.default_rng([len(dataset), images])
    limits = {"labels": 10} if dataset == "cifar10" else {"coarse_labels": 20, "fine_labels": 100}
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"] if dataset == "cifar10" else ["train", "test"]
    files, pixels, labels = {}, [], []
    for k, name in enumerate(names):
        part = rng.integers(0, 256, (images + k, 3, 32, 32), dtype=np.uint8)
        kinds = {kind: rng.integers(0, limit, images + k) for kind, limit in limits.items()}
        pixels.append(part)
        labels.append(kinds)
        flat = part.reshape(len(part), -1)
        if form == "binary":
            columns = [kinds[kind].astype(np.uint8)[:, None] for kind in limits]
            files[f"{name}.bin"] = np.hstack([*columns, flat]).tobytes()
        else:
            content: dict[str, object] = {"batch_label": name, "data": flat}
            content |= {kind: values.tolist() for kind, values in kinds.items()}
            content["filenames"] = [f"image_{i}.png".encode() for i in range(len(part))]
            files[name] = _pickle_of(protocol, content)
    folder, archive = {
        ("cifar10", "binary"): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        ("cifar10", "python"): ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("cifar100", "binary"): ("cifar-100-binary", "cifar-100-binary.tar.gz"),
        ("cifar100", "python"): ("cifar-100-python", "cifar-100-python.tar.gz"),
    }[dataset, form]
    return Layout(
        dataset,
        folder,
        archive,
        files,
        np.concatenate(pixels[:-1]),
        {kind: np.concatenate([kinds[kind] for kinds in labels[:-1]]) for kind in limits},
        pixels[-1],
        labels[-1],
    )


@pytest.fixture(scope="session")
def layouts() -> Callable[..., Layout]:
    return make_layout


@pytest.fixture(scope="session")
def python2_pickle() -> Callable[[dict[str, object]], bytes]:
    return as_python2_pickle
