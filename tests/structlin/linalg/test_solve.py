"""Solving without an inverse, and the memory of CoLA's dispatch."""

import warnings

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.operators import random
from helpers.refusals import refused
from plum import dispatch
from torch.utils.flop_counter import FlopCounterMode

import structlin
from structlin import _lapack, linalg
from structlin._arrays import to_backend
from structlin._cola_compat import _dispatch
from structlin.linalg import _common, _woodbury
from structlin.testing import to_numpy


def positive(blocks):
    return blocks @ blocks.swapaxes(-1, -2) + np.eye(blocks.shape[-1])


@pytest.mark.covering(1)
@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_direct_solves(backend, dtype, annotated, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 4)) + (1j * rng.standard_normal((3, 4, 4)) if "complex" in dtype else 0)
    blocks = x @ x.conj().swapaxes(-1, -2) + np.eye(4) if annotated else x
    make = to_backend
    low = random("low_rank", (12, 12), rank=2, backend=backend, dtype=dtype)
    diagonal = structlin.Diagonal(make(1 + rng.random(12), backend, dtype))
    cases = [
        structlin.BlockDiagonal(make(blocks, backend, dtype)),
        structlin.Dense(make(positive(rng.standard_normal((12, 12))), backend, dtype)),
        (low @ low.H if annotated else low) + diagonal,
    ]
    b = make(rng.standard_normal((12, 2)), backend, dtype)
    for A in cases:
        a, wanted = to_numpy(A.to_dense()), to_numpy(b)
        op = cola.PSD(A) if annotated else A
        with monkeypatch.context() as patch:
            patch.setattr(cola, "inv", None)  # no inverse is built
            found, one = linalg.solve(op, b), linalg.solve(op, b[:, 0])
        np.testing.assert_allclose(to_numpy(found), np.linalg.solve(a, wanted), rtol=1e-9)
        np.testing.assert_allclose(to_numpy(one), np.linalg.solve(a, wanted[:, 0]), rtol=1e-9)
        np.testing.assert_allclose(to_numpy(cola.inv(op) @ b), to_numpy(found), rtol=1e-9)
        if annotated:
            sign, log = cola.linalg.slogdet(op)
            np.testing.assert_allclose(np.array([complex(sign), complex(log)]), np.linalg.slogdet(a), rtol=1e-9)


CHAINS = {
    "kronecker": ((30, 30), {"cores": 3}),
    "monarch": ((16, 16), {"blocks": 2}),
    "monarch regrouped": ((15, 15), {"blocks": 3}),
    "block_tensor_train": ((24, 24), {"cores": 3}),
    "butterfly": ((8, 8), {}),
    "circulant": ((7, 7), {}),
    "circulant even": ((6, 6), {}),
}


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CHAINS)
def test_chains_are_undone_step_by_step(case, backend, monkeypatch):
    shape, options = CHAINS[case]
    rng = np.random.default_rng(0)
    for dtype in ("float64", "complex128"):
        A = random(case.split()[0], shape, backend=backend, dtype=dtype, **options)
        for op in (A, A.T, A.H):
            a = to_numpy(op.to_dense())
            for columns in ((), (1,), (40,), (0,)):  # few of them are substituted, many multiplied
                b = rng.standard_normal((shape[0], *columns)).astype(dtype)
                with monkeypatch.context() as patch:
                    if 0 not in columns:
                        patch.setattr(cola, "inv", None)  # no inverse is built
                    found = to_numpy(linalg.solve(op, to_backend(b, backend, dtype)))
                np.testing.assert_allclose(found, np.linalg.solve(a, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["kronecker", "monarch", "circulant"])
def test_chains_with_a_singular_step(name):
    A = random(name, (16, 16))
    factor = np.zeros_like(A.factors[0]) if name == "kronecker" else np.ones_like(A.factors[0])
    A = structlin.StructuredOperator(A.structure, (factor, *A.factors[1:]))
    for columns in ((), (40,)):
        with pytest.raises(np.linalg.LinAlgError, match="singular to working precision"):
            linalg.solve(A, np.random.default_rng(0).standard_normal((16, *columns)))


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_determinants_of_positive_kronecker_products(backend):
    rng = np.random.default_rng(0)
    turn = np.array([[0.0, 2.0], [-2.0, 0.0]])
    pairs = [
        (positive(rng.standard_normal((3, 3))), positive(rng.standard_normal((4, 4)))),
        (-positive(rng.standard_normal((3, 3))), -positive(rng.standard_normal((2, 2)))),
        (turn, turn),  # symmetric, though its members are not; not positive
    ]
    for pair in pairs:
        A = cola.PSD(structlin.Kronecker(*(to_backend(x, backend) for x in pair)))
        sign, log = cola.linalg.slogdet(A)
        np.testing.assert_allclose([float(sign), float(log)], np.linalg.slogdet(np.kron(*pair)), rtol=1e-12)


def test_what_is_refused():
    A = random("block_diagonal", (6, 6), blocks=2)
    refused(ValueError, "square", linalg.solve, random("block_diagonal", (6, 4), blocks=2), np.ones(6))
    refused(ValueError, r"\(6,\), \(6, k\) or \(batch, 6, k\), got \(5,\)", linalg.solve, A, np.ones(5))
    with pytest.raises(np.linalg.LinAlgError, match="singular"):
        linalg.solve(structlin.BlockDiagonal(np.ones((2, 3, 3)) + 1e-17 * np.eye(3)), np.arange(6.0))
    refused(TypeError, "numpy operator", linalg.solve, A, torch.ones(6))


def test_a_singular_block_is_nan_under_jit():
    blocks = jnp.stack([jnp.full((2, 2), 0.1), jnp.eye(2)])
    found = jax.jit(lambda b: linalg.solve(structlin.BlockDiagonal(b), jnp.array([1.0, 2.0, 3.0, 4.0])))(blocks)
    assert not np.isfinite(found[:2]).any()
    np.testing.assert_allclose(found[2:], [3, 4])


@pytest.mark.covering(2)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("kind", ["dense", "blocks"])
@pytest.mark.parametrize("name", ["solve", "inv", "slogdet", "log", "sqrt", "apply"])
def test_a_matrix_that_is_not_positive_after_all(name, kind, backend):
    """Every library says the same, whatever is asked."""
    a = to_backend(np.array([[[1.0, 2.0], [2.0, 1.0]]]), backend)
    A = cola.PSD(structlin.Dense(a[0]) if kind == "dense" else structlin.BlockDiagonal(a))
    b = a[0, 0]
    functions = {
        "solve": lambda: linalg.solve(A, b),
        "inv": lambda: cola.inv(A) @ b,
        "slogdet": lambda: cola.linalg.slogdet(A),
        "log": lambda: cola.linalg.log(A),
        "sqrt": lambda: cola.linalg.sqrt(A),
        "apply": lambda: linalg.apply(lambda x: x + 1, A),
    }
    with pytest.raises(np.linalg.LinAlgError, match="annotated PSD"):
        functions[name]()


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_structures_that_are_not_positive_after_all(backend):
    def made(x):
        return to_backend(np.array(x, float), backend)

    K = structlin.Kronecker(made([[2, 1], [1, 2]]), made(np.eye(3)))
    shifted = (
        structlin.Diagonal(made([1, -1, 2])),
        structlin.Circulant(made([1, 2, 2])),
        structlin.Circulant(made([1, 2, 0, 2])),
        K - 2 * cola.ops.I_like(K),
        cola.kronsum(structlin.Dense(made([[1, 2], [2, 1]])), structlin.Dense(made(np.eye(2) / 2))),
    )
    determinants = (lambda A, b: linalg.slogdet(A), lambda A, b: cola.logdet(A))
    for A in map(cola.PSD, shifted):
        b = made(np.ones(A.shape[0]))
        for function in (linalg.solve, lambda A, b: cola.inv(A) @ b, *determinants):
            with pytest.raises(np.linalg.LinAlgError, match="annotated PSD"):
                function(A, b)
    for members in (
        (np.diag([1, -1]), np.eye(3)), (np.diag([1, -1]), np.eye(2)), ([[1, 2], [2, 1]], np.eye(2)),
        (-np.eye(3), np.eye(3)), (-np.eye(2), -np.eye(2), -np.eye(2)),
    ):  # fmt: skip
        with pytest.raises(np.linalg.LinAlgError, match="annotated PSD"):
            linalg.slogdet(cola.PSD(structlin.Kronecker(*map(made, members))))
    toeplitz = cola.PSD(structlin.Toeplitz(made(np.r_[1, 3, np.zeros(298)])))
    with pytest.raises(np.linalg.LinAlgError, match="annotated PSD"):
        linalg.slogdet(toeplitz)


def test_traced_eigenvalues_below_zero_are_nan():
    for kind, d in ((structlin.Diagonal, [1.0, -1, 2]), (structlin.Circulant, [1.0, 2, 2])):
        found = jax.jit(lambda d, kind=kind: linalg.solve(cola.PSD(kind(d)), jnp.ones(3)))(jnp.asarray(d))
        assert np.isnan(found).any()


def test_other_dtypes_take_the_long_way():
    A = random("block_diagonal", (6, 6), blocks=2)
    b = np.arange(6.0) + 1j
    np.testing.assert_allclose(linalg.solve(A, b), np.linalg.solve(A.to_dense(), b))


# -- dispatch --------------------------------------------------------------------------------------------------------


def test_dispatch_remembers_only_what_types_decide():
    """Conditions on values must be looked at every time."""
    inv = dispatch.functions["inv"]
    K = random("kronecker", (6, 6))
    cola.inv(K)
    key = (type(K), cola.linalg.Auto)
    assert key in inv._cache
    signature = _dispatch._decided(inv, key)
    assert signature.implementation.__module__.startswith("structlin.linalg")
    transpose = dispatch.functions["transpose"]
    D = cola.ops.Householder(np.ones((3, 1)) / np.sqrt(3))
    assert type(D.T).__name__.startswith("Transpose")
    assert (type(D),) not in transpose._cache
    assert cola.SelfAdjoint(D).T is not None
    S = cola.SelfAdjoint(D)
    assert S.T is S  # the condition holds for this value of the same type
    assert type(D.T).__name__.startswith("Transpose")


def test_a_new_rule_is_seen_at_once():
    class Special(structlin.Dense):
        pass

    A = Special(np.eye(2))
    assert cola.trace(A) == 2

    @dispatch(precedence=2)
    def trace(A: Special, alg: cola.linalg.algorithm_base.Algorithm):
        return "special"

    assert cola.trace(A) == "special"
    assert cola.trace(structlin.Dense(np.eye(2))) == 2


def gaussian(kind, a, c):
    """A positive operator made of torch or NumPy arrays: a (m, m) matrix and a number."""
    if kind == "shifted":
        K = cola.PSD(structlin.Kronecker(a, a))
        return cola.PSD(K + c * cola.ops.I_like(K))
    return cola.PSD(structlin.BlockDiagonal(a[None]) * c)


@pytest.mark.parametrize("kind", ["shifted", "blocks"])
def test_quadratic_form_and_determinant_with_gradients(kind):
    a = np.eye(4) + 0.3 * np.diag(np.ones(3), 1) + 0.3 * np.diag(np.ones(3), -1)
    for matrix in (a, np.eye(4)):  # the identity has repeated eigenvalues
        A = gaussian(kind, matrix, 0.5)
        dense, b = A.to_dense(), np.random.default_rng(0).standard_normal(A.shape[0])
        answer = linalg.inv_quad_logdet(A, b, full_output=True)
        assert answer.verdict is structlin.linalg.Verdict.VERIFIED
        np.testing.assert_allclose(answer.value, (b @ np.linalg.solve(dense, b), np.linalg.slogdet(dense)[1]))

        def likelihood(x, c, b):
            return sum(linalg.inv_quad_logdet(gaussian(kind, (x + x.T) / 2, c), b))

        def by_torch(x, c, b):
            dense = gaussian(kind, (x + x.T) / 2, c).to_dense()
            return b @ torch.linalg.solve(dense, b) + torch.linalg.slogdet(dense)[1]

        leaves = [torch.tensor(y, dtype=torch.float64, requires_grad=True) for y in (matrix, 0.5, b)]
        found = torch.autograd.grad(likelihood(*leaves), leaves)
        wanted = torch.autograd.grad(by_torch(*leaves), leaves)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(likelihood(*leaves), leaves, create_graph=True)


def test_quadratic_form_of_a_matrix_that_is_not_annotated():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)

    def terms(a, b):
        return linalg.inv_quad_logdet(structlin.Dense(a), b)

    torch.testing.assert_close(terms(a, b)[0], b @ torch.linalg.solve(a, b))
    assert torch.autograd.gradcheck(terms, (a, b))
    assert torch.autograd.gradgradcheck(terms, (a, b))


def test_quadratic_form_of_other_libraries_and_mistakes():
    a = np.diag([1.0, 2.0])
    wanted = linalg.inv_quad_logdet(gaussian("shifted", a, 1.0), np.ones(4))
    traced = jax.jit(lambda x: linalg.inv_quad_logdet(gaussian("shifted", x, 1.0), jnp.ones(4)))
    np.testing.assert_allclose(traced(jnp.asarray(a)), wanted, rtol=1e-6)
    tensor = torch.tensor(a)
    made = torch.func.grad(lambda x: sum(linalg.inv_quad_logdet(gaussian("shifted", x, 1.0), torch.ones(4).double())))
    assert torch.isfinite(made(tensor)).all()
    with pytest.raises(ValueError, match=r"needs a vector \(4,\), got \(4, 1\)"):
        linalg.inv_quad_logdet(gaussian("shifted", a, 1.0), np.ones((4, 1)))
    with pytest.raises(ValueError, match="needs a square operator"):
        linalg.inv_quad_logdet(structlin.Dense(np.ones((2, 3))), np.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_through_cholesky_of_positive_blocks(dtype):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, dtype=dtype, generator=generator, requires_grad=True)
    b = torch.randn(6, 2, dtype=dtype, generator=generator, requires_grad=True)

    def positive(root):
        return cola.PSD(structlin.BlockDiagonal(root @ root.mH + 3 * torch.eye(3, dtype=dtype)))

    for f, inputs in (
        (lambda r, b: structlin.solve(positive(r), b), (root, b)),
        (lambda r: cola.logdet(positive(r)), (root,)),
    ):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


def test_mistakes_are_named():
    A = structlin.Diagonal(np.ones(2))
    assert cola.linalg.solve is cola.solve is linalg.solve
    refused(TypeError, "b must be an array", linalg.solve, A, [1, 2])
    refused(TypeError, r"wrap an array in cola\.ops\.Dense", linalg.solve, np.eye(2), np.ones(2))
    refused(ValueError, "positive integer", linalg.dense_limit, 0)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("numpy", "int64"), ("numpy", "float16"), ("numpy", "float32"), ("torch", "int64"), ("torch", "float16"),
     ("torch", "bfloat16"), ("torch", "bool"), ("jax", "bfloat16"), ("jax", "int32")],
)  # fmt: skip
def test_a_permutation_keeps_the_values_and_the_dtype(backend, dtype):
    """It has no dtype of its own. float64 does not have 2^53 + 1, nor float32 2^24 + 1."""
    index = to_backend(np.array([2, 0, 1]), backend)
    values = np.array([[2**53 + 1], [5], [-7]] if dtype == "int64" else [[1], [0], [1]])
    b = to_backend(values, backend, dtype)
    A = structlin.Permutation(index)
    x = linalg.solve(A, b)
    assert x.dtype == b.dtype
    np.testing.assert_array_equal(to_numpy(A @ x), to_numpy(b))
    if dtype == "int64":
        assert sorted(to_numpy(x).ravel().tolist()) == [-7, 5, 2**53 + 1]


SMALL = {
    "dense": {}, "kronecker": {}, "monarch": {"blocks": 4}, "block_tensor_train": {"rank": 4},
    "block_diagonal": {"blocks": 4}, "circulant": {}, "toeplitz": {}, "diagonal": {},
}  # fmt: skip


@pytest.mark.covering(2)
@pytest.mark.parametrize("numpys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("name", SMALL)
def test_small_tensors_by_either_library(name, dtype, numpys, monkeypatch):
    """On NumPy's views or by torch: conjugated and negated views, parameters, and vectors."""
    monkeypatch.setattr(_lapack, "FEW", 2**12 if numpys else 0)
    generator = torch.Generator().manual_seed(0)
    A = structlin.structure_class(name).random((16, 16), seed=1, backend="torch", dtype=dtype, **SMALL[name])
    b = torch.randn(16, 3, dtype=dtype, generator=generator)
    for right in (b, b[:, 0], b.conj(), torch._neg_view(b), torch.nn.Parameter(b), b.T.contiguous().T):
        with torch.no_grad():
            x = linalg.solve(A, right)
        exact = torch.linalg.solve(
            A.to_dense().to(torch.complex128), right.detach().resolve_conj().to(torch.complex128)
        )
        scale = torch.linalg.cond(A.to_dense()).item() * torch.finfo(dtype).eps
        assert (x.dtype, x.requires_grad) == (dtype, False)
        assert (x.to(torch.complex128) - exact).norm() <= 100 * scale * exact.norm()
    sign, log = cola.linalg.slogdet(A)
    wanted = torch.linalg.slogdet(A.to_dense())
    torch.testing.assert_close((sign, log), tuple(wanted), rtol=1e-4, atol=1e-4, check_dtype=False)
    assert (_common.on_host(A, b) is not None) == numpys


@pytest.mark.parametrize("symmetric", [False, True])
def test_large_low_rank_plus_diagonal_on_torch(symmetric):
    rng = torch.Generator().manual_seed(0)
    U = torch.randn(9000, 4, generator=rng, dtype=torch.float64)
    low = structlin.LowRank(U.T if symmetric else torch.randn(4, 9000, generator=rng, dtype=U.dtype), U)
    d, b = 1 + torch.rand(9000, dtype=torch.float64), torch.randn(9000, 4, dtype=torch.float64)
    A = low + structlin.Diagonal(d)
    x = linalg.solve(A, b)
    assert (A @ x - b).norm() <= 1e-12 * b.norm()
    with FlopCounterMode(display=False) as counter:
        linalg.solve(low + structlin.Diagonal(d), b)
    assert counter.get_total_flops() < 100 * 2 * 9000 * 4 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = torch.func.vmap(lambda v: linalg.solve(A, v), in_dims=1, out_dims=1)(b)
    torch.testing.assert_close(ys, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize(("n", "shape"), [(7, ()), (512, (3,)), (1100, (2,)), (1537, ())])
def test_woodbury_in_blocks_of_rows(n, shape, dtype):
    """Sizes below, at and between the ends of blocks; the residual is as small as the method says."""
    rng = np.random.default_rng(n)

    def draw(*sizes):
        return (rng.standard_normal(sizes) + (1j * rng.standard_normal(sizes) if "complex" in dtype else 0)).astype(
            dtype
        )

    U, d, b = draw(n, 3) / np.array(n**0.5, dtype), (0.5 + rng.random(n)).astype(dtype), draw(n, *shape)
    A = cola.PSD(structlin.LowRank(U.conj().T, U) + structlin.Diagonal(d))
    x, small = _woodbury.woodbury(A).in_blocks(b)
    assert (small, x.shape, x.dtype) == (True, b.shape, b.dtype)
    dense = np.diag(d.astype(complex)) + U.astype(complex) @ U.conj().T
    assert np.linalg.norm(dense @ x - b) <= 20 * np.finfo(dtype).eps * np.linalg.norm(b)


@pytest.mark.parametrize("noise", [1e-4, 1e-8, 1e-12])
def test_woodbury_in_blocks_sees_cancellation(noise):
    U = np.random.default_rng(0).standard_normal((700, 5))
    A = cola.PSD(structlin.LowRank(U.T, U) + structlin.Diagonal(np.full(700, noise)))
    x, small = _woodbury.woodbury(A).in_blocks(np.ones(700))
    assert not small
    assert np.linalg.norm(A @ x - 1) > 100 * 2**-52 * 700**0.5


def test_errors_of_numpy_do_not_reach_users_of_torch():
    A = structlin.Dense(torch.full((3, 3), 1e30) + 1e30 * torch.eye(3))
    low = structlin.LowRank(torch.full((1, 8), 1e-30), torch.full((8, 1), 1e-30)) + structlin.Diagonal(torch.ones(8))
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (A @ torch.full((3, 1), 1e30)).isinf().all()
        assert linalg.solve(A, torch.full((3, 1), 1e-30)).isfinite().all()
        assert linalg.solve(low, torch.full((8, 1), 1e-30)).isfinite().all()
        assert linalg.solve(structlin.Dense(torch.eye(3)), torch.full((3, 1), torch.nan)).isnan().all()


def test_a_dtype_that_lapack_lacks_is_named():
    A, b = structlin.Dense(np.eye(3, dtype=np.longdouble)), np.ones((3, 1), np.longdouble)
    for op in (A, cola.PSD(A)):
        with pytest.raises(TypeError, match=r"float128|longdouble|float96"):
            linalg.solve(op, b)


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_solution_with_real_operators_is_real(backend):
    make, rng = to_backend, np.random.default_rng(0)
    a, c = rng.standard_normal((2, 2)) + 2 * np.eye(2), rng.standard_normal((3, 3)) + 2 * np.eye(3)
    K = cola.kronsum(structlin.Dense(make(a, backend)), structlin.Dense(make(c, backend)))
    dense, b = np.kron(a, np.eye(3)) + np.kron(np.eye(2), c), rng.standard_normal((6, 2))
    assert np.abs(np.linalg.eigvals(dense).imag).max() > 0.1
    for A, matrix in ((K.T, dense.T), (cola.block_diag(K, K), np.kron(np.eye(2), dense))):
        right = np.tile(b, (len(matrix) // 6, 1))
        x = to_numpy(linalg.solve(A, make(right, backend)))
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, np.linalg.solve(matrix, right), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_the_woodbury_identity_in_blocks_of_rows(dtype, monkeypatch):
    monkeypatch.setattr(_woodbury, "_ROWS", 16)
    rng = np.random.default_rng(0)
    U = rng.standard_normal((50, 3)) + (1j * rng.standard_normal((50, 3)) if "complex" in dtype else 0)
    A = structlin.LowRank(U.conj().T, U) + structlin.Diagonal((0.5 + rng.random(50)).astype(dtype))
    formula = _woodbury.woodbury(A)
    assert formula.symmetric
    for b in (rng.standard_normal((50, 4)), rng.standard_normal(50), U[:, :2]):
        wanted = np.linalg.solve(A.to_dense(), b)
        np.testing.assert_allclose(formula.formula(b), wanted, rtol=1e-10)
        np.testing.assert_allclose(linalg.solve(A, b), wanted, rtol=1e-10)
    capacitance = np.eye(3) + U.conj().T @ (U / formula.B[:, None])
    np.testing.assert_allclose(formula.capacitance, capacitance, rtol=1e-12)
