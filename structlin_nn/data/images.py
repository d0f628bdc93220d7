"""Image classification data in memory: arrays, labels and what is known about them."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np

__all__ = ["ImageDataset", "channel_statistics"]


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of the full pixel range.

    Args:
        images: uint8 array of shape (N, C, H, W), N >= 1.

    Returns:
        (mean, std): two tuples of C floats, pixel values divided by 255, the deviation that of the
        population (divided by N * H * W). The sums are taken in integers, so nothing is rounded before
        the last division.

    Raises:
        TypeError: the images are not a uint8 array.
        ValueError: the shape is not (N, C, H, W) with at least one pixel.

    Example:
        >>> import numpy as np
        >>> channel_statistics(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1))
        ((0.5,), (0.5,))
    """
    _check_images("images", images)
    count = images.shape[0] * images.shape[2] * images.shape[3]
    channels = images.shape[1]
    total, squares = [0] * channels, [0] * channels
    # In chunks, because the squares need a wider type than the pixels.
    for start in range(0, len(images), 1024):
        chunk = images[start : start + 1024].astype(np.uint32)
        sums = chunk.sum(axis=(0, 2, 3), dtype=np.uint64)
        square_sums = np.square(chunk).sum(axis=(0, 2, 3), dtype=np.uint64)
        for c in range(channels):
            total[c] += int(sums[c])
            squares[c] += int(square_sums[c])
    mean = tuple(t / (255 * count) for t in total)
    std = tuple((count * s - t * t) ** 0.5 / (255 * count) for t, s in zip(total, squares, strict=True))
    return mean, std


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Training and test images with their labels, held in memory as they are stored.

    Attributes:
        name: short name, e.g. ``"cifar10"``; says so where the images are not the original ones.
        train_images: uint8 array (N, C, H, W), channels first; colour channels are red, green, blue.
        train_labels: int64 array (N,), each from 0 to ``num_classes - 1``.
        test_images: uint8 array (M, C, H, W).
        test_labels: int64 array (M,).
        class_names: the name of each class, in the order of the labels.
        source: where the arrays came from and what was done to them.
        licence: the terms under which the data may be used.
        mean: mean of each channel of the training images, pixel values divided by 255 (derived).
        std: standard deviation of each channel of the training images, likewise (derived).

    Raises:
        TypeError: images that are not uint8, labels that are not int64.
        ValueError: shapes that do not fit together, a label outside the classes, an empty split.

    Example:
        >>> import numpy as np
        >>> pixels, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])
        >>> ImageDataset("toy", pixels, labels, pixels[:2], labels[:2], ("a", "b"), "made here", "none")
        ImageDataset('toy': 4 training and 2 test images of shape (1, 2, 2), 2 classes)
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    licence: str
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            _check_images(f"{split}_images", images)
            _check_labels(f"{split}_labels", labels, len(images), len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"training images have shape {self.train_images.shape[1:]} and test images "
                f"{self.test_images.shape[1:]}; they must be equal"
            )
        mean, std = channel_statistics(self.train_images)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def __repr__(self) -> str:
        return (
            f"ImageDataset({self.name!r}: {len(self.train_images)} training and {len(self.test_images)} "
            f"test images of shape {self.image_shape}, {self.num_classes} classes)"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    @property
    def num_features(self) -> int:
        """Pixel values of one image, C * H * W."""
        channels, height, width = self.image_shape
        return channels * height * width

    def as_32x32_rgb(self) -> "ImageDataset":
        """The same data in the shape (3, 32, 32) that the CIFAR models take (3072 inputs).

        Smaller images are surrounded by zeros, equally on both sides (an odd line goes to the bottom or
        right), and a single channel is repeated three times. No information is added: three equal
        channels are one channel. The name gets the suffix ``-32x32-rgb``, ``source`` says what was done,
        and mean and std are those of the new images. Data of that shape already are returned unchanged.

        Raises:
            ValueError: images larger than 32 x 32, or with neither one nor three channels.

        Example:
            >>> from structlin_nn.data import load_images
            >>> load_images("fashion").as_32x32_rgb()
            ImageDataset('fashion-32x32-rgb': 10000 training and 2000 test images of shape (3, 32, 32), ...)
        """
        channels, height, width = self.image_shape
        if (channels, height, width) == (3, 32, 32):
            return self
        if height > 32 or width > 32 or channels not in (1, 3):
            raise ValueError(
                f"images of shape {self.image_shape} cannot be padded to (3, 32, 32): "
                "one or three channels of at most 32 x 32 pixels are needed"
            )
        top, left = (32 - height) // 2, (32 - width) // 2
        margins = ((0, 0), (0, 0), (top, 32 - height - top), (left, 32 - width - left))

        def convert(images: np.ndarray) -> np.ndarray:
            padded = np.pad(images, margins)
            return padded if channels == 3 else np.repeat(padded, 3, axis=1)

        done = f"{height}x{width} padded with zeros to 32x32"
        if channels == 1:
            done += ", the one channel repeated three times"
        return dataclasses.replace(
            self,
            name=f"{self.name}-32x32-rgb",
            train_images=convert(self.train_images),
            test_images=convert(self.test_images),
            source=f"{self.source}; {done}",
        )


def _check_images(what: str, images: np.ndarray) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise TypeError(f"{what} must be a NumPy array of uint8, got {found}")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"{what} must have shape (N, C, H, W) with no axis empty, got {images.shape}")


def _check_labels(what: str, labels: np.ndarray, count: int, classes: int) -> None:
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64:
        found = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
        raise TypeError(f"{what} must be a NumPy array of int64, got {found}")
    if labels.shape != (count,):
        raise ValueError(f"{what} has shape {labels.shape}, {count} images need shape ({count},)")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise ValueError(
            f"{what}[{wrong[0]}] is {labels[wrong[0]]}, outside 0 to {classes - 1} ({wrong.size} such labels)"
        )
