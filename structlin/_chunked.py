"""The contraction of a chain on a CPU with torch: chunks of tokens, and products that write where the next one reads.

Between two steps the activation has the order (batch, contracted, carried axes of the step that reads it, tokens).
A product writes it as a strided ``out=``, so that nothing is permuted, and the buffers of one chunk of tokens are
used again for the next, so that they stay in cache and no memory is allocated. The first product reads rows of the
input and the last one writes rows of the output as transposed operands. The backward pass goes the same way back and
computes the intermediates again, chunk by chunk: only the input is kept.

Only chains with blocks, whose operands all merge into the three axes of a batched product, are run this way (Block
Tensor-Train of two cores, Monarch, BLAST, block diagonal, ...): the others would be copied, and are faster without.
benchmarks/contraction.py measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from structlin._parse import Step

_TOKENS = "*"
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CHUNK_BYTES = 8 << 20
MIN_CHUNK, MAX_CHUNK = 128, 512


@dataclass(frozen=True)
class _Operand:
    """A 3-axis (batch, rows, carried * tokens) view of a buffer in another order.

    ``view``: sizes of the buffer's axes (the tokens at ``token_at``), ``order``: permutation to (batch, rows,
    carried, tokens), ``sizes``: of the three axes, without the tokens.
    """

    view: tuple[int, ...]
    token_at: int
    order: tuple[int, ...]
    sizes: tuple[int, int, int]

    def split(self, x: Tensor, tokens: int) -> Tensor:
        return x.reshape((*self.view[: self.token_at], tokens, *self.view[self.token_at + 1 :])).permute(self.order)

    def shape(self, tokens: int) -> tuple[int, int, int]:
        b, n, c = self.sizes
        return b, n, c * tokens

    def of(self, x: Tensor, tokens: int) -> Tensor:
        """The operand, to be read: a view of ``x`` where that is contiguous."""
        return self.split(x, tokens).reshape(self.shape(tokens))

    def into(self, x: Tensor, tokens: int) -> Tensor:
        """The operand as a view of the contiguous buffer ``x``, to be written."""
        return self.split(x, tokens).view(self.shape(tokens))

    def scatter(self, operand: Tensor, tokens: int) -> Tensor:
        """A new buffer that holds ``operand``: the inverse of :meth:`of`."""
        split = (*(self.view[axis] or tokens for axis in self.order),)
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return operand.reshape(split).permute(inverse).contiguous()

    def merges(self) -> bool:
        """Whether the axes merge, whatever the number of tokens."""
        tokens = 2
        probe = torch.empty(
            math.prod(self.view[: self.token_at] + self.view[self.token_at + 1 :]) * tokens, device="meta"
        )
        try:
            self.split(probe, tokens).view(self.shape(tokens))
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True)
class _Product:
    source: _Operand  # (batch, contracted, carried * tokens) of the buffer before
    target: _Operand  # (batch, free, carried * tokens) of the buffer after
    factor_order: tuple[int, ...]
    factor_shape: tuple[int, int, int]

    def weight(self, factor: Tensor) -> Tensor:
        return factor.permute(self.factor_order).reshape(self.factor_shape)


class ChunkedChain:
    """A chain for row-major activations; ``merges`` is False where it does not run this way."""

    products: list[_Product]
    merges = False

    def __init__(self, steps: Sequence[Step], sizes: Mapping[str, int]) -> None:
        regrouped = any(before.output != step.input for before, step in pairwise(steps))
        if regrouped or not any(step.batch for step in steps):
            return  # the written order is needed in between; without blocks there is nothing to permute

        def size(axes: str) -> int:
            return math.prod(sizes[a] for a in axes)

        layouts = [_TOKENS + steps[0].input]
        for before, step in pairwise(steps):
            batch = "".join(a for a in before.output if a in step.batch)
            layouts.append(batch + step.contracted + "".join(a for a in before.output if a in step.carried) + _TOKENS)
        layouts.append(_TOKENS + steps[-1].output)
        self.products = []
        for step, source, target in zip(steps, layouts[:-1], layouts[1:], strict=True):
            batch = "".join(a for a in source if a in step.batch)
            carried = "".join(a for a in source if a in step.carried)

            def operand(layout: str, rows: str, batch: str = batch, carried: str = carried) -> _Operand:
                order = batch + rows + carried + _TOKENS
                return _Operand(
                    tuple(0 if a == _TOKENS else sizes[a] for a in layout),
                    layout.index(_TOKENS),
                    tuple(layout.index(a) for a in order),
                    (size(batch), size(rows), size(carried)),
                )

            self.products.append(
                _Product(
                    operand(source, step.contracted),
                    operand(target, step.free),
                    tuple(step.factor.index(a) for a in batch + step.free + step.contracted),
                    (size(batch), size(step.free), size(step.contracted)),
                )
            )
        self.widths = [size(layout.replace(_TOKENS, "")) for layout in layouts]

        self.merges = all(step.source.merges() and step.target.merges() for step in self.products)

    def suits(self, x: Tensor, factors: Sequence[Tensor]) -> bool:
        """Whether to run ``x`` this way: plain tensors on the CPU, outside of transformations.

        And worth it: gradients are asked for, or the intermediates leave the cache.
        """
        if not self.merges or x.device.type != "cpu" or x.dtype not in _DTYPES:
            return False
        if any(type(t) not in _PLAIN or t.dtype != x.dtype for t in (x, *factors)):
            return False
        if (
            torch.is_autocast_enabled("cpu")
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        ):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for f in factors)):
            return True
        return x.shape[0] * max(self.widths[1:-1], default=0) * x.element_size() > CHUNK_BYTES // 4

    def __call__(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """(tokens, d_in) -> (tokens, d_out), differentiable any number of times."""
        return _Chunks.apply(self, x, *(step.weight(f) for step, f in zip(self.products, factors, strict=True)))

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        tokens = x.shape[0]
        y = x.new_empty((tokens, self.widths[-1]))
        for start, stop, inner in self._chunks(x):
            self._run(weights, [x[start:stop], *inner(), y[start:stop]], stop - start)
        return y

    def backward(
        self, gy: Tensor, x: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights, None where ``needs`` (x first) is False."""
        gx = x.new_empty(x.shape) if needs[0] else None
        grads = [torch.zeros_like(w) if need else None for w, need in zip(weights, needs[1:], strict=True)]
        lowest = 0 if gx is not None else next(k for k, need in enumerate(needs[1:]) if need)
        for start, stop, inner in self._chunks(x):
            n = stop - start
            states = [x[start:stop], *inner()]
            self._run(weights[:-1], states, n)
            ends = [x.new_empty(0) if gx is None else gx[start:stop], *inner(), gy[start:stop]]
            for k in range(len(self.products) - 1, lowest - 1, -1):
                step, grad = self.products[k], grads[k]
                g = step.target.of(ends[k + 1], n)
                if grad is not None:
                    torch.baddbmm(grad, g, step.source.of(states[k], n).transpose(1, 2), out=grad)
                if k > lowest or gx is not None:
                    torch.bmm(weights[k].transpose(1, 2), g, out=step.source.into(ends[k], n))
        return (gx, *grads)

    def _run(self, weights: Sequence[Tensor], states: Sequence[Tensor], tokens: int) -> None:
        for k, weight in enumerate(weights):
            step = self.products[k]
            torch.bmm(weight, step.source.of(states[k], tokens), out=step.target.into(states[k + 1], tokens))

    def _chunks(self, x: Tensor) -> Iterator[tuple[int, int, Callable[[], list[Tensor]]]]:
        """Start and stop of each chunk, and a function that gives views of the first, second, ... set of buffers."""
        tokens, inner = x.shape[0], self.widths[1:-1]
        widest = max(inner, default=1) * x.element_size()
        size = min(tokens, max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_BYTES // widest // 64 * 64)))
        sets: list[list[Tensor]] = []
        for start in range(0, tokens, size or 1):
            stop = min(start + size, tokens)
            given = iter(range(2))

            def views(n: int = stop - start, given: Iterator[int] = given) -> list[Tensor]:
                number = next(given)
                if number == len(sets):
                    sets.append([x.new_empty(width * size) for width in inner])
                return [b[: width * n] for b, width in zip(sets[number], inner, strict=True)]

            yield start, stop, views


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: ChunkedChain, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.chain = chain
        ctx.save_for_backward(x, *weights)
        return chain.forward(x, weights)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        batched = torch._C._functorch.is_batchedtensor(gy) or torch._C._functorch.is_legacy_batchedtensor(gy)
        if torch.is_grad_enabled() or batched:
            return None, *_differentiable_gradients(ctx.chain, gy, x, weights, needs)
        return None, *ctx.chain.backward(gy, x, weights, needs)


def _differentiable_gradients(
    chain: ChunkedChain, gy: Tensor, x: Tensor, weights: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients by ordinary products, all tokens at once, which can be differentiated and batched in turn."""
    tokens, states = x.shape[0], [x]
    for k, step in enumerate(chain.products):
        states.append(step.target.scatter(weights[k] @ step.source.of(states[k], tokens), tokens))
    grads: list[Tensor | None] = []
    g = gy
    for k in range(len(chain.products) - 1, -1, -1):
        step = chain.products[k]
        out = step.target.of(g, tokens)
        grads.append(out @ step.source.of(states[k], tokens).transpose(1, 2) if needs[k + 1] else None)
        g = step.source.scatter(weights[k].transpose(1, 2) @ out, tokens)
    yield g.reshape(x.shape) if needs[0] else None
    yield from reversed(grads)
