"""The data set class, the embedded data and the one entry to all of them."""

import subprocess
import sys

import numpy as np
import pytest

from structlin_nn.data import DATASETS, ImageDataset, channel_statistics, embedded, load_images


@pytest.fixture(scope="module")
def fashion():
    return load_images("fashion")


def toy(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "name": "toy",
        "train_images": rng.integers(0, 256, (7, 2, 5, 4), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2, 0]),
        "test_images": rng.integers(0, 256, (3, 2, 5, 4), dtype=np.uint8),
        "test_labels": np.array([2, 1, 0]),
        "class_names": ("a", "b", "c"),
        "source": "made here",
        "licence": "none",
    }
    return ImageDataset(**{**fields, **changes})


def test_loading_does_not_import_torch():
    code = (
        "import sys; from structlin_nn.data import load_images; load_images('fashion'); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_statistics_against_float64():
    # More than one chunk, and axes of different sizes.
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 4, 5), dtype=np.uint8)
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255.0).mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, (images / 255.0).std(axis=(0, 2, 3)), rtol=1e-12)


def test_statistics_are_exact():
    assert channel_statistics(np.full((2000, 1, 28, 28), 51, np.uint8)) == ((0.2,), (0.0,))


def test_dataset_properties():
    data = toy()
    assert (data.num_classes, data.image_shape, data.num_features) == (3, (2, 5, 4), 40)
    assert data.mean, data.std == channel_statistics(data.train_images)
    assert repr(data) == "ImageDataset('toy': 7 training and 3 test images of shape (2, 5, 4), 3 classes)"
    with pytest.raises(AttributeError):
        data.name = "other"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_images": np.zeros((7, 2, 5, 4))}, TypeError, "train_images must be .* uint8, got float64"),
        ({"test_images": [1]}, TypeError, "test_images must be .* uint8, got list"),
        ({"train_images": np.zeros((7, 20), np.uint8)}, ValueError, r"\(N, C, H, W\).*\(7, 20\)"),
        ({"test_images": np.zeros((0, 2, 5, 4), np.uint8)}, ValueError, r"no axis empty, got \(0, 2, 5, 4\)"),
        ({"train_labels": np.zeros(7, np.uint8)}, TypeError, "train_labels must be .* int64, got uint8"),
        ({"train_labels": np.zeros(6, np.int64)}, ValueError, r"shape \(6,\), 7 images"),
        ({"test_labels": np.array([0, 3, 3])}, ValueError, r"test_labels\[1\] is 3, outside 0 to 2 \(2 such"),
        ({"train_labels": np.array([0, 0, -1, 0, 0, 0, 0])}, ValueError, r"train_labels\[2\] is -1"),
        ({"test_images": np.zeros((3, 2, 4, 5), np.uint8)}, ValueError, "must be equal"),
    ],
)
def test_dataset_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        toy(**changes)


def test_padding_to_32_of_a_colour_image_with_odd_margins():
    data = toy(train_images=np.full((7, 3, 27, 30), 9, np.uint8), test_images=np.full((3, 3, 27, 30), 9, np.uint8))
    padded = data.as_32x32_rgb()
    assert padded.image_shape == (3, 32, 32)
    assert (padded.train_images[:, :, 2:29, 1:31] == 9).all()
    assert int(padded.train_images.sum(dtype=np.int64)) == int(data.train_images.sum(dtype=np.int64))
    assert padded.name == "toy-32x32-rgb"
    assert padded.source == "made here; 27x30 padded with zeros to 32x32"
    assert padded.as_32x32_rgb() is padded


@pytest.mark.parametrize("shape", [(2, 28, 28), (1, 33, 32), (3, 32, 64), (4, 32, 32)])
def test_padding_to_32_refuses(shape):
    images = np.zeros((3, *shape), np.uint8)
    data = toy(train_images=images, train_labels=np.zeros(3, np.int64), test_images=images)
    with pytest.raises(ValueError, match="cannot be padded"):
        data.as_32x32_rgb()


def test_fashion_is_balanced_and_real(fashion):
    assert fashion.train_images.shape == (10000, 1, 28, 28)
    assert fashion.test_images.shape == (2000, 1, 28, 28)
    assert np.bincount(fashion.train_labels).tolist() == [1000] * 10
    assert np.bincount(fashion.test_labels).tolist() == [200] * 10
    # The published statistics of all 60,000 images are 0.2860 and 0.3530.
    np.testing.assert_allclose(fashion.mean, 0.2860, atol=0.003)
    np.testing.assert_allclose(fashion.std, 0.3530, atol=0.003)
    assert "MIT" in fashion.licence
    assert "subset" in fashion.source


def test_fashion_has_information_about_its_labels(fashion):
    # Nearest class mean: about 68 % on all of Fashion-MNIST, 10 % if labels and images did not belong together.
    train, test = (x.reshape(len(x), -1).astype(float) for x in (fashion.train_images, fashion.test_images))
    means = np.stack([train[fashion.train_labels == c].mean(0) for c in range(10)])
    nearest = ((test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)).argmin(1)
    assert 0.6 < (nearest == fashion.test_labels).mean() < 0.75


def test_fashion_for_models_of_3072_inputs(fashion):
    padded = fashion.as_32x32_rgb()
    assert padded.num_features == 3072
    assert padded.name == "fashion-32x32-rgb"
    assert "padded with zeros" in padded.source
    assert "repeated three times" in padded.source
    for c in range(3):
        np.testing.assert_array_equal(padded.test_images[:, c, 2:30, 2:30], fashion.test_images[:, 0])
    assert padded.test_images.sum(dtype=np.int64) == 3 * fashion.test_images.sum(dtype=np.int64)
    np.testing.assert_allclose(padded.mean, np.array(fashion.mean * 3) * 28**2 / 32**2, rtol=1e-12)
    np.testing.assert_array_equal(padded.train_labels, fashion.train_labels)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_embedded_data(tmp_path, monkeypatch, damage):
    raw = bytearray((embedded.files("structlin_nn.data") / embedded.FILE).read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    else:
        del raw[-1]
    (tmp_path / embedded.FILE).write_bytes(raw)
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=f"sha256 sum .*expected {embedded.SHA256}"):
        load_images("fashion")


def test_missing_embedded_data(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="installed without its data"):
        load_images("fashion")


def test_licence_and_description_are_beside_the_data():
    folder = embedded.files("structlin_nn.data")
    assert "Copyright (c) 2017 Zalando SE" in (folder / "fashion_mnist_licence.txt").read_text()
    assert "make_embedded" in (folder / "README.md").read_text()


def test_options_that_do_not_apply_are_refused(tmp_path):
    assert DATASETS == ("cifar10", "cifar100", "fashion")
    with pytest.raises(ValueError, match="unknown image data 'mnist'; known: cifar10, cifar100, fashion"):
        load_images("mnist")
    with pytest.raises(ValueError, match="takes no root"):
        load_images("fashion", tmp_path)
    with pytest.raises(ValueError, match="always verified"):
        load_images("fashion", verify=False)
    with pytest.raises(ValueError, match="labels='fine' is an option of cifar100"):
        load_images("cifar10", tmp_path, labels="fine")
    with pytest.raises(ValueError, match="must be 'fine' or 'coarse', got 'rough'"):
        load_images("cifar100", tmp_path, labels="rough")
