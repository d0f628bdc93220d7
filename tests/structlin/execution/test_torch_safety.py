"""What is known of operands before their memory is read by address, and that nothing is read that does not fit."""

from functools import cache

import pytest
import torch
from helpers.children import assert_ran, isolated

import structlin as sl
from structlin import execution
from structlin.execution import _guard
from structlin.execution._gradients import chain_gradients
from structlin.execution._guard import Guard, addressable, guard_of
from structlin.execution.products import products
from structlin.execution.torch_cpu import CPUChain, SingleProducts
from structlin.execution.torch_ways import torch_chain
from structlin.testing import random_chain

TORCH = sl._arrays.ops("torch")
BTT = sl.Structure.parse("pa,pfra->frp; frp,ferp->fe", p=4, a=4, f=4, r=1, e=4)


def operands(tokens=64, dtype=torch.float64, structure=BTT):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, structure.d_in, dtype=dtype, generator=generator)
    return x, sl.random_factors(structure, seed=2, backend="torch", dtype=dtype)


# -- single tensors ----------------------------------------------------------------------------------------------------


def test_plain_tensors_are_addressable():
    x = torch.randn(6, 4)
    with torch.inference_mode():
        made = torch.randn(3)
    for tensor in (x, x[2:], x[:, ::2], x.T, x[1, 1:], torch.nn.Parameter(x), torch.empty(0, 4), torch.empty(0, 4).T,
                   x[:0], x.new_empty(()), made, x.expand(3, 6, 4), x.bfloat16()):  # fmt: skip
        assert addressable(tensor)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, device="meta"),
        torch._neg_view(torch.randn(4)),
        torch._efficientzerotensor(4),
        torch._to_functional_tensor(torch.randn(4)),
        torch.randn(4, 3).to_sparse(),
        torch.randn(4, 3).to_sparse_csr(),
        torch.randn(4, 3).to_mkldnn(),
        torch.randn(4).as_subclass(Subclass),
        torch.nn.Parameter(torch.randn(4).as_subclass(Subclass)),
    ],
    ids=["meta", "negative", "zero", "functional", "sparse", "csr", "mkldnn", "subclass", "parameter"],
)
def test_what_has_no_address(tensor):
    assert not addressable(tensor)


@pytest.mark.parametrize("kept", [0, 40])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[2:], lambda x: x.T, lambda x: x[:, ::2]])
def test_storages_that_are_too_small(view, kept):
    tensor = view(torch.randn(6, 4))
    assert addressable(tensor)
    tensor.untyped_storage().resize_(kept)
    with pytest.raises(ValueError, match=f"the storage of factor W3 has {kept} bytes, but shape .* need (96|92)"):
        addressable(tensor, "factor W3")


def test_batches_have_no_address():
    seen = []

    def look(x):
        seen.append(addressable(x))
        return x

    torch.func.vmap(look)(torch.randn(3, 4))
    torch.func.grad(lambda x: look(x).sum())(torch.randn(4))
    assert seen == [False, False]


# -- the operands of a structure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.to("meta"), "is on device meta, the input is on cpu"),
        (lambda t: t[:-1], r"has shape \(3, .*\), expected \(4, "),
        (lambda t: t.reshape(-1), r"has shape \(64,\), expected \(4, "),
        (lambda t: t.transpose(1, 2), r"has shape \(4, 1, 4, 4\), expected \(4, "),
        (lambda t: t.float(), r"the input is torch.float64, the parameters are torch.float32 \(factor W.\)"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_wrong_factors(change, words, number):
    x, factors = operands()
    wrong = list(factors)
    wrong[number] = change(wrong[number])
    if wrong[number].shape == factors[number].shape and wrong[number].dtype == x.dtype and words.startswith("has"):
        pytest.skip("the axes that are exchanged have one size")
    for call in (torch_chain(BTT), Guard(BTT).check):
        with pytest.raises(ValueError, match=words) as raised:
            call(x, wrong)
        assert f"factor W{number}" in str(raised.value)


def test_wrong_bias():
    x, factors = operands()
    for bias in (torch.zeros(15, dtype=x.dtype), torch.zeros(16, dtype=x.dtype, device="meta"), torch.zeros(16)):
        with pytest.raises(ValueError, match="the bias"):
            torch_chain(BTT)(x, factors, bias)


def test_integer_factors():
    structure = sl.design("permutation", (6, 6))
    guard, x = guard_of(structure), torch.randn(2, 6)
    guard.check(x, [torch.arange(6)])
    with pytest.raises(ValueError, match=r"is torch.float32, expected an integer dtype"):
        guard.check(x, [torch.arange(6.0)])
    with pytest.raises(ValueError, match=r"has shape \(5,\), expected \(6,\)"):
        guard.check(x, [torch.arange(5)])


def test_autocast_takes_operands_of_several_dtypes():
    x, factors = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = BTT._rows(factors, x.bfloat16(), TORCH)
    assert y.dtype == torch.bfloat16
    wanted = BTT.apply(factors, x)
    assert (y - wanted).norm() < 0.02 * wanted.norm()


CHANGED = {
    "shape": lambda f: f.mT.clone(),
    "strides": lambda f: f.mT.contiguous().mT,
    "dtype": lambda f: f.float(),
    "device": lambda f: f.to("meta"),
    "layout": lambda f: f.to_sparse(),
    "sign": lambda f: torch._neg_view(f),
    "class": lambda f: f.as_subclass(Subclass),
    "functional": torch._to_functional_tensor,
    "zero": lambda f: torch._efficientzerotensor(tuple(f.shape), dtype=f.dtype),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("change", [*CHANGED, "freed", "cut", "watched"])
def test_what_passed_once_is_looked_at_again(change, fast, monkeypatch):
    """The check in C++ of operands like those that passed sees what the loop over them sees."""
    if not fast:
        monkeypatch.setattr(_guard, "TensorGuards", None)
    structure = sl.Structure.parse("pa,pfa->fp; fp,fep->fe", p=4, a=6, f=3, e=5)
    guard = Guard(structure)
    x, (*factors,) = operands(7, structure=structure)
    bias = torch.ones(structure.d_out, dtype=x.dtype)
    for _ in range(2):
        assert guard.plain(x, [*factors, bias])
    assert bool(guard._passed) is fast
    with torch.inference_mode():
        assert guard.plain(x, [*factors, bias])
    assert guard.plain(x, [torch.nn.Parameter(factors[0]), factors[1], bias])  # another class, that is plain too
    if change == "watched":
        seen = []

        def look(v):
            seen.append(guard.plain(x, [factors[0], v, bias]))
            return v

        torch.func.vmap(look)(torch.stack([factors[1]] * 2))
        assert seen == [False]
        return
    if change in CHANGED:
        factors[1] = CHANGED[change](factors[1])
    else:
        factors[1].untyped_storage().resize_(0 if change == "freed" else factors[1].nbytes - 1)
    assert not guard.plain(x, [*factors, bias])
    assert not guard.plain(x, [*factors, bias])


def test_guards_are_copied_by_their_structure():
    import pickle

    guard = guard_of(BTT)
    assert pickle.loads(pickle.dumps(guard)) is guard_of(BTT)


def test_what_watches_single_products_sees_them(monkeypatch):
    x, factors = operands()
    seen = []
    run = CPUChain.forward
    monkeypatch.setattr(CPUChain, "forward", lambda *a, **k: seen.append(True) or run(*a, **k))

    def look(x):
        return BTT._rows(factors, x, TORCH)

    with execution.using("chunked"):
        look(x)
    assert seen.pop()
    with execution.using("chunked"):
        torch.func.jvp(look, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            look(x)
        torch.jit.trace(look, x, check_trace=False)
        with torch.autocast("cpu"):
            look(x)
    assert not seen


# -- the backward pass -------------------------------------------------------------------------------------------------


class Counted:
    """Passes that count their calls."""

    def __init__(self, structure):
        self.single, self.calls = SingleProducts(structure, True), []

    def forward(self, x, factors, bias=None, kept=None):
        if kept is not None:
            kept.append(torch.ones(7, dtype=x.dtype))
        return self.single.forward(x, factors, bias)

    def backward(self, gy, x, factors, needs, kept=()):
        self.calls.append(len(kept))
        return self.single.backward(gy, x, factors, needs)


def run(pack=lambda t: t, unpack=lambda t: t):
    """Gradients with hooks on what is saved; how often passes read it, and with how many activations."""
    chain, (x, factors) = CPUChain(BTT), operands()
    passes, inputs = Counted(BTT), [t.requires_grad_() for t in (x, *factors)]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = chain(passes, x, factors)
    gy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, inputs, gy)
    wanted = torch.autograd.grad(products(BTT, factors, x, TORCH), inputs, gy)
    return passes.calls, found, wanted


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda t: t, [1]),
        (lambda t: t.clone(), [1]),
        (lambda t: torch.nn.Parameter(t), [1]),
        (lambda t: torch.stack((t, t), -1)[..., 0], [0]),  # activations are read as they were written
        (lambda t: t.float() if t.shape == (7,) else t, [0]),
        (lambda t: t[:6] if t.shape == (7,) else t, [0]),
        (lambda t: t.float(), []),
        (lambda t: t.bfloat16(), []),
        (lambda t: t.as_subclass(Subclass), [0]),  # what is saved of inputs is a plain tensor again
        (lambda t: torch._neg_view(-t), []),
        (lambda t: t.bfloat16() if t.shape == (64, 16) else t, []),
        (lambda t: t.bfloat16() if t.ndim == 4 else t, []),
    ],
)
def test_hooks_on_saved_tensors(change, calls):
    found_calls, found, wanted = run(unpack=change)
    assert found_calls == calls
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == torch.float64
        assert (got - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.reshape(-1), r"input that was saved for the backward pass has shape \(1024,\) now"),
        (lambda t: t.reshape(-1) if t.ndim == 4 else t, r"factor W0 has shape \(64,\), expected"),
    ],
)
def test_saved_tensors_of_another_shape(change, words):
    with pytest.raises(ValueError, match=words):
        run(unpack=change)


def test_gradients_of_every_chain():
    """By single products: those of torch's own derivatives, in any selection, for rows and columns."""
    number = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        structure = random_chain(sl.testing.np.random.default_rng(seed))
        dtype = torch.complex128 if seed % 4 == 0 else torch.float64
        factors = [torch.randn(f.shape, dtype=dtype, generator=generator) for f in structure.factors]
        for rows in (True, False):
            tokens = seed % 4
            shapes = [(tokens, d) if rows else (d, tokens) for d in (structure.d_in, structure.d_out)]
            x, gy = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
            needs = [bool(torch.rand((), generator=generator) < 0.6) for _ in range(1 + len(factors))]
            if not any(needs):
                needs[seed % len(needs)] = True
            given = [t.clone().requires_grad_(need) for t, need in zip((x, *factors), needs, strict=True)]
            y = products(structure, given[1:], given[0], TORCH, rows)
            wanted = torch.autograd.grad(y, [t for t in given if t.requires_grad], gy)
            found = chain_gradients(structure, gy, x, factors, needs, rows)
            for got, exact in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
                number += 1
    assert number > 150


# -- what would crash --------------------------------------------------------------------------------------------------

START = """
structure = structlin.design("block_tensor_train", (256, 256))
x, factors = torch.randn(512, 256), structlin.random_factors(structure, seed=1, backend="torch")
"""

SCRIPTS = {
    "factor on meta": """
wrong = [factors[0], factors[1].to("meta")]
expect(ValueError, lambda: structure.apply(wrong, x), ["factor W1 is on device meta"])
expect(ValueError, lambda: structure.apply_columns(wrong, x.T), ["factor W1 is on device meta"])
""",
    "input on meta": """
expect(ValueError, lambda: structure.apply(factors, x.to("meta")), ["factor W0 is on device cpu"])
""",
    "everything on meta": """
y = structure.apply([factor.to("meta") for factor in factors], x.to("meta"))
assert y.is_meta
assert y.shape == (512, 256)
""",
    "freed": """
factors[1].untyped_storage().resize_(0)
expect(ValueError, lambda: structure.apply(factors, x), ["the storage of factor W1 has 0 bytes"])
""",
    "half a storage": """
factors[1].untyped_storage().resize_(factors[1].nbytes // 2)
expect(ValueError, lambda: structure.apply(factors, x), ["the storage of factor W1 has"])
""",
    "freed before the backward pass": """
x.requires_grad_()
y = structure.apply(factors, x)
factors[1].untyped_storage().resize_(0)
expect(ValueError, lambda: y.sum().backward(), ["0 bytes"])
""",
    "wrong shape": """
expect(ValueError, lambda: structure._rows([factors[0], factors[1][:4]], x, structlin._arrays.ops("torch")), ["W1"])
""",
    "another default device": """
wanted = structure.apply(factors, x)
x.requires_grad_()
for threads in (1, 2):
    torch.set_num_threads(threads)
    with torch.device("meta"):
        y = structure.apply(factors, x)
        columns = structure.apply_columns(factors, x.T)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    close([y, columns.T], [wanted, wanted])
    assert gradient.device.type == "cpu"
""",
    "chunked on another default device": """
from structlin.execution.torch_cpu import chain_of
chain, wanted = chain_of(structure), structure.apply(factors, x)
operands = [t.requires_grad_() for t in (x, *factors)]
gradients = torch.autograd.grad(structure.apply(factors, x).sum(), operands)
with torch.device("meta"):
    y = chain(chain.chunked, x, factors)
    found = torch.autograd.grad(y.sum(), operands)
close(y, wanted)
close(found, gradients)
""",
    "traced": """
def run(x):
    return structure.apply(factors, x)
run.__module__ = "__main__"
with torch.no_grad():
    traced = torch.jit.trace(run, x)
other = torch.randn(512, 256)
close(traced(other), structure.apply(factors, other))
""",
    "traced by make_fx": """
from torch.fx.experimental.proxy_tensor import make_fx
from structlin.execution.torch_cpu import chain_of
chain, other = chain_of(structure), torch.randn(512, 256)
for run in (lambda x: structure.apply(factors, x), lambda x: chain(chain.chunked, x, factors)):
    close(make_fx(run)(x)(other), structure.apply(factors, other))
""",
}


@cache
def results():
    scripts = {name: START + script for name, script in SCRIPTS.items()}
    return isolated(scripts, STRUCTLIN_EXECUTION="compiled,chunked")  # the ways that take addresses


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_crashes(name):
    assert_ran(results()[name])
