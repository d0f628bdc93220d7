"""One image file at a time: decoding, the training augmentation of ImageNet, and the view it is evaluated on.

Cropping, resizing and flipping need Pillow alone. Rand-augment and random erasing are timm's, colour jitter is
torchvision's (the extra ``vision``); each is imported only where a recipe asks for it.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from structlin_nn.data import augment
from structlin_nn.data._checks import natural

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageRecipe", "TrainingView", "decode", "evaluation_view", "shortest_side"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(raw: bytes, name: str) -> Image.Image:
    """An image file as an RGB image, all its pixels read.

    Raises:
        ValueError: the file is truncated, damaged or of no known format; the message names it.

    Example:
        >>> decode(b"GIF89a", "cat.gif")
        Traceback (most recent call last):
            ...
        ValueError: cat.gif (6 bytes) is a broken image (...)
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            return image.convert("RGB")
    except Exception as error:
        # A damaged file can fail in any way at all: Pillow raises OSError, SyntaxError, struct.error and others.
        raise ValueError(f"{name} ({len(raw)} bytes) is a broken image ({type(error).__name__}: {error})") from error


def shortest_side(image: Image.Image, size: int, interpolation: str = "bicubic") -> Image.Image:
    """The image resized so that its shortest side has `size` pixels, the other in proportion, rounded down.

    >>> shortest_side(Image.new("RGB", (300, 200)), 100).size
    (150, 100)
    """
    width, height = image.size
    shape = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    return image if shape == image.size else image.resize(shape, _FILTERS[interpolation])


def evaluation_view(image: Image.Image, size: int = 224, crop: float = 0.875) -> Tensor:
    """The centre of an image, normalised: the usual view for evaluation on ImageNet.

    The shortest side is resized to ``floor(size / crop)`` pixels (bicubic), then `size` x `size` are cut out.

    Returns:
        float32 tensor (3, size, size).

    Example:
        >>> evaluation_view(Image.new("RGB", (300, 200)), size=32).shape
        torch.Size([3, 32, 32])
    """
    image = shortest_side(image, math.floor(size / crop))
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return _normalised(image.crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class ImageRecipe:
    """Training augmentation of ImageNet; the defaults are those of Compute Better Spent (ICML 2024) for ViT/32.

    Each image is cropped at random (`structlin_nn.data.augment.sample_crops`), resized, flipped, changed by
    rand-augment, normalised, and erased in part, in this order. Mixup and label smoothing are for whole batches
    (`mix`).

    Attributes:
        size: height and width of the result.
        crop_scale: range of the share of the area.
        crop_ratio: range of width / height of the crop.
        interpolation: ``bilinear``, ``bicubic``, or ``random``: either, drawn for each image.
        flip: probability of mirroring.
        rand_augment: configuration of timm's RandAugment, None for none.
        color_jitter: strength of torchvision's ColorJitter in brightness, contrast and saturation. As in timm, it
            takes effect only where there is no rand-augment, unless ``force_color_jitter``.
        force_color_jitter: jitter besides rand-augment.
        random_erasing: probability of timm's RandomErasing with noise, 0 for none.
        mixup: alpha of mixup, 0 for none.
        smoothing: label smoothing.

    Raises:
        ValueError: a value outside its range.
        ImportError: (when used) a step that needs the extra ``vision`` where that is not installed.

    Source: Cubuk et al., RandAugment, 2020; Zhong et al., Random Erasing, 2020; Zhang et al., mixup, 2018.

    Example:
        >>> ImageRecipe.plain(size=64).rand_augment is None
        True
    """

    size: int = 224
    crop_scale: tuple[float, float] = augment.CROP_SCALE
    crop_ratio: tuple[float, float] = augment.CROP_RATIO
    interpolation: str = "random"
    flip: float = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    force_color_jitter: bool = False
    random_erasing: float = 0.25
    mixup: float = 0.2
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        natural("size", self.size, 1)
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, got {(low, high)}")
        if self.interpolation not in ("random", *_FILTERS):
            raise ValueError(f"interpolation must be random, bilinear or bicubic, got {self.interpolation!r}")
        for name in ("flip", "random_erasing", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("color_jitter", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")

    @classmethod
    def plain(cls, size: int = 224, **changes: Any) -> ImageRecipe:
        """Crops and flips alone: what needs no more than Pillow."""
        off = {"rand_augment": None, "color_jitter": 0.0, "random_erasing": 0.0, "mixup": 0.0, "smoothing": 0.0}
        return cls(size=size, **{**off, **changes})

    def mix(self, images: Tensor, labels: Tensor, num_classes: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Label smoothing and mixup of a batch, on its device.

        Args:
            images: (N, 3, size, size), floating point.
            labels: int64 (N,).
            num_classes: K.
            seed: non-negative integers, such as (seed, epoch, batch); the proportion depends on them alone.

        Returns:
            (images, targets): targets (N, K) of the images' dtype, each row summing to 1.
        """
        targets = augment.soft_targets(labels, num_classes, self.smoothing, dtype=images.dtype)
        if not self.mixup:
            return images, targets
        word = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(word >> np.uint64(1)))
        return augment.mixup(images, targets, generator, alpha=self.mixup)


class TrainingView:
    """The steps of a recipe for one image: (RGB image, seed) -> float32 tensor (3, size, size), normalised.

    The seed is a tuple of non-negative integers, such as (seed, epoch, sample); the result depends on nothing
    else. Python's, NumPy's and torch's global generators, which timm draws from, are left as they were.

    Raises:
        ImportError: a step that needs the extra ``vision`` where that is not installed.

    Example:
        >>> view = TrainingView(ImageRecipe.plain(size=16))
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> bool((view(image, (0, 0, 7)) == view(image, (0, 0, 7))).all())
        True
        >>> bool((view(image, (0, 0, 7)) == view(image, (0, 1, 7))).all())
        False
    """

    def __init__(self, recipe: ImageRecipe) -> None:
        self.recipe = recipe
        self.changes: list[Callable[[Image.Image], Image.Image]] = []
        if recipe.rand_augment is not None:
            self.changes.append(_rand_augment(recipe.rand_augment, recipe))
        if recipe.color_jitter and (recipe.rand_augment is None or recipe.force_color_jitter):
            with _extra("colour jitter"):
                from torchvision.transforms import ColorJitter
            self.changes.append(ColorJitter(*[recipe.color_jitter] * 3))
        self.erase = _erasing(recipe.random_erasing) if recipe.random_erasing else None

    def __call__(self, image: Image.Image, seed: tuple[int, ...]) -> Tensor:
        words = np.random.SeedSequence(seed).generate_state(4, np.uint64)
        image = self._crop(image, torch.Generator().manual_seed(int(words[0] >> np.uint64(1))))
        if not self.changes and self.erase is None:
            return _normalised(image)
        with _seeded(words[1:]):
            for change in self.changes:
                image = change(image)
            view = _normalised(image)
            return view if self.erase is None else self.erase(view)

    def _crop(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        recipe, shape = self.recipe, (self.recipe.size, self.recipe.size)
        boxes = augment.sample_crops(
            1, image.height, image.width, generator, scale=recipe.crop_scale, ratio=recipe.crop_ratio
        )
        top, left, height, width = boxes[0].tolist()
        which, flips = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        name = recipe.interpolation if recipe.interpolation in _FILTERS else ("bilinear", "bicubic")[which < 0.5]
        image = image.crop((left, top, left + width, top + height)).resize(shape, _FILTERS[name])
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips < recipe.flip else image


def _rand_augment(settings: str, recipe: ImageRecipe) -> Callable[[Image.Image], Image.Image]:
    options: dict[str, Any] = {
        "translate_const": int(0.45 * recipe.size),
        "img_mean": tuple(round(255 * mean) for mean in IMAGENET_MEAN),
    }
    if recipe.interpolation in _FILTERS:
        options["interpolation"] = _FILTERS[recipe.interpolation]
    with _extra("rand-augment"):
        from timm.data.auto_augment import rand_augment_transform
    return rand_augment_transform(settings, options)


def _erasing(probability: float) -> Callable[[Tensor], Tensor]:
    with _extra("random erasing"):
        from timm.data.random_erasing import RandomErasing
    return RandomErasing(probability, mode="pixel", device="cpu")


@contextmanager
def _extra(step: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{step} needs timm and torchvision: pip install 'structlin[vision]' "
            f"(ImageRecipe.plain() needs neither; {error})"
        ) from error


@contextmanager
def _seeded(words: np.ndarray) -> Iterator[None]:
    """Python's, NumPy's and torch's (CPU) global generators seeded, and afterwards as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(int(words[0]))
        np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002
        torch.random.default_generator.manual_seed(int(words[2] >> np.uint64(1)))
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _normalised(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return augment.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)[0].contiguous()
