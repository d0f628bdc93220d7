"""The spectral-scale rule for the arrays of a composite: sums, products, Kronecker products, blocks of operators.

The rule of :mod:`structlin.scale` for a factor applies to each array with the fans of that array. The composite
contributes two numbers: how many arrays an update passes through on the way to the output, and at how many positions of
an intermediate vector the array acts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cola
from cola.ops import LinearOperator

from structlin._arrays import Array
from structlin.counting import _memory
from structlin.operators import StructuredOperator
from structlin.scale import OPTIMIZERS

__all__ = ["ArrayScale", "array_scales"]


class ArrayScale(NamedTuple):
    """One array of a composite, with its scale.

    Attributes
    ----------
    array
        The array itself.
    init_std
        Standard deviation with which to initialise it.
    lr_multiplier
        Multiplier of its learning rate.
    """

    array: Array
    init_std: float
    lr_multiplier: float


@dataclass(frozen=True)
class _Leaf:
    """An array with its fans.

    ``positions``: number of vectors of length fan_out in the intermediate vector that contains its output. For a
    factor these are its blocks times its carried positions.
    """

    array: Array
    fan_in: int
    fan_out: int
    positions: float


def array_scales(
    A: LinearOperator, *, optimizer: str = "adam", base_d_in: int | None = None, base_d_out: int | None = None
) -> tuple[ArrayScale, ...]:
    """Return the initial deviation and the learning-rate multiplier of every trainable array of an operator.

    For an operator of one structure they are those of :func:`structlin.init_std` and :func:`structlin.lr_multipliers`.
    In a composite, the number of factors in the rule of Adam is the number of arrays that an update passes through.
    Members of a product, a sum or a Kronecker product contribute their sum, those of BlockDiag and Concatenated their
    maximum. An array that occurs several times counts each time and gets the smallest of its values. Scalars and CoLA's
    Diagonal have fans of 1. Index arrays are left out.

    Parameters
    ----------
    A
        An operator of this package, CoLA's Dense, Triangular, Diagonal, ScalarMul, Identity or Permutation, or a
        composite of them.
    optimizer, base_d_in, base_d_out
        As for :func:`structlin.lr_multipliers`.

    Returns
    -------
    tuple of ArrayScale
        One entry for each array, in the order in which the arrays occur.

    Raises
    ------
    ValueError
        If the optimizer is unknown or a base size is below 1.
    TypeError
        If A is not an operator, or contains an operator of another type.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Kronecker
    >>> A, B = np.ones((4, 2)), np.ones((3, 8))
    >>> [s.lr_multiplier for s in array_scales(Kronecker(A, B))]
    [4.0, 1.0]
    >>> [s.lr_multiplier for s in array_scales(cola.ops.Kronecker(cola.ops.Dense(A), cola.ops.Dense(B)))]
    [4.0, 1.0]
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(f"A must be a linear operator, got {type(A).__qualname__}; wrap an array in cola.ops.Dense")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    d_in = int(A.shape[1]) if base_d_in is None else base_d_in
    d_out = int(A.shape[0]) if base_d_out is None else base_d_out
    if d_in < 1 or d_out < 1:
        raise ValueError(f"base sizes must be at least 1, got base_d_in={d_in}, base_d_out={d_out}")
    depth = _depth(A)
    found: dict[Any, ArrayScale] = {}
    for leaf in _leaves(A):
        std = math.sqrt(min(leaf.fan_in, leaf.fan_out)) / leaf.fan_in
        if optimizer == "sgd":
            multiplier = leaf.positions * (leaf.fan_out / leaf.fan_in) * (d_in / d_out)
        else:
            multiplier = d_in / (leaf.fan_in * depth)
        new = ArrayScale(leaf.array, std, multiplier)
        old = found.setdefault(_memory(leaf.array), new)
        smallest = ArrayScale(old.array, min(old.init_std, std), min(old.lr_multiplier, multiplier))
        found[_memory(leaf.array)] = smallest
    return tuple(found.values())


_SIDE_BY_SIDE = (cola.ops.BlockDiag, cola.ops.Concatenated)
_OF_MEMBERS = (cola.ops.Product, cola.ops.Sum, cola.ops.Kronecker, cola.ops.KronSum, *_SIDE_BY_SIDE)
_AROUND_ONE = (cola.ops.Transpose, cola.ops.Adjoint, cola.ops.Sliced)
_WITHOUT = (cola.ops.Identity, cola.ops.Permutation)


def _depth(A: LinearOperator) -> int:
    """Return the number of arrays that an update passes through."""
    if isinstance(A, StructuredOperator):
        return sum(f.trainable for f in A.structure.factors)
    if isinstance(A, _AROUND_ONE):
        return _depth(A.A)
    if isinstance(A, _OF_MEMBERS):
        depths = map(_depth, A.Ms)
        return max(depths) if isinstance(A, _SIDE_BY_SIDE) else sum(depths)
    return 0 if isinstance(A, _WITHOUT) else 1


def _leaves(A: LinearOperator, transposed: bool = False) -> Iterator[_Leaf]:
    """Yield the arrays of A, or of its transpose, with their fans."""
    if isinstance(A, StructuredOperator):
        for spec, array in zip(A.structure.factors, A.factors, strict=True):
            if spec.trainable:
                fans = (spec.fan_out, spec.fan_in) if transposed else (spec.fan_in, spec.fan_out)
                yield _Leaf(array, *fans, spec.blocks * spec.carried)
    elif isinstance(A, cola.ops.Dense | cola.ops.Triangular):
        d_out, d_in = A.shape[::-1] if transposed else A.shape
        yield _Leaf(A.A, d_in, d_out, 1)
    elif isinstance(A, cola.ops.Diagonal | cola.ops.ScalarMul):
        yield _Leaf(A.diag if isinstance(A, cola.ops.Diagonal) else A.c, 1, 1, A.shape[0])
    elif isinstance(A, cola.ops.Sliced):
        yield from _leaves(A.A, transposed)
    elif isinstance(A, cola.ops.Transpose | cola.ops.Adjoint):
        yield from _leaves(A.A, not transposed)
    elif isinstance(A, _OF_MEMBERS):
        for place, M in enumerate(A.Ms):
            for leaf in _leaves(M, transposed):
                yield replace(leaf, positions=leaf.positions * _beside(A, place, int(transposed)))
    elif not isinstance(A, _WITHOUT):
        raise TypeError(f"the scale rule has no fans for {type(A).__name__} of shape {tuple(A.shape)}")


def _beside(A: Any, place: int, out: int) -> float:
    """Return how often the outputs of a member occur in the vector that contains them; ``out`` is their axis."""
    if isinstance(A, cola.ops.Kronecker | cola.ops.KronSum):  # the members are applied in turn, the first one first
        before, after = A.Ms[:place], A.Ms[place + 1 :]
        return math.prod(M.shape[out] for M in before) * math.prod(M.shape[1 - out] for M in after)
    stacked = isinstance(A, cola.ops.BlockDiag) or (isinstance(A, cola.ops.Concatenated) and A.axis == out)
    return float(A.shape[out] / A.Ms[place].shape[out]) if stacked else 1.0
