"""The operator ``structlin::chain`` of torch: the contraction of a structure as one node of a graph.

It keeps its input alone for the backward pass and computes the intermediates again. In a compiled or exported graph
it is one node that runs the contraction of :mod:`structlin`; the structure stands in it as text
(:mod:`structlin_nn.torch._text`), so that the graph can be saved and run where this module is imported.

torch's operators of Python know no forward-mode derivatives, and no transformations by ``torch.func.grad``;
:func:`transformed` says when the same products must be called one by one instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structlin._arrays import ops
from structlin.structure import AbstractStructure, Structure
from structlin_nn.torch._text import from_text
from structlin_nn.torch._gradients import chain_gradients, gradient_macs

__all__ = ["chain", "chain_backward", "transformed"]

_TORCH = ops("torch")


def transformed() -> bool:
    """Whether a transformation is active that the operators do not take part in: torch.func, forward mode."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _refuse_forward_mode() -> None:
    if torch.autograd.forward_ad._current_level >= 0:  # torch would take the derivative to be zero
        raise NotImplementedError("structlin::chain has no forward-mode derivative; call structure.apply instead")


@torch.library.custom_op("structlin::chain", mutates_args=())
def chain(x: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    """``(tokens, d_in) -> (tokens, d_out)`` for a structure that is given by its description."""
    _refuse_forward_mode()
    y = from_text(structure)._rows(factors, x, _TORCH)
    return y.contiguous()  # as register_fake promises


@chain.register_fake
def _(x: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    found = from_text(structure)
    if x.ndim != 2 or x.shape[1] != found.d_in:
        raise ValueError(f"structlin::chain takes x of shape (tokens, {found.d_in}), got {tuple(x.shape)}")
    found.check(factors)
    return x.new_empty((x.shape[0], found.d_out))


@torch.library.custom_op("structlin::chain_backward", mutates_args=())
def chain_backward(gy: Tensor, x: Tensor, factors: list[Tensor], structure: str, needs: list[bool]) -> list[Tensor]:
    """Gradients of x and of the factors where ``needs`` (x first, then each factor) is True."""
    _refuse_forward_mode()
    found = from_text(structure)
    if isinstance(found, Structure):
        chunked = found._chunked
        # The contraction's own backward pass; it computes all intermediates, which only the last factor needs.
        if needs[-1] and chunked.suits(x, factors):
            return _chunked_gradients(chunked, gy, x, factors, needs)
    return [g.contiguous() for g in _gradients(found, gy, x, factors, needs)]


@chain_backward.register_fake
def _(gy: Tensor, x: Tensor, factors: list[Tensor], structure: str, needs: list[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, *factors), needs, strict=True) if need]


def _chunked_gradients(
    chunked: Any, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    weights = [p.weight(f) for p, f in zip(chunked.products, factors, strict=True)]
    gx, *grads = chunked.backward(gy, x, weights, needs)
    found = [] if gx is None else [gx]
    for product, factor, grad in zip(chunked.products, factors, grads, strict=True):
        if grad is not None:  # back to the factor's order of axes
            ordered = grad.reshape([factor.shape[a] for a in product.factor_order])
            inverse = [product.factor_order.index(a) for a in range(factor.ndim)]
            found.append(ordered.permute(inverse).contiguous())
    return found


def _gradients(
    structure: AbstractStructure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients by operations of torch that can be differentiated in turn."""
    if isinstance(structure, Structure):
        return chain_gradients(structure, gy, x, factors, needs)
    given = (x, *factors)

    def call(*wanted: Tensor) -> Tensor:
        rest = iter(wanted)
        x, *factors = [next(rest) if need else t for t, need in zip(given, needs, strict=True)]
        return structure._rows(factors, x, _TORCH)

    _, pull = torch.func.vjp(call, *(t for t, need in zip(given, needs, strict=True) if need))
    return tuple(pull(gy))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, factors, ctx.structure = inputs
    ctx.save_for_backward(x, *factors)


def _backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, *factors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(torch.ops.structlin.chain_backward(gy, x, factors, ctx.structure, needs))
    gx, *grads = [next(found) if need else None for need in needs]
    return gx, grads, None


chain.register_autograd(_backward, setup_context=_keep_inputs)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gy, x, factors, ctx.structure, ctx.needs = inputs
    ctx.save_for_backward(gy, x, *factors)


def _double_backward(ctx: Any, outer: list[Tensor]) -> tuple[Any, ...]:
    gy, x, *factors = ctx.saved_tensors
    structure, needs = from_text(ctx.structure), ctx.needs
    floating = [t.is_floating_point() or t.is_complex() for t in factors]

    def call(gy: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = iter(weights)
        full = [next(given) if f else t for t, f in zip(factors, floating, strict=True)]
        return _gradients(structure, gy, x, full, needs)

    _, pull = torch.func.vjp(call, gy, x, *(t for t, f in zip(factors, floating, strict=True) if f))
    ggy, gx, *grads = pull(tuple(outer))
    given = iter(grads)
    return ggy, gx, [next(given) if f else None for f in floating], None, None


chain_backward.register_autograd(_double_backward, setup_context=_keep_all)


def _plain(x: Tensor, factors: Sequence[Tensor], structure: str) -> Tensor:
    return from_text(structure)._rows(factors, x, _TORCH)


@chain.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, factors: list[Tensor], structure: str) -> tuple[Tensor, int]:
    x_dim, factor_dims, _ = in_dims
    if all(d is None for d in factor_dims):  # the batch is more tokens
        x = x.movedim(x_dim, 0)
        y = chain(x.reshape(-1, x.shape[-1]), factors, structure)
        return y.reshape(*x.shape[:2], y.shape[-1]), 0
    y = torch.func.vmap(_plain, (x_dim, list(factor_dims), None), randomness=info.randomness)(x, factors, structure)
    return y, 0


@chain_backward.register_vmap
def _(
    info: Any, in_dims: tuple[Any, ...], gy: Tensor, x: Tensor, factors: list[Tensor], structure: str,
    needs: list[bool],
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    def call(gy: Tensor, x: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
        return _gradients(from_text(structure), gy, x, factors, needs)

    found = torch.func.vmap(call, (in_dims[0], in_dims[1], list(in_dims[2])))(gy, x, factors)
    return list(found), [0] * len(found)


@register_flop_formula(torch.ops.structlin.chain)
def _(x_shape: Sequence[int], factor_shapes: Sequence[Any], structure: str, *_: Any, **__: Any) -> int:
    """2 * MACs of the products; FFTs count nothing, as everywhere in torch's counter."""
    return 2 * x_shape[0] * from_text(structure).macs


@register_flop_formula(torch.ops.structlin.chain_backward)
def _(
    gy_shape: Sequence[int], x_shape: Sequence[int], factor_shapes: Sequence[Any], structure: str,
    needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The products of the backward pass, and those of the forward pass that it repeats."""
    found = from_text(structure)
    return 2 * x_shape[0] * gradient_macs(found, needs) if isinstance(found, Structure) else 0
