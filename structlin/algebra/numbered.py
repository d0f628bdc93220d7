"""The numbered form of a chain: which axes each factor shares with the matrix and with the other factors.

Every axis of the chain is numbered where it lives. Where the chain regroups a vector, the axes on both sides are split
into common parts as far as the sizes nest, so that a butterfly, say, becomes a network without any regrouping; where
they do not nest, a constant 0/1 tensor joins the two sides.

Axes of the matrix (of its rows or its columns) are *outer*, those that are summed over are *inner*. The algebra of
chains (:mod:`structlin.algebra.contract`, :mod:`structlin.algebra.roles`) and :mod:`structlin.projection` are derived
from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import opt_einsum

from structlin._arrays import Array
from structlin.structure import AbstractStructure, Structure

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """Axes (numbers) of the factors and of the rows and columns of the matrix, most significant first.

    Axes of size 1 are left out. ``joints``: for each regrouping that is left, the axes before and those after it, which
    a constant tensor joins. An axis in both rows and columns is the same in row and column.
    """

    sizes: dict[int, int]
    factors: tuple[Axes, ...]
    joints: tuple[tuple[Axes, Axes], ...]
    rows: Axes
    columns: Axes

    @property
    def joined(self) -> bool:
        """Whether a regrouping was left that needs a constant tensor."""
        return bool(self.joints)

    @cached_property
    def constants(self) -> tuple[tuple[Axes, np.ndarray], ...]:
        """Constant operands: an identity for each joint, and ones for an axis of the matrix that no factor has."""
        joints = [(a + b, np.eye(self.size(a)).reshape(self.shape(a + b))) for a, b in self.joints]
        present = {a for axes in self.factors for a in axes} | {a for axes, _ in joints for a in axes}
        return (*joints, *(((a,), np.ones(self.sizes[a])) for a in self.outer if a not in present))

    @property
    def outer(self) -> Axes:
        """Axes of the rows and of the columns, each once: an axis in both stands for a diagonal."""
        return tuple(dict.fromkeys(self.rows + self.columns))

    def size(self, axes: Iterable[int]) -> int:
        """Return the product of the sizes of some axes."""
        return math.prod(self.sizes[a] for a in axes)

    def shape(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Return the sizes of some axes."""
        return tuple(self.sizes[a] for a in axes)

    def split(self, factors: Sequence[Any]) -> list[Any]:
        """Return the factors of the structure, in any library, reshaped to the axes of the network."""
        return [f.reshape(self.shape(axes)) for f, axes in zip(factors, self.factors, strict=True)]


@lru_cache(maxsize=1024)
def network(structure: AbstractStructure) -> Network | None:
    """Return the network; None if the structure is not a chain, or needs a constant tensor."""
    if not isinstance(structure, Structure):
        return None
    found = build(structure)
    return None if found.joined else found


@lru_cache(maxsize=1024)
def build(structure: Structure) -> Network:
    """Return the network of a chain, of its full (padded) size."""
    letters = dict(structure.sizes)
    sizes: list[int] = []

    def new(letter: str) -> int:
        sizes.append(letters[letter])
        return len(sizes) - 1

    live: dict[str, int] = {}
    factors: list[list[int]] = []
    boundaries: list[tuple[list[int], list[int]]] = []
    columns: list[int] = []
    previous = None
    for step in structure.steps:
        if previous is None or step.input != previous.output:
            fresh = {a: new(a) for a in step.input}
            if previous is None:
                columns = list(fresh.values())
            else:
                boundaries.append(([live[a] for a in previous.output], list(fresh.values())))
            live = fresh
        known = live | {a: new(a) for a in step.factor if a not in live}
        factors.append([known[a] for a in step.factor])
        live = {a: known[a] for a in step.output}
        previous = step
    rows = list(live.values())

    cuts, joints = _refine(sizes, boundaries)
    parts, part_sizes = _parts(sizes, cuts)
    same = {p: p for p in part_sizes}
    joined: list[tuple[list[int], list[int]]] = []
    for number, (before, after) in enumerate(boundaries):
        left, right = ([p for a in side for p in parts[a]] for side in (before, after))
        if number in joints:
            joined.append((left, right))
        else:
            same |= {r: same[p] for p, r in zip(left, right, strict=True)}

    def named(axes: Iterable[int]) -> Axes:
        return tuple(same[p] for a in axes for p in parts[a])

    def renamed(axes: Iterable[int]) -> Axes:
        return tuple(same[p] for p in axes)

    return Network(
        part_sizes,
        tuple(map(named, factors)),
        tuple((renamed(left), renamed(right)) for left, right in joined),
        named(rows),
        named(columns),
    )


def _refine(sizes: Sequence[int], boundaries: Sequence[tuple[list[int], list[int]]]) -> tuple[list[set[int]], set[int]]:
    """Return where to cut each axis (suffix products), and the boundaries at which the sizes do not nest."""
    cuts: list[set[int]] = [set() for _ in sizes]
    joints: set[int] = set()

    def ends(axes: Sequence[int]) -> set[int]:
        found, position = set(), 1
        for a in reversed(axes):
            found |= {position * c for c in cuts[a] | {sizes[a]}}
            position *= sizes[a]
        return found

    changed = True
    while changed:
        changed = False
        for number, (before, after) in enumerate(boundaries):
            common = sorted(ends(before) | ends(after) | {1})
            if number in joints or any(high % low for low, high in pairwise(common)):
                joints.add(number)
                continue
            for side in (before, after):
                position = 1
                for a in reversed(side):
                    inside = {p // position for p in common if position < p < position * sizes[a]}
                    changed |= not inside <= cuts[a]
                    cuts[a] |= inside
                    position *= sizes[a]
    return cuts, joints


def _parts(sizes: Sequence[int], cuts: Sequence[set[int]]) -> tuple[list[list[int]], dict[int, int]]:
    """Return the numbers of the parts of each axis, slowest first, and their sizes; axes of size 1 have no part."""
    parts: list[list[int]] = []
    part_sizes: dict[int, int] = {}
    for size, inside in zip(sizes, cuts, strict=True):
        ends = sorted(inside | {size} | {1}, reverse=True)
        numbers = range(len(part_sizes), len(part_sizes) + len(ends) - 1)
        part_sizes |= dict(zip(numbers, (hi // lo for hi, lo in pairwise(ends)), strict=True))
        parts.append(list(numbers))
    return parts, part_sizes


def subscripts(terms: Sequence[Sequence[int]], output: Sequence[int]) -> str:
    """Return the einsum string of terms whose axes are integers; an axis that occurs twice selects the diagonal."""

    def word(axes: Sequence[int]) -> str:
        return "".join(map(opt_einsum.get_symbol, axes))

    return f"{','.join(map(word, terms))}->{word(output)}"


def einsum(operands: Sequence[Array], terms: Sequence[Sequence[int]], output: Sequence[int]) -> Array:
    """Contract arrays along the axes in ``terms``, in the cheapest order that opt_einsum finds."""
    return opt_einsum.contract(subscripts(terms, output), *operands)
