"""Make the embedded subset of Fashion-MNIST from its standard files.

    python -m structlin_nn.data.make_embedded SRC_FOLDER OUT_FILE

SRC_FOLDER holds the four idx.gz files, as from https://github.com/zalandoresearch/fashion-mnist or from the
Debian package ``dataset-fashion-mnist``. The result is the same to the byte wherever zlib compresses alike,
and the same in content everywhere.
"""

import argparse
import gzip
import hashlib
import io
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["build", "main", "read_idx", "select"]

SEED = 0
TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200

# sha256 sums of the unpacked files: distributions compress them differently.
_SOURCES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(raw: bytes) -> np.ndarray:
    """Decode an unpacked idx file of bytes (the format of MNIST).

    Args:
        raw: the file: two zero bytes, the type (8: uint8), the number of axes, each axis as a big-endian
            32-bit integer, the values in row-major order.

    Returns:
        Read-only uint8 array of the shape that the header states.

    Raises:
        ValueError: another type, or a size that differs from the header's.

    Example:
        >>> read_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
        [[7, 8, 9]]
    """
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0 or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"no idx file of bytes: it starts with {raw[:4]!r}")
    axes = raw[3]
    shape = struct.unpack_from(f">{axes}I", raw, 4)
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * axes)
    expected = int(np.prod(shape, dtype=object))
    if values.size != expected:
        raise ValueError(f"an idx file of shape {shape} must hold {expected} values, got {values.size}")
    return values.reshape(shape)


def select(labels: np.ndarray, per_class: int, *, split: str, seed: int = SEED) -> np.ndarray:
    """Choose equally many samples of every class, by a rule that no library release can change.

    Of each class, those `per_class` samples are chosen whose text ``"seed:split:index"`` has the smallest
    sha256 sums.

    Args:
        labels: integer array (N,).
        per_class: samples to choose of each class.
        split: name of the split, so that splits are independent.
        seed: seed of the choice.

    Returns:
        The chosen positions in ascending order, int64, shape (classes * per_class,).

    Raises:
        ValueError: a class with fewer samples than asked for.

    Example:
        >>> import numpy as np
        >>> select(np.array([0, 1, 0, 1, 0, 1]), 2, split="train").tolist()
        [0, 1, 4, 5]
    """
    sums = [hashlib.sha256(f"{seed}:{split}:{index}".encode()).digest() for index in range(len(labels))]
    chosen: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        if len(members) < per_class:
            raise ValueError(f"class {label} of {split} has {len(members)} samples, {per_class} are asked for")
        chosen += sorted(members, key=sums.__getitem__)[:per_class]
    return np.array(sorted(chosen), dtype=np.int64)


def build(source: Path, out: Path, *, verify: bool = True, per_class: tuple[int, int] | None = None) -> str:
    """Write the subset of the Fashion-MNIST files in a folder to an .npz file.

    Args:
        source: folder with the four idx.gz files.
        out: file to write; it is replaced as a whole or not at all.
        verify: compare the unpacked files with the published ones.
        per_class: training and test images of each class, by default (1000, 200).

    Returns:
        The sha256 sum of the file written. It holds the uint8 arrays ``train_images`` (N, 28, 28),
        ``train_labels`` (N,), ``test_images`` and ``test_labels``, and the positions in the original
        files, ``train_indices`` and ``test_indices``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or (``verify=True``) not the published one, or has too few images.
    """
    unpacked = {name: _unpack(source / name, expected if verify else None) for name, expected in _SOURCES.items()}
    arrays: dict[str, np.ndarray] = {}
    counts = per_class or (TRAIN_PER_CLASS, TEST_PER_CLASS)
    for (split, prefix), count in zip((("train", "train"), ("test", "t10k")), counts, strict=True):
        images = unpacked[f"{prefix}-images-idx3-ubyte.gz"]
        labels = unpacked[f"{prefix}-labels-idx1-ubyte.gz"]
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(f"{split}: images of shape {images.shape} and labels of shape {labels.shape}")
        chosen = select(labels, count, split=split)
        arrays[f"{split}_images"] = images[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
        arrays[f"{split}_indices"] = chosen.astype(np.uint16 if len(labels) <= 2**16 else np.uint32)
    raw = _npz(arrays)
    _write_atomically(out, raw)
    return hashlib.sha256(raw).hexdigest()


def _unpack(path: Path, expected: str | None) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the four files are {', '.join(_SOURCES)}")
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated ({error})") from error
    actual = hashlib.sha256(raw).hexdigest()
    if expected is not None and actual != expected:
        raise ValueError(f"{path}, unpacked, has the sha256 sum {actual}, the published file has {expected}")
    try:
        return read_idx(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz file with fixed dates and system, so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_system = 3
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _write_atomically(path: Path, raw: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the file and print its size and sha256 sum; 2 on a missing or damaged source."""
    parser = argparse.ArgumentParser(
        prog="python -m structlin_nn.data.make_embedded", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("source", type=Path, help="folder with the four idx.gz files")
    parser.add_argument("out", type=Path, help=".npz file to write")
    parsed = parser.parse_args(arguments)
    try:
        digest = build(parsed.source, parsed.out)
    except (OSError, ValueError) as error:
        print(f"make_embedded: {error}", file=sys.stderr)
        return 2
    print(f"{parsed.out}: {parsed.out.stat().st_size} bytes, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
