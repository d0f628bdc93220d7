"""Strided products against dense matrices in float64: values, gradients, kernels, and what runs instead."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structlin
from structlin import execution
from structlin.execution import traffic
from structlin.execution.devices import ALIGNED, DEVICES
from structlin.execution.strided import l2_chunk, strided
from structlin.execution.torch_cuda import StridedWay, node_tokens, strided_l2_way, strided_way
from structlin.execution.torch_ways import torch_chain

CHAINS = {
    "block_tensor_train": ((35, 24), {"rank": 3}),
    "monarch": ((45, 27), {"blocks": 3}),
    "low_rank": ((30, 41), {"rank": 3}),
    "kronecker": ((30, 48), {}),
    "tensor_train": ((60, 84), {"rank": 2, "cores": 3}),
    "block_diagonal": ((30, 48), {"blocks": 3}),
}


def design(name: str) -> Any:
    shape, options = CHAINS[name]
    return structlin.design(name, shape, **options)


def operands(structure: Any, tokens: int, rows: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The input, the bias and the factors."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(tokens, structure.d_in) if rows else (structure.d_in, tokens), (structure.d_out,)]
    shapes += [f.shape for f in structure.factors]
    scales = [1.0, 1.0, *(1 / math.sqrt(f.fan_in) for f in structure.factors)]
    return [
        (s * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for s, shape in zip(scales, shapes, strict=True)
    ]


def dense(structure: Any, factors: Sequence[Tensor]) -> Tensor:
    """By one einsum over all factors: (d_out, d_in)."""
    sizes, steps = dict(structure.sizes), structure.steps
    rows = torch.eye(structure.d_in + structure.padding[0], dtype=factors[0].dtype)
    for step, factor in zip(steps, factors, strict=True):
        rows = rows.reshape(len(rows), *(sizes[a] for a in step.input))
        rows = torch.einsum(f"...{step.input},{step.factor}->...{step.output}", rows, factor)
    return rows.reshape(len(rows), -1)[: structure.d_in, : structure.d_out].mT


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("chunk", [0, 5])
def test_values_and_gradients(name: str, rows: bool, chunk: int) -> None:
    structure = design(name)
    chain = strided(structure, rows)
    if not chain.merges:
        assert not rows
        return
    x, bias, *factors = operands(structure, 13, rows)
    A = dense(structure, factors)
    y = x @ A.mT + bias if rows else A @ x
    gy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(y, [x, *factors, *([bias] if rows else [])], gy)
    kept: list[Tensor] = []
    torch.testing.assert_close(chain.forward(x, factors, bias if rows else None, chunk, kept), y.detach())
    assert bool(kept) == (not chunk and len(factors) > 1)
    for given_kept in (kept, []):
        found = chain.backward(gy, x, factors, [True] * (1 + len(factors)) + [rows], chunk, given_kept)
        for a, b in zip(found, wanted, strict=False):
            torch.testing.assert_close(a, b)
    for asked in range(len(factors)):
        needs = [False, *(k == asked for k in range(len(factors))), False]
        found = chain.backward(gy, x, factors, needs, chunk)
        assert [g is not None for g in found] == needs
        torch.testing.assert_close(found[1 + asked], wanted[1 + asked])


@settings(max_examples=30, deadline=None)
@given(
    a=st.integers(1, 5), b=st.integers(1, 5), c=st.integers(1, 5), d=st.integers(1, 5), e=st.integers(1, 4),
    tokens=st.integers(0, 19), chunk=st.integers(0, 7),
)  # fmt: skip
def test_block_tensor_trains_of_any_size(a: int, b: int, c: int, d: int, e: int, tokens: int, chunk: int) -> None:
    structure = structlin.Structure.parse("ba,bcea->ceb; ceb,cdeb->cd", a=a, b=b, c=c, d=d, e=e)
    x, bias, *factors = operands(structure, tokens, True)
    y = x @ dense(structure, factors).mT + bias
    gy = torch.ones_like(y)
    wanted = torch.autograd.grad(y, [x, *factors, bias], gy)
    chain = strided(structure)
    torch.testing.assert_close(chain.forward(x, factors, bias, chunk), y.detach())
    torch.testing.assert_close(tuple(chain.backward(gy, x, factors, [True] * 4, chunk)), wanted)


@pytest.mark.parametrize("name", ["block_tensor_train", "monarch"])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-23)])
def test_half_precision_adds_chunks_in_float32(name: str, dtype: torch.dtype, eps: float) -> None:
    structure = design(name)
    x, _, *factors = operands(structure, 200, True, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, *factors)]
    y = wide[0] @ dense(structure, wide[1:]).mT
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = torch.autograd.grad(y, wide, gy.double())
    for chunk in (0, 16):
        for found, other in zip(strided(structure).backward(gy, x, factors, [True] * 3 + [False], chunk), wanted,
                                strict=False):  # fmt: skip
            assert found.dtype is dtype
            assert (found.double() - other).norm() <= 8 * eps * other.norm()


def test_tokens_are_rounded_up_between_the_steps() -> None:
    chain = strided(design("monarch"))
    x, _, *factors = operands(chain.structure, 13, True, torch.float32)
    kept: list[Tensor] = []
    chain.forward(x, factors, None, 0, kept)
    assert kept[0].numel() == chain.widths[1] * 16
    assert 16 * x.element_size() % ALIGNED == 0
    assert not strided(design("tensor_train")).rounds


# -- kernels -----------------------------------------------------------------------------------------------------------


def counted(call: Any) -> list[str]:
    with traffic.Recorder() as found:
        call()
    return [kernel.name for kernel in found.kernels]


@pytest.mark.parametrize("name", ["block_tensor_train", "monarch", "low_rank", "kronecker", "tensor_train"])
def test_one_kernel_a_step_on_real_tensors(name: str) -> None:
    structure = design(name)
    x, bias, *factors = (t.detach() for t in operands(structure, 16, True))
    steps = len(factors)
    arranged = ["clone"] * (steps if name == "tensor_train" else 0)  # of factors, which are small
    assert counted(lambda: strided_way.run(structure, factors, x, None, True)) == arranged + ["bmm"] * steps
    with_bias = counted(lambda: strided_way.run(structure, factors, x, bias, True))[len(arranged) :]
    assert with_bias in (["bmm"] * (steps - 1) + ["copy_", "baddbmm"], ["bmm"] * steps + ["add_"])


def test_kernels_of_a_training_step() -> None:
    """Two products forward, and two for each factor backward; nothing is copied, summed by a loop, or read."""
    structure = structlin.Structure.parse("ba,bcea->ceb; ceb,cdeb->cd", a=8, b=4, c=4, d=8, e=1)
    x, _, *factors = operands(structure, 32, True)

    def step() -> None:
        y = strided_way.run(structure, factors, x, None, True)
        torch.autograd.grad(y, [x, *factors], torch.ones_like(y))

    assert [name for name in counted(step) if name != "ones_like"] == ["bmm"] * 6


def test_chunks_fit_in_l2() -> None:
    structure = structlin.design("block_tensor_train", (4096, 4096), rank=2)
    chain = strided(structure)
    chunk = l2_chunk(chain, 65536, 2, 50 << 20, False)
    each = 2 * (4096 + 2 * 4096 + 4096)
    assert chunk % 128 == 0
    assert chunk * each + 2 * structure.num_params <= 25 << 20 < (chunk + 128) * each + 2 * structure.num_params
    assert l2_chunk(chain, chunk, 2, 50 << 20, False) == 0  # all tokens fit
    assert l2_chunk(chain, 65536, 2, 1 << 20, False) == 0  # nothing fits


# -- the way -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the ways for CUDA candidates on a CPU, with an L2 in which three chunks of the test's chain fit."""
    supports = StridedWay.supports
    monkeypatch.setattr(StridedWay, "supports", lambda way, p: supports(way, replace(p, device="cuda")))
    execution.choice.forget()
    with traffic.assuming(replace(DEVICES["h100"], l2=1 << 20)):
        yield
    execution.choice.forget()


@pytest.mark.usefixtures("on_a_cpu")
class TestWay:
    structure = structlin.design("block_tensor_train", (64, 64), rank=2)

    @pytest.mark.parametrize("name", ["strided", "strided-l2"])
    def test_the_entry_of_torch_calls_it(self, name: str) -> None:
        x, bias, *factors = operands(self.structure, 700, True)
        y = x @ dense(self.structure, factors).mT + bias
        wanted = torch.autograd.grad(y.square().sum(), [x, bias, *factors])
        with execution.using(name):
            found = torch_chain(self.structure)(x, factors, bias)
        assert found.grad_fn is not None
        assert "_Differentiable" in type(found.grad_fn).__name__
        torch.testing.assert_close(found, y)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), [x, bias, *factors]), wanted)

    def test_the_same_bits_again(self) -> None:
        x, bias, *factors = operands(self.structure, 700, True, torch.float32)

        def step() -> list[Tensor]:
            y = strided_l2_way.run(self.structure, factors, x, bias, True)
            return [y, *torch.autograd.grad(y.square().sum(), [x, bias, *factors])]

        for a, b in zip(step(), step(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("way", [strided_way, strided_l2_way])
    def test_derivatives_of_derivatives(self, way: StridedWay) -> None:
        structure = design("block_tensor_train")
        x, bias, *factors = operands(structure, 3, True)
        call = lambda x, bias, *factors: way.run(structure, factors, x, bias, True)  # noqa: E731
        assert torch.autograd.gradgradcheck(call, (x, bias, *factors), atol=1e-6)

    def test_batched_gradients_and_transformations(self) -> None:
        structure = design("block_tensor_train")
        x, bias, *factors = operands(structure, 3, True)
        y = strided_way.run(structure, factors, x, bias, True)
        many = torch.randn(4, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
        found = torch.autograd.grad(y, [x, *factors], many, is_grads_batched=True, retain_graph=True)
        for k in range(4):
            for a, b in zip(found, torch.autograd.grad(y, [x, *factors], many[k], retain_graph=True), strict=True):
                torch.testing.assert_close(a[k], b)
        run = lambda x: strided_way.run(structure, [f.detach() for f in factors], x, None, True)  # noqa: E731
        jacobian = torch.func.jacrev(run)(x.detach()[:1])
        torch.testing.assert_close(jacobian.squeeze(), dense(structure, factors).detach())

    def test_hooks_on_saved_tensors(self) -> None:
        structure = design("block_tensor_train")
        x, bias, *factors = operands(structure, 3, True)
        wanted = torch.autograd.grad(strided_way.run(structure, factors, x, bias, True).sum(), [x, *factors])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.float(), lambda t: t):
            y = strided_way.run(structure, factors, x, bias, True)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *factors]), wanted, rtol=1e-5, atol=1e-5)
        with torch.autograd.graph.save_on_cpu():
            y = strided_way.run(structure, factors, x, bias, True)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted[0])

    def test_other_tensors_run_by_products(self) -> None:
        structure = design("block_tensor_train")
        x, _, *factors = (t.detach() for t in operands(structure, 3, True))
        complex_ones = [t.to(torch.complex128) for t in factors]
        y = strided_way.run(structure, complex_ones, x.to(torch.complex128), None, True)
        torch.testing.assert_close(y.real, x @ dense(structure, factors).mT)
        butterfly = structlin.design("monarch", (30, 48), blocks=3)  # regroups between the steps
        x, bias, *factors = (t.detach() for t in operands(butterfly, 3, True))
        assert not strided(butterfly).merges
        y = strided_way.run(butterfly, factors, x, bias, True)
        torch.testing.assert_close(y, x @ dense(butterfly, factors).mT + bias)


def test_the_node_of_a_compiled_graph_calls_it(on_a_cpu: None) -> None:
    from structlin_nn.torch import StructuredLinear
    from structlin_nn.torch._operator import chain, chain_backward

    layer = StructuredLinear(64, 64, structure="block_tensor_train", rank=2, bias=False, dtype=torch.float64)
    x = torch.randn(24, 64, dtype=torch.float64)
    factors = [f.detach() for f in layer.factors]
    with execution.using("strided"):
        assert counted_node(lambda: chain(x, factors, layer._text)) == ["bmm"] * 2
        names = counted_node(lambda: chain_backward(torch.ones_like(x), x, factors, layer._text, [True] * 3))
        assert names.count("bmm") == 5  # the activation between the steps is computed again
        torch.library.opcheck(chain, (x.requires_grad_(), [f.requires_grad_() for f in factors], layer._text))


def counted_node(call: Any) -> list[str]:
    """The kernels inside of an operator, in which modes of dispatch are not active."""
    names: list[str] = []
    real = {name: getattr(torch, name) for name in ("bmm", "baddbmm")}

    def counting(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            names.append(name)
            return real[name](*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(torch, name, counting(name))
        call()
    return names


def test_which_chains_are_nodes_of_a_graph_for_cuda() -> None:
    """Where the activation between the steps would be copied: contracted axes that do not lie side by side."""
    shape = (256, 256)
    assert node_tokens(structlin.design("block_tensor_train", shape, rank=1)) == 0
    assert node_tokens(structlin.design("block_tensor_train", shape, rank=2)) == (1 << 20) // 512
    assert node_tokens(structlin.design("monarch", shape, blocks=4)) == (1 << 20) // 256
    assert node_tokens(structlin.design("low_rank", shape, rank=4)) == 0


def test_the_choice_on_cuda_starts_from_the_model() -> None:
    structure = structlin.design("block_tensor_train", (4096, 4096), rank=2)
    problem = execution.Problem(structure, True, "torch", "cuda", "bfloat16", 4096, 1, True)
    assert execution.choice.way_of(problem).name == "strided"
    with execution.using("-strided"):
        assert execution.choice.way_of(problem).name == "products"
    few = replace(problem, structure=structlin.design("low_rank", (64, 64), rank=4))
    assert execution.choice.way_of(few).name == "token_major"  # its last product adds the bias


def test_when_a_layer_on_cuda_is_a_node() -> None:
    from structlin_nn.torch import StructuredLinear

    layer = StructuredLinear(256, 256, structure="block_tensor_train", rank=2)
    least = (1 << 20) // 512
    for tokens, wanted in ((least, True), (least - 1, False)):
        assert layer._pays_as_node(SimpleNamespace(is_cuda=True, shape=(tokens, 256))) == wanted  # type: ignore[arg-type]
    plain = StructuredLinear(256, 256, structure="low_rank", rank=2)
    assert not plain._pays_as_node(SimpleNamespace(is_cuda=True, shape=(1 << 20, 256)))  # type: ignore[arg-type]
