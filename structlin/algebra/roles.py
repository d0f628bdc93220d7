"""Properties of a matrix by the axis roles of its chain: blocks, Kronecker and block-diagonal form, bottleneck.

Step k of a chain is, between two permutations of axes, a block-diagonal matrix: one block of (fan_out, fan_in) for
each batch position, repeated at each carried position. From that follow the inverse (the reversed chain of block
inverses), the determinant (products over blocks, with the signs of the permutations), and, from which axes meet which
factors, whether the matrix is a Kronecker product. Everything here looks at structures, not at classes, so that a
transpose, a view of a layer and a chain without a name get the same treatment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from structlin._arrays import Array, backend_of, ops
from structlin._lapack import lapack
from structlin.algebra.numbered import network
from structlin.execution.products import plan_of
from structlin.operators import StructuredOperator
from structlin.structure import AbstractStructure, Step, Structure


def blocks_of(structure: Structure, number: int, factor: Array) -> Array:
    """Return factor ``number`` as an array of shape (blocks, fan_out, fan_in)."""
    step, spec = structure.steps[number], structure.factors[number]
    order = tuple(step.factor.index(a) for a in step.batch + step.free + step.contracted)
    if order != tuple(range(len(order))):
        factor = ops(backend_of(factor)).permute(factor, order)
    wanted = (spec.blocks, spec.fan_out, spec.fan_in)
    return factor if factor.shape == wanted else factor.reshape(wanted)


def is_square_chain(structure: AbstractStructure) -> bool:
    """Whether the blocks of every step are square and nothing is padded, so that steps invert one by one."""
    return (
        isinstance(structure, Structure)
        and structure.padding == (0, 0)
        and all(f.fan_in == f.fan_out for f in structure.factors)
    )


def is_dense(structure: AbstractStructure) -> bool:
    """Whether it is one step that is one unpadded block."""
    return (
        isinstance(structure, Structure)
        and len(structure.steps) == 1
        and structure.padding == (0, 0)
        and structure.factors[0].blocks == structure.factors[0].carried == 1
    )


@lru_cache(maxsize=1024)
def rank_bound(structure: AbstractStructure) -> int:
    """Return an upper bound of the rank, which is cached."""
    return structure.rank_bound


@lru_cache(maxsize=1024)
def inverse_structure(structure: Structure) -> tuple[Structure, tuple[tuple[int, ...], ...]]:
    """Return the reversed chain of a square chain, and how to permute each of its factors.

    Factor k of the result is the inverse blocks of factor -1 - k, an array with the axes (batch, contracted, free) of
    the original, permuted by the k-th tuple: then the product with columns reads it without a copy.
    """
    steps = [Step(s.output, s.batch + s.contracted + s.free, s.input) for s in reversed(structure.steps)]
    built = Structure(tuple(steps), structure.sizes, structure.d_out, structure.d_in)
    wanted = [p.factor_order for p in plan_of(built, rows=False).steps if hasattr(p, "factor_order")]
    orders = [w or tuple(range(len(s.factor))) for w, s in zip(wanted, steps, strict=True)]
    steps = [
        Step(s.input, "".join(s.factor[i] for i in order), s.output) for s, order in zip(steps, orders, strict=True)
    ]
    return Structure(tuple(steps), structure.sizes, structure.d_out, structure.d_in), tuple(orders)


@lru_cache(maxsize=1024)
def solution_steps(structure: Structure) -> tuple[Structure, tuple[tuple[int, ...], ...]]:
    """Return the inverse structure of a square chain, and for each of its factors a permutation.

    The permutation brings the axes of the factor that it inverts into the order (batch, free, contracted) of the
    inverse step.
    """
    inverse, _ = inverse_structure(structure)
    orders = []
    for undone, step in zip(reversed(structure.steps), inverse.steps, strict=True):
        count, width = len(step.batch), len(step.free)
        batch, free, contracted = (
            step.factor[:count],
            step.factor[count : count + width],
            step.factor[count + width :],
        )
        orders.append(tuple(undone.factor.index(a) for a in batch + contracted + free))
    return inverse, tuple(orders)


@lru_cache(maxsize=1024)
def permutation_sign(structure: Structure) -> int:
    """Return the sign, 1 or -1, of all permutations of axes between the blocks of a square chain."""
    sizes = dict(structure.sizes)
    sign = 1
    for step in structure.steps:
        sign *= _order_sign(step.input, step.batch + step.contracted + step.carried, sizes)
        sign *= _order_sign(step.batch + step.free + step.carried, step.output, sizes)
    return sign


def _order_sign(before: str, after: str, sizes: Mapping[str, int]) -> int:
    """Return the sign of the permutation of numbers that reorders the axes of a row-major array.

    Swapping neighbouring axes of sizes m and n transposes a grid, which has m(m-1)/2 n(n-1)/2 inversions; it happens
    once for each position of the axes before, and moves runs as long as the product of the axes behind.
    """
    axes, sign = list(before), 1
    for place, axis in enumerate(after):
        for i in range(axes.index(axis), place, -1):
            m, n = sizes[axes[i - 1]], sizes[axes[i]]
            outer = math.prod(sizes[a] for a in axes[: i - 1])
            inner = math.prod(sizes[a] for a in axes[i + 1 :])
            if outer * inner * (m * (m - 1) // 2) * (n * (n - 1) // 2) % 2:
                sign = -sign
            axes[i - 1], axes[i] = axes[i], axes[i - 1]
    return sign


# -- Kronecker and block-diagonal form ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One member of a Kronecker product, as a (rows, columns) matrix.

    It is a factor on its numbered axes of sizes ``view``, permuted by ``order``. ``factor`` is None for an identity of
    size ``rows``.
    """

    factor: int | None
    view: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    columns: int


@lru_cache(maxsize=1024)
def kronecker_parts(structure: AbstractStructure) -> tuple[Part, ...] | None:
    """Return the members, in order, if the roles make the chain a Kronecker product (of one member: a dense matrix).

    They do if every factor joins axes of the input with axes of the output only, and both indices list the factors'
    axes in the same order. Axes of size 1 do not count.
    """
    net = network(structure)
    if net is None or structure.padding != (0, 0):  # type: ignore[attr-defined]
        return None
    inputs, outputs = list(net.columns), list(net.rows)
    owners: dict[int, int] = {}
    for number, term in enumerate(net.factors):
        for axis in term:
            if axis in owners or (axis in inputs) == (axis in outputs):
                return None
            owners[axis] = number
    members: list[tuple[int | None, list[int], list[int]]] = []
    while inputs or outputs:
        first = (inputs or outputs)[0]
        owner = owners.get(first)
        if owner is None:
            rows = columns = [first]
        else:
            rows, columns = ([a for a in side if owners.get(a) == owner] for side in (outputs, inputs))
        if inputs[: len(columns)] != columns or outputs[: len(rows)] != rows:
            return None
        del inputs[: len(columns)], outputs[: len(rows)]
        members.append((owner, rows, columns))
    found = {owner for owner, _, _ in members}
    members += [(k, [], []) for k in range(len(net.factors)) if k not in found]  # factors of a single number
    parts = []
    for owner, rows, columns in members:
        term = () if owner is None else net.factors[owner]
        order = tuple(map(term.index, [*rows, *columns] if owner is not None else []))
        parts.append(Part(owner, net.shape(term), order, net.size(rows), net.size(columns)))
    return tuple(parts)


def part_matrices(structure: AbstractStructure, factors: Sequence[Array]) -> list[Array] | None:
    """Return the matrices whose Kronecker product the operator is; None if it is none."""
    parts = kronecker_parts(structure)
    if parts is None:
        return None
    xp = ops(backend_of(factors[0]))
    matrices = []
    for part in parts:
        if part.factor is None:
            matrices.append(lapack(factors[0]).eye(part.rows, factors[0]))
            continue
        factor = factors[part.factor]
        if part.order != tuple(range(len(part.order))):
            factor = xp.permute(factor.reshape(part.view), part.order)
        same = factor.shape == (part.rows, part.columns)
        matrices.append(factor if same else factor.reshape((part.rows, part.columns)))
    return matrices


def diagonal_blocks(structure: AbstractStructure, factors: Sequence[Array]) -> Array | None:
    """Return the blocks, (b, n, m), of what is diag(B_1, ..., B_b) as it stands; None for anything else."""
    if not isinstance(structure, Structure) or len(structure.steps) > 1 or structure.padding != (0, 0):
        return None
    step = structure.steps[0]
    count = len(step.batch)
    heads = {step.input[:count], step.output[:count]}
    if not count or step.carried or len(heads) != 1 or set(step.input[:count]) != set(step.batch):
        return None
    names = step.output + step.input[count:]
    order = tuple(step.factor.index(a) for a in names)
    factor = factors[0]
    if order != tuple(range(len(order))):
        factor = ops(backend_of(factor)).permute(factor, order)
    spec = structure.factors[0]
    return factor.reshape((spec.blocks, spec.fan_out, spec.fan_in))


# -- bottleneck ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def bottleneck(structure: AbstractStructure) -> tuple[int, int] | None:
    """Return (width, steps before) of the narrowest intermediate vector of a chain of two steps or more."""
    if not isinstance(structure, Structure) or len(structure.steps) < 2:
        return None
    sizes = dict(structure.sizes)
    widths = [math.prod(sizes[a] for a in s.output) for s in structure.steps[:-1]]
    width = min(widths)
    return width, widths.index(width) + 1


@lru_cache(maxsize=1024)
def _cut(structure: Structure, before: int, width: int) -> tuple[Structure, Structure]:
    table = dict(structure.sizes)

    def part(steps: tuple[Step, ...], d_in: int, d_out: int) -> Structure:
        letters = dict.fromkeys("".join(s.input + s.factor + s.output for s in steps))
        return Structure(steps, tuple((a, table[a]) for a in letters), d_in, d_out)

    return (
        part(structure.steps[:before], structure.d_in, width),
        part(structure.steps[before:], width, structure.d_out),
    )


def thin_factors(op: StructuredOperator) -> tuple[Array, Array] | None:
    """Return (U, V) with ``op = U V``, dense, of shapes (d_out, w) and (w, d_in), w the width of the bottleneck."""
    found = bottleneck(op.structure)
    if found is None:
        return None
    width, before = found
    first, last = _cut(op.structure, before, width)
    return (
        _matrix(last, op.factors[before:], op),
        _matrix(first, op.factors[:before], op),
    )


def _matrix(structure: Structure, factors: Sequence[Array], op: StructuredOperator) -> Array:
    parts = kronecker_parts(structure)
    if parts is not None and len(parts) == 1:
        matrices = part_matrices(structure, factors)
        assert matrices is not None
        return matrices[0]
    return StructuredOperator(structure, factors).to_dense()
