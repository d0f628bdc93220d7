"""The orders of axes of a chain's arrays for a few tokens, and the products of its two passes.

Every array of activations has a row for each token, in scratch memory that stays in cache. The length of a row is an
odd number of cache lines, so that rows of neighbouring tokens do not map to the same sets of the cache. The order of
axes within a row can be chosen for each activation between two steps and its gradient, and for each factor, which is
copied in advance. It determines the axis along which the vectors of a product run (:mod:`._product`). All orders that
end with the axes of one role are tried, and the cheapest is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from structlin._parse import Step
from structlin.execution.compiled._arrange import arrangeable
from structlin.execution.compiled._product import BYTES, TOKENS, Axis, Product, Strides, make_products
from structlin.execution.compiled._target import Target
from structlin.execution.compiled._tiles import SIDE, Turn, cost_of, faster, gradient_cost, with_turn
from structlin.execution.compiled._turns import with_copy

LINE = 64  # bytes
PAIR = {"plain": 0, "half": 2, "zipped": 1}  # elements of a pair in an activation of this form; there are none in plain


@dataclass(frozen=True)
class Operation:
    """A product, and the order of the factor's axes (of its gradient) that it reads (writes).

    Of a ``paired`` product the factor is in bfloat16, and if it is read in vectors further in pairs:
    ``(..., k, n)`` is stored as ``(..., k / 2, n, 2)``. ``reads``: the form of the activation, plain, half (in
    bfloat16), or zipped by the operation that writes it along its axis ``zips``; where it comes from outside, when it
    is copied, along the axis ``enters``. ``turn``: it reads a copy of that.
    """

    product: Product
    order: tuple[int, ...]
    reads: str = "plain"
    zips: Axis | None = None
    enters: Axis | None = None
    turn: Turn | None = None

    @property
    def copied(self) -> str:
        """The form of the copy that it reads."""
        return "turned" if self.product.paired else "exchanged"

    @property
    def in_pairs(self) -> int:
        """Numbers that follow each pair of a factor in pairs, 0 of others."""
        return self.product.across.size if self.product.paired and not self.product.swapped else 0

    def by_tiles(self, target: Target, element: str) -> bool:
        """Whether it runs by tiles."""
        return self.product.paired and faster(self.product, target, element, self._unit) is not None

    def cost(self, target: Target, element: str) -> float:
        """Return the estimated instructions for one token, with those of its copy."""
        copy = 0.0 if self.turn is None else self.turn.cost
        return cost_of(self.product, target, element, self._unit) + copy

    def tiles(self, target: Target, element: str, tokens: int) -> int:
        """Return the approximate number of tiles of sums for this number of tokens, in registers or by four of AMX."""
        product = self.product
        if not self.by_tiles(target, element):
            return product.tiles(target, element, tokens)
        outer = math.prod(a.size or tokens for a in (*product.outer, *product.near))
        down = product.down.size if product.down and product.down.size else tokens
        return outer * math.ceil(product.across.size / (2 * SIDE)) * math.ceil(down / (2 * SIDE))

    @property
    def _unit(self) -> int:
        return PAIR["half"] if self.product.swapped else PAIR[self.reads] if self.turn is None else 1


@dataclass(frozen=True)
class Schedule:
    """The two passes over a chain.

    ``states``: the axes of each activation in order, input first. ``widths``: numbers in each for one token. ``rows``:
    from one token to the next in scratch memory. ``forward[k]`` writes activation k + 1, ``back[k]`` the gradient of
    activation k, and ``gradients[k]`` adds to that of factor k. ``cost`` and ``back_cost`` are estimated instructions
    for one token.
    """

    states: tuple[str, ...]
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    forward: tuple[Operation, ...]
    back: tuple[Operation, ...]
    gradients: tuple[Operation, ...]
    cost: float
    back_cost: float


class _Maker:
    def __init__(
        self, steps: Sequence[Step], sizes: Mapping[str, int], target: Target, element: str, ends: Mapping[int, int],
        pairs: bool, between: Mapping[str, int], packed: bool, states: Sequence[str],
    ) -> None:  # fmt: skip
        self.steps, self.sizes, self.target, self.element, self.ends = steps, sizes, target, element, ends
        self.pairs, self.between, self.packed, self.states = pairs, between, packed, states
        written = [steps[0].input, *(step.output for step in steps)]
        self.widths = tuple(math.prod(sizes[a] for a in axes) for axes in written)
        self.rows = tuple(
            row(math.prod(self._in_memory(k)[a] for a in axes), element) for k, axes in enumerate(written)
        )

    def _in_memory(self, number: int) -> Mapping[str, int]:
        """Return the sizes of the array that an activation is a slice of."""
        return self.between if 0 < number < len(self.steps) else self.sizes

    def strides(self, order: str, number: int, ends: Mapping[int, int] = MappingProxyType({})) -> Strides:
        found, stride = {TOKENS: ends.get(number, self.rows[number])}, 1
        for axis in reversed(order):
            found[axis] = stride
            stride *= self._in_memory(number)[axis]
        return found

    def orders(self, number: int) -> list[str]:
        """Return the candidates for activation ``number``, in the axes of the step that writes it."""
        written = self.steps[number - 1].output if number else self.steps[0].input
        if self.states:
            return [self.states[number]]
        if number in (0, len(self.steps)) or self.steps[number].input != written:
            return [written]  # the caller's, or regrouped
        before, after = self.steps[number - 1], self.steps[number]
        roles = (before.free, after.contracted, before.carried, after.carried, before.batch, after.batch, after.free)
        found = [written]
        for role in roles:
            for group in (role, "".join(a for a in written if a in role), role[::-1]):
                if set(group) <= set(written):
                    found.append("".join(a for a in written if a not in group) + group)
        return list(dict.fromkeys(found))

    def read(self, order: str, number: int) -> str:
        """Return the axes of an activation as the step after it names them: others, where it is regrouped."""
        written = self.steps[number - 1].output if number else self.steps[0].input
        return order if self.steps[number].input == written else self.steps[number].input

    def multiply(self, step: Step, source: str, at: int, target: str, to: int) -> tuple[float, Operation | None]:
        """Return the cheapest way from activation ``at`` in the order ``source`` to ``to`` in the order ``target``."""
        left, out = self.strides(source, at), self.strides(target, to, self.ends)
        few = not self.packed
        return self._cheapest(
            step, source, target, lambda weight: make_products(self.sizes, out, left, weight, few), False
        )

    def gradient(self, step: Step, source: str, at: int, target: str, to: int) -> tuple[float, Operation | None]:
        """Return the cheapest way to add to the gradient of a factor, from the activation and the gradient after it."""
        right, left = self.strides(source, at), self.strides(target, to)
        return self._cheapest(step, source, target, lambda weight: make_products(self.sizes, weight, left, right), True)

    def _cheapest(
        self, step: Step, source: str, target: str, make: Callable[[Strides], list[Product]], gradient: bool
    ) -> tuple[float, Operation | None]:  # fmt: skip
        batch = "".join(a for a in target if a in step.batch)
        contracted = "".join(a for a in source if a in step.contracted)
        free = "".join(a for a in target if a in step.free)
        best: tuple[float, Operation | None] = (math.inf, None)
        orders = [step.factor]
        if self.packed:
            orders += [batch + contracted + free, batch + free + contracted, contracted + free + batch]
        for order in dict.fromkeys(orders):
            strides, stride = {}, 1
            for axis in reversed(order):
                strides[axis] = stride
                stride *= self.sizes[axis]
            for product in make(strides):
                paired = product.pairs() if self.pairs and not gradient else None
                places = tuple(step.factor.index(a) for a in order)
                shape = [self.sizes[a] for a in step.factor]
                if paired is not None and not arrangeable(shape, places, paired.across.size):
                    paired = None
                reads = "plain" if paired is None else "half"
                spent = cost_of(paired or product, self.target, self.element, PAIR[reads])
                if spent < best[0]:
                    best = spent, Operation(paired or product, places, reads)
        return best


def row(width: int, element: str) -> int:
    """Return the number of elements from one token to the next: an odd number of whole cache lines."""
    line = LINE // BYTES[element]
    return (math.ceil(width / line) // 2 * 2 + 1) * line


def make_schedule(
    steps: Sequence[Step], sizes: Mapping[str, int], target: Target, element: str, d_in: int, d_out: int,
    rows: bool = True, pairs: bool = False, strides: tuple[int, int] | None = None,
    between: Mapping[str, int] | None = None, packed: bool = True, inner: tuple[bool, bool] = (False, False),
    states: Sequence[str] = (),
) -> Schedule | None:  # fmt: skip
    """Return the cheapest schedule; None if a product has no axis for its vectors.

    ``pairs``: products may take pairs of bfloat16. Not ``packed``: factors are read as they are, by a forward pass
    alone; the schedule has no other.

    The output is written to rows of ``d_out`` numbers, and the gradient of the input to rows of ``d_in``, unless they
    are shorter than the chain's, or no ``rows``, and come from scratch memory. ``strides``: from row to row of the
    input and of the output, where these are slices of longer ones; ``between``: sizes of the axes of which the
    activations between steps are slices. ``inner``: whether the input and the output are in scratch memory anyway.
    ``states``: the orders of the activations, where they are given.
    """
    full = math.prod(sizes[a] for a in steps[0].input), math.prod(sizes[a] for a in steps[-1].output)
    last = len(steps)
    whole = (0, d_in == full[0]), (last, d_out == full[1])
    outside = [uncut and rows and not held for (_, uncut), held in zip(whole, inner, strict=True)]
    given = strides or (d_in, d_out)
    ends = {k: stride for k, stride, direct in zip((0, last), given, outside, strict=True) if direct}
    maker = _Maker(steps, sizes, target, element, ends, pairs, between or sizes, packed, states)
    # Forward: from each order of an activation, the cheapest way from the input. Then back from the output.
    ways: dict[str, tuple[float, list[str], list[Operation]]] = {o: (0.0, [o], []) for o in maker.orders(0)}
    for k, step in enumerate(steps):
        after: dict[str, tuple[float, list[str], list[Operation]]] = {}
        for order, (cost, path, done) in ways.items():
            for target_order in maker.orders(k + 1):
                more, operation = maker.multiply(step, maker.read(order, k), k, target_order, k + 1)
                if operation is not None and cost + more < after.get(target_order, (math.inf,))[0]:
                    after[target_order] = cost + more, [*path, target_order], [*done, operation]
        ways = after
    if not ways:
        return None
    cost, path, forward = min(ways.values(), key=lambda way: way[0])
    if not packed:
        return Schedule(tuple(path), maker.widths, maker.rows, tuple(forward), (), (), cost, 0.0)
    flows: dict[str, tuple[float, list[Operation], list[Operation]]] = {o: (0.0, [], []) for o in maker.orders(last)}
    for k in range(last - 1, -1, -1):
        step = steps[k]
        before: dict[str, tuple[float, list[Operation], list[Operation]]] = {}
        for order, (spent, back, gradients) in flows.items():
            more, gradient = maker.gradient(step, maker.read(path[k], k), k, order, k + 1)
            if gradient is None:
                continue
            for source in maker.orders(k):
                extra, operation = maker.multiply(step.transpose(), order, k + 1, maker.read(source, k), k)
                total = spent + more + extra
                if operation is not None and total < before.get(source, (math.inf,))[0]:
                    # The transposed step names the same factor: its axes are in the same places.
                    before[source] = total, [operation, *back], [gradient, *gradients]
        flows = before
    if not flows:
        return None
    back_cost, back, gradients = min(flows.values(), key=lambda way: way[0])
    if pairs:
        shapes = [[sizes[a] for a in step.factor] for step in steps]
        forward = _zipped(forward, shapes, whole[0][1])
        back = _zipped(back[::-1], shapes[::-1], whole[1][1])[::-1]
    if pairs and target.tiles:
        forward, back = (
            [_copying(one, with_turn(one.product, target, element, PAIR[one.reads])) for one in part]
            for part in (forward, back)
        )
        cost, back_cost = (sum(operation.cost(target, element) for operation in part) for part in (forward, back))
        for k, gradient in enumerate(gradients):
            width = maker.widths[k if gradient.product.swapped else k + 1]
            vectors = gradient.product.cost(target, element) / 2
            back_cost += min(vectors, gradient_cost(gradient.product, width) or vectors)
    if packed:

        def exchanged(one: Operation, read: int) -> Operation:
            return _copying(one, with_copy(one.product, target, element, maker.widths[read]))

        forward = [exchanged(one, k) for k, one in enumerate(forward)]
        back = [exchanged(one, k + 1) for k, one in enumerate(back)]
        for k, one in enumerate(gradients):
            found = exchanged(one, k if one.product.swapped else k + 1)
            # An activation has one copy: of the others that read it, this one has to be the same.
            other = (forward if one.product.swapped else back)[k].turn
            gradients[k] = found if other in (None, found.turn) else one
    return Schedule(
        tuple(path), maker.widths, maker.rows, tuple(forward), tuple(back), tuple(gradients), cost, back_cost
    )


def _zipped(operations: Sequence[Operation], shapes: Sequence[Sequence[int]], whole: bool) -> list[Operation]:
    """Return operations in order of execution, with pairs along an axis for those that have none.

    ``shapes``: of their factors. ``whole``: what the first one reads is copied without padding.
    """
    found = list(operations)
    for k, operation in enumerate(found):
        before = found[k - 1].product if k else None
        if operation.reads != "plain" or (before is None and not whole):
            continue
        pairs = operation.product.zipped(before)
        if pairs is None:
            continue
        product, axis, inner = pairs
        across = 1 if product.swapped else product.across.size
        order = _moved(operation.order, shapes[k], inner, across)
        if order is None or not arrangeable(shapes[k], order, across):
            continue
        found[k] = replace(operation, product=product, order=order, reads="zipped", enters=None if k else axis)
        if k:
            found[k - 1] = replace(found[k - 1], zips=axis)
    return found


def _copying(operation: Operation, found: tuple[Product, Turn] | None) -> Operation:
    """Return the operation with a product that reads a copy of its activation, if one was found."""
    return operation if found is None else replace(operation, product=found[0], turn=found[1])


def _moved(order: Sequence[int], shape: Sequence[int], inner: Axis, across: int) -> tuple[int, ...] | None:
    """Return the order of a factor's axes with those of ``inner`` moved to before the last ``across`` numbers."""
    parts: dict[str, list[int]] = {"before": [], "inner": [], "across": []}
    start, stride = inner.right or 0, math.prod(shape)
    for axis in order:
        stride //= shape[axis]
        part = "inner" if start <= stride < start * inner.size else "across" if stride < across else "before"
        parts[part].append(axis)
    if math.prod(shape[axis] for axis in parts["inner"]) != inner.size:
        return None
    return *parts["before"], *parts["inner"], *parts["across"]
