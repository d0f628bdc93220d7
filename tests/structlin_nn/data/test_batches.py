"""The order of batches, and continuing in it."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structlin_nn.data import Batches, epoch_order


def make(size=11, batch_size=3, *, seed=5, drop_last=False, shuffle=True):
    images = np.arange(size * 2, dtype=np.uint8).reshape(size, 1, 2, 1)
    return Batches(images, np.arange(size), batch_size, seed=seed, drop_last=drop_last, shuffle=shuffle)


def labels_of(batches):
    return [labels.tolist() for _, labels in batches]


def samples(found):
    return list(itertools.chain.from_iterable(found))


def test_the_order_is_pinned():
    # These numbers are a promise to saved runs: they may never change.
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(7, 3, 10).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]


@given(st.integers(0, 2**70), st.integers(0, 10**6), st.integers(0, 300))
def test_an_order_is_a_permutation(seed, epoch, size):
    order = epoch_order(seed, epoch, size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


def test_orders_differ_and_are_uniform():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    counts = np.zeros((4, 4), int)
    for epoch in range(4000):
        counts[np.arange(4), epoch_order(1, epoch, 4)] += 1
    # 16 cells of 1000 on average; the standard deviation of each is 27.
    assert abs(counts - 1000).max() < 5 * 27


@pytest.mark.parametrize(("size", "batch_size", "whole", "rest"), [(11, 3, 3, 2), (12, 3, 4, 0), (2, 3, 0, 2)])
def test_an_epoch_gives_every_sample_once(size, batch_size, whole, rest):
    batches = make(size, batch_size)
    found = labels_of(batches)
    assert [len(b) for b in found] == [batch_size] * whole + [rest] * bool(rest)
    assert len(batches) == len(found)
    assert sorted(samples(found)) == list(range(size))
    assert samples(found) == epoch_order(5, 0, size).tolist()
    assert (batches.epoch, batches.position) == (1, 0)
    assert samples(labels_of(batches)) == epoch_order(5, 1, size).tolist()


def test_drop_last():
    batches = make(drop_last=True)
    assert len(batches) == 3
    assert samples(labels_of(batches)) == epoch_order(5, 0, 11)[:9].tolist()
    assert samples(labels_of(batches)) == epoch_order(5, 1, 11)[:9].tolist()


def test_without_shuffling_the_order_is_that_of_the_data():
    batches = make(shuffle=False)
    for _ in range(2):
        assert labels_of(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_images_stay_with_their_labels():
    batches = make()
    for images, labels in batches:
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, batches.images[labels])


def test_torch_batches_equal_numpy_batches():
    plain = make()
    tensors = Batches(torch.from_numpy(plain.images), torch.from_numpy(plain.labels), 3, seed=5, drop_last=False)
    for (a, b), (c, d) in zip(plain, tensors, strict=True):
        assert isinstance(c, torch.Tensor)
        assert c.dtype == torch.uint8
        assert d.dtype == torch.int64
        np.testing.assert_array_equal(a, c.numpy())
        np.testing.assert_array_equal(b, d.numpy())


@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 25), st.integers(0, 2**40))
def test_continuing_anywhere_gives_the_same_batches(size, batch_size, drop_last, shuffle, done, seed):
    if drop_last and size < batch_size:
        batch_size = size
    options = {"drop_last": drop_last, "shuffle": shuffle, "seed": seed}

    def stream(batches):
        while True:
            yield from (labels.tolist() for _, labels in batches)

    first = make(size, batch_size, **options)
    original = stream(first)
    for _ in range(done):
        next(original)
    saved = json.loads(json.dumps(first.state_dict()))
    expected = [next(original) for _ in range(12)]
    other = make(size, batch_size, **options)
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    continued = stream(other)
    assert [next(continued) for _ in range(12)] == expected


def test_the_state_inside_the_loop_counts_the_batch_at_hand():
    batches = make()
    states = [(batches.epoch, batches.position) for _ in batches]
    assert states == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_a_loop_left_early_goes_on():
    batches = make()
    whole = labels_of(make())
    found = []
    for _, labels in batches:
        found.append(labels.tolist())
        if len(found) == 2:
            break
    assert found + labels_of(batches) == whole


def test_loading_a_state_inside_a_loop():
    batches = make()
    state = batches.state_dict()
    again = []
    for _, labels in batches:
        again.append(labels.tolist())
        if len(again) == 2:
            batches.load_state_dict(state)
    whole = labels_of(make())
    assert again == whole[:2] + whole
    count = 0
    for _ in batches:
        count += 1
        batches.load_state_dict({**state, "epoch": 9})
    assert count == 1
    assert samples(labels_of(batches)) == epoch_order(5, 9, 11).tolist()


def test_indices():
    batches = make()
    assert batches.indices(4, 1).tolist() == epoch_order(5, 4, 11)[3:6].tolist()
    assert batches.indices(4, 3).tolist() == epoch_order(5, 4, 11)[9:].tolist()
    batches.indices(0, 0)[:] = -1
    assert batches.indices(0, 0).tolist() == epoch_order(5, 0, 11)[:3].tolist()
    with pytest.raises(ValueError, match="position 4 is outside an epoch of 4 batches"):
        batches.indices(0, 4)
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        batches.indices(-1, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 6}, ValueError, "seed is 5 here and 6 in the state"),
        ({"size": 12}, ValueError, "size is 11 here and 12"),
        ({"batch_size": 4}, ValueError, "batch_size is 3 here and 4"),
        ({"drop_last": True}, ValueError, "drop_last is False here and True"),
        ({"shuffle": False}, ValueError, "shuffle is True here and False"),
        ({"position": 4}, ValueError, "position 4 is outside an epoch of 4"),
        ({"position": -1}, ValueError, "position must not be negative"),
        ({"epoch": 0.5}, TypeError, "epoch must be an integer, got 0.5"),
        ({"more": 1}, ValueError, "a state has the keys"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    batches = make()
    with pytest.raises(error, match=message):
        batches.load_state_dict({**make().state_dict(), "epoch": 2, "position": 1, **change})
    assert (batches.epoch, batches.position) == (0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.arange(4)}, ValueError, "5 images and 4 labels"),
        ({"images": np.zeros(0), "labels": np.zeros(0)}, ValueError, "no samples"),
        ({"batch_size": 0}, ValueError, "at least 1, got 0"),
        ({"batch_size": -1}, ValueError, "must not be negative, got -1"),
        ({"batch_size": 2.0}, TypeError, "integer, got 2.0"),
        ({"batch_size": True}, TypeError, "integer, got True"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"drop_last": 1}, TypeError, "drop_last must be True or False, got 1"),
        ({"shuffle": "yes"}, TypeError, "shuffle must be True or False"),
        ({"batch_size": 6, "drop_last": True}, ValueError, "5 samples are less than one batch of 6"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"images": np.zeros(5), "labels": np.arange(5), "batch_size": 2, "seed": 0, "drop_last": False}
    with pytest.raises(error, match=message):
        Batches(**{**arguments, **change})
