"""The image data that are part of this package: a subset of Fashion-MNIST.

How it was made is told in ``README.md`` beside this file and done by `structlin_nn.data.make_embedded`.

Source: Xiao, Rasul, Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, 2017, arXiv:1708.07747.
"""

import hashlib
import io
from importlib.resources import files

import numpy as np

from structlin_nn.data.images import ImageDataset

__all__ = ["load_fashion"]

FILE = "fashion_mnist.npz"
SHA256 = "a7fb6544ddcfb8f231253bb2aae8d1f1d7dbb69442b935b349efaf143199a901"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_fashion() -> ImageDataset:
    """The embedded subset of Fashion-MNIST: 10,000 training and 2,000 test images of shape (1, 28, 28).

    It is balanced over the ten classes. Results on it are results on this subset, not on Fashion-MNIST. For
    models with 3072 inputs see `ImageDataset.as_32x32_rgb`.

    Raises:
        FileNotFoundError: the package was installed without its data.
        ValueError: the file differs from the published one (its sha256 sum is checked).

    Example:
        >>> load_fashion()
        ImageDataset('fashion': 10000 training and 2000 test images of shape (1, 28, 28), 10 classes)
    """
    place = files("structlin_nn.data") / FILE
    if not place.is_file():
        raise FileNotFoundError(f"{place} is missing: the package was installed without its data")
    raw = place.read_bytes()
    actual = hashlib.sha256(raw).hexdigest()
    if actual != SHA256:
        raise ValueError(
            f"{place} ({len(raw)} bytes) has the sha256 sum {actual}, expected {SHA256}: install structlin again"
        )
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        train_images, train_labels = arrays["train_images"], arrays["train_labels"]
        test_images, test_labels = arrays["test_images"], arrays["test_labels"]
    return ImageDataset(
        "fashion",
        train_images[:, None],
        train_labels.astype(np.int64),
        test_images[:, None],
        test_labels.astype(np.int64),
        CLASSES,
        "embedded class-balanced subset of Fashion-MNIST (10,000 of 60,000 training and 2,000 of 10,000 test images)",
        "MIT, copyright 2017 Zalando SE",
    )
