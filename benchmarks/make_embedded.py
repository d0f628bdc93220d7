"""Make the embedded subset of Fashion-MNIST from its standard files.

    python benchmarks/make_embedded.py SRC_FOLDER OUT_FILE

SRC_FOLDER contains the four idx.gz files of https://github.com/zalandoresearch/fashion-mnist or of the Debian package
``dataset-fashion-mnist``. The content of the result is always the same; its bytes are the same for the same version of
zlib.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np

from structlin_nn._files import atomic_write

__all__ = ["build", "read_idx", "select"]

PER_CLASS = {"train": 1000, "test": 200}

# sha256 sums of the unpacked files: distributions compress them differently.
SOURCES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(raw: bytes) -> np.ndarray:
    """Decode an idx file of bytes: two zeros, type 8, number of axes, each axis (big-endian 32 bits), the values.

    Raises
    ------
    ValueError
        If the type is another one, or the size differs from that in the header.

    Examples
    --------
    >>> read_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
    [[7, 8, 9]]
    """
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"not an idx file of bytes: it starts with {raw[:4]!r}")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def select(labels: np.ndarray, per_class: int, *, split: str, seed: int = 0) -> np.ndarray:
    """Choose equally many samples of every class, by a rule that no library release can change.

    Of each class, those `per_class` samples are chosen whose text ``"seed:split:index"`` has the smallest sha256 sums.

    Returns
    -------
    np.ndarray
        The chosen positions in ascending order, int64 (classes * per_class,).

    Examples
    --------
    >>> select(np.array([0, 1, 0, 1, 0, 1]), 2, split="train").tolist()
    [0, 1, 4, 5]
    """
    sums = [hashlib.sha256(f"{seed}:{split}:{index}".encode()).digest() for index in range(len(labels))]
    members = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return np.sort([index for each in members for index in sorted(each, key=sums.__getitem__)[:per_class]])


def build(source: Path, out: Path) -> str:
    """Write the subset of the Fashion-MNIST files in a folder to an .npz file, and return its sha256 sum.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is not the published one.
    """
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (
            _read(source / name) for name in SOURCES if name.startswith(prefix)
        )  # in the order of SOURCES
        chosen = select(labels, PER_CLASS[split], split=split)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
        arrays[f"{split}_indices"] = chosen.astype(np.uint16)
    buffer = io.BytesIO()
    # Fixed dates and system, so that equal content gives equal bytes.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_system = 3
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    with atomic_write(out) as file:
        file.write(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def _read(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    if (actual := hashlib.sha256(raw).hexdigest()) != SOURCES[path.name]:
        raise ValueError(f"{path}, unpacked, has the sha256 sum {actual}, the published file has {SOURCES[path.name]}")
    return read_idx(raw)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
