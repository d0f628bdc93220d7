"""The parts: contraction, the network of a chain, and single least-squares steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin import Structure, random_factors
from structlin.algebra.numbered import build
from structlin.projection import _als
from structlin.projection._als import Fit
from structlin.projection._contract import expression, gather
from structlin.structures import Blast, Butterfly

CHAINS = [
    Structure.parse("i,ri->r; r,sr->s; s,os->o", i=4, r=3, s=2, o=5),
    Structure.parse("ij,ai->aj; aj,bj->ab", i=3, j=2, a=4, b=5),
    Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=2, f=4, r=2, e=5),
    Structure.parse("pa,pqa->pq; gl,log->lo", p=3, a=2, q=4, g=4, l=3, o=2),
    Structure.parse("ij,ai->aj; xy,bx->by", i=3, a=4, j=3, x=2, b=5, y=6),
    Structure.parse("pij,pai->paj", p=2, i=3, j=4, a=5),
    Butterfly.design((8, 8)),
    Blast.design((6, 9), blocks=3, rank=2),
]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_contraction_equals_einsum(data):
    """Axes in any number of operands, twice in one, summed or kept."""
    sizes = {a: data.draw(st.integers(1, 4)) for a in range(6)}
    term = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    operands = data.draw(st.lists(term, min_size=1, max_size=4))
    present = sorted({a for axes in operands for a in axes})
    output = tuple(data.draw(st.permutations(present)))[: data.draw(st.integers(0, len(present)))]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([sizes[a] for a in axes]) for axes in operands]
    letters = [["".join("abcdef"[a] for a in axes)] for axes in operands]
    formula = ",".join(t[0] for t in letters) + "->" + "".join("abcdef"[a] for a in output)
    want = np.einsum(formula, *arrays)
    np.testing.assert_allclose(expression(operands, output, sizes)(*arrays), want, atol=1e-12)


def test_gather_permutes_sums_and_takes_diagonals():
    x = np.arange(36.0).reshape(2, 3, 2, 3)
    np.testing.assert_array_equal(gather(x, (0, 1, 2, 3), (3, 0, 1, 2)), x.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(gather(x, (0, 1, 0, 2), (2, 0)), np.einsum("abac->ca", x))


@pytest.mark.parametrize("structure", CHAINS, ids=repr)
def test_the_network_is_the_chain(structure):
    network = build(structure)
    factors = random_factors(structure, seed=1)
    W = structure.apply_columns(factors, np.eye(structure.d_in))
    operands = [*network.factors, *(axes for axes, _ in network.constants)]
    A = expression(operands, network.outer, network.sizes)(
        *network.split(factors), *(array for _, array in network.constants)
    )
    axes = network.rows + network.columns
    target = gather(W.reshape(network.shape(axes)), axes, network.outer)
    np.testing.assert_allclose(A, target, atol=1e-13)
    # Off the diagonals the chain is zero.
    assert np.linalg.norm(W) == pytest.approx(np.linalg.norm(A))


def test_a_butterfly_needs_no_constant_tensor_and_an_odd_monarch_does():
    assert not build(Butterfly.design((16, 16))).joined
    assert not build(Structure.parse("pa,pqa->pq; gl,log->lo", p=4, a=6, q=6, g=8, l=3, o=5)).joined
    assert build(CHAINS[3]).joined


def fit_of(structure, W, kind):
    network = build(structure)
    axes = network.rows + network.columns
    target = gather(W.reshape(network.shape(axes)), axes, network.outer)
    if kind == "plain":
        return network, Fit(network, target), np.ones(W.shape), np.eye(W.shape[1])
    if kind == "masked":
        kept = np.ones(W.shape)
        kept[-1:], kept[:, -2:] = 0, 0
        mask = gather(kept.reshape(network.shape(axes)), axes, network.outer)
        return network, Fit(network, target * mask, mask=mask), kept, np.eye(W.shape[1])
    root = np.random.default_rng(5).standard_normal((W.shape[1], W.shape[1]))
    rows = tuple(dict.fromkeys(network.rows))
    shape = (*network.shape(rows), -1)
    if kind == "weighted":
        return network, Fit(network, (W @ root).reshape(shape), weight=root), np.ones(W.shape), root
    kept = np.ones(W.shape)
    kept[-1:] = 0
    mask = kept[:, 0].reshape(network.shape(rows))
    target = ((W * kept) @ root).reshape(shape)
    return network, Fit(network, target, weight=root, mask=mask), kept, root


@pytest.mark.parametrize("structure", CHAINS, ids=repr)
@pytest.mark.parametrize("kind", ["plain", "masked", "weighted", "weighted and masked"])
def test_each_step_is_the_least_squares_optimum(structure, kind, linear_map):
    """Against a dense least-squares solution for every factor, given the others."""
    rng = np.random.default_rng(3)
    W = rng.standard_normal(structure.shape)
    network, fit, kept, root = fit_of(structure, W, kind)
    factors = random_factors(structure, seed=2)
    for k in range(len(factors)):
        basis = linear_map(structure, factors, k)
        basis = np.einsum("oin,ix->oxn", basis * kept[..., None], root).reshape(W.size, -1)
        right = ((W * kept) @ root).ravel()
        want = np.linalg.norm(right - basis @ np.linalg.lstsq(basis, right, rcond=None)[0])

        split = network.split(factors)
        step = fit.step(k, split, fit.residual(split)).reshape(factors[k].shape)
        after = [f + step if j == k else f for j, f in enumerate(factors)]
        A = structure.apply_columns(after, np.eye(structure.d_in))
        error = np.linalg.norm(((W - A) * kept) @ root)
        assert error == pytest.approx(want, rel=1e-9, abs=1e-10 * np.linalg.norm(right))


def test_each_step_by_conjugate_gradients(monkeypatch, linear_map):
    monkeypatch.setattr(_als, "MAX_ELEMENTS", 8)
    structure = CHAINS[2]
    W = np.random.default_rng(3).standard_normal(structure.shape)
    network, fit, _, root = fit_of(structure, W, "weighted")
    assert not fit.exact(0)
    factors = random_factors(structure, seed=2)
    split = network.split(factors)
    before = np.linalg.norm(fit.residual(split))
    split[0] = split[0] + fit.step(0, split, fit.residual(split))
    basis = np.einsum("oin,ix->oxn", linear_map(structure, factors, 0), root).reshape(W.size, -1)
    right = (W @ root).ravel()
    want = np.linalg.norm(right - basis @ np.linalg.lstsq(basis, right, rcond=None)[0])
    assert np.linalg.norm(fit.residual(split)) == pytest.approx(want, rel=1e-3)
    assert want < before


def test_large_and_small_normal_equations_agree(monkeypatch):
    structure = CHAINS[0]
    W = np.random.default_rng(3).standard_normal(structure.shape)
    network, fit, _, _ = fit_of(structure, W, "weighted")
    factors = network.split(random_factors(structure, seed=2))

    def errors():
        """After one step of each factor; the steps differ where the equations are singular, their effect does not."""
        for k in range(len(factors)):
            changed = list(factors)
            changed[k] = factors[k] + fit.step(k, factors, fit.residual(factors))
            yield np.linalg.norm(fit.residual(changed))

    by_eigenvalues = list(errors())
    monkeypatch.setattr(_als, "MAX_EIGH", 0)
    assert list(errors()) == pytest.approx(by_eigenvalues, rel=1e-9)
