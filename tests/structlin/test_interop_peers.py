"""Operators in lineax, linear_operator and GPyTorch, as their users would write it; skipped without them."""

import math

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import structlin as sl
from structlin.interop import to_linear_operator, to_lineax

lineax = pytest.importorskip("lineax")
linear_operator = pytest.importorskip("linear_operator")
gpytorch = pytest.importorskip("gpytorch")


def positive(n, seed):
    a = np.random.default_rng(seed).standard_normal((n, n)) / math.sqrt(n)
    return a @ a.T + np.eye(n) / 2


# -- lineax --------------------------------------------------------------------------------------------------------


def test_lineax_solves_with_a_kronecker_product():
    a, b, right = positive(3, 0), positive(5, 1), np.random.default_rng(2).standard_normal(15)

    @jax.jit
    def found(a, b):
        K = cola.PSD(sl.Kronecker(a, b))
        return lineax.linear_solve(to_lineax(K), jnp.asarray(right), lineax.CG(rtol=1e-12, atol=1e-12)).value

    wanted = np.linalg.solve(np.kron(a, b), right)
    np.testing.assert_allclose(found(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=1e-8)
    gradient = jax.grad(lambda a: found(a, jnp.asarray(b)).sum())(jnp.asarray(a))
    step = np.random.default_rng(3).standard_normal((3, 3))
    step = step + step.T
    ahead, behind = (np.linalg.solve(np.kron(a + s * 1e-6 * step, b), right).sum() for s in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)


def test_lineax_solves_least_squares_and_knows_the_transpose():
    A = sl.BlockTensorTrain.random((35, 6), rank=2, seed=0, backend="jax", dtype="float64")
    operator, dense = to_lineax(A), np.asarray(A)
    y = np.random.default_rng(0).standard_normal(35)
    np.testing.assert_allclose(operator.mv(jnp.ones(6)), dense.sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(operator.T.mv(jnp.asarray(y)), dense.T @ y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(operator.as_matrix(), dense, rtol=1e-12, atol=1e-12)
    found = lineax.linear_solve(operator, jnp.asarray(y), lineax.LSMR(rtol=1e-12, atol=1e-12), throw=False).value
    np.testing.assert_allclose(found, np.linalg.lstsq(dense, y, rcond=None)[0], rtol=1e-6)


def test_tags_come_from_annotations():
    K = cola.PSD(sl.Kronecker(jnp.eye(2), jnp.eye(3)))
    assert lineax.is_positive_semidefinite(to_lineax(K))
    assert lineax.is_symmetric(to_lineax(cola.SelfAdjoint(sl.Dense(jnp.eye(2)))))
    assert not lineax.is_symmetric(to_lineax(sl.Dense(jnp.eye(2))))
    with pytest.raises(TypeError, match="lineax works on jax arrays"):
        to_lineax(sl.Dense(np.eye(2)))


# -- linear_operator -----------------------------------------------------------------------------------------------


def test_linear_operators_products_diagonal_transpose_and_gradients():
    A = sl.LowRank.random((6, 6), rank=2, seed=0, backend="torch", dtype="float64")
    V, U = (f.requires_grad_() for f in A.factors)
    A = sl.StructuredOperator(A.structure, (V, U))
    L, dense = to_linear_operator(A), (U @ V).detach()
    x = torch.randn(4, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(L @ x, dense @ x)
    torch.testing.assert_close(L.mT @ x[0], dense.T @ x[0])
    torch.testing.assert_close(L.diagonal(), dense.diagonal())
    torch.testing.assert_close(L.to_dense().detach(), dense)
    torch.testing.assert_close((L + L).to_dense().detach(), 2 * dense)
    torch.testing.assert_close((L @ L.mT).to_dense().detach(), dense @ dense.T)
    (L @ x).square().sum().backward()
    wanted = torch.autograd.grad((U @ V @ x).square().sum(), (V, U))
    torch.testing.assert_close((V.grad, U.grad), wanted)
    with pytest.raises(TypeError, match="linear_operator works on torch tensors"):
        to_linear_operator(sl.Dense(np.eye(2)))


def test_linear_operators_entries_and_pivoted_cholesky():
    a, b = positive(3, 0), positive(4, 1)
    K = sl.Kronecker(*(torch.tensor(x, requires_grad=True) for x in (a, b)))
    L, dense = to_linear_operator(cola.PSD(K)), np.kron(a, b)
    i, j = torch.tensor([0, 3, 11, 3]), torch.tensor([1, 5, 2, 5])
    for index in ((i, j), (i[:1], j), (i, j[:1]), (i[:, None], j[None, :2]), (i[:, None, None], j[:, None]), (2, j)):
        torch.testing.assert_close(L[index].detach(), torch.tensor(dense)[index])
    L[i, j].sum().backward()
    c = K.factors[0].detach().clone().requires_grad_()
    torch.kron(c, torch.tensor(b))[i, j].sum().backward()
    torch.testing.assert_close(K.factors[0].grad, c.grad)
    root, wanted = L.detach().pivoted_cholesky(5), linear_operator.to_linear_operator(torch.tensor(dense))
    torch.testing.assert_close(root, wanted.pivoted_cholesky(5))
    flat = to_linear_operator(sl.LowRank.random((3, 7), rank=2, seed=0, backend="torch", dtype="float64"))
    index = torch.tensor([[1], [2]]), torch.arange(7)
    torch.testing.assert_close(flat[index], flat.to_dense()[index])


def test_linear_operators_batches_are_refused():
    L = to_linear_operator(sl.Dense(torch.eye(4)))
    for add in (lambda: L.unsqueeze(0), lambda: L.repeat(2, 1, 1), lambda: L.expand(2, 4, 4)):
        with pytest.raises(ValueError, match=r"here \(4, 4\), has no batch axes"):
            add()
    assert L.expand(4, 4).shape == L.repeat(1, 1).shape == (4, 4)


# -- GPyTorch ------------------------------------------------------------------------------------------------------


class GridKernel(gpytorch.kernels.Kernel):
    """A product kernel on a grid: a Kronecker product of the kernel matrices along its axes."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes
        self.parts = torch.nn.ModuleList(gpytorch.kernels.RBFKernel() for _ in axes)

    def forward(self, x1, x2, diag=False, **params):
        matrices = [k(axis).to_dense() for k, axis in zip(self.parts, self.axes, strict=True)]
        K = to_linear_operator(cola.PSD(sl.Kronecker(*matrices)))
        return K.diagonal() if diag else K


class GridProcess(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, axes):
        super().__init__(x, y, likelihood)
        self.mean, self.kernel = gpytorch.means.ConstantMean(), GridKernel(axes)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


@pytest.mark.parametrize("sizes", [(5, 7), (24, 36)])  # linear_operator itself takes a Cholesky factor up to n = 800
def test_the_likelihood_of_a_gaussian_process_on_a_grid_and_its_gradient(sizes):
    axes = [torch.linspace(0, 1, n, dtype=torch.float64)[:, None] for n in sizes]
    x = torch.cartesian_prod(*(a[:, 0] for a in axes))
    y = torch.sin(6 * x[:, 0]) + torch.cos(4 * x[:, 1])
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = GridProcess(x, y, likelihood, axes).double()
    likelihood.noise = 0.1
    for part, scale in zip(model.kernel.parts, (0.3, 0.4), strict=True):
        part.lengthscale = scale
    model.train()
    likelihood.train()
    value = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y)
    value.backward()
    got = [model.kernel.parts[0].raw_lengthscale.grad, likelihood.noise_covar.raw_noise.grad]

    kernels = [torch.exp(-0.5 * ((a - a.T) / part.lengthscale) ** 2) for a, part in
               zip(axes, model.kernel.parts, strict=True)]  # fmt: skip
    dense = torch.kron(*kernels) + likelihood.noise * torch.eye(len(x), dtype=torch.float64)
    wanted = torch.distributions.MultivariateNormal(torch.zeros_like(y), dense).log_prob(y) / len(y)
    gradients = torch.autograd.grad(wanted, (model.kernel.parts[0].raw_lengthscale, likelihood.noise_covar.raw_noise))
    torch.testing.assert_close(value.detach(), wanted.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got, gradients, rtol=1e-5, atol=1e-8)
