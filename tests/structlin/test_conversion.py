"""Conversions are exact, differentiable and on every library; exact ranks are exact and smallest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.arrays import BACKENDS, TYPES, on_host
from helpers.refusals import refused

import structlin
from structlin import (
    BlockTensorTrain,
    Dense,
    Kronecker,
    Monarch,
    Structure,
    StructuredOperator,
    TensorTrain,
    design,
    structure_class,
    structure_names,
)
from structlin.conversion import conversions, convert, exact_rank
from structlin.projection import project

EXACT = 1e-12


def sources(source, target):
    """Examples of ``source`` that have an exact form in ``target``."""
    if (source, target) == ("block_tensor_train", "monarch"):
        square = ((12, 15), {"rank": 2, "factorization": ((3, 4), (5, 3))})
        return [square, ((14, 6), {"factorization": ((2, 7), (3, 2))})]
    examples = [*structure_class(source).examples]
    if source == "monarch":
        examples += [((44, 44), {"blocks": 4}), ((27, 62), {"blocks": 4}), ((13, 9), {"blocks": 1})]
    if target == "einsum" and source != "low_rank":
        examples = [(shape, options) for shape, options in examples if options.get("cores", 2) == 2]
    return examples


CASES = [
    pytest.param(source, target, shape, options, id=f"{source}-{target}-{i}")
    for source, target in conversions()
    for i, (shape, options) in enumerate(sources(source, target))
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(("source", "target", "shape", "options"), CASES)
def test_the_matrix_stays(source, target, shape, options, backend, dtype):
    check(source, target, shape, options, backend, dtype)


# Gradients in jax pass through every conversion below.
@pytest.mark.parametrize(
    ("source", "target"),
    [pair if k % 5 == 0 else pytest.param(*pair, marks=pytest.mark.slow) for k, pair in enumerate(conversions())],
)
def test_the_matrix_stays_in_jax(source, target):
    """One size each, without transposes: every product is compiled."""
    shape, options = sources(source, target)[0]
    check(source, target, shape, options, "jax", "complex128", transpose=False)


def check(source, target, shape, options, backend, dtype, transpose=True):
    A = structure_class(source).random(shape, backend=backend, dtype=dtype, **options, seed=0)
    for operator in (A, A.T)[: 1 + transpose]:
        B = convert(operator, target)
        assert B.shape == operator.shape
        assert B.dtype == A.dtype
        assert isinstance(B.to_dense(), TYPES[backend])
        want = on_host(operator.to_dense())
        assert np.abs(on_host(B.to_dense()) - want).max() <= EXACT * np.abs(want).max()


@pytest.mark.parametrize(("source", "target"), conversions())
def test_the_class_is_that_of_the_target(source, target):
    shape, options = sources(source, target)[0]
    B = convert(structure_class(source).random(shape, **options, seed=0), target)
    if target == "block_tensor_train" and source in ("kronecker", "tensor_train", "butterfly"):
        assert type(B) is StructuredOperator
    else:
        assert type(B) is structure_class(target)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", structure_names())
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_becomes_dense(name, backend):
    shape, options = structure_class(name).examples[0]
    A = structure_class(name).random(shape, backend=backend, **options, seed=0)
    D = convert(A, "dense")
    assert type(D) is Dense
    np.testing.assert_array_equal(on_host(D.factors[0]), on_host(A.to_dense()))
    assert convert(D, "dense") is D


def test_composites_become_dense():
    A = Kronecker.random((6, 8), backend="torch", seed=0) @ TensorTrain.random((8, 6), rank=2, backend="torch", seed=0)
    np.testing.assert_allclose(convert(A, "dense").factors[0], A.to_dense())


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("source", "shape", "options"),
    [("kronecker", (35, 6), {}), ("tensor_train", (30, 24), {"cores": 3, "rank": (2, 5)}), ("butterfly", (8, 8), {})],
)
def test_as_a_product_with_a_permutation(source, shape, options, backend):
    """The same factors, as a Block Tensor-Train of its own class and a permutation."""
    A = structure_class(source).random(shape, backend=backend, dtype="float64", **options, seed=0)
    product, chain = convert(A, "block_tensor_train", permutation=True), convert(A, "block_tensor_train")
    np.testing.assert_allclose(on_host(product.to_dense()), on_host(A.to_dense()), atol=1e-13)
    train = next(M for M in product.Ms if isinstance(M, BlockTensorTrain))
    assert train.structure.num_params == chain.structure.num_params
    assert train.structure.macs == chain.structure.macs
    for a, b in zip(train.factors, chain.factors, strict=True):
        np.testing.assert_array_equal(on_host(a), on_host(b))


def test_orders_against_explicit_permutations():
    """Index by index: a Tensor-Train of two cores in the form of the Block Tensor-Train."""
    A = TensorTrain.random((15, 8), rank=2, factorization=((3, 5), (2, 4)), seed=0)
    G1, G2 = A.factors
    train = next(M for M in convert(A, "block_tensor_train", permutation=True).Ms if isinstance(M, BlockTensorTrain))
    W0, W1 = train.factors
    for n1, n2, m1, m2 in np.ndindex(3, 5, 2, 4):
        assert A.to_dense()[n1 * 5 + n2, m1 * 4 + m2] == pytest.approx(G1[0, n1, m1] @ G2[:, n2, m2, 0])
        np.testing.assert_array_equal(W0[m2, n1, :, m1], G1[0, n1, m1])
        np.testing.assert_array_equal(W1[n1, n2, :, m2], G2[:, n2, m2, 0])
        # The input of the train is read as (m_2, m_1).
        assert train.to_dense()[n1 * 5 + n2, m2 * 2 + m1] == pytest.approx(A.to_dense()[n1 * 5 + n2, m1 * 4 + m2])


def test_there_and_back():
    A = Monarch.random((12, 8), blocks=2, seed=0)
    B = convert(convert(A, "block_tensor_train"), "monarch")
    assert type(B) is Monarch
    assert B.structure == A.structure
    assert all(b is a for a, b in zip(A.factors, B.factors, strict=True))


def test_padding_is_kept():
    for shape in ((23, 14), (41, 43)):
        A = Monarch.random(shape, blocks=3, seed=0)
        B = convert(A, "block_tensor_train")
        assert B.structure.padding == A.structure.padding
        if A.factors[0].ndim == 4:
            assert convert(B, "einsum").structure.padding == A.structure.padding
            assert convert(B, "monarch").structure == A.structure


def test_costs():
    """A structure without shared weights keeps its parameters; block diagonal pays for the other slices."""
    for source, shape, options in (("monarch", (12, 8), {"blocks": 2}), ("butterfly", (16, 16), {})):
        A = structure_class(source).random(shape, **options, seed=0)
        assert convert(A, "block_tensor_train").structure.num_params == A.structure.num_params
    for source, target in (("low_rank", "einsum"), ("kronecker", "einsum"), ("kronecker", "tensor_train")):
        A = structure_class(source).random((12, 20), seed=0)
        assert convert(A, target).structure.num_params == A.structure.num_params
    A = structlin.BlockDiagonal.random((8, 12), blocks=4, seed=0)
    assert convert(A, "block_tensor_train").structure.num_params == 4 * (A.structure.num_params + 4 * 2 * 2)


@pytest.mark.parametrize(("source", "target"), conversions())
def test_gradients_pass(source, target):
    """Through torch and jax: the gradient of a quadratic form in the converted operator is that in the original."""
    shape, options = sources(source, target)[0]
    A = structure_class(source).random(shape, backend="torch", dtype="float64", **options, seed=0)
    leaves = [f.detach().clone().requires_grad_() for f in A.factors]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape[1], 2))

    def value(factors, convert_, x):
        operator = type(A)._build(A.structure, tuple(factors))
        return ((convert(operator, target) if convert_ else operator) @ x).sum() ** 2

    grads = [torch.autograd.grad(value(leaves, c, torch.tensor(x)), leaves) for c in (True, False)]
    in_jax = jax.jit(jax.grad(lambda f: value(f, True, jnp.asarray(x))))([jnp.asarray(on_host(a)) for a in leaves])
    for converted, plain, traced in zip(*grads, in_jax, strict=True):
        np.testing.assert_allclose(on_host(converted), on_host(plain), atol=1e-9)
        np.testing.assert_allclose(on_host(traced), on_host(plain), atol=1e-9)


def test_bad_conversions():
    A = BlockTensorTrain.random((35, 6), rank=2, seed=0)
    refused(ValueError, "m_1 = n_0; got n =", convert, A, "monarch")
    with pytest.raises(
        ValueError, match="from 'block_tensor_train' to 'low_rank'; there is one to monarch, einsum, dense"
    ):
        convert(A, "low_rank")
    refused(ValueError, "unknown structure", convert, A, "monarchs")
    with pytest.raises(ValueError, match="permutation=True is only valid for conversions to 'block_tensor_train'"):
        convert(A, "einsum", permutation=True)
    with pytest.raises(ValueError, match="without a permutation"):
        convert(Monarch.random((12, 8), blocks=2, seed=0), "block_tensor_train", permutation=True)
    refused(ValueError, "two factors, got 3", convert, Kronecker.random((30, 24), cores=3, seed=0), "einsum")
    plain = StructuredOperator(Structure.parse("i,oi->o", i=3, o=2), (np.ones((2, 3)),))
    with pytest.raises(ValueError, match="can be converted to 'dense' only"):
        convert(plain, "einsum")
    with pytest.raises(TypeError, match="A must be an operator of structlin or CoLA"):
        convert(np.eye(3), "dense")
    assert convert(A, "block_tensor_train") is A


# -- exact ranks -------------------------------------------------------------------------------------------------------

RANKS = [
    ("low_rank", (6, 35), {}),
    ("low_rank", (35, 6), {}),
    ("tensor_train", (35, 6), {}),
    ("tensor_train", (30, 24), {"cores": 3}),
    ("block_tensor_train", (35, 6), {}),
    ("block_tensor_train", (6, 35), {"factorization": ((3, 2), (5, 7))}),
    ("block_tensor_train", (30, 24), {"cores": 3}),
    ("block_tensor_train", (24, 36), {"cores": 3, "factorization": ((2, 3, 4), (3, 4, 3))}),
]


@pytest.mark.parametrize(("name", "shape", "options"), RANKS)
def test_exact_ranks_are_exact_and_smallest(name, shape, options):
    """At that rank a random matrix is met exactly; with any one bond smaller it is not."""
    W = np.random.default_rng(0).standard_normal(shape)
    rank = exact_rank(name, shape, **options)
    assert project(W, name, rank=rank, **options).relative_error < 1e-13
    bonds = [rank] if isinstance(rank, int) else list(rank)
    for k, bond in enumerate(bonds):
        if bond > 1:
            fewer = [*bonds[:k], bond - 1, *bonds[k + 1 :]]
            found = project(W, name, rank=fewer[0] if isinstance(rank, int) else fewer, **options)
            assert found.relative_error > 1e-3


def test_exact_ranks_by_formula():
    assert exact_rank("block_tensor_train", (1024, 1024)) == (32,)
    assert exact_rank("tensor_train", (1024, 1024)) == (1024,)
    assert exact_rank("tensor_train", (8, 8), cores=3) == (4, 4)
    assert exact_rank("block_tensor_train", (8, 8), cores=3) == (2, 2)
    assert exact_rank("low_rank", (5, 9)) == 5
    assert design("block_tensor_train", (1024, 1024), rank=(32,)).rank_bound == 1024


def test_bad_exact_ranks():
    for name in ("kronecker", "monarch", "blast", "circulant"):
        with pytest.raises(ValueError, match=f"no rank is known at which '{name}'"):
            exact_rank(name, (8, 8))
    refused(ValueError, "unknown structure", exact_rank, "trains", (8, 8))
    refused(ValueError, r"computes the rank; leave out rank$", exact_rank, "tensor_train", (8, 8), rank=2)
    refused(ValueError, "leave out rank_fraction", exact_rank, "low_rank", (8, 8), rank_fraction=0.5)
    refused(ValueError, "no option 'bonds'", exact_rank, "tensor_train", (8, 8), bonds=2)
