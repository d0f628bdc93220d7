"""A chain as a tensor network: which axes each factor shares with the matrix and with the other factors.

Every axis of the chain is numbered where it lives. Where the chain regroups a vector, the axes on both sides are split
into common parts as far as the sizes nest, so that a butterfly, say, becomes a network without any regrouping; where
they do not nest, a constant 0/1 tensor joins the two sides.

Axes of the matrix (of its rows or its columns) are *outer*, those that are summed over are *inner*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from structlin.projection._contract import Axes
from structlin.structure import Structure


@dataclass(frozen=True)
class Network:
    """Axes (numbers) of the factors, of constant operands, and of the rows and columns of the matrix.

    ``joined`` says whether a regrouping was left that needs a constant tensor.
    """

    sizes: dict[int, int]
    factors: tuple[Axes, ...]
    constants: tuple[tuple[Axes, np.ndarray], ...]
    rows: Axes
    columns: Axes
    joined: bool

    @property
    def outer(self) -> Axes:
        """Axes of the rows and of the columns, each once: an axis in both stands for a diagonal."""
        return tuple(dict.fromkeys(self.rows + self.columns))

    def size(self, axes: Iterable[int]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def shape(self, axes: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.sizes[a] for a in axes)

    def split(self, factors: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Factors of the structure, reshaped to the axes of the network."""
        return [f.reshape(self.shape(axes)) for f, axes in zip(factors, self.factors, strict=True)]


def build(structure: Structure) -> Network:
    """The network of a chain, of its full (padded) size."""
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
    constants: list[tuple[Axes, np.ndarray]] = []
    for number, (before, after) in enumerate(boundaries):
        left, right = ([p for a in side for p in parts[a]] for side in (before, after))
        if number in joints:
            n = math.prod(part_sizes[p] for p in left)
            shape = [part_sizes[p] for p in (*left, *right)]
            constants.append(((*left, *right), np.eye(n).reshape(shape)))
        else:
            same |= {r: same[p] for p, r in zip(left, right, strict=True)}

    def named(axes: Iterable[int]) -> Axes:
        return tuple(same[p] for a in axes for p in parts[a])

    constants = [(tuple(same[p] for p in axes), array) for axes, array in constants]
    found = tuple(named(axes) for axes in factors)
    present = {a for axes in found for a in axes} | {a for axes, _ in constants for a in axes}
    outer = dict.fromkeys(named(rows) + named(columns))
    # An axis carried all the way stands in no factor; vectors of ones give it its place in every sum.
    constants += [((a,), np.ones(part_sizes[a])) for a in outer if a not in present]
    return Network(part_sizes, found, tuple(constants), named(rows), named(columns), bool(joints))


def _refine(sizes: Sequence[int], boundaries: Sequence[tuple[list[int], list[int]]]) -> tuple[list[set[int]], set[int]]:
    """Where to cut each axis (suffix products inside it), and the boundaries at which the sizes do not nest."""
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
    """Numbers of the parts of each axis, slowest first, and their sizes; axes of size 1 have no part."""
    parts: list[list[int]] = []
    part_sizes: dict[int, int] = {}
    for size, inside in zip(sizes, cuts, strict=True):
        ends = sorted(inside | {size} | {1}, reverse=True)
        numbers = range(len(part_sizes), len(part_sizes) + len(ends) - 1)
        part_sizes |= dict(zip(numbers, (hi // lo for hi, lo in pairwise(ends)), strict=True))
        parts.append(list(numbers))
    return parts, part_sizes
