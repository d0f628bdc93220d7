"""Oracles that share no code with the projections: batched gradient descent, and dense least squares."""

import numpy as np
import pytest
import torch


def descend(structure, W, *, root=None, restarts=40, steps=150, rate=0.1, seed=0):
    """Smallest error of ``restarts`` runs of Adam from Gaussian factors, all at once: ||(W - A) root||.

    As they are, they end within 1e-5 of where 200 runs of 400 steps at half the rate do.
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.as_tensor(np.asarray(W))
    eye = torch.eye(structure.d_in, dtype=W.dtype)
    root = eye if root is None else torch.as_tensor(np.asarray(root)).to(W.dtype)
    size = float(torch.linalg.norm(W)) ** (1 / len(structure.factors))
    factors = []
    for spec in structure.factors:
        scale = size / (spec.fan_in * spec.fan_out * spec.blocks) ** 0.5
        drawn = torch.randn(restarts, *spec.shape, generator=generator, dtype=W.dtype) * scale
        factors.append(drawn.requires_grad_())
    dense = torch.func.vmap(lambda *f: structure.apply_columns(f, eye))
    optimizer = torch.optim.Adam(factors, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ((dense(*factors) - W) @ root).abs().square().sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(((dense(*factors) - W) @ root).abs().square().sum((1, 2)).min().sqrt())


@pytest.fixture
def descent():
    return descend


def design_matrix(structure, factors, k):
    """The matrix that takes factor k, flattened, to the structured matrix, flattened."""
    eye = np.eye(structure.d_in)
    columns = []
    for j in range(factors[k].size):
        basis = np.zeros(factors[k].size)
        basis[j] = 1
        changed = [basis.reshape(f.shape) if i == k else f for i, f in enumerate(factors)]
        columns.append(structure.apply_columns(changed, eye))
    return np.stack(columns, axis=-1)


@pytest.fixture
def linear_map():
    return design_matrix


@pytest.fixture
def covariance():
    """Draw a covariance of ``d`` inputs whose eigenvalues fall as ``k^-2``, and a root of it."""

    def draw(d, seed=0, complex_=False, rank=None):
        rng = np.random.default_rng(seed)
        root = rng.standard_normal((d, d)) + (1j * rng.standard_normal((d, d)) if complex_ else 0)
        root = np.linalg.qr(root)[0] / np.arange(1, d + 1)
        if rank is not None:
            root[:, rank:] = 0
        return root @ root.conj().T, root

    return draw
