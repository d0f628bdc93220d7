"""Augmentation against independent float64 computations, one image at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from structlin_nn.data.augment import (
    Augmentation,
    crop_resize,
    mixup,
    normalize,
    sample_beta,
    sample_crops,
    soft_targets,
)

RECIPE = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "num_classes": 10}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def resize_by_interp(crop, rows, columns):
    """Bilinear enlargement of (C, h, w) by np.interp along each axis, in float64."""
    _, h, w = crop.shape
    y = (np.arange(rows) + 0.5) * h / rows - 0.5
    x = (np.arange(columns) + 0.5) * w / columns - 0.5
    wide = np.stack([[np.interp(x, np.arange(w), line) for line in channel] for channel in crop])
    return np.stack([np.stack([np.interp(y, np.arange(h), c) for c in plane.T], 1) for plane in wide])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.uint8, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_normalize(dtype, tolerance):
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    images = pixels(4, 3, 5, 6)
    values = images.double().numpy() / 255
    given_images = images if dtype == torch.uint8 else torch.from_numpy(values).to(dtype)
    result = normalize(given_images, mean, std)
    assert result.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    expected = (values - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(result.numpy(), expected, rtol=tolerance, atol=tolerance)


def one_crop(rng, height, width, scale, ratio):
    """The rule for one box, tried in a loop; None where ten attempts fail."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return None


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (24, 40)])
def test_boxes_are_distributed_as_by_the_sequential_rule(height, width):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = sample_crops(20000, height, width, generator()).numpy()
    rng = np.random.default_rng(0)
    loop = [one_crop(rng, height, width, scale, ratio) for _ in range(20000)]
    expected = np.array([box for box in loop if box is not None])
    for values in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: height - b[:, 0] - b[:, 2],
        lambda b: width - b[:, 1] - b[:, 3],
    ):
        assert stats.ks_2samp(values(boxes), values(expected)).pvalue > 1e-3


def test_area_is_uniform_and_ratio_log_uniform_where_every_box_fits():
    size = 4000
    boxes = sample_crops(20000, size, size, generator(1), scale=(0.1, 0.5), ratio=(0.6, 1.5)).double().numpy()
    share = boxes[:, 2] * boxes[:, 3] / size**2
    assert stats.kstest(share, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
    low, high = math.log(0.6), math.log(1.5)
    assert stats.kstest(log_ratio, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for start, extent in ((0, 2), (1, 3)):
        place = boxes[:, start] / (size - boxes[:, extent])
        assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(share, log_ratio)[0, 1]) < 0.03


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.01, 3.0),
    st.floats(0.0, 2.0),
    st.floats(0.2, 2.0),
    st.floats(1.0, 3.0),
    st.integers(0, 1000),
)
def test_boxes_are_inside_the_image(height, width, smallest, more, narrow, factor, seed):
    boxes = sample_crops(
        17, height, width, generator(seed), scale=(smallest, smallest + more), ratio=(narrow, narrow * factor)
    )
    assert boxes.shape == (17, 4)
    assert boxes.dtype == torch.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "box"),
    [
        # Area of the whole image at another ratio never fits: the fallback.
        ((32, 32), (1.0, 1.0), (1.2, 1.3), [2, 0, 27, 32]),
        ((32, 32), (1.0, 1.0), (0.5, 0.6), [0, 6, 32, 19]),
        ((20, 40), (5.0, 5.0), (0.75, 4 / 3), [0, 6, 20, 27]),
        ((40, 20), (5.0, 5.0), (0.75, 4 / 3), [6, 0, 27, 20]),
        ((20, 24), (5.0, 5.0), (0.75, 4 / 3), [0, 0, 20, 24]),
        # The only box that fits.
        ((20, 24), (1.0, 1.0), (1.2, 1.2), [0, 0, 20, 24]),
    ],
)
def test_boxes_with_one_possible_outcome(size, scale, ratio, box):
    boxes = sample_crops(5, *size, generator(), scale=scale, ratio=ratio)
    assert boxes.tolist() == [box] * 5


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_soft_targets(smoothing):
    labels = torch.tensor([3, 0, 2], dtype=torch.int32)
    targets = soft_targets(labels, 5, smoothing, dtype=torch.float64)
    expected = (1 - smoothing) * np.eye(5)[labels.numpy()] + smoothing / 5
    np.testing.assert_allclose(targets.numpy(), expected, rtol=0, atol=1e-15)
    assert soft_targets(labels, 5).dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 3.0, 40.0])
def test_beta(alpha):
    rng = generator(3)
    values = torch.stack([sample_beta(alpha, rng) for _ in range(3000)]).numpy()
    assert ((values >= 0) & (values <= 1)).all()
    assert stats.kstest(values, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-8, 1e-3, 1e8])
def test_beta_at_extreme_alpha_is_finite(alpha):
    rng = generator()
    values = torch.stack([sample_beta(alpha, rng) for _ in range(300)])
    distance = (values - 0.5).abs()
    assert ((distance - (0.5 if alpha < 1 else 0.0)).abs() < 1e-3).double().mean() > 0.95


def test_beta_refuses():
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be positive and finite"):
            sample_beta(alpha, generator())


@pytest.mark.parametrize("count", [6, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_mixup(count, dtype, tolerance):
    images = torch.rand(count, 2, 3, 4, dtype=dtype)
    labels = torch.arange(count) % 5
    weight = float(sample_beta(0.8, generator(4)))
    mixed, targets = mixup(images, soft_targets(labels, 5, 0.3, dtype=dtype), generator(4), alpha=0.8)
    assert mixed.dtype == targets.dtype == dtype
    np.testing.assert_allclose(targets.sum(1), 1, atol=tolerance)
    for i in range(count):
        j = count - 1 - i
        expected = weight * images[i].double() + (1 - weight) * images[j].double()
        np.testing.assert_allclose(mixed[i], expected, atol=tolerance)
        wanted = np.full(5, 0.3 / 5)
        wanted[labels[i]] += 0.7 * weight
        wanted[labels[j]] += 0.7 * (1 - weight)
        np.testing.assert_allclose(targets[i], wanted, atol=tolerance)


def test_augmentation_switched_off_is_normalisation():
    images, labels = pixels(5, 3, 8, 9), torch.arange(5)
    plain = Augmentation(**RECIPE, crop=False, flip=0.0, mixup_alpha=0.0, smoothing=0.0)
    rng = generator()
    before = rng.get_state()
    found, targets = plain(images, labels, rng)
    assert torch.equal(found, normalize(images, RECIPE["mean"], RECIPE["std"]))
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 10).float())
    assert torch.equal(rng.get_state(), before)


def test_augmentation_continues_from_a_saved_generator():
    augment, labels = Augmentation(**RECIPE), torch.arange(6)
    rng = generator()
    augment(pixels(6, 3, 16, 16), labels, rng)
    state = rng.get_state().clone()
    expected = [augment(pixels(6, 3, 16, 16, seed=k), labels, rng) for k in range(3)]
    other = torch.Generator()
    other.set_state(state)
    for k, (images, targets) in enumerate(expected):
        found = augment(pixels(6, 3, 16, 16, seed=k), labels, other)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], targets)


def test_augmentation_draws_a_fixed_number():
    rng, counted = generator(), generator()
    Augmentation(**RECIPE)(pixels(9, 3, 16, 16), torch.arange(9), rng)
    for shape in ((9, 10, 2), (9, 2), (9,), (2,)):
        torch.rand(shape, dtype=torch.float64, generator=counted)
    assert torch.equal(rng.get_state(), counted.get_state())


def test_augmentation_leaves_global_random_numbers_and_its_input_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = torch.rand(4, 3, 16, 16, generator=generator())
    kept = images.clone()
    Augmentation(**RECIPE)(images, torch.arange(4), generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": (1.0, 1.0)}, "means and positive stds"),
        ({"std": (1.0, 0.0, 1.0)}, "means and positive stds"),
        ({"num_classes": 0}, "num_classes 0 must be positive"),
        ({"flip": 1.5}, "flip must be from 0 to 1"),
        ({"smoothing": -0.1}, "smoothing must be from 0 to 1"),
        ({"mixup_alpha": -1.0}, "mixup_alpha -1.0 not below 0|mixup_alpha inf"),
        ({"mixup_alpha": math.inf}, "mixup_alpha -1.0 not below 0|mixup_alpha inf"),
    ],
)
def test_augmentation_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**{**RECIPE, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_seed_gives_the_same_on_the_device():
    images, labels = pixels(64, 3, 32, 32), torch.arange(64) % 10
    here = Augmentation(**RECIPE)(images, labels, generator(2))
    there = Augmentation(**RECIPE)(images.cuda(), labels.cuda(), generator(2))
    assert there[0].is_cuda
    assert there[1].is_cuda
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-4)


def test_normalize_refuses():
    images = pixels(4, 3, 5, 6)
    for mean, std in (((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, 0), (1, math.nan, 1))):
        with pytest.raises(ValueError, match="3 means and positive stds are needed"):
            normalize(images, mean, std)
    with pytest.raises(TypeError, match=r"uint8, float32 or float64, got torch\.float16"):
        normalize(images.half(), (0,) * 3, (1,) * 3)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(3, 5, 6\)"):
        normalize(images[0], (0,) * 3, (1,) * 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crop_against_cutting_and_interpolating(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 14))
    boxes = []
    for _ in range(3):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        boxes.append([data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w])
    images = torch.rand(3, 2, height, width, dtype=torch.float64, generator=generator(data.draw(st.integers(0, 99))))
    turned = torch.tensor([False, True, False])
    result = crop_resize(images, torch.tensor(boxes), turned)
    for image, (top, left, h, w), flip, found in zip(images.numpy(), boxes, turned, result.numpy(), strict=True):
        expected = resize_by_interp(image[:, top : top + h, left : left + w], height, width)
        np.testing.assert_allclose(found, expected[..., ::-1] if flip else expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crop_against_torch(height, width):
    images = pixels(20, 3, height, width).float() / 255
    boxes = sample_crops(20, height, width, generator())
    result = crop_resize(images, boxes)
    for image, (top, left, h, w), found in zip(images, boxes.tolist(), result, strict=True):
        cut = image[None, :, top : top + h, left : left + w]
        expected = torch.nn.functional.interpolate(cut, (height, width), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found[None], expected, rtol=0, atol=2e-5)


def test_the_crop_of_the_whole_image_is_the_image_bit_by_bit():
    images = torch.rand(5, 3, 32, 32)
    assert torch.equal(crop_resize(images, torch.tensor([[0, 0, 32, 32]] * 5)), images)
    with pytest.raises(ValueError, match=r"boxes must have shape \(5, 4\), got \(4, 4\)"):
        crop_resize(images, torch.zeros(4, 4, dtype=torch.int64))


def test_neighbours_are_mixed_however_a_batch_is_shared():
    images, targets = torch.rand(8, 3), torch.rand(8, 5)
    whole = mixup(images, targets, generator(1), alpha=0.8, neighbours=True)
    parts = [
        mixup(images[part], targets[part], generator(1), alpha=0.8, neighbours=True)
        for part in (slice(0, 2), slice(2, 8))
    ]
    weight = float(sample_beta(0.8, generator(1)))
    for number, values in enumerate((images, targets)):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])
        expected = weight * values + (1 - weight) * values[[1, 0, 3, 2, 5, 4, 7, 6]]
        torch.testing.assert_close(whole[number], expected)
    with pytest.raises(ValueError, match="needs an even number of samples, got 7"):
        mixup(images[:7], targets[:7], generator(1), alpha=0.8, neighbours=True)


@pytest.mark.parametrize("count", [12, 300])  # 300: more than one part
def test_augmentation_is_its_steps_in_order(count):
    images, labels = pixels(count, 3, 32, 32), torch.arange(count) % 10
    rng = generator(7)
    boxes = sample_crops(count, 32, 32, rng)
    turned = torch.rand(count, generator=rng, dtype=torch.float64) < 0.5
    expected = crop_resize(images.float() / 255, boxes)
    expected = torch.where(turned[:, None, None, None], expected.flip(3), expected)
    expected = normalize(expected, RECIPE["mean"], RECIPE["std"])
    expected, targets = mixup(expected, soft_targets(labels, 10, 0.3), rng, alpha=0.8)
    found = Augmentation(**RECIPE)(images, labels, generator(7))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(found[1], targets)
    assert not torch.equal(found[0], Augmentation(**RECIPE)(images, labels, generator(8))[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_augmentation_of_flips_alone(dtype):
    images = pixels(200, 3, 6, 7) if dtype == torch.uint8 else torch.rand(200, 3, 6, 7, dtype=dtype)
    plain = Augmentation(**RECIPE, crop=False, mixup_alpha=0.0)
    found, _ = plain(images, torch.zeros(200, dtype=torch.int64), generator(3))
    straight = normalize(images, RECIPE["mean"], RECIPE["std"])
    turned = (found == straight.flip(3)).flatten(1).all(1)
    assert (turned | (found == straight).flatten(1).all(1)).all()
    assert 60 < turned.sum() < 140
    with pytest.raises(ValueError, match=r"labels \(N,\) needed, got \(200, 3, 6, 7\), \(3,\)"):
        plain(images, torch.arange(3), generator())
