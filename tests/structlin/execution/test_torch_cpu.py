"""The ways to run a chain on a CPU give what the portable plan gives, and its gradients of every kind."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.designs import CASES
from torch.utils.flop_counter import FlopCounterMode

import structlin as sl
from structlin import execution
from structlin._arrays import ops
from structlin.execution import choice, torch_cpu
from structlin.execution import chunked as _chunked
from structlin.execution.compiled import _rules, _target, passes
from structlin.execution.compiled._limits import limits
from structlin.execution.products import products
from structlin.execution.torch_cpu import chain_of
from structlin.testing import dense_matrix, random_chain


def make(name, dtype=torch.float64, tokens=11):
    shape, options = CASES[name]
    structure = sl.design(name, shape, **options)
    factors = [f.requires_grad_() for f in sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)]
    x = torch.randn(tokens, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(2), requires_grad=True)
    return structure, factors, x


# What the BLAS does not run in chunks: plain matrices, and vectors that are regrouped between two steps.
LEFT_OUT = {"low_rank", "butterfly"}


def runs(way, name):
    return way != "chunked" or name not in LEFT_OUT


HOST = _target.host()
WAYS = ["chunked"]
if HOST is not None:
    WAYS += ["fused", "threads"]
    if HOST.width == 64:
        WAYS.append("avx2")


@pytest.fixture(params=WAYS)
def way(monkeypatch, request):
    """One of the ways, for any number of tokens, in several chunks and blocks with a shorter last one."""
    monkeypatch.setattr(_chunked, "MIN_CHUNK", 4)
    monkeypatch.setattr(_chunked, "MAX_CHUNK", 4)
    monkeypatch.setattr(_chunked, "PACK_TOKENS", 4)
    monkeypatch.setattr(_rules, "WASTE", 1e9)
    monkeypatch.setattr(_rules, "SHARE", 4)
    target = None if request.param == "chunked" else HOST
    if request.param == "avx2":  # the code for fewer and shorter registers
        target = _target.AVX2
    monkeypatch.setattr(_rules, "host", lambda: target)
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "threads" else 1)
    with execution.using("chunked,products" if request.param == "chunked" else "compiled,products"):
        yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Counts the chains that are run by one of the ways."""
    made = []
    for kind in (_chunked.ChunkedChain, passes.FusedChain):

        def count(self, *arguments, forward=kind.forward):
            made.append(self)
            return forward(self, *arguments)

        monkeypatch.setattr(kind, "forward", count)
    return made


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, way, calls):
    structure, factors, x = make(name, tokens=157)
    if not runs(way, name):
        return
    y = structure.apply(factors, x)
    assert [type(c) for c in calls] == [_chunked.ChunkedChain if way == "chunked" else passes.FusedChain]
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [x, *factors], weights)

    def portable(x, *factors):
        return (structure.apply([f * 1 for f in factors], x) * weights).sum()

    expected = torch.func.grad(portable, argnums=tuple(range(1 + len(factors))))(x, *factors)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck_twice(name, way):
    structure, factors, x = make(name, tokens=5)

    def apply(x, *factors):
        return structure.apply(factors, x)

    assert torch.autograd.gradcheck(apply, (x, *factors), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(apply, (x, *factors))


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("needed", [0, 1, -1])
def test_only_some_gradients(name, needed, way):
    structure, factors, x = make(name)
    inputs = [x, *factors]
    full = torch.autograd.grad(structure.apply(factors, x).square().sum(), inputs)
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(k == needed % len(inputs))
    (got,) = torch.autograd.grad(structure.apply(factors, x).square().sum(), [inputs[needed]])
    torch.testing.assert_close(got, full[needed], rtol=1e-12, atol=1e-12)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_other_dtypes(name, dtype, way, calls):
    if not runs(way, name) or (way == "chunked" and dtype == torch.float16):  # of which the BLAS has no fast products
        return
    structure, factors, x = make(name, dtype)
    with torch.no_grad():
        y = structure.apply(factors, x)
    assert calls
    assert y.dtype == dtype
    doubles = [t.detach().double().requires_grad_() for t in (x, *factors)]
    expected = structure.apply(doubles[1:], doubles[0])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 2e-3}[dtype]
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights.to(dtype))
    for got, wanted in zip(found, torch.autograd.grad(expected, doubles, weights), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", CASES)
def test_bias_is_added(name, way, calls):
    if not runs(way, name):
        return
    structure, factors, x = make(name)
    bias = torch.randn(structure.d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    bias.requires_grad_()
    y = structure._rows(factors, x, sl._arrays.ops("torch"), bias)
    assert calls
    torch.testing.assert_close(y, structure.apply(factors, x) + bias, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (for_bias,) = torch.autograd.grad(y, [bias], weights, retain_graph=True)
    torch.testing.assert_close(for_bias, weights.sum(0), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, [x, *factors, bias], weights)
    expected = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights)
    torch.testing.assert_close(found, (*expected, weights.sum(0)), rtol=1e-12, atol=1e-12)


@pytest.mark.covering(2)
@pytest.mark.parametrize("tokens", [11, 75])
@pytest.mark.parametrize("name", CASES)
def test_columns(name, tokens, way, calls):
    structure, factors, x = make(name, tokens=tokens)
    columns = x.detach().T.contiguous().requires_grad_()
    y = structure.apply_columns(factors, columns)
    assert calls or (way == "chunked" and (name in LEFT_OUT or name in ("kronecker", "tensor_train")))
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    torch.testing.assert_close(y, matrix @ columns, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [columns, *factors], weights)
    expected = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights.T)
    torch.testing.assert_close(found[0], expected[0].T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tuple(found[1:]), tuple(expected[1:]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("spare", "tokens"), [(0, 0), (1, 4), (2, 8), (100, 11)])
@pytest.mark.parametrize("way", ["chunked"], indirect=True)
def test_chunks_that_are_kept_change_nothing(spare, tokens, way, monkeypatch):
    """None, the first chunks only, all."""
    structure, factors, x = make("block_tensor_train")
    chain = chain_of(structure).chunked
    assert sum(chain.widths[1:-1]) > min(chain.widths[0], chain.widths[-1])
    # In chunks of 4 tokens; two more are buffers.
    monkeypatch.setattr(chain, "spare", sum(chain.widths[1:-1]) * (spare * 4 + 8))
    kept = []
    chain.forward(x, factors, None, kept)
    assert kept[0].numel() == chain.widths[1] * tokens
    weights = torch.randn(11, 35, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights)
    *expected, bias = chain.backward(weights, x, factors, [True] * 4)
    torch.testing.assert_close(bias, weights.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", [w for w in WAYS if w != "chunked"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_activations_that_are_kept_change_nothing(name, way, monkeypatch):
    """None, those of some tokens, and all."""
    structure, factors, x = make(name, tokens=101)
    chain = chain_of(structure).compiled
    weights = torch.randn(101, structure.d_out, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    rows = chain.given(passes.NAMES[x.dtype]).schedule.rows[1:-1]
    found, steps = [], len(factors)
    for tokens in (0, 48, 101):
        most = 1 << 30 if tokens else 0
        monkeypatch.setattr(_rules, "limits", lambda most=most: replace(limits(), kept=most))
        monkeypatch.setattr(_rules, "KEPT_WORK", 0)
        monkeypatch.setattr(_rules, "MORE", 0)
        monkeypatch.setattr(chain, "room", lambda *_, n=tokens: n * 8 * sum(rows))
        kept = []
        y = chain.forward(x, factors, None, kept)
        assert [len(t) for t in kept] == ([tokens * row for row in rows] if tokens else [])
        all_, but_x, x_alone = (True,) * (2 + steps), (False, *[True] * (1 + steps)), (True, *[False] * (1 + steps))
        found.append(
            [y, *(g for needs in (all_, but_x, x_alone) for g in chain.backward(weights, x, factors, needs, kept))]
        )
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(HOST is None, reason="nothing is compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_kept_has_room_beside_what_a_dense_matrix_takes(dtype):
    structure = sl.design("monarch", (512, 512), blocks=4)
    chain = chain_of(structure).compiled
    program = chain.given(passes.NAMES[dtype])
    size = sum(program.schedule.rows[1:-1]) * dtype.itemsize
    dense, own = 2 * 512 * 512 * dtype.itemsize, 2 * chain.numel * dtype.itemsize
    for tokens in (48, 480, 1440):
        kept = chain.kept_tokens(passes.NAMES[dtype], tokens, chain.shares(tokens, torch.get_num_threads()))
        back = chain.back(passes.NAMES[dtype], chain.shares(tokens, torch.get_num_threads())).program
        if chain.room(back, chain.shares(tokens, torch.get_num_threads()), False) < -0.05 * dense:
            assert kept == tokens  # as much as x
        else:
            work = back.work_bytes(chain.shares(tokens, torch.get_num_threads()), kept == tokens)
            assert kept == 0 or kept * size + own + work <= (1.1 if kept == tokens else 1) * dense
            assert 0 <= kept <= tokens


@pytest.mark.skipif(HOST is None, reason="nothing is compiled here")
def test_a_backward_pass_of_the_other_kind(monkeypatch):
    structure, factors, x = make("block_tensor_train", tokens=700)
    wanted = torch.autograd.grad(products(structure, factors, x, sl._arrays.ops("torch")).sin().sum(), [x, *factors])
    ran = []
    for kind in (passes.FusedChain, _chunked.ChunkedChain):
        run = kind.backward
        monkeypatch.setattr(kind, "backward", lambda *a, kind=kind, run=run: ran.append(kind) or run(*a))
    for way in ("compiled", "compiled-chunked"):
        with execution.using(way):
            found = torch.autograd.grad(structure.apply(factors, x).sin().sum(), [x, *factors])
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert ran == [passes.FusedChain, _chunked.ChunkedChain]


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (2, 3, 6)])
def test_batch_shapes(shape):
    structure, factors, _ = make("block_tensor_train")
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = structure.apply(factors, x)
    assert y.shape == (*shape[:-1], 35)
    gx, *gw = torch.autograd.grad(y.sum(), [x, *factors])
    assert gx.shape == x.shape
    assert all(torch.isfinite(g).all() for g in gw)


def test_strided_input_and_gradient():
    structure, factors, _ = make("block_tensor_train")
    x = torch.randn(12, 9, dtype=torch.float64).T[:, ::2].requires_grad_()
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    y = structure.apply(factors, x)
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-12, atol=1e-12)
    (gx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(gx, matrix.sum(0).expand_as(x), rtol=1e-12, atol=1e-12)


def test_views_with_the_sign_turned_are_read_as_such(way):
    structure, factors, x = make("block_tensor_train")
    weights = torch.randn(11, structure.d_out, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights)
    turned = torch._neg_view(-x.detach()).requires_grad_()
    assert turned.is_neg()
    found = torch.autograd.grad(structure.apply(factors, turned), [turned, *factors], torch._neg_view(-weights))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_transformations_take_the_portable_plan(calls):
    structure, factors, x = make("block_tensor_train")
    expected = x @ torch.from_numpy(dense_matrix(structure, factors)).T
    batched = torch.func.vmap(lambda row: structure.apply(factors, row))(x)
    torch.testing.assert_close(batched, expected, rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(lambda x: structure.apply(factors, x), (x,), (x.detach(),))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        structure._rows([f.float() for f in factors], x.float(), sl._arrays.ops("torch"))
    assert not calls  # nor was anything measured


def test_random_chains_agree(way):
    run = 0
    for seed in range(60 if way == "chunked" else 16):
        structure = random_chain(np.random.default_rng(seed))
        factors = [
            f.requires_grad_() for f in sl.random_factors(structure, seed=seed, backend="torch", dtype="float64")
        ]
        x = torch.randn(9, structure.d_in, dtype=torch.float64)
        chain = chain_of(structure)
        run += chain.chunked.merges if way == "chunked" else chain.compiled.ready(x.dtype)
        matrix = torch.from_numpy(dense_matrix(structure, factors))
        torch.testing.assert_close(structure.apply(factors, x), x @ matrix.T, rtol=1e-10, atol=1e-10)
        plain = torch.func.grad(lambda *f, s=structure, x=x: s.apply(f, x).square().sum(), tuple(range(len(factors))))
        found = torch.autograd.grad(structure.apply(factors, x).square().sum(), factors)
        torch.testing.assert_close(found, tuple(plain(*factors)), rtol=1e-9, atol=1e-9)
    assert run >= (8 if way == "chunked" else 12)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_structure(name, way, calls):
    structure, factors, x = make(name, torch.float32)
    with FlopCounterMode(display=False) as counter:
        structure.apply(factors, x)
    assert counter.get_total_flops() == 2 * structure.macs * len(x)


def test_pickling_leaves_the_plans_behind():
    structure, factors, x = make("block_tensor_train")
    before = len(pickle.dumps(structure))
    structure.apply(factors, x)
    data = pickle.dumps(structure)
    assert len(data) == before
    assert b"torch" not in data
    assert pickle.loads(data) == structure


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("name", "shape"),
    [*(("block_tensor_train", shape) for shape in [(53, 47), (60, 47), (53, 48)]), ("monarch", (61, 59))],
)
def test_padded_and_cut(name, shape, way, calls):
    """Sizes that are no multiples: the input is padded with zeros, the output is cut."""
    d_out, d_in = shape
    if name == "monarch":  # its blocks do not divide the inner size either: the vector is regrouped
        structure = sl.design(name, shape, blocks=4)
    else:
        chain = "pa,pfra->frp; frp,ferp->fe"
        structure = sl.Structure.parse(chain, p=6, a=8, f=10, r=2, e=6, d_in=d_in, d_out=d_out)
    factors = [f.requires_grad_() for f in sl.random_factors(structure, seed=1, backend="torch", dtype="float64")]
    generator = torch.Generator().manual_seed(5)
    x, bias, gy = (
        torch.randn(n, dtype=torch.float64, generator=generator) for n in ((29, d_in), (d_out,), (29, d_out))
    )
    x.requires_grad_()
    y = structure._rows(factors, x, sl._arrays.ops("torch"), bias)
    assert bool(calls) == (way != "chunked" or name != "monarch")
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    torch.testing.assert_close(y, x @ matrix.T + bias, rtol=1e-12, atol=1e-12)
    columns = structure.apply_columns(factors, x.T)
    torch.testing.assert_close(columns, matrix @ x.T, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(columns, [x, *factors], gy.T), torch.autograd.grad(y, [x, *factors], gy, retain_graph=True),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(y, [x, *factors], gy)
    expected = torch.autograd.grad(products(structure, factors, x, sl._arrays.ops("torch")), [x, *factors], gy)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 35, 36, 73, 145])
def test_every_number_of_tokens(tokens, way):
    """Tiles of rows for the last tokens; nothing is read or written beyond the ends."""
    structure, factors, _ = make("block_tensor_train")
    x = torch.full((tokens + 2, 6), torch.nan, dtype=torch.float64)
    x[1:-1] = torch.randn(tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    y = structure.apply([f.detach() for f in factors], x[1:-1])
    torch.testing.assert_close(
        y, x[1:-1] @ torch.from_numpy(dense_matrix(structure, factors)).T, rtol=1e-12, atol=1e-12
    )
    ran = chain_of(structure).passes("chunked" if way == "chunked" else "compiled", x.dtype)
    gx, *_ = ran.backward(y, x[1:-1], factors, [True, False, False, False])
    assert torch.isfinite(gx).all()


def test_storages_of_operands_can_still_be_resized(way):
    """FSDP frees gathered weights so."""
    structure, factors, x = make("block_tensor_train")
    structure.apply(factors, x).sum().backward()
    for tensor in (*factors, x):
        assert tensor.untyped_storage().resizable()


def test_what_nothing_is_compiled_for(monkeypatch):
    structure, _, x = make("block_tensor_train")
    monkeypatch.setattr(_rules, "host", lambda: None)  # no llvmlite, no AVX2
    assert chain_of(structure).passes("compiled", x.dtype) is None
    assert chain_of(structure).passes("chunked", x.dtype) is not None


def test_an_old_compiler_is_left_alone(monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(llvm, "llvm_version_info", (15, 0, 7))
    assert _target._binding.__wrapped__() is None


def test_compiled_passes_can_be_left_out(monkeypatch):
    """By the policy in the environment."""
    problem = execution.problem_of(make("block_tensor_train")[0], 4096, dtype="float64", threads=1)
    for policy in ("-compiled,-compiled-chunked", "estimate,-compiled,-compiled-chunked"):
        monkeypatch.setenv("STRUCTLIN_EXECUTION", policy)
        assert choice.choose(problem).name not in ("compiled", "compiled-chunked")
        found = [c.way.name for c in choice.candidates(problem, choice.policy_of(policy))]
        assert "products" in found
        assert not {"compiled", "compiled-chunked"} & set(found)


def test_threads_share_the_tokens_in_processes_that_were_forked(way):
    if way != "threads" or not hasattr(os, "fork"):
        return
    structure, factors, x = make("block_tensor_train", tokens=40)
    with torch.no_grad():
        y = structure.apply(factors, x)
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(structure.apply(factors, x), y) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(HOST is None or not HOST.half_products, reason="the processor multiplies no pairs of bfloat16")
@pytest.mark.parametrize("tokens", [46, 157])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_tensor_train", {"rank": 1}),  # pairs along an axis that is no neighbour in memory
        ("block_tensor_train", {"rank": 2}),
        ("block_tensor_train", {"rank": 3}),
        ("monarch", {"blocks": 4}),
        ("monarch", {"blocks": 16}),  # along a part of an axis
        ("tensor_train", {"rank": 4}),
        ("tensor_train", {"rank": 3}),
        ("kronecker", {}),
        ("kronecker", {"cores": 3}),
        ("low_rank", {"rank": 10}),
        ("blast", {"blocks": 4, "rank": 6}),
    ],
)
def test_pairs_of_bfloat16(name, options, tokens):
    """Sums are in float32; what lies between two steps is rounded to bfloat16."""
    structure = sl.design(name, (20 * 36, 16 * 28), **options)
    chain = chain_of(structure).compiled
    program = chain.program("bfloat16")
    operations = (*program.schedule.forward, *program.schedule.back)
    assert any(operation.product.paired for operation in operations)
    if name == "block_tensor_train" and options["rank"] == 1:
        assert [operation.reads for operation in operations] == ["half", "zipped", "zipped", "half"]
    factors = sl.random_factors(structure, seed=1, backend="torch", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    x, gy = (torch.randn(tokens, d, generator=generator).to(torch.bfloat16) for d in structure.shape[::-1])
    doubles = [t.double().requires_grad_() for t in (x, *factors)]
    expected = products(structure, doubles[1:], doubles[0], sl._arrays.ops("torch"))
    wanted = (expected, *torch.autograd.grad(expected, doubles, gy.double()), gy.double().sum(0))
    found = (chain.forward(x, factors), *chain.backward(gy, x, factors, [True] * (2 + len(factors))))
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.skipif(HOST is None, reason="the compiler for this processor is not there")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slices_that_stay_in_the_second_level_of_cache(monkeypatch, threads, dtype):
    """Each slice adds its part: forward of the output, backward of the input and of the gradients of factors."""
    structure = sl.design("block_tensor_train", (96, 64), rank=2)
    monkeypatch.setattr(_rules, "near_slice", lambda: structure.num_params // 2)
    chain = torch_cpu.CPUChain(structure)
    passes = chain.passes("compiled-near", dtype)
    name = str(dtype).removeprefix("torch.")
    assert passes.front(name, False).count > 1
    assert passes.back(name, threads).count > 1
    factors = [f.to(dtype) for f in sl.random_factors(structure, seed=1, backend="torch", dtype=torch.float64)]
    x, gy = (torch.randn(70, size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (64, 96))
    wide = [t.double().requires_grad_() for t in (x, *factors)]
    expected = products(structure, wide[1:], wide[0], ops("torch"), True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = passes.forward(x, factors)
        found = passes.backward(gy, x, factors, [True, True, True, False])
    finally:
        torch.set_num_threads(before)
    wanted = torch.autograd.grad(expected, wide, gy.double())
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for got, want in zip((y, *found[:-1]), (expected, *wanted), strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
