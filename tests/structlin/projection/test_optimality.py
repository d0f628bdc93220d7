"""No better fit is found by other means: gradient descent from many starts, exhaustive search, bounds."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from helpers.arrays import gaussian

from structlin import Structure, design, init_std
from structlin.projection import project

OPTIMAL = [
    design("low_rank", (6, 9), rank=2),
    design("kronecker", (6, 8), factorization=((2, 3), (4, 2))),
    design("tensor_train", (6, 8), factorization=((3, 2), (2, 4)), rank=2),
    design("block_tensor_train", (6, 8), rank=1, factorization=((3, 2), (2, 4))),
    design("block_tensor_train", (8, 15), rank=2, factorization=((2, 4), (5, 3))),
    design("monarch", (8, 12), blocks=2),
    design("monarch", (7, 11), blocks=3),  # padded, regrouped
    design("block_diagonal", (6, 9), blocks=3),
    Structure.parse("gba,gfdra->frgbd; frgbd,fergb->fed", g=2, b=2, a=3, f=2, d=2, r=2, e=2),
    Structure.parse("pa,pra->pr; pr,por->po", p=2, a=3, r=1, o=4),
    Structure.parse("ij,ai->aj", i=3, a=2, j=3),
]


@pytest.mark.parametrize("structure", OPTIMAL, ids=repr)
def test_closed_forms_against_descents(structure, descent):
    W = gaussian(structure.shape, 11)
    found = project(W, structure)
    error, best = found.relative_error * np.linalg.norm(W), descent(structure, W)
    assert found.optimal
    assert error <= best * (1 + 1e-9)
    assert best <= error * (1 + 1e-3), "the descents must come near, or they show nothing"


def test_closed_forms_on_complex_matrices(descent):
    for structure in (OPTIMAL[1], OPTIMAL[3]):
        W = gaussian(structure.shape, 12, complex_=True)
        error = project(W, structure).relative_error * np.linalg.norm(W)
        assert error <= descent(structure, W) * (1 + 1e-9)


ITERATED = [
    design("tensor_train", (12, 8), cores=3, rank=2, factorization=((3, 2, 2), (2, 2, 2))),
    design("block_tensor_train", (12, 18), cores=3, rank=1, factorization=((2, 2, 3), (3, 2, 3))),
    design("kronecker", (12, 8), cores=3, factorization=((3, 2, 2), (2, 2, 2))),
    design("butterfly", (8, 8)),
    design("blast", (6, 9), blocks=3, rank=2),
    Structure.parse("ij,ai->aj; aj,bj->ab", i=3, j=4, a=2, b=3, d_in=10),
]


@pytest.mark.parametrize("structure", ITERATED, ids=repr)
def test_iterations_against_descents(structure, descent):
    W = gaussian(structure.shape, 13)
    found = project(W, structure, restarts=20)
    assert found.converged
    assert not found.optimal
    assert found.relative_error * np.linalg.norm(W) <= descent(structure, W) * (1 + 1e-6)


def unfolding_tails(W, outs, ins, ranks):
    """What truncation of each unfolding loses, from the definition of Tensor-Train."""
    count = len(outs)
    order = [i for k in range(count) for i in (k, count + k)]
    tensor = W.reshape(*outs, *ins).transpose(order)
    for k, rank in enumerate(ranks, start=1):
        matrix = tensor.reshape(int(np.prod(outs[:k]) * np.prod(ins[:k])), -1)
        yield np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:])


@pytest.mark.parametrize("seed", range(3))
def test_tensor_train_within_its_bound(seed):
    outs, ins, ranks = (3, 4, 2), (2, 3, 4), (3, 4)
    W = gaussian((24, 24), seed)
    found = project(W, "tensor_train", cores=3, rank=ranks, factorization=(outs, ins))
    tails = list(unfolding_tails(W, outs, ins, ranks))
    assert found.error_bound == pytest.approx(np.linalg.norm(tails) / np.linalg.norm(W), rel=1e-12)
    assert max(tails) / np.linalg.norm(W) <= found.relative_error <= found.error_bound


@pytest.mark.parametrize("name", ["block_tensor_train", "butterfly", "kronecker", "tensor_train"])
def test_bounds_hold_and_are_within_their_factor(name):
    options = {} if name == "butterfly" else {"cores": 3}
    for seed in range(3):
        W = gaussian((16, 16), seed) + 3 * np.eye(16)
        found = project(W, name, **options)
        single = project(W, name, max_sweeps=1, **options)
        assert found.relative_error <= single.relative_error * (1 + 1e-12)
        assert single.relative_error <= found.error_bound * (1 + 1e-12)
        count = len(found.operator.factors)
        assert found.error_bound <= np.sqrt(count - 1) * found.relative_error * (1 + 1e-9)


def test_no_bound_where_none_holds():
    """The splits fit zeros to padding, so that a better fit may leave it free; BLAST shares an axis three times."""
    cut = Structure.parse("ij,ai->aj; aj,bj->ab", i=3, j=4, a=2, b=3, d_in=10)
    for structure in (cut, design("blast", (6, 9), blocks=3, rank=2)):
        W = gaussian(structure.shape, 3)
        assert project(W, structure).error_bound is None
    train = design("tensor_train", (8, 8), cores=3, rank=1)
    assert project(gaussian((8, 8), 3), train, input_covariance=np.eye(8)).error_bound is None


def test_bound_counts_what_no_factor_reaches():
    """Copies that are averaged, and entries off a diagonal."""
    W = gaussian((24, 18), 3)
    structure = Structure.parse("pij,ri->prj; prj,sr->psj; psj,as->paj", p=2, i=3, j=3, r=2, s=2, a=4)
    found = project(W, structure)
    assert found.relative_error <= found.error_bound < 1.5


def test_circulant_toeplitz_and_diagonal_are_orthogonal_projections():
    """The difference is orthogonal to every basis matrix of the space."""
    for name, shape in (("circulant", (6, 6)), ("toeplitz", (5, 8)), ("diagonal", (5, 5)), ("block_diagonal", (8, 12))):
        W = gaussian(shape, 5, complex_=True)
        A = project(W, name).operator
        rest = W - A.to_dense()
        for seed in range(6):
            other = type(A).random(shape, seed=seed).to_dense()
            assert abs(np.vdot(other, rest)) < 1e-12


def test_permutation_against_all_permutations():
    W = gaussian((6, 6), 9)
    found = project(W, "permutation")
    best = min(np.linalg.norm(W - np.eye(6)[list(p)]) for p in permutations(range(6)))
    assert found.relative_error * np.linalg.norm(W) == pytest.approx(best, rel=1e-12)
    noisy = np.eye(8)[[3, 1, 4, 0, 7, 6, 2, 5]] + 0.2 * gaussian((8, 8), 1)
    assert project(noisy, "permutation").operator.factors[0].tolist() == [3, 1, 4, 0, 7, 6, 2, 5]


def test_sweeps_never_raise_the_error():
    W = gaussian((24, 36), 2)
    errors = [project(W, "blast", blocks=3, rank=5, restarts=0, max_sweeps=n).relative_error for n in (1, 2, 4, 8, 16)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_stopping_is_reported():
    W = gaussian((24, 36), 2)
    stopped = project(W, "blast", blocks=3, rank=5, restarts=0, max_sweeps=3)
    assert (stopped.iterations, stopped.converged) == (3, False)
    loose, tight = (project(W, "blast", blocks=3, rank=5, restarts=0, tolerance=t) for t in (1e-3, 1e-7))
    assert loose.converged
    assert loose.iterations < tight.iterations
    assert tight.relative_error < loose.relative_error


@pytest.mark.parametrize(
    ("name", "options"), [("kronecker", {}), ("block_tensor_train", {"rank": 3}), ("low_rank", {})]
)
def test_factors_are_balanced_by_the_scale_rule(name, options):
    A = project(1e4 * gaussian((24, 35), 1), name, **options).operator
    ratios = [np.sqrt(np.mean(f**2)) / s for f, s in zip(A.factors, init_std(A.structure), strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)
