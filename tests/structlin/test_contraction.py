"""The contraction: transformations, gradients and refusals; its values are checked in test_structures.py too."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.children import output
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin import Structure, design, random_factors, structure_class, structure_names
from structlin.testing import check_instance, dense_matrix, random_chain

NAMES = structure_names()
PADDED = Structure.parse("pa,pqa->pq; gl,log->lo", p=3, a=3, q=4, g=4, l=3, o=5, d_in=7, d_out=13)
SMALL = {
    name: design(name, *structure_class(name).examples[0][:1], **structure_class(name).examples[0][1]) for name in NAMES
}
SMALL |= {"padded": PADDED, "three_cores": design("block_tensor_train", (30, 24), cores=3, rank=(2, 5))}
TRAINABLE = {name: s for name, s in SMALL.items() if s.num_params}


def vectors(structure, count, dtype="float64", seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, structure.d_in))
    if "complex" in dtype:
        x = x + 1j * rng.standard_normal(x.shape)
    return x.astype(dtype)


# -- chains at random ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_chains(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        check_instance(random_chain(np.random.default_rng(seed)), seed=seed % 97)

    check()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float16", "bfloat16", "complex128"]))
def test_random_chains_on_torch(seed, dtype):
    check_instance(random_chain(np.random.default_rng(seed)), backend="torch", dtype=dtype)


@pytest.mark.parametrize("seed", range(3))
def test_random_chains_on_jax(seed):
    check_instance(random_chain(np.random.default_rng(seed)), backend="jax", transform=jax.jit, quick=True)


def test_the_libraries_agree():
    for name, s in SMALL.items():
        x = vectors(s, 3)
        numpy_result = s.apply(random_factors(s, seed=0), x)
        torch_result = s.apply(random_factors(s, backend="torch", dtype="float64", seed=0), torch.tensor(x))
        np.testing.assert_allclose(torch_result.numpy(), numpy_result, rtol=1e-13, atol=1e-13, err_msg=name)
    for name in ("block_tensor_train", "circulant"):
        s = SMALL[name]
        x = vectors(s, 3)
        jax_result = jax.jit(s.apply)(random_factors(s, backend="jax", dtype="float64", seed=0), jnp.asarray(x))
        numpy_result = s.apply(random_factors(s, seed=0), x)
        np.testing.assert_allclose(np.asarray(jax_result), numpy_result, rtol=1e-13, atol=1e-13)


def test_inputs_are_not_written_to_and_results_share_no_memory_with_them():
    """A result that aliases the input would change with it."""
    for s in SMALL.values():
        factors, x = random_factors(s, seed=0), vectors(s, 3)
        kept = copy.deepcopy((*factors, x))
        for y in (s.apply(factors, x), s.apply_columns(factors, x.T)):
            assert not np.shares_memory(y, x)
            assert not any(np.shares_memory(y, f) for f in factors)
        for a, b in zip((*factors, x), kept, strict=True):
            np.testing.assert_array_equal(a, b)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_by_finite_differences(name):
    s = TRAINABLE[name]
    factors = [f.requires_grad_() for f in random_factors(s, backend="torch", dtype="float64", seed=0)]
    x = torch.tensor(vectors(s, 2)).requires_grad_()
    fast = s.num_params > 60  # along one direction, and not by each number
    assert torch.autograd.gradcheck(lambda x, *f: s.apply(f, x), (x, *factors), fast_mode=fast)
    columns = x.detach().T.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *f: s.apply_columns(f, x), (columns, *factors), fast_mode=True)


@pytest.mark.parametrize("name", ["kronecker", "block_tensor_train", "padded", "toeplitz", "circulant", "diagonal"])
def test_complex_gradients_by_finite_differences(name):
    s = SMALL[name]
    factors = [f.requires_grad_() for f in random_factors(s, backend="torch", dtype="complex128", seed=0)]
    x = torch.tensor(vectors(s, 2, "complex128")).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *f: s.apply(f, x), (x, *factors), fast_mode=True)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 300]))
def test_gradients_of_random_chains(seed, tokens):
    """More than one chunk of tokens too. Each gradient is linear in each factor, so double precision is exact enough
    to compare with finite differences along one direction."""
    s = random_chain(np.random.default_rng(seed))
    leaves = [f.requires_grad_() for f in random_factors(s, backend="torch", dtype="float64", seed=0)]
    x = torch.tensor(vectors(s, tokens)).requires_grad_()
    w = torch.tensor(np.random.default_rng(2).standard_normal((tokens, s.d_out)))
    gradients = torch.autograd.grad((s.apply(leaves, x) * w).sum(), (*leaves, x))
    for k, leaf in enumerate((*leaves, x)):
        step = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        moved = [a.detach() + (step if i == k else 0) for i, a in enumerate((*leaves, x))]
        change = ((s.apply(moved[:-1], moved[-1]) - s.apply(leaves, x)) * w).sum().item()
        assert (gradients[k] * step).sum().item() == pytest.approx(change, rel=1e-9, abs=1e-9)


def test_second_derivatives():
    s = SMALL["block_tensor_train"]
    factors = [f.requires_grad_() for f in random_factors(s, backend="torch", dtype="float64", seed=0)]
    x = torch.tensor(vectors(s, 2)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, *f: s.apply(f, x), (x, *factors), fast_mode=True)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_of_jax_are_those_of_torch(name):
    s = SMALL[name]
    x, w = vectors(s, 2), np.random.default_rng(2).standard_normal((2, s.d_out))
    leaves = [f.requires_grad_() for f in random_factors(s, backend="torch", dtype="float64", seed=0)]
    inputs = torch.tensor(x).requires_grad_()
    (s.apply(leaves, inputs) * torch.tensor(w)).sum().backward()
    factors = random_factors(s, backend="jax", dtype="float64", seed=0)
    loss = lambda factors, x: jnp.sum(s.apply(factors, x) * w)  # noqa: E731
    for_factors, for_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(factors, jnp.asarray(x))
    for a, b in zip((*leaves, inputs), (*for_factors, for_x), strict=True):
        np.testing.assert_allclose(a.grad.numpy(), np.asarray(b), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_input_is_the_product_with_the_matrix():
    for s in TRAINABLE.values():
        factors = random_factors(s, backend="torch", dtype="float64", seed=0)
        x = torch.tensor(vectors(s, 3)).requires_grad_()
        w = np.random.default_rng(2).standard_normal((3, s.d_out))
        (s.apply(factors, x) * torch.tensor(w)).sum().backward()
        matrix = dense_matrix(s, factors)
        np.testing.assert_allclose(x.grad.numpy(), w @ matrix, atol=1e-12 * np.linalg.norm(matrix))


def test_gradients_of_empty_batches_are_zero():
    for s in TRAINABLE.values():
        factors = [f.requires_grad_() for f in random_factors(s, backend="torch", seed=0)]
        x = torch.zeros(2, 0, s.d_in, requires_grad=True)
        s.apply(factors, x).sum().backward()
        assert x.grad.shape == x.shape
        assert all(not f.grad.any() for f in factors)


# -- transformations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
def test_vmap_of_torch_over_factors_and_inputs(name):
    s = TRAINABLE[name]
    stacks = [random_factors(s, seed=k, backend="torch", dtype="float64") for k in range(3)]
    factors = tuple(torch.stack(f) for f in zip(*stacks, strict=True))
    x = torch.tensor(np.stack([vectors(s, 4, seed=k) for k in range(3)]))
    each = [s.apply(f, v) for f, v in zip(stacks, x, strict=True)]
    torch.testing.assert_close(torch.func.vmap(s.apply)(factors, x), torch.stack(each))
    over_factors = torch.func.vmap(s.apply, in_dims=(0, None))(factors, x[0])
    torch.testing.assert_close(over_factors, torch.stack([s.apply(f, x[0]) for f in stacks]))
    over_x = torch.func.vmap(s.apply, in_dims=(None, 1), out_dims=1)(stacks[0], x)
    torch.testing.assert_close(over_x, s.apply(stacks[0], x))
    columns = torch.func.vmap(s.apply_columns, in_dims=(0, 0))(factors, x.transpose(1, 2))
    torch.testing.assert_close(columns, torch.stack(each).transpose(1, 2))


def test_gradients_for_each_sample():
    s = SMALL["block_tensor_train"]
    factors = random_factors(s, backend="torch", dtype="float64", seed=0)
    x = torch.tensor(vectors(s, 3))
    loss = lambda factors, x: s.apply(factors, x).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)
    total = torch.func.grad(loss)(factors, x)
    for a, b in zip(each, total, strict=True):
        torch.testing.assert_close(a.sum(0), b)


def test_vmap_of_jax_over_factors_and_inputs():
    s = SMALL["block_tensor_train"]
    stacks = [random_factors(s, seed=k, backend="jax", dtype="float64") for k in range(3)]
    factors = jax.tree.map(lambda *f: jnp.stack(f), *stacks)
    x = np.stack([vectors(s, 4, seed=k) for k in range(3)])
    got = jax.jit(jax.vmap(s.apply))(factors, x)
    wanted = [v @ dense_matrix(s, f).T for f, v in zip(stacks, x, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_a_structure_is_a_static_argument_of_jit():
    traces = []

    def apply(structure, factors, x):
        traces.append(structure)
        return structure.apply(factors, x)

    jitted = jax.jit(apply, static_argnums=0)
    for rank in (2, 2, 3):
        s = design("low_rank", (5, 4), rank=rank)
        factors = random_factors(s, backend="jax", dtype="float64", seed=0)
        wanted = s.apply(random_factors(s, seed=0), np.ones((2, 4)))
        np.testing.assert_allclose(jitted(s, factors, np.ones((2, 4))), wanted)
    assert traces == [design("low_rank", (5, 4), rank=2), design("low_rank", (5, 4), rank=3)]


def test_torch_compile_may_come_first():
    """In a process where nothing has been applied yet."""
    script = """
import torch
from structlin import design, random_factors, rms_cap

for name, size in (("block_tensor_train", 6), ("toeplitz", 5), ("permutation", 4)):
    s = design(name, (size, size))
    factors = random_factors(s, backend="torch", seed=0)
    x = torch.ones(3, size)
    compiled = torch.compile(s.apply, fullgraph=True, backend="eager")(factors, x)
    torch.testing.assert_close(compiled, s.apply(factors, x))  # eager calls may run by another way
"""
    output("-c", script)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_torch_compile_makes_one_graph(name):
    torch._dynamo.reset()
    s = SMALL[name]
    factors = [
        f.requires_grad_(spec.trainable)
        for f, spec in zip(random_factors(s, backend="torch", seed=0), s.factors, strict=True)
    ]
    x = torch.tensor(vectors(s, 6, "float32").reshape(2, 3, -1))
    explained = torch._dynamo.explain(s.apply)(factors, x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(s.apply, fullgraph=True)
    wanted = s.apply(factors, x)
    torch.testing.assert_close(compiled(factors, x), wanted)
    trained = [f for f in factors if f.requires_grad]
    if trained:
        ours = torch.autograd.grad(compiled(factors, x).square().sum(), trained)
        torch.testing.assert_close(ours, torch.autograd.grad(wanted.square().sum(), trained), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(factors, x[:, :1]), wanted[:, :1])


def test_meta_tensors_and_fake_tensors_give_shapes():
    for s in SMALL.values():
        if "fft" in s.other_flops:
            continue
        factors = [f.to("meta") for f in random_factors(s, backend="torch", seed=0)]
        assert s.apply(factors, torch.zeros(2, 3, s.d_in, device="meta")).shape == (2, 3, s.d_out)
        assert s.apply_columns(factors, torch.zeros(s.d_in, 3, device="meta")).shape == (s.d_out, 3)


def test_autocast_of_torch_multiplies_in_half_precision():
    s = SMALL["block_tensor_train"]
    factors = random_factors(s, backend="torch", seed=0)
    x = torch.tensor(vectors(s, 3, "float32"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.apply(factors, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), s.apply(factors, x), rtol=0.05, atol=0.05)


# -- dtypes --------------------------------------------------------------------------------------------------------


def test_numpy_and_jax_promote_dtypes():
    s = SMALL["block_tensor_train"]
    y = s.apply(random_factors(s, dtype="float32", seed=0), vectors(s, 2))
    assert y.dtype == np.float64
    assert s.apply(random_factors(s, seed=0), vectors(s, 2, "complex64")).dtype == np.complex128
    y = s.apply(random_factors(s, backend="jax", dtype="float32", seed=0), jnp.asarray(vectors(s, 2, "complex64")))
    assert y.dtype == jnp.complex64


def test_torch_wants_equal_dtypes():
    s = SMALL["block_tensor_train"]
    factors = random_factors(s, backend="torch", seed=0)
    for call, x in ((s.apply, torch.ones(2, s.d_in).double()), (s.apply_columns, torch.ones(s.d_in, 2).double())):
        with pytest.raises(
            ValueError, match=r"the factors are torch.float32, the input is torch.float64: convert one of them"
        ):
            call(factors, x)


def test_a_permutation_moves_any_dtype():
    s = design("permutation", (5, 5))
    (index,) = random_factors(s, backend="torch", seed=0)
    for dtype in (torch.float16, torch.int64, torch.complex64):
        x = torch.arange(5).to(dtype)
        assert s.apply((index,), x).tolist() == x[index].tolist()


# -- refusals ------------------------------------------------------------------------------------------------------

LOW_RANK = Structure.parse("i,ri->r; r,or->o", i=7, r=2, o=5)
GOOD = random_factors(LOW_RANK, seed=0)


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (GOOD[:1], ValueError, r"Structure.parse\('i,ri->r; r,or->o', .* has 2 factors, got 1"),
        ((*GOOD, GOOD[0]), ValueError, "has 2 factors, got 3"),
        (GOOD[::-1], ValueError, r"factor W0 of .* has shape \(2, 7\), got \(5, 2\)"),
        ((GOOD[0], GOOD[1].T), ValueError, r"factor W1 of .* has shape \(5, 2\), got \(2, 5\)"),
        ((GOOD[0], GOOD[1].astype(int)), ValueError, "W1 of .* must have a floating or complex dtype, got int64"),
        ((GOOD[0], GOOD[1].astype("f4")), ValueError, "all factors must have the same dtype, got float32, float64"),
        ((GOOD[0], torch.tensor(GOOD[1])), TypeError, "arrays of one library are needed, got numpy, torch"),
        ((GOOD[0], GOOD[1].tolist()), TypeError, "expected a NumPy array, a torch tensor or a jax array, got .*list"),
    ],
)
def test_factors_that_do_not_fit(factors, error, message):
    for call in (
        lambda: LOW_RANK.check(factors),
        lambda: LOW_RANK.apply(factors, np.ones(7)),
        lambda: LOW_RANK.apply_columns(factors, np.ones((7, 1))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_index_arrays_hold_integers():
    s = design("permutation", (3, 3))
    assert s.check((np.array([2, 0, 1]),)) == "numpy"
    with pytest.raises(ValueError, match=r"factor index of .* must have an integer dtype, got float64"):
        s.check((np.array([2.0, 0.0, 1.0]),))


@pytest.mark.parametrize(
    ("method", "x", "error", "message"),
    [
        ("apply", np.ones((7, 6)), ValueError, r"last axis of the input must have size d_in = 7, got shape \(7, 6\)"),
        ("apply", np.ones(()), ValueError, r"last axis of the input must have size d_in = 7, got shape \(\)"),
        ("apply", torch.ones(7), TypeError, "the factors are numpy arrays, the input is a torch array"),
        ("apply", [1.0] * 7, TypeError, "expected a NumPy array, .* got builtins.list"),
        ("apply_columns", np.ones((6, 7)), ValueError, r"first axis .* d_in = 7, got shape \(6, 7\)"),
        ("apply_columns", np.ones(()), ValueError, r"first axis .* got shape \(\)"),
        ("apply_columns", np.ones(7), ValueError, r"x must have shape \(d_in, k\) = \(7, k\), got \(7,\)"),
        ("apply_columns", np.ones((7, 2, 3)), ValueError, r"x must have shape \(d_in, k\) .* got \(7, 2, 3\)"),
        ("apply_columns", jnp.ones((7, 2)), TypeError, "the factors are numpy arrays, the input is a jax array"),
    ],
)
def test_inputs_that_do_not_fit(method, x, error, message):
    with pytest.raises(error, match=message):
        getattr(LOW_RANK, method)(GOOD, x)


def test_nothing_is_cut_or_padded_silently():
    """A padded structure takes vectors of d_in only, not of the padded size."""
    factors = random_factors(PADDED, seed=0)
    assert PADDED.padding == (2, 2)
    with pytest.raises(ValueError, match="must have size d_in = 7"):
        PADDED.apply(factors, np.ones(9))
    matrix = dense_matrix(PADDED, factors)
    assert matrix.shape == PADDED.shape == (13, 7)
    np.testing.assert_allclose(PADDED.apply(factors, np.eye(7)).T, matrix, atol=1e-14)


def test_plans_survive_copies():
    for s in SMALL.values():
        for twin in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
            x, factors = vectors(s, 2), random_factors(s, seed=0)
            np.testing.assert_array_equal(twin.apply(factors, x), s.apply(factors, x))
