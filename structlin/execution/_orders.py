"""The orders of axes of a chain's activations in which every step is one product without copies.

The tokens (vectors) are a further carried axis ``*``. A step is a batched product
``(batch, free, contracted) @ (batch, contracted, rest)``. It needs no copy if the axes of each of the three groups can
be merged into one axis of the memory that it reads and of the memory that it writes. Two layouts satisfy this:

- chains with batch axes: tokens innermost. An activation has the order (batch, contracted, carried axes of the step
  that reads it, ``*``). Contracted axes that are free in the step before come first, so that this step writes them as
  one axis. Gradients have the order that this rule gives for the transposed chain.
- chains without batch axes: tokens outermost, the other axes as written. A step whose contracted axes come last is one
  product of all rows. Any other step is a product for each token (and each carried axis before the contracted ones),
  with the same matrix.

The input and the output are rows (tokens first) or columns (tokens last). They are read and written in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from structlin._parse import Step

TOKENS = "*"
SMALL_BLOCK = 1 << 16  # elements of one matrix


@dataclass(frozen=True)
class Operand:
    """A view (batch, rows, columns) of an activation.

    Each group has a size without tokens, whether it contains the tokens, a stride, and whether to multiply the stride
    by the number of tokens.
    """

    groups: tuple[tuple[int, bool, int, bool], ...]

    def at(self, count: int, total: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sizes and strides for ``count`` tokens of an array that holds ``total``."""
        sizes = tuple(size * count if tokens else size for size, tokens, _, _ in self.groups)
        return sizes, tuple(stride * total if over else stride for _, _, stride, over in self.groups)


def view_of(layout: str, groups: Sequence[str], sizes: Mapping[str, int], sliced: bool) -> Operand | None:
    """Return the view of an activation in ``layout``, or None if the axes of a group cannot be merged.

    ``sliced``: the view has only some of the tokens, so no outer axis merges with them.
    """
    strides: dict[str, tuple[int, bool]] = {}
    stride, over = 1, False
    for axis in reversed(layout):
        strides[axis] = (stride, over)
        if axis == TOKENS:
            over = True
        else:
            stride *= sizes[axis]
    made = []
    for group in groups:
        axes = [a for a in group if a == TOKENS or sizes[a] > 1]
        for before, after in pairwise(axes):
            step, beyond = strides[after]
            wanted = (step, True) if after == TOKENS else (step * sizes[after], beyond)
            if strides[before] != wanted or (sliced and after == TOKENS):
                return None
        last = strides[axes[-1]] if axes else (1, False)
        made.append((math.prod(sizes[a] for a in group if a != TOKENS), TOKENS in group, *last))
    return Operand(tuple(made))


@dataclass(frozen=True)
class Product:
    """One step.

    ``shared``: all items of the batch have the same matrix, because they are tokens or carried axes. ``shape`` has the
    sizes (batch, contracted, free). The matrix is stored as (batch, contracted, free) for the forward pass, with the
    factor's axes in the order ``packed``, and as (batch, free, contracted) in the order ``packed_back`` for the
    backward pass. Its gradient is computed in the order ``gradient``, which is (batch, contracted, free) if
    ``free_last``, otherwise (batch, free, contracted). Only ``small`` matrices are rearranged.
    """

    source: Operand  # (batch, contracted, rest) of the activation before
    target: Operand  # (batch, free, rest) of the activation after
    source_gradient: Operand
    target_gradient: Operand
    shared: bool
    packed: tuple[int, ...]
    packed_back: tuple[int, ...]
    gradient: tuple[int, ...]
    free_last: bool
    small: bool
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Products of a chain, and elements of each activation for one token."""

    products: tuple[Product, ...]
    widths: tuple[int, ...]


def make_layout(steps: Sequence[Step], sizes: Mapping[str, int], rows: bool) -> Layout | None:
    """Return the layout of a chain for ``rows`` or columns; None if a step would need a copy."""
    if any(before.output != step.input for before, step in pairwise(steps)):
        return None  # regrouped: the written order is needed in between
    blocks = any(step.batch for step in steps)
    ends = [TOKENS + axes if rows else axes + TOKENS for axes in (steps[0].input, steps[-1].output)]
    if blocks:
        forward = [ends[0], *(_inner(*pair) for pair in pairwise(steps)), ends[1]]
        flipped = [step.transpose() for step in reversed(steps)]
        backward = [ends[1], *(_inner(*pair) for pair in pairwise(flipped)), ends[0]][::-1]
    elif rows:
        forward = [TOKENS + steps[0].input, *(TOKENS + step.output for step in steps)]
    else:
        return None
    for gradients in (backward, forward) if blocks else (forward,):
        products = [
            _product(
                step, forward[k : k + 2], gradients[k : k + 2], sizes,
                [not rows and k == 0, not rows and k == len(steps) - 1],
            )
            for k, step in enumerate(steps)
        ]  # fmt: skip
        found = tuple(p for p in products if p is not None)
        if len(found) == len(steps):
            return Layout(found, _widths(forward, sizes))
    return None


def _widths(layouts: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[a] for a in layout if a != TOKENS) for layout in layouts)


def _inner(before: Step, step: Step) -> str:
    written = before.output
    batch = "".join(a for a in written if a in step.batch)
    contracted = sorted(step.contracted, key=lambda a: a not in before.free)
    return batch + "".join(contracted) + "".join(a for a in written if a in step.carried) + TOKENS


def _product(
    step: Step, forward: Sequence[str], backward: Sequence[str], sizes: Mapping[str, int], outside: Sequence[bool]
) -> Product | None:
    source, target = forward
    batch = "".join(a for a in source if a in step.batch)
    rest = "".join(a for a in source if a in step.carried or a == TOKENS)
    first = min(source.index(a) for a in step.contracted) if step.contracted else 0
    lead = "".join(a for a in rest if source.index(a) < first)
    groupings = [(batch, rest)] if batch else [("", rest), (lead, rest[len(lead) :])]
    contracted = "".join(a for a in source if a in step.contracted)
    free = "".join(a for a in target if a in step.free)
    contracted_back = "".join(a for a in backward[0] if a in step.contracted)
    free_back = "".join(a for a in backward[1] if a in step.free)
    for items, columns in groupings:
        source_view = view_of(source, (items, contracted, columns), sizes, outside[0])
        target_view = view_of(target, (items, free, columns), sizes, outside[1])
        source_back = view_of(backward[0], (items, contracted_back, columns), sizes, outside[0])
        target_back = view_of(backward[1], (items, free_back, columns), sizes, outside[1])
        if source_view is None or target_view is None or source_back is None or target_back is None:
            continue
        small = math.prod(sizes[a] for a in step.contracted + step.free) <= SMALL_BLOCK
        free_last = small and backward[1].startswith(TOKENS)
        order = batch + (contracted + free_back if free_last else free_back + contracted)
        return Product(
            source_view,
            target_view,
            source_back,
            target_back,
            shared=bool(items) and not batch,
            packed=_order(step, batch + contracted + free),
            packed_back=_order(step, batch + free_back + contracted_back),
            gradient=_order(step, order),
            free_last=free_last,
            small=small,
            shape=tuple(math.prod(sizes[a] for a in group) for group in (batch, contracted, free)),  # type: ignore[arg-type]
        )
    return None


def _order(step: Step, axes: str) -> tuple[int, ...]:
    return tuple(step.factor.index(a) for a in axes)
