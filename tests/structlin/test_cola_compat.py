"""Composing our operators with CoLA's, and every defect of CoLA that structlin repairs.

Each function in DEFECTS uses CoLA alone and raises where CoLA is broken. Run as a script, this file makes all repairs
but one, for each repair in turn, and prints what its defects then do. The tests ask that each of them fails there (else
the repair is no longer needed) and passes here, where structlin is imported.
"""

import copy
import importlib.util
import inspect
import io
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import cola
import jax
import jax.numpy as jnp
import numpy as np
import plum
import pytest
import torch
from beartype.door import TypeHint
from cola.annotations import PSD, SelfAdjoint, Stiefel, Unitary
from cola.ops import (
    BlockDiag,
    Concatenated,
    Dense,
    I_like,
    Identity,
    Kronecker,
    KronSum,
    LinearOperator,
    Permutation,
    Product,
    Sum,
    Transpose,
)
from helpers.arrays import BACKENDS, MAKE, draw, on_host, positive, same
from helpers.children import output

DEFECTS = {}


def defect(repair):
    """Register a function that raises where ``repair`` has not been made."""

    def register(function):
        DEFECTS[function.__name__] = (repair, function)
        return function

    return register


def raises(kind, function):
    try:
        function()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def pair(backend, n=3):
    make = MAKE[backend]
    a, b = draw(n, n, seed=1), draw(n, n, seed=2)
    return a, b, Dense(make(a)), Dense(make(b))


def pairs(*backends):
    return [(MAKE[backend], *pair(backend)) for backend in backends or ("torch", "jax")]


# -- composing: any ----------------------------------------------------------------------------------------------------


@defect("any")
def plus():
    for make, a, b, A, B in pairs():
        for C in (A + B, A + make(b), make(b) + A):
            same(C.to_dense(), a + b)


@defect("any")
def difference():
    for _, a, b, A, B in pairs():
        same((A - B).to_dense(), a - b)
        same((A @ A.T + I_like(A)).to_dense(), a @ a.T + np.eye(3))


@defect("any")
def kron():
    for _, a, b, A, B in pairs():
        same(cola.kron(A, B).to_dense(), np.kron(a, b))


@defect("any")
def kronsum():
    for _, a, b, A, B in pairs():
        same(cola.kronsum(A, B).to_dense(), np.kron(a, np.eye(3)) + np.kron(np.eye(3), b))


# -- composing: overlap ------------------------------------------------------------------------------------------------


@defect("overlap")
def identity():
    I = Identity((3, 3), torch.float64)  # noqa: E741
    assert isinstance(I @ I, Identity)


@defect("overlap")
def kron_of_krons():
    a, b, A, B = pair("torch", 2)
    K = Kronecker(A, B)
    same(cola.kron(K, K).to_dense(), np.kron(np.kron(a, b), np.kron(a, b)))


@defect("overlap")
def kronsum_of_kronsums():
    a, b, A, B = pair("torch", 2)
    s = np.kron(a, np.eye(2)) + np.kron(np.eye(2), b)
    S = KronSum(A, B)
    same(cola.kronsum(S, S).to_dense(), np.kron(s, np.eye(4)) + np.kron(np.eye(4), s))


# -- composing: the rest -----------------------------------------------------------------------------------------------


@defect("library")
def numpy_stays():
    _, _, A, B = pair("numpy")
    for op in (A, A @ B, 2.0 * A, A.T @ B, Kronecker(A, B), BlockDiag(A, B), Transpose(A), cola.PSD(A)):
        assert type(op.to_dense()) is np.ndarray
        assert op.to_dense().dtype == np.float64
        assert type(op @ np.ones(op.shape[1])) is np.ndarray
    assert type(cola.inv(A) @ np.ones(3)) is np.ndarray
    bare = LinearOperator(A.dtype, A.shape, A._matmat)  # its only hint is whose product it is
    assert bare.xnp.__name__ == "cola.backends.np_fns"
    made = cola.linalg.log(cola.PSD(bare), cola.linalg.Lanczos())  # which gets its operator after its library
    assert made.xnp.__name__ == "cola.backends.np_fns"


@defect("library")
def leaves_after_numpy():
    class Held(LinearOperator):
        def __init__(self, A):
            self.A = A
            super().__init__(A.dtype, A.shape)

    assert len(Held(np.ones((2, 2))).flatten()[0]) == 1
    assert len(Held(torch.ones(2, 2)).flatten()[0]) == 1


@defect("scaling")
def complex_scalar():
    for _, a, _, A, _ in pairs():
        same((1j * A).to_dense(), 1j * a)
        assert "complex128" in str((1j * A).dtype)


@defect("scaling")
def array_scalar():
    _, _, A, _ = pair("torch")
    raises(ValueError, lambda: A * torch.ones(3))
    raises(TypeError, lambda: A * A)
    same((A * torch.tensor([2.0])).to_dense(), 2 * on_host(A.to_dense()))


@defect("scaling")
def scalar_inverse():
    for make, a, _, A, _ in pairs(*BACKENDS):
        got = cola.inv(2.0 * A) @ make(draw(3))
        assert type(got) is type(make(draw(3)))
        same(got, np.linalg.solve(2 * a, draw(3)))
        S = 2.0 * I_like(A)
        same((cola.linalg.pinv(getattr(S, "Ms", [S])[0]) @ A).to_dense(), a / 2)


@defect("subtract")
def dense_minus():
    for make, a, b, A, _ in pairs():
        same((make(b) - A).to_dense(), b - a)
        same((0 - A).to_dense(), -a)


@defect("slicing")
def row():
    for backend in ("torch", "jax"):
        a = draw(2, 3)
        A = Dense(MAKE[backend](a))
        same(A[1], a[1])
        same(A[-1], a[-1])
        same(A[np.int64(0), 2], a[0, 2])
        same(A[1, 1:], a[1, 1:])
        raises(IndexError, lambda A=A: A[2])


@defect("slicing")
def index_array():
    for backend in ("torch", "jax"):
        make, a = MAKE[backend], draw(4, 3)
        A = Dense(make(a))
        rows, columns = [2, 0, 3], [1, 2]
        for indices in (np.ix_(rows, columns), (make(rows)[:, None], make(columns)[None])):
            S = A[indices]
            same(S.to_dense(), a[rows][:, columns])
            same(make(draw(5, 3)) @ S, draw(5, 3) @ a[rows][:, columns])
        same(A[make(rows)].to_dense(), a[rows])
        same(A[np.array([True, False, False, True]), ::2].to_dense(), a[[0, 3], ::2])
        assert "[2, 0, 3]" in str(A[make(rows)])


@defect("slicing")
def index_pairs():
    a, b, A, B = pair("torch")
    for kind in (list, np.array, torch.tensor):
        same((A @ B)[kind([0, 2]), kind([1, 1])], (a @ b)[[0, 2], [1, 1]])


@defect("slicing")
def reversed_rows():
    for make, a, b, A, B in pairs(*BACKENDS):
        same((A @ B)[::-1].to_dense(), (a @ b)[::-1])
        same((A @ B)[:, ::-2] @ make(draw(2)), (a @ b)[:, ::-2] @ draw(2))


@defect("pickling")
def pickle_and_copy():
    for _, a, b, A, B in pairs(*BACKENDS):
        for C, want in ((A @ B, a @ b), (2.0 * A, 2 * a), (A.T, a.T), (A[:2], a[:2]), (BlockDiag(A, B), None)):
            for again in (pickle.loads(pickle.dumps(C)), copy.deepcopy(C), copy.copy(C)):
                assert type(again) is type(C)
                assert again.xnp is C.xnp
                same(again.to_dense(), on_host(C.to_dense()) if want is None else want)
    torch.save(Dense(torch.eye(2)) @ Dense(torch.ones(2, 2)), file := io.BytesIO())
    same(torch.load(io.BytesIO(file.getvalue()), weights_only=False).to_dense(), np.ones((2, 2)))


@defect("slicing")
def repeated_columns():
    a = draw(3, 4)
    S = Dense(torch.tensor(a))[:, np.array([1, 1, 0])]
    same(S @ torch.tensor(draw(3, 2)), a[:, [1, 1, 0]] @ draw(3, 2))
    R = Dense(torch.tensor(a))[np.array([2, 2])]
    same(torch.tensor(draw(5, 2)) @ R, draw(5, 2) @ a[[2, 2]])


@defect("slicing")
def complex_slice():
    for backend in ("torch", "jax"):
        a, x = draw(3, 4), draw(2, 5, dtype="complex128")
        same(Dense(MAKE[backend](a))[:, 1:3] @ MAKE[backend](x), a[:, 1:3] @ x)


@defect("slicing")
def empty_slice():
    raises(ValueError, lambda: Dense(torch.eye(3))[0:0, 0:0])


@defect("concat")
def concatenated():
    a, b, c = draw(2, 4, seed=1), draw(3, 4, seed=2), draw(2, 5, seed=3)
    for backend in ("torch", "jax"):
        make = MAKE[backend]
        A, B, C = (Dense(make(x)) for x in (a, b, c))
        along, across = (Concatenated(A, B), np.concatenate([a, b])), (Concatenated(A, C, axis=1), np.c_[a, c])
        for op, want in (along, across):
            assert tuple(op.shape) == want.shape
            same(op.to_dense(), want)
            same(op.T.to_dense(), want.T)
            same(make(draw(3, want.shape[0])) @ op, draw(3, want.shape[0]) @ want)
        raises(ValueError, lambda A=A, C=C: Concatenated(A, C))


@defect("rows")
def rows():
    a, b, c = draw(2, 3, seed=1), draw(4, 5, seed=2), draw(3, 3, seed=3)
    A, B, C = Dense(a), Dense(b), Dense(c)
    perm = np.array([2, 0, 1])
    for op, want in [
        (Kronecker(A, B), np.kron(a, b)),
        (KronSum(C, C), np.kron(c, np.eye(3)) + np.kron(np.eye(3), c)),
        (BlockDiag(A, B, multiplicities=[2, 1]), None),
        (Permutation(perm, np.float64), np.eye(3)[perm]),
        (2.0 * C, 2 * c),
        (C @ Identity((3, 3), np.float64), c),
        (cola.ops.Tridiagonal(a[0, :2], c[0], a[1, :2]), np.diag(a[0, :2], -1) + np.diag(c[0]) + np.diag(a[1, :2], 1)),
    ]:
        matrix = on_host(op.to_dense()) if want is None else want
        got = draw(7, op.shape[0]) @ op
        same(got, draw(7, op.shape[0]) @ matrix)
        assert type(got) is np.ndarray


@defect("clip")
def arnoldi():
    from cola.linalg.decompositions.decompositions import Arnoldi

    a = draw(6, 6)
    Q, H, _ = Arnoldi(max_iters=6, key=jax.random.PRNGKey(0))(Dense(jnp.array(a)))
    q, h = on_host(Q.to_dense()), on_host(H.to_dense())
    q, h = q.reshape(q.shape[-2:]), h.reshape(h.shape[-2:])
    same(q[:, :6].conj().T @ q[:, :6], np.eye(6))


@defect("devices")
def several_devices():
    device = jnp.zeros(()).device
    with mock.patch.object(jax, "devices", return_value=[device, device]):
        assert Identity((2, 2), jnp.float64).device == device
        same(jax.jit(lambda A, x: A @ x)(Dense(jnp.eye(2)), jnp.ones(2)), np.ones(2))


# -- numbers -----------------------------------------------------------------------------------------------------------


@defect("logdet_scalar")
def logdet_scalar():
    for backend in ("torch", "jax"):
        a = positive(3)
        A = cola.PSD(Dense(MAKE[backend](a)))
        same(cola.logdet(2.0 * A), np.linalg.slogdet(2 * a)[1])
        sign, value = cola.linalg.slogdet(-2.0 * A)
        same(sign, -1.0)
        same(value, np.linalg.slogdet(2 * a)[1])


@defect("logdet_permutation")
def logdet_parity():
    for backend in ("torch", "jax"):
        for seed in range(4):
            a = draw(5, 5, seed=seed)
            sign, value = cola.linalg.slogdet(Dense(MAKE[backend](a)))
            want = np.linalg.slogdet(a)
            same(sign, want[0])
            same(value, want[1])
    perm = [3, 0, 1, 4, 2, 5]
    want = np.linalg.det(np.eye(6)[perm])
    for make in (torch.tensor, jnp.array):
        same(cola.linalg.slogdet(Permutation(make(perm)))[0], want)
    traced = jax.jit(lambda p: cola.linalg.slogdet(Permutation(p, jnp.float64))[0])
    same(traced(jnp.array(perm)), want)
    same(traced(jnp.array([1, 0, 2, 3, 4, 5])), -1.0)


@defect("logdet_iterative")
def logdet_iterative():
    from cola.linalg.decompositions.decompositions import Lanczos
    from cola.linalg.trace.diagonal_estimation import Exact

    a = positive(4) / 50
    assert np.linalg.slogdet(a)[1] < 0
    value = cola.linalg.logdet(cola.PSD(Dense(torch.tensor(a))), Lanczos(max_iters=20, tol=1e-12), Exact())
    assert abs(float(value) - np.linalg.slogdet(a)[1]) < 1e-6


@defect("annotations")
def annotations():
    P, Q = (cola.PSD(Dense(torch.tensor(positive(3, seed=s)))) for s in (1, 2))
    U = cola.Unitary(Dense(torch.eye(3, dtype=torch.float64)))
    assert not (-P).isa(PSD)
    assert (-P).isa(SelfAdjoint)
    assert (2 * P).isa(PSD)
    assert (P + Q).isa(PSD)
    assert not (P - Q).isa(PSD)
    assert (P - Q).isa(SelfAdjoint)
    assert not (1j * P).isa(SelfAdjoint)
    assert not (2 * U).isa(Stiefel)
    assert (-U).isa(Unitary)
    assert (1j * U).isa(Unitary)
    assert not (U + U).isa(Unitary)
    C = LinearOperator(torch.complex128, (3, 3), matmat=lambda x: 1j * x)
    assert not (C @ C.T).isa(PSD)
    assert (C @ C.H).isa(PSD)
    tall = cola.Stiefel(LinearOperator(torch.float64, (3, 2), matmat=lambda x: x))
    assert not tall.T.isa(Stiefel)
    assert not tall.H.isa(Stiefel)
    assert (P @ I_like(P)).isa(PSD)


@defect("transpose")
def complex_transpose():
    a = positive(3, dtype="complex128")
    A = cola.SelfAdjoint(Product(Dense(torch.tensor(a)), Dense(torch.eye(3, dtype=torch.complex128))))
    same(A.T.to_dense(), a.T)
    same(A.H.to_dense(), a)


@defect("gradient")
def scalar_gradient():
    a, _, A, _ = pair("torch")
    scales = (1, lambda c: c * A), (1, lambda c: A * c), (1, lambda c: A / (1 / c)), (2, lambda c: c * (2 * A))
    for factor, scale in scales:
        c = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        (scale(c) @ torch.ones(3, dtype=torch.float64)).sum().backward()
        same(c.grad, factor * a.sum())


@defect("triangular")
def triangular_inverse():
    matrix, x = positive(3), draw(3, 2, dtype="complex128")
    for inverse in (cola.inv(Dense(torch.tensor(matrix))), cola.inv(PSD(Dense(torch.tensor(matrix))))):
        same(inverse @ torch.tensor(x), np.linalg.solve(matrix, x))
        same(torch.tensor(x.T) @ inverse, np.linalg.solve(matrix, x).T)


@defect("reciprocal")
def reciprocal():
    _, _, A, _ = pair("torch")
    raises(TypeError, lambda: 2.0 / A)


@defect("sum_dtype")
def sum_dtype():
    A, B = Dense(torch.ones(2, 2)), Dense(torch.ones(2, 2, dtype=torch.complex128))
    assert Sum(A, B).dtype == torch.complex128


@defect("views")
def transposed_kron():
    a = torch.tensor(draw(2, 3))
    found = Kronecker(Dense(a), Dense(torch.tensor(draw(4, 5, seed=1)).T)).to_dense()
    np.testing.assert_allclose(found, np.kron(a, draw(4, 5, seed=1).T))


@defect("moveaxis")
def vmapped_kron():
    a, b, x = draw(5, 2, 2), draw(3, 3), draw(5, 6)
    found = torch.vmap(lambda A, x: Kronecker(Dense(A), Dense(torch.tensor(b))) @ x)(torch.tensor(a), torch.tensor(x))
    same(found, np.stack([np.kron(A, b) @ y for A, y in zip(a, x, strict=True)]))


@defect("in_place")
def complex_kronsum():
    c, x = draw(2, 2, dtype="complex128"), draw(4)
    for make in (np.array, torch.tensor):
        same(KronSum(Dense(make(c)), Dense(make(c))) @ make(x), (np.kron(c, np.eye(2)) + np.kron(np.eye(2), c)) @ x)


@defect("stacks")
def stacks():
    for make, a, b, A, B in pairs(*BACKENDS):
        same((A @ B) @ make(draw(4, 2, 3, 5)), a @ b @ draw(4, 2, 3, 5))
        same(make(draw(4, 2, 5, 3)) @ Kronecker(A, B)[:3, 1:], draw(4, 2, 5, 3) @ np.kron(a, b)[:3, 1:])
        raises(ValueError, lambda A=A, make=make: A @ make(draw(3, 4, 2)))


@defect("like")
def numpy_identity():
    assert isinstance(I_like(Dense(draw(2, 2))).to_dense(), np.ndarray)


@defect("lookup")
def lookup_is_remembered():
    inv = plum.dispatch.functions["inv"]
    S = cola.ops.ScalarMul(torch.tensor(2.0), (2, 2), torch.float32)
    cola.inv(S, cola.linalg.Auto())
    assert (type(S), cola.linalg.Auto) in inv._cache


@defect("binding")
def binding_is_quick():
    abstract = [getattr(f, "_abstract", None) for f in plum.dispatch.functions.values()]
    cells = [cell.cell_contents for f in abstract for cell in getattr(f, "__closure__", None) or ()]
    slow = [x for x in cells if isinstance(x, inspect.Signature)]
    assert not [x for x in slow if all(p.kind is not p.VAR_POSITIONAL for p in x.parameters.values())]


@defect("annotating")
def annotating_keeps_members():
    A = Kronecker(Dense(positive(2)), Dense(positive(3)))
    assert PSD(A).Ms[0] is A.Ms[0]
    assert PSD(A).isa(PSD)
    assert not A.isa(PSD)


@defect("sums")
def sums_do_not_copy():
    class Strict(np.ndarray):
        def __radd__(self, other):
            raise AssertionError(f"{other!r} was added to the first term")

    A = LinearOperator(np.float64, (2, 2), matmat=lambda X: X.view(Strict))
    (A + A) @ np.ones((2, 1))


def errors(names):
    found = {}
    for name in names:
        try:
            DEFECTS[name][1]()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            found[name] = None
    return found


def without_each_repair():
    """By defect, the error that it makes where all repairs but its own are made; None where it makes none."""
    # A bare package in place of structlin, whose import would make all repairs.
    bare = types.ModuleType("structlin")
    bare.__path__ = list(importlib.util.find_spec("structlin").submodule_search_locations)
    sys.modules["structlin"] = bare
    from structlin._cola_compat import REPAIRS

    found = {}
    for left_out in REPAIRS:
        # In a child of its own, because a repair cannot be taken back; no array library has been started yet.
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for repair in REPAIRS:
                if repair is not left_out and repair.broken():
                    repair.apply()
            here = errors(name for name, (repair, _) in DEFECTS.items() if repair == left_out.name)
            os.write(writer, json.dumps(here).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found |= json.loads(pipe.read())
        os.waitpid(child, 0)
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(without_each_repair()))
    sys.exit()


# ----------------------------------------------------------------------------------------------------------------------
from structlin import _cola_compat  # noqa: E402


@pytest.fixture(scope="module")
def left_out():
    if not hasattr(os, "fork"):
        pytest.skip("each repair is left out in a forked process")
    return json.loads(output(__file__).splitlines()[-1])


@pytest.mark.parametrize("name", DEFECTS)
def test_the_defect_is_there_without_its_repair(name, left_out):
    if DEFECTS[name][0] == "any" and not TypeHint(Any) <= TypeHint(int):
        pytest.skip("this beartype orders Any above every type")
    assert left_out[name] is not None, f"{name} works without the repair {DEFECTS[name][0]!r}; remove the repair"


@pytest.mark.parametrize("name", DEFECTS)
def test_the_defect_is_gone_with_structlin(name):
    DEFECTS[name][1]()


def test_every_repair_is_documented_and_has_a_defect():
    assert {repair for repair, _ in DEFECTS.values()} == {repair.name for repair in _cola_compat.REPAIRS}
    text = " ".join(_cola_compat.__doc__.split())
    for repair in _cola_compat.REPAIRS:
        assert f" {repair.name} " in text
        names = [name for name, (of, _) in DEFECTS.items() if of == repair.name]
        assert f"[{', '.join(names)}]" in text
