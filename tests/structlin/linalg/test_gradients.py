"""Gradients through solve, logdet and what else is differentiable: torch's gradcheck, jax's check_grads.

Both compare with finite differences in float64. jax runs under jit, so that the rules must not look at values.
"""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import structlin
from structlin import linalg
from structlin.linalg import _woodbury
from structlin.structure import Structure


def structured(name, shape, **options):
    structure = structlin.design(name, shape, **options)
    cls = structlin.structure_class(name)
    return [f.shape for f in structure.factors], lambda *factors: cls._build(structure, factors)


def low_rank_plus_diagonal(V, U, d):
    return structlin.Diagonal(2.5 + d * d) + structlin.LowRank(V, U)


def composite(A, B, c):
    K = cola.kron(structlin.Dense(A), structlin.Circulant(c))
    return (structlin.BlockDiagonal(B) @ K).T


# name: shapes of the arrays, and the operator that they make
SQUARE = {
    "dense": ([(4, 4)], structlin.Dense),
    "kronecker": structured("kronecker", (6, 6)),
    "block diagonal": structured("block_diagonal", (6, 6), blocks=2),
    "monarch": structured("monarch", (8, 8), blocks=2),
    "monarch padded": structured("monarch", (7, 7), blocks=2),
    "block tensor train": structured("block_tensor_train", (12, 12), rank=2, factorization=((2, 6), (4, 3))),
    "butterfly": structured("butterfly", (4, 4)),
    "circulant": ([(5,)], structlin.Circulant),
    "diagonal": ([(5,)], structlin.Diagonal),
    "toeplitz": structured("toeplitz", (4, 4)),
    "low rank + diagonal": ([(2, 6), (6, 2), (6,)], low_rank_plus_diagonal),
    "composite": ([(2, 2), (2, 3, 3), (3,)], composite),
}


def entries(shapes, seed=0):
    rng = np.random.default_rng([seed, *(n for s in shapes for n in s)])
    return [rng.standard_normal(s) for s in shapes]


def leaves(shapes):
    return [torch.tensor(x, requires_grad=True) for x in entries(shapes)]


def solved(make, b):
    return lambda *arrays: cola.linalg.solve(make(*arrays), b)


def determinant(make):
    return lambda *arrays: cola.logdet(make(*arrays))


def gradcheck(function, arrays, **tolerances):
    """torch's check, of few numbers by each of them, and of more along one direction."""
    fast = sum(x.numel() for x in arrays) > 30
    return torch.autograd.gradcheck(function, arrays, fast_mode=fast, **tolerances)


@pytest.mark.parametrize("name", SQUARE)
def test_torch_gradients_of_solve_and_logdet(name):
    shapes, make = SQUARE[name]
    arrays = leaves(shapes)
    (b,) = leaves([(make(*arrays).shape[0], 2)])
    assert gradcheck(lambda b, *arrays: solved(make, b)(*arrays), (b, *arrays), atol=1e-6)
    assert gradcheck(determinant(make), arrays, atol=1e-6)


FAST = ("kronecker", "low rank + diagonal")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SQUARE])
def test_jax_gradients_of_solve_and_logdet(name):
    shapes, make = SQUARE[name]
    arrays = [jnp.asarray(x) for x in entries(shapes)]
    b = jnp.asarray(entries([(make(*arrays).shape[0], 2)])[0])
    check_grads(jax.jit(solved(make, b)), arrays, order=1, modes=["rev"], rtol=1e-4)
    check_grads(jax.jit(determinant(make)), arrays, order=1, modes=["rev"], rtol=1e-4)


@pytest.mark.parametrize("name", ["monarch", "low rank + diagonal", "circulant"])
def test_torch_gradients_of_complex_operators(name):
    shapes, make = SQUARE[name]
    pairs = zip(entries(shapes), entries(shapes, 1), strict=True)
    arrays = [torch.tensor(x + 1j * y, requires_grad=True) for x, y in pairs]
    b = torch.ones(make(*arrays).shape[0], dtype=torch.complex128)
    assert gradcheck(solved(make, b), arrays, atol=1e-6)
    assert gradcheck(determinant(make), arrays, atol=1e-6)


# name: shapes, operator, and a number or an array made of it
OTHERS = {
    "diag": (*structured("block_tensor_train", (6, 6), rank=2), lambda A: cola.diag(A, 1)),
    "trace": (*structured("tensor_train", (6, 6), rank=2), cola.trace),
    "frobenius": (*structured("tensor_train", (6, 4), rank=2), linalg.frobenius_norm),
    "inner": (*structured("monarch", (6, 8), blocks=2), lambda A: linalg.inner_product(A, 2 * A)),
    "spectral, parts": (*structured("kronecker", (6, 4)), linalg.spectral_norm),
    "spectral, iterated": (
        *structured("block_tensor_train", (6, 4), rank=2),
        lambda A: linalg.spectral_norm(A, tolerance=1e-9),
    ),
    "pinv of low rank": (*structured("low_rank", (6, 5), rank=2), lambda A: cola.pinv(A).to_dense()),
    "exp of blocks": (*structured("block_diagonal", (6, 6), blocks=2), lambda A: cola.exp(A).to_dense()),
    "exp of low rank": (*structured("low_rank", (6, 6), rank=2), lambda A: cola.exp(A).to_dense()),
    "power of circulant": ([(5,)], structlin.Circulant, lambda A: cola.linalg.pow(A, 3).to_dense()),
    "rounding": (
        *structured("tensor_train", (6, 4), rank=2),
        lambda A: linalg.round_tensor_train(linalg.add_tensor_trains(A, A), rank=2).to_dense(),
    ),
    "rounding of three cores": (
        *structured("tensor_train", (12, 18), rank=2, cores=3),
        lambda A: linalg.round_tensor_train(linalg.add_tensor_trains(A, A), rank=(2, 1)).to_dense(),
    ),
    "rounding by tolerance": (
        *structured("tensor_train", (12, 18), rank=2, cores=3),
        lambda A: linalg.round_tensor_train(linalg.add_tensor_trains(A, A)).to_dense(),
    ),
    "singular values": (*structured("kronecker", (6, 4)), lambda A: linalg.svd(A).S),
}


@pytest.mark.parametrize("name", OTHERS)
def test_torch_gradients_of_the_rest(name):
    shapes, make, f = OTHERS[name]
    assert gradcheck(lambda *arrays: f(make(*arrays)), leaves(shapes), atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OTHERS if not n.startswith("rounding")])
def test_jax_gradients_of_the_rest(name):
    shapes, make, f = OTHERS[name]
    arrays = [jnp.asarray(x) for x in entries(shapes)]
    check_grads(jax.jit(lambda *arrays: f(make(*arrays))), arrays, order=1, modes=["rev"], rtol=1e-3)


def test_functional_transforms_of_torch():
    V, U, d = (torch.tensor(x) for x in entries([(2, 6), (6, 2), (6,)]))
    b = torch.ones(6, dtype=torch.float64)

    def f(V, U, d):
        return cola.linalg.solve(low_rank_plus_diagonal(V, U, d), b).sum()

    by_func = torch.func.grad(f, argnums=(0, 1, 2))(V, U, d)
    leaves = [x.clone().requires_grad_() for x in (V, U, d)]
    f(*leaves).backward()
    for got, leaf in zip(by_func, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad)
    many = torch.stack([V, V + 1])
    found = torch.func.vmap(lambda V: f(V, U, d))(many)
    torch.testing.assert_close(found, torch.stack([f(v, U, d) for v in many]))


def test_jit_and_vmap_of_jax():
    shapes, make = SQUARE["monarch"]
    arrays = [jnp.asarray(x) for x in entries(shapes)]
    b = jnp.ones(8)
    many = [jnp.stack([x, x[::-1]]) for x in arrays]
    found = jax.jit(jax.vmap(solved(make, b)))(*many)
    for i in range(2):
        one = make(*(x[i] for x in many))
        np.testing.assert_allclose(found[i], np.linalg.solve(one.to_dense(), b), rtol=1e-8)


def test_what_is_refused_eagerly_is_nan_under_jit():
    """Where no value can be looked at, a wrong number must not come back as a right one."""
    singular = jnp.stack([jnp.ones((2, 2)), jnp.eye(2)])
    with pytest.raises(np.linalg.LinAlgError, match="singular to working precision"):
        cola.inv(structlin.BlockDiagonal(singular))

    @jax.jit
    def solve(blocks):
        return cola.inv(structlin.BlockDiagonal(blocks)) @ jnp.ones(4)

    found = solve(singular)
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2:], 1)

    @jax.jit
    def root(blocks):
        return cola.linalg.sqrt(structlin.BlockDiagonal(blocks)).to_dense()

    assert np.isnan(root(jnp.array([[[0.0, 1.0], [0.0, 0.0]]]))).any()


def test_a_formula_that_loses_accuracy_is_replaced():
    """Woodbury cancels where the diagonal is tiny; the residual gives it away, and LU takes over."""
    rng = np.random.default_rng(0)
    U = torch.tensor(rng.standard_normal((8, 3)))
    base = torch.full((8,), 1e-14, dtype=torch.float64)
    base[3:] = 1.0
    A = structlin.Diagonal(base) + structlin.LowRank(U.T.contiguous(), U)
    b = torch.tensor(rng.standard_normal(8))
    with pytest.raises(np.linalg.LinAlgError, match="not accurate"):
        _woodbury.solver(A).solve(b)
    x = cola.inv(A) @ b
    assert torch.linalg.norm(A @ x - b) <= 1e-13 * torch.linalg.norm(x) * linalg.spectral_norm(A.Ms[1])
    np.testing.assert_allclose(cola.linalg.solve(A, b), np.linalg.solve(A.to_dense(), b), rtol=1e-6)
    sign, log = np.linalg.slogdet(A.to_dense())
    np.testing.assert_allclose([float(x) for x in cola.linalg.slogdet(A)], [sign, log], rtol=1e-8)


def test_structures_without_a_name_differentiate_too():
    structure = Structure.parse("abc,bxa->cxb; cxb,cyx->byc", a=2, b=3, c=2, x=2, y=2)
    arrays = leaves([f.shape for f in structure.factors])
    make = lambda *factors: structlin.StructuredOperator(structure, factors)  # noqa: E731
    b = torch.ones(structure.d_in, dtype=torch.float64)
    assert torch.autograd.gradcheck(solved(make, b), arrays, atol=1e-6)
    assert torch.autograd.gradcheck(determinant(make), arrays, atol=1e-6)


JORDAN = np.array([[2.0, 1.0], [0.0, 2.0]])
MEMBERS = {
    "kronecker": (structlin.Kronecker, np.kron),
    "kronecker sum": (
        lambda a, b: cola.kronsum(structlin.Dense(a), structlin.Dense(b)),
        lambda a, b: np.kron(a, np.eye(3)) + np.kron(np.eye(2), b),
    ),
}


def shifted_logdet(name):
    def logdet(a, b):
        K = MEMBERS[name][0](a, b)
        return linalg.logdet(K + 0.7 * cola.ops.I_like(K))

    return logdet


def gradients_of_logdet(name, a, b):
    """The derivatives tr(A^-1 dA) for every entry of the members."""
    make = MEMBERS[name][1]
    inverse = np.linalg.inv(make(a, b) + 0.7 * np.eye(6))
    changes = [[make(a + e, b) - make(a, b) for e in np.eye(4).reshape((4, 2, 2))]]
    changes.append([make(a, b + e) - make(a, b) for e in np.eye(9).reshape((9, 3, 3))])
    found = [np.array([np.trace(inverse @ dA) for dA in some]) for some in changes]
    return [f.reshape(m.shape) for f, m in zip(found, (a, b), strict=True)]


@pytest.mark.parametrize("defective", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_of_determinants_with_members_without_annotation(name, defective):
    a, b = entries([(2, 2), (3, 3)])
    a = JORDAN if defective else a
    f, wanted = shifted_logdet(name), gradients_of_logdet(name, a, b)
    leaves = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    eager, traced = jax.grad(f, (0, 1)), jax.jit(jax.value_and_grad(f, (0, 1)))
    value, compiled = traced(jnp.asarray(a), jnp.asarray(b))
    for found in (
        torch.autograd.grad(f(*leaves), leaves),
        torch.func.grad(f, (0, 1))(*map(torch.tensor, (a, b))),
        eager(jnp.asarray(a), jnp.asarray(b)),
        *([] if defective else [compiled]),
    ):
        for x, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, want, atol=1e-12)
    np.testing.assert_allclose(value, np.linalg.slogdet(MEMBERS[name][1](a, b) + 0.7 * np.eye(6))[1], atol=1e-13)
    if defective:  # the eigenvalues have no derivative, and no other method can be chosen
        assert np.isnan(compiled[0]).any()
    else:
        assert torch.autograd.gradgradcheck(f, leaves)


def test_jax_gradients_of_a_likelihood_with_members_without_annotation():
    a, b, x = entries([(2, 2), (3, 3), (6,)])

    def terms(make):
        def value(a, b):
            quadratic, log = linalg.inv_quad_logdet(make(a, b), jnp.asarray(x))
            return quadratic + log

        return jax.grad(value, (0, 1))(jnp.asarray(a), jnp.asarray(b))

    def shifted(a, b):
        K = structlin.Kronecker(a, b)
        return K + 0.7 * cola.ops.I_like(K)

    dense = terms(lambda a, b: structlin.Dense(jnp.kron(a, b) + 0.7 * jnp.eye(6)))
    for found, want in zip(terms(shifted), dense, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-10)


def symmetric(n, seed, complex_=False):
    X = np.random.default_rng([seed, n]).standard_normal((2, n, n))
    X = X[0] + 1j * X[1] if complex_ else X[0]
    return (X + X.conj().T) / 2


def of_eigenvalues(f, A):
    values, vectors = np.linalg.eigh(A)
    return (vectors * f(values)) @ vectors.conj().T


SLOPE = 1e-5  # step of finite differences


@pytest.mark.parametrize("kind", ["Monarch", "Toeplitz", "sum"])
def test_second_derivatives_of_iterated_norms_are_refused(kind):
    def norm(x):
        made = {
            "Monarch": lambda: structlin.Monarch._build(
                structlin.design("monarch", (6, 6), blocks=2), (x.reshape((2, 3, 3)), x.reshape((2, 3, 3)) + 1)
            ),
            "Toeplitz": lambda: structlin.Toeplitz(x[:9], x[9:]),
            "sum": lambda: (
                structlin.Kronecker(x[:9].reshape((3, 3)), x[9:13].reshape((2, 2)))
                + structlin.LowRank(x[None, :6], x[6:12, None])
            ),
        }[kind]()
        return structlin.spectral_norm(made, tolerance=1e-12)

    x = np.random.default_rng(0).standard_normal(18)
    v = np.random.default_rng(1).standard_normal(18)
    t = torch.tensor(x, requires_grad=True)
    (first,) = torch.autograd.grad(norm(t) + (t**2).sum(), t)
    slope = (norm(x + SLOPE * v) - norm(x - SLOPE * v)) / (2 * SLOPE)
    np.testing.assert_allclose(v @ first.numpy(), slope + 2 * v @ x, rtol=1e-6)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(norm(t) + (t**2).sum(), t, create_graph=True)
    for of, grad, jvp in ((torch.tensor, torch.func.grad, torch.func.jvp), (jnp.asarray, jax.grad, jax.jvp)):
        np.testing.assert_allclose(grad(norm)(of(x)), first.numpy() - 2 * x, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(jvp(norm, (of(x),), (of(v),))[1], slope, rtol=1e-6)
        assert np.isnan(jvp(grad(norm), (of(x),), (of(v),))[1]).any()
        assert np.isnan(grad(lambda x: (grad(norm)(x) * of(v)).sum())(of(x))).any()  # noqa: B023


def test_second_derivatives_of_estimated_determinants_are_refused():
    a = torch.linspace(1, 2, 12, dtype=torch.float64, requires_grad=True)
    value = linalg.logdet(cola.PSD(structlin.Diagonal(a)), estimate=True)
    torch.testing.assert_close(torch.autograd.grad(value, a, retain_graph=True)[0], 1 / a.detach(), rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(value + (a**2).sum(), a, create_graph=True)


NUMBERS = {"inverse": lambda x: 1 / x, "exponential": np.exp, "root": np.sqrt}
OPERATIONS = {"inverse": linalg.inverse, "exponential": linalg.expm, "root": linalg.sqrtm}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("add", [False, True])
def test_the_gradient_with_respect_to_a_shift_has_a_derivative(name, add):
    """Forward over reverse, the row of c is right; that of the members is NaN."""
    A, B, b = np.eye(3) + symmetric(3, 0) / 9, np.eye(2) + symmetric(2, 1) / 9, np.arange(1.0, 7)

    def value(t):
        like = torch.asarray if isinstance(t, torch.Tensor) else jnp.asarray
        first, second = like(A) * t[0], like(B)
        K = cola.kronsum(*map(structlin.Dense, (first, second))) if add else structlin.Kronecker(first, second)
        made = OPERATIONS[name](cola.PSD(K + t[1] * cola.ops.I_like(K)))
        return like(b) @ (made @ like(b))

    def wanted(t):
        K = np.kron(t[0] * A, np.eye(2)) + np.kron(np.eye(3), B) if add else np.kron(t[0] * A, B)
        return b @ of_eigenvalues(NUMBERS[name], K + t[1] * np.eye(6)) @ b

    t, h = np.array([1.3, 0.7]), 1e-4
    e, c = np.array([h, 0]), np.array([0, h])
    mixed = (wanted(t + e + c) - wanted(t + e - c) - wanted(t - e + c) + wanted(t - e - c)) / (4 * h * h)
    twice = (wanted(t + c) - 2 * wanted(t) + wanted(t - c)) / (h * h)
    for of, hessian in ((torch.tensor, torch.func.hessian), (jnp.asarray, jax.hessian)):
        found = np.asarray(hessian(value)(of(t)))
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1], [mixed, twice], rtol=1e-5)
        np.testing.assert_allclose(jax.jit(jax.hessian(value))(t)[1], [mixed, twice], rtol=1e-5)
    s = torch.tensor(t, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(value(s), s, create_graph=True)


def test_the_gradient_with_respect_to_a_shift_is_finite_between_opposite_eigenvalues():
    """The derivative of 1 / x is not finite at the mean of -1 and 1, which no eigenvalue is close to."""
    K, b = np.kron([[0.0, 1], [1, 0]], np.diag([1.0, 2, 3])), np.arange(1.0, 7)

    def value(c):
        like = torch.asarray if isinstance(c, torch.Tensor) else jnp.asarray
        A = structlin.Kronecker(like(np.array([[0.0, 1], [1, 0]])), like(np.diag([1.0, 2, 3])))
        made = cola.linalg.apply_unary(lambda x: 1 / x, cola.SelfAdjoint(A + c * cola.ops.I_like(A)))
        return like(b) @ (made @ like(b)).real

    wanted = -b @ np.linalg.matrix_power(np.linalg.inv(K), 2) @ b
    np.testing.assert_allclose(jax.grad(value)(jnp.zeros(())), wanted)
    np.testing.assert_allclose(torch.func.grad(value)(torch.zeros((), dtype=torch.float64)), wanted)


@pytest.mark.parametrize("kind", ["dense", "Kronecker", "block diagonal"])
def test_functions_of_complex_hermitian_matrices_have_derivatives(kind):
    A, E, B = np.eye(3) + symmetric(3, 0, True) / 9, symmetric(3, 1, True), np.eye(2) + symmetric(2, 2, True) / 9
    n = 6 if kind == "Kronecker" else 3
    b = np.random.default_rng(3).standard_normal((n, 2)) @ [1, 1j]

    def operator(matrix, like):
        made = {
            "dense": lambda: structlin.Dense(matrix),
            "Kronecker": lambda: structlin.Kronecker(matrix, like(B)),
            "block diagonal": lambda: structlin.BlockDiagonal(matrix[None]),
        }[kind]()
        return cola.PSD(made)

    def value(t):
        like = torch.asarray if isinstance(t, torch.Tensor) else jnp.asarray
        y = linalg.sqrtm(operator(like(A) + t * like(E), like)) @ like(b)
        return abs(y[0]) ** 2 + y[1].imag

    def wanted(t):
        y = of_eigenvalues(np.sqrt, np.kron(A + t * E, B) if kind == "Kronecker" else A + t * E) @ b
        return abs(y[0]) ** 2 + y[1].imag

    slope = (wanted(SLOPE) - wanted(-SLOPE)) / (2 * SLOPE)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    found = [
        torch.autograd.grad(value(t), t)[0],
        torch.func.jvp(value, (t.detach(),), (one,))[1],
        jax.jit(jax.grad(value))(0.0),
        jax.jvp(value, (0.0,), (1.0,))[1],
    ]
    np.testing.assert_allclose([float(x) for x in found], slope, rtol=1e-7)


def test_values_beside_derivatives_have_derivatives():
    """The value that ``jax.value_and_grad`` returns can be differentiated."""
    b = np.arange(1.0, 4)

    def root(x):
        like = torch.asarray if isinstance(x, torch.Tensor) else jnp.asarray
        return (linalg.sqrtm(cola.PSD(structlin.Dense((x + x.T) / 2))) @ like(b))[0]

    def norm(x):
        return structlin.spectral_norm(structlin.Toeplitz(x[0], x[:, 0]), tolerance=1e-12)

    x = np.eye(3) + symmetric(3, 0) / 9
    for f in (root, norm):
        wanted = jax.grad(f)(jnp.asarray(x))
        assert np.abs(wanted).max() > 0.1
        for value in (lambda x: jax.value_and_grad(f)(x)[0], lambda x: jax.jvp(f, (x,), (x,))[0]):  # noqa: B023
            np.testing.assert_allclose(jax.grad(value)(jnp.asarray(x)), wanted, rtol=1e-9, atol=1e-12)
        for value in (lambda x: torch.func.grad_and_value(f)(x)[1], lambda x: torch.func.jvp(f, (x,), (x,))[0]):  # noqa: B023
            np.testing.assert_allclose(torch.func.grad(value)(torch.tensor(x)), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False], ids=["A replicated", "A sharded"])
@pytest.mark.parametrize("name", ["K + cI", "low rank + diagonal", "Toeplitz", "cg", "GMRES", "inverse", "norm"])
def test_solutions_and_gradients_inside_shard_map(name, shared):
    """There jax distinguishes replicated and sharded values, also on one device."""
    n = 300 if name == "Toeplitz" else 6
    a, X = 1 + np.random.default_rng(0).random((1, n)), np.random.default_rng(1).standard_normal((n, 4))
    B = np.eye(2) + symmetric(2, 1) / 9

    def make(a):
        K = structlin.Kronecker(jnp.diag(a[:3]), jnp.asarray(B))
        if name == "low rank + diagonal":
            return structlin.LowRank(a[None], a[:, None] / 9) + structlin.Diagonal(a)
        if name == "Toeplitz":
            return structlin.Toeplitz(a.at[0].add(n))
        if name == "GMRES":
            return structlin.Diagonal(a) @ K + K
        return cola.PSD(K + a[-1] * cola.ops.I_like(K))

    def solved(a, X):
        A = make(a[0])
        if name == "cg":
            return linalg.cg(A, X, preconditioner=structlin.Diagonal(1 / jnp.arange(1.0, 7)), tolerance=1e-12)
        if name == "GMRES":
            with linalg.dense_limit(2):
                return cola.inv(A, cola.linalg.Auto(tol=1e-12)) @ X
        if name == "inverse":
            return cola.inv(A) @ X
        if name == "norm":
            return structlin.spectral_norm(A, tolerance=1e-12) * X
        return linalg.solve(A, X)

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("d",))
    first, second = (P(), P(None, "d")) if shared else (P("d"), P())
    mapped = jax.jit(jax.shard_map(solved, mesh=mesh, in_specs=(first, second), out_specs=P(None, "d")))

    def wanted(a):
        dense = np.asarray(make(jnp.asarray(a[0])).to_dense())
        return np.linalg.norm(dense, 2) * X if name == "norm" else np.linalg.solve(dense, X)

    V = np.random.default_rng(2).standard_normal((n, 4))
    step = SLOPE * np.random.default_rng(3).standard_normal((1, n))
    np.testing.assert_allclose(mapped(a, X), wanted(a), rtol=1e-9, atol=1e-9)
    gradient = jax.grad(lambda a: (mapped(a, X) * V).sum())(a)
    slope = ((wanted(a + step) - wanted(a - step)) * V).sum() / 2
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=1e-5)
