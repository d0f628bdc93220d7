"""A chain as products whose results have the layout that the next one reads, in the orders of :mod:`._orders`.

Every product reads its operands by their strides, and writes its result by ``out=`` in the order in which the next
product reads it. So nothing is permuted. Tokens run in chunks, whose activations between the steps use the same
buffers. :mod:`.chunked` (CPU) and :mod:`.strided` (GPU) define how a product is computed, the number of tokens of a
chunk, and which activations are stored for the backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._parse import Step
from structlin.execution._memory import advised
from structlin.execution._orders import Layout, Product, make_layout

__all__ = ["OrderedChain"]

View = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


class OrderedChain(ABC):
    """A chain for row-major or column-major activations; ``merges`` is False if a step would need a copy."""

    layout: Layout
    merges = False

    def __init__(
        self, steps: Sequence[Step], sizes: Mapping[str, int], rows: bool = True, padding: tuple[int, int] = (0, 0)
    ) -> None:
        self.rows, self.padding = rows, padding
        layout = make_layout(steps, sizes, rows)
        if layout is None:
            return
        self.merges, self.layout, self.widths = True, layout, layout.widths
        self._shapes = [tuple(sizes[a] for a in step.factor) for step in steps]
        self._views = lru_cache(maxsize=64)(self._make_views)

    # -- what the two ways do differently ------------------------------------------------------------------------------

    @abstractmethod
    def multiply(self, product: Product, weight: Tensor, source: Tensor, target: Tensor) -> None:
        """``target = weight @ source``, batched."""

    @abstractmethod
    def finish(
        self, product: Product, weight: Tensor, source: Tensor, target: Tensor, bias: Tensor | None, part: Tensor
    ) -> None:
        """Do the same, plus the bias, where the target is ``part`` of an input or output."""

    def readable(self, right: Tensor) -> Tensor:
        """Return the right operand of a product of gradients in a layout that the library multiplies fast."""
        return right

    def room(self, count: int, item: int) -> int:
        """Return the number of tokens allocated in a buffer for ``count`` tokens, with ``item`` bytes per number."""
        return count

    def packs(self, product: Product, tokens: int) -> bool:
        """Whether to copy a matrix into the order of its axes, for this number of tokens."""
        return False

    # -- the two passes ------------------------------------------------------------------------------------------------

    def run_forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, chunk: int, saved: int,
        kept: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Return the product, (tokens, d_in) -> (tokens, d_out), or columns, plus ``bias``, in chunks unless 0.

        Unless ``kept`` is None, the activations between the steps of the first ``saved`` tokens are added to it.
        """
        x = self._padded(x.detach(), 0).contiguous()
        y, tokens = self._outcome(x, -1), x.shape[0 if self.rows else 1]
        if not tokens:
            return self._cut(y.zero_(), 1)
        weights = [self._weight(k, factor, tokens) for k, factor in enumerate(factors)]
        if bias is not None:
            bias = F.pad(bias.detach(), (0, self.padding[1])) if self.padding[1] else bias.detach().contiguous()
        if kept is not None:
            kept += self._buffers(x, saved)
        buffers = [] if kept and saved >= tokens else self._buffers(x, min(chunk or tokens, tokens))
        for start, count in _spans(tokens, chunk):
            into = self._held(kept, start) if kept and start + count <= saved else buffers
            self._run(weights, [x, *into, y], bias, start, count, tokens)
        return self._cut(y, 1)

    def run_backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], chunk: int,
        kept: Sequence[Tensor], wide: torch.dtype, known: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return gradients of x, the factors and the bias, None where ``needs`` is False; ``wide``: dtype of sums.

        ``known``: the gradients of x and of the activations between the steps, for all tokens. It is empty if no
        gradient but that of the last factor is needed.
        """
        *needs, for_bias = needs
        x, gy = self._padded(x.detach(), 0).contiguous(), self._padded(gy.detach(), 1).contiguous()
        sums = self._cut(gy, 1).sum(0 if self.rows else 1) if for_bias else None
        if not any(needs[1:]) and (known or not needs[0]):
            return known[0] if known else None, *(None for _ in needs[1:]), sums
        products, tokens = self.layout.products, x.shape[0 if self.rows else 1]
        wanted = [k for k, need in enumerate(needs[1:]) if need]
        lowest, highest = (-1 if needs[0] and not known else wanted[0]), max(wanted, default=0)
        saved = kept[0].numel() // self.widths[1] if kept else 0
        passed = range(len(products) if known else lowest + 1, len(products))  # through which a gradient passes
        back = [self._weight(k, f, tokens, back=True) if k in passed else f for k, f in enumerate(factors)]
        again = [self._weight(k, f, tokens) for k, f in enumerate(factors[:highest])] if saved < tokens else []
        grads: list[Tensor | None] = []
        for p, need in zip(products, needs[1:], strict=True):
            b, k, f = p.shape
            shape = (b, k, f) if p.free_last else (b, f, k)
            grads.append((x.new_empty if tokens else x.new_zeros)(shape, dtype=wide) if need else None)
        gx = self._outcome(x, 0) if needs[0] and not known else x  # x is not written to
        most = min(chunk or tokens, tokens)
        buffers = self._buffers(x, most) if saved < tokens else []
        flows = known[1:] or ([gx] * (len(products) - 1) if known else self._buffers(x, most))
        for start, count in _spans(tokens, chunk):
            held = start + count <= saved
            at, flow = [x, *(self._held(kept, start) if held else buffers), gy], [gx, *flows, gy]
            if not held:
                self._run(again, at, None, start, count, tokens)
            views = self._views(count, self.room(count, x.element_size()), tokens)
            for k in range(len(products) - 1, max(lowest, 0) - 1, -1):
                product, grad, view = products[k], grads[k], views[k]
                g = self._operand(flow, k + 1, view[3], start)
                if grad is not None:
                    target, source = g, self._operand(at, k, view[0], start)
                    if product.shared:  # summed over the batch too: one product that has it next to the other sum
                        target, source = (t.transpose(0, 1).reshape(1, t.shape[1], -1) for t in (g, source))
                    left, right = (source, target) if product.free_last else (target, source)
                    self._add(grad, left, right.mT, start == 0)
                if k in passed:
                    into = self._operand(flow, k, view[2], start)
                    if k:
                        self.multiply(product, back[k], g, into)
                    else:
                        self.finish(product, back[k], g, into, None, self._part(gx, start, count))
        found = (
            None if grad is None else _unpacked(grad, product.gradient, shape).to(x.dtype)
            for product, grad, shape in zip(products, grads, self._shapes, strict=True)
        )  # fmt: skip
        return known[0] if known else self._cut(gx, 0) if needs[0] else None, *found, sums

    def _add(self, gradient: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """Add ``left @ right`` to the gradient of a matrix, or set it to that at the ``first`` chunk."""
        right = self.readable(right)
        if gradient.dtype is not left.dtype:
            part = torch.bmm(left, right)
            gradient.copy_(part) if first else gradient.add_(part)
        elif first:
            torch.bmm(left, right, out=gradient)
        else:
            torch.baddbmm(gradient, left, right, out=gradient)

    def _run(
        self, weights: Sequence[Tensor], at: Sequence[Tensor], bias: Tensor | None, start: int, count: int, tokens: int
    ) -> None:
        views = self._views(count, self.room(count, at[0].element_size()), tokens)
        for k, weight in enumerate(weights):
            product, view = self.layout.products[k], views[k]
            source, target = self._operand(at, k, view[0], start), self._operand(at, k + 1, view[1], start)
            if k + 1 < len(self.layout.products):
                self.multiply(product, weight, source, target)
            else:
                self.finish(product, weight, source, target, bias, self._part(at[-1], start, count))

    # -- operands ------------------------------------------------------------------------------------------------------

    def _weight(self, k: int, factor: Tensor, tokens: int, back: bool = False) -> Tensor:
        """Return a matrix as (batch, free, contracted), for the backward pass as (batch, contracted, free)."""
        product = self.layout.products[k]
        b, contracted, free = product.shape
        order, shape = (product.packed_back, (b, free, contracted)) if back else (product.packed, product.shape)
        weight = factor.detach().permute(order).reshape(shape)
        return (weight.contiguous() if self.packs(product, tokens) else weight).mT

    def _make_views(self, count: int, room: int, tokens: int) -> list[tuple[View, ...]]:
        """Return the views (source, target, and of their gradients) of each product, for a chunk of ``count`` tokens.

        ``room``: tokens of a buffer between the steps; ``tokens``: of the input and the output.
        """
        last, found = len(self.layout.products) - 1, []
        for k, p in enumerate(self.layout.products):
            before, after = (tokens if k == 0 else room), (tokens if k == last else room)
            operands = (p.source, before), (p.target, after), (p.source_gradient, before), (p.target_gradient, after)
            found.append(tuple(operand.at(count, total) for operand, total in operands))
        return found

    def _operand(self, at: Sequence[Tensor], k: int, view: View, start: int) -> Tensor:
        """Return the operand in activation number k; in input and output, the part of the chunk."""
        offset = at[k].storage_offset()
        if k in (0, len(self.widths) - 1):
            offset += start * self.widths[k] if self.rows else start
        return at[k].as_strided(*view, offset)

    def _part(self, end: Tensor, start: int, count: int) -> Tensor:
        return end[start : start + count] if self.rows else end[:, start : start + count]

    def _held(self, kept: Sequence[Tensor], start: int) -> list[Tensor]:
        return [a[start * width :] for a, width in zip(kept, self.widths[1:-1], strict=True)]

    def _buffers(self, x: Tensor, most: int) -> list[Tensor]:
        return [advised(x.new_empty(width * self.room(most, x.element_size()))) for width in self.widths[1:-1]]

    def _outcome(self, x: Tensor, end: int) -> Tensor:
        tokens = x.shape[0 if self.rows else 1]
        return advised(x.new_empty((tokens, self.widths[end]) if self.rows else (self.widths[end], tokens)))

    def _padded(self, x: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return x if not pad else F.pad(x, (0, pad) if self.rows else (0, 0, 0, pad))

    def _cut(self, y: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return y if not pad else y[:, :-pad] if self.rows else y[:-pad]


def _spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of each chunk; ``chunk`` 0: all tokens at once."""
    step = chunk or max(tokens, 1)
    return ((start, min(step, tokens - start)) for start in range(0, tokens, step))


def _unpacked(grad: Tensor, order: Sequence[int], shape: Sequence[int]) -> Tensor:
    inverse = [order.index(axis) for axis in range(len(order))]
    return grad.reshape([shape[axis] for axis in order]).permute(inverse)
