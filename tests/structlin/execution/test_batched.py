"""Batched products of torch, forward and backward, against float64."""

from __future__ import annotations

from itertools import product as pairs

import numpy as np
import pytest
import torch

import structlin as sl
from structlin._arrays import ops
from structlin.execution import batched, choice
from structlin.execution.products import products
from structlin.execution.torch_cpu import CPUChain
from structlin.testing import random_chain

STRUCTURES = {
    "monarch": sl.design("monarch", (48, 80), blocks=4),
    "padded": sl.design("monarch", (46, 77), blocks=4),
    "block_tensor_train": sl.design("block_tensor_train", (35, 6), rank=2),
    "low_rank": sl.design("low_rank", (11, 7), rank=3),
    "block_diagonal": sl.design("block_diagonal", (15, 6), blocks=3),
    "three steps": sl.Structure.parse("pa,pfra->frp; frp,fprs->fs; fs,fes->ef", p=3, a=4, f=5, r=2, s=6, e=7),
    "cut": sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=6, a=8, f=10, r=3, e=6, d_in=45, d_out=57),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def exact(structure, x, factors, bias, gy):
    wide = [t.double().requires_grad_() for t in (x, *factors, bias)]
    y = products(structure, wide[1:-1], wide[0], ops("torch")) + wide[-1]
    return [y.detach(), *torch.autograd.grad(y, wide, gy.double())]


def operands(structure, dtype, tokens):
    generator = torch.Generator().manual_seed(tokens)
    x, gy = (torch.randn(tokens, d, generator=generator).to(dtype) for d in structure.shape[::-1])
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
    return x, factors, torch.randn(structure.d_out, generator=generator).to(dtype), gy


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STRUCTURES)
def test_both_passes(name, dtype, compiled, monkeypatch):
    """With what the forward pass keeps, and without; with compiled copies of factors, and with torch's."""
    if not compiled:
        monkeypatch.setattr(batched, "host", lambda: None)
    structure = STRUCTURES[name]
    chain = CPUChain(structure).passes("batched", dtype)
    x, factors, bias, gy = operands(structure, dtype, 29)
    wanted, kept = exact(structure, x, factors, bias, gy), []
    y = chain.forward(x, factors, bias, kept)
    assert len(kept) == len(factors) - 1
    for held in ((), kept):
        found = [y, *chain.backward(gy, x, factors, [True] * (2 + len(factors)), held)]
        for got, right in zip(found, wanted, strict=True):
            assert got.dtype is dtype
            assert got.shape == right.shape
            assert (got.double() - right).norm() <= TOLERANCE[dtype] * right.norm()


@pytest.mark.parametrize("name", STRUCTURES)
def test_requested_gradients(name):
    structure = STRUCTURES[name]
    chain = CPUChain(structure).passes("batched", torch.float64)
    x, factors, bias, gy = operands(structure, torch.float64, 5)
    wanted = exact(structure, x, factors, bias, gy)[1:]
    for needs in pairs([True, False], repeat=2 + len(factors)):
        if not any(needs[:-1]):
            continue
        for got, right, need in zip(chain.backward(gy, x, factors, needs), wanted, needs, strict=True):
            assert (got is not None) == need
            if got is not None:
                torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(tokens):
    for structure in STRUCTURES.values():
        chain = CPUChain(structure).passes("batched", torch.float64)
        x, factors, bias, gy = operands(structure, torch.float64, tokens)
        found = [chain.forward(x, factors, bias), *chain.backward(gy, x, factors, [True] * (2 + len(factors)))]
        torch.testing.assert_close(found, tuple(exact(structure, x, factors, bias, gy)), rtol=1e-12, atol=1e-12)


def test_random_chains():
    ran = 0
    for seed in range(150):
        structure = random_chain(np.random.default_rng(seed))
        chain = CPUChain(structure).passes("batched", torch.float64)
        if chain is None:
            continue
        ran += 1
        x, factors, bias, gy = operands(structure, torch.float64, 9)
        found = [chain.forward(x, factors, bias), *chain.backward(gy, x, factors, [True] * (2 + len(factors)))]
        torch.testing.assert_close(found, tuple(exact(structure, x, factors, bias, gy)), rtol=1e-11, atol=1e-11)
    assert ran >= 20


def test_what_does_not_run_this_way():
    """Weights that are shared along an axis, vectors that are regrouped, and columns."""
    for structure in (sl.design("kronecker", (12, 35)), sl.design("monarch", (35, 49), blocks=7)):
        assert CPUChain(structure).passes("batched", torch.float64) is None
    assert CPUChain(STRUCTURES["low_rank"], rows=False).passes("batched", torch.float64) is None
    (way,) = (way for way in choice.ways("torch") if way.name == "batched")
    problem = choice.Problem(sl.design("kronecker", (12, 35)), True, "torch", "cpu", "float32", 64, 1, True)
    assert not way.supports(problem)
