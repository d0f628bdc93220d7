"""The contraction of a chain on GPUs in torch, by batched products of strided operands without copies.

The passes are those of :mod:`._ordered`: each step is one product of torch (cuBLAS on CUDA). So a chain of n steps is
n kernels. A bias is one more kernel, because torch writes it before the last product adds to it.

Activations between the steps have the tokens innermost. Rows are padded to a multiple of :data:`ALIGNED` bytes, so they
are aligned for wide loads for any number of tokens.

With ``chunk`` the chain runs for this number of tokens at a time. The activations between the steps then use the same
buffers, which stay in the L2 of the device if they fit (:func:`l2_chunk`). The backward pass computes them again,
because reading them from memory would take longer than the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structlin.execution._kept import kept
from structlin.execution._ordered import OrderedChain
from structlin.execution._orders import Operand, Product
from structlin.execution.devices import ALIGNED, L2_SHARE
from structlin.structure import Structure

__all__ = ["StridedChain", "l2_chunk", "strided"]

LEAST_CHUNK = 128  # tokens: fewer do not fill the tiles of a product


class StridedChain(OrderedChain):
    """The passes on a GPU; ``merges`` is False if a step would need a copy."""

    def __init__(self, structure: Structure, rows: bool = True) -> None:
        super().__init__(structure.steps, dict(structure.sizes), rows, structure.padding)
        self.structure = structure
        products = self.layout.products if self.merges else ()
        inner = [o for p in products for o in (p.source, p.target, p.source_gradient, p.target_gradient)]
        # Tokens that are one axis together with a carried one have no room for more between.
        self.rounds = all(size == 1 for o in inner for size, tokens, _, _ in o.groups if tokens)

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, chunk: int = 0,
        kept: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the product, (tokens, d_in) -> (tokens, d_out), or columns, plus ``bias``, in chunks unless 0.

        To ``kept`` the activations between the steps are added, if there are no chunks.
        """
        saved = x.shape[0 if self.rows else 1]
        return self.run_forward(x, factors, bias, chunk, saved, None if chunk else kept)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], chunk: int = 0,
        kept: Sequence[Tensor] = (), flows: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return gradients of x, the factors and the bias, None where ``needs`` is False; ``kept`` by ``forward``.

        ``flows``: the gradients of x and of the activations between the steps, if they are known.
        """
        several = 0 < chunk < x.shape[0 if self.rows else 1]
        wide = torch.float32 if several and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        return self.run_backward(gy, x, factors, needs, chunk, kept, wide, flows)

    def multiply(self, product: Product, weight: Tensor, source: Tensor, target: Tensor) -> None:
        """``target = weight @ source``, batched."""
        torch.bmm(_repeated(weight, source), source, out=target)

    def finish(
        self, product: Product, weight: Tensor, source: Tensor, target: Tensor, bias: Tensor | None, part: Tensor
    ) -> None:
        """Do the same, plus the bias, where the target is ``part`` of an input or output."""
        added = None if bias is None else _along(bias, product.target, part.shape[0 if self.rows else 1])
        if added is not None:
            torch.baddbmm(added, _repeated(weight, source), source, out=target)
            return
        self.multiply(product, weight, source, target)
        if bias is not None:  # tokens and a carried axis are one: no strides stand for the bias there
            part.add_(bias if self.rows else bias[:, None])

    def between(self, x: Tensor) -> list[Tensor]:
        """Return room for the activations between the steps, or their gradients, of all tokens of ``x``."""
        return self._buffers(x, x.shape[0 if self.rows else 1])

    def room(self, count: int, item: int) -> int:
        """Return the number of tokens, rounded up to aligned rows where that is possible."""
        unit = max(1, ALIGNED // item) if self.rounds else 1
        return -(-count // unit) * unit


def _repeated(weight: Tensor, source: Tensor) -> Tensor:
    """Return a matrix for each item of the batch; a single one is the same for all."""
    return weight if len(weight) == len(source) else weight.expand(len(source), -1, -1)


def l2_chunk(chain: StridedChain, tokens: int, item: int, l2: int, train: bool) -> int:
    """Return the number of tokens for which a chunk and the factors fit into ``l2`` bytes; 0 if all tokens do.

    A number has ``item`` bytes. A chunk has input, output and the activations between them, and in the backward pass
    their gradients.
    """
    factors = chain.structure.num_params * item
    each = sum(chain.widths) * item
    if train:
        factors, each = 3 * factors, 2 * each  # in another dtype for the sums of gradients
    most = int(L2_SHARE * l2) - factors
    chunk = max(0, most) // each // LEAST_CHUNK * LEAST_CHUNK
    return 0 if chunk >= tokens or not chunk else chunk


def _along(bias: Tensor, target: Operand, count: int) -> Tensor | None:
    """Return a bias as an operand with the shape of an output; None if no strides represent it."""
    sizes, strides = [], []
    for size, tokens, stride, over in target.groups:
        if (tokens and size > 1) or (over and not tokens):
            return None
        sizes.append(count if tokens else size)
        strides.append(0 if tokens else stride)
    return bias.as_strided(sizes, strides, bias.storage_offset())


def strided(structure: Structure, rows: bool = True) -> StridedChain:
    """Return the chain of a structure, made once for it."""
    return kept(structure, ("strided", rows), lambda: StridedChain(structure, rows))
