"""The contraction of a chain on a CPU by one batched product of torch for each step, forward and backward.

An activation has the tokens before the axes that the next product sums, ``(batch, tokens, contracted)``. The first
product reads the input in place, and the last one writes the output in place. Between two products there is one copy of
contiguous runs, because factors are copied into an order of axes for which there are such runs. The gradients of
factors are computed in the layout of the factors. So they need no transposed copy, which torch makes when it
differentiates a product with a transposed factor.

This way is for large blocks, which the BLAS multiplies at the rate of a dense product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._parse import Step
from structlin.execution._memory import advised
from structlin.execution.compiled._arrange import Arrangement, load_copies
from structlin.execution.compiled._program import ELEMENTS
from structlin.execution.compiled._rules import copy_shares
from structlin.execution.compiled._target import CompileError, Target, host
from structlin.execution.compiled._team import run_shares

__all__ = ["BatchedChain"]

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_TOKENS = "*"  # no axis of a chain


@dataclass(frozen=True)
class _Move:
    """A permutation of the axes of an array; ``before`` and ``after`` are its shapes."""

    before: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    after: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(self.sizes).permute(self.order).reshape(self.after)

    def back(self, x: Tensor) -> Tensor:
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return x.reshape([self.sizes[axis] for axis in self.order]).permute(inverse).reshape(self.before)


def _move(source: Sequence[str], target: Sequence[str], sizes: Mapping[str, int]) -> _Move:
    """Return the permutation between arrays whose axes merge axes of a chain."""

    def size(axes: str) -> int:
        return -1 if axes == _TOKENS else math.prod(sizes[a] for a in axes)

    single = [a for group in source for a in group]
    order = tuple(single.index(a) for group in target for a in group)
    return _Move(tuple(map(size, source)), tuple(map(size, single)), order, tuple(map(size, target)))


class BatchedChain:
    """A chain for row-major activations; ``runs`` is False if this way cannot run it."""

    runs = False

    def __init__(
        self, steps: Sequence[Step], sizes: Mapping[str, int], rows: bool = True, padding: tuple[int, int] = (0, 0)
    ) -> None:
        if not rows or not steps or any(step.carried for step in steps):
            return
        if any(before.output != after.input for before, after in pairwise(steps)):
            return  # a vector is regrouped
        self.runs, self.padding = True, padding
        self._shapes = [tuple(sizes[a] for a in step.factor) for step in steps]
        self._orders: list[tuple[int, ...]] = []  # of the axes of factors
        self.products: list[tuple[int, int, int]] = []  # batch, free, contracted
        self.enter: list[_Move] = []
        held = [_TOKENS, steps[0].input]  # the array before a product
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            flat = "".join(held)
            batch, contracted = ("".join(a for a in flat if a in role) for role in (step.batch, step.contracted))
            free = "".join(a for a in step.output if a in step.free)
            if after is not None:  # what the next product sums comes last
                free = "".join(sorted(step.free, key=lambda a: a in after.contracted))
            self._orders.append(tuple(step.factor.index(a) for a in batch + free + contracted))
            b, f, c = (math.prod(sizes[a] for a in axes) for axes in (batch, free, contracted))
            self.products.append((b, f, c))
            self.enter.append(_move(held, [batch, _TOKENS, contracted], sizes))
            held = [batch, _TOKENS, free]
        self.leave = _move(held, [_TOKENS, steps[-1].output], sizes)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return the product; to ``kept`` the activations between the steps are added, for :meth:`backward`."""
        state = self.enter[0](self._padded(x.detach(), 0))
        for k, factor in enumerate(factors[:-1]):
            state = self.enter[k + 1](_product(state, self._arranged(factor.detach(), k).mT))
            if kept is not None:
                kept.append(state.contiguous())
        weight = self._arranged(factors[-1].detach(), len(factors) - 1).mT
        y = advised(x.new_empty((len(x), self.products[-1][0] * self.products[-1][1])))
        into = self.leave.back(y)
        if into.data_ptr() == y.data_ptr():
            _product(state, weight, out=into)
        else:
            y = self.leave(_product(state, weight))
        if self.padding[1]:
            y = y[:, : -self.padding[1]].contiguous()
        return y if bias is None else y.add_(bias.detach())

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the factors and the bias, None where ``needs`` is False."""
        *needs, for_bias = needs
        wanted = [k for k, need in enumerate(needs[1:]) if need]
        lowest = -1 if needs[0] else min(wanted)
        x, gy = self._padded(x.detach(), 0), gy.detach()
        weights = [self._arranged(factor.detach(), k) for k, factor in enumerate(factors)]
        first = self.enter[0](x)
        states = [_plain(first) if 0 in wanted else first, *kept]
        for k in range(len(states), max(wanted, default=0) + 1):
            states.append(self.enter[k](_product(states[k - 1], weights[k - 1].mT)))
        found: list[Tensor | None] = [None] * len(factors)
        flow, gx = _plain(self.leave.back(self._padded(gy, 1))), None
        for k in range(len(factors) - 1, max(lowest, 0) - 1, -1):
            if k in wanted:
                found[k] = self._rearranged(_product(flow.mT, states[k]), k)
            if k > max(lowest, 0):
                flow = self.enter[k].back(_product(flow, weights[k]))
        if needs[0]:
            gx = advised(torch.empty_like(x, memory_format=torch.contiguous_format))
            into = self.enter[0](gx)
            if into.data_ptr() == gx.data_ptr():
                _product(flow, weights[0], out=into)
            else:
                gx = self.enter[0].back(_product(flow, weights[0]))
            gx = gx[:, : -self.padding[0]] if self.padding[0] else gx
        return gx, *found, gy.sum(0) if for_bias else None

    def _padded(self, x: Tensor, end: int) -> Tensor:
        return F.pad(x, (0, self.padding[end])) if self.padding[end] else x

    def _arranged(self, factor: Tensor, k: int) -> Tensor:
        """Return factor k as (batch, free, contracted)."""
        return _copy(factor, self._orders[k], False).view(self.products[k])

    def _rearranged(self, gradient: Tensor, k: int) -> Tensor:
        """Return the gradient of factor k, from (batch, free, contracted) to the factor's axes."""
        shape, order = self._shapes[k], self._orders[k]
        return _copy(gradient.view([shape[axis] for axis in order]), order, True)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a batched product; a batch of one is a single product, because torch copies it slowly in bfloat16."""
    if left.shape[0] != 1:
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    return torch.mm(left[0], right[0], out=None if out is None else out[0])[None]


def _plain(x: Tensor) -> Tensor:
    """Return a transposed operand; in bfloat16 it is made contiguous, because torch copies strided ones slowly."""
    return x.contiguous() if x.dtype is torch.bfloat16 else x


def _copy(x: Tensor, order: tuple[int, ...], back: bool) -> Tensor:
    """Return ``x`` with its axes in this order, or ``back`` from it, contiguous; x itself if nothing changes."""
    places = tuple(order.index(axis) for axis in range(len(order))) if back else order
    moved = x.permute(places)
    if moved.is_contiguous():
        return moved
    shape = tuple(moved.shape) if back else tuple(x.shape)  # of the factor
    target = host()
    if target is None or not x.is_contiguous():
        return moved.contiguous()
    found = _copies(shape, order, back, _NAMES[x.dtype], target)
    if found is None:
        return moved.contiguous()
    made = advised(torch.empty(moved.shape, dtype=x.dtype, device="cpu"))
    count = copy_shares(x.numel(), torch.get_num_threads())
    run_shares(found, [[x.data_ptr(), made.data_ptr()]] * count, range(count + 1), count, target)
    return made


@lru_cache(maxsize=128)
def _copies(
    shape: tuple[int, ...], order: tuple[int, ...], back: bool, dtype: str, target: Target
) -> Callable[..., None] | None:
    """Return a compiled function that exchanges the last axes faster than torch; None if the compiler fails."""
    outside, inside = ELEMENTS[dtype]
    try:
        return load_copies([(Arrangement(shape, order, back=back), outside, outside)], target, inside)
    except CompileError:
        return None
