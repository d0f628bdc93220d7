"""The contraction of a chain on a CPU with torch: chunks of tokens, and products that write where the next one reads.

The orders of axes are those of :mod:`._orders`: nothing is permuted, every product is written to a strided
``out=``. The buffers of one chunk of tokens are used again for the next, so that they stay in cache and no memory is
allocated. The first product reads the input and the last one writes the output where they are, whose rows first get
the bias (or zeros) and are then added to: the BLAS would spend a pass of its own on clearing them.

For the backward pass the activations of the first tokens are kept as far as they take no more memory than the dense
matrix and its gradient would, which this chain does without, and those that are no larger than input and output; the
others are computed again, chunk by chunk.

This is for machines on which :mod:`structlin.execution.compiled` does not run, and for what that leaves out.
benchmarks/layers.py --ways measures this beside the other ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._parse import Step
from structlin.execution._orders import Layout, Operand, Product, make_layout

# Bytes of the widest activation of one chunk: with blocks the last cache is to hold it, and without the core's own,
# together with operands. Products of fewer tokens than MIN_CHUNK are slow, and of more than MAX_CHUNK no faster, unless
# the gradients of the matrices, which are read and written once for each chunk, do not stay in cache.
BLOCK_BYTES, CHUNK_BYTES = 16 << 20, 4 << 20
MIN_CHUNK, MAX_CHUNK = 64, 256
LARGE_BLOCK, LARGE_CHUNK = 1 << 18, 512  # numbers of a matrix, from which on that many tokens are faster
FEW = 1 << 15  # numbers in the widest activation, below which the calls cost more than the copies of the portable plan
PACK_TOKENS = 128  # matrices are brought into the order that the BLAS likes if so many tokens share the effort


class ChunkedChain:
    """A chain for row-major activations, or column-major ones; ``merges`` is False where it does not run this way."""

    layout: Layout
    merges = False

    def __init__(
        self, steps: Sequence[Step], sizes: Mapping[str, int], rows: bool = True, padding: tuple[int, int] = (0, 0)
    ) -> None:
        layout = make_layout(steps, sizes, rows)
        self.rows, self.padding = rows, padding
        if layout is None or not any(step.batch or step.carried for step in steps):
            return  # it would copy; or it is a chain of plain matrices, which needs no order
        self.merges, self.layout, self.widths = True, layout, layout.widths
        self.widest = max(self.widths)
        self.blocks = any(step.batch for step in steps)
        # The dense matrix and its gradient, less the factors, their gradients, and copies of both in other orders.
        self.spare = 2 * self.widths[0] * self.widths[-1] - 6 * sum(math.prod(p.shape) for p in layout.products)
        self._shapes = [tuple(sizes[a] for a in step.factor) for step in steps]
        self.large = min(p.shape[1] * p.shape[2] for p in layout.products) >= LARGE_BLOCK
        self.small = self.blocks and all(p.small for p in layout.products)
        self._at = lru_cache(maxsize=64)(self._views)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return the product; to ``kept`` the activations are added that are worth keeping for :meth:`backward`."""
        tokens, x = x.shape[0 if self.rows else 1], self._padded(x.detach(), 0).contiguous()
        shape = (tokens, self.widths[-1]) if self.rows else (self.widths[-1], tokens)
        if not tokens:
            return x.new_zeros(shape)
        engine, inner = self._engine(x), self.widths[1:-1]
        chunk, y = self.chunk(x.element_size()), x.new_empty(shape)
        saved = 0 if kept is None else self._kept_tokens(tokens, chunk)
        if kept is not None:
            kept += [x.new_empty(width * saved) for width in inner]
        weights = self._weights(factors, tokens)
        if bias is not None:
            bias = F.pad(bias.detach(), (0, self.padding[1]))
            bias = bias if self.rows else bias[:, None]

        buffers = self._buffers(x, min(chunk, tokens))
        for start, count in _spans(tokens, chunk):
            part = y[start : start + count] if self.rows else y[:, start : start + count]
            part.zero_() if bias is None else part.copy_(bias.expand_as(part))
            into = buffers
            if start + count <= saved:
                into = [b[start * w : (start + count) * w] for b, w in zip(kept or (), inner, strict=True)]
            self._run(engine, weights, [x, *into, y], start, count, tokens)
        return self._cut(y, 1)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, the factors and the bias, None where ``needs`` is False."""
        *needs, for_bias = needs
        tokens, last = x.shape[0 if self.rows else 1], len(factors)
        x, gy = self._padded(x.detach(), 0).contiguous(), self._padded(gy.detach(), 1).contiguous()
        products, inner = self.layout.products, self.widths[1:-1]
        engine, fresh = self._engine(x), (x.new_empty if tokens else x.new_zeros)
        summed = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        gx = fresh(x.shape) if needs[0] else None
        wanted = [k for k, need in enumerate(needs[1:]) if need]
        lowest, highest = (0 if needs[0] else wanted[0]), max(wanted, default=0)
        back = self._weights(factors, tokens, back=True)
        again = self._weights(factors[:highest], tokens)
        chunk = self.chunk(x.element_size())
        saved = kept[0].numel() // inner[0] if kept else 0
        grads: list[Tensor | None] = []
        for p, need in zip(products, needs[1:], strict=True):
            b, k, f = p.shape
            grads.append(fresh((b, k, f) if p.free_last else (b, f, k), dtype=summed) if need else None)
        states, ends = self._buffers(x, min(chunk, tokens)), self._buffers(x, min(chunk, tokens))
        for start, count in _spans(tokens, chunk):
            views, at = self._at(count, tokens), [x, *states, gy]
            if start + count <= saved:
                at = [x, *(b[start * w : (start + count) * w] for b, w in zip(kept, inner, strict=True)), gy]
            else:
                self._run(engine, again, at, start, count, tokens)
            flow = [x if gx is None else gx, *ends, gy]  # x is not written to
            if gx is not None:
                (gx[start : start + count] if self.rows else gx[:, start : start + count]).zero_()
            for k in range(last - 1, lowest - 1, -1):
                product, grad, view = products[k], grads[k], views[k]
                g = self._view(flow[k + 1], view[3], k + 1, start, count)
                if grad is not None:
                    source = self._view(at[k], view[0], k, start, count)
                    _add_gradient(engine, product, grad, g, source, start == 0)
                if k > lowest or gx is not None:
                    into = self._view(flow[k], view[2], k, start, count)
                    engine.multiply(back[k].transpose(1, 2), g, into, k == 0, product.shared)
        found = (
            None if grad is None else _unpack(grad, product.gradient, shape).to(x.dtype)
            for product, grad, shape in zip(products, grads, self._shapes, strict=True)
        )  # fmt: skip
        bias = self._cut(gy, 1).sum(0 if self.rows else 1) if for_bias else None
        return None if gx is None else self._cut(gx, 0), *found, bias

    def _padded(self, x: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return x if not pad else F.pad(x, (0, pad) if self.rows else (0, 0, 0, pad))

    def _cut(self, y: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return y if not pad else y[:, :-pad] if self.rows else y[:-pad]

    def _run(
        self, engine: Any, weights: Sequence[Tensor], at: Sequence[Tensor], start: int, count: int, tokens: int
    ) -> None:
        views, last = self._at(count, tokens), len(self.layout.products) - 1
        for k, weight in enumerate(weights):
            view = views[k]
            source = self._view(at[k], view[0], k, start, count)
            target = self._view(at[k + 1], view[1], k + 1, start, count)
            engine.multiply(weight.transpose(1, 2), source, target, k == last, self.layout.products[k].shared)

    def _buffers(self, x: Tensor, most: int) -> list[Tensor]:
        return [x.new_empty(width * most) for width in self.widths[1:-1]]

    def _engine(self, x: Tensor) -> Any:
        return _Half if x.dtype == torch.bfloat16 else _Torch

    def _view(self, x: Tensor, view: tuple[tuple[int, ...], tuple[int, ...]], k: int, start: int, count: int) -> Tensor:
        """Return the operand in activation number k: for input and output at the chunk's place."""
        offset = x.storage_offset()
        if k in (0, len(self.widths) - 1):
            offset += start * self.widths[k] if self.rows else start
        return x.as_strided(*view, offset)

    def _views(self, count: int, tokens: int) -> list[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]:
        """Sizes and strides of the operands (source, target, and of their gradients) of each product."""
        last, found = len(self.layout.products) - 1, []
        for k, p in enumerate(self.layout.products):
            before, after = (tokens if k == 0 else count), (tokens if k == last else count)
            operands: list[tuple[Operand, int]] = [
                (p.source, before), (p.target, after), (p.source_gradient, before), (p.target_gradient, after),
            ]  # fmt: skip
            found.append(tuple(operand.at(count, total) for operand, total in operands))
        return found

    def _weights(self, factors: Sequence[Tensor], tokens: int, back: bool = False) -> list[Tensor]:
        """Matrices as (batch, contracted, free), for the backward pass as (batch, free, contracted)."""
        found = []
        for factor, product in zip(factors, self.layout.products, strict=False):
            b, k, f = product.shape
            order, shape = (product.packed_back, (b, f, k)) if back else (product.packed, (b, k, f))
            weight = factor.detach().permute(order).reshape(shape)
            found.append(weight.contiguous() if tokens >= PACK_TOKENS and product.small else weight)
        return found

    def chunk(self, item: int) -> int:
        """Tokens of a chunk, with ``item`` bytes in a number."""
        widest = max(self.widths[1:-1], default=1) * item
        budget = BLOCK_BYTES if self.blocks else CHUNK_BYTES
        most = LARGE_CHUNK if self.large else MAX_CHUNK
        return max(MIN_CHUNK, min(most, budget // widest // 64 * 64))

    def _kept_tokens(self, tokens: int, chunk: int) -> int:
        width = sum(self.widths[1:-1])
        if not width:
            return 0
        fits = max(self.spare // width - 2 * chunk, tokens if width <= min(self.widths[0], self.widths[-1]) else 0)
        return tokens if fits >= tokens else fits // chunk * chunk


def _spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """Start and length of each chunk."""
    return [(start, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]


class _Torch:
    """Products by torch, which add to cleared rows."""

    @staticmethod
    def multiply(left: Tensor, right: Tensor, out: Tensor, last: bool, shared: bool) -> None:
        if shared:
            left = left.expand(right.shape[0], -1, -1)
        if out.stride(2) != 1:
            left, right, out = right.transpose(1, 2), left.transpose(1, 2), out.transpose(1, 2)
        if last:
            torch.baddbmm(out, left, right, out=out)
        else:
            torch.bmm(left, right, out=out)

    @staticmethod
    def add(grad: Tensor, left: Tensor, right: Tensor) -> None:
        torch.baddbmm(grad, left, right, out=grad)


class _Half(_Torch):
    """Products by torch in bfloat16, whose kernels (oneDNN's) want rows to write and to read on the right.

    Gradients are added up in float32.
    """

    @staticmethod
    def multiply(left: Tensor, right: Tensor, out: Tensor, last: bool, shared: bool) -> None:
        if out.dtype != left.dtype:
            out.copy_(torch.bmm(left, _readable(right)))
        elif out.stride(2) != 1:
            _Torch.multiply(_readable(left.transpose(1, 2)).transpose(1, 2), right, out, last, shared)
        else:
            _Torch.multiply(left, _readable(right), out, last, shared)

    @staticmethod
    def add(grad: Tensor, left: Tensor, right: Tensor) -> None:
        grad.add_(torch.bmm(left, _readable(right)))


def _readable(right: Tensor) -> Tensor:
    if right.stride(2) == 1:
        return right
    batch, rows, columns = right.stride()
    if batch == rows * right.shape[1]:  # torch is quick to transpose a matrix, not a batch of them
        flat = right.as_strided((right.shape[0] * right.shape[1], right.shape[2]), (rows, columns))
        return flat.contiguous().view(right.shape)
    return right.contiguous()


def _add_gradient(engine: Any, product: Product, grad: Tensor, g: Tensor, source: Tensor, first: bool) -> None:
    """Add to the gradient of a matrix what one chunk contributes, or set it to what the ``first`` one does."""
    if product.shared:  # summed over the batch too: one product of copies that have it next to the other summed axes
        g, source = (t.transpose(0, 1).reshape(1, t.shape[1], -1) for t in (g, source))
    left, right = (source, g) if product.free_last else (g, source)
    right = right.transpose(1, 2)
    if first:
        engine.multiply(left, right, grad, False, False)
    else:
        engine.add(grad, left, right)


def _unpack(grad: Tensor, order: Sequence[int], shape: Sequence[int]) -> Tensor:
    inverse = [order.index(axis) for axis in range(len(order))]
    return grad.reshape([shape[axis] for axis in order]).permute(inverse)
