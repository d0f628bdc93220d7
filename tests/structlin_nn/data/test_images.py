"""The data set class, the embedded data, and the order of training."""

from importlib.resources import files

import numpy as np
import pytest
from helpers.children import output
from hypothesis import given
from hypothesis import strategies as st

from structlin_nn.data import ImageDataset, batch_rows, channel_statistics, epoch_order, images, load_images


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
    code = "import sys; from structlin_nn.data import load_images, token_batch; load_images('fashion')"
    code += "; print({'torch', 'jax', 'datasets'} & sys.modules.keys())"
    assert output("-c", code).strip() == "set()"


def test_statistics_against_float64():
    # More than one chunk, and axes of different sizes.
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 3, 4, 5), dtype=np.uint8)
    mean, std = channel_statistics(pixels)
    np.testing.assert_allclose(mean, (pixels / 255.0).mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, (pixels / 255.0).std(axis=(0, 2, 3)), rtol=1e-12)
    assert channel_statistics(np.full((2000, 1, 28, 28), 51, np.uint8)) == ((0.2,), (0.0,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_images": np.zeros((7, 2, 5, 4))}, TypeError, "train: uint8 images .* got float64"),
        ({"train_images": np.zeros((7, 20), np.uint8)}, ValueError, r"\(N, C, H, W\).*\(7, 20\)"),
        ({"test_images": np.zeros((0, 2, 5, 4), np.uint8)}, ValueError, r"not empty, got \(0, 2, 5, 4\)"),
        ({"train_labels": np.zeros(7, np.uint8)}, TypeError, "int64 labels needed, got uint8 and uint8"),
        ({"train_labels": np.zeros(6, np.int64)}, ValueError, r"got \(7, 2, 5, 4\), \(6,\)"),
        ({"test_labels": np.array([0, 3, 3])}, ValueError, r"test_labels\[1\] is 3, outside 0 to 2 \(2 such"),
        ({"test_images": np.zeros((3, 2, 4, 5), np.uint8)}, ValueError, "shapes differ"),
    ],
)
def test_dataset_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        toy(**changes)


def test_digest_is_of_all_arrays():
    data = toy()
    assert data.digest == toy().digest
    for name in ("train_images", "test_images", "train_labels", "test_labels"):
        changed = getattr(data, name).copy()
        changed.flat[0] = (changed.flat[0] + 1) % 3
        assert toy(**{name: changed}).digest != data.digest


def test_padding_to_32():
    data = toy(train_images=np.full((7, 3, 27, 30), 9, np.uint8), test_images=np.full((3, 3, 27, 30), 9, np.uint8))
    padded = data.as_32x32_rgb()
    assert (padded.train_images[:, :, 2:29, 1:31] == 9).all()
    assert int(padded.train_images.sum(dtype=np.int64)) == int(data.train_images.sum(dtype=np.int64))
    assert (padded.name, padded.source) == ("toy-32x32-rgb", "made here; 27x30 padded with zeros to 32x32")
    assert padded.as_32x32_rgb() is padded
    for shape in ((2, 28, 28), (1, 33, 32), (3, 32, 64), (4, 32, 32)):
        other = np.zeros((3, *shape), np.uint8)
        with pytest.raises(ValueError, match="cannot be padded"):
            toy(train_images=other, train_labels=np.zeros(3, np.int64), test_images=other).as_32x32_rgb()


class TestFashion:
    def test_balanced_and_real(self, fashion):
        assert np.bincount(fashion.train_labels).tolist() == [1000] * 10
        assert np.bincount(fashion.test_labels).tolist() == [200] * 10
        # The published statistics of all 60,000 images are 0.2860 and 0.3530.
        np.testing.assert_allclose(fashion.mean, 0.2860, atol=0.003)
        np.testing.assert_allclose(fashion.std, 0.3530, atol=0.003)

    def test_labels_belong_to_images(self, fashion):
        # Nearest class mean: about 68 % on all of Fashion-MNIST, 10 % if labels and images did not belong together.
        train, test = (x.reshape(len(x), -1).astype(float) for x in (fashion.train_images, fashion.test_images))
        means = np.stack([train[fashion.train_labels == c].mean(0) for c in range(10)])
        nearest = ((test**2).sum(1)[:, None] - 2 * test @ means.T + (means**2).sum(1)).argmin(1)
        assert 0.6 < (nearest == fashion.test_labels).mean() < 0.75

    def test_for_models_of_3072_inputs(self, fashion):
        padded = fashion.as_32x32_rgb()
        for c in range(3):
            np.testing.assert_array_equal(padded.test_images[:, c, 2:30, 2:30], fashion.test_images[:, 0])
        assert padded.test_images.sum(dtype=np.int64) == 3 * fashion.test_images.sum(dtype=np.int64)
        np.testing.assert_allclose(padded.mean, np.array(fashion.mean * 3) * 28**2 / 32**2, rtol=1e-12)

    def test_damaged_or_missing(self, tmp_path, monkeypatch):
        raw = bytearray((files("structlin_nn.data") / images._FASHION).read_bytes())
        monkeypatch.setattr(images, "files", lambda package: tmp_path)
        with pytest.raises(FileNotFoundError, match="installed without its data"):
            load_images("fashion")
        raw[len(raw) // 2] ^= 1
        (tmp_path / images._FASHION).write_bytes(raw)
        with pytest.raises(ValueError, match=f"sha256 sum .*expected {images._FASHION_SHA256}"):
            load_images("fashion")

    def test_licence_and_description_are_beside_the_data(self):
        folder = files("structlin_nn.data")
        assert "Copyright (c) 2017 Zalando SE" in (folder / "fashion_mnist_licence.txt").read_text()
        assert "make_embedded" in (folder / "README.md").read_text()


def test_options_that_do_not_apply_are_refused(tmp_path):
    for name, root, options, message in (
        ("mnist", None, {}, "unknown image data 'mnist'; known: cifar10, cifar100, fashion"),
        ("fashion", tmp_path, {}, "takes no root"),
        ("fashion", None, {"verify": False}, "always verified"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(name, root, **options)


class TestOrder:
    def test_fixed_for_ever(self):
        assert epoch_order(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
        assert epoch_order(7, 3, 10).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]

    @given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 300))
    def test_a_permutation(self, seed, epoch, size):
        order = epoch_order(seed, epoch, size)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(size))

    @given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 40))
    def test_batches_are_pieces_of_the_order(self, size, batch_size, seed, step):
        if size < batch_size:
            with pytest.raises(ValueError, match=f"{size} samples are less than one batch of {batch_size}"):
                batch_rows(size, batch_size, seed, step)
            return
        epoch, place = divmod(step, size // batch_size)
        expected = epoch_order(seed, epoch, size)[place * batch_size :][:batch_size]
        np.testing.assert_array_equal(batch_rows(size, batch_size, seed, step), expected)

    def test_what_is_given_out_can_be_changed(self):
        batch_rows(10, 4, 0, 0)[:] = 0
        assert batch_rows(10, 4, 0, 0).tolist() == epoch_order(0, 0, 10)[:4].tolist()

    def test_refuses(self):
        with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
            batch_rows(10, 2, 1.5, 0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="step must not be negative"):
            batch_rows(10, 2, 0, -1)
