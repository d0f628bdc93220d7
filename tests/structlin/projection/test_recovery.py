"""Matrices that have a structure are found again, whatever their sizes and roles."""

import numpy as np
import pytest

import structlin
from structlin import Structure, design, structure_names
from structlin.projection import project

EXAMPLES = [
    pytest.param(name, shape, options, id=f"{name}-{i}")
    for name in structure_names()
    for i, (shape, options) in enumerate(structlin.structure_class(name).examples)
]
MORE = [
    ("tensor_train", (24, 36), {"cores": 3, "rank": (2, 3), "factorization": ((2, 3, 4), (3, 4, 3))}),
    ("tensor_train", (16, 81), {"cores": 4, "rank": (2, 3, 2)}),
    ("block_tensor_train", (60, 84), {"cores": 3, "rank": (2, 3), "factorization": ((3, 4, 5), (4, 3, 7))}),
    ("block_tensor_train", (36, 54), {"cores": 3, "factorization": ((3, 3, 4), (3, 3, 6))}),
    ("kronecker", (24, 60), {"cores": 3}),
    ("butterfly", (16, 16), {}),
    ("butterfly", (32, 32), {}),
    ("monarch", (40, 28), {"blocks": 4}),
    ("monarch", (27, 62), {"blocks": 4}),
]
CHAINS = [
    Structure.parse("i,ri->r; r,sr->s; s,os->o", i=9, r=3, s=2, o=7),
    Structure.parse("pij,pai->paj", p=2, i=3, j=4, a=5),  # one factor: block diagonal and carried
    Structure.parse("ij,ai->aj", i=3, a=4, j=5),  # A (x) 1
    Structure.parse("pa,pra->pr; pr,por->po", p=3, a=5, r=2, o=4),  # block diagonal of low rank
    Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=4, f=2, r=2, e=7, d_in=10, d_out=13),  # cut, two cores
    Structure.parse("pa,pqa->pq; gl,log->lo", p=4, a=6, q=6, g=8, l=3, o=5),  # regrouped, sizes nest
    Structure.parse("pa,pqa->pq; gl,log->lo", p=4, a=6, q=9, g=6, l=6, o=5),  # regrouped, sizes do not
    Structure.parse("ij,ai->aj; xy,bx->by", i=4, a=6, j=4, x=3, b=5, y=8),  # regrouped and carried
    Structure.parse("ij,ai->aj; aj,bj->ab", i=3, j=4, a=5, b=2, d_in=10),  # Kronecker with cut input
]
FIT = 1e-10


def check(W, structure, **options):
    found = project(W, structure, **options)
    assert found.relative_error < FIT
    A = found.operator
    assert np.linalg.norm(np.asarray(A.to_dense()) - W) < FIT * np.linalg.norm(W)
    assert A.dtype == W.dtype
    return found


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES)
def test_every_registered_structure(name, shape, options, dtype):
    W = structlin.structure_class(name).random(shape, seed=3, dtype=dtype, **options).to_dense()
    found = check(W, name, **options)
    assert type(found.operator) is structlin.structure_class(name)
    assert found.operator.structure == design(name, shape, **options)


@pytest.mark.parametrize(("name", "shape", "options"), MORE)
def test_more_cores_and_sizes(name, shape, options):
    W = structlin.structure_class(name).random(shape, seed=5, **options).to_dense()
    found = check(W, name, **options)
    if found.error_bound is not None and not found.optimal:
        assert found.error_bound < FIT
        assert found.iterations <= 3


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "options"), [((15, 6), {"blocks": 3, "rank": 2}), ((24, 36), {"blocks": 3, "rank": 4})]
)
def test_blast_with_twelve_restarts(shape, options, seed):
    W = structlin.Blast.random(shape, seed=seed, **options).to_dense()
    assert check(W, "blast", restarts=12, max_sweeps=3000, **options).error_bound is None


@pytest.mark.covering(1)
@pytest.mark.parametrize("structure", CHAINS, ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_chains_by_their_roles(structure, dtype):
    factors = structlin.random_factors(structure, seed=7, dtype=dtype)
    W = structure.apply_columns(factors, np.eye(structure.d_in, dtype=dtype))
    found = check(W, structure)
    assert found.operator.structure == structure
    assert type(found.operator) is structlin.StructuredOperator


def test_the_identity():
    for name in ("butterfly", "kronecker", "tensor_train", "block_diagonal", "circulant", "toeplitz", "diagonal"):
        check(np.eye(16), name)
    # Block (n_0, m_1) of the identity is an identity of size 4 or 0, of which rank 1 keeps one of four squares.
    assert project(np.eye(16), "monarch").relative_error == pytest.approx(np.sqrt(3 / 4))


def test_zero_and_one_by_one():
    for name in set(structure_names()) - {"butterfly", "permutation"}:
        try:
            structure = design(name, (1, 1))
        except ValueError:  # sizes that cannot be split
            continue
        assert project(np.array([[2.5]]), structure).relative_error < FIT, name
    for name, shape in (("low_rank", (4, 6)), ("block_tensor_train", (4, 6)), ("butterfly", (8, 8)), ("blast", (4, 8))):
        found = project(np.zeros(shape), name)
        assert found.relative_error == 0
        assert not np.asarray(found.operator.to_dense()).any()
        assert all(np.isfinite(f).all() for f in found.operator.factors)
