"""Expressions of our operators and CoLA's, against the same expressions of matrices, also on stacks of vectors."""

import re
import tracemalloc

import cola
import cola.ops as co
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch
from cola.annotations import PSD, Unitary
from cola.ops import Concatenated, Dense, Diagonal, I_like, Product, ScalarMul, Sliced
from helpers.arrays import BACKENDS, MAKE, TYPES, draw, on_host, same
from torch.func import grad, vmap

import structlin as sl


def operators(backend):
    """Two of ours of shape (6, 10), a square one, and dense ones of CoLA's, with their matrices."""
    make = MAKE[backend]
    A = sl.BlockTensorTrain.random((6, 10), seed=1, backend=backend, dtype="float64")
    C = sl.LowRank.random((6, 10), rank=2, seed=2, backend=backend, dtype="float64")
    S = sl.Kronecker.random((6, 6), seed=3, backend=backend, dtype="float64")
    d, e = draw(6, 10, seed=4), draw(6, 6, seed=5)
    ours = {k: (op, on_host(op.to_dense())) for k, op in {"A": A, "C": C, "S": S}.items()}
    return {**ours, "D": (Dense(make(d)), d), "E": (Dense(make(e)), e)}


EXPRESSIONS = {
    "A @ C.T": lambda o: o["A"] @ o["C"].T,
    "A.H @ E": lambda o: o["A"].T.conj() @ o["E"],
    "E @ A": lambda o: o["E"] @ o["A"],
    "A + C": lambda o: o["A"] + o["C"],
    "A + D": lambda o: o["A"] + o["D"],
    "D - A": lambda o: o["D"] - o["A"],
    "-A": lambda o: -o["A"],
    "2 * A": lambda o: 2 * o["A"],
    "A * 0.5 / 4": lambda o: o["A"] * 0.5 / 4,
    "(1 + 2j) * A": lambda o: (1 + 2j) * o["A"],
    "A @ A.T + E": lambda o: o["A"] @ o["A"].T + o["E"],
    "(A + D) @ (C - D).T": lambda o: (o["A"] + o["D"]) @ (o["C"] - o["D"]).T,
    "S @ S @ S - S": lambda o: o["S"] @ o["S"] @ o["S"] - o["S"],
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_equal_their_matrices(backend, expression):
    pairs = operators(backend)
    op = EXPRESSIONS[expression]({k: v[0] for k, v in pairs.items()})
    want = EXPRESSIONS[expression]({k: v[1] for k, v in pairs.items()})
    check(op, want, backend)


def check(op, want, backend):
    make = MAKE[backend]
    assert tuple(op.shape) == want.shape
    x, y = draw(want.shape[1], 3, seed=8), draw(4, want.shape[0], seed=9)
    results = [(op @ make(x), want @ x), (make(y) @ op, y @ want), (op.T @ make(y.T.copy()), want.T @ y.T)]
    if backend != "jax":  # which compiles each of them anew
        results += [
            (op @ make(x[:, 0].copy()), want @ x[:, 0]),
            (op.to_dense(), want),
            (op.T.to_dense(), want.T),
            (op.H.to_dense(), want.conj().T),
        ]
    for got, expected in results:
        assert isinstance(got, TYPES[backend])
        same(got, expected)


# In jax the same functions are compiled for each size; test_cola_compat.py and what follows use them there.
@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_blocks_products_slices_and_identities(backend):
    pairs = operators(backend)
    (A, a), (C, c), (S, s), (D, d), _ = pairs.values()
    make = MAKE[backend]
    eye = I_like(S)
    check(cola.kron(A, D), np.kron(a, d), backend)
    check(cola.kron(cola.kron(A, S), S), np.kron(np.kron(a, s), s), backend)
    check(cola.kronsum(S, S), np.kron(s, np.eye(6)) + np.kron(np.eye(6), s), backend)
    zeros = np.zeros((6, 10))
    check(cola.block_diag(A, D), np.block([[a, zeros], [zeros, d]]), backend)
    check(Concatenated(A, D), np.concatenate([a, d]), backend)
    check(Concatenated(A, S, D, axis=1), np.concatenate([a, s, d], 1), backend)
    check(A[1:4, 2:], a[1:4, 2:], backend)
    check((A + D)[np.array([4, 0, 1])], (a + d)[[4, 0, 1]], backend)
    same(A[2], a[2])
    same((A - D)[-1, 3], (a - d)[-1, 3])
    assert S @ eye is S
    assert eye @ S is S
    check(A @ A.T + eye, a @ a.T + np.eye(6), backend)
    check(eye - S, np.eye(6) - s, backend)
    check(make(d) - A, d - a, backend)
    check(make(d) + A, d + a, backend)
    check(A - make(d), a - d, backend)
    check(sum([A, C, D]), a + c + d, backend)
    check(Diagonal(make(s[0].copy())) @ A, np.diag(s[0]) @ a, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_bands_and_reflections_from_the_left(backend, dtype):
    make = MAKE[backend]
    below, main, above, v = (draw(n, seed=n + i, dtype=dtype) for i, n in enumerate((4, 5, 4, 5)))
    bands = cola.ops.Tridiagonal(*map(make, (below, main, above)))
    matrix = np.diag(below, -1) + np.diag(main) + np.diag(above, 1)
    reflection = cola.ops.Householder(make(v[:, None] / np.linalg.norm(v)))
    mirror = np.eye(5) - 2 * np.outer(v, v.conj()) / np.linalg.norm(v) ** 2
    for op, want in ((bands, matrix), (reflection, mirror), (bands + reflection, matrix + mirror)):
        check(op, want, backend)
        same(make(draw(5)) @ op, draw(5) @ want)
        same(sl.spectral_norm(op), np.linalg.norm(want, 2))
        got = sl.linalg.lsmr(op, make(draw(5, dtype=dtype)), tolerance=1e-14)
        np.testing.assert_allclose(on_host(got), np.linalg.solve(want, draw(5, dtype=dtype)), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_by_arrays_of_the_same_library(backend):
    (A, a), make = operators(backend)["A"], MAKE[backend]
    check(make(3.0) * A, 3 * a, backend)
    check(A * make([3.0]), 3 * a, backend)
    check(A / make(2.0), a / 2, backend)
    check(np.float64(3.0) * A, 3 * a, backend)
    with pytest.raises(ValueError, match=r"one number, got an array of shape \(6,\)"):
        A * make(np.ones(6))
    with pytest.raises(TypeError, match="multiplied with @"):
        A * A
    with pytest.raises(TypeError, match="got str"):
        A * "2"


def test_a_scalar_of_another_library_is_refused():
    A = operators("torch")["A"][0]
    with pytest.raises(TypeError, match="torch operator by a jax array"):
        A * jnp.array(2.0)
    with pytest.raises(TypeError, match="jax operator by a torch array"):
        operators("jax")["A"][0] * torch.tensor(2.0)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_adjoints_of_complex_composites(backend):
    make = MAKE[backend]
    a, b = draw(4, 6, seed=1, dtype="complex128"), draw(4, 6, seed=2, dtype="complex128")
    A, B = sl.Dense(make(a)), Dense(make(b))
    composed = (A + B, a + b), (A @ B.H, a @ b.conj().T), (1j * A, 1j * a), (A[:, 1:4], a[:, 1:4])
    for op, want in (*composed, (cola.kron(A, B), np.kron(a, b))):
        same(op.T.to_dense(), want.T)
        same(op.H.to_dense(), want.conj().T)
        x = draw(want.shape[0], 2, dtype="complex128")
        same(op.H @ make(x), want.conj().T @ x)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_solving_and_log_determinants_of_composites(backend):
    (A, a), make = operators(backend)["A"], MAKE[backend]
    M, m = A @ A.T + I_like(A @ A.T), a @ a.T + np.eye(6)
    b = draw(6, 2, seed=1)
    same(cola.inv(M) @ make(b), np.linalg.solve(m, b))
    same(cola.inv(cola.PSD(M)) @ make(b), np.linalg.solve(m, b))
    same(cola.logdet(M), np.linalg.slogdet(m)[1])
    same(cola.logdet(3 * M), np.linalg.slogdet(3 * m)[1])
    same(cola.linalg.slogdet(-1 * (A @ A.T + I_like(M)))[0], np.linalg.slogdet(-m)[0])
    same(cola.linalg.trace(M), np.trace(m))
    same(cola.linalg.diag(M), np.diag(m))


def test_composites_are_pytrees_of_our_factors():
    (A, _), (C, _), _, (D, _), _ = operators("jax").values()
    op = Product(A + D, C.T, ScalarMul(jnp.asarray(2.0), (6, 6), jnp.float64, device=A.device))
    assert len(jax.tree_util.tree_leaves(op)) == 1 + 2 + 1 + 2
    x = draw(6, seed=3)
    grad = jax.jit(jax.grad(lambda op: (op @ x).sum()))(op)
    assert jax.tree_util.tree_structure(grad) == jax.tree_util.tree_structure(op)
    same(jax.jit(lambda op: op @ x)(op), on_host(op.to_dense()) @ x)
    order = np.array([0, 2, 1, 3, 4, 5])
    same(jax.jit(lambda op: op @ x)(op[:, order]), on_host(op.to_dense())[:, order] @ x)


def test_gradients_reach_every_factor_of_a_torch_composite():
    factors = [f.requires_grad_() for f in operators("torch")["A"][0].factors]
    numpy_first = operators("numpy")["A"][0]
    assert len(Product(numpy_first, numpy_first.T).flatten()[0]) == 4
    A = sl.BlockTensorTrain(*factors)
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    op = c * Product(A, A.T) + I_like(A @ A.T)
    assert {id(leaf) for leaf in op.flatten()[0]} >= {id(f) for f in factors}
    (op @ torch.ones(6, dtype=torch.float64)).sum().backward()
    for leaf in (*factors, c):
        assert leaf.grad.abs().max() > 0
    gram = (A @ A.T).to_dense().detach()
    same(c.grad, float(gram.sum()))


def test_annotations_of_our_operators_under_scaling():
    P = sl.Permutation(torch.tensor([2, 0, 1]), dtype=torch.float64)
    assert P.isa(Unitary)
    assert (P @ P).isa(Unitary)
    assert not (3 * P).isa(Unitary)
    assert not (P + P).isa(Unitary)
    assert (-P).isa(Unitary)
    S = cola.PSD(operators("torch")["S"][0])
    assert (2 * S).isa(PSD)
    assert not (-2 * S).isa(PSD)
    traced = jax.jit(lambda c, S: S * c)
    assert not traced(2.0, cola.PSD(operators("jax")["S"][0])).isa(PSD)


def test_bad_indices_are_refused():
    A = operators("torch")["A"][0]
    for index, message in [
        (6, "out of range for axis 0 of size 6"),
        ((0, -11), "out of range for axis 1 of size 10"),
        ((0, 1, 2), "one or two indices"),
        (..., "one or two indices"),
        (np.array([0.5]), "float64 of shape"),
        (np.zeros((2, 2), int), "of shape"),
        (([0, 1], [1]), "equally long"),
    ]:
        with pytest.raises(IndexError, match=message):
            A[index]
    assert isinstance(A[:0], Sliced)
    assert A[:0].shape == (0, 10)
    assert A[:, :0].shape == (6, 0)
    for rows, columns in [(slice(0), slice(0)), (slice(3, 3), slice(9, 2)), (slice(0), np.array([], int))]:
        with pytest.raises(ValueError, match=r"at least 1 row or 1 column, got shape \(0, 0\)"):
            A[rows, columns]
    assert isinstance(A @ A.T, Product)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries(backend, monkeypatch):
    make, v = MAKE[backend], draw(6)
    A, D = (operators(backend)[name] for name in "AD")
    ours = sl.Dense(make(D[1]))
    pairs = [A, D, (ours, D[1]), (ours.T, D[1].T), (ours[:4].T, D[1][:4].T), (A[0] + D[0], A[1] + D[1])]
    pairs += [(cls(make(v)), np.diag(v)) for cls in (Diagonal, sl.Diagonal)]
    infinite = sl.Diagonal(make(np.array([np.inf, np.nan])))
    np.testing.assert_array_equal(on_host(infinite[[0, 1, 0], [1, 0, 0]]), [0, 0, np.inf])
    for numbers in (1, 25, 10**6):  # one column at a time, two, all
        monkeypatch.setattr(sl._cola_compat._slicing, "_NUMBERS", numbers)
        for op, want in pairs:
            i, j = [3, 0, 2, 3, -1, 1], [5, 0, 2, 5, 1, -2]
            i, j = [k % op.shape[0] for k in i], [k % op.shape[1] for k in j]
            same(op[i, j], want[i, j])
            assert op[[], []].shape == (0,)


def test_entries_take_the_memory_of_some_columns():
    n = 30_000
    v, products = np.arange(1.0, n + 1), []
    i = np.arange(0, n, 60)
    A = cola.ops.LinearOperator(np.float64, (n, n), matmat=lambda X: products.append(X.shape[1]) or v[:, None] * X)
    for op in (sl.Diagonal(v), Diagonal(v), A):
        tracemalloc.start()
        np.testing.assert_array_equal(op[np.tile(i, 3), np.tile(i, 3)], np.tile(v[i], 3))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (1.5e8 if op is A else 1e6)
    assert sum(products) == len(i)


def test_entries_have_derivatives():
    i, j = [0, 2, 1, 2], [0, 2, 2, 2]
    for make in (sl.Diagonal, Diagonal, lambda v: sl.Diagonal(v) + sl.Diagonal(0 * v)):
        v = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        make(v)[i, j].sum().backward()
        same(v.grad, [1.0, 0, 2])
        same(jax.grad(lambda v, make=make: make(v)[i, j].sum())(jnp.ones(3)), [1.0, 0, 2])
        same(
            torch.vmap(lambda v, make=make: make(v)[i, j])(torch.arange(6.0).reshape(2, 3)),
            [[0, 2, 0, 2], [3, 5, 0, 5]],
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_composites_of_identities_keep_the_library(backend):
    identity = I_like(sl.Dense(MAKE[backend](draw(2, 2))))
    composites = {
        "transpose": identity.T,
        "adjoint": identity.H,
        "kron": cola.kron(identity, identity),
        "kronsum": cola.kronsum(identity, identity),
        "block_diag": cola.block_diag(identity, identity),
        "rows": identity[:1],
    }
    for name, A in composites.items():
        dense = A.to_dense()
        assert isinstance(dense, TYPES[backend]), name
        assert on_host(dense).dtype == np.float64, name


# -- stacks of columns (..., n, k) and of rows (..., k, n) -------------------------------------------------------------

LEADS = ((2,), (2, 3), (0,), (2, 1, 3))

a, b, low = draw(4, 4, seed=1) + 4 * np.eye(4), draw(3, 3, seed=2) + 4 * np.eye(3), draw(2, 4, seed=3)
ORDER = [2, 0, 1, 3]
KRON, EYES = np.kron(a, b), (np.eye(4), np.eye(3))
KRONSUM = np.kron(a, EYES[1]) + np.kron(EYES[0], b)

# An operator of arrays that ``make`` makes, and its matrix.
COMPOSITES = {
    "inverse": (lambda make: sl.linalg.inverse(sl.Dense(make(a))), np.linalg.inv(a)),
    "inverse of kronsum": (
        lambda make: sl.linalg.inverse(cola.kronsum(sl.Dense(make(a)), sl.Dense(make(b)))),
        np.linalg.inv(KRONSUM),
    ),
    "pinv": (lambda make: cola.pinv(co.Dense(make(low))), np.linalg.pinv(low)),
    "scaled": (lambda make: 2.5 * sl.Permutation(make(ORDER), dtype=sl.Dense(make(a)).dtype), 2.5 * np.eye(4)[ORDER]),
    "sum": (lambda make: sl.Dense(make(a)) + co.Dense(make(a.T.copy())), a + a.T),
    "product": (lambda make: co.Dense(make(low)) @ sl.Dense(make(a)), low @ a),
    "slice": (lambda make: sl.Dense(make(a))[1:, :2], a[1:, :2]),
    "chosen": (lambda make: sl.Dense(make(a))[np.array([3, 1])], a[[3, 1]]),
    "kron": (lambda make: cola.kron(sl.Dense(make(low)), co.Dense(make(b))), np.kron(low, b)),
    "kronsum": (lambda make: cola.kronsum(sl.Dense(make(a)), sl.Dense(make(b))), KRONSUM),
    "block_diag": (
        lambda make: co.BlockDiag(sl.Dense(make(a)), co.Dense(make(low)), multiplicities=[2, 1]),
        np.block([[np.kron(np.eye(2), a), np.zeros((8, 4))], [np.zeros((2, 8)), low]]),
    ),
    "concatenated": (lambda make: co.Concatenated(sl.Dense(make(a)), co.Dense(make(low))), np.concatenate([a, low])),
    "transpose": (lambda make: co.Transpose(co.Dense(make(low))), low.T),
    "adjoint": (lambda make: (sl.Dense(make(low)) @ co.Dense(make(a))).H, (low @ a).T),
    "identity": (lambda make: co.I_like(sl.Dense(make(a))), np.eye(4)),
    "diagonal": (lambda make: co.Diagonal(make(a[0].copy())), np.diag(a[0])),
    "permutation": (lambda make: co.Permutation(make(ORDER), sl.Dense(make(a)).dtype), np.eye(4)[ORDER]),
    "dense": (lambda make: co.Dense(make(low)), low),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_leading_axes_are_columns_or_rows(name, backend):
    make, (build, matrix) = MAKE[backend], COMPOSITES[name]
    A = build(make)
    for lead in LEADS if backend != "jax" else LEADS[1:2]:  # jax compiles each of them anew
        X, Y = draw(*lead, matrix.shape[1], 5), draw(*lead, 5, matrix.shape[0])
        columns, rows = A @ make(X), make(Y) @ A
        assert isinstance(columns, TYPES[backend])
        assert isinstance(rows, TYPES[backend])
        same(columns, matrix @ X)
        same(rows, Y @ matrix)


@pytest.mark.parametrize("name", ["inverse", "scaled", "slice", "kronsum", "block_diag"])
def test_stacks_under_jit(name):
    build, matrix = COMPOSITES[name]
    A = build(jnp.array)
    X, Y = draw(2, 3, matrix.shape[1], 5), draw(2, 3, 5, matrix.shape[0])
    same(jax.jit(lambda A, X: A @ X)(A, X), matrix @ X)
    same(jax.jit(lambda A, Y: jnp.asarray(Y) @ A)(A, Y), Y @ matrix)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stacks_as_large_as_the_operator_are_not_transposed(backend):
    """Every axis has the same size, so that a wrong axis raises no error."""
    make, X = MAKE[backend], draw(4, 4, 4)
    A = co.Permutation(make(ORDER), sl.Dense(make(a)).dtype) @ co.Dense(make(a))
    same(A @ make(X), a[ORDER] @ X)
    same(make(X) @ A, X @ a[ORDER])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["inverse", "sum", "product", "slice", "kron", "kronsum", "block_diag", "dense"])
def test_wrong_sizes_are_refused_with_the_shapes(name, backend):
    make, (build, matrix) = MAKE[backend], COMPOSITES[name]
    A, (d_out, d_in) = build(make), matrix.shape
    for shape in [(), (d_in + 1,), (d_in + 1, 2), (2, d_in + 1, 2), (d_in, d_in + 1, 1)]:
        with pytest.raises(
            ValueError, match=rf"shape \({d_out}, {d_in}\) @ array .*got \({', '.join(map(str, shape))}"
        ):
            A @ make(draw(*shape))
    for shape in [(), (d_out + 1,), (2, d_out + 1), (2, d_out, d_out + 1)]:
        with pytest.raises(ValueError, match=rf"@ operator of shape \({d_out}, {d_in}\) .*got {re.escape(str(shape))}"):
            make(draw(*shape)) @ A
    with pytest.raises(ValueError, match=rf"shapes \({d_out}, {d_in}\) and \({d_in + 1}, {d_in + 1}\)"):
        A @ co.Dense(make(draw(d_in + 1, d_in + 1)))


def test_stacks_times_operators_of_scipy():
    sparse = scipy.sparse.random_array((5, 4), density=0.5, rng=0)
    A, X, Y = sl.from_scipy(sparse), draw(2, 4, 3), draw(2, 3, 5)
    same(A @ X, sparse.toarray() @ X)
    same(Y @ A, Y @ sparse.toarray())


def test_gradients_of_stacks_in_torch():
    X = torch.tensor(draw(2, 3, 12, 5), requires_grad=True)
    A = torch.tensor(a, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, X: cola.kronsum(sl.Dense(A), sl.Dense(torch.tensor(b))) @ X, (A, X))


# -- torch.vmap --------------------------------------------------------------------------------------------------------

TAKEN = {
    "columns": lambda K, x: K @ x,
    "rows": lambda K, x: x @ K,
    "solve": sl.linalg.solve,
    "inverse": lambda K, x: sl.linalg.inverse(K) @ x,
    "stack": lambda K, x: K @ x.reshape(1, 12, 1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)])
@pytest.mark.parametrize("kind", [sl.Dense, co.Dense])
@pytest.mark.parametrize("make", [cola.kron, cola.kronsum])
def test_kronecker_products_and_sums_under_vmap(make, kind, in_dims):
    stacks = draw(3, 4, 4, seed=1) + 4 * np.eye(4), draw(3, 3, 3, seed=2) + 4 * np.eye(3), draw(3, 12, seed=3)
    given = [torch.tensor(s if dim == 0 else s[0]) for s, dim in zip(stacks, in_dims, strict=True)]
    batch = [[g[i] if dim == 0 else g for g, dim in zip(given, in_dims, strict=True)] for i in range(3)]
    matrix = np.kron if make is cola.kron else lambda A, B: np.kron(A, EYES[1]) + np.kron(EYES[0], B)
    for name, take in TAKEN.items():

        def f(A, B, x, take=take):
            return take(make(kind(A), kind(B)), x)

        found = vmap(f, in_dims=in_dims)(*given)
        for i, (A, B, x) in enumerate(batch):
            M, y = matrix(A.numpy(), B.numpy()), x.numpy()
            want = {"columns": M @ y, "stack": (M @ y).reshape(1, 12, 1), "rows": y @ M}
            same(found[i], want[name] if name in want else np.linalg.solve(M, y))
        slopes = grad(lambda *z, f=f: f(*z).square().sum(), argnums=(0, 1, 2))
        wanted = [slopes(*z) for z in batch]
        for k, got in enumerate(vmap(slopes, in_dims=in_dims)(*given)):
            same(got, np.stack([want[k].numpy() for want in wanted]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [sl.Dense, co.Dense])
def test_a_complex_kronecker_sum_times_real_columns(kind, backend):
    make, c, X = MAKE[backend], np.array([[1j, 1], [0, 2]]), draw(4, 3)
    K, matrix = cola.kronsum(kind(make(c)), kind(make(c.T.copy()))), np.kron(c, np.eye(2)) + np.kron(np.eye(2), c.T)
    same(K @ make(X), matrix @ X)
    same(K @ make(X[:, 0].copy()), matrix @ X[:, 0])
    same(make(X.T.copy()) @ K, X.T @ matrix)
