"""Passes by tiles (AMX) against float64, with tiles emulated in memory; and the instructions that are made for them."""

import ctypes
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import emulated_tiles as emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import structlin as sl
from structlin import execution
from structlin._arrays import ops
from structlin.execution import blocks, choice, torch_ways
from structlin.execution.choice import Problem
from structlin.execution.compiled import _program, _rules, _target, _writer
from structlin.execution.compiled._product import Axis, Product
from structlin.execution.compiled._program import make_program
from structlin.execution.compiled._target import AVX512, AVX512_BF16, TILES, host, parsed, tiled_host, with_tiles
from structlin.execution.compiled._tiles import Turn, tiling, turned
from structlin.execution.compiled.block import make_block
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.products import products
from structlin.execution.torch_cpu import chain_of

pytestmark = pytest.mark.skipif(host() is None, reason="nothing is compiled here")
TARGET = with_tiles(AVX512_BF16)
TOLERANCE = 0.008  # of bfloat16, relative
STRUCTURES = {
    "btt1": sl.design("block_tensor_train", (256, 192), rank=1),  # copies with pairs exchanged one by one
    "btt4": sl.design("block_tensor_train", (256, 192), rank=4),  # by two
    "btt6": sl.design("block_tensor_train", (144, 96), rank=6),  # by three
    "monarch": sl.design("monarch", (96, 128), blocks=4),
    "monarch16": sl.design("monarch", (256, 512), blocks=16),
    "low_rank": sl.design("low_rank", (70, 66), rank=8),
    "kronecker": sl.Structure.parse("ab,ca->cb; cb,db->cd", a=8, b=10, c=7, d=9, d_in=77, d_out=61),  # padded, cut
}


@pytest.fixture(scope="module")
def tiles():
    """Passes of this machine as if it had tiles."""
    if emulated.emulated_target() is None:
        pytest.skip("this processor lacks AVX512-BF16, which processors with tiles have")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_writer, "load", emulated.load_emulated)
        patch.setattr(_rules, "tiled_host", emulated.emulated_target)
        patch.setattr(blocks, "tiled_host", emulated.emulated_target)
        _program.make_program.cache_clear()
        make_block.cache_clear()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)
        _program.make_program.cache_clear()
        make_block.cache_clear()


def chain_by_tiles(structure, near=False):
    chain = FusedChain(
        structure.steps, structure.sizes, structure.d_in, structure.d_out, True, tiles=True, near=near
    )  # fmt: skip
    chain._upright = None
    return chain


def wrong_by(structure, chain, tokens, seed=1):
    """The largest relative error of the product and of all gradients, by the size of the sums' terms."""
    generator = torch.Generator().manual_seed(seed)
    factors = sl.random_factors(structure, seed=seed, backend="torch", dtype=torch.bfloat16)
    x, gy = (torch.randn(tokens, d, generator=generator).bfloat16() for d in structure.shape[::-1])
    bias = torch.randn(structure.d_out, generator=generator).bfloat16()
    kept = []
    y = chain.forward(x, factors, bias, kept)
    found = [y, *chain.backward(gy, x, factors, [True] * (2 + len(factors)), kept)]

    def exact(change):
        doubles = [change(t.double()).requires_grad_() for t in (x, *factors, bias)]
        y = products(structure, doubles[1:-1], doubles[0], ops("torch")) + doubles[-1]
        return [y.detach(), *torch.autograd.grad(y, doubles, change(gy.double()))]

    errors = [
        (got.double() - right).norm() / of.norm()
        for got, right, of in zip(found, exact(lambda t: t), exact(torch.abs), strict=True)
    ]
    return max(errors).item()


@pytest.mark.parametrize("tokens", [1, 16, 47, 101])
@pytest.mark.parametrize("name", STRUCTURES)
def test_both_passes(name, tokens, tiles):
    structure = STRUCTURES[name]
    chain = chain_by_tiles(structure)
    program = chain.program("bfloat16")
    if program is None:
        assert name == "kronecker"  # blocks of 8 x 10 are faster by vectors
        return
    assert program.uses_tiles
    assert program.block % 32 == 0
    assert wrong_by(structure, chain, tokens) < TOLERANCE


@pytest.mark.skipif(tiled_host() is None, reason="this processor has no tiles, or the system does not permit them")
@pytest.mark.parametrize("tokens", [1, 16, 47, 101])
@pytest.mark.parametrize("name", sorted({*STRUCTURES} - {"kronecker"}))
def test_both_passes_on_this_processor(name, tokens):
    chain = chain_by_tiles(STRUCTURES[name])
    assert chain.program("bfloat16").target.tiles
    assert wrong_by(STRUCTURES[name], chain, tokens) < TOLERANCE


@pytest.mark.parametrize("name", STRUCTURES)
def test_scratch_memory_that_holds_no_numbers(name, tiles, monkeypatch):
    """What no product writes is not read either: not the place of a token after an odd number of them."""
    structure = STRUCTURES[name]
    chain = chain_by_tiles(structure)
    if chain.program("bfloat16") is None:
        return
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(
        255 if options["dtype"] is torch.uint8 else math.nan
    ))  # fmt: skip
    for tokens in (1, 35):
        assert wrong_by(structure, chain, tokens) < TOLERANCE


def test_slices_that_stay_in_the_second_level_of_cache(tiles, monkeypatch):
    structure = STRUCTURES["btt4"]
    monkeypatch.setattr(_rules, "near_slice", lambda: structure.num_params)
    chain = chain_by_tiles(structure, near=True)
    assert chain.front("bfloat16", False).count > 1
    assert chain.back("bfloat16", 1).count > 1
    assert wrong_by(structure, chain, 70) < TOLERANCE


def test_kept_activations_and_slices(tiles, monkeypatch):
    """What only large chains do."""
    structure = STRUCTURES["btt1"]
    chain = chain_by_tiles(structure)
    monkeypatch.setattr(chain, "kept_tokens", lambda *_: 48)
    assert wrong_by(structure, chain, 90) < TOLERANCE
    monkeypatch.setattr(_rules, "enough", lambda counts, *_: counts[1])
    small = _rules.limits()
    monkeypatch.setattr(_rules, "limits", lambda: type(small)(**{**vars(small), "factors": 0, "sums_slice": 0}))
    chain = chain_by_tiles(structure)
    assert wrong_by(structure, chain, 90) < TOLERANCE
    assert chain.back("bfloat16", 1).count > 1


def wrong_by_of_block(block, tokens, kind="tiles"):
    """The largest error of an output or a gradient against layer after layer in float64, relative to its norm."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    x = normal(tokens, block.first[0].d_in)
    operands = [normal(x.shape[1]) if there else None for there in block.affine]
    operands += [normal(s.d_out) if there else None for s, there in zip(block.structures, block.biases, strict=True)]
    operands += [normal(*f.shape, scale=f.fan_in**-0.5) for s in block.structures for f in s.factors]
    wide = [None if t is None else t.double().requires_grad_() for t in (x, *operands)]

    def by_products(structure, h, factors, bias):
        y = products(structure, factors, h, ops("torch"))
        return y if bias is None else y + bias

    expected = block.layers(wide[0], wide[1:], by_products)
    gradients = [torch.randn(y.shape, generator=generator).bfloat16() for y in expected]
    exact = torch.autograd.grad(expected, [t for t in wide if t is not None], [g.double() for g in gradients])
    kept = []
    found = block.run(x, operands, kind, kept), block.backward(gradients, x, operands, kind, kept)
    assert bool(kept) == kind.endswith("kept")
    pairs = [*zip(found[0], expected, strict=True), *zip([g for g in found[1] if g is not None], exact, strict=True)]
    return max(((got.double() - right).norm() / right.norm()).item() for got, right in pairs)


BLOCKS = {
    "mlp": {"first": ["btt4"], "second": ("block_tensor_train", {"rank": 4}), "norm": "layer", "residual": True},
    "gated": {"first": ["monarch", "monarch"], "second": ("monarch", {"blocks": 4}), "activation": "silu"},
    "projections": {"first": ["btt1", "btt4"], "norm": "rms"},
}


@pytest.mark.parametrize("tokens", [1, 47, 100])
@pytest.mark.parametrize("name", BLOCKS)
def test_whole_blocks(name, tokens, tiles):
    given = dict(BLOCKS[name])
    first, second = tuple(STRUCTURES[one] for one in given.pop("first")), given.pop("second", None)
    if second is not None:
        kind, options = second
        second = sl.design(kind, first[0].shape[::-1], **options)
        given.setdefault("activation", "gelu")
    count, norm = len(first) + (second is not None), given.get("norm")
    block = blocks.torch_block(
        first, second, given.pop("activation", None), (True,) * count, eps=1e-5,
        affine={None: (False, False), "rms": (True, False), "layer": (True, True)}[norm], **given,
    )  # fmt: skip
    program = block.program(torch.bfloat16, "tiles")
    assert all(one.uses_tiles for one in program.programs)
    assert block.program(torch.float32, "tiles") is None
    assert wrong_by_of_block(block, tokens) < 0.02
    kinds = blocks.BlockProblem(block, "bfloat16", 64, 1, True).kinds()
    assert "tiles" in kinds
    assert ("tileskept" in kinds) == ("halftileskept" in kinds) == (second is not None)
    if second is not None:
        assert wrong_by_of_block(block, tokens, "tileskept") < 0.02
        assert block.program(torch.bfloat16, "halftileskept") is block.half.program(torch.bfloat16, "tiles")
        for kind in ("tiles", "tileskept"):
            assert wrong_by_of_block(block.half, tokens, kind) < 0.02


def test_halves_by_tiles(tiles, monkeypatch):
    """They are compared with the layers and with other passes by tiles, and run by autograd."""
    block = blocks.torch_block((STRUCTURES["btt4"],), STRUCTURES["btt4"].transpose(), "gelu", (True, True))
    problem = blocks.BlockProblem(block, "bfloat16", 64, 1, True)
    by_tiles = next(way for way in choice.ways("torch") if way.name == "compiled-tiles")
    monkeypatch.setattr(choice, "WORTH", 0.0)
    monkeypatch.setattr(choice, "way_of", lambda _: by_tiles)
    assert problem.close() == ["block-tileskept", "block-tiles", "block-halftileskept", "separate"]
    x = torch.randn(50, 192).bfloat16().requires_grad_()
    operands = [None, None, *(torch.randn(s.d_out).bfloat16() for s in block.structures)]
    operands += [(torch.randn(f.shape) / f.fan_in**0.5).bfloat16() for s in block.structures for f in s.factors]
    (y,) = block.by_pass("halftileskept", x, operands, True)
    (expected,) = block.by_pass("tiles", x, operands, True)
    (g,), (gx,) = (torch.autograd.grad(out, x, torch.ones_like(out)) for out in (y, expected))
    assert ((y - expected).float().norm() / expected.float().norm()).item() < 0.02
    assert ((g - gx).float().norm() / gx.float().norm()).item() < 0.02


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sizes(tiles, data):
    """Tiles that are not whole, in any axis. Every product that can run by tiles does."""
    name = data.draw(st.sampled_from(["block_tensor_train", "monarch", "low_rank"]))
    sizes = [4 * data.draw(st.integers(4, 60), label=end) for end in ("d_in", "d_out")]
    options = {"monarch": {"blocks": 4}, "low_rank": {"rank": 2 * data.draw(st.integers(4, 20))}}
    structure = sl.design(name, tuple(sizes), **options.get(name, {"rank": data.draw(st.integers(1, 5))}))
    chain = chain_by_tiles(structure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("structlin.execution.compiled._tiles.ROW", 0)
        patch.setattr("structlin.execution.compiled._tiles.ENDS", 0)
        patch.setattr("structlin.execution.compiled._tiles.SQUARE", 0)
        _program.make_program.cache_clear()
        try:
            if chain.program("bfloat16") is not None:
                assert wrong_by(structure, chain, data.draw(st.integers(1, 70), label="tokens")) < TOLERANCE
        finally:
            _program.make_program.cache_clear()


def test_emulated_instruction(tiles):
    """Against the definition, in NumPy: order of the sums, numbers below the normal ones, rows that are not there."""
    rng = np.random.default_rng(1)
    rows, columns, depth = 13, 11, 7
    configuration = bytearray(64)
    configuration[0] = 1
    for tile, (high, wide) in enumerate(((rows, columns), (rows, depth), (depth, columns))):
        configuration[16 + 2 * tile], configuration[48 + tile] = 4 * wide, high
    a, b = (
        rng.standard_normal((high, 2 * wide)).astype(np.float32) for high, wide in ((rows, depth), (depth, columns))
    )
    a[0, 0], b[:, 3] = 1e-39, 1e-39
    a, b = (((t.view(np.uint32) >> 16).astype(np.uint16)) for t in (a, b))
    c = rng.standard_normal((rows, columns)).astype(np.float32)
    run = emulated.functions()
    run["ldtilecfg"]((ctypes.c_uint8 * 64)(*configuration))
    for tile, array in enumerate((c, a, b)):
        run["tileloadd64"](tile, array.ctypes.data, array.strides[0])
    run["tdpbf16ps"](0, 1, 2)
    found = np.zeros_like(c)
    run["tilestored64"](0, found.ctypes.data, found.strides[0])

    def wide(half):
        number = (half.astype(np.uint32) << 16).view(np.float32)
        return np.where(np.abs(number) < np.finfo(np.float32).tiny, np.float32(0), number)

    sums = np.zeros((2, rows, columns), np.float32)
    for k in range(depth):
        for odd in range(
            2
        ):  # a product of two numbers of bfloat16 is exact in float64, and so is its sum but for one rounding
            product = wide(a[:, 2 * k + odd]).astype(np.float64)[:, None] * wide(b[k, odd::2]).astype(np.float64)
            sums[odd] = (sums[odd].astype(np.float64) + product).astype(np.float32)
    np.testing.assert_array_equal(found, c + (sums[0] + sums[1]))
    run["tilerelease"]()
    assert not any(emulated.STATE)


@pytest.mark.parametrize("name", sorted({*STRUCTURES} - {"kronecker"}))
def test_instructions(name, monkeypatch):
    """For a processor with tiles: its instructions, one release at the end of each pass, and no calls."""
    texts, structure = [], STRUCTURES[name]
    monkeypatch.setattr(_writer, "load", lambda text, *_: texts.append(text))
    program = make_program.__wrapped__(
        structure.steps, structure.sizes, structure.d_in, structure.d_out, True, "bfloat16", TARGET
    )
    program.forward(True, True)
    program.backward((True,) * (2 + len(structure.steps)), False)
    for text in texts:
        machine, module = parsed(text, TARGET)
        assembly = machine.emit_assembly(module)
        assert not re.search(r"^\s*(call|jmp)q?\s+(\*|\w+@PLT|__\w+)", assembly, re.MULTILINE)
        count = Counter(re.findall(r"^\s*(t\w+|ldtilecfg)\b", assembly, re.MULTILINE))
        for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg"):
            assert count[instruction] > 0
        assert count["tilerelease"] == 1


def test_a_copy_with_axes_exchanged():
    """(outer, inner, unit) in pairs, with the summed axes first and last."""
    down, across = Axis(0, 1024, 4096, None), Axis(32, 1, None, 1)
    summed = Axis(32, None, 128, 64), Axis(2, None, 2, 32)
    product = Product(across, down, summed, (), (Axis(32, 32, 4, 2048),), paired=True)
    found, turn = turned(product, 2)
    assert turn == Turn(32, 32, 2)
    assert found.summed == (Axis(64, None, 1, 32),)
    assert found.near == (Axis(32, 32, 64, 2048),)
    assert (tiling(product, 2).depth, tiling(found, 1).depth) == (2, 16)


def test_a_copy_with_an_axis_between():
    """(outer, middle, inner) in pairs, of a factor that has the middle one outside."""
    across, summed = Axis(144, 1, None, 1), (Axis(9, None, 16, 1152), Axis(8, None, 144, 144))
    product = Product(across, Axis(0, 2304, 2320, None), summed, (), (Axis(16, 144, 1, 10368),), paired=True)
    found, turn = turned(product, 1)
    assert turn == Turn(8, 16, 1, middle=9)
    assert found.summed == (Axis(72, None, 1, 144),)
    assert found.near == (Axis(16, 144, 72, 10368),)
    other_order = (Axis(9, None, 16, 144), Axis(8, None, 144, 1296))
    assert turned(replace(product, summed=other_order), 1) is None  # axes that would have been merged


def test_processors_and_systems_without_tiles(monkeypatch):
    """Without the features, or the permission of the system, nothing is run by tiles."""
    features = dict.fromkeys((*AVX512_BF16.features, *TILES), True)
    binding = type("Binding", (), {"get_host_cpu_features": lambda self: features})()
    monkeypatch.setattr(_target, "_binding", lambda: binding)
    monkeypatch.setattr(_target, "host", lambda: AVX512_BF16)
    monkeypatch.setattr(_target, "_permitted", lambda: True)
    assert tiled_host.__wrapped__() == TARGET
    monkeypatch.setattr(_target, "_permitted", lambda: False)
    assert tiled_host.__wrapped__() is None
    monkeypatch.setattr(_target, "_permitted", lambda: True)
    features["amx-bf16"] = False
    assert tiled_host.__wrapped__() is None
    features["amx-bf16"] = True
    monkeypatch.setattr(_target, "host", lambda: AVX512)
    assert tiled_host.__wrapped__() is None


def test_the_way_is_one_of_several(tiles):
    """It is there for bfloat16 alone, is estimated and timed, and gives the product."""
    structure = sl.design("monarch", (256, 128), blocks=4)
    (way,) = (way for way in choice.ways("torch") if way.name == "compiled-tiles")
    problem = Problem(structure, True, "torch", "cpu", "bfloat16", 64, 1, True)
    assert way.supports(problem)
    assert not way.supports(Problem(structure, True, "torch", "cpu", "float32", 64, 1, True))
    assert way.model(problem) > 0
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=torch.bfloat16)
    x = torch.randn(50, structure.d_in).bfloat16()
    expected = torch_ways.products_way.run(structure, factors, x, None, True)
    with execution.using("compiled-tiles"):
        torch.testing.assert_close(structure.apply(factors, x), expected, rtol=0.02, atol=0.02)
    assert chain_of(structure).passes("compiled-tiles", torch.float32) is None


def test_blocks_of_64_tokens_are_another_way(tiles, monkeypatch):
    """It is there where the caches suggest fewer tokens, and its passes are right for parts of a block."""
    (way,) = (way for way in choice.ways("torch") if way.name == "compiled-tiles-64")
    structure = sl.design("monarch", (256, 128), blocks=4)
    problem = Problem(structure, True, "torch", "cpu", "bfloat16", 512, 1, True)
    assert chain_of(structure).passes("compiled-tiles", torch.bfloat16).program("bfloat16").block == 64
    assert not way.supports(problem)
    small = _program.limits()
    monkeypatch.setattr(_program, "limits", lambda: replace(small, block=0))
    structure = sl.design("monarch", (256, 132), blocks=4)
    problem = replace(problem, structure=structure)
    assert way.supports(problem)
    assert not way.supports(replace(problem, tokens=128))
    chain = chain_of(structure)
    blocks = [chain.passes(name, torch.bfloat16).program("bfloat16") for name in ("compiled-tiles", way.name)]
    assert [program.block for program in blocks] == [32, 64]
    assert wrong_by(structure, chain.passes(way.name, torch.bfloat16), 150) < TOLERANCE


def test_the_way_is_not_there_without_tiles(monkeypatch):
    monkeypatch.setattr(_rules, "tiled_host", lambda: None)
    structure = sl.design("monarch", (256, 132), blocks=4)
    assert chain_of(structure).passes("compiled-tiles", torch.bfloat16) is None
