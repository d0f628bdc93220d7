"""The scale rule of composites: that of the structure where there is one, whoever's operators it is written in."""

import cola
import numpy as np
import pytest
import torch
from cola.ops import BlockDiag, Concatenated, Dense, KronSum, Product, Sum
from helpers.refusals import refused

import structlin
from structlin import init_std, interop, lr_multipliers
from structlin._array_scales import array_scales
from structlin.scale import OPTIMIZERS

CHAINS = {
    "dense": ((5, 20), {}),
    "low_rank": ((12, 8), {"rank": 3}),
    "kronecker": ((12, 15), {"factorization": ((3, 4), (5, 3))}),
    "block_diagonal": ((6, 15), {"blocks": 3}),
    "monarch": ((10, 21), {"blocks": 3}),
    "block_tensor_train": ((12, 20), {"rank": 2, "cores": 3}),
    "tensor_train": ((6, 20), {"rank": 2}),
    "blast": ((6, 9), {"blocks": 3, "rank": 2}),
    "butterfly": ((8, 8), {}),
    "diagonal": ((5, 5), {}),
}


def scale(A, **options):
    return [(s.init_std, s.lr_multiplier) for s in array_scales(A, **options)]


def dense(d_out, d_in, seed=0):
    return Dense(np.random.default_rng(seed).standard_normal((d_out, d_in)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CHAINS)
def test_as_for_the_structure(name, optimizer):
    shape, options = CHAINS[name]
    A = structlin.structure_class(name).random(shape, **options, seed=0)
    for op in (A, A.T):
        for sizes in ({}, {"base_d_in": 7, "base_d_out": 3}):
            chosen = {"optimizer": optimizer, **sizes}
            wanted = list(zip(init_std(op.structure), lr_multipliers(op.structure, **chosen), strict=True))
            np.testing.assert_allclose(scale(op, **chosen), wanted)
            for array, found in zip(op.factors, array_scales(op, **chosen), strict=True):
                assert found.array is array
            if name == "kronecker" and optimizer == "sgd":
                continue  # CoLA begins with the other member, so that the vector between them has another length
            # CoLA's operators hold a factor's blocks one by one.
            theirs, ours = (np.unique(np.round(x, 9), axis=0) for x in (scale(interop.to_cola(op), **chosen), wanted))
            np.testing.assert_array_equal(theirs, ours)


def test_circulant_toeplitz_and_index_arrays():
    for name in ("circulant", "toeplitz"):
        A = structlin.structure_class(name).random((6, 6), seed=0)
        assert scale(A) == [(init_std(A.structure)[0], 1.0)]
    P = structlin.Permutation.random((6, 6), seed=0)
    assert scale(P) == []
    assert scale(P @ dense(6, 6)) == scale(dense(6, 6))


def test_updates_that_add_up_are_shared_out():
    A, B = dense(6, 8), structlin.Kronecker.random((6, 8), seed=0)
    assert [m for _, m in scale(Sum(A, B))] == pytest.approx([8 / 8 / 3, 8 / 2 / 3, 8 / 4 / 3])
    blocks = BlockDiag(dense(6, 8), structlin.Kronecker.random((6, 8), seed=0))  # side by side: not added
    assert [m for _, m in scale(blocks)] == pytest.approx([16 / 8 / 2, 16 / 2 / 2, 16 / 4 / 2])
    assert [m for _, m in scale(KronSum(dense(2, 2), dense(3, 3)))] == pytest.approx([6 / 2 / 2, 6 / 3 / 2])


def test_positions_of_sgd():
    assert [m for _, m in scale(BlockDiag(dense(4, 4), dense(2, 2)), optimizer="sgd")] == pytest.approx([6 / 4, 6 / 2])
    kron = cola.ops.Kronecker(dense(3, 5), dense(4, 2))  # 5 x 2, then 3 x 2, then 3 x 4 numbers
    wanted = [2 * (3 / 5) * (10 / 12), 3 * (4 / 2) * (10 / 12)]
    assert [m for _, m in scale(kron, optimizer="sgd")] == pytest.approx(wanted)
    assert scale(cola.ops.Transpose(cola.ops.Transpose(kron)), optimizer="sgd") == scale(kron, optimizer="sgd")
    halves = Concatenated(dense(4, 8), dense(4, 8), axis=0)  # a dense matrix in two parts
    assert scale(halves, optimizer="sgd")[0][1] == scale(dense(8, 8), optimizer="sgd")[0][1]
    assert scale(cola.ops.Transpose(halves), optimizer="sgd")[0][1] == pytest.approx(8 / 4)


def test_an_array_that_occurs_twice_has_the_smaller_values():
    A = dense(6, 8)
    (only,) = array_scales(Product(A, A.T))
    assert only.array is A.A
    assert only.lr_multiplier == pytest.approx(6 / 8 / 2)
    assert only.init_std == pytest.approx(np.sqrt(6) / 8)


def test_scalars_and_torch():
    c = torch.tensor(2.0)
    A = c * structlin.Permutation.random((6, 6), backend="torch", seed=0)
    assert [s.lr_multiplier for s in array_scales(A)] == [6.0]
    sliced = structlin.Monarch.random((6, 8), blocks=2, backend="torch", seed=0)[1:4]
    assert len(array_scales(sliced)) == 2


def test_what_is_refused():
    refused(ValueError, "unknown optimizer", array_scales, dense(2, 2), optimizer="lbfgs")
    refused(ValueError, "at least 1", array_scales, dense(2, 2), base_d_in=0)
    refused(TypeError, "ndarray", array_scales, np.eye(2))
    with pytest.raises(TypeError, match="Tridiagonal"):
        array_scales(Product(dense(3, 3), cola.ops.Tridiagonal(np.ones(2), np.ones(3), np.ones(2))))
