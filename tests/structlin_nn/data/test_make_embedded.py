"""The script that makes the embedded data, on small files and on the real ones where given."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from structlin_nn.data import embedded, make_embedded
from structlin_nn.data.make_embedded import build, main, read_idx, select


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def source(tmp_path):
    """Four small files; three classes, 20 and 10 images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    arrays = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = (np.arange(count) % 3).astype(np.uint8)
    for name, array in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx(array)))
    return folder, arrays


def test_idx():
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(read_idx(idx(array)), array)
    for raw in (b"", b"\0\0\x08", b"\0\0\x08\0", b"\0\0\x0d\x01\0\0\0\x01\0", b"\x89PNG" + idx(array)):
        with pytest.raises(ValueError, match="no idx file"):
            read_idx(raw)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) must hold 24 values, got 23"):
        read_idx(idx(array)[:-1])
    with pytest.raises(ValueError, match="got 25"):
        read_idx(idx(array) + b"\0")


def test_selection_is_balanced_and_follows_its_rule():
    labels = np.random.default_rng(0).integers(0, 4, 400)
    chosen = select(labels, 30, split="train")
    assert np.bincount(labels[chosen]).tolist() == [30] * 4
    assert (np.diff(chosen) > 0).all()
    for label in range(4):
        members = np.flatnonzero(labels == label)
        ranked = sorted((hashlib.sha256(b"0:train:%d" % i).hexdigest(), i) for i in members)
        assert set(chosen[labels[chosen] == label]) == {i for _, i in ranked[:30]}
    assert not np.array_equal(chosen, select(labels, 30, split="test"))
    assert not np.array_equal(chosen, select(labels, 30, split="train", seed=1))
    with pytest.raises(ValueError, match=r"class 0 of train has \d+ samples, 200 are asked for"):
        select(labels, 200, split="train")


def test_build_takes_images_and_labels_from_the_same_places(tmp_path, source):
    folder, arrays = source
    out = tmp_path / "out.npz"
    digest = build(folder, out, verify=False, per_class=(4, 2))
    assert digest == hashlib.sha256(out.read_bytes()).hexdigest()
    with np.load(out, allow_pickle=False) as made:
        for split, prefix, count in (("train", "train", 12), ("test", "t10k", 6)):
            chosen = made[f"{split}_indices"]
            assert chosen.shape == (count,)
            for kind, stem in (("images", "images-idx3"), ("labels", "labels-idx1")):
                expected = arrays[f"{prefix}-{stem}-ubyte.gz"][chosen]
                np.testing.assert_array_equal(made[f"{split}_{kind}"], expected)
                assert made[f"{split}_{kind}"].dtype == np.uint8
    assert build(folder, tmp_path / "again.npz", verify=False, per_class=(4, 2)) == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "out.npz", "source"]


def test_an_interrupted_build_leaves_the_old_file(tmp_path, source, monkeypatch):
    folder, _ = source
    out = tmp_path / "out.npz"
    out.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(make_embedded.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build(folder, out, verify=False, per_class=(1, 1))
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "source"]


def test_damaged_sources(tmp_path, source):
    folder, _ = source
    out = tmp_path / "out.npz"
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz, unpacked, has the sha256 sum"):
        build(folder, out)
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    raw = labels.read_bytes()
    labels.write_bytes(raw[:-9])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is damaged or truncated"):
        build(folder, out, verify=False)
    labels.write_bytes(gzip.compress(b"no idx"))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: no idx file"):
        build(folder, out, verify=False)
    labels.write_bytes(gzip.compress(idx(np.zeros(9, np.uint8))))
    with pytest.raises(ValueError, match=r"test: images of shape \(10, 6, 5\) and labels of shape \(9,\)"):
        build(folder, out, verify=False, per_class=(1, 1))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        build(folder, out, verify=False)
    assert not out.exists()


def test_command_line_reports_misuse(tmp_path, source, capsys):
    folder, _ = source
    assert main([str(tmp_path), str(tmp_path / "out.npz")]) == 2
    assert "train-images-idx3-ubyte.gz is missing" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out.npz")]) == 2
    assert "sha256" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


@pytest.mark.skipif(
    not os.environ.get("STRUCTLIN_FASHION_MNIST"), reason="STRUCTLIN_FASHION_MNIST gives no idx.gz files"
)
def test_the_embedded_file_is_made_again(tmp_path, capsys):
    out = tmp_path / "made.npz"
    assert main([os.environ["STRUCTLIN_FASHION_MNIST"], str(out)]) == 0
    assert str(out.stat().st_size) in capsys.readouterr().out
    shipped = Path(str(embedded.files("structlin_nn.data") / embedded.FILE))
    with np.load(out, allow_pickle=False) as made, np.load(shipped, allow_pickle=False) as kept:
        assert sorted(made) == sorted(kept)
        for name in made:
            np.testing.assert_array_equal(made[name], kept[name])
