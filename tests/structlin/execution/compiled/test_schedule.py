"""The schedules of chains: every product has its multiplications, and reads and writes what the others do."""

import math

import numpy as np
import pytest

import structlin as sl
from structlin.execution.compiled._loops import _even, _runs
from structlin.execution.compiled._product import BYTES, max_rows
from structlin.execution.compiled._schedule import LINE, make_schedule, row
from structlin.execution.compiled._target import AVX2, AVX512_BF16
from structlin.testing import random_chain

WIDE, SHORT = AVX512_BF16, AVX2
CASES = {
    "dense": ((35, 22), {}),
    "low_rank": ((35, 22), {"rank": 4}),
    "kronecker": ((35, 66), {}),
    "tensor_train": ((210, 120), {"cores": 3, "rank": 2}),
    "block_tensor_train": ((35 * 4, 6 * 4), {"rank": 1}),
    "monarch": ((61, 59), {"blocks": 4}),
    "blast": ((15, 6), {"blocks": 3, "rank": 2}),
    "butterfly": ((64, 64), {}),
}


def schedule_of(structure, target, element="float", rows=True, pairs=False):
    return make_schedule(
        structure.steps, dict(structure.sizes), target, element, structure.d_in, structure.d_out, rows, pairs
    )


def multiplications(operation):
    """For one token."""
    p = operation.product
    axes = [p.across, *p.summed, *p.outer, *p.near, *(a for a in (p.down, p.along) if a is not None)]
    return math.prod(a.size or 1 for a in axes) * (2 if p.paired else 1)


@pytest.mark.parametrize(("target", "element"), [(WIDE, "float"), (WIDE, "double"), (SHORT, "float")])
@pytest.mark.parametrize("name", CASES)
def test_products_multiply_as_often_as_the_structure_says(name, target, element):
    shape, options = CASES[name]
    structure = sl.design(name, shape, **options)
    schedule = schedule_of(structure, target, element)
    macs = [f.numel * f.carried for f in structure.factors]
    for operations in (schedule.forward, schedule.back, schedule.gradients):
        assert [multiplications(operation) for operation in operations] == macs
    assert schedule.widths == (
        structure.d_in + structure.padding[0],
        *(math.prod(dict(structure.sizes)[a] for a in s.output) for s in structure.steps),
    )


def test_random_chains_have_schedules():
    """Most: for others some product would have no axis that vectors can run along."""
    found = 0
    for seed in range(60):
        structure = random_chain(np.random.default_rng(seed))
        schedule = schedule_of(structure, WIDE)
        if schedule is not None:
            found += 1
            assert sum(map(multiplications, schedule.forward)) == structure.macs
            for operation, factor in zip(schedule.forward, structure.factors, strict=True):
                assert sorted(operation.order) == list(range(len(factor.shape)))
    assert found >= 40


def test_pairs_of_bfloat16_are_taken_where_neighbours_are_summed():
    kinds = {
        ("block_tensor_train", 1): ["half", "zipped", "zipped", "half"],
        ("block_tensor_train", 2): ["half", "half", "half", "half"],
        ("low_rank", 20): ["half", "half", "half", "half"],
        ("tensor_train", 8): ["zipped", "half", "zipped", "half"],
    }
    for (name, rank), reads in kinds.items():
        structure = sl.design(name, (16 * 36, 8 * 50), rank=rank)
        schedule = schedule_of(structure, WIDE, pairs=True)
        assert [o.reads for o in (*schedule.forward, *schedule.back)] == reads
        assert all(o.product.paired == (o.reads != "plain") for o in (*schedule.forward, *schedule.back))
        assert [multiplications(o) for o in schedule.forward] == [f.numel * f.carried for f in structure.factors]
        # What is written for a zipped reader says along which axis.
        assert [o.zips is not None for o in schedule.forward] == [k == "zipped" for k in [*reads[1:2], ""]]
        assert [o.enters is not None for o in schedule.forward] == [reads[0] == "zipped", False]


def test_pairs_of_an_input_are_not_made_where_it_is_padded():
    structure = sl.design("kronecker", (20, 24))
    for d_in, form in ((24, "zipped"), (23, "plain")):
        schedule = make_schedule(
            structure.steps, dict(structure.sizes), WIDE, "float", d_in, structure.d_out, True, pairs=True
        )
        assert schedule.forward[0].reads == form


def test_odd_sizes_are_not_paired():
    structure = sl.design("block_tensor_train", (15 * 35, 9 * 49), rank=3)
    schedule = schedule_of(structure, WIDE, pairs=True)
    assert {o.reads for o in (*schedule.forward, *schedule.back)} == {"plain"}


@pytest.mark.parametrize("element", ["float", "double"])
@pytest.mark.parametrize("width", [1, 16, 17, 1024, 2304])
def test_rows_are_an_odd_number_of_cache_lines(width, element):
    found = row(width, element)
    lines, rest = divmod(found * BYTES[element], LINE)
    assert found >= width
    assert rest == 0
    assert lines % 2 == 1


def test_tiles_fit_the_registers():
    for target in (WIDE, SHORT):
        for vectors in (1, 2, 3):
            rows = max_rows(target, vectors)
            assert rows * vectors + vectors + 1 <= target.registers


@pytest.mark.parametrize("total", range(1, 40))
@pytest.mark.parametrize("most", [1, 3, 9])
def test_parts_are_of_about_one_size(total, most):
    parts = _even(total, most)
    assert sum(parts) == total
    assert len(parts) == math.ceil(total / most)
    assert max(parts) <= most
    assert len(set(parts[:-1])) <= 1
    assert [i for starts, size in _runs(total, most) for s in starts[::size] for i in range(s, s + size)] == [
        *range(total)
    ]
