"""Quadratic form and determinant from one decomposition: values and gradients against dense LAPACK."""

import cola
import numpy as np
import pytest
import torch

import structlin
from structlin import linalg
from structlin.linalg import _likelihood, inv_quad_logdet


def hermitian(rng, *shape, dtype="float64"):
    """Positive definite matrices of condition 10 or so."""
    x = rng.standard_normal((*shape, shape[-1])).astype(dtype)
    if "complex" in dtype:
        x = x + 1j * rng.standard_normal(x.shape)
    return x @ x.conj().swapaxes(-1, -2) / shape[-1] + np.eye(shape[-1])


def symmetric(x):
    return (x + x.mH) / 2


def low_rank(U, d):
    return cola.PSD(structlin.LowRank(U.mH, U) + structlin.Diagonal(d.to(U.dtype)))


def shifted(a, b, c):
    K = cola.PSD(structlin.Kronecker(symmetric(a), symmetric(b)))
    return cola.PSD(K + c * cola.ops.I_like(K))


def kron_sum(a, b):
    return cola.SelfAdjoint(cola.kronsum(*(cola.PSD(cola.ops.Dense(symmetric(x))) for x in (a, b))))


# name: the operator of its arrays, and the arrays
FORMS = {
    "blocks": (
        lambda x: cola.PSD(structlin.BlockDiagonal(symmetric(x))),
        lambda rng, dtype: [hermitian(rng, 3, 4, dtype=dtype)],
    ),
    "dense": (lambda x: cola.PSD(structlin.Dense(symmetric(x))), lambda rng, dtype: [hermitian(rng, 7, dtype=dtype)]),
    "kronecker": (
        lambda *m: cola.PSD(structlin.Kronecker(*map(symmetric, m))),
        lambda rng, dtype: [hermitian(rng, n, dtype=dtype) for n in (2, 5, 3)],
    ),
    "negative members": (
        lambda a, b: cola.PSD(structlin.Kronecker(-symmetric(a), -symmetric(b))),
        lambda rng, dtype: [hermitian(rng, n, dtype=dtype) for n in (4, 3)],
    ),
    "shifted": (shifted, lambda rng, dtype: [*(hermitian(rng, n, dtype=dtype) for n in (3, 5)), np.array(0.5)]),
    "sum": (kron_sum, lambda rng, dtype: [hermitian(rng, n, dtype=dtype) for n in (4, 2)]),
    "low rank": (low_rank, lambda rng, dtype: [hermitian(rng, 9, dtype=dtype)[:, :2].copy(), 0.5 + rng.random(9)]),
}


def by_lapack(A, b):
    dense = A.to_dense()
    return (b.conj() @ torch.linalg.solve(dense, b)).real, torch.linalg.slogdet(dense)[1]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, dtype, few, monkeypatch):
    monkeypatch.setattr(_likelihood, "FEW", 2**12 if few else 0)
    make, draw = FORMS[form]
    rng = np.random.default_rng(0)
    arrays = draw(rng, dtype)
    leaves = [torch.tensor(x, requires_grad=True) for x in arrays]
    n = make(*leaves).shape[0]
    b = torch.tensor(
        (rng.standard_normal(n) + (1j if "complex" in dtype else 0) * rng.standard_normal(n)).astype(dtype)
    )
    leaves.append(b.requires_grad_())
    assert _likelihood.quadratic_and_logdet(make(*leaves[:-1]), b) is not None
    pairs = [f(make(*leaves[:-1]), b) for f in (inv_quad_logdet, by_lapack)]
    for found, wanted in zip(*pairs, strict=True):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.detach(), wanted.detach(), rtol=1e-12)
    gradients = [torch.autograd.grad(1.25 * q - 0.5 * log, leaves) for q, log in pairs]
    for found, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    A = make(*(x.detach() for x in leaves[:-1]))
    np.testing.assert_allclose(
        torch.autograd.grad(inv_quad_logdet(A, b)[0], b)[0], torch.autograd.grad(by_lapack(A, b)[0], b)[0], rtol=1e-10
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(inv_quad_logdet(make(*leaves[:-1]), b)[0], leaves[:1], create_graph=True)


@pytest.mark.parametrize("form", ["blocks", "kronecker", "shifted", "low rank"])
def test_single_precision(form):
    make, draw = FORMS[form]
    arrays = draw(np.random.default_rng(1), "float64")
    A = make(*map(torch.tensor, arrays))
    b = np.random.default_rng(2).standard_normal(A.shape[0])
    wanted = [float(x) for x in by_lapack(A, torch.tensor(b))]
    single = make(*(torch.tensor(x, dtype=torch.float32) for x in arrays))
    found = inv_quad_logdet(single, torch.tensor(b, dtype=torch.float32))
    assert found[0].dtype == found[1].dtype == torch.float32
    np.testing.assert_allclose([float(x) for x in found], wanted, rtol=1e-5)


@pytest.mark.parametrize("few", [True, False])
def test_what_is_annotated_and_not_positive_raises(few, monkeypatch):
    monkeypatch.setattr(_likelihood, "FEW", 2**12 if few else 0)
    negative = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    with pytest.raises(np.linalg.LinAlgError, match="annotated PSD but is not positive"):
        inv_quad_logdet(cola.PSD(structlin.Dense(negative)), torch.ones(3, dtype=torch.float64))
    tiny = torch.diag(torch.tensor([1.0, 1e-17, 3.0], dtype=torch.float64))
    for A in (structlin.Dense(tiny), structlin.Kronecker(tiny, torch.eye(2, dtype=torch.float64))):
        with pytest.raises(np.linalg.LinAlgError, match="singular to working precision"):
            inv_quad_logdet(cola.PSD(A), torch.ones(A.shape[0], dtype=torch.float64))


def test_arrays_that_change_before_the_backward_pass_raise():
    blocks = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    quadratic, _ = inv_quad_logdet(cola.PSD(structlin.BlockDiagonal(blocks)), torch.ones(6, dtype=torch.float64))
    with torch.no_grad():
        blocks *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        quadratic.backward()


def test_cholesky_drops_no_tangent():
    """A decomposition of detached numbers raises in forward mode, where it has no derivative."""
    a = torch.eye(3, dtype=torch.float64) * 2
    A = cola.PSD(structlin.Dense(a))
    with torch.autograd.forward_ad.dual_level():
        dual = cola.PSD(structlin.Dense(torch.autograd.forward_ad.make_dual(a, a)))
        for f in (linalg.logdet, lambda A: linalg.solve(A, torch.ones(3, dtype=torch.float64))):
            with pytest.raises(NotImplementedError, match=r"jvp|forward"):
                f(dual)
    assert float(linalg.logdet(A)) == pytest.approx(3 * np.log(2))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_complex_diagonal_beside_a_real_product_keeps_its_phase(library):
    """A real U U^T looks Hermitian, but the sum is not."""
    x = np.random.default_rng(0).standard_normal((40, 3)) + 0j
    array = np.asarray if library == "numpy" else torch.tensor
    U, d = array(x), array(np.full(40, 2 + 3j))
    A = structlin.Diagonal(d) + structlin.LowRank(U.T, U)
    sign, log = np.linalg.slogdet(np.diag(np.full(40, 2 + 3j)) + x @ x.T)
    found = linalg.slogdet(A)
    assert complex(found[0]) == pytest.approx(sign, abs=1e-10)
    assert float(found[1].real) == pytest.approx(log, abs=1e-10)
