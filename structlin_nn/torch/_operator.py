"""The operator ``structlin::chain`` of torch: the contraction of a chain as one node of a graph.

It saves only its input for the backward pass, which computes the intermediates again. In a compiled or exported graph
it is one node that runs the contraction of :mod:`structlin`. A graph that is saved, or compiled in one process and run
in another, cannot contain Python objects. So the node contains the structure as JSON text, and runs in any process that
imports this module.

Operators written in Python have no forward-mode derivatives and do not support ``torch.func.grad``. If
:func:`structlin.execution._guard.transforming` returns True, the products must be called one by one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structlin._arrays import ops
from structlin.execution._gradients import chain_gradients, gradient_macs
from structlin.execution._guard import to_shield, transforming
from structlin.execution.torch_ways import torch_chain
from structlin.structure import Structure


@lru_cache(maxsize=4096)
def to_text(structure: Structure) -> str:
    """Return a chain as JSON text, which :func:`from_text` parses."""
    return json.dumps(
        {
            "chain": "; ".join(map(str, structure.steps)),
            "sizes": dict(structure.sizes),
            "d_in": structure.d_in,
            "d_out": structure.d_out,
        }
    )


@lru_cache(maxsize=4096)
def from_text(text: str) -> Structure:
    """Return the chain of a text of :func:`to_text`; ValueError for any other text."""
    try:
        content = json.loads(text)
        chain, sizes, d_in, d_out = (content[key] for key in ("chain", "sizes", "d_in", "d_out"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{text!r} does not describe a chain of einsums: {error!r}") from error
    return Structure.parse(chain, sizes, d_in=d_in, d_out=d_out)


_TORCH = ops("torch")


def refuse_forward_mode() -> None:
    """Raise NotImplementedError inside of a forward-mode derivative."""
    if torch.autograd.forward_ad._current_level >= 0:  # torch would return a derivative of zero
        raise NotImplementedError("structlin::chain has no forward-mode derivative; call structure.apply instead")


def shield(operator: Any, backward: Any, keep: Any) -> None:
    """Keep ``torch.compile`` from compiling the derivative of an operator from now on."""
    if to_shield(operator):
        operator.register_autograd(torch.compiler.disable(backward), setup_context=keep)


def is_batched(gradient: Tensor) -> bool:
    """Whether this is a batch of gradients (``is_grads_batched``), for which operators have no rule."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


@torch.library.custom_op("structlin::chain", mutates_args=())
def chain(x: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    """Apply a chain, given as text, to rows: (tokens, d_in) -> (tokens, d_out)."""
    refuse_forward_mode()
    return from_text(structure)._rows(factors, x, _TORCH).contiguous()  # contiguous, as register_fake declares


@chain.register_fake
def _(x: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    found = from_text(structure)
    if x.ndim != 2 or x.shape[1] != found.d_in:
        raise ValueError(f"structlin::chain takes x of shape (tokens, {found.d_in}), got {tuple(x.shape)}")
    found.check(factors)
    return x.new_empty((x.shape[0], found.d_out))


@torch.library.custom_op("structlin::chain_backward", mutates_args=())
def chain_backward(gy: Tensor, x: Tensor, factors: list[Tensor], structure: str, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of those of x and the factors for which ``needs`` (x first, then each factor) is True."""
    refuse_forward_mode()
    found = from_text(structure)
    return [g.contiguous() for g in torch_chain(found).backward(gy, x, factors, needs)]


@chain_backward.register_fake
def _(gy: Tensor, x: Tensor, factors: list[Tensor], structure: str, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, *factors), needs, strict=True) if need]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    shield(chain, _backward, _keep_inputs)
    x, factors, ctx.structure = inputs
    ctx.save_for_backward(x, *factors)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, *factors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if is_batched(gy) or transforming():  # the operator does not take tangents
        found = iter(chain_gradients(from_text(ctx.structure), gy, x, factors, needs))
    else:
        found = iter(torch.ops.structlin.chain_backward(gy, x, factors, ctx.structure, needs))
    gx, *grads = [next(found) if need else None for need in needs]
    return gx, grads, None


chain.register_autograd(_backward, setup_context=_keep_inputs)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gy, x, factors, ctx.structure, ctx.needs = inputs
    ctx.save_for_backward(gy, x, *factors)


def _double_backward(ctx: Any, outer: list[Tensor]) -> tuple[Any, ...]:
    structure, needs = from_text(ctx.structure), ctx.needs

    def call(gy: Tensor, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return chain_gradients(structure, gy, x, factors, needs)

    pulled: Any = torch.func.vjp(call, *ctx.saved_tensors)
    gy, x, *factors = pulled[1](tuple(outer))
    return gy, x, factors, None, None


chain_backward.register_autograd(_double_backward, setup_context=_keep_all)


def _item(x: Tensor, dim: int | None, number: int) -> Tensor:
    return x if dim is None else x.select(dim, number)


@chain.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, factors: list[Tensor], structure: str) -> tuple[Tensor, int]:
    x_dim, factor_dims, _ = in_dims
    if all(dim is None for dim in factor_dims):  # the batch becomes part of the tokens
        x = x.movedim(x_dim, 0)
        y = chain(x.reshape(-1, x.shape[-1]), factors, structure)
        return y.reshape(*x.shape[:2], y.shape[-1]), 0
    each = (
        chain(_item(x, x_dim, i), [_item(f, d, i) for f, d in zip(factors, factor_dims, strict=True)], structure)
        for i in range(info.batch_size)
    )
    return torch.stack(list(each)), 0


@chain_backward.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], gy: Tensor, x: Tensor, factors: list[Tensor], structure: str,
    needs: list[bool],
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    gy_dim, x_dim, factor_dims, *_ = in_dims
    each = [
        chain_backward(
            _item(gy, gy_dim, i), _item(x, x_dim, i),
            [_item(f, d, i) for f, d in zip(factors, factor_dims, strict=True)], structure, needs,
        )
        for i in range(info.batch_size)
    ]  # fmt: skip
    found = [torch.stack(grads) for grads in zip(*each, strict=True)]
    return found, [0] * len(found)


@register_flop_formula(torch.ops.structlin.chain)
def _(x_shape: Sequence[int], factor_shapes: Sequence[Any], structure: str, *_: Any, **__: Any) -> int:
    """Return 2 * MACs."""
    return 2 * x_shape[0] * from_text(structure).macs


@register_flop_formula(torch.ops.structlin.chain_backward)
def _(
    gy_shape: Sequence[int], x_shape: Sequence[int], factor_shapes: Sequence[Any], structure: str,
    needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of the backward pass, including those of the forward pass that it repeats."""
    return 2 * x_shape[0] * gradient_macs(from_text(structure), needs)
