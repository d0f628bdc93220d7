"""The contraction of a chain by batched products of strided operands, without a copy: the way for GPUs in torch.

The orders of axes are those of :mod:`._orders`. Each step is one product of torch (cuBLAS on CUDA) that reads its
operands where they are and writes its result, by ``out=``, in the order in which the next step reads it. So a chain of
n steps is n kernels, and one more where a bias is added: torch writes it before the last product adds to it.

Activations between the steps have the tokens innermost. Their number is rounded up there to :data:`ALIGNED` bytes, so
that all rows of an operand are aligned for wide loads, whatever the number of tokens.

With ``chunk`` the chain is run for so many tokens at a time. The activations between the steps are then written to the
same buffers again and again, which stay in the L2 of the device if they fit (:func:`l2_chunk`). The backward pass
computes them anew, since reading them from memory would take longer than the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin.execution._kept import kept
from structlin.execution._orders import Layout, Operand, make_layout
from structlin.structure import Structure

__all__ = ["ALIGNED", "StridedChain", "l2_chunk", "strided"]

ALIGNED = 16  # bytes: of the widest load of a thread, on all devices of the last ten years
L2_SHARE = 0.5  # of the L2, that can be counted on: on an A100 or H100 each half of the chip keeps a copy of its own
LEAST_CHUNK = 128  # tokens: fewer do not fill the tiles of a product


class StridedChain:
    """A chain for row-major activations, or column-major ones; ``merges`` is False where a step would have to copy."""

    layout: Layout
    merges = False

    def __init__(self, structure: Structure, rows: bool = True) -> None:
        self.structure, self.rows, self.padding = structure, rows, structure.padding
        sizes = dict(structure.sizes)
        layout = make_layout(structure.steps, sizes, rows)
        if layout is None:
            return
        self.merges, self.layout, self.widths = True, layout, layout.widths
        self._shapes = [tuple(sizes[a] for a in step.factor) for step in structure.steps]
        inner = [o for p in layout.products for o in (p.source, p.target, p.source_gradient, p.target_gradient)]
        # Tokens that are one axis together with a carried one have no room for more between.
        self.rounds = all(size == 1 for o in inner for size, tokens, _, _ in o.groups if tokens)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, chunk: int = 0,
        kept: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """(tokens, d_in) -> (tokens, d_out) plus ``bias`` (d_out,), or columns; in chunks of tokens unless 0.

        To ``kept`` the activations between the steps are added, if there are no chunks.
        """
        x = self._padded(x.detach(), 0).contiguous()
        y, tokens = self._outcome(x, -1), x.shape[0 if self.rows else 1]
        if not tokens:
            return self._cut(y, 1)
        weights = [self._weight(k, factor) for k, factor in enumerate(factors)]
        if bias is not None:
            bias = F.pad(bias.detach(), (0, pad)) if (pad := self.padding[1]) else bias.detach().contiguous()
        buffers = self._buffers(x, min(chunk or tokens, tokens))
        if kept is not None and not chunk:
            kept += buffers
        for start, count in _spans(tokens, chunk):
            self._run(weights, [x, *buffers, y], bias, start, count, tokens)
        return self._cut(y, 1)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], chunk: int = 0,
        kept: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Gradients of x, the factors and the bias, None where ``needs`` is False. ``kept``: by :meth:`forward`."""
        *needs, for_bias = needs
        x, gy = self._padded(x.detach(), 0).contiguous(), self._padded(gy.detach(), 1).contiguous()
        sums = self._cut(gy, 1).sum(0 if self.rows else 1) if for_bias else None
        if not any(needs):
            return *(None for _ in needs), sums
        products, tokens = self.layout.products, x.shape[0 if self.rows else 1]
        wanted = [k for k, need in enumerate(needs[1:]) if need]
        lowest, highest = (-1 if needs[0] else wanted[0]), max(wanted, default=0)
        back = [self._weight(k, factor, back=True) if k > lowest else factor for k, factor in enumerate(factors)]
        again = [] if kept else [self._weight(k, factor) for k, factor in enumerate(factors[:highest])]
        several = bool(chunk) and chunk < tokens
        wide = torch.float32 if several and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        grads: list[Tensor | None] = []
        for p, need in zip(products, needs[1:], strict=True):
            b, k, f = p.shape
            shape = (b, k, f) if p.free_last else (b, f, k)
            grads.append((x.new_empty if tokens else x.new_zeros)(shape, dtype=wide) if need else None)
        gx = self._outcome(x, 0) if needs[0] else x  # x is not written to
        most = min(chunk or tokens, tokens)
        states, flows = kept or self._buffers(x, most), self._buffers(x, most)
        for start, count in _spans(tokens, chunk):
            at = [x, *states, gy]
            self._run(again, at, None, start, count, tokens)
            flow = [gx, *flows, gy]
            for number in range(len(products) - 1, max(lowest, 0) - 1, -1):
                product, grad = products[number], grads[number]
                g = self._view(flow, number + 1, product.target_gradient, start, count, tokens)
                if grad is not None:
                    source = self._view(at, number, product.source, start, count, tokens)
                    target = g
                    if product.shared:  # summed over the batch too: one product that has it next to the other sum
                        target, source = (t.transpose(0, 1).reshape(1, t.shape[1], -1) for t in (g, source))
                    left, right = (source, target) if product.free_last else (target, source)
                    _add(grad, left, right.mT, start == 0)
                if number > lowest:
                    into = self._view(flow, number, product.source_gradient, start, count, tokens)
                    _multiply(back[number], g, into)
        found = (
            None if grad is None else _unpacked(grad, product.gradient, shape).to(x.dtype)
            for product, grad, shape in zip(products, grads, self._shapes, strict=True)
        )  # fmt: skip
        return self._cut(gx, 0) if needs[0] else None, *found, sums

    def _run(
        self, weights: Sequence[Tensor], at: Sequence[Tensor], bias: Tensor | None, start: int, count: int, tokens: int
    ) -> None:
        for k, weight in enumerate(weights):
            product = self.layout.products[k]
            source = self._view(at, k, product.source, start, count, tokens)
            target = self._view(at, k + 1, product.target, start, count, tokens)
            added = None
            if bias is not None and k == len(self.layout.products) - 1:
                added = _along(bias, product.target, count)
                if added is None:  # tokens and a carried axis are one: no strides stand for the bias there
                    _multiply(weight, source, target)
                    part = at[-1][start : start + count] if self.rows else at[-1][:, start : start + count]
                    part.add_(bias if self.rows else bias[:, None])
                    continue
            _multiply(weight, source, target, added)

    def _weight(self, k: int, factor: Tensor, back: bool = False) -> Tensor:
        """(batch, free, contracted); for the backward pass (batch, contracted, free)."""
        product = self.layout.products[k]
        b, contracted, free = product.shape
        if back:
            return factor.detach().permute(product.packed_back).reshape(b, free, contracted).mT
        return factor.detach().permute(product.packed).reshape(b, contracted, free).mT

    def _view(
        self, at: Sequence[Tensor], k: int, operand: Operand, start: int, count: int, tokens: int
    ) -> Tensor:  # fmt: skip
        """Return the operand in activation number k: for input and output at the chunk's place."""
        x, end = at[k], k in (0, len(self.widths) - 1)
        if end:
            offset = start * self.widths[k] if self.rows else start
            return x.as_strided(*operand.at(count, tokens), x.storage_offset() + offset)
        return x.as_strided(*operand.at(count, self._rounded(count, x.element_size())), x.storage_offset())

    def _rounded(self, count: int, item: int) -> int:
        unit = max(1, ALIGNED // item) if self.rounds else 1
        return -(-count // unit) * unit

    def _buffers(self, x: Tensor, most: int) -> list[Tensor]:
        return [x.new_empty(width * self._rounded(most, x.element_size())) for width in self.widths[1:-1]]

    def _outcome(self, x: Tensor, end: int) -> Tensor:
        tokens = x.shape[0 if self.rows else 1]
        return x.new_empty((tokens, self.widths[end]) if self.rows else (self.widths[end], tokens))

    def _padded(self, x: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return x if not pad else F.pad(x, (0, pad) if self.rows else (0, 0, 0, pad))

    def _cut(self, y: Tensor, end: int) -> Tensor:
        pad = self.padding[end]
        return y if not pad else y[:, :-pad] if self.rows else y[:-pad]


def l2_chunk(chain: StridedChain, tokens: int, item: int, l2: int, train: bool) -> int:
    """So many tokens, with ``item`` bytes a number, that all of a chunk and the factors stay in ``l2`` bytes; 0: all.

    Input, output and the activations between them count; in the backward pass their gradients too.
    """
    factors = chain.structure.num_params * item
    each = sum(chain.widths) * item
    if train:
        factors, each = 3 * factors, 2 * each  # in another dtype for the sums of gradients
    most = int(L2_SHARE * l2) - factors
    chunk = max(0, most) // each // LEAST_CHUNK * LEAST_CHUNK
    return 0 if chunk >= tokens or not chunk else chunk


def _spans(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Start and length of each chunk."""
    step = chunk or max(tokens, 1)
    return ((start, min(step, tokens - start)) for start in range(0, tokens, step))


def _multiply(weight: Tensor, source: Tensor, target: Tensor, added: Tensor | None = None) -> None:
    """``target = weight @ source + added``, batched; a single matrix is the same for all items."""
    if len(weight) != len(source):
        weight = weight.expand(len(source), -1, -1)
    if added is None:
        torch.bmm(weight, source, out=target)
    else:
        torch.baddbmm(added, weight, source, out=target)


def _add(grad: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Set a gradient to what the ``first`` chunk gives, or add what another one gives."""
    if grad.dtype is not left.dtype:
        part = torch.bmm(left, right)
        grad.copy_(part) if first else grad.add_(part)
    elif first:
        torch.bmm(left, right, out=grad)
    else:
        torch.baddbmm(grad, left, right, out=grad)


def _along(bias: Tensor, target: Operand, count: int) -> Tensor | None:
    """Return a bias as the operand of an output, the same for all tokens; None where no strides stand for that."""
    sizes, strides = [], []
    for size, tokens, stride, over in target.groups:
        if (tokens and size > 1) or (over and not tokens):
            return None
        sizes.append(count if tokens else size)
        strides.append(0 if tokens else stride)
    return bias.as_strided(sizes, strides, bias.storage_offset())


def _unpacked(grad: Tensor, order: Sequence[int], shape: Sequence[int]) -> Tensor:
    inverse = [order.index(axis) for axis in range(len(order))]
    return grad.reshape([shape[axis] for axis in order]).permute(inverse)


def strided(structure: Structure, rows: bool = True) -> StridedChain:
    """Return the chain of a structure, made once for it."""
    return kept(structure, ("strided", rows), lambda: StridedChain(structure, rows))
