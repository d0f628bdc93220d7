"""Products, sums and multiples that stay in one operator where that is exact and costs no more.

Registered with CoLA's ``dot``, ``add``, ``mul`` and ``kron``, that is, with ``@``, ``+``, ``-``, ``*`` and
``cola.kron``. The result has no more multiply-accumulates (:func:`structlin.macs`) than the parts have together;
otherwise nothing is simplified. Annotations of the result are those that CoLA would give, and ``A @ A.T`` and
``A.T @ A`` of real operators are annotated PSD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Stiefel, Unitary
from cola.ops import Identity, LinearOperator, Product, ScalarMul, Sum
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import Array, backend_of
from structlin._cola_compat._composing import _as_scalar
from structlin._cola_compat._repair import functions_of, implementation, rule
from structlin._cola_compat._values import _known, _scaled
from structlin.counting import macs
from structlin.linalg import _chain as chain
from structlin.linalg._forms import diagonal_of
from structlin.linalg._lapack import as_array, in_library, lapack
from structlin.linalg._tensor_train import added_cores, tensor_train_cores
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.circulant import Circulant, CirculantStructure
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal, DiagonalStructure
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.permutation import Permutation, PermutationStructure
from structlin.structures.tensor_train import TensorTrain
from structlin.structures.toeplitz import Toeplitz, ToeplitzStructure


def _cost(*operators: LinearOperator) -> float:
    """MACs of the operators one after the other; infinite where one is of a kind that can not be counted."""
    try:
        return sum(map(macs, operators))
    except TypeError:
        return float("inf")


def _promoted(x: Array, y: Array) -> tuple[Array, Array]:
    """Both in the dtype that they have in common."""
    if x.dtype == y.dtype:
        return x, y
    functions = functions_of(backend_of(x))
    common = functions.promote_types(x.dtype, y.dtype)
    return functions.cast(x, common), functions.cast(y, common)


# -- products --------------------------------------------------------------------------------------------------------


@rule("dot")
def _two(A: StructuredOperator, B: StructuredOperator):
    found = product(A, B)
    if found is None:
        found = Product(A, B)
        return PSD(found) if is_gram(A, B) else found
    return found


@rule("dot")
def _ours_and_any(A: StructuredOperator, B: LinearOperator):
    found = product(A, B)
    return Product(A, B) if found is None else found


@rule("dot")
def _any_and_ours(A: LinearOperator, B: StructuredOperator):
    found = product(A, B)
    return Product(A, B) if found is None else found


@rule("dot")
def _ours_and_identity(A: StructuredOperator, B: Identity):
    return A


@rule("dot")
def _identity_and_ours(A: Identity, B: StructuredOperator):
    return B


@rule("dot")
def _ours_and_product(A: StructuredOperator, B: Product):
    return _joined((A,), B.Ms)


@rule("dot")
def _product_and_ours(A: Product, B: StructuredOperator):
    return _joined(A.Ms, (B,))


@rule("dot")
def _products(A: Product, B: Product):
    return _joined(A.Ms, B.Ms)


def _joined(first: tuple[LinearOperator, ...], second: tuple[LinearOperator, ...]) -> LinearOperator:
    """The product of all, with the two that meet made one where they can be, and then its neighbours."""
    while first and second and (found := product(first[-1], second[0])) is not None:
        first, second = first[:-1], second[1:]
        if first:
            second = (found, *second)
        else:
            first = (found,)
    members = first + second
    return members[0] if len(members) == 1 else Product(*members)


def is_gram(A: StructuredOperator, B: StructuredOperator) -> bool:
    """Whether B is the transpose of the real operator A, by the identity of its arrays."""
    if len(A.factors) != len(B.factors) or lapack(A.factors[0]).is_complex(A.factors[0]):
        return False
    transposed = A.structure.transpose_factors(A.factors)
    return A._transposed == B.structure and all(f is g for f, g in zip(transposed, B.factors, strict=True))


def product(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    """``A @ B`` as one operator; None where there is none, or where it would cost more MACs than both together."""
    if A.shape[1] != B.shape[0]:
        return None  # the error is CoLA's to raise
    for scalar, other in ((A, B), (B, A)):
        if isinstance(scalar, ScalarMul) and isinstance(other, StructuredOperator):
            return multiple(other, scalar.c)
    found: list[LinearOperator] = []
    if isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator):
        found += [op for op in (_of_kind(A, B), _of_parts(A, B)) if op is not None]
    if not found:
        found += [op for op in (_scaled_rows(A, B), _low_rank(A, B)) if op is not None]
    if not found:
        return None
    best = min(found, key=_cost)
    return _annotated_product(best, A, B) if _cost(best) <= _cost(A, B) else None


def _annotated_product(found: LinearOperator, A: LinearOperator, B: LinearOperator) -> LinearOperator:
    for kind in (Unitary, Stiefel):
        if A.isa(kind) and B.isa(kind):
            found = kind(found)
            break
    if isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator) and is_gram(A, B):
        found = PSD(found)
    return found


def _of_kind(A: StructuredOperator, B: StructuredOperator) -> StructuredOperator | None:
    """Permutations, diagonal and circulant matrices are closed under products."""
    kinds, (x, y) = (A.structure, B.structure), (A.factors[0], B.factors[0])
    if all(isinstance(s, PermutationStructure) for s in kinds):
        return Permutation._build(A.structure, (y[x],), A.xnp.promote_types(A.dtype, B.dtype))
    if all(isinstance(s, DiagonalStructure) for s in kinds):
        return Diagonal(x * y)
    if all(isinstance(s, CirculantStructure) for s in kinds):
        xp, n = lapack(x), A.shape[0]
        x, y = _promoted(x, y)
        if xp.is_complex(x):
            return Circulant(xp.ifft(xp.fft(x, n, 0) * xp.fft(y, n, 0), n, 0))
        return Circulant(xp.irfft(xp.rfft(x, n, 0) * xp.rfft(y, n, 0), n, 0))
    return None


def _of_parts(A: StructuredOperator, B: StructuredOperator) -> StructuredOperator | None:
    """Kronecker and block-diagonal products of members that fit one another."""
    left, right = chain.kronecker_parts(A.structure), chain.kronecker_parts(B.structure)
    if left is not None and right is not None:
        if len(left) != len(right) or len(left) < 2:
            return None
        if any(p.columns != q.rows for p, q in zip(left, right, strict=True)):
            return None
        first, second = (chain.part_matrices(op.structure, op.factors) for op in (A, B))
        assert first is not None
        assert second is not None
        return Kronecker(*(_matmul(x, y) for x, y in zip(first, second, strict=True)))
    blocks = [chain.diagonal_blocks(op.structure, op.factors) for op in (A, B)]
    if blocks[0] is None or blocks[1] is None:
        return None
    (count, _, inner), (other, inner2, _) = blocks[0].shape, blocks[1].shape
    return BlockDiagonal(_matmul(*blocks)) if count == other and inner == inner2 else None


def _matmul(x: Array, y: Array) -> Array:
    x, y = _promoted(x, y)
    return x @ y


def _scaled_rows(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """A diagonal matrix next to a dense or block-diagonal one scales its rows or columns."""
    for diagonal, other, rows in ((A, B, True), (B, A, False)):
        value = diagonal_of(diagonal)
        if value is None or getattr(value, "ndim", 0) == 0 or not isinstance(other, StructuredOperator):
            continue
        blocks = chain.diagonal_blocks(other.structure, other.factors)
        if blocks is None and chain.is_dense(other.structure):
            matrices = chain.part_matrices(other.structure, other.factors)
            blocks = None if matrices is None else matrices[0][None]
        if blocks is None:
            continue
        blocks, value = _promoted(blocks, in_library(value, blocks))
        shape = (blocks.shape[0], -1, 1) if rows else (blocks.shape[0], 1, -1)
        scaled = blocks * value.reshape(shape)
        return Dense(scaled[0]) if chain.is_dense(other.structure) else BlockDiagonal(scaled)
    return None


def low_rank_factors(A: LinearOperator) -> tuple[Array, Array] | None:
    """(U, V) of an operator that is a chain of dense matrices with a bottleneck; None for any other."""
    if not isinstance(A, StructuredOperator) or not isinstance(A.structure, Structure):
        return None
    plain = all(f.blocks == f.carried == 1 for f in A.structure.factors) and A.structure.padding == (0, 0)
    found = chain.bottleneck(A.structure)
    if found is None or not plain or found[0] >= min(A.shape):
        return None
    return chain.thin_factors(A)


def _low_rank(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """(U V) B = U (V B) and A (U V) = (A U) V; the narrower one where both are of low rank."""
    if A.dtype != B.dtype and not (isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator)):
        return None  # not all of CoLA's operators take arrays of another dtype
    first, second = low_rank_factors(A), low_rank_factors(B)
    if first is not None and (second is None or first[0].shape[1] <= second[0].shape[1]):
        U, V = first
        return LowRank(*_swap(_promoted(U, V @ B)))
    if second is not None:
        U, V = second
        return LowRank(*_swap(_promoted(A @ U, V)))
    return None


def _swap(pair: tuple[Array, Array]) -> tuple[Array, Array]:
    return pair[1], pair[0]


# -- sums ------------------------------------------------------------------------------------------------------------


@rule("add")
def _ours_plus_any(A: StructuredOperator, B: LinearOperator):
    found = total(A, B)
    return Sum(A, B) if found is None else found


@rule("add")
def _any_plus_ours(A: LinearOperator, B: StructuredOperator):
    found = total(A, B)
    return Sum(A, B) if found is None else found


@rule("add")
def _ours_plus_ours(A: StructuredOperator, B: StructuredOperator):
    found = total(A, B)
    return Sum(A, B) if found is None else found


@rule("add")
def _sum_plus_ours(A: Sum, B: StructuredOperator):
    return _merged(A, B, lambda rest: (*rest, B))


@rule("add")
def _ours_plus_sum(A: StructuredOperator, B: Sum):
    return _merged(B, A, lambda rest: (A, *rest))


def _merged(
    terms: Sum, new: StructuredOperator, together: Callable[[tuple[Any, ...]], tuple[Any, ...]]
) -> LinearOperator:
    """``terms + new``, with ``new`` taken up by the first term that can."""
    for i, M in enumerate(terms.Ms):
        found = total(M, new)
        if found is not None:
            members = (*terms.Ms[:i], found, *terms.Ms[i + 1 :])
            return members[0] if len(members) == 1 else Sum(*members)
    return Sum(*together(terms.Ms))


def total(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """``A + B`` as one operator, or None."""
    if tuple(A.shape) != tuple(B.shape):
        return None  # the error is CoLA's to raise
    found = None
    if isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator):
        found = _sum_of_kind(A, B)
    if found is None and isinstance(A, StructuredOperator):
        found = _plus_diagonal(A, B)
    if found is None and isinstance(B, StructuredOperator):
        found = _plus_diagonal(B, A)
    if found is None:
        return None
    kept = (A.annotations & B.annotations) - {Unitary, Stiefel}
    if not kept and A.isa(SelfAdjoint) and B.isa(SelfAdjoint):
        kept = {SelfAdjoint}
    for annotation in kept:
        found = annotation(found)
    return found


def _sum_of_kind(A: StructuredOperator, B: StructuredOperator) -> StructuredOperator | None:
    kinds, (x, y) = (A.structure, B.structure), (A.factors[0], B.factors[0])
    if type(A.structure) is not type(B.structure):
        return None
    if all(isinstance(s, DiagonalStructure) for s in kinds):
        return Diagonal(x + y)
    if all(isinstance(s, CirculantStructure) for s in kinds):
        return Circulant(x + y)
    if all(isinstance(s, ToeplitzStructure) for s in kinds):
        return Toeplitz.from_kernel(x + y, A.shape[0])
    if all(map(chain.is_dense, kinds)):
        first, second = (chain.part_matrices(op.structure, op.factors) for op in (A, B))
        assert first is not None
        assert second is not None
        return Dense(first[0] + second[0])
    blocks = [chain.diagonal_blocks(op.structure, op.factors) for op in (A, B)]
    if blocks[0] is not None and blocks[1] is not None:
        return BlockDiagonal(blocks[0] + blocks[1]) if blocks[0].shape == blocks[1].shape else None
    first_pair, second_pair = low_rank_factors(A), low_rank_factors(B)
    if first_pair is not None and second_pair is not None:
        (U, X), (V, Y) = _promoted(first_pair[0], second_pair[0]), _promoted(first_pair[1], second_pair[1])
        xp = lapack(U)
        return _if_cheap(LowRank(xp.concat((V, Y)), xp.concat_axis((U, X), 1)), A, B)
    cores = [tensor_train_cores(op) for op in (A, B)]
    if cores[0] is not None and cores[1] is not None:
        if [c.shape[1:3] for c in cores[0]] != [c.shape[1:3] for c in cores[1]]:
            return None
        pairs = [_promoted(x, y) for x, y in zip(*cores, strict=True)]
        return _if_cheap(TensorTrain(*added_cores([p[0] for p in pairs], [p[1] for p in pairs])), A, B)
    return None


def _if_cheap(found: StructuredOperator, A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    return found if _cost(found) <= _cost(A, B) else None


def _plus_diagonal(A: StructuredOperator, B: LinearOperator) -> StructuredOperator | None:
    """A diagonal or a multiple of the identity, taken up by what stores its diagonal."""
    value = diagonal_of(B)
    if value is None:
        return None
    structure, x = A.structure, A.factors[0]
    if not hasattr(value, "dtype"):
        value = as_array(value, x) if not isinstance(structure, PermutationStructure) else value
    else:
        value = in_library(value, x)
    if isinstance(structure, DiagonalStructure):
        return Diagonal(x + value)
    if isinstance(structure, CirculantStructure) and value.ndim == 0:
        return Circulant(x + value * _unit(x, 0))
    if isinstance(structure, ToeplitzStructure) and value.ndim == 0:
        return Toeplitz.from_kernel(x + value * _unit(x, structure.d_in - 1), structure.d_out)
    blocks = chain.diagonal_blocks(structure, A.factors)
    if blocks is None and chain.is_dense(structure):
        matrices = chain.part_matrices(structure, A.factors)
        blocks = None if matrices is None else matrices[0][None]
    if blocks is None or blocks.shape[1] != blocks.shape[2]:
        return None
    wide = value if value.ndim == 0 else value.reshape((blocks.shape[0], 1, -1))
    shifted = blocks + lapack(x).eye(blocks.shape[1], blocks) * wide
    return Dense(shifted[0]) if chain.is_dense(structure) else BlockDiagonal(shifted)


def _unit(like: Array, place: int) -> Array:
    """As long as ``like``: 1 at one place, 0 elsewhere."""
    return lapack(like).index(np.arange(like.shape[0]) == place, like)


# -- multiples -------------------------------------------------------------------------------------------------------


@rule("mul")
def _scaled_ours(A: StructuredOperator, c: object):
    return multiple(A, c)


@rule("mul")
def _scaled_product(A: Product, c: object):
    """Into the structured member with the smallest factor, since a number commutes with every matrix."""
    sizes = [_smallest(M)[1] if isinstance(M, StructuredOperator) else None for M in A.Ms]
    known = [s for s in sizes if s is not None]
    value, dtype = _as_scalar(A, c)
    if not known or dtype != A.dtype:
        return implementation("mul", LinearOperator, object)(A, c)
    place = sizes.index(min(known))
    found = Product(*A.Ms[:place], multiple(A.Ms[place], c), *A.Ms[place + 1 :])
    return _annotated_multiple(found, A, value)


def _smallest(A: StructuredOperator) -> tuple[int, int | None]:
    """Place and size of the smallest trainable factor; the size is None where there is none."""
    sizes = [(spec.numel, i) for i, spec in enumerate(A.structure.factors) if spec.trainable]
    size, place = min(sizes, default=(None, 0))
    return place, size


def multiple(A: StructuredOperator, c: Any) -> LinearOperator:
    """``c A``, with c multiplied into the smallest factor; gradients reach c and the factor.

    A real operator that has no factor to take c (a permutation), or would have to become complex in all of its
    factors, is left as it is, behind a ScalarMul.
    """
    value, dtype = _as_scalar(A, c)
    place, size = _smallest(A)
    if size is None or dtype != A.dtype:
        return implementation("mul", LinearOperator, object)(A, c)
    factors = list(A.factors)
    factors[place] = factors[place] * as_array(value, factors[place])
    scaled = A._with(A.structure, tuple(factors), frozenset())
    return _annotated_multiple(scaled, A, value)


def _annotated_multiple(found: LinearOperator, A: LinearOperator, c: Any) -> LinearOperator:
    found.annotations = _scaled(set(A.annotations), _known(c), "complex" in str(A.dtype))
    return found


# -- Kronecker products ----------------------------------------------------------------------------------------------


@rule("kron")
def _kronecker(A: StructuredOperator, B: StructuredOperator):
    found = _kronecker_of(A, B)
    whole = ColaKronecker(A, B)
    if found is None or _cost(found) > _cost(whole):
        return whole
    for annotation in whole.annotations:
        found = annotation(found)
    return found


def _kronecker_of(A: StructuredOperator, B: StructuredOperator) -> StructuredOperator | None:
    kinds, (x, y) = (A.structure, B.structure), (A.factors[0], B.factors[0])
    n = A.shape[0] * B.shape[0]
    if all(isinstance(s, PermutationStructure) for s in kinds):
        index = (x[:, None] * B.shape[0] + y[None, :]).reshape((n,))
        return Permutation._build(Permutation.design((n, n)), (index,), A.xnp.promote_types(A.dtype, B.dtype))
    if all(isinstance(s, DiagonalStructure) for s in kinds):
        return Diagonal((x[:, None] * y[None, :]).reshape((n,)))
    first, second = (chain.part_matrices(op.structure, op.factors) for op in (A, B))
    if first is None or second is None:
        return None
    pairs = [_promoted(m, second[0]) for m in first]
    return Kronecker(*(m for m, _ in pairs), *(_promoted(m, first[0])[0] for m in second))
