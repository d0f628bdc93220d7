"""Augmentation of whole batches of images, on the device they are on, from an explicit generator.

Images are tensors (N, C, H, W). Those of uint8 are read as value / 255; those of float32 or float64 are taken
as they are. Nothing loops over the samples, and nothing waits for the device.

On a CPU, `Augmentation` works through a batch in parts that stay in its cache, which changes no number.

All randomness comes from the generator passed in, drawn on its own device in a fixed number and order for a
given batch size. With a generator on the CPU the same seed therefore gives the same augmentation on every
device, and saving the generator's state (`torch.Generator.get_state`) is all that resuming takes.

The recipe for CIFAR in Qiu, Potapczynski, Finzi, Goldblum, Wilson, Compute Better Spent (ICML 2024) is the
default of `Augmentation`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Augmentation",
    "crop_resize",
    "mixup",
    "normalize",
    "random_horizontal_flip",
    "random_resized_crop",
    "sample_beta",
    "sample_crops",
    "soft_targets",
    "to_float",
]

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_CACHED = 128
"""Images that are augmented together on a CPU: what is between the steps stays in its cache."""


def to_float(images: Tensor) -> Tensor:
    """Images as floating-point values: uint8 becomes float32, value / 255; float32 and float64 stay.

    Raises:
        TypeError: no tensor, or another dtype. (Half precision cannot hold sampling positions.)
        ValueError: the shape is not (N, C, H, W).

    Example:
        >>> to_float(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
        tensor([[[[0.0000, 0.2000, 1.0000]]]])
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be uint8, float32 or float64, got {images.dtype}")
    return images


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std for each channel, after `to_float`.

    Args:
        images: (N, C, H, W).
        mean: C numbers in units of the float images (as `ImageDataset.mean`).
        std: C positive numbers likewise.

    Raises:
        TypeError: see `to_float`.
        ValueError: not one mean and std for each channel, or a std that is not positive.

    Example:
        >>> normalize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.25])
        tensor([[[[-2.,  2.]]]])
    """
    converted = to_float(images)
    if len(mean) != converted.shape[1] or len(std) != converted.shape[1]:
        raise ValueError(f"{len(mean)} means and {len(std)} stds for {converted.shape[1]} channels")
    if not all(s > 0 for s in std):
        raise ValueError(f"every std must be positive, got {tuple(std)}")
    centred = converted.sub if converted is images else converted.sub_
    return centred(_channels(mean, converted)).div_(_channels(std, converted))


def sample_crops(
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Tensor:
    """Draw crop boxes for the random resized crop (the "Inception crop").

    The area is uniform in `scale` times that of the image, the ratio of width to height log-uniform in
    `ratio`, both sides are rounded to whole pixels, and the place is uniform. Up to ten such pairs are
    tried until one fits; after that the box is the largest central one whose ratio is admitted. These are
    the rules of torchvision's ``RandomResizedCrop`` (with other random numbers).

    Args:
        count: number of boxes, at least 0.
        height: height of the images in pixels.
        width: width of the images in pixels.
        generator: source of the ``22 * count`` uniform numbers.
        scale: smallest and largest share of the area, 0 < smallest <= largest.
        ratio: smallest and largest width / height, likewise.

    Returns:
        int64 tensor (count, 4) on the generator's device: top, left, height, width of each box.

    Raises:
        ValueError: a size below 1, or a range that is not one.

    Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.

    Example:
        >>> boxes = sample_crops(1000, 32, 32, torch.Generator().manual_seed(0))
        >>> bool((boxes[:, :2] + boxes[:, 2:] <= 32).all()), bool((boxes[:, 2:] >= 1).all())
        (True, True)
    """
    if count < 0 or height < 1 or width < 1:
        raise ValueError(f"count must be at least 0 and sizes at least 1, got {count}, {height} x {width}")
    _check_range("scale", scale)
    _check_range("ratio", ratio)
    tries = _uniform((count, _ATTEMPTS, 2), generator)
    place = _uniform((count, 2), generator)

    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fitting = fits.any(1)
    fallback_height, fallback_width = _central(height, width, ratio)
    h = torch.where(fitting, heights.gather(1, first)[:, 0], fallback_height)
    w = torch.where(fitting, widths.gather(1, first)[:, 0], fallback_width)
    # A uniform number below 1 can still round up to the end of its range.
    top = (place[:, 0] * (height - h + 1)).floor().minimum(height - h)
    left = (place[:, 1] * (width - w + 1)).floor().minimum(width - w)
    top = torch.where(fitting, top, (height - fallback_height) // 2)
    left = torch.where(fitting, left, (width - fallback_width) // 2)
    return torch.stack([top, left, h, w], dim=1).to(torch.int64)


def crop_resize(
    images: Tensor, boxes: Tensor, size: tuple[int, int] | None = None, mirrored: Tensor | None = None
) -> Tensor:
    """Cut a box out of each image and enlarge it bilinearly to a common size.

    The result is that of cutting first and resizing then, with pixel centres at half-integers and the
    border of the *box* repeated (``torch.nn.functional.interpolate``, ``align_corners=False``), up to
    rounding; where the box is a whole image of the size asked for, the image is returned bit by bit.

    Args:
        images: (N, C, H, W), see `to_float`.
        boxes: integer tensor (N, 4): top, left, height, width, inside the images. (Boxes on an accelerator
            are not checked for that, since it would mean waiting for it.)
        size: height and width of the result, by default those of the images. It may not be smaller than
            they are: shrinking would need a low-pass filter.
        mirrored: bool tensor (N,), the images to be turned left to right; None for none.

    Returns:
        (N, C, *size), floating point.

    Raises:
        TypeError: see `to_float`; boxes that are not integers.
        ValueError: shapes that do not fit, a box outside its image, a smaller size.

    Example:
        >>> image = torch.arange(4.0).view(1, 1, 2, 2)
        >>> crop_resize(image, torch.tensor([[0, 1, 2, 1]]))
        tensor([[[[1., 1.],
                  [3., 3.]]]])
    """
    images = to_float(images)
    count, _, height, width = images.shape
    rows, columns = (height, width) if size is None else size
    if rows < height or columns < width:
        raise ValueError(f"size {rows} x {columns} is smaller than the images, {height} x {width}")
    _check_boxes(boxes, count, height, width)
    if mirrored is not None and (mirrored.dtype != torch.bool or mirrored.shape != (count,)):
        raise ValueError(f"mirrored must be ({count},) of bool, got {mirrored.dtype} of {tuple(mirrored.shape)}")
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)

    def positions(start: Tensor, extent: Tensor, number: int) -> Tensor:
        """Where the result's pixel centres fall, (N, number), in pixels of the image."""
        start, extent = start.to(images.dtype)[:, None], extent.to(images.dtype)[:, None]
        centres = torch.arange(number, dtype=images.dtype, device=images.device) + 0.5
        return start + (centres * (extent / number) - 0.5).clamp_min(0).minimum(extent - 1)

    # grid_sample measures from -1 to 1 across the image, from edge to edge.
    y = (2 * positions(top, h, rows) + 1) / height - 1
    x = (2 * positions(left, w, columns) + 1) / width - 1
    if mirrored is not None:
        mirrored = mirrored.to(images.device, non_blocking=True)
        x = torch.where(mirrored[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], dim=-1)
    sampled = torch.nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    powers = height & (height - 1) == 0 and width & (width - 1) == 0
    if (rows, columns) != (height, width) or powers:
        return sampled
    # These positions are not exact in floating point (at 28 pixels, say); a whole image must be.
    whole = ((h == height) & (w == width))[:, None, None, None]
    if mirrored is not None:
        sampled = torch.where(whole & mirrored[:, None, None, None], images.flip(3), sampled)
        whole = whole & ~mirrored[:, None, None, None]
    return torch.where(whole, images, sampled)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    size: tuple[int, int] | None = None,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
) -> Tensor:
    """A random box of each image, enlarged to `size`: `sample_crops`, then `crop_resize`.

    Args:
        images: (N, C, H, W), see `to_float`.
        generator: source of the boxes.
        size: height and width of the result, by default those of the images; not smaller.
        scale: range of the share of the area.
        ratio: range of width / height.

    Returns:
        (N, C, *size), floating point.

    Raises:
        TypeError, ValueError: as `sample_crops` and `crop_resize`.

    Example:
        >>> images = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        >>> random_resized_crop(images, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 32, 32])
    """
    images = to_float(images)
    count, _, height, width = images.shape
    return crop_resize(images, sample_crops(count, height, width, generator, scale=scale, ratio=ratio), size)


def random_horizontal_flip(images: Tensor, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability `p`.

    Args:
        images: (N, C, H, W) of any dtype, which is kept.
        generator: source of N uniform numbers.
        p: probability from 0 to 1.

    Raises:
        ValueError: another shape, or a probability outside 0 to 1.

    Example:
        >>> images = torch.tensor([[[[1, 2]]]])
        >>> random_horizontal_flip(images, torch.Generator(), p=1.0)
        tensor([[[[2, 1]]]])
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}")
    flip = (_uniform((len(images),), generator) < p).to(images.device, non_blocking=True)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def soft_targets(
    labels: Tensor, num_classes: int, smoothing: float = 0.0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Class probabilities: 1 - smoothing on the label, plus smoothing / num_classes on every class.

    Args:
        labels: integer tensor (N,). (On an accelerator their range is not checked here, since it would mean
            waiting for it.)
        num_classes: number of classes K, at least 1.
        smoothing: from 0 (one-hot) to 1 (uniform).
        dtype: floating-point type of the result.

    Returns:
        (N, K), each row summing to 1.

    Raises:
        TypeError: labels that are not integers.
        ValueError: another shape, a label outside the classes, smoothing outside 0 to 1.

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7.

    Example:
        >>> soft_targets(torch.tensor([1]), 3, 0.3)
        tensor([[0.1000, 0.8000, 0.1000]])
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}")
    if num_classes < 1 or not 0 <= smoothing <= 1:
        raise ValueError(f"num_classes must be positive, smoothing 0 to 1; got {num_classes}, {smoothing}")
    if labels.device.type == "cpu" and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels range from {low} to {high}, outside 0 to {num_classes - 1}")
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, dtype=dtype, device=labels.device)
    return targets.scatter_(1, labels.to(torch.int64)[:, None], 1 - smoothing + off)


def sample_beta(alpha: float, generator: torch.Generator) -> Tensor:
    """Draw from the symmetric beta distribution Beta(alpha, alpha).

    With U and V uniform, t = sqrt(U^(-1/alpha) - 1) cos(2 pi V) makes t * sqrt(2 alpha) follow Student's
    distribution with 2 alpha degrees of freedom, and (1 + t / sqrt(1 + t^2)) / 2 Beta(alpha, alpha): exact
    for every alpha, from two uniform numbers, without rejection.

    Args:
        alpha: positive and finite. (Below about 0.001 nearly all values round to 0 or 1.)
        generator: source of the two uniform numbers.

    Returns:
        float64 tensor without axes, from 0 to 1, on the generator's device.

    Raises:
        ValueError: alpha is not positive and finite.

    Source: Bailey, Polar generation of random variates with the t-distribution, Math. Comp. 62, 1994.

    Example:
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


def mixup(images: Tensor, targets: Tensor, generator: torch.Generator, *, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with those at the mirrored place in the batch, in one random proportion.

    lambda ~ Beta(alpha, alpha), once for the batch; result i is lambda * i + (1 - lambda) * (N - 1 - i).
    That is mixup per batch as in timm; the middle one of an odd batch is mixed with itself.

    Args:
        images: (N, ...), floating point.
        targets: (N, K), floating point, see `soft_targets`.
        generator: source of lambda.
        alpha: positive; 0.8 in the recipe of the paper.

    Returns:
        (images, targets), new tensors of the same shapes and dtypes.

    Raises:
        TypeError: images or targets that are not floating point.
        ValueError: different numbers of images and targets, targets not (N, K), alpha not positive.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018.

    Example:
        >>> images, targets = torch.tensor([[0.0], [1.0]]), torch.eye(2)
        >>> mixed, soft = mixup(images, targets, torch.Generator().manual_seed(0), alpha=1.0)
        >>> bool(torch.allclose(mixed[:, 0], soft[:, 1]))
        True
    """
    if not (images.is_floating_point() and targets.is_floating_point()):
        raise TypeError(f"images and targets must be floating point, got {images.dtype}, {targets.dtype}")
    if targets.ndim != 2 or images.ndim < 1 or len(images) != len(targets):
        raise ValueError(
            f"images (N, ...) and targets (N, K) needed, got {tuple(images.shape)}, {tuple(targets.shape)}"
        )
    weight = sample_beta(alpha, generator)

    def mix(values: Tensor) -> Tensor:
        return values.flip(0).lerp_(values, weight.to(values.dtype).to(values.device, non_blocking=True))

    return mix(images), mix(targets)


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation of a batch: crop, flip, normalise, smooth the labels, mix.

    The defaults are the recipe for CIFAR of Compute Better Spent (ICML 2024). Each step can be switched off.
    Evaluation takes `normalize` alone.

    Attributes:
        mean: of each channel, see `normalize`.
        std: of each channel.
        num_classes: number of classes K.
        crop_scale: range of the share of the area, None for no crop.
        crop_ratio: range of width / height of the crop.
        flip: probability of mirroring; 0 draws nothing.
        mixup_alpha: alpha of `mixup`; 0 for none.
        smoothing: label smoothing.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> augment = Augmentation(mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=10)
        >>> images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
        >>> mixed, targets = augment(images, labels, torch.Generator().manual_seed(0))
        >>> mixed.shape, targets.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]))
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    crop_scale: tuple[float, float] | None = CROP_SCALE
    crop_ratio: tuple[float, float] = CROP_RATIO
    flip: float = 0.5
    mixup_alpha: float = 0.8
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"as many means as positive stds are needed, got {self.mean}, {self.std}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.crop_scale is not None:
            _check_range("crop_scale", self.crop_scale)
        _check_range("crop_ratio", self.crop_ratio)
        for name, value in (("flip", self.flip), ("smoothing", self.smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if not 0 <= self.mixup_alpha < math.inf:
            raise ValueError(f"mixup_alpha must be finite and at least 0, got {self.mixup_alpha}")

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            images: (N, C, H, W), see `to_float`.
            labels: integer tensor (N,) on the same device.
            generator: source of all randomness, in the order crop, flip, mixup.

        Returns:
            (images, targets): (N, C, H, W) floating point, and (N, K) of the same dtype.

        Raises:
            TypeError, ValueError: as the single steps.
        """
        to_float(images[:0])  # the errors of it
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels; their numbers must be equal")
        count, _, height, width = images.shape
        boxes = mirrored = None
        if self.crop_scale is not None:
            boxes = sample_crops(count, height, width, generator, scale=self.crop_scale, ratio=self.crop_ratio)
        if self.flip:
            mirrored = _uniform((count,), generator) < self.flip
        if images.device.type == "cpu":
            made = torch.empty(images.shape, dtype=images.dtype if images.is_floating_point() else torch.float32)
            for first in range(0, count, _CACHED):
                part = slice(first, first + _CACHED)
                made[part] = self._views(
                    images[part],
                    None if boxes is None else boxes[part],
                    None if mirrored is None else mirrored[part],
                )
        else:
            made = self._views(images, boxes, mirrored)
        targets = soft_targets(labels, self.num_classes, self.smoothing, dtype=made.dtype)
        return mixup(made, targets, generator, alpha=self.mixup_alpha) if self.mixup_alpha else (made, targets)

    def _views(self, images: Tensor, boxes: Tensor | None, mirrored: Tensor | None) -> Tensor:
        """Images cropped, turned and normalised."""
        if boxes is not None:
            images = crop_resize(images, boxes, mirrored=mirrored)
        elif mirrored is not None:
            mirrored = mirrored.to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return normalize(images, self.mean, self.std)


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype).view(-1, 1, 1).to(images.device, non_blocking=True)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers from 0 to below 1; float64, because single precision would round positions."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _central(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose width / height is in the range, up to rounding."""
    if width / height < ratio[0]:
        return max(1, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, max(1, round(height * ratio[1]))
    return height, width


def _check_range(name: str, values: tuple[float, float]) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] < math.inf:
        raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, got {values}")


def _check_boxes(boxes: Tensor, count: int, height: int, width: int) -> None:
    if boxes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"boxes must be an integer tensor, got {boxes.dtype}")
    if tuple(boxes.shape) != (count, 4):
        raise ValueError(f"boxes must have shape ({count}, 4), got {tuple(boxes.shape)}")
    if boxes.device.type != "cpu":
        return
    ends = boxes[:, :2] + boxes[:, 2:]
    limits = torch.tensor([height, width])
    outside = ((boxes[:, :2] < 0) | (boxes[:, 2:] < 1) | (ends > limits)).any(1)
    if bool(outside.any()):
        box = boxes[outside][0].tolist()
        raise ValueError(f"box {box} (top, left, height, width) is not inside an image of {height} x {width}")
