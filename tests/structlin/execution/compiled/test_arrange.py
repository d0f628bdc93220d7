"""Copies in other orders of axes by compiled code, beside NumPy's transpose."""

import ctypes
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin.execution.compiled._arrange import Arrangement, arrangeable, load_copies
from structlin.execution.compiled._target import host

pytestmark = pytest.mark.skipif(host() is None, reason="nothing is compiled here")
SHAPES = st.lists(st.integers(1, 37), min_size=1, max_size=4).filter(lambda shape: math.prod(shape) < 20000)


def copied(arrangement, kinds, original, made):
    """The copy, in shares of different sizes, with numbers around it that must stay as they are."""
    room = np.full(made.size + 2 * 16, 7, made.dtype)
    table = (ctypes.c_void_p * 2)(original.ctypes.data, room.ctypes.data + 16 * made.itemsize)
    run = load_copies([(arrangement, *kinds)], host(), "double" if kinds[0] == "double" else "float")
    for share in ((1, 3), (0, 1), (3, 4)):
        run(table, *share, 4)
    assert (room[:16] == 7).all()
    assert (room[-16:] == 7).all()
    return room[16:-16].reshape(made.shape)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, data=st.data(), kind=st.sampled_from(["float", "double"]))
def test_there_and_back(shape, data, kind):
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    dtype = {"float": np.float32, "double": np.float64}[kind]
    original = np.arange(math.prod(shape), dtype=dtype).reshape(shape)
    expected = np.ascontiguousarray(original.transpose(order))
    there, back = Arrangement(tuple(shape), order), Arrangement(tuple(shape), order, back=True)
    assert there.trivial == back.trivial
    if there.trivial:
        assert (expected.ravel() == original.ravel()).all()
    np.testing.assert_array_equal(copied(there, (kind, kind), original, expected), expected)
    np.testing.assert_array_equal(copied(back, (kind, kind), expected, original), original)


def bfloat16(array):
    """The bits of numbers that bfloat16 can hold."""
    bits = array.astype(np.float32).view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    return (bits >> 16).astype(np.uint16)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, data=st.data(), last=st.integers(0, 2))
def test_pairs(shape, data, last):
    """Two neighbours of the axis before the last ``last`` ones lie side by side."""
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    moved = [shape[axis] for axis in order]
    across = math.prod(moved[len(moved) - last :]) if last else 1
    if not arrangeable(shape, order, across):
        return
    numbers = np.arange(math.prod(shape)) % 251 - 125  # exact in bfloat16
    original = bfloat16(numbers).reshape(shape)
    rows = original.transpose(order).reshape(-1, 2, across)
    expected = np.ascontiguousarray(rows.transpose(0, 2, 1))
    found = copied(Arrangement(tuple(shape), order, across), ("bfloat", "i32"), original, expected)
    np.testing.assert_array_equal(found, expected)


def test_bfloat16_and_float32():
    shape, order = (5, 18, 33), (2, 0, 1)
    numbers = (np.arange(math.prod(shape)) % 251 - 125).reshape(shape)
    original, expected = bfloat16(numbers), np.ascontiguousarray(numbers.transpose(order).astype(np.float32))
    found = copied(Arrangement(shape, order), ("bfloat", "float"), original, expected)
    np.testing.assert_array_equal(found, expected)
    back = copied(Arrangement(shape, order, back=True), ("float", "bfloat"), expected, original)
    np.testing.assert_array_equal(back, original)


def test_pairs_along_one_axis():
    assert arrangeable((4, 3, 5), (1, 0, 2), 5)
    assert not arrangeable((4, 3, 5), (0, 1, 2), 5)  # 3 is odd, though 12 is not
    assert not arrangeable((4, 3, 5), (1, 0, 2), 4)  # cuts an axis


@pytest.mark.parametrize("kinds", [("float", "float"), ("double", "double"), ("float", "bfloat"), ("bfloat", "float")])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 37), min_size=1, max_size=3).filter(lambda shape: math.prod(shape) < 5000),
    place=st.integers(0, 3), size=st.integers(1, 3), count=st.integers(1, 10), data=st.data(),
)  # fmt: skip
def test_slices(kinds, shape, place, size, count, data):
    """Of one axis, there and back: the other slices stay as they are, and nothing beyond the array is read."""
    shape.insert(min(place, len(shape)), size)
    axis = min(place, len(shape) - 1)
    whole = (*shape[:axis], size * count, *shape[axis + 1 :])
    number = data.draw(st.integers(0, count - 1))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    dtypes = {"float": np.float32, "double": np.float64, "bfloat": np.uint16}
    values = np.random.default_rng(1).integers(0, 200, whole).astype(np.float32)
    made = {kind: bfloat16(values) if kind == "bfloat" else values.astype(dtypes[kind]) for kind in kinds}
    original, element = made[kinds[0]], "double" if kinds[0] == "double" else "float"
    piece = (slice(None),) * axis + (slice(number * size, (number + 1) * size),)
    expected = np.ascontiguousarray(made[kinds[1]][piece].transpose(order))
    start = number * size * math.prod(shape[axis + 1 :])
    for back in (False, True):
        arrangement = Arrangement(tuple(shape), order, back=back, whole=whole)
        source, target = (expected, np.full_like(original, 7)) if back else (original, np.zeros_like(expected))
        ends = [source.ctypes.data, target.ctypes.data]
        ends[back] += start * original.itemsize
        run = load_copies([(arrangement, *(kinds[::-1] if back else kinds))], host(), element)
        for share in ((1, 3), (0, 1), (3, 4)):
            run((ctypes.c_void_p * 2)(*ends), *share, 4)
        if back:
            there = np.full_like(original, 7)
            there[piece] = original[piece]
            np.testing.assert_array_equal(target, there)
        else:
            np.testing.assert_array_equal(target, expected)
