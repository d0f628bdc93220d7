"""Backward passes that are left to the BLAS."""

from dataclasses import replace

import pytest
import torch

import structlin as sl
from structlin.execution.compiled import _rules
from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._target import host
from structlin.execution.products import products
from structlin.execution.torch_cpu import chain_of

HOST = host()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [0, 48, 101])
@pytest.mark.parametrize(
    ("chain", "plain"),
    [("ab,fab->f; f,gdf->gd", True), ("ab,abf->f; f,fgd->gd", True), ("ab,fba->f; f,gdf->gd", False)],
)
def test_plain_matrices_by_the_blas(chain, plain, kept, dtype, monkeypatch):
    """Of either order of axes, and some that are no matrices: with activations of none, some and all of the tokens."""
    if HOST is None or not (HOST.half_products or dtype == torch.float64):
        pytest.skip("nothing is compiled here, or not in pairs")
    structure = sl.Structure.parse(chain, a=4, b=15, f=32, g=3, d=22)
    chain = chain_of(structure).compiled
    assert (chain._upright is not None) == plain
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    x, gy = (torch.randn(101, d, generator=generator).to(dtype) for d in structure.shape[::-1])
    monkeypatch.setattr(chain, "kept_tokens", lambda *_: kept)
    monkeypatch.setattr(_rules, "limits", lambda: replace(limits(), sums_slice=0))
    monkeypatch.setattr(chain, "shares", lambda *_: 2)
    taken, by_blas = [], chain._plain_backward
    monkeypatch.setattr(chain, "_plain_backward", lambda *a: taken.append(1) or by_blas(*a))
    held = []
    chain.forward(x, factors, None, held)
    doubles = [t.double().requires_grad_() for t in (x, *factors)]
    expected = products(structure, doubles[1:], doubles[0], sl._arrays.ops("torch"))
    wanted = (*torch.autograd.grad(expected, doubles, gy.double()), gy.double().sum(0))
    for needs in ([True] * 4, [False, True, False, True], [False, False, True, False], [True, False, False, False]):
        found = chain.backward(gy, x, factors, needs, held)
        assert len(found) == 4
        for need, got, exact in zip(needs, found, wanted, strict=True):
            assert (got is not None) == need
            if got is not None:
                assert got.dtype == dtype
                assert got.shape == exact.shape
                tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-13
                assert (got.double() - exact).norm() < tolerance * exact.norm()
    assert len(taken) == 4 * plain


def test_plans_are_held_for_many_numbers_of_tokens_but_not_for_all():
    if HOST is None:
        pytest.skip("nothing is compiled here")
    structure = sl.design("low_rank", (16, 24), rank=4)
    chain = chain_of(structure).compiled
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=torch.float64)
    plans = chain._plans
    plans.most = 8
    for _ in range(2):
        for tokens in range(1, 21):
            x = torch.randn(tokens, 24, dtype=torch.float64)
            expected = products(structure, factors, x, sl._arrays.ops("torch"))
            torch.testing.assert_close(chain.forward(x, factors), expected)
            assert len(plans._made) <= 8
    held = dict(plans._made)
    chain.forward(x, factors)
    assert len(held) == 8
    assert plans._made == held  # of the last call, too, no plan is made again
