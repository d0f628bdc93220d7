"""Passes in slices against float64 sums over all factors at once, and which passes are sliced."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opt_einsum import contract

import structlin as sl
from structlin.execution.compiled import _rules
from structlin.execution.compiled._limits import limits
from structlin.execution.compiled._slices import counts, enough, slices, whole
from structlin.execution.compiled._target import host
from structlin.execution.compiled.passes import FusedChain

HOST = host()
pytestmark = pytest.mark.skipif(HOST is None, reason="nothing is compiled here")
CHAINS = {
    "two": ("pa,pfra->frp; frp,ferp->fe", {"p": 12, "a": 5, "f": 6, "r": 3, "e": 7}),
    "blocks": ("pa,pfra->frp; frp,ferp->fe", {"p": 4, "a": 18, "f": 3, "r": 6, "e": 20}),
    "three": ("pab,pfa->pfb; pfb,pgb->pfg; pfg,hpfg->h", {"p": 6, "a": 4, "b": 5, "f": 3, "g": 7, "h": 11}),
    "spread": ("a,hab->hb; hb,hcb->hc", {"a": 13, "h": 6, "b": 5, "c": 8}),
    "ones": ("opa,pfra->frpo; frpo,ferp->feo", {"o": 1, "p": 8, "a": 5, "f": 4, "r": 3, "e": 6}),
    "padded": ("pa,pfra->frp; frp,ferp->fe", {"p": 6, "a": 5, "f": 8, "r": 3, "e": 7, "d_in": 28}),
    "cut": ("pa,pfra->frp; frp,ferp->fe", {"p": 6, "a": 5, "f": 8, "r": 3, "e": 7, "d_out": 51}),
}
MOST = {  # slices of the backward pass and of the forward one
    **{"two": (12, 6), "blocks": (4, 3), "three": (6, 1), "spread": (1, 6), "ones": (8, 4)},
    **{"padded": (1, 8), "cut": (6, 1)},
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 8e-3}
TOKENS = 101


def oracle(structure, x, factors):
    steps = structure.steps
    terms = [f"t{steps[0].input}", *(step.factor for step in steps)]
    sizes = dict(structure.sizes)
    padded = torch.nn.functional.pad(x, (0, structure.padding[0]))
    blocks = padded.reshape(len(x), *(sizes[a] for a in steps[0].input))
    y = contract(",".join(terms) + f"->t{steps[-1].output}", blocks, *factors).reshape(len(x), -1)
    return y[:, : structure.d_out]


def problem(text, sizes, dtype, tokens=TOKENS):
    structure = sl.Structure.parse(text, **sizes)
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    x, gy = (torch.randn(tokens, d, generator=generator, dtype=dtype) for d in structure.shape[::-1])
    return structure, factors, x, gy, torch.randn(structure.d_out, generator=generator, dtype=dtype)


def chain_of(structure, rows=True):
    return FusedChain(structure.steps, structure.sizes, structure.d_in, structure.d_out, rows)


@pytest.fixture(params=[0, 500, 2000], ids=lambda most: f"most{most}")
def most(request, monkeypatch):
    """Slices as small as there are, and of some hundred numbers."""
    size = 4 * request.param
    monkeypatch.setattr(_rules, "limits", lambda: replace(limits(), sums_slice=size, factors_slice=size, factors=0))
    return request.param


def close(found, expected, dtype):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.covering(2)
@pytest.mark.parametrize("kept", [0, 48, TOKENS])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CHAINS)
def test_values_and_gradients(name, dtype, rows, kept, most, monkeypatch):
    structure, factors, x, gy, bias = problem(*CHAINS[name], dtype)
    chain = chain_of(structure, rows)
    if not chain.ready(dtype):
        assert dtype == torch.bfloat16
        assert not rows
        return
    label = str(dtype).removeprefix("torch.")
    back, front = chain.back(label, 1), chain.front(label, False)
    if not most:
        assert (back.count, front.count) == MOST[name]
        assert chain.front(label, True).count == front.count
    monkeypatch.setattr(chain, "kept_tokens", lambda *_: kept if back.states is not None else 0)
    doubles = [t.double().requires_grad_() for t in (x, *factors)]
    y = oracle(structure, *doubles[:1], doubles[1:])
    wanted = (*torch.autograd.grad(y, doubles, gy.double()), gy.double().sum(0))
    turned = (lambda t: t) if rows else (lambda t: t.mT.contiguous())
    held = []
    added = bias if rows else None  # which columns leave to the caller
    expected = y.detach() + (bias.double() if rows else 0)
    close(turned(chain.forward(turned(x), factors, added)), expected, dtype)
    close(turned(chain.forward(turned(x), factors, added, held)), expected, dtype)
    steps = len(factors)
    for needs in ([True] * (2 + steps), [False, *[True] * steps, False], [True, *[False] * steps, True]):
        found = list(chain.backward(turned(gy), turned(x), factors, needs, held))
        if needs[0]:
            found[0] = turned(found[0])
        for need, got, exact in zip(needs, found, wanted, strict=True):
            assert (got is not None) == need
            if got is not None:
                close(got, exact, dtype)


@pytest.mark.parametrize("kept", [0, 48, TOKENS])
def test_threads(kept, most, monkeypatch):
    """Each adds up sums of its own for every slice."""
    structure, factors, x, gy, _ = problem(*CHAINS["two"], torch.float64)
    chain, before = chain_of(structure), torch.get_num_threads()
    monkeypatch.setattr(chain, "kept_tokens", lambda *_: kept)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            held = []
            y = chain.forward(x, factors, None, held)
            found.append((y, *chain.backward(gy, x, factors, [True] * 4, held)))
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


@settings(deadline=None)
@given(sizes=st.fixed_dictionaries({a: st.integers(1, 9) for a in "pafre"}), tokens=st.integers(1, 70))
def test_any_sizes(sizes, tokens):
    structure, factors, x, gy, bias = problem(CHAINS["two"][0], sizes, torch.float64, tokens)
    chain = chain_of(structure)
    program = chain.program("float64")
    if program is None:
        return
    back, front = (counts(chain.parts, program, of_input)[-1] for of_input in (True, False))
    assert (back, front) == (sizes["p"], sizes["f"])
    front = slices(chain.parts, program, False, front)
    back = slices(chain.parts, program, True, back)
    chain.front, chain.back = (lambda *_: front), (lambda *_: back)
    doubles = [t.requires_grad_() for t in (x, *factors)]
    y = oracle(structure, x, factors)
    wanted = (y + bias, *torch.autograd.grad(y, doubles, gy), gy.sum(0))
    with torch.no_grad():
        found = (chain.forward(x, factors, bias), *chain.backward(gy, x, factors, [True] * 4))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "structure",
    [
        sl.design("low_rank", (70, 66), rank=8),  # no axis in both factors
        sl.design("kronecker", (72, 63)),
        sl.design("tensor_train", (72, 60), cores=3, rank=3),
        sl.Structure.parse("pa,pfa->pf", p=6, a=7, f=5),  # the axis is one of the output too
        sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=6, a=7, f=5, r=3, e=8, d_in=40, d_out=37),  # padded
    ],
    ids=["low rank", "Kronecker", "TT", "batch", "padded"],
)
def test_what_is_in_one_piece(structure):
    chain = chain_of(structure)
    program = chain.program("float32")
    for of_input in (True, False):
        assert counts(chain.parts, program, of_input) == [1]
        assert slices(chain.parts, program, of_input, 2) == whole(program)


def test_activations_in_another_order_are_not_kept(monkeypatch):
    structure, factors, x, _, _ = problem(*CHAINS["two"], torch.float32)
    chain = chain_of(structure)
    program = chain.program("float32")
    monkeypatch.setattr(_rules, "limits", lambda: replace(limits(), sums_slice=0))
    monkeypatch.setattr(_rules, "KEPT_WORK", 0)
    monkeypatch.setattr(_rules, "FRESH_WORK", 0)
    monkeypatch.setattr(chain, "room", lambda *_: 1 << 30)
    assert chain.back("float32", 1).states is not None
    assert chain.kept_tokens("float32", TOKENS, 1) == TOKENS
    first, middle, last = program.schedule.states
    monkeypatch.setattr(program, "schedule", replace(program.schedule, states=(first, middle[::-1], last)))
    chain.made.clear()
    assert chain.back("float32", 1).states is None
    kept = []
    chain.forward(x, factors, None, kept)
    assert not kept


def test_activations_kept_for_other_threads_are_read(monkeypatch):
    """With as many threads as there are in the backward pass they may not lie as slices would read them."""
    structure, factors, x, gy, _ = problem(*CHAINS["two"], torch.float64)
    chain, kept = chain_of(structure), []
    monkeypatch.setattr(chain, "kept_tokens", lambda *_: 48)
    chain.forward(x, factors, None, kept)
    wanted = chain.backward(gy, x, factors, [True] * 4, kept)
    found = slices(chain.parts, chain.program(str(x.dtype).removeprefix("torch.")), True, 4)
    monkeypatch.setattr(chain, "back", lambda *_: replace(found, states=None))
    for got, exact in zip(chain.backward(gy, x, factors, [True] * 4, kept), wanted, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize(
    ("size", "numel", "most", "count"),
    [
        (64, 1000, 1000, 1),
        (64, 1001, 1000, 2),
        (48, 2900, 1000, 3),
        (48, 4100, 1000, 6),
        (64, 15000, 1000, 8),  # not 16, of 4 neighbours each, as 8 are not twice as large
        (64, 17000, 1000, 32),  # but these are more than twice as large
        (4, 10**6, 1000, 4),
        (7, 1001, 1000, 7),
    ],
)
def test_enough(size, numel, most, count):
    assert enough([n for n in range(1, size + 1) if size % n == 0], numel, most) == count


@pytest.mark.parametrize(("numel", "larger", "count"), [(17000, 4, 8), (33000, 4, 64), (33000, 5, 8)])
def test_wider_slices(numel, larger, count):
    assert enough([n for n in range(1, 65) if 64 % n == 0], numel, 1000, larger) == count


def test_slices_take_less_memory():
    """Of the sums of each thread, of copies of factors and of activations they have their part at a time."""
    structure = sl.design("monarch", (1024, 1024), blocks=8)
    chain = chain_of(structure)
    for dtype in ("float32", "bfloat16"):
        program = chain.program(dtype)
        parts = slices(chain.parts, program, True, 8)
        assert parts.count == 8
        assert math.prod(parts.program.shapes[0]) * 8 == math.prod(program.shapes[0])
        for threads in (1, 2, 16):
            assert parts.program.work_bytes(threads, True) < program.work_bytes(threads, True)
