"""The contraction of a chain on a CPU with torch: chunks of tokens, and products that write where the next one reads.

The orders of axes are those of :mod:`structlin._layout`: nothing is permuted, every product is written to a strided
``out=``. The buffers of one chunk of tokens are used again for the next, so that they stay in cache and no memory is
allocated. The first product reads the input and the last one writes the output where they are, whose rows first get
the bias (or zeros) and are then added to: the BLAS would spend a pass of its own on clearing them.

For the backward pass the activations of the first tokens are kept as far as they take no more memory than the dense
matrix and its gradient would, which this chain does without, and those that are no larger than input and output; the
others are computed again, chunk by chunk.

benchmarks/contraction.py measures this beside the portable plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structlin import _small
from structlin._layout import Layout, Operand, Product, make_layout
from structlin._parse import Step
from structlin._plan import make_plan

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Bytes of the widest activation of one chunk: with blocks the last cache is to hold it, and without the core's own,
# together with operands. Products of fewer tokens than MIN_CHUNK are slow, and of more than MAX_CHUNK no faster.
BLOCK_BYTES, CHUNK_BYTES = 16 << 20, 4 << 20
MIN_CHUNK, MAX_CHUNK = 64, 256
# Of the products by NumPy; the chunk is twice as long for tiny blocks, where it then has no more bytes than this.
SMALL_CHUNK, SMALL_BYTES, MAX_THREADS = 128, 3 << 20, 4
FEW = 1 << 15  # numbers in the widest activation, below which the calls cost more than the copies of the portable plan
PACK_TOKENS = 128  # matrices are brought into the order that the BLAS likes if so many tokens share the effort


class ChunkedChain:
    """A chain for row-major activations, or column-major ones; ``merges`` is False where it does not run this way."""

    layout: Layout
    merges = False

    def __init__(self, steps: Sequence[Step], sizes: Mapping[str, int], rows: bool = True) -> None:
        layout = make_layout(steps, sizes, rows)
        self.rows = rows
        if layout is None or not any(step.batch or step.carried for step in steps):
            return  # it would copy; or it is a chain of plain matrices, which needs no order
        self.merges, self.layout, self.widths = True, layout, layout.widths
        self.widest = max(self.widths)
        self.blocks = any(step.batch for step in steps)
        # The dense matrix and its gradient, less the factors, their gradients, and copies of both in other orders.
        self.spare = 2 * self.widths[0] * self.widths[-1] - 6 * sum(math.prod(p.shape) for p in layout.products)
        self._portable = make_plan(steps, sizes, rows)
        self._shapes = [tuple(sizes[a] for a in step.factor) for step in steps]
        self.small = self.blocks and all(p.small for p in layout.products)
        self.tiny = all(p.shape[1] * p.shape[2] <= 1 << 14 for p in layout.products)
        self._at = lru_cache(maxsize=64)(self._views)

    def suits(self, x: Tensor, factors: Sequence[Tensor]) -> bool:
        """Whether to run ``x`` this way: plain tensors on the CPU, outside of transformations, and not too few."""
        if not self.merges or not x.is_cpu or x.dtype not in _DTYPES:
            return False
        numbers, dtype = x.shape[0 if self.rows else 1] * self.widest, x.dtype
        if numbers < FEW or (numbers < 2 * FEW and torch.is_grad_enabled()):
            return False
        if type(x) not in _PLAIN or any(type(t) not in _PLAIN or t.dtype != dtype for t in factors):
            return False
        # In bfloat16 large blocks are faster all tokens at once, and so are the gradients of a shared matrix.
        if dtype == torch.bfloat16 and not (self.small if self.blocks else not torch.is_grad_enabled()):
            return False
        return not (
            torch.is_autocast_enabled("cpu")
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        )

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """(tokens, d_in) -> (tokens, d_out), or columns; differentiable any number of times.

        ``bias``, of size d_out, is added.
        """
        inputs = (x, *factors) if bias is None else (x, *factors, bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return _Chunks.apply(self, x, bias, *factors)
        return self.forward(x, factors, bias)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """The product; to ``kept`` the activations are added that are worth keeping for :meth:`backward`."""
        tokens, x = x.shape[0 if self.rows else 1], x.detach().contiguous()
        shape = (tokens, self.widths[-1]) if self.rows else (self.widths[-1], tokens)
        if not tokens:
            return x.new_zeros(shape)
        engine, inner = self._engine(x), self.widths[1:-1]
        chunk, y = self._chunk(x, engine), x.new_empty(shape)
        saved = 0 if kept is None else self._kept_tokens(tokens, chunk)
        if kept is not None:
            kept += [x.new_empty(width * saved) for width in inner]
        weights = self._weights(factors, tokens)
        bias = None if bias is None else bias.detach() if self.rows else bias.detach()[:, None]

        def work(spans: Sequence[tuple[int, int]]) -> None:
            buffers = self._buffers(x, spans)
            for start, count in spans:
                part = y[start : start + count] if self.rows else y[:, start : start + count]
                engine.before(part, bias)
                into = buffers
                if start + count <= saved:
                    into = [b[start * w : (start + count) * w] for b, w in zip(kept or (), inner, strict=True)]
                self._run(engine, weights, [x, *into, y], start, count, tokens)
                engine.after(part, bias)

        engine.share(_spans(tokens, chunk), work)
        return y

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the factors, None where ``needs`` (x first) is False."""
        tokens, x, gy = x.shape[0 if self.rows else 1], x.detach().contiguous(), gy.detach().contiguous()
        products, inner = self.layout.products, self.widths[1:-1]
        engine, fresh = self._engine(x), (x.new_empty if tokens else x.new_zeros)
        summed = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        gx = fresh(x.shape) if needs[0] else None
        wanted = [k for k, need in enumerate(needs[1:]) if need]
        lowest, highest = (0 if needs[0] else wanted[0]), max(wanted, default=0)
        back = self._weights(factors, tokens, back=True)
        again = self._weights(factors[:highest], tokens)
        chunk = self._chunk(x, engine)
        saved = kept[0].numel() // inner[0] if kept else 0

        def work(spans: Sequence[tuple[int, int]]) -> list[Tensor | None]:
            grads: list[Tensor | None] = []
            for p, need in zip(products, needs[1:], strict=True):
                b, k, f = p.shape
                shape = (b, k, f) if p.free_last else (b, f, k)
                grads.append(fresh(shape, dtype=summed) if need else None)
            states, ends = self._buffers(x, spans), self._buffers(x, spans)
            for start, count in spans:
                views, at = self._at(count, tokens), [x, *states, gy]
                if start + count <= saved:
                    at = [x, *(b[start * w : (start + count) * w] for b, w in zip(kept, inner, strict=True)), gy]
                else:
                    self._run(engine, again, at, start, count, tokens)
                flow = [x if gx is None else gx, *ends, gy]  # x is not written to
                if gx is not None:
                    engine.before(gx[start : start + count] if self.rows else gx[:, start : start + count], None)
                for k in range(len(products) - 1, lowest - 1, -1):
                    product, grad, view = products[k], grads[k], views[k]
                    g = self._view(flow[k + 1], view[3], k + 1, start, count)
                    if grad is not None:
                        source = self._view(at[k], view[0], k, start, count)
                        _add_gradient(engine, product, grad, g, source, start == spans[0][0])
                    if k > lowest or gx is not None:
                        into = self._view(flow[k], view[2], k, start, count)
                        engine.multiply(back[k].transpose(1, 2), g, into, k == 0, product.shared)
            return grads

        first, *others = engine.share(_spans(tokens, chunk), work)
        found = []
        for k, (product, shape) in enumerate(zip(products, self._shapes, strict=True)):
            grad = first[k]
            for more in others:
                grad = grad if grad is None else grad.add_(more[k])
            found.append(None if grad is None else _unpack(grad, product.gradient, shape).to(x.dtype))
        return (gx, *found)

    def _run(
        self, engine: Any, weights: Sequence[Tensor], at: Sequence[Tensor], start: int, count: int, tokens: int
    ) -> None:
        views, last = self._at(count, tokens), len(self.layout.products) - 1
        for k, weight in enumerate(weights):
            view = views[k]
            source = self._view(at[k], view[0], k, start, count)
            target = self._view(at[k + 1], view[1], k + 1, start, count)
            engine.multiply(weight.transpose(1, 2), source, target, k == last, self.layout.products[k].shared)

    def _buffers(self, x: Tensor, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
        most = max((count for _, count in spans), default=0)
        return [x.new_empty(width * most) for width in self.widths[1:-1]]

    def _engine(self, x: Tensor) -> Any:
        """Who multiplies: NumPy where its products of small blocks are faster and nothing watches those of torch."""
        if (
            self.small
            and str(x.dtype) in _small.DTYPES
            and _small.is_faster()
            and torch.get_num_threads() <= MAX_THREADS
            and not torch._C._len_torch_dispatch_stack()
        ):
            return _NumPy
        return _Half if x.dtype == torch.bfloat16 else _Torch

    def _view(self, x: Tensor, view: tuple[tuple[int, ...], tuple[int, ...]], k: int, start: int, count: int) -> Tensor:
        """The operand in activation number k: for input and output at the chunk's place."""
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

    def _chunk(self, x: Tensor, engine: Any) -> int:
        widest = max(self.widths[1:-1], default=1) * x.element_size()
        if engine is _NumPy:
            return SMALL_CHUNK * (2 if self.tiny and 2 * SMALL_CHUNK * widest <= SMALL_BYTES else 1)
        budget = BLOCK_BYTES if self.blocks else CHUNK_BYTES
        return max(MIN_CHUNK, min(MAX_CHUNK, budget // widest // 64 * 64))

    def _kept_tokens(self, tokens: int, chunk: int) -> int:
        width = sum(self.widths[1:-1])
        if not width:
            return 0
        fits = max(self.spare // width - 2 * chunk, tokens if width <= min(self.widths[0], self.widths[-1]) else 0)
        return tokens if fits >= tokens else fits // chunk * chunk

    def differentiable(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients by the portable plan, which can be differentiated and batched in turn."""
        from structlin._arrays import ops

        with torch.enable_grad():
            given = [t.view_as(t) if need else t for t, need in zip((x, *factors), needs, strict=True)]
            tokens = x.shape[0 if self.rows else 1]
            y = self._portable(given[1:], given[0], tokens, ops("torch")).reshape(gy.shape)
            wanted = [t for t, need in zip(given, needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
        return tuple(next(found) if need else None for need in needs)


def _spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """Start and length of each chunk."""
    return [(start, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]


class _Torch:
    """Products by torch, which add to cleared rows."""

    @staticmethod
    def before(part: Tensor, bias: Tensor | None) -> None:
        part.zero_() if bias is None else part.copy_(bias.expand_as(part))

    @staticmethod
    def after(part: Tensor, bias: Tensor | None) -> None:
        pass

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

    @staticmethod
    def share(spans: Sequence[tuple[int, int]], work: Callable[[Sequence[tuple[int, int]]], Any]) -> list[Any]:
        return [work(spans)]


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


class _NumPy:
    """Products by NumPy, which are one thread's each: the chunks are dealt out to as many threads as torch has."""

    @staticmethod
    def before(part: Tensor, bias: Tensor | None) -> None:
        pass

    @staticmethod
    def after(part: Tensor, bias: Tensor | None) -> None:
        if bias is not None:
            _small.add(part, bias)

    @staticmethod
    def multiply(left: Tensor, right: Tensor, out: Tensor, last: bool, shared: bool) -> None:
        _small.multiply(left, right, out)

    @staticmethod
    def add(grad: Tensor, left: Tensor, right: Tensor) -> None:
        product = torch.empty_like(grad)
        _small.multiply(left, right, product)
        _small.add(grad, product)

    @staticmethod
    def share(spans: Sequence[tuple[int, int]], work: Callable[[Sequence[tuple[int, int]]], Any]) -> list[Any]:
        threads = min(torch.get_num_threads(), len(spans))
        if threads < 2:
            return [work(spans)]
        return list(_small.pool(threads).map(work, [spans[k::threads] for k in range(threads)]))


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


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: ChunkedChain, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.chain = chain
        kept: list[Tensor] = []
        later = ctx.needs_input_grad[4:]  # the first factor's gradient reads the input alone
        y = chain.forward(x, factors, bias, kept if any(later) else None)
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        chain: ChunkedChain = ctx.chain
        count = 1 + len(chain.layout.products)
        x, *factors = ctx.saved_tensors[:count]
        _, for_x, for_bias, *for_factors = ctx.needs_input_grad
        needs = [for_x, *for_factors]
        batched = torch._C._functorch.is_batchedtensor(gy) or torch._C._functorch.is_legacy_batchedtensor(gy)
        found: tuple[Tensor | None, ...] = (None,) * count
        if any(needs):
            if torch.is_grad_enabled() or batched:
                found = chain.differentiable(gy, x, factors, needs)
            else:
                found = chain.backward(gy, x, factors, needs, ctx.saved_tensors[count:])
        return None, found[0], gy.sum(0 if chain.rows else 1) if for_bias else None, *found[1:]
