"""Products, sums and multiples that become one operator: which do, what they cost, and where gradients go."""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cola.ops import Product, ScalarMul, Sum
from helpers import operators
from jax.test_util import check_grads

import structlin
from structlin import linalg
from structlin.testing import to_numpy


def random(name, shape, seed=0, **options):
    return operators.random(name, shape, seed, "torch", **options)


def two(name, shape, **options):
    return random(name, shape, **options), random(name, shape, 1, **options)


def kronecker(out, into, seed=0):
    return random("kronecker", (int(np.prod(out)), int(np.prod(into))), seed, cores=len(out), factorization=(out, into))


def ones(*shape):
    return cola.ops.Dense(torch.ones(*shape, dtype=torch.float64))


# name: (A, B, class of A @ B)
PRODUCTS = {
    "kronecker": (kronecker((2, 5), (3, 4)), kronecker((3, 4), (2, 3)), structlin.Kronecker),
    "kronecker transposed": (kronecker((2, 5), (3, 4)).T, kronecker((2, 5), (4, 3)), structlin.Kronecker),
    "three": (kronecker((2, 3, 2), (2, 2, 3)), kronecker((2, 2, 3), (3, 2, 2)), structlin.Kronecker),
    "block diagonal": (
        random("block_diagonal", (6, 12), blocks=3),
        random("block_diagonal", (12, 9), blocks=3),
        structlin.BlockDiagonal,
    ),
    "permutation": (*two("permutation", (7, 7)), structlin.Permutation),
    "diagonal": (*two("diagonal", (7, 7)), structlin.Diagonal),
    "circulant": (*two("circulant", (7, 7)), structlin.Circulant),
    "low rank, any": (random("low_rank", (9, 7), rank=2), random("toeplitz", (7, 11)), structlin.StructuredOperator),
    "low rank, dense": (random("low_rank", (9, 7), rank=2), ones(7, 5), structlin.LowRank),
    "low rank, block tensor train": (
        random("low_rank", (9, 35), rank=1),
        random("block_tensor_train", (35, 6), rank=2),
        structlin.LowRank,
    ),
    "monarch, low rank": (
        random("monarch", (12, 12), blocks=3),
        random("low_rank", (12, 8), rank=2),
        structlin.LowRank,
    ),
    "low rank, low rank": (
        random("low_rank", (9, 7), rank=3),
        random("low_rank", (7, 11), 1, rank=2),
        structlin.LowRank,
    ),
    "low rank, product": (
        random("low_rank", (9, 7), rank=2),
        random("toeplitz", (7, 8)) @ ones(8, 6),
        structlin.StructuredOperator,
    ),
    "diagonal, dense": (random("diagonal", (5, 5)), random("dense", (5, 3)), structlin.Dense),
    "block diagonal, diagonal": (
        random("block_diagonal", (6, 12), blocks=3),
        random("diagonal", (12, 12)),
        structlin.BlockDiagonal,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    A, B, cls = PRODUCTS[name]
    found = A @ B
    np.testing.assert_allclose(
        to_numpy(found.to_dense()), to_numpy(A.to_dense()) @ to_numpy(B.to_dense()), rtol=0, atol=1e-12
    )
    assert structlin.macs(found) <= structlin.macs(A) + structlin.macs(B)
    if cls is not structlin.StructuredOperator:
        assert isinstance(found, cls)


def test_a_product_that_would_cost_more_is_left_alone():
    wide, tall = kronecker((9, 8), (2, 1)), kronecker((2, 1), (8, 9))
    assert structlin.macs(structlin.Kronecker(torch.ones(9, 8), torch.ones(8, 9))) > structlin.macs(
        wide
    ) + structlin.macs(tall)
    assert isinstance(wide @ tall, Product)
    wide, tall = random("block_diagonal", (12, 3), blocks=3), random("block_diagonal", (3, 12), blocks=3)
    assert isinstance(wide @ tall, Product)
    low, cheap = random("low_rank", (8, 8), rank=7), random("diagonal", (8, 8))
    assert structlin.macs(low @ cheap) <= structlin.macs(low)
    narrow = random("low_rank", (20, 3), rank=2)  # twice as many columns behind as in front
    assert isinstance(narrow @ random("permutation", (3, 3)), structlin.LowRank)
    assert isinstance(narrow @ random("toeplitz", (3, 60)), Product)


def test_longer_products_meet_in_the_middle():
    P, Q = random("permutation", (6, 6)), random("permutation", (6, 6), 1)
    T = random("toeplitz", (6, 6))
    assert isinstance((T @ P) @ (Q @ T), Product)
    assert len(((T @ P) @ (Q @ T)).Ms) == 3
    D = random("diagonal", (6, 6))
    assert len((T @ D @ D @ T).Ms) == 3
    want = to_numpy(T.to_dense()) @ to_numpy((D @ D).to_dense()) @ to_numpy(T.to_dense())
    np.testing.assert_allclose(to_numpy((T @ D @ D @ T).to_dense()), want, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_identity_goes_away(side):
    A = random("monarch", (6, 6), blocks=2)
    eye = cola.ops.I_like(A)
    assert (eye @ A if side == "left" else A @ eye) is A


EYE = cola.ops.I_like(random("circulant", (7, 7)))
# name: (A, B, class of A + B)
SUMS = {
    "diagonal": (*two("diagonal", (7, 7)), structlin.Diagonal),
    "circulant": (*two("circulant", (7, 7)), structlin.Circulant),
    "toeplitz": (*two("toeplitz", (5, 7)), structlin.Toeplitz),
    "dense": (*two("dense", (5, 7)), structlin.Dense),
    "block diagonal": (*two("block_diagonal", (6, 9), blocks=3), structlin.BlockDiagonal),
    "low rank": (random("low_rank", (7, 8), rank=2), random("low_rank", (7, 8), 1, rank=3), structlin.LowRank),
    "tensor train": (
        random("tensor_train", (15, 8), rank=2),
        random("tensor_train", (15, 8), 1, rank=3),
        structlin.TensorTrain,
    ),
    "tensor train transposed": (
        random("tensor_train", (15, 8), rank=2).T,
        random("tensor_train", (8, 15), 1, rank=3),
        structlin.TensorTrain,
    ),
    "circulant + scalar": (random("circulant", (7, 7)), 3.0 * EYE, structlin.Circulant),
    "toeplitz + scalar": (random("toeplitz", (7, 7)), -2.0 * EYE, structlin.Toeplitz),
    "toeplitz + identity": (EYE, random("toeplitz", (7, 7)), structlin.Toeplitz),
    "dense + diagonal": (random("diagonal", (5, 5)), random("dense", (5, 5)), structlin.Dense),
    "blocks + diagonal": (
        random("block_diagonal", (9, 9), blocks=3),
        random("diagonal", (9, 9)),
        structlin.BlockDiagonal,
    ),
    "diagonal + identity": (random("diagonal", (7, 7)), EYE, structlin.Diagonal),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    A, B, cls = SUMS[name]
    want = to_numpy(A.to_dense()) + to_numpy(B.to_dense())
    for found in (A + B, B + A):
        assert isinstance(found, cls)
        np.testing.assert_allclose(to_numpy(found.to_dense()), want, rtol=0, atol=1e-12)
        assert structlin.macs(found) <= structlin.macs(A) + structlin.macs(B)
    np.testing.assert_allclose(to_numpy((A - A).to_dense()), 0 * want, atol=1e-12)


def test_sums_that_would_cost_more_are_left_alone():
    A, B = (random("tensor_train", (30, 24), seed, cores=3, rank=3) for seed in (0, 1))
    assert isinstance(A + B, Sum)
    together = linalg.add_tensor_trains(A, B)
    assert structlin.macs(together) > structlin.macs(A) + structlin.macs(B)
    np.testing.assert_allclose(together.to_dense(), (A + B).to_dense(), atol=1e-12)


def test_a_sum_takes_up_what_one_of_its_terms_can():
    T, D, L = random("toeplitz", (7, 7)), random("diagonal", (7, 7)), random("low_rank", (7, 7), rank=1)
    whole = T + L + D + D + L + 2 * T
    assert len(whole.Ms) == 3
    want = 3 * to_numpy(T.to_dense()) + 2 * to_numpy(L.to_dense()) + 2 * to_numpy(D.to_dense())
    np.testing.assert_allclose(to_numpy(whole.to_dense()), want, atol=1e-12)


def test_sums_and_products_of_unequal_shapes_are_refused():
    A, B = random("toeplitz", (5, 7)), random("toeplitz", (7, 5))
    with pytest.raises(ValueError, match="5, 7"):
        A + B
    with pytest.raises(ValueError, match="5, 7"):
        A @ A


def test_a_number_is_multiplied_into_the_smallest_factor():
    A = random("low_rank", (5, 9), rank=2)
    scaled = 3 * A
    assert isinstance(scaled, structlin.LowRank)
    assert scaled.factors[0] is A.factors[0]
    assert structlin.flops(scaled) == structlin.flops(A)
    product = 2.0 * (random("toeplitz", (5, 5)) @ A)
    assert not any(isinstance(M, ScalarMul) for M in getattr(product, "Ms", ()))
    assert isinstance(2 * random("permutation", (5, 5)), Product)  # nothing to take the number
    assert isinstance(1j * A, Product)  # or all factors would have to be complex
    assert isinstance(1j * A.to(dtype="complex128"), structlin.LowRank)
    for bad in ("2", torch.ones(5), np.ones(5)):
        with pytest.raises((TypeError, ValueError), match="scaled by"):
            A * bad


def test_gradients_reach_a_scalar_and_the_factors():
    V, U = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (4, 2)))
    c = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def f(c, V, U):
        A = structlin.LowRank(V, U)
        return (c * A).to_dense(), (c * (A @ A.T)).to_dense(), ((A - A * c) @ A.T).to_dense()

    assert torch.autograd.gradcheck(f, (c, V, U))

    def g(c, V, U):
        A = structlin.LowRank(V, U)
        return ((c * A) @ A.T @ jnp.arange(4.0)).sum()

    arrays = [jnp.asarray(x.detach().numpy()) for x in (c, V, U)]
    check_grads(jax.jit(g), arrays, order=1)


def test_annotations_stay_true():
    A = random("monarch", (6, 8), blocks=2)
    for gram in (A @ A.T, A.T @ A):
        assert gram.isa(cola.PSD)
    L = random("low_rank", (6, 8), rank=2)
    assert (L @ L.T).isa(cola.PSD)
    assert isinstance(L @ L.T, structlin.LowRank)
    assert not (L @ random("low_rank", (6, 8), 1, rank=2).T).annotations
    P = random("permutation", (6, 6))
    assert (P @ P).isa(cola.annotations.Unitary)
    S = cola.PSD(random("diagonal", (6, 6)) @ random("diagonal", (6, 6)).T)
    assert (S + S).isa(cola.PSD)
    assert (2 * S).isa(cola.PSD)
    assert not (-S).isa(cola.PSD)
    assert (-S).isa(cola.SelfAdjoint)
    assert not (S @ random("diagonal", (6, 6))).annotations
    assert not (S - S).isa(cola.PSD)
    complex_ = A.to(dtype="complex128")
    assert not (complex_ @ complex_.T).annotations


def test_kronecker_products_join():
    K, D = kronecker((2, 3), (4, 5)), random("dense", (3, 2))
    assert isinstance(cola.kron(K, D), structlin.Kronecker)
    assert len(cola.kron(K, D).factors) == 3
    np.testing.assert_allclose(
        cola.kron(K, D).to_dense(), np.kron(to_numpy(K.to_dense()), to_numpy(D.to_dense())), atol=1e-14
    )
    P, Q = random("permutation", (2, 2)), random("permutation", (3, 3))
    assert isinstance(cola.kron(P, Q), structlin.Permutation)
    np.testing.assert_array_equal(cola.kron(P, Q).to_dense(), np.kron(P.to_dense(), Q.to_dense()))
    assert isinstance(cola.kron(random("diagonal", (2, 2)), random("diagonal", (3, 3))), structlin.Diagonal)


def test_dtypes_are_promoted():
    A, B = random("low_rank", (7, 6), rank=2), random("low_rank", (7, 6), 1, rank=2).to(dtype="complex128")
    found = A + B
    assert found.dtype == torch.complex128
    np.testing.assert_allclose(found.to_dense(), A.to_dense() + B.to_dense(), atol=1e-14)
    C, D = kronecker((2, 3), (2, 3)), kronecker((2, 3), (2, 3), 1).to(dtype="float32")
    assert (C @ D).dtype == torch.float64
    np.testing.assert_allclose((C @ D).to_dense(), C.to_dense() @ D.to_dense().double(), atol=1e-6)
