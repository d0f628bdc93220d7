"""Random cases of all that operands can be, forward and backward, against the matrix in float64."""

from functools import cache

import numpy as np
import pytest
import torch

import structlin as sl
from structlin.execution.compiled._target import host
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.torch_cpu import SingleProducts, chain_of
from structlin.testing import dense_matrix, random_chain

CASES, EACH = 600, 20  # number of cases, and of cases with one chain and one dtype
DTYPES = {torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 0.02, torch.float16: 3e-3}
NAMED = (
    ("low_rank", {"rank": 3}),
    ("kronecker", {}),
    ("tensor_train", {"cores": 3, "rank": 2}),
    ("block_tensor_train", {"rank": 2}),
    ("monarch", {"blocks": 2}),
    ("blast", {"blocks": 3, "rank": 2}),
    ("block_diagonal", {"blocks": 3}),
)


def draw_structure(rng):
    """A chain by name, of sizes that often need padding, or any chain."""
    if rng.random() < 0.3:
        return random_chain(rng)
    name, options = NAMED[rng.integers(len(NAMED))]
    sizes = [int(12 * rng.integers(1, 8)) for _ in range(2)]
    structure = sl.design(name, tuple(sizes), **options)
    if rng.random() < 0.4:  # cut off a part of the ends
        cut = [int(rng.integers(1, size + 1)) for size in (structure.d_in, structure.d_out)]
        structure = sl.Structure(structure.steps, structure.sizes, *cut)
    return structure


def draw_tensor(rng, shape, dtype, generator, around=torch.nan):
    """Random numbers in a slice of a larger storage, whose other numbers are NaN: reading one of them shows."""
    kind = rng.integers(5)
    values = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if kind == 0:
        return values
    if kind == 1 or (kind == 4 and len(shape) == 1):  # an offset
        held = torch.full((values.numel() + 7,), around, dtype=dtype)
        tensor = held[5 : 5 + values.numel()].view(shape)
    elif kind == 2:  # every second number
        tensor = torch.full((*shape[:-1], 2 * shape[-1]), around, dtype=dtype)[..., 1::2]
    elif kind == 3:  # the axes in another order
        tensor = torch.full(shape[::-1], around, dtype=dtype).permute(*reversed(range(len(shape))))
    else:  # rows of a wider array
        tensor = torch.full((shape[0] + 2, *shape[1:-1], shape[-1] + 3), around, dtype=dtype)[1:-1, ..., 2:-1]
    return tensor.copy_(values)


@cache
def reads_beyond():
    """Whether torch's products in bfloat16 read memory after rows of an odd size, as with AMX in torch 2.13."""
    rows = torch.full((60, 6), torch.nan, dtype=torch.bfloat16)
    rows[:, :3] = 1
    return not torch.isfinite(rows[:, :3] @ torch.ones(3, 29, dtype=torch.bfloat16)).all()


def draw_passes(rng, chain, dtype):
    """A way that runs this chain in this dtype, whether it is the fastest or not."""
    ways = [SingleProducts(chain.structure, chain.rows)]
    ways += [chain.compiled] * 3 if chain.compiled.ready(dtype) else []
    kinds = ("chunked", "batched", "compiled-tiles", "compiled-tiles-64", "compiled-near", "compiled-tiles-near")
    others = (chain.passes(kind, dtype) for kind in kinds)
    ways += [passes for passes in others if passes is not None]
    return ways[rng.integers(len(ways))]


def in_double(structure, rows, inputs, biased, gy, change=lambda t: t):
    """The product and the gradients of the inputs that need one, in float64."""
    exact = [change(t.detach().double()).requires_grad_(t.requires_grad) for t in inputs]
    x, *factors = exact[:-1] if biased else exact
    y = SingleProducts(structure, rows).forward(x, factors, exact[-1] if biased else None)
    return [y.detach(), *torch.autograd.grad(y, [t for t in exact if t.requires_grad], change(gy.double()))]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
def test_random_cases(threads):
    wrong, ways = [], {}
    for case in range(CASES):
        rng, generator = np.random.default_rng(case), torch.Generator().manual_seed(case)
        if case % EACH == 0:
            structure, dtype = draw_structure(rng), list(DTYPES)[case // EACH % len(DTYPES)]
        rows = rng.random() < 0.8
        chain, tokens = chain_of(structure, rows), int(rng.choice([1, 2, 3, 11, 49, 97, 150]))
        threads(int(rng.integers(1, 3)))
        passes = draw_passes(rng, chain, dtype)
        around = 0.0 if dtype is torch.bfloat16 and not isinstance(passes, FusedChain) and reads_beyond() else torch.nan
        ends = [(tokens, d) if rows else (d, tokens) for d in (structure.d_in, structure.d_out)]
        x, gy = (draw_tensor(rng, shape, dtype, generator, around) for shape in ends)
        factors = [draw_tensor(rng, f.shape, dtype, generator, around) for f in structure.factors]
        bias = draw_tensor(rng, (structure.d_out,), dtype, generator, around) if rows and rng.random() < 0.6 else None
        inputs = [x, *factors] if bias is None else [x, *factors, bias]
        needs = rng.random(len(inputs)) < 0.7
        needs[rng.integers(len(inputs))] = True
        for tensor, need in zip(inputs, needs, strict=True):
            tensor.requires_grad_(bool(need))
        ways[type(passes).__name__] = ways.get(type(passes).__name__, 0) + 1
        chain.guard.check(x, inputs[1:])
        assert chain.guard.addressable(x, inputs[1:])

        y = chain(passes, x, factors, bias)
        found = [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], gy)]

        wanted = in_double(structure, rows, inputs, bias is not None, gy)
        # Sums whose terms cancel are as exact as the terms are.
        terms = in_double(structure, rows, inputs, bias is not None, gy, torch.abs)
        matrix = torch.from_numpy(dense_matrix(structure, factors))
        product = x.detach().double() @ matrix.T if rows else matrix @ x.detach().double()
        product = product if bias is None else product + bias.detach().double()
        torch.testing.assert_close(wanted[0], product, rtol=1e-10, atol=1e-10)
        for k, (got, right, of) in enumerate(zip(found, wanted, terms, strict=True)):
            error, size = (got.double() - right).norm().item(), of.norm().item()
            if got.dtype != dtype or got.shape != right.shape or not error <= DTYPES[dtype] * size:
                wrong.append((case, k, type(passes).__name__, str(structure), tokens, dtype, error, size))
    assert not wrong, f"{len(wrong)} cases are wrong; the first is {wrong[0]}"
    assert ways["ChunkedChain"] > CASES // 20
    assert host() is None or ways["FusedChain"] > CASES // 3
