"""Every registered structure: conformance, its definition written out, its formulas, and what it refuses."""

import math
from functools import reduce

import cola
import jax
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin
from structlin import design, structure_class, structure_names
from structlin._arrays import to_backend
from structlin.testing import check_design, check_structure, dense_matrix, to_numpy

NUMPY = ("float16", "float32", "float64", "complex64", "complex128")
TORCH = (*NUMPY, "bfloat16")
BUILT_IN = (
    "dense", "low_rank", "block_diagonal", "kronecker", "tensor_train", "block_tensor_train", "monarch", "blast",
    "butterfly", "einsum", "toeplitz", "diagonal", "circulant", "permutation", "hankel",
)  # fmt: skip
EXAMPLES = [(name, *example) for name in BUILT_IN for example in structure_class(name).examples]


def label(value):
    return value if isinstance(value, str) else repr(value).replace(" ", "")


def test_the_register_holds_the_named_structures_in_order():
    assert structure_names()[: len(BUILT_IN)] == BUILT_IN


# -- conformance ---------------------------------------------------------------------------------------------------


# The fast tests take a real, a complex and a rounded dtype of each structure, and one of the others.
DTYPES = [*(("numpy", d) for d in NUMPY), *(("torch", d) for d in TORCH)]
MAIN = (("numpy", "float64"), ("torch", "complex64"), ("torch", "bfloat16"))


@pytest.mark.parametrize(("name", "backend", "dtype"), [
    pytest.param(name, *pair, marks=() if pair in MAIN or (i + j) % len(DTYPES) == 0 else pytest.mark.slow)
    for i, name in enumerate(BUILT_IN) for j, pair in enumerate(DTYPES)
])  # fmt: skip
def test_conformance(name, backend, dtype):
    check_structure(structure_class(name), backend=backend, dtype=dtype)


@pytest.mark.parametrize("name", BUILT_IN)
def test_conformance_on_jax(name):
    shape, options = structure_class(name).examples[0]
    check_design(structure_class(name), shape, options, backend="jax", transform=jax.jit, quick=True)


@pytest.mark.parametrize("name", ["dense", "permutation", "toeplitz"])
def test_conformance_on_jax_as_it_comes(name):
    """64 bits are not enabled there."""
    cls = structure_class(name)
    with jax.enable_x64(False):
        check_design(cls, *cls.examples[0], backend="jax", dtype="float32", transform=jax.jit, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("dtype", TORCH)
def test_conformance_on_jax_in_every_dtype(name, dtype):
    check_structure(structure_class(name), backend="jax", dtype=dtype, transform=jax.jit, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_conformance_on_jax_without_jit(name):
    shape, options = structure_class(name).examples[0]
    check_design(structure_class(name), shape, options, backend="jax", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_conformance_under_torch_compile(name):
    torch._dynamo.reset()
    cls = structure_class(name)
    compiled = lambda f: torch.compile(f, fullgraph=True)  # noqa: E731
    check_design(cls, *cls.examples[0], backend="torch", dtype="float32", transform=compiled, quick=True)


SIZES = st.integers(1, 4)


@st.composite
def split(draw, cores_from=1):
    """Two explicit factorisations and a number of cores."""
    cores = draw(st.integers(cores_from, 3))
    outs, ins = (draw(st.lists(SIZES, min_size=cores, max_size=cores)) for _ in range(2))
    return (math.prod(outs), math.prod(ins)), {"cores": cores, "factorization": (tuple(outs), tuple(ins))}


@st.composite
def split_with_ranks(draw):
    shape, options = draw(split())
    ranks = draw(st.lists(SIZES, min_size=options["cores"] - 1, max_size=options["cores"] - 1))
    return shape, {**options, "rank": tuple(ranks)}


@st.composite
def in_blocks(draw, **more):
    blocks = draw(SIZES)
    shape = (blocks * draw(SIZES), blocks * draw(SIZES))
    return shape, {"blocks": blocks, **{k: draw(v) for k, v in more.items()}}


@st.composite
def einsum_sizes(draw):
    """Sizes that are powers of 2, and exponents that give whole powers, so that every theta is met exactly."""
    exponents = [draw(st.lists(st.integers(0, 2), min_size=3, max_size=3).filter(any)) for _ in range(2)]
    ins, outs = (sum(e) for e in exponents)
    theta = (*(e / ins for e in exponents[0]), *(e / outs for e in exponents[1]))
    rho = draw(st.integers(0, min(ins, outs))) / min(ins, outs)
    return (2**outs, 2**ins), {"theta": (*theta, rho)}


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SQUARE = st.integers(1, 16).map(lambda n: ((n, n), {}))
DESIGNS = {
    "dense": SHAPES.map(lambda s: (s, {})),
    "low_rank": st.tuples(SHAPES, st.fixed_dictionaries({"rank": st.integers(1, 14)})),
    "block_diagonal": in_blocks(),
    "kronecker": split(),
    "tensor_train": split_with_ranks(),
    "block_tensor_train": split_with_ranks(),
    "monarch": st.tuples(SHAPES, st.fixed_dictionaries({"blocks": st.integers(1, 5)})),
    "blast": in_blocks(rank=st.integers(1, 4)),
    "butterfly": st.integers(1, 5).map(lambda k: ((2**k, 2**k), {})),
    "einsum": einsum_sizes(),
    "toeplitz": SHAPES.map(lambda s: (s, {})),
    "hankel": SHAPES.map(lambda s: (s, {})),
    "circulant": SQUARE,
    "permutation": SQUARE,
    "diagonal": SQUARE,
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_conformance_over_sizes(name):
    @settings(max_examples=20, deadline=None)
    @given(DESIGNS[name], st.integers(0, 9))
    def check(drawn, seed):
        shape, options = drawn
        check_design(structure_class(name), shape, options, seed=seed)

    check()


# -- definitions, written out --------------------------------------------------------------------------------------


def dense_tensor_train(*cores):
    matrix = np.ones((1, 1, 1))
    for core in cores:
        matrix = np.einsum("nmr,rNMR->nNmMR", matrix, core)
        n, n2, m, m2, r = matrix.shape
        matrix = matrix.reshape(n * n2, m * m2, r)
    return matrix[:, :, 0]


def dense_block_tensor_train(*cores):
    """sum over the ranks of prod_k W_k[n_0..n_(k-1), m_(c-1)..m_(k+1), n_k, r_(k+1), r_k, m_k]."""
    c = len(cores)
    n, m, r = "NOPQ"[:c], "abcd"[:c], "rst"[: c - 1]
    terms = [n[:k] + m[:k:-1] + n[k] + (r[k] if k < c - 1 else "") + (r[k - 1] if k else "") + m[k] for k in range(c)]
    full = np.einsum(f"{','.join(terms)}->{n}{m[::-1]}", *cores)
    return full.reshape(math.prod(full.shape[:c]), -1)


def dense_monarch(first, second):
    blocks = first.shape[0]
    first = first.reshape(blocks, -1, first.shape[-1])
    second = second.reshape(blocks, second.shape[1], -1)
    count = blocks * first.shape[1]
    if count // blocks % blocks:
        goes_to = [(i % blocks) * (count // blocks) + i // blocks for i in range(count)]
    else:
        runs = count // blocks**2
        goes_to = [
            f * (count // blocks) + r * blocks + p for p in range(blocks) for f in range(blocks) for r in range(runs)
        ]
    shuffle = np.zeros((count, count))
    shuffle[goes_to, np.arange(count)] = 1
    return scipy.linalg.block_diag(*second) @ shuffle @ scipy.linalg.block_diag(*first)


def dense_blast(v, s, u):
    blocks = range(v.shape[0])
    return np.block([[u[i] @ np.diag(s[:, i, j]) @ v[j] for j in blocks] for i in blocks])


def dense_butterfly(*factors):
    d = 2 ** len(factors)
    matrix = np.eye(d)
    for k, factor in enumerate(factors):
        stage = np.zeros((d, d))
        for group in range(d >> (k + 1)):
            for place in range(1 << k):
                at = [group << (k + 1) | side << k | place for side in (0, 1)]
                stage[np.ix_(at, at)] = factor[group, place]
        matrix = stage @ matrix
    return matrix


def dense_einsum(w0, w1):
    full = np.einsum("fergb,gfdra->fedgba", w1, w0)
    return full.reshape(math.prod(full.shape[:3]), -1)


DEFINITIONS = {
    "dense": lambda w: w,
    "low_rank": lambda v, u: u @ v,
    "block_diagonal": lambda blocks: scipy.linalg.block_diag(*blocks),
    "kronecker": lambda *factors: reduce(np.kron, factors),
    "tensor_train": dense_tensor_train,
    "block_tensor_train": dense_block_tensor_train,
    "monarch": dense_monarch,
    "blast": dense_blast,
    "butterfly": dense_butterfly,
    "einsum": dense_einsum,
    "circulant": scipy.linalg.circulant,
    "permutation": lambda index: np.eye(len(index))[index],
    "diagonal": np.diag,
}


@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES, ids=label)
def test_definition(name, shape, options):
    op = structure_class(name).random(shape, seed=3, **options)
    if name == "toeplitz":
        kernel = op.factors[0]
        wanted = scipy.linalg.toeplitz(kernel[shape[1] - 1 :], kernel[: shape[1]][::-1])
    elif name == "hankel":
        wanted = scipy.linalg.hankel(op.factors[0][: shape[0]], op.factors[0][shape[0] - 1 :])
    else:
        wanted = DEFINITIONS[name](*op.factors)[: shape[0], : shape[1]]
    scale = np.linalg.norm(wanted)
    assert np.abs(op.to_dense() - wanted).max() < 1e-14 * scale
    assert np.abs(dense_matrix(op.structure, op.factors) - wanted).max() < 1e-14 * scale


TRANSFORMS = {
    structlin.Cosine: lambda n: scipy.fft.dct(np.eye(n), axis=0, norm="ortho"),
    structlin.Hadamard: lambda n: scipy.linalg.hadamard(n) / np.sqrt(n),
    structlin.Fourier: lambda n: scipy.linalg.dft(n, scale="sqrtn"),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("cls", TRANSFORMS, ids=lambda cls: cls.__name__)
def test_transforms(cls, backend):
    n = 8
    kinds = () if cls is structlin.Fourier else ("complex128", "float32")  # its conjugate is another structure
    for dtype in kinds:
        check_structure(cls, backend=backend, dtype=dtype, transform=jax.jit if backend == "jax" else None, quick=True)
    wanted = TRANSFORMS[cls](n)
    A = cls(n, backend=backend, dtype="complex128" if cls is structlin.Fourier else "float64")
    x = to_backend(np.random.default_rng(0).standard_normal((n, 3)), backend)
    dense = A.structure.dense([np.zeros(1, dtype=int)])
    np.testing.assert_allclose(dense, wanted, atol=1e-13)
    np.testing.assert_allclose(to_numpy(A @ x), wanted @ to_numpy(x), atol=1e-13)
    np.testing.assert_allclose(to_numpy(structlin.solve(A, A @ x)), to_numpy(x), atol=1e-12)
    np.testing.assert_allclose(to_numpy(cola.inv(A) @ (A @ x)), to_numpy(x), atol=1e-12)
    np.testing.assert_allclose(to_numpy(A.H.to_dense()), wanted.conj().T, atol=1e-13)
    np.testing.assert_allclose(to_numpy(structlin.svd(A).S), np.ones(n))
    np.testing.assert_allclose(float(structlin.frobenius_norm(A)), np.sqrt(n))
    got, want = cola.linalg.slogdet(A), np.linalg.slogdet(wanted)
    np.testing.assert_allclose(complex(got[0]), want[0], atol=1e-12)
    np.testing.assert_allclose(float(got[1]), want[1], atol=1e-12)


def test_hankel_has_the_algebra_of_toeplitz():
    n = 300
    kernel = np.random.default_rng(0).standard_normal(2 * n - 1) / 30
    kernel[n - 1] += 3
    A = structlin.Hankel(kernel[:n], kernel[n - 1 :])
    dense, b = scipy.linalg.hankel(kernel[:n], kernel[n - 1 :]), np.ones(n)
    np.testing.assert_allclose(A.structure.dense(A.factors), dense)
    np.testing.assert_allclose(structlin.solve(A, b), np.linalg.solve(dense, b), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(cola.inv(A) @ b, np.linalg.solve(dense, b), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(cola.linalg.slogdet(A), np.linalg.slogdet(dense), rtol=1e-10)
    np.testing.assert_allclose(cola.diag(A, 3), np.diag(dense, 3))
    np.testing.assert_allclose(structlin.frobenius_norm(A + A), 2 * np.linalg.norm(dense))
    with pytest.raises(ValueError, match="first column and a last row"):
        structlin.Hankel(np.ones((2, 2)), np.ones(2))
    with pytest.raises(ValueError, match=r"2\^k rows, got 6; the nearest sizes are 4 and 8"):
        structlin.Hadamard(6)


def test_toeplitz_from_column_and_row_and_from_its_diagonals():
    column, row = np.array([1.0, 4.0, 7.0]), np.array([9.0, 2.0, 3.0])
    wanted = scipy.linalg.toeplitz(column, row)
    np.testing.assert_allclose(structlin.Toeplitz(column).to_dense(), scipy.linalg.toeplitz(column), atol=1e-14)
    np.testing.assert_allclose(
        structlin.Toeplitz(column + 1j).to_dense(), scipy.linalg.toeplitz(column + 1j), atol=1e-14
    )
    np.testing.assert_allclose(structlin.Toeplitz(column, row).to_dense(), wanted, atol=1e-14)
    kernel = np.array([3.0, 2.0, 1.0, 4.0, 7.0])
    np.testing.assert_allclose(structlin.Toeplitz.from_kernel(kernel, 3).to_dense(), wanted, atol=1e-14)


def test_structures_that_are_no_chain_from_their_arrays():
    rng = np.random.default_rng(0)
    for name, array in (
        ("circulant", rng.standard_normal(5)),
        ("diagonal", rng.standard_normal(5)),
        ("permutation", rng.permutation(5)),
    ):
        op = structure_class(name)(array)
        assert op.structure == design(name, (5, 5))
        np.testing.assert_allclose(op.to_dense(), DEFINITIONS[name](array), atol=1e-14)


def test_special_cases_coincide():
    rng = np.random.default_rng(0)

    def same(a, b, factors):
        assert a.num_params == b.num_params
        assert a.macs == b.macs
        np.testing.assert_allclose(dense_matrix(a, factors), dense_matrix(b, factors), atol=1e-12)

    monarch, btt = design("monarch", (25, 25), blocks=5), design("block_tensor_train", (25, 25))
    same(monarch, btt, [rng.standard_normal(f.shape) for f in btt.factors])
    kron = design("kronecker", (35, 6), factorization=((5, 7), (2, 3)))
    train = design("tensor_train", (35, 6), factorization=((5, 7), (2, 3)), rank=1)
    factors = [rng.standard_normal(f.shape) for f in kron.factors]
    np.testing.assert_allclose(
        dense_matrix(kron, factors),
        dense_matrix(train, [f.reshape(s.shape) for f, s in zip(factors, train.factors, strict=True)]),
        atol=1e-12,
    )
    butterfly, btt = design("butterfly", (8, 8)), design("block_tensor_train", (8, 8), cores=3)
    assert (butterfly.macs, butterfly.num_params) == (btt.macs, btt.num_params)
    one_core = design("block_tensor_train", (5, 7), cores=1)
    same(one_core, design("dense", (5, 7)), [rng.standard_normal((5, 7))])


def test_block_tensor_train_of_rank_sqrt_d_represents_every_matrix():
    """For each (m_1, n_0) the (n_1, m_0) block is an arbitrary matrix of rank r = min(n_1, m_0)."""
    target = np.random.default_rng(0).standard_normal((12, 12))
    blocks = target.reshape(3, 4, 4, 3).transpose(2, 0, 1, 3)  # (m_1, n_0, n_1, m_0)
    u, s, vt = np.linalg.svd(blocks, full_matrices=False)
    w0 = vt
    w1 = (u * s[..., None, :]).transpose(1, 2, 3, 0)
    np.testing.assert_allclose(structlin.BlockTensorTrain(w0, w1).to_dense(), target, atol=1e-12)


# -- formulas ------------------------------------------------------------------------------------------------------


def counts(name, shape, options):
    """(parameters, MACs) by the formulas in the docstrings."""
    d_out, d_in = shape
    s = design(name, shape, **options)
    match name:
        case "dense":
            return d_in * d_out, d_in * d_out
        case "low_rank":
            r = s.factors[0].shape[0]
            return r * (d_in + d_out), r * (d_in + d_out)
        case "block_diagonal":
            both = d_in * d_out // s.factors[0].blocks
            return both, both
        case "kronecker":
            sizes = [f.shape for f in s.factors]
            macs = sum(
                math.prod(n for n, _ in sizes[:k]) * n * m * math.prod(m for _, m in sizes[k + 1 :])
                for k, (n, m) in enumerate(sizes)
            )
            return sum(n * m for n, m in sizes), macs
        case "tensor_train":
            sizes = [f.shape for f in s.factors]
            macs = sum(
                math.prod(core) * math.prod(c[1] for c in sizes[:k]) * math.prod(c[2] for c in sizes[k + 1 :])
                for k, core in enumerate(sizes)
            )
            return sum(map(math.prod, sizes)), macs
        case "block_tensor_train":
            total = sum(math.prod(f.shape) for f in s.factors)
            if len(s.factors) == 2:
                m1, n0, r, m0 = s.factors[0].shape
                n1 = s.factors[1].shape[1]
                assert total == r * m1 * n0 * (m0 + n1)
            return total, total
        case "monarch":
            b = options.get("blocks", 4)
            p, q = -(-d_in // b), -(-d_out // b)
            both = b * min(p, q) * (p + q)
            return both, both
        case "blast":
            b, r, _ = s.factors[0].shape
            return (r * (d_in + d_out + b * b),) * 2
        case "butterfly":
            return (2 * d_in * int(math.log2(d_in)),) * 2
        case "einsum":
            a, b, g, d, e, f, r = (dict(s.sizes)[x] for x in "abgdefr")
            first, second = g * f * d * r * a, f * e * r * g * b
            return first + second, first * b + second * d
        case "toeplitz" | "hankel":
            return d_in + d_out - 1, 0
        case "circulant" | "diagonal":
            return d_in, 0
        case "permutation":
            return 0, 0


@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES, ids=label)
def test_counts_by_the_published_formulas(name, shape, options):
    s = design(name, shape, **options)
    assert (s.num_params, s.macs) == counts(name, shape, options)


def test_work_that_is_no_product():
    assert design("diagonal", (7, 7)).other_flops == {"elementwise": 7}
    assert design("permutation", (7, 7)).flops == 0
    toeplitz = design("toeplitz", (5, 7))
    assert toeplitz.fft_size == 11
    transform = math.ceil(2.5 * 11 * math.log2(11))
    assert toeplitz.other_flops == {"fft": 2 * transform, "elementwise": 6 * 6}
    assert toeplitz.setup_flops == {"fft": transform}
    assert design("circulant", (1, 1)).flops == 6


def test_rank_bounds():
    for name, shape, options, bound in (
        ("low_rank", (7, 11), {"rank": 3}, 3),
        ("low_rank", (7, 11), {"rank": 30}, 7),
        ("block_tensor_train", (49, 64), {"rank": 1, "factorization": ((7, 7), (8, 8))}, 49),
        ("block_tensor_train", (35, 36), {"rank": 1, "factorization": ((7, 5), (18, 2))}, 14),
        ("monarch", (12, 12), {"blocks": 2}, 12),
        ("blast", (15, 6), {"blocks": 3, "rank": 1}, 3),
        ("block_diagonal", (15, 6), {"blocks": 3}, 6),
        ("kronecker", (35, 6), {}, 6),
    ):
        structure = design(name, shape, **options)
        assert structure.rank_bound == bound
        op = structure_class(name).random(shape, **options, seed=0)
        assert np.linalg.matrix_rank(op.to_dense()) == bound


def test_without_a_seed_each_matrix_is_another_one():
    first, second = (structlin.Dense.random((3, 4)).to_dense() for _ in range(2))
    assert not np.array_equal(first, second)
    first, second = (structlin.random_factors(structure_class("dense").design((3, 4)))[0] for _ in range(2))
    assert not np.array_equal(first, second)
    first, second = (structlin.Dense.random((3, 4), seed=7).to_dense() for _ in range(2))
    np.testing.assert_array_equal(first, second)


# -- the continuous einsum space -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
    st.lists(st.integers(0, 5), min_size=2, max_size=2),
    st.integers(0, 5),
)
def test_einsum_coordinates_are_the_exponents_of_counts_and_rank(ins, outs, rho):
    """Sizes 2^k: with K = log2(d), MACs are the sum of two powers of 2, the larger of them 2^(K (1 + nu))."""
    total = 5
    ins = (min(ins), max(ins) - min(ins), total - max(ins))
    outs = (min(outs), max(outs) - min(outs), total - max(outs))
    theta = tuple(k / total for k in (*ins, *outs, rho))
    d = 2**total
    s = design("einsum", (d, d), theta=theta)
    assert structlin.theta_of(s) == pytest.approx(theta)
    omega, psi, nu = structlin.coordinates(theta)

    def exponent(terms):
        return math.log2(max(terms)) / total

    macs, params = [f.numel * f.carried for f in s.factors], [f.numel for f in s.factors]
    assert exponent(macs) == pytest.approx(1 + nu)
    assert exponent(macs) - exponent(params) == pytest.approx(omega)
    op = structlin.EinsumSpace.random((d, d), theta=theta, seed=0)
    assert math.log2(np.linalg.matrix_rank(op.to_dense())) / total == pytest.approx(psi)


def test_corners_of_the_einsum_space():
    for theta, coordinates in {
        (1, 0, 0, 0, 1, 0, 0): (0, 0, 0),  # low rank, rank 1
        (1, 0, 0, 0, 1, 0, 0.5): (0, 0.5, 0.5),
        (1, 0, 0, 0, 1, 0, 1): (0, 1, 1),  # dense
        (0.5, 0.5, 0, 0.5, 0.5, 0, 0): (0.5, 1, 0.5),  # Kronecker
        (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25): (0.5, 1, 0.75),  # Tensor-Train
        (0.5, 0, 0.5, 0, 0.5, 0.5, 0): (0, 1, 0.5),  # Block Tensor-Train, Monarch
    }.items():
        assert structlin.coordinates(theta) == pytest.approx(coordinates)


@pytest.mark.parametrize(
    ("theta", "name", "options"),
    [
        ((1, 0, 0, 0, 1, 0, 0.5), "low_rank", {"rank": 8}),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), "kronecker", {}),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 0.5), "tensor_train", {"rank": 8}),
        ((0.5, 0, 0.5, 0, 0.5, 0.5, 0.5), "block_tensor_train", {"rank": 8}),
    ],
)
def test_the_einsum_space_contains_the_two_factor_structures(theta, name, options):
    einsum, named = design("einsum", (64, 64), theta=theta), design(name, (64, 64), **options)
    for count in ("num_params", "macs", "rank_bound"):
        assert getattr(einsum, count) == getattr(named, count)
    assert [(f.fan_in, f.fan_out) for f in einsum.factors] == [(f.fan_in, f.fan_out) for f in named.factors]


# -- what is refused -----------------------------------------------------------------------------------------------

ONE = np.ones
BAD_DESIGNS = [
    ("low_rank", (4, 4), {"rank": 2, "rank_fraction": 0.5}, "rank or rank_fraction, not both"),
    ("low_rank", (4, 4), {"rank": 0}, "rank must be a positive integer, got 0"),
    ("low_rank", (4, 4), {"rank": 1.5}, "rank must be a positive integer, got 1.5"),
    ("low_rank", (4, 4), {"rank": True}, "rank must be a positive integer, got True"),
    ("low_rank", (4, 4), {"rank_fraction": 0.0}, r"rank_fraction must lie in \(0, 1\], got 0.0"),
    ("low_rank", (4, 4), {"rank_fraction": 1.1}, r"rank_fraction must lie in \(0, 1\], got 1.1"),
    ("low_rank", (4, 4), {"depth": 1}, "'low_rank' has no option 'depth'; its options are rank, rank_fraction"),
    ("dense", (4, 4), {"rank": 1}, "'dense' has no option 'rank'; it has none"),
    ("dense", (4, 0), {}, r"two positive integers, got \(4, 0\)"),
    ("dense", (4,), {}, r"two positive integers, got \(4,\)"),
    ("dense", (4, 2.0), {}, r"two positive integers, got \(4, 2.0\)"),
    ("block_diagonal", (6, 8), {"blocks": 3}, "d_in = 8 cannot be split into 3 blocks; the nearest .* 6 and 9"),
    ("block_diagonal", (2, 8), {"blocks": 4}, "d_out = 2 cannot be split into 4 blocks; the nearest .* are 4"),
    ("block_diagonal", (8, 8), {"blocks": 0}, "blocks must be a positive integer, got 0"),
    ("blast", (7, 8), {"blocks": 4}, "d_out = 7 .* 4 and 8"),
    ("monarch", (7, 8), {"blocks": -1}, "blocks must be a positive integer, got -1"),
    ("kronecker", (7, 8), {}, "7 cannot be split into 2 factors .* 6 and 8"),
    ("kronecker", (8, 8), {"cores": 0}, "cores must be a positive integer, got 0"),
    ("kronecker", (6, 8), {"factorization": ((2, 3), (2, 3))}, r"product 8 are needed, got \(2, 3\) with product 6"),
    ("kronecker", (6, 8), {"factorization": ((2, 3),)}, r"a pair \(output sizes, input sizes\)"),
    ("kronecker", (6, 8), {"factorization": (2, 3)}, r"a pair \(output sizes, input sizes\), got \(2, 3\)"),
    ("kronecker", (6, 8), {"factorization": "best"}, "unknown factorization 'best'; one of balanced, greedy"),
    ("tensor_train", (6, 8), {"rank": (2, 3)}, r"1 of them for 2 cores, got \(2, 3\)"),
    ("tensor_train", (6, 8), {"rank": "2"}, "1 of them for 2 cores, got '2'|rank must be a positive integer"),
    ("tensor_train", (6, 8), {"rank": True}, "for 2 cores, got True"),
    ("block_tensor_train", (6, 8), {"rank": 0}, "rank must be a positive integer, got 0"),
    ("butterfly", (8, 4), {}, r"square, got shape \(8, 4\); use \(4, 4\)"),
    ("butterfly", (12, 12), {}, "a power of two, got 12; the nearest sizes are 8 and 16"),
    ("butterfly", (1, 1), {}, "a power of two, got 1; the nearest sizes are 2"),
    ("einsum", (8, 8), {"theta": (0.5,) * 6}, "seven entries .*, got 6"),
    ("einsum", (8, 8), {"theta": (0.5, 0.5, 0.5, 0, 0.5, 0.5, 0)}, r"alpha \+ beta \+ gamma must be 1, got 1.5"),
    ("einsum", (8, 8), {"theta": (0.5, 0, 0.5, 0, 0.5, 0.4, 0)}, r"delta \+ epsilon \+ phi must be 1, got 0.9"),
    ("einsum", (8, 8), {"theta": (-0.5, 1, 0.5, 0, 0.5, 0.5, 0)}, r"every entry of theta must lie in \[0, 1\]"),
    ("einsum", (13, 8), {}, "13 has no factors near .*choose a size with more divisors"),
    ("circulant", (4, 3), {}, r"square, got shape \(4, 3\)"),
    ("permutation", (4, 3), {}, r"square, got shape \(4, 3\)"),
    ("diagonal", (4, 3), {}, r"square, got shape \(4, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "options", "message"), BAD_DESIGNS, ids=label)
def test_sizes_that_do_not_fit_are_refused(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        design(name, shape, **options)
    with pytest.raises(ValueError, match=message):
        structure_class(name).random(shape, **options, seed=0)


BAD_ARRAYS = [
    ("dense", (ONE((2, 3)), ONE((3, 2))), "Dense takes 1 factors, one for each step of 'i,oi->o', got 2"),
    ("dense", (ONE(3),), r"Dense: factor 0 must have 2 axes 'oi' \('i,oi->o'\), got shape \(3,\)"),
    ("low_rank", (ONE((2, 3)), ONE((4, 3))), r"axis 'r' .* has size 2 in an earlier factor and 3 in factor 1"),
    ("kronecker", (), "one matrix or more, got arrays of shape none"),
    ("kronecker", (ONE((2, 3)), ONE(2)), r"one matrix or more, got arrays of shape \(2, 3\), \(2,\)"),
    ("tensor_train", (ONE((1, 2, 2, 3)), ONE((2, 2, 2, 1))), r"matching ranks and r_0 = r_c = 1, got \(1, 2, 2, 3\)"),
    ("tensor_train", (ONE((2, 2, 2, 1)),), "r_0 = r_c = 1"),
    ("tensor_train", (), "got none"),
    ("block_tensor_train", (ONE((2, 2)), ONE((2, 2, 2))), r"2 cores of a Block Tensor-Train must have \[4, 4\] axes"),
    ("block_tensor_train", (), "0 cores .* got shapes none"),
    ("block_tensor_train", (ONE((3, 5, 2, 4)), ONE((5, 7, 2, 4))), "contradict one another"),
    ("monarch", (ONE((2, 3, 4, 5)), ONE((3, 7, 4, 2))), "equal numbers of blocks"),
    ("butterfly", (), "got shapes none"),
    ("butterfly", (ONE((2, 1, 2, 2)), ONE((2, 1, 2, 2))), r"2 factors must have shapes \(\(2, 1, 2, 2\), "),
    ("toeplitz", (ONE((2, 2)), ONE(2)), r"first column \(d_out,\) and a first row \(d_in,\) .*, got shapes \(2, 2\)"),
    ("toeplitz", (ONE(0), ONE(2)), r"got shapes \(0,\) and \(2,\)"),
    ("circulant", (ONE((2, 2)),), r"Circulant takes its first column, got arrays of shape \(2, 2\)"),
    ("circulant", (), "got arrays of shape none"),
    ("diagonal", (ONE(2), ONE(2)), r"Diagonal takes one vector, got arrays of shape \(2,\), \(2,\)"),
    ("permutation", (np.array([0, 0, 1]),), r"0, ..., d-1 once, got array\(\[0, 0, 1\]\)"),
    ("permutation", (np.array([0.0, 1.0]),), "each of the integers"),
    ("permutation", (np.array([[0, 1]]),), "each of the integers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arrays", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(name, arrays, message):
    with pytest.raises(ValueError, match=message):
        structure_class(name)(*arrays)
