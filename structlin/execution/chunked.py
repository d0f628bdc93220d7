"""The contraction of a chain on a CPU with torch: chunks of tokens, and products that write where the next one reads.

The passes are those of :mod:`._ordered`. The buffers of a chunk stay in cache. The last product adds to the output,
whose rows are first set to the bias (or zeros), because the BLAS would need a separate pass to clear them.

Activations are stored for the backward pass if they are no larger than input and output. Larger ones are stored for the
first tokens, up to the memory that a dense matrix and its gradient would take. The others are computed again, chunk by
chunk.

This way is for machines and problems for which :mod:`structlin.execution.compiled` cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structlin._parse import Step
from structlin.execution._ordered import OrderedChain
from structlin.execution._orders import Product

# Bytes of the widest activation of one chunk: with blocks the last cache is to hold it, and without the core's own,
# together with operands. Products of fewer tokens than MIN_CHUNK are slow, and of more than MAX_CHUNK no faster, unless
# the gradients of the matrices, which are read and written once for each chunk, do not stay in cache.
BLOCK_BYTES, CHUNK_BYTES = 16 << 20, 4 << 20
MIN_CHUNK, MAX_CHUNK = 64, 256
LARGE_BLOCK, LARGE_CHUNK = 1 << 18, 512  # numbers of a matrix, from which on that many tokens are faster
PACK_TOKENS = 128  # least number of tokens for which matrices are copied into the order in which the BLAS is fast


class ChunkedChain(OrderedChain):
    """The passes on a CPU; ``merges`` is also False for chains of plain matrices, which need no order."""

    def __init__(
        self, steps: Sequence[Step], sizes: Mapping[str, int], rows: bool = True, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(steps, sizes, rows, padding)
        self.merges = self.merges and any(step.batch or step.carried for step in steps)
        if not self.merges:
            return
        products = self.layout.products
        self.blocks = any(step.batch for step in steps)
        # The dense matrix and its gradient, less the factors, their gradients, and copies of both in other orders.
        self.spare = 2 * self.widths[0] * self.widths[-1] - 6 * sum(math.prod(p.shape) for p in products)
        self.large = min(p.shape[1] * p.shape[2] for p in products) >= LARGE_BLOCK
        self.small = self.blocks and all(p.small for p in products)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return the product, and append to ``kept`` the activations to store for :meth:`backward`."""
        chunk, tokens = self.chunk(x.element_size()), x.shape[0 if self.rows else 1]
        saved = 0 if kept is None else self._kept_tokens(tokens, chunk)
        return self.run_forward(x, factors, bias, chunk, saved, kept)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the factors and the bias, None where ``needs`` is False."""
        wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        return self.run_backward(gy, x, factors, needs, self.chunk(x.element_size()), kept, wide)

    def multiply(self, product: Product, weight: Tensor, source: Tensor, target: Tensor) -> None:
        """``target = weight @ source``, batched."""
        _multiply(weight, source, target, product.shared, False)

    def finish(
        self, product: Product, weight: Tensor, source: Tensor, target: Tensor, bias: Tensor | None, part: Tensor
    ) -> None:
        """Do the same, plus the bias, where the target is ``part`` of an input or output."""
        if bias is None:
            part.zero_()
        else:
            part.copy_((bias if self.rows else bias[:, None]).expand_as(part))
        _multiply(weight, source, target, product.shared, True)

    def readable(self, right: Tensor) -> Tensor:
        """Return the right operand of a product of gradients as the library multiplies it fast."""
        return _readable(right) if right.dtype is torch.bfloat16 else right

    def packs(self, product: Product, tokens: int) -> bool:
        """Whether to copy a matrix into the order of its axes, for this number of tokens."""
        return tokens >= PACK_TOKENS and product.small

    def chunk(self, item: int) -> int:
        """Return the number of tokens of a chunk, for numbers of ``item`` bytes."""
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


def _multiply(left: Tensor, right: Tensor, out: Tensor, shared: bool, adds: bool) -> None:
    """Write or add a batched product, with operands in the orders in which the BLAS is fast.

    In bfloat16 the kernels of oneDNN are fast if the result and the right operand are row-major.
    """
    half, exchanged = out.dtype is torch.bfloat16, out.stride(2) != 1
    if half:
        left, right = (_readable(left.mT).mT, right) if exchanged else (left, _readable(right))
    if shared:
        left = left.expand(right.shape[0], -1, -1)
    if exchanged:
        left, right, out = right.mT, left.mT, out.mT
    if adds:
        torch.baddbmm(out, left, right, out=out)
    else:
        torch.bmm(left, right, out=out)


def _readable(right: Tensor) -> Tensor:
    if right.stride(2) == 1:
        return right
    batch, rows, columns = right.stride()
    if batch == rows * right.shape[1]:  # torch transposes a single matrix fast, but not a batch
        flat = right.as_strided((right.shape[0] * right.shape[1], right.shape[2]), (rows, columns))
        return flat.contiguous().view(right.shape)
    return right.contiguous()
