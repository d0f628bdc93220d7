"""A small data set of real images in CIFAR's own format, so that runs take a second."""

from pathlib import Path

import numpy as np
import pytest

from structlin_nn.data import load_images
from structlin_nn.training.config import TrainConfig

IMAGES_PER_FILE, TEST_IMAGES = 48, 60


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 240 training and 60 test images, to be read without verification."""
    data = load_images("fashion").as_32x32_rgb()
    parent = tmp_path_factory.mktemp("data")
    folder = parent / "cifar-10-batches-bin"
    folder.mkdir()
    names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    for number, name in enumerate(names):
        part = slice(number * IMAGES_PER_FILE, (number + 1) * IMAGES_PER_FILE)
        write(folder / name, data.train_images[part], data.train_labels[part])
    write(folder / "test_batch.bin", data.test_images[:TEST_IMAGES], data.test_labels[:TEST_IMAGES])
    return folder


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
    path.write_bytes(rows.tobytes())


@pytest.fixture
def config() -> TrainConfig:
    """Seven steps in an epoch; everything that draws random numbers is on."""
    return TrainConfig(
        data_set="cifar10", width=24, structure="block_tensor_train", epochs=3, batch_size=32, eval_every=2, threads=1
    )
