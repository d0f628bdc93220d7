"""The script that made the embedded data, on the real files where they are given."""

import hashlib
import os
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest

from structlin_nn.data import images

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "make_embedded.py"
SCRIPT = runpy.run_path(str(FILE))
SOURCES, build, read_idx, select = (SCRIPT[name] for name in ("SOURCES", "build", "read_idx", "select"))


def test_idx():
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    np.testing.assert_array_equal(read_idx(raw), array)
    for damaged in (b"", b"\0\0\x0d\x01\0\0\0\x01\0", b"\x89PNG" + raw, raw[:-1]):
        with pytest.raises(ValueError, match=r"idx file|reshape"):
            read_idx(damaged)


def test_selection_is_by_sha256():
    labels = np.arange(60) % 3
    chosen = select(labels, 4, split="train", seed=5)
    for label in range(3):
        members = np.flatnonzero(labels == label)
        best = sorted(members, key=lambda index: hashlib.sha256(f"5:train:{index}".encode()).hexdigest())[:4]
        assert sorted(best) == [index for index in chosen if labels[index] == label]
    assert (np.diff(chosen) > 0).all()


def test_another_file_is_refused(tmp_path):
    import gzip

    for name in SOURCES:
        (tmp_path / name).write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="unpacked, has the sha256 sum"):
        build(tmp_path, tmp_path / "out.npz")


def test_the_real_files_give_the_embedded_data(tmp_path):
    source = Path(os.environ.get("STRUCTLIN_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not source.is_dir():
        pytest.skip(f"{source} is missing (Debian package dataset-fashion-mnist)")
    assert build(source, tmp_path / "out.npz") == images._FASHION_SHA256
