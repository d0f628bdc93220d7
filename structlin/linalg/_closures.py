"""Products, sums and multiples as one operator, if this is exact and costs no more.

The rules are registered with ``dot``, ``add``, ``mul`` and ``kron`` of CoLA. So they apply to ``@``, ``+``, ``-``,
``*`` and ``cola.kron``. A result is simplified only if it has no more multiply-accumulates (:func:`structlin.macs`)
than the parts together. It has the annotations that CoLA would give. In addition, ``A @ A.T`` and ``A.T @ A`` of real
operators are annotated PSD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cola.annotations import PSD, SelfAdjoint, Stiefel, Unitary
from cola.ops import Identity, LinearOperator, Product, ScalarMul, Sum
from cola.ops import Kronecker as ColaKronecker

from structlin._arrays import as_array, in_library
from structlin._cola_compat import as_scalar, implementation, known_scalar, rule, scaled_annotations
from structlin._lapack import lapack, promoted
from structlin.algebra import chains, combinations
from structlin.counting import macs
from structlin.linalg._common import annotated
from structlin.linalg._forms import diagonal_of
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.low_rank import LowRank


def _cost(*operators: LinearOperator) -> float:
    """Return the sum of the operators' MACs; infinite if one cannot be counted."""
    try:
        return sum(map(macs, operators))
    except TypeError:
        return float("inf")


# -- products --------------------------------------------------------------------------------------------------------


def _combined(
    A: LinearOperator, B: LinearOperator, joined: Callable[..., LinearOperator | None], kind: type
) -> LinearOperator:
    found = joined(A, B)
    return kind(A, B) if found is None else found


for _types in ((StructuredOperator, LinearOperator), (LinearOperator, StructuredOperator)):
    rule("dot", types=_types)(lambda A, B: _combined(A, B, product, Product))
    rule("add", types=_types)(lambda A, B: _combined(A, B, total, Sum))

rule("add", types=(StructuredOperator, StructuredOperator))(lambda A, B: _combined(A, B, total, Sum))
rule("dot", types=(StructuredOperator, Identity))(lambda A, B: A)
rule("dot", types=(Identity, StructuredOperator))(lambda A, B: B)
rule("dot", types=(StructuredOperator, Product))(lambda A, B: _joined((A,), B.Ms))
rule("dot", types=(Product, StructuredOperator))(lambda A, B: _joined(A.Ms, (B,)))
rule("dot", types=(Product, Product))(lambda A, B: _joined(A.Ms, B.Ms))


@rule("dot")
def _two(A: StructuredOperator, B: StructuredOperator):
    found = _combined(A, B, product, Product)
    return PSD(found) if is_gram(A, B) else found


def _joined(first: tuple[LinearOperator, ...], second: tuple[LinearOperator, ...]) -> LinearOperator:
    """Return the product of all members; adjacent ones are combined, starting where the two sequences meet."""
    while first and second and (found := product(first[-1], second[0])) is not None:
        first, second = first[:-1], second[1:]
        if first:
            second = (found, *second)
        else:
            first = (found,)
    members = first + second
    return members[0] if len(members) == 1 else Product(*members)


def is_gram(A: StructuredOperator, B: StructuredOperator) -> bool:
    """Whether B is the transpose of the real operator A, that is, has the same arrays."""
    if len(A.factors) != len(B.factors) or lapack(A.factors[0]).is_complex(A.factors[0]):
        return False
    transposed = A.structure.transpose_factors(A.factors)
    return A._transposed == B.structure and all(f is g for f, g in zip(transposed, B.factors, strict=True))


def product(A: LinearOperator, B: LinearOperator) -> LinearOperator | None:
    """Return ``A @ B`` as one operator; None if there is none, or if it costs more MACs than both together."""
    if A.shape[1] != B.shape[0]:
        return None  # CoLA raises the error
    for scalar, other in ((A, B), (B, A)):
        if isinstance(scalar, ScalarMul) and isinstance(other, StructuredOperator):
            return multiple(other, scalar.c)
    ours = isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator)
    if ours and (answer := A.structure.product(A, B)) is not None:
        best = answer.value
    else:
        best = min((op for op in (_scaled_rows(A, B), _low_rank(A, B)) if op is not None), key=_cost, default=None)
    if best is None or _cost(best) > _cost(A, B):
        return None
    return annotated(best, [kind for kind in (Unitary, Stiefel) if A.isa(kind) and B.isa(kind)][:1])


def _scaled_rows(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """Return the product of a diagonal and a dense or block-diagonal matrix, with scaled rows or columns."""
    for diagonal, other, rows in ((A, B, True), (B, A, False)):
        value = diagonal_of(diagonal)
        if value is None or getattr(value, "ndim", 0) == 0 or not isinstance(other, StructuredOperator):
            continue
        blocks = chains.matrix_blocks(other) if isinstance(other.structure, Structure) else None
        if blocks is None:
            continue
        blocks, value = promoted(blocks, in_library(value, blocks))
        shape = (blocks.shape[0], -1, 1) if rows else (blocks.shape[0], 1, -1)
        return chains.from_blocks(other, blocks * value.reshape(shape))
    return None


def _low_rank(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """Return (U V) B = U (V B) or A (U V) = (A U) V; the one of lower rank if both have low rank."""
    if A.dtype != B.dtype and not (isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator)):
        return None  # not all of CoLA's operators take arrays of another dtype
    first, second = combinations.low_rank_factors(A), combinations.low_rank_factors(B)
    if first is not None and (second is None or first[0].shape[1] <= second[0].shape[1]):
        U, V = first
        return LowRank(*promoted(U, V @ B)[::-1])
    if second is not None:
        U, V = second
        return LowRank(*promoted(A @ U, V)[::-1])
    return None


# -- sums ------------------------------------------------------------------------------------------------------------


rule("add", types=(Sum, StructuredOperator))(lambda A, B: _merged(A, B, (*A.Ms, B)))
rule("add", types=(StructuredOperator, Sum))(lambda A, B: _merged(B, A, (A, *B.Ms)))


def _merged(terms: Sum, new: StructuredOperator, otherwise: tuple[LinearOperator, ...]) -> LinearOperator:
    """Return ``terms + new``, with ``new`` added to the first term with which it is one operator."""
    for i, M in enumerate(terms.Ms):
        found = total(M, new)
        if found is not None:
            members = (*terms.Ms[:i], found, *terms.Ms[i + 1 :])
            return members[0] if len(members) == 1 else Sum(*members)
    return Sum(*otherwise)


def total(A: LinearOperator, B: LinearOperator) -> StructuredOperator | None:
    """Return ``A + B`` as one operator, or None."""
    if tuple(A.shape) != tuple(B.shape):
        return None  # CoLA raises the error
    found = None
    if isinstance(A, StructuredOperator) and isinstance(B, StructuredOperator):
        answer = A.structure.sum(A, B) if type(A.structure) is type(B.structure) else None
        found = answer.value if answer is not None and _cost(answer.value) <= _cost(A, B) else None
    for first, second in ((A, B), (B, A)):
        if found is None and isinstance(first, StructuredOperator):
            found = _plus_diagonal(first, second)
    if found is None:
        return None
    kept = (A.annotations & B.annotations) - {Unitary, Stiefel}
    if not kept and A.isa(SelfAdjoint) and B.isa(SelfAdjoint):
        kept = {SelfAdjoint}
    return annotated(found, kept)


def _plus_diagonal(A: StructuredOperator, B: LinearOperator) -> StructuredOperator | None:
    """Return A plus a diagonal matrix B, if A stores its diagonal; else None."""
    value = diagonal_of(B)
    if value is None:
        return None
    example = A.factors[0]
    if lapack(example).is_integer(example):
        return None
    value = in_library(value, example) if hasattr(value, "dtype") else as_array(value, example)
    answer = A.structure.shifted(A, value)
    return None if answer is None else answer.value


# -- multiples -------------------------------------------------------------------------------------------------------


rule("mul", types=(StructuredOperator, object))(lambda A, c: multiple(A, c))


@rule("mul")
def _scaled_product(A: Product, c: object):
    """Scale the structured member with the smallest factor; a scalar commutes with every matrix."""
    sizes = [_smallest(M)[1] if isinstance(M, StructuredOperator) else None for M in A.Ms]
    known = [s for s in sizes if s is not None]
    value, dtype = as_scalar(A, c)
    if not known or dtype != A.dtype:
        return implementation("mul", LinearOperator, object)(A, c)
    place = sizes.index(min(known))
    found = Product(*A.Ms[:place], multiple(A.Ms[place], c), *A.Ms[place + 1 :])
    return annotated_multiple(found, A, value)


def _smallest(A: StructuredOperator) -> tuple[int, int | None]:
    """Return place and size of the smallest trainable factor; the size is None if there is none."""
    sizes = [(spec.numel, i) for i, spec in enumerate(A.structure.factors) if spec.trainable]
    size, place = min(sizes, default=(None, 0))
    return place, size


def multiple(A: StructuredOperator, c: Any) -> LinearOperator:
    """Return ``c A``, with c multiplied into the smallest factor; gradients reach c and the factor.

    The result is a product with a ScalarMul if A has no trainable factor (a permutation), or if A is real and c is
    complex.
    """
    value, dtype = as_scalar(A, c)
    place, size = _smallest(A)
    if size is None or dtype != A.dtype:
        return implementation("mul", LinearOperator, object)(A, c)
    factors = list(A.factors)
    factors[place] = factors[place] * as_array(value, factors[place])
    scaled = A._with(A.structure, tuple(factors), frozenset())
    return annotated_multiple(scaled, A, value)


def annotated_multiple(found: LinearOperator, A: LinearOperator, c: Any) -> LinearOperator:
    found.annotations = scaled_annotations(set(A.annotations), known_scalar(c), "complex" in str(A.dtype))
    return found


# -- Kronecker products ----------------------------------------------------------------------------------------------


@rule("kron")
def _kronecker(A: StructuredOperator, B: StructuredOperator):
    answer, whole = A.structure.kron(A, B), ColaKronecker(A, B)
    if answer is None or _cost(answer.value) > _cost(whole):
        return whole
    return annotated(answer.value, whole.annotations)
