"""Passes over the memory of torch's tensors on a CPU, and their derivatives.

A pass is compiled for the chain (:mod:`.compiled`), or calls the BLAS for chunks of tokens (:mod:`.chunked`). It reads
plain tensors by address; :mod:`._guard` decides which tensors allow that. If the operands of a backward pass do not, or
the gradients are differentiated again, single products of torch compute them. :mod:`.torch_ways` chooses between the
passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from structlin.execution import choice
from structlin.execution._gradients import SingleProducts
from structlin.execution._guard import Guard, addressable, as_kept, recording, shield, transforming
from structlin.execution._kept import kept
from structlin.execution.batched import BatchedChain
from structlin.execution.chunked import ChunkedChain
from structlin.execution.compiled._target import CompileError, warn_once
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.compiled.stored import StoredChain
from structlin.structure import Structure

__all__ = ["CPUChain", "Passes", "chain_of"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NEAR_BLOCK = 32  # tokens of a block beside a slice that fills half of the cache or more


class Passes(Protocol):
    """A forward and a backward pass over (tokens, d_in), or over columns."""

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return the product plus ``bias``; append to ``kept`` the activations to store for the backward pass."""

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Return gradients of x, the factors and the bias, each None if its entry of ``needs`` is False."""


class CPUChain:
    """The ways of one structure, for row-major activations or column-major ones."""

    def __init__(self, structure: Structure, rows: bool = True) -> None:
        self.structure, self.rows = structure, rows
        self.guard = Guard(structure)
        self._chain = structure.steps, structure.sizes, structure.d_in, structure.d_out, rows
        self.compiled = FusedChain(*self._chain)
        self.batched = BatchedChain(structure.steps, dict(structure.sizes), rows, structure.padding)
        self.chunked = ChunkedChain(structure.steps, dict(structure.sizes), rows, structure.padding)
        self.stored: Any = StoredChain(self.compiled)  # no way asks for the backward pass that it lacks
        self._others: dict[str, FusedChain] = {}  # by tiles, in slices, or in other blocks of tokens
        self._single = SingleProducts(structure, rows)

    def passes(self, kind: str, dtype: torch.dtype) -> Passes | None:
        """Return the passes of a kind; None where they cannot run this chain in this dtype.

        ``batched``; ``chunked``; ``compiled``, or ``compiled-tiles`` by tiles where the processor has them; after these
        two a number of tokens in a block, as in ``compiled-48``, or ``-near``: in slices with factors of at most twice
        the second level of cache; ``stored``, which is compiled for one or a few tokens and has no backward pass.
        """
        if dtype not in _DTYPES:
            return None
        if kind in ("chunked", "batched") and dtype is torch.float16:
            return None  # torch's own products of it are several times slower than those of float32
        if kind == "chunked":
            return self.chunked if self.chunked.merges else None
        if kind == "batched":
            return self.batched if self.batched.runs else None
        if kind == "stored":
            return self.stored if not self.compiled.failed and self.stored.program(dtype) is not None else None
        found = self.compiled
        if kind != "compiled":
            found = self._others.get(kind) or self._others.setdefault(kind, self._other(kind.removeprefix("compiled-")))
        return found if not self.compiled.failed and found.ready(dtype) else None

    def _other(self, which: str) -> FusedChain:
        *_, last = words = which.split("-")
        block = int(last) if last.isdecimal() else NEAR_BLOCK if last == "near" else None
        return FusedChain(*self._chain, block=block, tiles="tiles" in words, near=last == "near")

    def __call__(
        self, passes: Passes, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None,
        back: Passes | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the product, (tokens, d_in) -> (tokens, d_out), or columns; differentiable any number of times.

        ``bias``, of size d_out, is added. ``passes`` run forward, and ``back`` backward if it is given. The operands
        have passed the guard.
        """
        if torch.is_grad_enabled() and (
            x.requires_grad or any(f.requires_grad for f in factors) or (bias is not None and bias.requires_grad)
        ):
            return _Differentiable.apply(self, passes, back or passes, x, bias, *factors)
        return self.forward(passes, x, factors, bias)[0]

    def forward(
        self, passes: Passes, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, keeps: bool = False
    ) -> tuple[Tensor, Passes, list[Tensor]]:
        """Return the product, the way that computed it, and what that way stores for the backward pass."""
        kept: list[Tensor] = []
        try:
            return passes.forward(x, factors, bias, kept if keeps else None), passes, kept
        except CompileError as error:
            passes = self._uncompiled(error, x)
        kept.clear()
        return passes.forward(x, factors, bias, kept if keeps else None), passes, kept

    def backward(
        self, passes: Passes | None, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        kept: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return the gradients of x, the factors and the bias, None where ``needs`` is False.

        The tensors may be of any kind: hooks on saved tensors can change what was saved, and gradients can be batched
        or have tangents. ``passes`` run if they can read the memory of all tensors. Otherwise, and if ``passes`` is
        None, single products do. Tensors of another dtype or device than ``gy`` are converted first.

        Raises ValueError if the shape of a tensor differs from its shape in the forward pass.
        """
        if recording():
            return self._single.backward(gy, x, factors, needs)
        if passes is None or not any(needs[:-1]) or not self._fits(gy, x, factors):
            x, *factors = (t if t.dtype is gy.dtype and t.device == gy.device else t.to(gy) for t in (x, *factors))
            self._check_saved(gy, x, factors)
            return self._single.backward(gy, x, factors, needs)
        try:
            return passes.backward(gy, x, factors, needs, kept)
        except CompileError as error:
            return self._uncompiled(error, x).backward(gy, x, factors, needs)

    def _fits(self, gy: Tensor, x: Tensor, factors: Sequence[Tensor]) -> bool:
        if transforming() or not addressable(gy, "the gradient") or not addressable(x, "the input"):
            return False
        if x.dtype is not gy.dtype or x.dtype not in _DTYPES or not self.guard.holds(x.dtype, factors):
            return False
        return x.shape == self._shape_of_x(gy)

    def _check_saved(self, gy: Tensor, x: Tensor, factors: Sequence[Tensor]) -> None:
        if x.shape != (expected := self._shape_of_x(gy)):
            raise ValueError(f"the input that was saved for the backward pass has shape {tuple(x.shape)} now, "
                             f"expected {expected}")  # fmt: skip
        self.guard.check(x, factors)

    def _shape_of_x(self, gy: Tensor) -> tuple[int, int]:
        d_in = self.structure.d_in
        return (gy.shape[0], d_in) if self.rows else (d_in, gy.shape[1])

    def _uncompiled(self, error: CompileError, x: Tensor) -> Passes:
        """Return the way to use after the compiler has failed, for this call and all later ones."""
        self.compiled.failed = True
        choice.forget()
        warn_once(error, "A contraction by torch")
        return self.passes("chunked", x.dtype) or self._single


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: CPUChain, passes: Passes, back: Passes, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:  # fmt: skip
        shield(_Differentiable)
        # The first factor's gradient reads the input alone, and the ways do not read what others keep.
        keeps = any(ctx.needs_input_grad[6:]) and back is passes
        y, taken, kept = chain.forward(passes, x, factors, bias, keeps)
        ctx.chain, ctx.passes = chain, back if taken is passes else taken
        ctx.kept = [(tensor.dtype, tensor.shape) for tensor in kept]
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        chain: CPUChain = ctx.chain
        count = 1 + len(chain.structure.steps)
        saved = ctx.saved_tensors  # read only once, because hooks may compute the activations again
        x, *factors = saved[:count]
        _, _, _, for_x, for_bias, *for_factors = ctx.needs_input_grad
        needs = [for_x, *for_factors, for_bias]
        passes = None if torch.is_grad_enabled() else ctx.passes  # the gradients are to be differentiated themselves
        kept = saved[count:] if passes is not None and not recording() and as_kept(saved[count:], ctx.kept) else ()
        gx, *others, bias = chain.backward(passes, gy, x, factors, needs, kept)
        return None, None, None, gx, bias, *others


def chain_of(structure: Structure, rows: bool = True) -> CPUChain:
    """Return the ways of a structure, made once for it."""
    return kept(structure, ("torch_cpu", rows), lambda: CPUChain(structure, rows))
