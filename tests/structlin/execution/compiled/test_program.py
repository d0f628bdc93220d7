"""Programs by themselves, on arrays of NumPy's: for one token, and in blocks of any size."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

import structlin as sl
from structlin._arrays import ops
from structlin.execution.compiled import _loops, _program, _rules, _turns
from structlin.execution.compiled._limits import Limits, limits
from structlin.execution.compiled._program import NAMES, make_program
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import AVX2, AVX512, AVX512_BF16, host
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.machine import Caches
from structlin.execution.products import products

HOST = host()
pytestmark = pytest.mark.skipif(HOST is None, reason="nothing is compiled here")
TARGETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512_BF16}
STRUCTURES = {
    "btt1": sl.design("block_tensor_train", (35 * 4, 6 * 4), rank=1),
    "btt3": sl.design("block_tensor_train", (256, 192), rank=3),
    "monarch": sl.design("monarch", (96, 128), blocks=4),
    "regrouped": sl.design("monarch", (61, 59), blocks=4),
    "low_rank": sl.design("low_rank", (70, 66), rank=8),
    "tensor_train": sl.design("tensor_train", (210, 120), cores=3, rank=2),
    "kronecker": sl.Structure.parse("ab,ca->cb; cb,db->cd", a=8, b=10, c=7, d=9, d_in=77, d_out=61),  # padded, cut
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture(params=TARGETS)
def target(request):
    if not set(TARGETS[request.param].features) <= set(HOST.features):
        pytest.skip(f"this processor is not {request.param}")
    return TARGETS[request.param]


def program_of(structure, dtype, target, rows=True, **options):
    sizes = (structure.steps, structure.sizes, structure.d_in, structure.d_out)
    return make_program.__wrapped__(*sizes, rows, dtype, target, **options)


def problem(structure, dtype, tokens):
    """x, the gradient of the output, bias and factors."""
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    shapes = (tokens, structure.d_in), (tokens, structure.d_out), (structure.d_out,)
    return *(torch.randn(shape, generator=generator).to(factors[0].dtype) for shape in shapes), factors


def run(made, table, tokens, packed=True):
    """A pass, from tables of tensors, with scratch memory as its third entry."""
    scratch = np.full(made.scratch + LINE, 255, np.uint8)
    places = [tensor.data_ptr() for tensor in table]
    places.insert(2, -(-scratch.ctypes.data // LINE) * LINE)
    count = [] if packed else [tokens]
    made.run((ctypes.c_void_p * len(places + count))(*places, *count), *([0, tokens, tokens] if packed else []))


def close(found, expected, dtype):
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STRUCTURES)
def test_factors_that_are_read_as_they_are(name, dtype, target):
    """For one and for few tokens, with a bias and without; nothing is copied."""
    structure = STRUCTURES[name]
    program = program_of(structure, dtype, target, packed=False)
    assert (program is None) == (name == "regrouped")  # vectors along an axis that comes last in no two of the arrays
    if program is None:
        return
    assert program.packing("forward", tuple(range(len(structure.steps)))).total == 0
    for tokens in (1, 2, 5, 33, 61):
        x, _, bias, factors = problem(structure, dtype, tokens)
        expected = products(structure, [f.double() for f in factors], x.double(), ops("torch"))
        for added in (False, True):
            y = torch.full((tokens, structure.d_out), torch.nan, dtype=x.dtype)
            widened = torch.nn.functional.pad(bias, (0, program.schedule.widths[-1] - structure.d_out))
            more = [widened.to(program.dtype)] if added else []
            run(program.forward(added, False), [x, y, *more, *factors], tokens, packed=False)
            close(y, expected + (bias.double() if added else 0), dtype)


def whole_problem(structure, dtype, tokens):
    x, gy, _, factors = problem(structure, dtype, tokens)
    doubles = [t.double().requires_grad_() for t in (x, *factors)]
    expected = products(structure, doubles[1:], doubles[0], ops("torch"))
    wanted = (expected.detach(), *torch.autograd.grad(expected, doubles, gy.double()))
    return x, gy, factors, wanted


def both_passes(chain, x, gy, factors):
    needs = [True] * (1 + len(factors)) + [False]
    return chain.forward(x, factors), *chain.backward(gy, x, factors, needs)[:-1]


def chain_of(structure, rows=True, block=None):
    return FusedChain(structure.steps, structure.sizes, structure.d_in, structure.d_out, rows, block=block)


@pytest.mark.covering(2)
@pytest.mark.parametrize("size", [1, 7, 17, 36, 200])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STRUCTURES)
def test_blocks_of_any_size(name, dtype, rows, size):
    """Whether or not the rows of a tile divide them."""
    structure = STRUCTURES[name]
    x, gy, factors, wanted = whole_problem(structure, dtype, 101)
    turned = (lambda t: t) if rows else (lambda t: t.mT.contiguous())
    chain = chain_of(structure, rows, size)
    program = chain.program(dtype)
    if program is None:
        assert dtype in ("bfloat16", "float16")
        assert not rows
        return
    assert size <= program.block < size + (2 if rows else 16)
    found = both_passes(chain, turned(x), turned(gy), factors)
    for k, (got, exact) in enumerate(zip(found, wanted, strict=True)):
        close(turned(got) if k < 2 else got, exact, dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize("field", ["vectors", "block", "sums", "sums_block", "factors", "factors_block"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_limits_change_no_result(name, field, monkeypatch):
    """What only large factors lead to otherwise."""
    changed = {field: 0}
    if field.endswith("_block"):
        changed[field.removesuffix("_block")] = 0
    for module in (_loops, _program, _rules):
        monkeypatch.setattr(module, "limits", lambda: replace(limits(), **changed))
    _program.make_program.cache_clear()
    try:
        structure = STRUCTURES[name]
        x, gy, factors, wanted = whole_problem(structure, "float64", 157)
        for got, exact in zip(both_passes(chain_of(structure), x, gy, factors), wanted, strict=True):
            close(got, exact, "float64")
    finally:
        _program.make_program.cache_clear()


EXCHANGED = {
    **STRUCTURES,
    "btt9": sl.design("block_tensor_train", (12 * 20, 20 * 9), rank=9),
    "btt2": sl.design("block_tensor_train", (40 * 33, 11 * 36), rank=2),
    "monarch8": sl.design("monarch", (16 * 13, 8 * 44), blocks=8),
}


COPIES = {  # of low rank and tensor trains no activation is read at a distance, or along axes that one copy exchanges
    **{"btt1": 4, "btt2": 4, "btt3": 4, "btt9": 4, "monarch": 3, "monarch8": 2, "regrouped": 2, "kronecker": 2},
    **{"low_rank": 0, "tensor_train": 0},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", EXCHANGED)
def test_copies_with_exchanged_axes(name, dtype, kept, monkeypatch):
    """Of all activations that products read at a distance, however small, with few registers."""
    if not set(AVX2.features) <= set(HOST.features):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(_turns, "limits", lambda: replace(limits(), vectors=0))
    structure, tokens = EXCHANGED[name], 53
    program = program_of(structure, dtype, AVX2)
    x, gy, factors, wanted = whole_problem(structure, dtype, tokens)
    schedule, last = program.schedule, len(structure.steps)
    turns = [operation.turn for operation in (*schedule.forward, *schedule.back, *schedule.gradients)]
    assert len([turn for turn in turns if turn]) == COPIES[name]
    if kept and last != 2:
        return
    arranged = {
        kind: [arrange(factors[k], getattr(schedule, kind)[k].order, program) for k in range(last)]
        for kind in ("forward", "back")
    }
    y, gx = (torch.full_like(t, torch.nan) for t in (gy, x))
    outside = getattr(torch, NAMES[program.outside])
    states = [torch.full((tokens, schedule.rows[1]), torch.nan, dtype=outside)] if kept else []
    run(program.forward(False, kept), [x, y, *arranged["forward"], *states], tokens)
    sums = [torch.zeros(f.numel(), dtype=program.dtype) for f in factors]
    again = [] if kept else arranged["forward"][:-1]
    made = program.backward((True, *[True] * last, False), kept)
    run(made, [x, gy, gx, *arranged["back"], *sums, *(states or again)], tokens)
    orders = [operation.order for operation in schedule.gradients]
    shapes = [[f.shape[axis] for axis in order] for f, order in zip(factors, orders, strict=True)]
    ordered = [
        total.view(shape).permute([order.index(axis) for axis in range(len(order))])
        for total, shape, order in zip(sums, shapes, orders, strict=True)
    ]
    for got, exact in zip((y, gx, *ordered), wanted, strict=True):
        close(got, exact, dtype)


def arrange(factor, order, program):
    return factor.permute(order).to(program.dtype).contiguous()


def test_copies_only_where_vectors_do_not_stay_in_cache(monkeypatch):
    """And with few registers: larger tiles read them less often."""
    structure = sl.design("block_tensor_train", (1024, 1024), rank=1)

    def copies(target, vectors):
        monkeypatch.setattr(_turns, "limits", lambda: replace(limits(), vectors=vectors))
        schedule = program_of(structure, "float32", target).schedule
        return [one.turn for one in (*schedule.forward, *schedule.back, *schedule.gradients) if one.turn]

    assert copies(AVX2, 1 << 20) == copies(AVX512, 1 << 10) == []
    found = copies(AVX2, 1 << 10)
    assert len(found) == 4
    assert {(turn.outer, turn.inner, turn.unit) for turn in found} == {(32, 32, 1)}


def test_blocks_by_the_size_of_the_cache(monkeypatch):
    """A larger second level of cache has room for the activations of more tokens."""
    structure, found = sl.design("block_tensor_train", (1024, 1024), rank=1), []
    for l2 in (256 << 10, 1 << 20, 2 << 20, 4 << 20):
        monkeypatch.setattr(_program, "limits", lambda l2=l2: Limits.of(Caches(32 << 10, l2, 16 << 20)))
        program = program_of(structure, "float32", AVX512)
        found.append((program.forward(False, False).block, program.backward((True, True, True, False), False).block))
    assert found == [(16, 16), (16, 16), (32, 16), (48, 48)]
