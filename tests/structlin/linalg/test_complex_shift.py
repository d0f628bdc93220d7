"""Functions of operators with real and complex parts: members, thin factors and multiples of the identity."""

import cola
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from cola.ops import I_like, Product

import structlin as sl
from structlin import linalg
from structlin.testing import to_numpy

MAKE = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}
RNG = np.random.default_rng(0)

x, y, rest = (0.3 * RNG.standard_normal((n, n)) for n in (2, 3, 3))
real, other = 2 * np.eye(2) + x, 3 * np.eye(3) + y  # no eigenvalue is near the branch cut of the logarithm
turned = other + 1j * rest
U, V = RNG.standard_normal((6, 2)), RNG.standard_normal((2, 6))
W = V + 1j * RNG.standard_normal((2, 6))
b = RNG.standard_normal(6) + 1j * RNG.standard_normal(6)


def hermitian(m):
    return m + m.conj().T


# of a function that makes arrays
BASES = {
    "real members": lambda f: sl.Kronecker(f(real), f(other)),
    "real sum": lambda f: cola.kronsum(sl.Dense(f(real)), sl.Dense(f(other))),
    "symmetric members": lambda f: sl.Kronecker(f(hermitian(real)), f(hermitian(other))),
    "real, complex": lambda f: cola.kron(cola.ops.Dense(f(real)), cola.ops.Dense(f(turned))),
    "complex, real": lambda f: cola.kron(cola.ops.Dense(f(turned)), cola.ops.Dense(f(real))),
    "real + complex": lambda f: cola.kronsum(sl.Dense(f(real)), sl.Dense(f(turned))),
    "symmetric, Hermitian": lambda f: cola.kron(
        cola.ops.Dense(f(hermitian(real))), cola.ops.Dense(f(hermitian(turned)))
    ),
    "complex multiple": lambda f: (1 - 0.5j) * sl.Kronecker(f(real), f(other)),
    "real low rank": lambda f: sl.LowRank(f(V), f(U)),
    "real product": lambda f: Product(cola.ops.Dense(f(U)), cola.ops.Dense(f(V))),
    "real and complex factor": lambda f: Product(cola.ops.Dense(f(U)), cola.ops.Dense(f(W))),
}
FUNCTIONS = {
    "expm": (linalg.expm, scipy.linalg.expm),
    "sqrtm": (linalg.sqrtm, lambda m: scipy.linalg.sqrtm(m.astype(complex))),
    "logm": (linalg.logm, lambda m: scipy.linalg.logm(m.astype(complex))),
    "apply": (lambda A: linalg.apply(lambda x: x**2 + 1 / x, A), lambda m: m @ m + np.linalg.inv(m)),
    "inv": (cola.inv, np.linalg.inv),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("backend", MAKE)
@pytest.mark.parametrize("shift", [4.0, 0.5 + 2j, None])
@pytest.mark.parametrize("base", BASES)
def test_functions_of_real_and_complex_parts(base, shift, backend):
    make = MAKE[backend]
    K = BASES[base](make)
    A = K if shift is None else K + shift * I_like(K)
    if A.shape[0] > np.linalg.matrix_rank(to_numpy(A.to_dense())):
        pytest.skip("a product of low rank has no logarithm")
    dense = to_numpy(A.to_dense())
    for name, (ours, theirs) in FUNCTIONS.items():
        wanted = theirs(dense)
        np.testing.assert_allclose(to_numpy(ours(A).to_dense()), wanted, atol=1e-9 * abs(wanted).max(), err_msg=name)
    sign, log = linalg.slogdet(A)
    np.testing.assert_allclose([complex(sign), complex(log)], np.linalg.slogdet(dense), rtol=1e-10)
    assert ("complex" in str(sign.dtype)) == ("complex" in str(A.dtype))
    np.testing.assert_allclose(linalg.logdet(A), log, rtol=1e-12)
    values = to_numpy(linalg.eigvals(A))
    distance = abs(values[:, None] - np.linalg.eigvals(dense))
    assert max(distance.min(0).max(), distance.min(1).max()) < 1e-9
    np.testing.assert_allclose(to_numpy(sl.solve(A, make(b))), np.linalg.solve(dense, b), rtol=1e-9)


@pytest.mark.parametrize("backend", MAKE)
@pytest.mark.parametrize("kind", [cola.kron, cola.kronsum])
def test_decompositions_of_a_symmetric_and_a_hermitian_member(kind, backend):
    make = MAKE[backend]
    members = (sl.Dense(make(hermitian(real))), sl.Dense(make(hermitian(turned))))
    A = cola.SelfAdjoint(kind(*members))
    A = 2.0 * cola.SelfAdjoint(A + (0.5 + 0j) * I_like(A))
    dense = to_numpy(A.to_dense())
    values, vectors = linalg.eigsh(A, 6)
    assert "complex" not in str(values.dtype)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense), rtol=1e-12)
    vectors = to_numpy(vectors.to_dense())
    np.testing.assert_allclose(vectors * to_numpy(values) @ vectors.conj().T, dense, atol=1e-12 * abs(dense).max())
    wanted = scipy.linalg.expm(dense)
    np.testing.assert_allclose(to_numpy(linalg.expm(A).to_dense()), wanted, rtol=1e-9)


@pytest.mark.parametrize("add", [False, True])
def test_gradients_reach_real_members_and_a_complex_shift(add):
    def value(xp, c, first, second):
        members = sl.Dense(first), sl.Dense(second)
        K = cola.kronsum(*members) if add else cola.kron(*members)
        A = K + c * I_like(K)
        sign, log = linalg.slogdet(A)
        return log + sign.real + sign.imag

    arrays = (0.5 + 2j, real, other)
    leaves = [torch.tensor(a, dtype=None if i else torch.complex128, requires_grad=True) for i, a in enumerate(arrays)]
    assert torch.autograd.gradcheck(lambda *a: value(torch, *a), leaves)
    found = torch.autograd.grad(value(torch, *leaves), leaves)
    traced = jax.jit(jax.grad(lambda *a: value(jnp, *a), (0, 1, 2)))(*map(jnp.asarray, arrays))
    for f, t in zip(found, traced, strict=True):
        np.testing.assert_allclose(f, np.conj(t), rtol=1e-10)
