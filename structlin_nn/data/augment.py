"""Augmentation of CIFAR: whole batches of images, on the device they are on, from an explicit generator.

Kept by hand: torchvision v2 draws one crop for a batch, and kornia draws from torch's global generator and takes
several times as long (`benchmarks/input.py` measures it). Here all numbers come from the generator that is passed, on
its own device and in a fixed order: with a generator on the CPU a seed gives the same augmentation on every device,
and saving the generator's state is all that resuming takes. Nothing waits for the device.

Images are tensors (N, C, H, W). Those of uint8 are scaled by 1 / 255; those of float32 and float64 are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Augmentation", "crop_resize", "mixup", "normalize", "sample_beta", "sample_crops", "soft_targets"]

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_CACHED = 128
"""Images augmented together on a CPU, so that intermediates stay in its cache. The results do not depend on it."""


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32, value / 255, and float32 and float64 as given; TypeError for another dtype."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be uint8, float32 or float64, got {images.dtype}")
    return images


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std for each channel, of values from 0 to 1.

    Images (N, C, H, W) of uint8, float32 or float64 (TypeError for another dtype); C means and positive deviations
    (ValueError), as `ImageDataset.mean`.

    Examples
    --------
    >>> normalize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.25])
    tensor([[[[-2.,  2.]]]])
    """
    converted = to_float(images)
    if not (len(mean) == len(std) == converted.shape[1] and all(s > 0 for s in std)):
        raise ValueError(f"{converted.shape[1]} means and positive stds are needed, got {tuple(mean)}, {tuple(std)}")
    centred = converted.sub if converted is images else converted.sub_
    return centred(_channels(mean, converted)).div_(_channels(std, converted))


def sample_crops(
    count: int, height: int, width: int, generator: torch.Generator, *, scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Tensor:  # fmt: skip
    """Draw a box for each of many images of one size, by the rules of torchvision's ``RandomResizedCrop``.

    The area is uniform in `scale` times that of the image, the ratio of width to height log-uniform in `ratio`, and the
    place uniform. Up to ten such pairs are tried until one fits; after that the box is the largest central one whose
    ratio is in the range (Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6). The result has (top,
    left, height, width) in pixels, int64 (count, 4) on the generator's device, which gives ``22 * count`` numbers.

    Examples
    --------
    >>> boxes = sample_crops(1000, 32, 32, torch.Generator().manual_seed(0))
    >>> bool((boxes[:, :2] + boxes[:, 2:] <= 32).all()), bool((boxes[:, 2:] >= 1).all())
    (True, True)
    """
    tries = _uniform((count, _ATTEMPTS, 2), generator)
    place = _uniform((count, 2), generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fitting = fits.any(1)
    # Of the whole image, where its own ratio is in the range.
    central_width = min(width, max(1, round(height * ratio[1])))
    central_height = min(height, max(1, round(width / ratio[0])))
    h = torch.where(fitting, heights.gather(1, first)[:, 0], central_height)
    w = torch.where(fitting, widths.gather(1, first)[:, 0], central_width)
    # A uniform number below 1 can round up to the end of its range.
    top = (place[:, 0] * (height - h + 1)).floor().minimum(height - h)
    left = (place[:, 1] * (width - w + 1)).floor().minimum(width - w)
    top = torch.where(fitting, top, (height - central_height) // 2)
    left = torch.where(fitting, left, (width - central_width) // 2)
    return torch.stack([top, left, h, w], dim=1).to(torch.int64)


def crop_resize(images: Tensor, boxes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut a box out of each image and enlarge it bilinearly to the size of the image.

    The result is that of cutting first and resizing then (``torch.nn.functional.interpolate`` with
    ``align_corners=False``), up to rounding. Images are (N, C, H, W), float32 or float64; boxes as of `sample_crops`,
    inside the images; `mirrored` (N,) says which images are turned left to right.

    Examples
    --------
    >>> image = torch.arange(4.0).view(1, 1, 2, 2)
    >>> crop_resize(image, torch.tensor([[0, 1, 2, 1]]))
    tensor([[[[1., 1.],
              [3., 3.]]]])
    """
    count, _, height, width = images.shape
    if tuple(boxes.shape) != (count, 4):
        raise ValueError(f"boxes must have shape ({count}, 4), got {tuple(boxes.shape)}")
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)

    def positions(start: Tensor, extent: Tensor, number: int) -> Tensor:
        start, extent = start.to(images.dtype)[:, None], extent.to(images.dtype)[:, None]
        centres = torch.arange(number, dtype=images.dtype, device=images.device) + 0.5
        return start + (centres * (extent / number) - 0.5).clamp_min(0).minimum(extent - 1)

    # grid_sample measures from -1 to 1 across the image, from edge to edge.
    y = (2 * positions(top, h, height) + 1) / height - 1
    x = (2 * positions(left, w, width) + 1) / width - 1
    if mirrored is not None:
        x = torch.where(mirrored.to(images.device, non_blocking=True)[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return torch.nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def soft_targets(
    labels: Tensor, num_classes: int, smoothing: float = 0.0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return class probabilities (N, K) of integer labels (N,): 1 - smoothing on the label, smoothing / K on all.

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7.

    Examples
    --------
    >>> soft_targets(torch.tensor([1]), 3, 0.3)
    tensor([[0.1000, 0.8000, 0.1000]])
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, dtype=dtype, device=labels.device)
    return targets.scatter_(1, labels.to(torch.int64)[:, None], 1 - smoothing + off)


def sample_beta(alpha: float, generator: torch.Generator) -> Tensor:
    """Draw from the symmetric beta distribution Beta(alpha, alpha); torch's own sampler takes no generator.

    With U and V uniform, t = sqrt(U^(-1/alpha) - 1) cos(2 pi V) makes t * sqrt(2 alpha) follow Student's distribution
    with 2 alpha degrees of freedom, and (1 + t / sqrt(1 + t^2)) / 2 Beta(alpha, alpha), without rejection (Bailey,
    Polar generation of random variates with the t-distribution, Math. Comp. 62, 1994). float64, on the generator's
    device.

    Examples
    --------
    >>> 0 <= sample_beta(0.8, torch.Generator().manual_seed(0)).item() <= 1
    True
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    u, v = _uniform((2,), generator).unbind()
    # t^2 / (1 + t^2), with the power in the numerator so that it cannot overflow.
    power, cosine = u ** (1 / alpha), torch.cos(2 * math.pi * v)
    share = (1 - power) * cosine**2 / (power + (1 - power) * cosine**2)
    return (1 + torch.sign(cosine) * share.sqrt()) / 2


def mixup(
    images: Tensor, targets: Tensor, generator: torch.Generator, *, alpha: float, neighbours: bool = False
) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with another of the batch, all in one proportion from Beta(alpha, alpha).

    Images (N, ...) and targets (N, K) are floating point. Sample i is mixed with N - 1 - i, as in timm; with
    `neighbours` 2 k with 2 k + 1, whose pairs do not depend on how a batch is shared (ValueError for an odd N).

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018.

    Examples
    --------
    >>> images, targets = torch.tensor([[0.0], [1.0]]), torch.eye(2)
    >>> mixed, soft = mixup(images, targets, torch.Generator().manual_seed(0), alpha=1.0)
    >>> bool(torch.allclose(mixed[:, 0], soft[:, 1]))
    True
    """
    if neighbours and len(images) % 2:
        raise ValueError(f"mixing neighbours needs an even number of samples, got {len(images)}")
    weight = sample_beta(alpha, generator)

    def mix(values: Tensor) -> Tensor:
        other = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if neighbours else values.flip(0)
        return other.lerp_(values, weight.to(values.dtype).to(values.device, non_blocking=True))

    return mix(images), mix(targets)


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation of a batch: crop, flip, normalise, smooth the labels, mix. Evaluation takes `normalize`.

    The defaults are the recipe for CIFAR of Qiu et al., Compute Better Spent (ICML 2024).

    Attributes
    ----------
    mean, std
        Mean and deviation of each channel.
    num_classes
        Number of classes K.
    crop
        Whether images are cropped, by `sample_crops`.
    flip
        Probability of mirroring; 0 draws nothing.
    mixup_alpha
        Alpha of `mixup`; 0 for none.
    smoothing
        Label smoothing.

    Examples
    --------
    >>> augment = Augmentation(mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
    >>> images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    >>> mixed, targets = augment(images, labels, torch.Generator().manual_seed(0))
    >>> mixed.shape, targets.shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]))
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    crop: bool = True
    flip: float = 0.5
    mixup_alpha: float = 0.8
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"as many means and positive stds are needed, got {self.mean}, {self.std}")
        for name, value in (("flip", self.flip), ("smoothing", self.smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if self.num_classes < 1 or not 0 <= self.mixup_alpha < math.inf:
            raise ValueError(
                f"num_classes {self.num_classes} must be positive, mixup_alpha {self.mixup_alpha} not below 0"
            )

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and integer labels (N,) to floating-point images (N, C, H, W) and targets (N, K).

        All random numbers come from the generator, in the order crop, flip, mixup.
        """
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"images (N, C, H, W), labels (N,) needed, got {tuple(images.shape)}, {tuple(labels.shape)}"
            )
        count, _, height, width = images.shape
        boxes = sample_crops(count, height, width, generator) if self.crop else None
        mirrored = _uniform((count,), generator) < self.flip if self.flip else None
        if images.device.type != "cpu":
            made = self._views(images, boxes, mirrored)
        else:
            made = torch.empty(images.shape, dtype=images.dtype if images.is_floating_point() else torch.float32)
            for first in range(0, count, _CACHED):
                part = slice(first, first + _CACHED)
                made[part] = self._views(
                    images[part], None if boxes is None else boxes[part], None if mirrored is None else mirrored[part]
                )
        targets = soft_targets(labels, self.num_classes, self.smoothing, dtype=made.dtype)
        return mixup(made, targets, generator, alpha=self.mixup_alpha) if self.mixup_alpha else (made, targets)

    def _views(self, images: Tensor, boxes: Tensor | None, mirrored: Tensor | None) -> Tensor:
        """Return images cropped, mirrored and normalised."""
        if boxes is not None:
            images = crop_resize(to_float(images), boxes, mirrored=mirrored)
        elif mirrored is not None:
            mirrored = mirrored.to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return normalize(images, self.mean, self.std)


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype).view(-1, 1, 1).to(images.device, non_blocking=True)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uniform numbers from 0 to below 1, in float64: float32 would round positions."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
