"""StructuredOperator against dense float64 matrices, on NumPy, torch and jax."""

import copy
import pickle
import timeit
from dataclasses import dataclass

import cola
import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
from helpers.arrays import BACKENDS, MAKE, TYPES, draw, on_host, same
from helpers.refusals import refused
from hypothesis import given, settings
from hypothesis import strategies as st

import structlin
from structlin.operators import StructuredOperator
from structlin.structure import AbstractStructure, Factor, Structure

DTYPES = ("float32", "float64", "complex64", "complex128")
TOLERANCE = {"float32": 2e-6, "complex64": 2e-6, "float64": 1e-14, "complex128": 1e-14}

CHAINS = {
    "dense": Structure.parse("i,io->o", i=4, o=7),
    "low_rank": Structure.parse("i,ri->r; r,or->o", i=7, r=2, o=5),
    "kronecker": Structure.parse("ij,ia->aj; aj,jb->ab", i=2, j=3, a=5, b=4),
    "block_tensor_train": Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=2, f=5, r=2, e=7),
    "padded": Structure.parse("pa,pao->po", p=3, a=4, o=5, d_in=11, d_out=13),
}


@dataclass(frozen=True)
class Gather(AbstractStructure):
    """y = x[index]: a structure whose only factor is an index."""

    n: int
    scatter: bool = False

    @property
    def d_in(self):
        return self.n

    d_out = d_in

    @property
    def factors(self):
        return (Factor("index", (self.n,), 1, 1, self.n, trainable=False),)

    @property
    def macs(self):
        return 0

    def transpose(self):
        return Gather(self.n, not self.scatter)

    def transpose_factors(self, factors):
        return tuple(factors)

    def _index(self, factors, xp):
        return xp.argsort(factors[0]) if self.scatter else factors[0]

    def _rows(self, factors, x, xp):
        return x[:, self._index(factors, xp)]

    def _columns(self, factors, x, xp):
        return x[self._index(factors, xp)]


class Orthogonal(StructuredOperator):
    """A named operator with a constructor of its own, and annotated as a class."""

    def __init__(self, index):
        super().__init__(Gather(len(index)), (index,))

    @classmethod
    def _own_annotations(cls, structure):
        return frozenset({cola.Unitary})


def arrays(structure, dtype="float64", seed=0):
    return [draw(*f.shape, dtype=dtype, seed=seed + i) for i, f in enumerate(structure.factors)]


def operator(structure, backend="torch", dtype="float64", seed=0):
    return StructuredOperator(structure, [MAKE[backend](a) for a in arrays(structure, dtype, seed)])


def dense(structure, dtype="float64", seed=0):
    """The matrix by one einsum over all factors at once, in double precision."""
    wide = "complex128" if dtype.startswith("complex") else "float64"
    steps = structure.steps
    spec = ",".join(s.factor for s in steps)
    spec += "->" + steps[-1].output + steps[0].input
    shared = set(steps[-1].output) & set(steps[0].input)
    factors = [a.astype(wide) for a in arrays(structure, dtype, seed)]
    for axis in sorted(shared):  # an axis carried from input to output: an identity of its own
        new = axis.upper()
        factors.append(np.eye(dict(structure.sizes)[axis]))
        left, right = spec.split("->")
        out, inner = right[: len(steps[-1].output)], right[len(steps[-1].output) :]
        spec = f"{left},{new}{axis}->{out.replace(axis, new)}{inner}"
    full = np.einsum(spec, *factors)
    inner = np.prod([dict(structure.sizes)[a] for a in steps[0].input])
    return full.reshape(-1, inner)[: structure.d_out, : structure.d_in]


def close(x, want, dtype="float64", backend=None):
    if backend is not None:
        assert isinstance(x, TYPES[backend])
        assert str(x.dtype).removeprefix("torch.") == dtype
    same(x, want, 40 * TOLERANCE[dtype])


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_chain = pytest.mark.parametrize("chain", CHAINS)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, d) for b in BACKENDS for d in DTYPES if b != "jax" or d == "complex128"]
)
@each_chain
def test_products_transpose_and_adjoint_equal_the_dense_matrix(backend, chain, dtype):
    structure = CHAINS[chain]
    A, M = operator(structure, backend, dtype), dense(structure, dtype)
    d_out, d_in = A.shape
    assert A.shape == structure.shape == M.shape
    assert A.backend == backend
    X, R = draw(d_in, 3, dtype=dtype, seed=10), draw(2, 3, d_out, dtype=dtype, seed=11)
    make = MAKE[backend]
    close(A @ make(X), M @ X, dtype, backend)
    close(A @ make(X[:, 0].copy()), M @ X[:, 0], dtype, backend)
    close(make(R) @ A, R @ M, dtype, backend)
    close(make(R[0, 0].copy()) @ A, R[0, 0] @ M, dtype, backend)
    close(A.to_dense(), M, dtype, backend)
    close(A.T.to_dense(), M.T, dtype, backend)
    close(A.H.to_dense(), M.conj().T, dtype, backend)
    close(A.conj().to_dense(), M.conj(), dtype, backend)
    close(A.T @ make(R[0].T.copy()), M.T @ R[0].T, dtype, backend)
    close(make(X.T.copy()) @ A.H, X.T @ M.conj().T, dtype, backend)


@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 4), a=st.integers(1, 4), f=st.integers(1, 4), r=st.integers(1, 3), e=st.integers(1, 4))
def test_both_products_agree_at_any_size(p, a, f, r, e):
    structure = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=p, a=a, f=f, r=r, e=e)
    A, M = operator(structure, "numpy"), dense(structure)
    close(A.to_dense(), M)
    close(np.eye(A.shape[0]) @ A, M)
    close(A @ np.zeros((A.shape[1], 0)), np.zeros((A.shape[0], 0)))


@each_backend
def test_transposing_twice_gives_the_operator_back(backend):
    A = operator(CHAINS["padded"], backend, "complex128")
    assert A.T.T.structure == A.H.H.structure == A.structure
    close(A.H.H.to_dense(), on_host(A.to_dense()), "complex128")
    assert type(Orthogonal(MAKE[backend]([2, 0, 1])).T) is Orthogonal


@each_backend
def test_dtypes_are_promoted_as_colas_operators_do(backend):
    structure = CHAINS["low_rank"]
    A, M, make = operator(structure, backend, "float32"), dense(structure, "float32"), MAKE[backend]
    for dtype in ("float64", "complex128"):
        X = draw(7, 3, dtype=dtype, seed=5)
        close(A @ make(X), M @ X, dtype, backend)
        close(make(X.T.copy()) @ A.T, X.T @ M.T, dtype, backend)
    wide = operator(structure, backend, "float64") @ make(np.ones((7, 3), np.float32))
    assert str(wide.dtype).endswith("float64")
    close(operator(structure, backend) @ make(np.arange(7)), dense(structure) @ np.arange(7))


TRANSFORMS = (structlin.Cosine, structlin.Hadamard, structlin.Fourier)


@each_backend
def test_integers_are_converted_to_the_dtype_of_the_operator(backend):
    made = [cls(8, backend=backend, dtype="float64") for cls in TRANSFORMS]
    for name in set(structlin.structure_names()) - {"permutation"}:  # which keeps values and dtype
        cls = structlin.structure_class(name)
        shape, options = cls.examples[0]
        made.append(cls.random(shape, seed=1, backend=backend, dtype="float64", **options))
    for A in made:
        dtype = str(A.dtype).removeprefix("torch.")
        M = on_host(A.to_dense())
        for kind in ("int64", "int8", "bool"):
            X = np.arange(M.shape[1] * 6).reshape(2, M.shape[1], 3).astype(kind)
            for got, want in ((A @ MAKE[backend](X[0, :, 0]), M @ X[0, :, 0]), (A @ MAKE[backend](X), M @ X)):
                close(got, want, dtype, backend)
            Y = np.arange(3 * M.shape[0]).reshape(3, -1).astype(kind)
            for got in (MAKE[backend](Y) @ A, (A.T @ MAKE[backend](Y.T.copy())).T):
                close(got, Y @ M, dtype, backend)
    x = MAKE[backend](np.arange(8))
    for cls in TRANSFORMS:  # a structure has no dtype, but does not truncate
        A = cls(8, backend=backend)
        np.testing.assert_allclose(
            on_host(A.structure.apply(A.factors, x)), on_host(A.to_dense()) @ np.arange(8), atol=1e-5
        )


def test_operators_and_numpy_arrays():
    structure = CHAINS["low_rank"]
    A = operator(structure, "numpy")
    assert (A.xnp.__name__, A.device) == ("cola.backends.np_fns", None)
    close(A @ np.ones(7), dense(structure) @ np.ones(7), backend="numpy")
    close(operator(structure, "jax") @ np.ones(7), dense(structure) @ np.ones(7), backend="jax")
    close(np.ones(5) @ operator(structure, "jax"), np.ones(5) @ dense(structure), backend="jax")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("torch", "numpy"), ("torch", "jax"), ("numpy", "torch"), ("numpy", "jax"), ("jax", "torch")]
)
def test_mixed_libraries_are_refused(ours, theirs):
    A, x = operator(CHAINS["low_rank"], ours), MAKE[theirs](np.ones(7))
    with pytest.raises(TypeError, match=f"{ours} operator and a {theirs} array"):
        A @ x
    with pytest.raises(TypeError, match=f"{ours} operator and a {theirs} array"):
        A + MAKE[theirs](np.ones((5, 7)))
    for combine in (lambda A, B: A @ B.T, lambda A, B: A + B):
        with pytest.raises(TypeError, match=f"{ours} operator and a {theirs} operator"):
            combine(A, operator(CHAINS["low_rank"], theirs))
    with pytest.raises(TypeError, match="arrays of one library"):
        StructuredOperator(A.structure, (A.factors[0], MAKE[theirs](np.ones((5, 2)))))


@each_backend
def test_wrong_shapes_are_refused(backend):
    A, make = operator(CHAINS["low_rank"], backend), MAKE[backend]
    for shape in [(5,), (5, 7), (7, 2, 2), ()]:
        with pytest.raises(ValueError, match=r"needs an array of shape \(7,\) or"):
            A @ make(np.ones(shape))
    for shape in [(7,), (5, 7), ()]:
        with pytest.raises(ValueError, match=r"needs an array of shape \(\.\.\., 5\)"):
            A.__rmatmul__(make(np.ones(shape)))
    with pytest.raises(ValueError, match="7 != 5"):
        A @ A
    with pytest.raises(TypeError, match="expected a NumPy array"):
        A @ [1.0] * 7
    with pytest.raises(TypeError, match="expected a NumPy array"):
        A + 2
    with pytest.raises(ValueError, match="mismatch"):
        A + make(np.ones((7, 5)))
    refused(ValueError, "shape", StructuredOperator, A.structure, A.factors[::-1])
    refused(ValueError, "has 2 factors, got 1", StructuredOperator, A.structure, A.factors[:1])
    refused(TypeError, "AbstractStructure", StructuredOperator, "i,io->o", A.factors)


def test_an_operator_is_immutable():
    A = operator(CHAINS["dense"])
    for name in ("factors", "structure", "dtype", "shape", "gain"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(A, name, None)


@each_backend
def test_to_moves_the_leaves_and_the_dtype_together(backend):
    structure = CHAINS["block_tensor_train"]
    A = operator(structure, backend, "float64")
    B = A.to(dtype="float32")
    assert {str(f.dtype).removeprefix("torch.") for f in B.factors} == {"float32"}
    assert B.dtype == B.factors[0].dtype
    close(B.to_dense(), dense(structure), "float32", backend)
    assert A.dtype != B.dtype
    assert A.to(A.device, dtype=B.dtype).dtype == B.dtype
    assert A.to("cpu").device == A.device
    assert B.to(dtype="complex128").to_dense().dtype == B.to(dtype="complex128").dtype
    refused(ValueError, "imaginary", B.to(dtype="complex64").to, dtype="float32")
    refused(ValueError, "floating or complex, got int32", A.to, dtype="int32")
    refused(TypeError, r"write \.to\(dtype=\.\.\.\)", A.to, A.dtype)
    with pytest.raises((ValueError, RuntimeError)):
        A.to("nowhere")


def test_to_the_meta_device_and_to_double_precision_that_jax_would_drop():
    A = operator(CHAINS["dense"], "torch").to("meta", dtype=torch.bfloat16)
    assert (A.device, A.dtype) == (torch.device("meta"), torch.bfloat16)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        operator(CHAINS["dense"], "jax", "float32").to(dtype="float64")


@each_backend
def test_an_index_operator_declares_its_dtype(backend):
    make = MAKE[backend]
    P = Orthogonal(make([2, 0, 3, 1]))
    M = np.eye(4)[[2, 0, 3, 1]]
    default = "float32" if backend == "torch" else "float64"
    assert str(P.dtype).removeprefix("torch.") == default
    close(P.to_dense(), M, default, backend)
    close(P.T.to_dense(), M.T, default, backend)
    half = P.to(dtype="complex64")
    assert str(half.dtype).endswith("complex64")
    assert half.T.dtype == half.dtype
    assert half.factors[0].dtype == P.factors[0].dtype
    x = draw(4, 2, dtype="float32", seed=1)
    close(half @ make(x), M @ x, "float32", backend)
    other = StructuredOperator(Gather(4), P.factors, dtype="float32")
    assert str(other.dtype).endswith("float32")
    with pytest.raises(ValueError, match="cannot have dtype float32"):
        StructuredOperator(CHAINS["dense"], operator(CHAINS["dense"], backend).factors, dtype="float32")


@each_backend
def test_annotations_follow_the_class_and_the_user(backend):
    P = Orthogonal(MAKE[backend]([2, 0, 1]))
    assert P.isa(cola.Unitary)
    assert P.T.isa(cola.Unitary)
    A = operator(Structure.parse("i,io->o", i=3, o=3), backend)
    assert not A.isa(cola.SelfAdjoint)
    B = cola.PSD(A)
    assert B.isa(cola.SelfAdjoint)
    assert type(B) is type(A)
    assert not A.annotations
    for C in (B.T, B.H, B.conj(), B.to(dtype="float32"), copy.copy(B), pickle.loads(pickle.dumps(B))):
        assert C.isa(cola.PSD)
    tall = cola.Stiefel(operator(Structure.parse("i,io->o", i=3, o=5), backend))
    assert not tall.T.isa(cola.Stiefel)
    assert tall.conj().isa(cola.Stiefel)


@each_backend
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))])
def test_copies(backend, clone):
    for A in (operator(CHAINS["padded"], backend), cola.Unitary(Orthogonal(MAKE[backend]([1, 2, 0])))):
        B = clone(A)
        assert type(B) is type(A)
        assert B.structure == A.structure
        assert B.annotations == A.annotations
        assert B.dtype == A.dtype
        close(B.to_dense(), on_host(A.to_dense()), str(A.dtype).removeprefix("torch."))
        if clone is copy.deepcopy:
            assert B.factors[0] is not A.factors[0]


@pytest.mark.parametrize("name", structlin.structure_names())
def test_every_named_operator_is_one_of_these(name):
    cls = structlin.structure_class(name)
    for shape, options in cls.examples:
        A = cls.random(shape, seed=1, backend="torch", dtype="float64", **options)
        M = A.to_dense().numpy()
        for B in (A.T.T, copy.deepcopy(A), pickle.loads(pickle.dumps(A)), A.flatten()[1](A.flatten()[0])):
            assert type(B) is cls
            assert B.structure == A.structure
            close(B.to_dense(), M)
        close(A.T.to_dense(), M.T)
        close(cola.fns.transpose(A).to_dense(), M.T)
        close(cola.fns.adjoint(A).to_dense(), M.T)
        wide = A.to(dtype="complex128")
        assert wide.dtype == torch.complex128
        close(torch.eye(shape[0], dtype=torch.complex128) @ wide, M, "complex128")
        assert isinstance(cola.fns.transpose(A), cls)
        assert cola.annotations.get_annotations(A) == A.annotations


def test_pytree_of_jax():
    A = operator(CHAINS["low_rank"], "jax")
    leaves, tree = jax.tree_util.tree_flatten(A)
    assert len(leaves) == 2
    assert jax.tree_util.tree_unflatten(tree, leaves).structure == A.structure
    assert tree == jax.tree_util.tree_structure(operator(CHAINS["low_rank"], "jax", seed=3))
    assert tree != jax.tree_util.tree_structure(cola.PSD(A))
    for leaf in (None, object(), 0):
        B = jax.tree_util.tree_unflatten(tree, [leaf, leaf])
        assert B.shape == A.shape
        assert B.device is None
        assert "leaves=" in repr(B)
    half = jax.tree.map(lambda x: x.astype("float32"), A)
    assert half.dtype == half.to_dense().dtype == jnp.float32


def test_pytree_of_torch_and_cola():
    A = operator(CHAINS["low_rank"])
    leaves, tree = torch.utils._pytree.tree_flatten(A)
    assert all(x is y for x, y in zip(leaves, A.factors, strict=True))
    assert torch.utils._pytree.tree_unflatten(leaves, tree).structure == A.structure
    leaves, unflatten = A.flatten()
    assert all(x is y for x, y in zip(leaves, A.factors, strict=True))
    close(unflatten([2 * x for x in leaves]).to_dense(), 4 * dense(A.structure))
    doubled = optree.tree_map(lambda x: 2 * x, cola.ops.Product(A, A.T), namespace="cola")
    close(doubled.to_dense(), 16 * dense(A.structure) @ dense(A.structure).T)


def test_jit_grad_and_vmap_of_jax_with_the_operator_as_argument():
    structure = CHAINS["block_tensor_train"]
    A, M = operator(structure, "jax"), dense(structure)
    x = draw(6, seed=4)
    traces = []

    @jax.jit
    def apply(A, x):
        traces.append(A.shape)
        return A @ x

    for _ in range(2):
        close(apply(A, x), M @ x)
    close(apply(operator(structure, "jax", seed=9), x), dense(structure, seed=9) @ x)
    assert len(traces) == 1

    grad = jax.jit(jax.grad(lambda A: jnp.sum((A @ x) ** 2)))(A)
    assert isinstance(grad, StructuredOperator)
    step = 1e-6
    loss = lambda fs: np.sum((StructuredOperator(structure, fs) @ x) ** 2)  # noqa: E731
    factors = arrays(structure)
    up, down = copy.deepcopy(factors), copy.deepcopy(factors)
    up[1][1, 2, 1, 0] += step
    down[1][1, 2, 1, 0] -= step
    assert float(grad.factors[1][1, 2, 1, 0]) == pytest.approx((loss(up) - loss(down)) / (2 * step), rel=1e-6)

    stack = jax.tree.map(lambda *f: jnp.stack(f), A, operator(structure, "jax", seed=9))
    batched = jax.vmap(lambda A: A @ x)(stack)
    close(batched, np.stack([M @ x, dense(structure, seed=9) @ x]))


def test_gradients_and_torch_func_with_the_operator_as_argument():
    structure = CHAINS["block_tensor_train"]
    A, M = operator(structure), dense(structure)
    x = torch.tensor(draw(6, seed=4))
    leaves = [f.clone().requires_grad_() for f in A.factors]
    ((StructuredOperator(structure, leaves) @ x) ** 2).sum().backward()
    grad = torch.func.grad(lambda A: ((A @ x) ** 2).sum())(A)
    assert isinstance(grad, StructuredOperator)
    for leaf, g in zip(leaves, grad.factors, strict=True):
        assert leaf.grad.abs().max() > 0
        torch.testing.assert_close(leaf.grad, g)
    # A = dA/d(factor) . factor for each factor, so <factor, grad> is twice the loss.
    for f, g in zip(A.factors, grad.factors, strict=True):
        assert float((f * g).sum()) == pytest.approx(2 * np.sum((M @ x.numpy()) ** 2))

    other = operator(structure, seed=9)
    stack = StructuredOperator._build(structure, tuple(map(torch.stack, zip(A.factors, other.factors, strict=True))))
    batched = torch.func.vmap(lambda A: A @ x)(stack)
    close(batched, np.stack([M @ x.numpy(), dense(structure, seed=9) @ x.numpy()]))


@pytest.mark.slow
def test_both_products_compile_as_one_graph():
    for structure in (CHAINS["block_tensor_train"], CHAINS["padded"]):
        A, M = operator(structure), dense(structure)
        X, R = torch.tensor(draw(A.shape[1], 3, seed=1)), torch.tensor(draw(2, 3, A.shape[0], seed=2))
        right = torch.compile(lambda x, A=A: A._matmat(x), fullgraph=True)
        left = torch.compile(lambda x, A=A: A.__rmatmul__(x), fullgraph=True)
        close(right(X), M @ X.numpy())
        close(left(R), R.numpy() @ M)


def test_building_an_operator_takes_microseconds():
    A = operator(CHAINS["block_tensor_train"])
    build = StructuredOperator._build
    seconds = min(timeit.repeat(lambda: build(A.structure, A.factors), number=200, repeat=5)) / 200
    assert seconds < 20e-6


@each_backend
def test_repr_names_structure_dtype_and_library(backend):
    text = repr(operator(CHAINS["dense"], backend, "float32"))
    assert text == f"StructuredOperator({CHAINS['dense']!r}, dtype=float32, backend={backend})"
