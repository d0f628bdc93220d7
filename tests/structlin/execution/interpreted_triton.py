"""Fused chains in Triton's interpreter; test_triton.py runs this file in a process of its own, where that is on."""

import pytest
import torch
from torch import Tensor

import structlin
from structlin.execution import triton as _triton

CASES = [
    ("block_tensor_train", (35, 6), 37, {"rank": 2}),
    ("block_tensor_train", (210, 323), 21, {"rank": 3}),
    ("block_tensor_train", (17, 38 * 3), 16, {"rank": 17, "factorization": ((1, 17), (38, 3))}),
    ("block_tensor_train", (21 * 65, 19 * 33), 5, {"rank": 1, "factorization": ((21, 65), (19, 33))}),
    ("monarch", (44, 88), 33, {"blocks": 2}),  # blocks divide the inner size
    ("monarch", (10, 7), 1, {"blocks": 3}),  # and the sizes are padded
    ("monarch", (44, 40), 18, {"blocks": 4}),  # regrouped
    ("monarch", (23, 14), 35, {"blocks": 3}),  # regrouped and padded
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def draw(structure, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    factors = [normal(*f.shape, scale=f.fan_in**-0.5) for f in structure.factors]
    x, bias = normal(tokens, structure.d_in), normal(structure.d_out)
    return x, factors, bias, normal(tokens, structure.d_out).detach()


@pytest.mark.parametrize(("name", "shape", "tokens", "options"), CASES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_values_and_gradients_against_float64(name, shape, tokens, options, dtype):
    structure = structlin.design(name, shape, **options)
    x, factors, bias, g = draw(structure, tokens, dtype)
    y = _triton.chain(x, factors, structure, bias)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, [x, *factors, bias], g)]
    inputs = [t.detach().double().requires_grad_() for t in (x, *factors, bias)]
    exact = structure.apply(inputs[1:-1], inputs[0]) + inputs[-1]
    expected = [exact, *torch.autograd.grad(exact, inputs, g.double())]
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
        assert value.dtype == dtype
        assert relative(value, wanted) < TOLERANCE[dtype]


def test_only_the_gradients_that_are_asked_for():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    for wanted in ([0], [1], [2], [0, 2]):
        x, factors, _, g = draw(structure, 9, torch.float32)
        given = [x, *factors]
        for place, t in enumerate(given):
            t.requires_grad_(place in wanted)
        _triton.chain(x, factors, structure).backward(g)
        assert [t.grad is not None for t in given] == [place in wanted for place in range(3)]


def test_second_derivatives():
    structure = structlin.design("monarch", (23, 14), blocks=3)
    x, factors, bias, g = draw(structure, 5, torch.float32)

    def penalty(x: Tensor, factors: list[Tensor], y: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad((y * g.to(y.dtype)).square().sum(), [x, *factors], create_graph=True)
        return list(torch.autograd.grad(sum(t.square().sum() for t in grads), [x, *factors]))

    found = penalty(x, factors, _triton.chain(x, factors, structure, bias))
    x64, *f64 = (t.detach().double().requires_grad_() for t in (x, *factors))
    expected = penalty(x64, f64, structure.apply(f64, x64) + bias.detach().double())
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_batched_gradients():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    x, factors, _, _ = draw(structure, 5, torch.float32)
    g = torch.randn(4, 5, 35)
    given = [x, *factors]
    found = torch.autograd.grad(_triton.chain(x, factors, structure), given, g, is_grads_batched=True)
    expected = [torch.autograd.grad(structure.apply(factors, x), given, one) for one in g]
    for number, value in enumerate(found):
        torch.testing.assert_close(value, torch.stack([e[number] for e in expected]), rtol=1e-4, atol=1e-5)


def test_strides_leading_axes_and_no_tokens():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    _, factors, bias, _ = draw(structure, 1, torch.float32)
    wide = torch.randn(3, 6, 4, dtype=torch.float32)
    x = wide.transpose(1, 2)[:, 1:]  # (3, 3, 6), not contiguous
    y = _triton.chain(x, factors, structure, bias)
    torch.testing.assert_close(y, structure.apply(factors, x) + bias, rtol=1e-5, atol=1e-5)
    rows = torch.randn(5, 20)[:, ::2][:, :6].requires_grad_()
    torch.testing.assert_close(
        _triton.chain(rows, factors, structure), structure.apply(factors, rows), rtol=1e-5, atol=1e-5
    )
    none = torch.zeros(0, 6, requires_grad=True)
    y = _triton.chain(none, factors, structure, bias)
    assert y.shape == (0, 35)
    grads = torch.autograd.grad(y.sum(), [none, *factors, bias])
    assert [tuple(t.shape) for t in grads] == [(0, 6), *(tuple(f.shape) for f in factors), (35,)]
    assert not any(t.any() for t in grads)


def test_gradients_do_not_change_from_run_to_run():
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    x, factors, _, g = draw(structure, 600, torch.float32)
    assert _triton.shares(600, 1, 16, x.device)[1] > 1, "more than one share, or there is nothing to sum"
    runs = [torch.autograd.grad(_triton.chain(x, factors, structure), [x, *factors], g) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    inputs = [t.detach().double().requires_grad_() for t in (x, *factors)]
    expected = torch.autograd.grad(structure.apply(inputs[1:], inputs[0]), inputs, g.double())
    assert all(relative(a, b) < 2e-6 for a, b in zip(runs[0], expected, strict=True))
