"""Which way a chain is run on a CPU in torch, and its derivatives.

There are two ways beside the portable plan: compiled for the chain (:mod:`.compiled`), and by the BLAS in
chunks of tokens (:mod:`.chunked`). Both are a pair of passes over plain tensors. Where something watches or
transforms the single products, in other dtypes, and where there is little to do, the portable plan runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from structlin._arrays import ops
from structlin.execution.chunked import ChunkedChain
from structlin.execution.compiled.passes import FusedChain

if TYPE_CHECKING:
    from structlin.structure import Structure

__all__ = ["CPUChain", "Passes"]

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Passes(Protocol):
    """A forward and a backward pass over (tokens, d_in), or over columns."""

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """The product, plus ``bias``; to ``kept`` is added what the other pass had otherwise to compute again."""

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, the factors and the bias, None where ``needs``, which has one entry for each, is False."""


class CPUChain:
    """The ways of one structure, for row-major activations or column-major ones."""

    def __init__(self, structure: Structure, rows: bool = True) -> None:
        self.structure, self.rows = structure, rows
        sizes = dict(structure.sizes)
        self._fused = FusedChain(structure.steps, structure.sizes, structure.d_in, structure.d_out, rows)
        self._chunked = ChunkedChain(structure.steps, sizes, rows, structure.padding)

    def passes(self, x: Tensor, operands: Sequence[Tensor]) -> Passes | None:
        """How to run ``x`` with these factors (and bias); None: by the portable plan."""
        if not x.is_cpu or x.dtype not in _DTYPES or type(x) not in _PLAIN:
            return None
        if any(type(t) not in _PLAIN or t.dtype != x.dtype or t.is_neg() for t in operands) or x.is_neg():
            return None
        if (
            torch.is_autocast_enabled("cpu")
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        ):
            return None
        tokens = x.shape[0 if self.rows else 1]
        if self._fused.large_blocks(torch.get_num_threads()) and self._chunked.suits(x, tokens):
            return self._chunked
        if self._fused.suits(x, tokens) and not torch._C._len_torch_dispatch_stack():
            return self._fused
        return self._chunked if self._chunked.suits(x, tokens) else None

    def back(self, passes: Passes, x: Tensor) -> Passes:
        """Which way the backward pass takes: not the compiled one where that has too much to hold in cache."""
        if passes is not self._fused or not self._fused.spills(x.dtype):
            return passes
        return self._chunked if self._chunked.suits(x, x.shape[0 if self.rows else 1]) else passes

    def __call__(self, passes: Passes, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """(tokens, d_in) -> (tokens, d_out), or columns; differentiable any number of times.

        ``bias``, of size d_out, is added.
        """
        inputs = (x, *factors) if bias is None else (x, *factors, bias)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return _Differentiable.apply(self, passes, x, bias, *factors)
        return passes.forward(x, factors, bias)

    def differentiable(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients by the portable plan, which can be differentiated and batched in turn."""
        *before, for_bias = needs
        found: Iterator[Tensor] = iter(())
        if any(before):
            with torch.enable_grad():
                given = [t.view_as(t) if need else t for t, need in zip((x, *factors), before, strict=True)]
                y = self.structure._portable(given[1:], given[0], ops("torch"), self.rows)
                wanted = [t for t, need in zip(given, before, strict=True) if need]
                found = iter(torch.autograd.grad(y, wanted, gy, create_graph=True))
        gradients = [next(found) if need else None for need in before]
        return *gradients, gy.sum(0 if self.rows else 1) if for_bias else None


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: CPUChain, passes: Passes, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.chain, ctx.passes = chain, chain.back(passes, x)
        kept: list[Tensor] = []
        # The first factor's gradient reads the input alone, and the ways do not read what others keep.
        keeps = any(ctx.needs_input_grad[5:]) and ctx.passes is passes
        y = passes.forward(x, factors, bias, kept if keeps else None)
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        chain: CPUChain = ctx.chain
        count = 1 + len(chain.structure.steps)
        saved = ctx.saved_tensors  # asked for once: where activations are computed again, there is no second time
        x, *factors = saved[:count]
        _, _, for_x, for_bias, *for_factors = ctx.needs_input_grad
        needs = [for_x, *for_factors, for_bias]
        batched = torch._C._functorch.is_batchedtensor(gy) or torch._C._functorch.is_legacy_batchedtensor(gy)
        if torch.is_grad_enabled() or batched or not any(needs[:-1]):
            found = chain.differentiable(gy, x, factors, needs)
        else:
            found = ctx.passes.backward(gy.resolve_neg(), x, factors, needs, saved[count:])
        gx, *others, bias = found
        return None, None, gx, bias, *others


def chain_of(structure: Structure, rows: bool = True) -> CPUChain:
    """The ways of a structure, made once for it."""
    key = "torch_cpu", rows
    found = structure._kept.get(key)
    if found is None:
        found = structure._kept[key] = CPUChain(structure, rows)
    return found
