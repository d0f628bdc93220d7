"""The operators ``structlin::block_pass`` and ``block_backward`` of torch: one pass over an MLP or projections.

They are the nodes of graphs of ``torch.compile`` for :mod:`structlin.execution.blocks`. Like ``structlin::chain``
(:mod:`._operator`), they contain the computation as JSON text. They contain the chosen kind of pass too, because caches
of compiled graphs compare the nodes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structlin.execution._gradients import SingleProducts
from structlin.execution._guard import guard_of, transforming
from structlin.execution.blocks import HALF, TorchBlock, by_autograd, first_kind, torch_block
from structlin.execution.compiled._target import CompileError
from structlin_nn.torch._operator import from_text, is_batched, refuse_forward_mode, shield, to_text

TOKENS = 1024  # for which a pass is chosen if the compiler does not know their number


def graph_pass(
    chains: tuple[str, ...], mlp: bool, activation: str | None, biases: tuple[bool, ...], norm: str | None, eps: float,
    affine: tuple[bool, bool], residual: bool, dtype: torch.dtype, tokens: int, train: bool,
) -> tuple[str, str, list[int], bool] | None:  # fmt: skip
    """Return what :func:`block_pass` takes, if a compiled graph should run a block by it; otherwise None.

    ``chains`` are texts of structures, of an MLP with that of its second layer. If a pass for the first half of an MLP
    is the fastest, the text describes that half, and the last value is True. For a compiler the result is constant.
    """
    block = _block(chains, mlp, activation, biases, norm, eps, affine, residual)
    kind = block.kind(dtype, tokens, train)
    if kind is None:
        return None
    half = block.half if kind.startswith(HALF) else None
    if half is not None:
        block, kind = half, first_kind(kind)
    return block_text(block), kind, block.stored_rows(dtype, kind) if train else [], half is not None


# As torch.compiler.assume_constant_result does, which imports the compiler.
graph_pass._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _block(chains: Sequence[str], mlp: bool, *rest: Any) -> TorchBlock:
    *first, last = map(from_text, chains)
    return torch_block(tuple(first), last, *rest) if mlp else torch_block((*first, last), None, *rest)


def block_text(block: TorchBlock) -> str:
    """Return a block as JSON text, which :func:`block_from_text` parses."""
    names = ("activation", "biases", "norm", "eps", "affine", "residual")
    parts = {"chains": [*map(to_text, block.structures)], "mlp": block.second is not None}
    return json.dumps(parts | {name: getattr(block, name) for name in names})


@lru_cache(maxsize=4096)
def block_from_text(text: str) -> TorchBlock:
    """Return the block of a text of :func:`block_text`; ValueError for any other text."""
    try:
        content = json.loads(text)
        biases, affine = tuple(content["biases"]), tuple(content["affine"])
        chains, mlp, activation, norm, eps, residual = (
            content[name] for name in ("chains", "mlp", "activation", "norm", "eps", "residual")
        )
        return _block(chains, mlp, activation, biases, norm, eps, affine, residual)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{text!r} does not describe a block: {error!r}") from error


def _spread(block: TorchBlock, given: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the operands of a block; lists with None in them have no derivatives in torch."""
    found = iter(given)
    return [*(next(found) if there else None for there in (*block.affine, *block.biases)), *found]


@torch.library.custom_op("structlin::block_pass", mutates_args=())
def block_pass(x: Tensor, operands: list[Tensor], block: str, kind: str, rows: list[int]) -> list[Tensor]:
    """Return the outputs of a pass over (tokens, d_in), and activations (tokens, row) for the backward pass."""
    refuse_forward_mode()
    found, (x, *operands) = block_from_text(block), [t.contiguous() for t in (x, *operands)]
    spread = _spread(found, operands)
    if _runs(found, kind, x, spread, rows):
        kept: list[Tensor] | None = [] if rows else None
        try:
            return [*found.run(x, spread, kind, kept), *(kept or ())]
        except CompileError as error:
            found.fail(error)
    if rows and len(x):
        found.fail()  # so that the backward pass does not read the activations, which are not computed
    _check(found, x, spread)
    y = _by_products(found, x, spread)
    return [*(one.contiguous() for one in y), *(x.new_zeros(len(x), row) for row in rows)]


def _runs(block: TorchBlock, kind: str, x: Tensor, operands: Sequence[Tensor | None], rows: Sequence[int]) -> bool:
    """Whether the pass can run here; the graph may have been compiled on another processor."""
    if block.failed or not block.plain(x, operands) or block.program(x.dtype, kind) is None:
        return False
    return not rows or list(rows) == block.stored_rows(x.dtype, kind)


def _check(block: TorchBlock, x: Tensor, operands: Sequence[Tensor | None]) -> None:
    """Raise ValueError if an operand has a wrong shape or dtype."""
    if x.ndim != 2 or x.shape[1] != block.d_in:
        raise ValueError(f"the input must have shape (tokens, {block.d_in}), got {tuple(x.shape)}")
    for structure, bias, factors in block.by_structure(operands[2:]):
        guard_of(structure).check(x, factors if bias is None else [*factors, bias])


@block_pass.register_fake
def _(x: Tensor, operands: list[Tensor], block: str, kind: str, rows: list[int]) -> list[Tensor]:
    found = block_from_text(block)
    _check(found, x, _spread(found, operands))
    return [x.new_empty((x.shape[0], row)) for row in (*found.outputs, *rows)]


@torch.library.custom_op("structlin::block_backward", mutates_args=())
def block_backward(
    gradients: list[Tensor], x: Tensor, operands: list[Tensor], kept: list[Tensor], block: str, kind: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x and of the operands for which ``needs`` (x first) is True."""
    refuse_forward_mode()
    found, (x, *operands) = block_from_text(block), [t.contiguous() for t in (x, *operands)]
    spread, gradients = _spread(found, operands), [g.contiguous() for g in gradients]
    if _runs(found, kind, x, spread, [one.shape[1] for one in kept]):
        try:
            grads = [g for g in found.backward(gradients, x, spread, kind, kept) if g is not None]
            return [g for g, need in zip(grads, needs, strict=True) if need]
        except CompileError as error:
            found.fail(error)
    wanted = [t for t, need in zip((x, *operands), needs, strict=True) if need]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        some = iter(given)
        first, *rest = (next(some) if need else t for t, need in zip((x, *operands), needs, strict=True))
        return _by_products(found, first, _spread(found, rest))

    pulled: Any = torch.func.vjp(outputs, *wanted)  # an operator runs below autograd
    return [g.contiguous() for g in pulled[1](tuple(gradients))]


def _by_products(block: TorchBlock, x: Tensor, operands: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return block.layers(x, operands, lambda s, h, factors, bias: SingleProducts(s, True).forward(h, factors, bias))


@block_backward.register_fake
def _(
    gradients: list[Tensor], x: Tensor, operands: list[Tensor], kept: list[Tensor], block: str, kind: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, need in zip((x, *operands), needs, strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    shield(block_pass, _backward, _keep)
    x, operands, ctx.block, ctx.kind, rows = inputs
    ctx.for_rows = None if rows else []  # torch expects a list as the gradient of an empty list, even one of integers
    ctx.count = len(block_from_text(ctx.block).outputs)
    kept = output[ctx.count :]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, *operands, *kept)
    ctx.operands = len(operands)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    operands, kept = saved[: ctx.operands], saved[ctx.operands :]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    given = gradients[: ctx.count]
    block = block_from_text(ctx.block)
    batched = any(map(is_batched, given))
    if torch.is_grad_enabled() or batched or transforming():
        spread, rest = _spread(block, operands), iter(needs[1:])
        wanted = [needs[0], *(t is not None and next(rest) for t in spread)]
        gx, *every = by_autograd(block, given, x, spread, wanted)
        return gx, [g for g, t in zip(every, spread, strict=True) if t is not None], None, None, ctx.for_rows
    found = iter(torch.ops.structlin.block_backward(given, x, operands, kept, ctx.block, ctx.kind, needs))
    gx, *grads = [next(found) if need else None for need in needs]
    return gx, grads, None, None, ctx.for_rows


block_pass.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.structlin.block_pass)
def _(x_shape: Sequence[int], operand_shapes: Sequence[Any], block: str, *_: Any, **__: Any) -> int:
    """Return 2 * MACs."""
    return 2 * x_shape[0] * block_from_text(block).macs


@register_flop_formula(torch.ops.structlin.block_backward)
def _(
    gradient_shapes: Sequence[Any], x_shape: Sequence[int], operand_shapes: Sequence[Any], kept_shapes: Sequence[Any],
    block: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of the backward pass, without those of activations that are computed again."""
    return 4 * x_shape[0] * block_from_text(block).macs
