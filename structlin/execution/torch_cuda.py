"""Ways for GPUs in torch.

Strided products without copies (:mod:`.strided`), at once or in chunks that stay in L2, and kernels in Triton
(:mod:`.fused`).

They accept plain tensors of real dtypes on any device, and are candidates on CUDA. No call synchronizes or reads a
value, so CUDA graphs can record it. Results are bit-identical for the same sizes on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structlin.execution import fused, traffic
from structlin.execution._gradients import SingleProducts
from structlin.execution._guard import recording, shield, transforming
from structlin.execution._kept import kept
from structlin.execution._orders import TOKENS, view_of
from structlin.execution.choice import Problem, Way
from structlin.execution.devices import Device
from structlin.execution.strided import l2_chunk, strided
from structlin.structure import Structure

__all__ = ["FusedWay", "StridedWay", "fused_way", "node_tokens", "strided_l2_way", "strided_way"]

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether strides describe the tensors: they are not subclasses, batched or sparse, and have a real dtype."""
    return not transforming() and all(
        t is None
        or (
            t.__class__ in _PLAIN
            and t.layout is torch.strided
            and t.dtype in _DTYPES
            and not torch._C._functorch.is_legacy_batchedtensor(t)
        )
        for t in tensors
    )


def _casts(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class StridedWay(Way):
    """One product of strided operands for each step; ``in_l2``: in chunks of tokens that stay in the L2 of the device.

    The way does not support chains with a step that would need a copy, that is, with a regrouping of axes.
    """

    def __init__(self, name: str, in_l2: bool) -> None:
        self.name, self.in_l2, self.group = name, in_l2, "strided"

    def supports(self, problem: Problem) -> bool:
        """Return whether this way can run the problem."""
        if problem.device != "cuda" or getattr(torch, problem.dtype, None) not in _DTYPES:
            return False
        structure, rows, dtype = problem.structure, problem.rows, getattr(torch, problem.dtype)
        if not strided(structure, rows).merges:
            return False
        return not self.in_l2 or self._chunk(structure, rows, problem.tokens, dtype, problem.train) > 0

    def fits(self, problem: Problem, device: Device) -> bool:
        """Return :meth:`supports` for a device that need not be present."""
        with traffic.assuming(device):
            return self.supports(problem)

    def seconds(self, problem: Problem) -> float:
        """Predict the time of the problem on the current device in seconds."""
        return traffic.seconds(self, problem)

    def _chunk(self, structure: Structure, rows: bool, tokens: int, dtype: torch.dtype, train: bool) -> int:
        if not self.in_l2:
            return 0
        return l2_chunk(strided(structure, rows), tokens, dtype.itemsize, traffic.device_here().l2, train)

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        """Compute the product."""
        chain = strided(structure, rows)
        if not chain.merges or not _plain(x, bias, *factors) or _casts(x):
            return SingleProducts(structure, rows).forward(x, factors, bias)
        tensors = (x, bias, *factors)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _Differentiable.apply(self, structure, rows, *tensors)
        return self.forward(structure, factors, x, bias, rows)

    def forward(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool,
        kept: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the product of plain tensors without gradients; append to ``kept`` what :meth:`backward` can use."""
        chunk = self._chunk(structure, rows, x.shape[0 if rows else 1], x.dtype, False)
        return strided(structure, rows).forward(x, factors, bias, chunk, kept)

    def backward(
        self, structure: Structure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        rows: bool, kept: Sequence[Tensor] = (), again: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Return the gradients of x, the factors and the bias (None where ``needs`` is False) for any tensors.

        ``again``: the gradients will be differentiated.
        """
        chain = strided(structure, rows)
        if chain.merges and not again and not recording() and _plain(gy, x, *factors):
            if not all(t.dtype is gy.dtype and t.device == gy.device for t in (x, *factors)):
                x, *factors = (t.to(gy) for t in (x, *factors))  # hooks on saved tensors may have changed them
                kept = ()
            return self._gradients(structure, gy, x, factors, needs, rows, kept)
        return SingleProducts(structure, rows).backward(gy, x, factors, needs)

    def _gradients(
        self, structure: Structure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        rows: bool, kept: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Do what :meth:`backward` does, with plain tensors of one dtype."""
        chunk = self._chunk(structure, rows, x.shape[0 if rows else 1], x.dtype, True)
        return strided(structure, rows).backward(gy, x, factors, needs, chunk, () if chunk else kept)


class FusedWay(StridedWay):
    """Both steps as one kernel in Triton (:mod:`.fused`), and backward too: the gradient of x is the transposed chain.

    The gradients of the factors are strided products of what the two kernels leave between the steps. The way has not
    been measured, so it is used only if a policy names it.
    """

    explicit = True

    def __init__(self) -> None:
        super().__init__("fused", False)
        self.group = "fused"

    def supports(self, problem: Problem) -> bool:
        """Return whether this way can run the problem."""
        return fused.has_triton() and self.fits(problem, traffic.device_here())

    def fits(self, problem: Problem, device: Device) -> bool:
        """Whether the kernels can run a problem on a device; not whether Triton is installed."""
        if not problem.rows or not StridedWay.supports(self, problem):
            return False
        form = fused.form_of(problem.structure)
        with traffic.assuming(device):
            return form is not None and self._launch(form, problem.tokens, getattr(torch, problem.dtype)) is not None

    def _launch(self, form: fused.Form, tokens: int, dtype: torch.dtype) -> fused.Tiles | None:
        if not tokens or dtype not in (fused.DTYPES if tokens <= fused.FEW else fused.MANY_DTYPES):
            return None
        return fused.tiles(form, tokens, dtype.itemsize, traffic.device_here())

    def _run(
        self, form: fused.Form, launch: fused.Tiles, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None,
        h: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Launch a kernel, or note its traffic for tensors without memory."""
        x, (left, right) = x.detach(), (f.detach().contiguous() for f in factors)
        bias = None if bias is None else bias.detach().contiguous()
        if not x.is_meta:
            return fused.run(form, launch, x, left, right, bias, h)
        y, item = x.new_empty((x.shape[0], form.d_out)), x.element_size()
        reads = (launch.x_reads, launch.left_reads, launch.right_reads)
        again = sum((n - 1) * t.numel() * item for n, t in zip(reads, (x, left, right), strict=True))
        if not launch.few:
            torch.zeros(1, device=x.device)  # the counters: a kernel of its own
            again += (launch.between - (h is not None)) * x.shape[0] * form.between * item
        operands = [t for t in (x, left, right, bias) if t is not None]
        traffic.note("fused", launch.macs, operands, [y] if h is None else [y, h], again)
        return y

    def forward(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool,
        kept: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the product by a kernel."""
        form = fused.form_of(structure) if rows and (x.is_meta or fused.can_launch(x)) else None
        launch = None if form is None else self._launch(form, x.shape[0], x.dtype)
        if form is None or launch is None:
            return super().forward(structure, factors, x, bias, rows, kept)
        if kept is not None and not launch.few:
            kept += strided(structure).between(x)
        return self._run(form, launch, x, factors, bias, *(kept or ()))

    def _gradients(
        self, structure: Structure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool],
        rows: bool, kept: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        form = fused.form_of(structure) if rows and needs[0] and (x.is_meta or fused.can_launch(x)) else None
        form = None if form is None else form.transposed()
        launch = None if form is None else self._launch(form, x.shape[0], x.dtype)
        if form is None or launch is None or launch.few:
            return super()._gradients(structure, gy, x, factors, needs, rows, kept)
        flows = strided(structure).between(gy) if needs[1] else []
        gx = self._run(form, launch, gy, factors[::-1], None, *flows)
        return strided(structure).backward(gy, x, factors, needs, 0, kept, (gx, *flows))


class _Differentiable(torch.autograd.Function):
    """Keeps the operands and, without chunks, the activations between the steps, as autograd would."""

    @staticmethod
    def forward(
        ctx: Any, way: StridedWay, structure: Structure, rows: bool, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:  # fmt: skip
        shield(_Differentiable)
        ctx.way, ctx.structure, ctx.rows = way, structure, rows
        kept: list[Tensor] = []
        y = way.forward(structure, factors, x, bias, rows, kept if any(ctx.needs_input_grad[6:]) else None)
        ctx.kept = [(t.dtype, t.shape, t.device) for t in kept]
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        count = 1 + len(ctx.structure.steps)
        x, *rest = ctx.saved_tensors
        factors, kept = rest[: count - 1], rest[count - 1 :]
        if [(t.dtype, t.shape, t.device) for t in kept] != ctx.kept or not _plain(*kept):
            kept = []  # hooks on saved tensors have changed them
        _, _, _, for_x, for_bias, *for_factors = ctx.needs_input_grad
        needs, again = [for_x, *for_factors, for_bias], torch.is_grad_enabled()
        gx, *others, bias = ctx.way.backward(ctx.structure, gy, x, factors, needs, ctx.rows, kept, again)
        return None, None, None, gx, bias, *others


# In the widest activation: copying so many numbers takes as long as launching a kernel.
NODE_NUMBERS = 1 << 20


def node_tokens(structure: Structure) -> int:
    """Return the least number of tokens for which a compiled graph on CUDA runs a chain as one node; 0 for never.

    A compiler fuses a copy of the output with the following operation. But it does not write a product in another
    order, so it copies an activation between two steps unless the second one can read it by its strides.
    """
    return kept(structure, ("cuda_node",), lambda: _node_tokens(structure))


def _node_tokens(structure: Structure) -> int:
    chain, sizes = strided(structure), dict(structure.sizes)
    if not chain.merges or not any(step.batch for step in structure.steps):
        return 0
    labels = TOKENS + structure.steps[0].input
    for number, step in enumerate(structure.steps):  # in the order of structlin.execution.products
        batch, carried = ("".join(a for a in labels if a in role) for role in (step.batch, step.carried))
        groups = batch, "".join(a for a in step.contracted), carried + TOKENS
        if number and view_of(labels, groups, sizes, False) is None:
            return max(1, NODE_NUMBERS // max(chain.widths))
        labels = batch + step.free + carried + TOKENS
    return 0


strided_way, strided_l2_way, fused_way = StridedWay("strided", False), StridedWay("strided-l2", True), FusedWay()
