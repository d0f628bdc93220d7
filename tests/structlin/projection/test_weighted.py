"""Projections weighted by an input covariance."""

from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.arrays import gaussian

from structlin import Structure, design, structure_class, structure_names
from structlin.projection import _als, _blocks, _solve, project


def weighted_error(W, A, root):
    return np.linalg.norm((W - np.asarray(A.to_dense())) @ root) / np.linalg.norm(W @ root)


EXAMPLES = [
    pytest.param(name, *structure_class(name).examples[0], id=name)
    for name in structure_names()
    if name not in ("dense", "permutation")
]


@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
def test_every_structure_gains_by_the_weight(name, shape, options, covariance):
    """The reported error is the weighted one, and no larger than that of the plain projection."""
    W = gaussian(shape, 1)
    C, root = covariance(shape[1])
    found, plain = project(W, name, input_covariance=C, **options), project(W, name, **options)
    assert type(found.operator) is structure_class(name)
    assert found.relative_error == pytest.approx(weighted_error(W, found.operator, root), rel=1e-9, abs=1e-12)
    assert found.relative_error <= weighted_error(W, plain.operator, root) * (1 + 1e-9) + 1e-14
    if project(W, name, **options).relative_error > 1e-9:
        assert found.relative_error < weighted_error(W, plain.operator, root)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
@pytest.mark.parametrize("complex_", [False, True])
def test_identity_covariance_is_the_plain_norm(name, shape, options, complex_):
    W = gaussian(shape, 2, complex_)
    weighted = project(W, name, input_covariance=2 * np.eye(shape[1]), **options)
    plain = project(W, name, **options)
    assert weighted.relative_error == pytest.approx(plain.relative_error, rel=1e-4, abs=1e-12)


def test_low_rank_is_optimal_for_any_covariance(covariance, descent):
    structure, W = design("low_rank", (6, 9), rank=2), gaussian((6, 9), 3)
    for rank in (None, 5):  # singular, too
        C, root = covariance(9, rank=rank)
        found = project(W, structure, input_covariance=C)
        assert found.optimal
        # Eckart-Young on the outputs: the best rank-2 approximation of W root.
        values = np.linalg.svd(W @ root, compute_uv=False)
        assert found.relative_error == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(values), rel=1e-9)
        assert found.relative_error * np.linalg.norm(values) <= descent(structure, W, root=root) * (1 + 1e-9)


def test_low_rank_of_complex_matrices(covariance):
    W = gaussian((6, 9), 4, complex_=True)
    C, root = covariance(9, complex_=True)
    values = np.linalg.svd(W @ root, compute_uv=False)
    found = project(W, "low_rank", rank=3, input_covariance=C)
    assert found.relative_error == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-9)


@pytest.mark.parametrize("structure", [
    design("block_tensor_train", (6, 8), rank=1, factorization=((3, 2), (2, 4))),
    design("monarch", (8, 11), blocks=2),
    Structure.parse("i,ri->r; r,or->o", i=8, r=2, o=5, d_in=7, d_out=4),
], ids=repr)  # fmt: skip
def test_uncoupled_slices_are_optimal(structure, covariance, descent):
    """A covariance that is block diagonal over the shared input axis keeps the closed form."""
    W = gaussian(structure.shape, 5)
    size = structure.factors[0].fan_in
    root = np.zeros((structure.d_in, structure.d_in))
    for start in range(0, structure.d_in, size):
        block = slice(start, min(start + size, structure.d_in))
        root[block, block] = covariance(block.stop - start, seed=start)[1]
    found = project(W, structure, input_covariance=root @ root.T)
    assert found.optimal
    error, best = found.relative_error * np.linalg.norm(W @ root), descent(structure, W, root=root)
    assert error <= best * (1 + 1e-9)
    assert best <= error * 1.01, "the descents must come near, or they show nothing"


@pytest.mark.parametrize("structure", [
    design("block_tensor_train", (6, 8), rank=1, factorization=((3, 2), (2, 4))),
    design("kronecker", (6, 8), factorization=((2, 3), (4, 2))),
    design("tensor_train", (6, 8), rank=2, factorization=((2, 3), (4, 2))),
    design("monarch", (7, 11), blocks=3),
    design("butterfly", (8, 8)),
], ids=repr)  # fmt: skip
def test_iterations_against_descents(structure, covariance, descent):
    W = gaussian(structure.shape, 6)
    C, root = covariance(structure.d_in, seed=7)
    found = project(W, structure, input_covariance=C, restarts=20)
    assert not found.optimal
    best = descent(structure, W, root=root)
    assert found.relative_error * np.linalg.norm(W @ root) <= best * (1 + 1e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "shape"), [("circulant", (6, 6)), ("toeplitz", (5, 7)), ("diagonal", (5, 5)),
                                             ("block_diagonal", (8, 12))])  # fmt: skip
@pytest.mark.parametrize("complex_", [False, True])
def test_linear_structures_solve_their_normal_equations(name, shape, complex_, covariance):
    """The weighted difference is orthogonal to every matrix of the space."""
    W = gaussian(shape, 8, complex_)
    C, _ = covariance(shape[1], complex_=complex_)
    found = project(W, name, input_covariance=C)
    assert found.optimal
    rest = (W - found.operator.to_dense()) @ C
    for seed in range(8):
        other = structure_class(name).random(shape, seed=seed).to_dense()
        assert abs(np.vdot(other, rest)) < 1e-11


def test_permutation_by_brute_force(covariance):
    W = gaussian((5, 5), 9)
    C, root = covariance(5)
    best = min(np.linalg.norm((W - np.eye(5)[list(p)]) @ root) for p in permutations(range(5)))
    found = project(W, "permutation", input_covariance=C)
    assert found.relative_error * np.linalg.norm(W @ root) == pytest.approx(best, rel=1e-9)


def test_recovery_is_exact_whatever_the_weight(covariance):
    for name, shape, options in (
        ("low_rank", (7, 11), {"rank": 3}),
        ("block_tensor_train", (12, 20), {"rank": 2}),
        ("kronecker", (12, 20), {}),
        ("tensor_train", (24, 30), {"cores": 3, "rank": 2, "factorization": ((2, 3, 4), (2, 3, 5))}),
    ):
        W = structure_class(name).random(shape, seed=2, **options).to_dense()
        C, _ = covariance(shape[1])
        found = project(W, name, input_covariance=C, **options)
        assert np.linalg.norm(found.operator.to_dense() - W) < 1e-8 * np.linalg.norm(W), name


def test_inputs_that_never_occur_cost_nothing():
    """With inputs from two coordinates, a matrix of rank 2 gives every output exactly."""
    W = gaussian((6, 9), 10)
    C = np.zeros((9, 9))
    C[2, 2] = C[5, 5] = 1.0
    found = project(W, "low_rank", rank=2, input_covariance=C)
    assert found.relative_error < 1e-12
    np.testing.assert_allclose(found.operator.to_dense()[:, [2, 5]], W[:, [2, 5]], atol=1e-12)


def test_rank_by_target_error_and_by_budget(covariance):
    W = gaussian((24, 35), 11)
    C, root = covariance(35)
    chosen = project(W, "low_rank", input_covariance=C, target_error=0.05)
    rank = chosen.operator.structure.factors[0].shape[0]
    values = np.linalg.svd(W @ root, compute_uv=False)
    tails = [np.linalg.norm(values[r:]) / np.linalg.norm(values) for r in range(25)]
    assert tails[rank] <= 0.05 < tails[rank - 1]
    train = project(W, "block_tensor_train", input_covariance=C, target_error=0.05)
    below = train.operator.structure.factors[0].shape[2] - 1
    assert project(W, "block_tensor_train", input_covariance=C, rank=below).relative_error > 0.05
    assert train.relative_error <= 0.05


def test_a_covariance_of_another_library(covariance):
    W = gaussian((6, 9), 12)
    C, _ = covariance(9)
    found = [project(W, "low_rank", rank=2, input_covariance=c).relative_error for c in (C, torch.tensor(C))]
    assert found[0] == found[1]


def test_large_systems_by_conjugate_gradients(covariance, monkeypatch):
    """Where the normal equations are too large, the steps are iterated, to the same end."""
    W = gaussian((12, 18), 13)
    C, _ = covariance(18)
    direct = project(W, "tensor_train", rank=2, input_covariance=C, tolerance=1e-8)
    monkeypatch.setattr(_als, "MAX_ELEMENTS", 64)
    iterated = project(W, "tensor_train", rank=2, input_covariance=C, tolerance=1e-8)
    assert iterated.relative_error == pytest.approx(direct.relative_error, rel=1e-3)


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "shape", "options"), [
    ("block_tensor_train", (12, 20), {"rank": 2}),
    ("monarch", (18, 27), {"blocks": 3}),
    ("monarch", (11, 16), {"blocks": 2}),
])  # fmt: skip
@pytest.mark.parametrize("complex_", [False, True])
def test_variable_projection_ends_where_alternating_least_squares_does(name, shape, options, complex_, covariance):
    """From the same start, and with a residual whose weighted gradient is zero in both factors."""
    W = gaussian(shape, 14, complex_)
    C, root = covariance(shape[1], seed=15, complex_=complex_)
    structure = design(name, shape, **options)
    found = project(W, structure, input_covariance=C, tolerance=1e-12, max_sweeps=3000)
    assert found.method == "variable projection"
    chain = _solve.Chain.of(structure, _solve.Problem(W, C))
    starts, _ = _solve._starts(chain, _solve.Settings())
    least_squares = min(chain.fit().run(start, 500, 1e-8)[1] for start in starts)
    assert found.relative_error * np.linalg.norm(W @ root) <= least_squares * 1.02
    fit = chain.fit()
    factors = chain.network.split(found.operator.factors)
    residual = fit.residual(factors)
    for k in range(2):
        assert np.linalg.norm(fit._gradient(k, factors, residual)) < 1e-4 * np.linalg.norm(W)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_variable_projection_stops_at_the_limit(limit, covariance):
    W = gaussian((12, 20), 14)
    C, _ = covariance(20, seed=15)
    found = project(W, "block_tensor_train", rank=2, input_covariance=C, tolerance=0.0, max_sweeps=limit)
    assert found.iterations <= limit
    assert not found.converged
    more = project(W, "block_tensor_train", rank=2, input_covariance=C, tolerance=0.0, max_sweeps=limit + 20)
    assert more.relative_error < found.relative_error


def test_ranks_share_their_decompositions(covariance):
    """Variable projection decomposes the covariance and the target once, whatever the rank."""
    W = gaussian((12, 20), 16)
    problem = _solve.Problem(W, covariance(20, seed=17)[0])
    alone = _solve.Problem(W, problem.covariance)
    settings = _solve.Settings(tolerance=1e-10)
    for rank in (1, 3, 2):
        structure = design("block_tensor_train", (12, 20), rank=rank)
        found = _solve.solve(structure, problem, settings)
        assert found.error == pytest.approx(_solve.solve(structure, alone, settings).error, rel=1e-9)
        assert _solve.estimated_error(structure, problem, 2) >= found.error * (1 - 1e-9)
        alone.known.clear()
    assert len(problem.known) == 1


@pytest.mark.parametrize(("name", "shape", "options"), [
    ("block_tensor_train", (12, 20), {"rank": 2}), ("monarch", (18, 27), {"blocks": 3}),
])  # fmt: skip
@pytest.mark.parametrize("complex_", [False, True])
def test_projected_factor_and_gradient(name, shape, options, complex_, covariance, monkeypatch):
    """For a given Y, X solves the weighted least-squares problem, and the gradient is that of the least error."""
    problem = _solve.Problem(gaussian(shape, 20, complex_), covariance(shape[1], seed=21, complex_=complex_)[0])
    chain = _solve.Chain.of(design(name, shape, **options), problem)
    fit = _solve.BlockFit.of(chain.network, chain.target, chain.covariance)
    f, n, e, inner = fit.target.shape
    Y = gaussian((f, n, fit.rank, inner), 22, complex_)
    whole = fit.covariance.reshape(n * inner, n * inner)
    root = np.linalg.cholesky(whole)

    def least(Y):
        square = 0.0
        for rows, target in zip(Y, fit.target, strict=True):
            wide = np.zeros((n, fit.rank, n, inner), Y.dtype)
            for p in range(n):
                wide[p, :, p] = rows[p]
            system = wide.reshape(n * fit.rank, n * inner) @ root
            right = target.swapaxes(0, 1).reshape(e, n * inner) @ root
            X = np.linalg.lstsq(system.T, right.T)[0].T
            square += np.linalg.norm(right - X @ system) ** 2
        return square

    _, square, slope = fit._project(Y)
    with monkeypatch.context() as patch:
        patch.setattr(_blocks, "CHUNK", 1)
        assert fit._project(Y)[1] == pytest.approx(square, rel=1e-12)
        np.testing.assert_allclose(fit._project(Y)[2], slope, rtol=1e-12, atol=1e-12)
    assert square == pytest.approx(least(Y), rel=1e-9)
    for seed in (23, 24):
        D = gaussian(Y.shape, seed, complex_)
        numeric = (least(Y + 1e-5 * D) - least(Y - 1e-5 * D)) / 2e-5
        assert 2 * np.vdot(slope, D).real == pytest.approx(numeric, rel=1e-6)


def test_few_passes_come_near_the_optimum(covariance):
    """Where columns are coupled, 30 passes end within 2 % of where alternating least squares converges."""
    W = gaussian((24, 48), 18)
    root = gaussian((48, 48), 19) * 0.8 ** np.arange(48)
    problem = _solve.Problem(W, root @ root.T + 0.01 * np.trace(root @ root.T) / 48 * np.eye(48))
    chain = _solve.Chain.of(design("block_tensor_train", (24, 48), rank=2), problem)
    fit = _solve.BlockFit.of(chain.network, chain.target, chain.covariance)
    _, error, passes, converged = fit.run(None, 30, 0.0)
    starts, _ = _solve._starts(chain, _solve.Settings(restarts=0))
    optimum = min(chain.fit().run(start, 500, 1e-6)[1] for start in starts)
    assert passes <= 32
    assert not converged
    assert error < 1.02 * optimum
    assert fit.error_after(1) > 1.02 * optimum, "the start must be farther, or this shows nothing"


@pytest.mark.parametrize(("C", "words"), [
    (np.eye(4), "shape"),
    (np.full((5, 5), np.nan), "not finite"),
    (np.diag([1.0, 1, 1, 1, -0.5]), "semidefinite"),
    (np.triu(np.ones((5, 5))), "Hermitian"),
    (np.zeros((5, 5)), "zero"),
    (np.eye(5, dtype=complex), "complex W"),
    (np.eye(5, dtype=int), "floating"),
    (np.ones(5), "matrix"),
])  # fmt: skip
def test_bad_covariances(C, words):
    with pytest.raises(ValueError, match=words):
        project(np.ones((3, 5)), "low_rank", rank=1, input_covariance=C)
