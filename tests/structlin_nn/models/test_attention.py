"""Attention by the fused kernel and by batched products."""

import numpy as np
import pytest
import torch

from structlin_nn.models import networks
from structlin_nn.models.networks import attend, attend_by_products


def exact(q, k, v, causal, scale):
    """Return the attention in float64, by NumPy."""
    q, k, v = (t.detach().double().numpy() for t in (q, k, v))
    logits = scale * np.einsum("bhld,bhmd->bhlm", q, k)
    if causal:
        logits[..., np.triu(np.ones(logits.shape[-2:], bool), 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhlm,bhmd->bhld", weights / weights.sum(-1, keepdims=True), v)


def operands(dtype, tokens=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 5, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)])
def test_attention_is_that_of_float64_with_its_gradients(causal, dtype, error):
    given = operands(dtype)
    y = attend(*given, causal=causal, scale=0.7)
    assert y.dtype is dtype
    np.testing.assert_allclose(y.detach().double().numpy(), exact(*given, causal, 0.7), atol=error)
    wide = [t.detach().double().requires_grad_() for t in given]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(attend_by_products(*wide, causal=causal, scale=0.7), wide, gradient.double())
    for got, want in zip(torch.autograd.grad(y, given, gradient), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=5 * error, rtol=0)


def test_gradients_by_products_are_those_of_finite_differences():
    given = operands(torch.float64, tokens=3)
    assert torch.autograd.gradcheck(lambda *t: attend_by_products(*t, causal=True, scale=0.7), given)


@pytest.mark.parametrize(
    ("dtype", "tokens", "train", "products"),
    [
        (torch.bfloat16, 64, False, True),
        (torch.bfloat16, 65, False, False),
        (torch.bfloat16, 256, True, True),
        (torch.bfloat16, 257, True, False),
        (torch.float32, 8, True, False),
    ],
)
def test_short_sequences_of_half_precision_run_by_products(monkeypatch, dtype, tokens, train, products):
    called = []
    monkeypatch.setattr(networks, "attend_by_products", lambda *_, **__: called.append(1))
    with torch.set_grad_enabled(train):
        attend(*operands(dtype, tokens), causal=False, scale=1.0)
    assert bool(called) == products
