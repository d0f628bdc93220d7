"""Counts against what torch, opt_einsum and XLA count, of structures, operators and CoLA's composites."""

import itertools
import math
import operator

import cola
import jax
import jax.numpy as jnp
import numpy as np
import opt_einsum
import pytest
import torch
from cola import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from opt_einsum.helpers import flop_count
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import structlin
from structlin import Structure, Work, design, execution, random_factors, register_work, structure_class, work_of
from structlin.testing import random_chain

EXAMPLES = [(name, *example) for name in structlin.structure_names() for example in structure_class(name).examples]
STRUCTURES = [design(name, shape, **options) for name, shape, options in EXAMPLES]
CHAINS = [s for s in STRUCTURES if isinstance(s, Structure)]
CHAINS.append(Structure.parse("pa,pqa->pq; gl,log->lo", p=3, a=3, q=4, g=4, l=3, o=5, d_in=7, d_out=13))


def counted_by_torch(call):
    """MACs of the matrix products in ``call()``."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


class ElementwiseCounter(TorchDispatchMode):
    """Elementwise additions, subtractions and multiplications, and those of sums."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.mul):
            self.flops += result.numel()
        elif func.overloadpacket is torch.ops.aten.sum:
            self.flops += args[0].numel() - result.numel()
        return result


# -- structures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", CHAINS, ids=repr)
@pytest.mark.parametrize("tokens", [1, 6])
def test_macs_of_chains_are_those_that_torch_counts(s, tokens):
    factors = random_factors(s, backend="torch", seed=0)
    rows = torch.zeros(tokens, s.d_in)
    assert counted_by_torch(lambda: s.apply(factors, rows)) == s.macs * tokens
    assert counted_by_torch(lambda: s.apply_columns(factors, rows.T)) == s.macs * tokens
    assert counted_by_torch(lambda: s.apply(factors, rows.reshape(tokens, 1, s.d_in))) == s.macs * tokens
    back = s.transpose()
    assert counted_by_torch(lambda: back.apply(factors[::-1], torch.zeros(tokens, s.d_out))) == s.macs * tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_macs_of_random_chains_are_those_that_torch_counts(seed, tokens):
    s = random_chain(np.random.default_rng(seed))
    factors = random_factors(s, backend="torch", seed=0)
    assert counted_by_torch(lambda: s.apply(factors, torch.zeros(tokens, s.d_in))) == s.macs * tokens
    assert counted_by_torch(lambda: s.apply_columns(factors, torch.zeros(s.d_in, tokens))) == s.macs * tokens


def segments(s):
    """The steps between two regroupings."""
    parts = [[s.steps[0]]]
    for before, step in itertools.pairwise(s.steps):
        if before.output == step.input:
            parts[-1].append(step)
        else:
            parts.append([step])
    return parts


def costs_by_opt_einsum(steps, sizes):
    """FLOPs of each contraction along the path that joins the input to one factor after the other."""
    equation = ",".join([steps[0].input, *(s.factor for s in steps)]) + "->" + steps[-1].output
    shapes = [tuple(sizes[a] for a in term) for term in equation.split("->")[0].split(",")]
    path = [(0, 1)] + [(0, len(steps) - k) for k in range(1, len(steps))]
    _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=path)
    costs = []
    for _, removed, pair, *_ in info.contraction_list:
        axes = set(pair.split("->")[0]) - {","}
        costs.append(flop_count(axes, bool(removed), 2, sizes))
    return costs, info.opt_cost


@pytest.mark.parametrize("s", CHAINS, ids=repr)
def test_macs_are_the_cost_that_opt_einsum_gives_the_same_path(s):
    sizes, number = dict(s.sizes), 0
    for steps in segments(s):
        costs, total = costs_by_opt_einsum(steps, sizes)
        own = [2 * f.numel * f.carried for f in s.factors[number : number + len(steps)]]
        assert costs == own
        assert total == sum(own)
        number += len(steps)
    assert number == len(s.factors)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_macs_of_random_chains_are_the_cost_of_opt_einsum(seed):
    """For a step that contracts nothing opt_einsum counts one FLOP where a MAC is two."""
    s = random_chain(np.random.default_rng(seed))
    sizes, number = dict(s.sizes), 0
    for steps in segments(s):
        costs, _ = costs_by_opt_einsum(steps, sizes)
        for step, f, cost in zip(steps, s.factors[number:], costs, strict=False):
            assert cost == f.numel * f.carried * (2 if step.contracted else 1)
        number += len(steps)


KINDS = ("dense", "low_rank", "kronecker", "block_tensor_train", "monarch", "blast", "einsum")
QUICK = [STRUCTURES[[name for name, *_ in EXAMPLES].index(kind)] for kind in KINDS]  # the first of each kind


@pytest.mark.parametrize("s", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in CHAINS], ids=repr)
def test_macs_are_those_that_xla_counts(s):
    """XLA's cost analysis of the compiled program agrees to the last FLOP, padding and permutations included."""
    factors, x = random_factors(s, backend="jax", seed=0), jnp.zeros((6, s.d_in), jnp.float32)
    for apply, v in ((s.apply, x), (s.apply_columns, x.T)):
        with execution.using("products"):
            assert jax.jit(apply).lower(factors, v).compile().cost_analysis()["flops"] == 2 * s.macs * 6


def test_other_work_of_structures_as_torch_does_it():
    s = design("diagonal", (7, 7))
    factors = random_factors(s, backend="torch", seed=0)
    with ElementwiseCounter() as counter:
        s.apply(factors, torch.ones(3, 7))
    assert counter.flops == 3 * s.other_flops["elementwise"]
    for s in STRUCTURES:
        if not isinstance(s, Structure):
            f = random_factors(s, backend="torch", seed=0)
            assert counted_by_torch(lambda s=s, f=f: s.apply(f, torch.ones(3, s.d_in))) == s.macs == 0


@pytest.mark.parametrize(("name", "shape", "options"), EXAMPLES, ids=str)
def test_operators_count_as_their_structure(name, shape, options):
    s = design(name, shape, **options)
    op = structure_class(name).random(shape, **options, seed=0)
    for x in (s, op):
        assert structlin.macs(x) == s.macs
        assert structlin.flops(x) == s.flops == 2 * s.macs + sum(s.other_flops.values())
        assert structlin.num_params(x) == s.num_params
        assert work_of(x).setup_flops == {k: n for k, n in s.setup_flops.items() if n}
    assert work_of(op, transposed=True).macs == work_of(op.T).macs == s.macs
    held = sum(f.nbytes for f in op.factors)
    assert structlin.num_bytes(op) == structlin.num_bytes(s, "float64") == held


# -- CoLA's operators ----------------------------------------------------------------------------------------------

torch.manual_seed(0)
A, B, C = (torch.randn(shape) for shape in ((4, 6), (6, 5), (4, 6)))
Q, R = torch.randn(3, 3), torch.randn(5, 5)
BTT = structure_class("block_tensor_train").random((35, 6), rank=2, backend="torch", seed=0)
LOW = structure_class("low_rank").random((35, 6), rank=3, backend="torch", seed=0)


def composites():
    dense = ops.Dense(A)
    square = BTT @ BTT.T
    return {
        "dense": dense,
        "triangular": ops.Triangular(torch.tril(Q)),
        "product": ops.Product(dense, ops.Dense(B)),
        "product of three": ops.Product(ops.Dense(B.T), ops.Dense(A.T), ops.Dense(A)),
        "sum": ops.Sum(dense, ops.Dense(C)),
        "sum of three": ops.Sum(dense, ops.Dense(C), dense),
        "scaled": 3.0 * dense,
        "scalar": ops.ScalarMul(2.0, (4, 4), torch.float32, torch.device("cpu")),
        "identity": ops.I_like(ops.Dense(Q)),
        "diagonal": ops.Diagonal(torch.randn(5)),
        "tridiagonal": ops.Tridiagonal(torch.randn(4), torch.randn(5), torch.randn(4)),
        "permutation": ops.Permutation(torch.tensor([2, 0, 1])),
        "householder": ops.Householder(torch.randn(5, 1)),
        "kronecker": ops.Kronecker(dense, ops.Dense(B)),
        "kronecker of three": ops.Kronecker(dense, ops.Dense(Q), ops.Dense(B)),
        "kronecker sum": ops.KronSum(ops.Dense(Q), ops.Dense(R)),
        "kronecker sum of three": ops.KronSum(ops.Dense(Q), ops.Dense(R), ops.Dense(Q)),
        "block diagonal": ops.BlockDiag(dense, ops.Dense(B)),
        "repeated blocks": ops.BlockDiag(dense, ops.Dense(B), multiplicities=[3, 2]),
        "transpose": ops.Transpose(ops.Kronecker(dense, ops.Dense(B))),
        "adjoint": ops.Adjoint(ops.Kronecker(dense, ops.Dense(B))),
        "stacked": ops.Concatenated(dense, ops.Dense(C), axis=0),
        "side by side": ops.Concatenated(dense, ops.Dense(C), axis=1),
        "sliced": ops.Dense(A)[1:3, ::2],
        "sliced by indices": ops.Dense(A)[np.ix_([0, 3], [5, 1, 2])],
        "repeated columns": ops.Dense(A)[:, np.array([5, 1, 5])],
        "repeated rows": ops.Dense(A)[np.array([3, 3, 0]), :],
        "annotated": cola.PSD(ops.Dense(Q @ Q.T)),
        "ours": BTT,
        "ours times ours": square,
        "ours plus identity": square + ops.I_like(square),
        "ours plus ours": BTT + LOW,
        "ours minus ours": BTT - LOW,
        "kronecker of ours": cola.kron(BTT, LOW.T),
        "blocks of ours": cola.block_diag(BTT, LOW, ops.Dense(A)),
        "ours sliced": BTT[3:9, :4],
        "nested": ops.Sum(ops.Kronecker(dense, ops.Dense(Q)), 2.0 * ops.Kronecker(ops.Dense(C), ops.Dense(Q))),
        "nested transpose": (2.0 * (BTT @ ops.Kronecker(ops.Dense(A[:3, :2]), ops.Dense(A[:2, :5])))).T,
    }


@pytest.mark.parametrize("name", composites())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("vectors", [1, 7])
def test_composites_do_the_work_that_is_counted(name, transposed, vectors):
    op = composites()[name]
    d_out, d_in = op.shape
    x = torch.randn(vectors, d_out) if transposed else torch.randn(d_in, vectors)
    counted, product = work_of(op, transposed=transposed), (lambda: x @ op) if transposed else (lambda: op @ x)
    assert counted_by_torch(product) == vectors * counted.macs
    with ElementwiseCounter() as counter:
        product()
    assert counter.flops == vectors * counted.other_flops.get("elementwise", 0)
    if not transposed:
        assert (structlin.macs(op), structlin.flops(op)) == (counted.macs, counted.flops)


def test_sparse_operators():
    data, rows, columns = torch.ones(4), torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 2, 4])
    S = ops.Sparse(data, rows, columns, (4, 5))
    assert structlin.macs(S) == work_of(S, transposed=True).macs == structlin.num_params(S) == 4
    assert structlin.num_bytes(S) == 4 * 4 + 4 * (4 + 1) + 4 * 4
    J = ops.Sparse(jnp.ones(4), jnp.asarray(rows), jnp.asarray(columns), (4, 5))
    assert (structlin.macs(J), structlin.num_params(J)) == (4, 4)


def test_transforms_and_triangular_solves():
    F = ops.FFT(8, dtype=torch.complex64)
    assert work_of(F) == work_of(F, transposed=True) == Work(other_flops={"fft": 5 * 8 * 3}, activations=16)
    assert structlin.num_params(F) == 0
    L = cola.linalg.inv(ops.Triangular(torch.tril(Q) + 3 * torch.eye(3)))
    assert dict(work_of(L).other_flops) == dict(work_of(L, transposed=True).other_flops) == {"triangular_solve": 9}
    T = structure_class("toeplitz").random((5, 7), seed=0)
    counted = work_of(ops.Kronecker(T, ops.Dense(np.ones((3, 2)))))
    assert counted.other_flops == {k: 2 * v for k, v in T.structure.other_flops.items()}
    assert counted.setup_flops == T.structure.setup_flops
    assert counted.macs == 5 * 6


def test_repeated_blocks_are_set_up_once_from_the_right_and_each_time_from_the_left():
    T = structure_class("toeplitz").random((5, 7), backend="torch", seed=0)
    D = ops.BlockDiag(T, multiplicities=[3])
    assert work_of(D).setup_flops == T.structure.setup_flops
    assert work_of(D, transposed=True).setup_flops == {"fft": 3 * T.structure.setup_flops["fft"]}


class Bands(ops.Tridiagonal):
    _rmatmat = ops.LinearOperator._rmatmat


def test_colas_default_product_from_the_left_runs_the_other_one_first_on_torch():
    for array, times in ((torch.ones(5), 2), (jnp.ones(5), 1)):
        op = Bands(array[1:], array, array[1:])
        assert work_of(op).other_flops == {"elementwise": 23}
        assert work_of(op, transposed=True).other_flops == {"elementwise": times * 23}
        assert work_of(cola.SelfAdjoint(op), transposed=True).other_flops == {"elementwise": 23}


def test_only_arrays_of_the_three_libraries_hold_parameters():
    class Tagged(Shift):
        """Holds something that has a shape and a dtype and is no array."""

    register_work(Tagged)(lambda op, count: count(op.A))
    op = Tagged(ops.Dense(Q))
    op.tag = np.float64(3.0)
    assert structlin.num_params(op) == 9


def test_arrays_count_as_dense():
    for array in (np.ones((3, 5), np.float32), torch.ones(3, 5), jnp.ones((3, 5), jnp.float32)):
        assert work_of(array) == work_of(array, transposed=True) == Work(macs=15, activations=8)
        assert (structlin.num_params(array), structlin.num_bytes(array)) == (15, 60)


# -- parameters and bytes ------------------------------------------------------------------------------------------


def test_parameters_count_once():
    own = BTT.structure.num_params
    for op, expected in (
        (BTT @ BTT.T, own),
        (BTT @ BTT.T + ops.I_like(BTT @ BTT.T), own),
        (BTT.T @ BTT + BTT.H @ BTT, own),
        (cola.kron(BTT, BTT), own),
        (cola.block_diag(BTT, BTT, LOW), own + LOW.structure.num_params),
        (ops.Product(2.0 * ops.I_like(BTT @ BTT.T), BTT), own + 1),
        (ops.Dense(A) @ ops.Dense(A).T, 24),
        (ops.Sum(ops.Dense(A), ops.Dense(A.clone())), 48),
        (ops.Kronecker(ops.Dense(A), ops.Dense(A.reshape(6, 4))), 24),
        (ops.Sum(ops.Dense(A[:, :3]), ops.Dense(A[:, 3:])), 24),
        (ops.Sum(ops.Dense(A[:, ::2]), ops.Dense(A[:, ::2])), 12),
        (ops.Permutation(torch.tensor([1, 0])), 0),
        (ops.I_like(ops.Dense(Q)), 0),
        (ops.Householder(torch.ones(5, 1)), 6),
        (BTT[:3, :2], own),
        (cola.PSD(ops.Dense(Q)), 9),
    ):
        assert structlin.num_params(op) == expected, op


def test_the_same_memory_is_recognised_in_numpy_and_on_the_meta_device():
    x = np.arange(24.0).reshape(4, 6)
    for other, expected in (
        (x, 24), (x.T, 24), (x.reshape(2, 12), 24), (x[::-1, ::-1], 24), (x.ravel(), 24),
        (x.copy(), 48), (x[:2], 36), (x[:, :3], 36),
    ):  # fmt: skip
        pair = ops.Kronecker(ops.Dense(x), ops.Dense(other.reshape(-1, 1) if other.ndim == 1 else other))
        assert structlin.num_params(pair) == expected
    a, b = torch.empty(4, 6, device="meta"), torch.empty(4, 6, device="meta")
    first, second = ops.Dense(a), ops.Dense(b)
    assert structlin.num_params(ops.Product(first, first.T)) == 24
    assert structlin.num_params(ops.Sum(first, second)) == 48


def test_counts_inside_transformations():
    seen = []

    def count(op):
        seen.append((structlin.macs(op), structlin.num_params(ops.Product(op, op.T))))
        return op @ jnp.ones(6, op.dtype)

    op = structure_class("low_rank").random((35, 6), rank=3, backend="jax", seed=0)
    jax.make_jaxpr(count)(op)
    stack = jax.tree.map(lambda f: jnp.stack([f, f]), op)
    jax.make_jaxpr(jax.vmap(count))(stack)
    many = tuple(torch.stack([f, f]) for f in LOW.factors)

    def count_torch(factors):
        op = structlin.StructuredOperator(LOW.structure, factors)
        seen.append((structlin.macs(op), structlin.num_params(ops.Product(op, op.T))))
        return op @ torch.ones(6)

    torch.func.vmap(count_torch)(many)
    assert seen == [(123, 123)] * 3


def test_bytes():
    assert structlin.num_bytes(BTT) == 4 * 270
    for dtype, size in (("float16", 2), (torch.bfloat16, 2), (np.float64, 8), (jnp.complex64, 8), ("complex128", 16)):
        assert structlin.num_bytes(BTT, dtype) == structlin.num_bytes(BTT.structure, dtype) == size * 270
    assert structlin.num_bytes(BTT.structure) == 4 * 270
    P = structure_class("permutation").random((5, 5), backend="torch", seed=0)
    assert structlin.num_bytes(P) == structlin.num_bytes(P, "float16") == structlin.num_bytes(P.structure) == 40
    assert structlin.num_bytes(BTT @ BTT.T) == 4 * 270
    assert structlin.num_bytes(ops.Permutation(torch.tensor([1, 0], dtype=torch.int32))) == 8


def test_activations_are_what_each_operation_reads_and_writes():
    s = BTT.structure
    assert work_of(s).activations == 6 + 2 * (5 * 2 * 3) + 35
    assert structlin.activation_bytes(BTT, 10) == 10 * 4 * 101
    assert structlin.activation_bytes(s, 10, "bfloat16") == 10 * 2 * 101
    regrouped = Structure.parse("pa,pqa->pq; gl,log->lo", p=3, a=3, q=4, g=4, l=3, o=5, d_in=7, d_out=13)
    assert work_of(regrouped).activations == 7 + 2 * 12 + 13
    assert work_of(BTT @ BTT.T).activations == 2 * 101
    assert work_of(ops.Sum(BTT, LOW)).activations == 101 + (6 + 2 * 3 + 35) + 3 * 35
    assert work_of(ops.Diagonal(torch.ones(5))).activations == 10
    assert work_of(ops.Kronecker(ops.Dense(A), ops.Dense(B))).activations == 10 * 5 + 11 * 4
    assert work_of(structure_class("toeplitz").random((5, 7), seed=0)).activations == 12


def test_intensity():
    n, k = 64, 16
    dense = design("dense", (n, n))
    assert structlin.intensity(dense, k, "float32") == 2 * n * n * k / (4 * (n * n + 2 * n * k))
    assert structlin.intensity(dense, k, "float16") == 2 * structlin.intensity(dense, k, "float32")
    assert structlin.intensity(BTT, k) == 2 * 270 * k / (4 * (270 + 101 * k))
    T = structure_class("toeplitz").random((5, 7), seed=0)
    flops = k * T.structure.flops + T.structure.setup_flops["fft"]
    assert structlin.intensity(T, k) == flops / (8 * (11 + 12 * k))
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"vectors must be a positive integer, got {k}"):
            structlin.intensity(BTT, k)


# -- types that are not known --------------------------------------------------------------------------------------

REFUSED = {"LinearOperator", "Array", "I_like", "Jacobian", "Hessian", "ConvolveND", "Kernel"}


def test_every_operator_of_cola_is_counted_or_refused():
    from structlin._work import _COLUMNS

    for name in set(ops.__all__) - REFUSED:
        assert any(cls in _COLUMNS for cls in getattr(ops, name).__mro__), name
    assert not REFUSED & {cls.__name__ for cls in _COLUMNS}


class Shift(ops.LinearOperator):
    """One elementwise addition for each output; ``rows``: with a product from the left of its own."""

    def __init__(self, A):
        self.A = A
        super().__init__(A.dtype, A.shape)

    def _matmat(self, X):
        return self.A @ X + X.sum(0)


class Loud(ops.Dense):
    def _matmat(self, X):
        return 2 * super()._matmat(X)


class LoudRows(ops.Dense):
    def _rmatmat(self, X):
        return 2 * super()._rmatmat(X)


class OwnProduct(structlin.StructuredOperator):
    def _matmat(self, X):
        return super()._matmat(2 * X)


UNKNOWN = {
    "closure": lambda: ops.LinearOperator(torch.float32, (3, 3), matmat=lambda X: Q @ X),
    "no_dispatch": lambda: cola.fns.no_dispatch(ops.Dense(Q)),
    "Jacobian": lambda: ops.Jacobian(lambda x: x**2, torch.ones(3)),
    "Hessian": lambda: ops.Hessian(lambda x: (x**2).sum(), torch.ones(3)),
    "Kernel": lambda: ops.Kernel(Q, Q, lambda a, b: a @ b.T, 1, 1),
    "iterative": lambda: cola.linalg.inv(cola.PSD(ops.Dense(Q @ Q.T)), cola.linalg.CG()),
    "third party": lambda: Shift(ops.Dense(Q)),
    "override": lambda: Loud(Q),
    "override of ours": lambda: OwnProduct(BTT.structure, BTT.factors),
    "nested": lambda: ops.Sum(ops.Dense(Q), ops.Kronecker(Loud(Q), ops.Dense(torch.ones(1, 1)))),
}


COUNTS = "macs flops work_of num_params num_bytes activation_bytes intensity"


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("count", COUNTS.split(" "))
def test_unknown_types_are_refused(name, count):
    with pytest.raises(TypeError, match=r"no count is known for _matmat of .*; register one with @structlin.register"):
        getattr(structlin, count)(UNKNOWN[name]())


def test_the_refusal_names_type_shape_and_remedy():
    with pytest.raises(TypeError, match=r"_matmat of .*Loud of shape \(3, 3\); .*@structlin.register_work\(cls\)$"):
        work_of(Loud(Q))
    assert work_of(LoudRows(Q)).macs == 9
    with pytest.raises(TypeError, match=r"_rmatmat of .*LoudRows .* @structlin.register_work\(cls, transposed=True\)"):
        work_of(LoudRows(Q), transposed=True)
    with pytest.raises(TypeError, match=r"_rmatmat of .*LoudRows"):
        work_of(ops.Transpose(LoudRows(Q)))


def test_what_is_no_operator_is_refused():
    for x, name in ((3.0, "builtins.float"), ("A", "builtins.str"), ([[1.0]], "builtins.list"), (None, "NoneType")):
        for count in (work_of, structlin.num_params, structlin.num_bytes, structlin.intensity):
            with pytest.raises(TypeError, match=f"expected a structure, an operator or an array, got .*{name}"):
                count(x)
    for count in (work_of, structlin.num_params, structlin.num_bytes):
        with pytest.raises(ValueError, match=r"a dense matrix of shape \(d_out, d_in\), got shape \(3,\)"):
            count(np.ones(3))
    for cls in (int, 3, torch.nn.Linear):
        with pytest.raises(TypeError, match=r"registered for subclasses of cola.ops.LinearOperator, got"):
            register_work(cls)


def test_registration():
    class Own(Shift):
        def _rmatmat(self, X):
            return X @ self.A

    class Child(Own):
        pass

    @register_work(Own, arrays=lambda op: [op.A.A])
    def _(op, count):
        return count(op.A) + Work(other_flops={"shift": op.shape[0]})

    op = Child(ops.Dense(Q))
    assert work_of(op).flops == 2 * 9 + 3
    assert work_of(ops.Sum(op, op)).other_flops == {"shift": 6, "elementwise": 3}
    assert structlin.num_params(ops.Sum(op, op)) == 9
    with pytest.raises(TypeError, match=r"_rmatmat of .*Child"):
        work_of(op, transposed=True)

    @register_work(Own, transposed=True)
    def _(op, count):
        return count(op.A, transposed=True)

    assert work_of(op, transposed=True).flops == 18
    assert work_of(op.T).flops == 18


# -- the record ----------------------------------------------------------------------------------------------------


def test_work_adds_up():
    a = Work(3, {"fft": 5}, {"fft": 7}, 11)
    b = Work(2, {"elementwise": 1}, {}, 4)
    assert a + b == Work(5, {"elementwise": 1, "fft": 5}, {"fft": 7}, 15)
    assert a.times(10) == Work(30, {"fft": 50}, {"fft": 7}, 110)
    assert (a.flops, a.total_flops(), a.total_flops(10)) == (11, 18, 117)
    assert hash(a) == hash(Work(3, {"fft": 5}, {"fft": 7}, 11))
    assert Work(1, {"nothing": 0}) == Work(1)
    with pytest.raises(AttributeError):
        a.macs = 4
    with pytest.raises(TypeError):
        operator.setitem(a.other_flops, "fft", 0)
    with pytest.raises(TypeError):
        a + 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macs": -1}, ValueError, "macs must not be negative, got -1"),
        ({"macs": 1.0}, TypeError, "macs must be an integer, got 1.0"),
        ({"macs": True}, TypeError, "macs must be an integer, got True"),
        ({"other_flops": {"fft": -2}}, ValueError, "fft must not be negative, got -2"),
        ({"setup_flops": {"fft": "2"}}, TypeError, "fft must be an integer, got '2'"),
        ({"activations": 0.5}, TypeError, "activations must be an integer, got 0.5"),
    ],
)
def test_work_is_whole_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        Work(**arguments)


def test_counts_are_exact_integers_beyond_floating_point():
    n = 2**20
    s = design("block_tensor_train", (n, n), cores=2, rank=1024, factorization=((1024, 1024), (1024, 1024)))
    assert s.macs == 2 * 1024**4
    assert structlin.flops(Structure.parse("i,oi->o", i=3**20, o=3**20)) == 2 * 3**40
    assert math.log2(work_of(s).total_flops(2**30)) == 72
