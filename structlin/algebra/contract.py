"""Diagonals, traces and inner products of chains by contracting their factors, without the dense matrix.

A chain is a network (:mod:`structlin.algebra.numbered`): factors joined along axes, with the axes of the row and of the
column index open. Joining row and column axes gives the trace or the diagonal, joining two networks their inner
product. Where row and column are split into different sizes, entries are gathered: one index runs over the entries
wanted and picks its slice of every factor. Each is done only where it costs fewer multiplications than the dense
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import opt_einsum

from structlin._arrays import Array
from structlin._lapack import known, lapack
from structlin.algebra.numbered import Network, einsum, network, subscripts
from structlin.operators import StructuredOperator
from structlin.structure import AbstractStructure

_Terms = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def cost(terms: _Terms, output: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """Return the multiplications of the contraction that opt_einsum finds."""
    if len(terms) == 1:
        return 0.0
    shapes = [tuple(sizes[a] for a in term) for term in terms]
    _, info = opt_einsum.contract_path(subscripts(terms, output), *shapes, shapes=True)
    return float(info.opt_cost)


def dense_cost(structure: AbstractStructure) -> float:
    """Return the operations to build the dense matrix by applying the structure to the identity."""
    return min(structure.shape) * structure.flops / 2


class _Join:
    """Axes that are to be the same, as classes with one representative each."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def __call__(self, axis: int) -> int:
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def join(self, a: int, b: int) -> None:
        self.parent[self(a)] = self(b)

    def terms(self, terms: _Terms) -> _Terms:
        return tuple(tuple(self(a) for a in term) for term in terms)


@lru_cache(maxsize=1024)
def _closed(structure: AbstractStructure) -> tuple[_Terms, tuple[int, ...], tuple[int, ...]] | None:
    """Return (terms, axes of the diagonal, sizes) of the network whose row and column index are joined."""
    net = network(structure)
    if net is None or net.shape(net.columns) != net.shape(net.rows):
        return None
    join = _Join(len(net.sizes))
    for a, b in zip(net.columns, net.rows, strict=True):
        join.join(a, b)
    return join.terms(net.factors), tuple(join(a) for a in net.columns), _sizes(net)


def _sizes(net: Network) -> tuple[int, ...]:
    return tuple(net.sizes[a] for a in range(len(net.sizes)))


def trace(A: StructuredOperator) -> Array | None:
    """Sum of the diagonal of a square chain, or None if contraction costs more than the dense matrices."""
    structure = A.structure
    closed = _closed(structure)
    if closed is None or structure.padding != (0, 0):  # type: ignore[attr-defined]
        return None
    terms, diagonal, sizes = closed
    if cost(terms, (), sizes) >= dense_cost(structure):
        return None
    touched = {a for term in terms for a in term}
    repeats = math.prod(sizes[a] for a in set(diagonal) - touched)
    return einsum(_split(A), terms, ()) * repeats


def _split(A: StructuredOperator) -> list[Array]:
    net = network(A.structure)
    assert net is not None
    return net.split(A.factors)


def diagonal(A: StructuredOperator, k: int = 0) -> Array | None:
    """Return the k-th diagonal of a chain, or None if contraction costs more than the dense matrices."""
    if k == 0 and (found := _joined_diagonal(A)) is not None:
        return found
    d_out, d_in = A.shape
    count = min(d_out + min(k, 0), d_in - max(k, 0))
    start = np.arange(count)
    return entries(A, start - min(k, 0), start + max(k, 0))


def _joined_diagonal(A: StructuredOperator) -> Array | None:
    closed = _closed(A.structure)
    if closed is None:
        return None
    terms, axes, sizes = closed
    touched = {a for term in terms for a in term}
    # An axis joined with itself elsewhere leaves zeros between, which einsum cannot write.
    if len(set(axes)) < len(axes) or cost(terms, tuple(a for a in axes if a in touched), sizes) >= dense_cost(
        A.structure
    ):
        return None
    present = tuple(a for a in axes if a in touched)
    found = einsum(_split(A), terms, present)
    shape = tuple(sizes[a] for a in axes)
    if len(present) < len(axes):
        found = found.reshape(tuple(sizes[a] if a in touched else 1 for a in axes))
        found = found + lapack(found).zeros(shape, found)
    return found.reshape((math.prod(shape),))[: min(A.shape)]


def entries(A: StructuredOperator, rows: np.ndarray, columns: np.ndarray) -> Array | None:
    """Return ``A[rows[i], columns[i]]`` for each i; None if gathering costs more than the dense matrix."""
    net = network(A.structure)
    if net is None or len(rows) == 0:
        return None
    wanted = len(net.sizes)  # the axis that runs over the entries
    sizes = (*_sizes(net), len(rows))
    places: dict[int, np.ndarray] = {}
    kept = np.ones(len(rows), dtype=bool)
    for axes, index in ((net.columns, columns), (net.rows, rows)):
        split = np.unravel_index(index, net.shape(axes)) if axes else ()
        for axis, place in zip(axes, split, strict=True):
            if axis in places:  # carried through: zero unless row and column agree
                kept &= places[axis] == place
            else:
                places[axis] = place
    terms = tuple(
        ((wanted,) if any(a in places for a in term) else ()) + tuple(a for a in term if a not in places)
        for term in net.factors
    )
    gathered = sum(math.prod(sizes[a] for a in term) for term in terms)
    output = (wanted,) if any(wanted in term for term in terms) else ()
    if cost(terms, output, sizes) + gathered >= dense_cost(A.structure):
        return None
    xp = lapack(A.factors[0])
    operands = [_pick(f, term, places, xp) for f, term in zip(_split(A), net.factors, strict=True)]
    found = einsum(operands, terms, output)
    if not output:  # every axis of row and column is carried through
        found = found + xp.zeros((len(rows),), A.factors[0])
    return found if kept.all() else xp.where(xp.index(kept, found), found, found * 0)


def _pick(factor: Array, term: Sequence[int], places: dict[int, np.ndarray], xp: object) -> Array:
    """Return the slices of ``factor`` at the places of its open axes, one for each entry, in front."""
    opened = [i for i, a in enumerate(term) if a in places]
    if not opened:
        return factor
    order = (*opened, *(i for i in range(len(term)) if i not in opened))
    lib = lapack(factor)
    if order != tuple(range(len(order))):
        factor = lib.permute(factor, order)
    return factor[tuple(lib.index(places[term[i]], factor) for i in opened)]


@lru_cache(maxsize=1024)
def _pair(a: AbstractStructure, b: AbstractStructure) -> tuple[_Terms, tuple[int, ...], int] | None:
    """Return (terms of a then b, sizes, how often the sum counts) of the inner product of two chains."""
    first, second = network(a), network(b)
    if first is None or second is None or a.padding != (0, 0) or b.padding != (0, 0):  # type: ignore[attr-defined]
        return None
    if any(first.shape(getattr(first, side)) != second.shape(getattr(second, side)) for side in ("rows", "columns")):
        return None
    shift = len(first.sizes)
    join = _Join(shift + len(second.sizes))
    for x, y in zip(first.columns + first.rows, second.columns + second.rows, strict=True):
        join.join(x, y + shift)
    terms = join.terms(first.factors + tuple(tuple(x + shift for x in t) for t in second.factors))
    sizes = _sizes(first) + _sizes(second)
    open_axes = {join(x) for x in first.columns + first.rows}
    repeats = math.prod(sizes[x] for x in open_axes - {x for t in terms for x in t})
    return terms, sizes, repeats


def inner(A: StructuredOperator, B: StructuredOperator) -> Array | None:
    """Return ``sum(conj(A) * B)`` of two chains, or None if contraction costs more than the dense matrices."""
    found = _pair(A.structure, B.structure)
    if found is None:
        return None
    terms, sizes, repeats = found
    if cost(terms, (), sizes) >= dense_cost(A.structure) + dense_cost(B.structure):
        return None
    xp = lapack(A.factors[0])
    (left, first), (right, second) = scaled(_split(A)), scaled(_split(B))
    return einsum([*map(xp.conj, left), *right], terms, ()) * repeats * product_of(first) * product_of(second)


def scaled(factors: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Return factors divided by their largest magnitudes, whose products stay in the range, and the magnitudes."""
    xp = lapack(factors[0])
    sizes = [xp.max(xp.abs(xp.stop_gradient(f))) for f in factors]
    sizes = [xp.where(s > 0, s, s * 0 + 1) for s in sizes]
    return [f / s for f, s in zip(factors, sizes, strict=True)], sizes


def product_of(numbers: Sequence[Array]) -> Array:
    """Return the product of positive numbers; if they are known, no partial product leaves the range before it does."""
    sizes = [known(x) for x in numbers]
    if len(sizes) < 3 or None in sizes:
        return math.prod(numbers)
    rest = sorted(range(len(sizes)), key=lambda k: sizes[k] or 0.0)
    found = numbers[rest.pop()]
    while rest:
        found = found * numbers[rest.pop(0 if (known(found) or 0.0) >= 1 else -1)]
    return found
