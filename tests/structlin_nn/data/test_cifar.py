"""CIFAR from every official form, damaged and hostile files."""

import io
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structlin_nn.data import ImageDataset, images, load_images

FORMS = [(name, number) for name in ("cifar10", "cifar100") for number in (0, 1)]


def check(data: ImageDataset, layout: Any, kind: str) -> None:
    test = len(data.test_labels)
    np.testing.assert_array_equal(np.concatenate([data.train_images, data.test_images]), layout.images)
    np.testing.assert_array_equal(np.concatenate([data.train_labels, data.test_labels]), layout.labels[kind])
    assert test == 3


@pytest.mark.parametrize(("name", "number"), FORMS)
def test_every_form_at_every_place(tmp_path, layouts, name, number):
    layout = layouts(name, number)
    folder = layout.folder(tmp_path)
    for root in (folder, tmp_path):
        data = load_images(name, root)
        check(data, layout, layout.form.kinds[-1])
        assert (data.name, data.source) == (name, f"{folder} (md5 sums verified)")
        assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name]


def test_no_root():
    with pytest.raises(FileNotFoundError, match="no place given for cifar10"):
        load_images("cifar10")


def test_other_binary_data_are_read_where_nothing_is_verified(tmp_path, layouts):
    folder = layouts("cifar10", 0).folder(tmp_path)
    rows = np.fromfile(folder / "test_batch.bin", np.uint8).reshape(3, -1)
    rows[:2].tofile(folder / "test_batch.bin")
    with pytest.raises(ValueError, match=r"/test_batch\.bin \(6146 bytes\) has the md5 sum .*verify=False"):
        load_images("cifar10", folder)
    assert len(load_images("cifar10", folder, verify=False).test_labels) == 2
    rows[1, 0] = 10
    rows.tofile(folder / "test_batch.bin")
    with pytest.raises(ValueError, match="test image 1 has label 10, outside 0 to 9"):
        load_images("cifar10", folder, verify=False)
    (folder / "test_batch.bin").write_bytes(b"x" * 3074)
    with pytest.raises(ValueError, match=r"has 3074 bytes, not a multiple of 3073"):
        load_images("cifar10", folder, verify=False)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test_batch\.bin"):
        load_images("cifar10", folder)


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize(
    "hostile", [pickle.dumps(Runs()), b"\x80\x02Nr\xff\xff\xff\x1f.", b"\x80\x04\x8e\0\0\0\0\1\0\0\0."]
)
def test_no_pickle_is_loaded_that_is_not_the_official_one(tmp_path, layouts, monkeypatch, hostile):
    monkeypatch.chdir(tmp_path)
    folder = layouts("cifar100", 1).folder(tmp_path)
    (folder / "train").write_bytes(hostile)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="md5 sum"):
        load_images("cifar100", folder)
    with pytest.raises(ValueError, match="pickles, which are read only with verify=True"):
        load_images("cifar100", folder, verify=False)
    # In kB. Ten bytes can ask the unpickler for gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18
    assert not Path("was_run").exists()


@pytest.mark.parametrize("raw", [pickle.dumps(Runs()), b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n."])
def test_the_unpickler_knows_arrays_alone(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which no image file needs"):
        images._Unpickler(io.BytesIO(raw)).load()
    assert not Path("was_run").exists()


def test_wrong_places(tmp_path):
    (tmp_path / "a.tar.gz").touch()
    for place in (tmp_path / "a.tar.gz", tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no folder: unpack it|does not exist|holds none of"):
            load_images("cifar10", place)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_data(name):
    """Where the environment says where they are."""
    root = os.environ.get(f"STRUCTLIN_{name.upper()}")
    if root is None:
        pytest.skip(f"STRUCTLIN_{name.upper()} is not set")
    data = load_images(name, root)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert np.bincount(data.train_labels).tolist() == [50_000 // data.num_classes] * data.num_classes
