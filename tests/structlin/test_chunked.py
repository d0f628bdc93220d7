"""The chunked execution on a CPU gives what the portable plan gives, and its gradients of every kind."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import structlin as sl
from structlin import _chunked, _small
from structlin.testing import dense_matrix, random_chain

CASES = {
    "kronecker": ((35, 6), {}),
    "tensor_train": ((30, 24), {"cores": 3, "rank": 2}),
    "block_tensor_train": ((35, 6), {"rank": 2}),
    "monarch": ((11, 7), {"blocks": 2}),
    "blast": ((15, 6), {"blocks": 3, "rank": 2}),
    "block_diagonal": ((15, 6), {"blocks": 3}),
}


def make(name, dtype=torch.float64, tokens=11):
    shape, options = CASES[name]
    structure = sl.design(name, shape, **options)
    factors = [f.requires_grad_() for f in sl.random_factors(structure, seed=1, backend="torch", dtype=dtype)]
    x = torch.randn(tokens, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(2), requires_grad=True)
    return structure, factors, x


ENGINES = ["numpy", "torch"]
ALL_ENGINES = ["numpy", "torch", "parts", "threads"]


@pytest.fixture(params=ENGINES)
def small_chunks(monkeypatch, request):
    """Several chunks for a few tokens, the last one shorter, with the products of NumPy and with those of torch."""
    for name, chunk in (("MIN_CHUNK", 4), ("MAX_CHUNK", 4), ("SMALL_CHUNK", 2)):
        monkeypatch.setattr(_chunked, name, chunk)
    monkeypatch.setattr(_chunked, "PACK_TOKENS", 4)
    monkeypatch.setattr(_chunked, "FEW", 0)
    monkeypatch.setattr(_small, "is_faster", lambda: request.param != "torch")
    if request.param == "parts":  # cut into rows one by one where more than one would be too many
        monkeypatch.setattr(_small, "parts", lambda rows, inner, columns: rows)
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "threads" else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Counts the chains that are run in chunks."""
    made = []
    forward = _chunked.ChunkedChain.forward
    monkeypatch.setattr(_chunked.ChunkedChain, "forward", lambda self, *a: made.append(1) or forward(self, *a))
    return made


@pytest.mark.parametrize("small_chunks", ALL_ENGINES, indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, small_chunks, calls):
    structure, factors, x = make(name)
    y = structure.apply(factors, x)
    assert calls, f"{structure!r} was not run in chunks"
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [x, *factors], weights)

    def portable(x, *factors):
        return (structure.apply([f * 1 for f in factors], x) * weights).sum()

    expected = torch.func.grad(portable, argnums=tuple(range(1 + len(factors))))(x, *factors)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_twice(name, small_chunks):
    structure, factors, x = make(name, tokens=5)

    def apply(x, *factors):
        return structure.apply(factors, x)

    assert torch.autograd.gradcheck(apply, (x, *factors), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(apply, (x, *factors))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("needed", [0, 1, -1])
def test_only_some_gradients(name, needed, small_chunks):
    structure, factors, x = make(name)
    inputs = [x, *factors]
    full = torch.autograd.grad(structure.apply(factors, x).square().sum(), inputs)
    for k, tensor in enumerate(inputs):
        tensor.requires_grad_(k == needed % len(inputs))
    (got,) = torch.autograd.grad(structure.apply(factors, x).square().sum(), [inputs[needed]])
    torch.testing.assert_close(got, full[needed], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_other_dtypes(name, dtype, small_chunks, calls):
    structure, factors, x = make(name, dtype)
    with torch.no_grad():
        y = structure.apply(factors, x)
    assert calls
    assert y.dtype == dtype
    doubles = [t.detach().double().requires_grad_() for t in (x, *factors)]
    expected = structure.apply(doubles[1:], doubles[0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights.to(dtype))
    for got, wanted in zip(found, torch.autograd.grad(expected, doubles, weights), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("name", CASES)
def test_bias_is_added(name, small_chunks, calls):
    structure, factors, x = make(name)
    bias = torch.randn(structure.d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    bias.requires_grad_()
    y = structure._rows(factors, x, sl._arrays.ops("torch"), bias)
    assert calls
    torch.testing.assert_close(y, structure.apply(factors, x) + bias, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (for_bias,) = torch.autograd.grad(y, [bias], weights, retain_graph=True)
    torch.testing.assert_close(for_bias, weights.sum(0), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, [x, *factors], weights)
    expected = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["block_tensor_train", "monarch", "blast", "block_diagonal"])
def test_columns(name, small_chunks, calls):
    structure, factors, x = make(name)
    columns = x.detach().T.contiguous().requires_grad_()
    y = structure.apply_columns(factors, columns)
    assert calls
    matrix = torch.from_numpy(dense_matrix(structure, factors))
    torch.testing.assert_close(y, matrix @ columns, rtol=1e-12, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, [columns, *factors], weights)
    expected = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights.T)
    torch.testing.assert_close(found[0], expected[0].T, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("spare", "tokens"), [(0, 0), (1, 4), (2, 8), (100, 11)])
def test_kept_activations_change_nothing(spare, tokens, small_chunks, monkeypatch):
    """None, the first chunks only, all."""
    structure, factors, x = make("block_tensor_train")
    chain = structure._chunked
    assert sum(chain.widths[1:-1]) > min(chain.widths[0], chain.widths[-1])
    # In chunks of 4 tokens; two more are buffers.
    monkeypatch.setattr(chain, "spare", sum(chain.widths[1:-1]) * (spare * 4 + 8))
    kept = []
    chain.forward(x, factors, None, kept)
    assert kept[0].numel() == chain.widths[1] * tokens
    weights = torch.randn(11, 35, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(structure.apply(factors, x), [x, *factors], weights)
    expected = chain.backward(weights, x, factors, [True] * 3)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


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


def test_transformations_take_the_portable_plan(calls):
    structure, factors, x = make("block_tensor_train")
    expected = x @ torch.from_numpy(dense_matrix(structure, factors)).T
    batched = torch.func.vmap(lambda row: structure.apply(factors, row))(x)
    torch.testing.assert_close(batched, expected, rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(lambda x: structure.apply(factors, x), (x,), (x.detach(),))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        structure._rows([f.float() for f in factors], x.float(), sl._arrays.ops("torch"))
    assert not calls


def test_random_chains_agree(small_chunks):
    run = 0
    for seed in range(150):
        structure = random_chain(np.random.default_rng(seed))
        factors = [
            f.requires_grad_() for f in sl.random_factors(structure, seed=seed, backend="torch", dtype="float64")
        ]
        x = torch.randn(9, structure.d_in, dtype=torch.float64)
        run += structure._chunked.merges
        matrix = torch.from_numpy(dense_matrix(structure, factors))
        torch.testing.assert_close(structure.apply(factors, x), x @ matrix.T, rtol=1e-10, atol=1e-10)
        plain = torch.func.grad(lambda *f, s=structure, x=x: s.apply(f, x).square().sum(), tuple(range(len(factors))))
        found = torch.autograd.grad(structure.apply(factors, x).square().sum(), factors)
        for got, wanted in zip(found, plain(*factors), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert run >= 20


@pytest.mark.parametrize("name", ["dense", "low_rank"])
def test_chains_of_plain_matrices_are_left_to_the_portable_plan(name, calls):
    structure = sl.design(name, (35, 6))
    factors = [f.requires_grad_() for f in sl.random_factors(structure, backend="torch")]
    structure.apply(factors, torch.ones(3, 6)).sum().backward()
    assert not calls


def test_large_inputs_are_chunked_without_gradients(calls):
    structure = sl.design("block_tensor_train", (256, 256), rank=4)
    factors = sl.random_factors(structure, backend="torch")
    structure.apply(factors, torch.ones(2, 256))
    assert not calls
    structure.apply(factors, torch.ones(1000, 256))
    assert calls


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_structure(name, small_chunks, calls):
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


def test_storages_of_operands_can_still_be_resized():
    """FSDP frees gathered weights so."""
    left, right, out = torch.randn(3, 8, 4), torch.randn(3, 4, 5), torch.empty(3, 8, 5)
    _small.multiply(left, right, out)
    torch.testing.assert_close(out, left @ right)
    assert left.untyped_storage().resizable()
    assert right.untyped_storage().resizable()
    bias = torch.randn(5)
    _small.add(out, bias)
    torch.testing.assert_close(out, left @ right + bias)
    assert bias.untyped_storage().resizable()
