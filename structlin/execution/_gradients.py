"""Gradients of a chain by single products of torch, over all tokens at once.

They are written in plain operations of torch. So they can be differentiated any number of times, batched, traced and
compiled, and they propagate tangents. They run if the memory of an operand cannot be read by address, or if a mode
intercepts the single products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from structlin._arrays import ops
from structlin.execution.products import Permute, Product, plan_of, products
from structlin.structure import Structure

__all__ = ["SingleProducts", "chain_gradients", "gradient_macs"]

_TORCH = ops("torch")


def chain_gradients(
    structure: Structure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], rows: bool = True
) -> tuple[Tensor, ...]:
    """Return the gradients of ``x`` and of the factors if ``needs`` (x first) is True, from the gradient ``gy`` of y.

    ``x`` has shape (tokens, d_in) and ``gy`` (tokens, d_out) if ``rows``, otherwise (d_in, tokens) and (d_out, tokens).
    The products are those of torch's derivatives of the single products.
    """
    for_x, *for_factors = needs
    tokens, (pad_in, pad_out) = x.shape[0 if rows else 1], structure.padding
    pad, size = (_TORCH.pad_last if rows else _TORCH.pad_first), x.shape
    *steps, last = plan_of(structure, rows).steps
    wanted = [k for k, need in enumerate(for_factors) if need]
    highest, lowest = (wanted[-1] if wanted else 0), (-1 if for_x else wanted[0])

    # Forward, as far as an input of a product is needed. A regrouping of the vector is a step without a factor.
    state, number = pad(x, pad_in) if pad_in else x, 0
    inputs: list[Tensor] = []
    for step in steps:
        if number > highest:
            break
        if isinstance(step, Permute):
            state = step(state, tokens, _TORCH)
            continue
        inputs.append(_arranged(step, state, tokens))
        if number < highest:
            state = step(factors[number], state, tokens, _TORCH)
        number += 1

    grads: list[Tensor] = []
    assert isinstance(last, Permute)
    g, number = _back(last, pad(gy, pad_out) if pad_out else gy, tokens), len(factors)
    for step in reversed(steps):
        if number == lowest:
            break
        if isinstance(step, Permute):
            g = _back(step, g, tokens)
            continue
        number -= 1
        lead, count = () if step.blocks == 1 else (step.blocks,), step.carried * tokens
        rows_out = step.rows_in or step.rows_out
        g = g.reshape((*lead, count, step.fan_out) if rows_out else (*lead, step.fan_out, count))
        upright = g.mT if rows_out else g  # (free, carried * tokens)
        if for_factors[number]:
            held = inputs[number]
            gradient = upright @ (held if step.rows_in else held.mT).conj()
            grads.append(_unarranged(step, gradient, structure.factors[number].shape))
        if number > lowest:
            weight = _weight(step, factors[number], lead).conj()
            g = upright.mT @ weight if step.rows_in else weight.mT @ upright
            g = _back(step.arrange, g, tokens)
    if for_x:
        ends = (tokens, size[1] + pad_in) if rows else (size[0] + pad_in, tokens)
        g = g.reshape(ends)
        grads.append(g if not pad_in else g[:, : size[1]] if rows else g[: size[0]])
    return tuple(reversed(grads))


class SingleProducts:
    """The passes of a chain by single products, for any tensors. They keep nothing and read no addresses."""

    def __init__(self, structure: Structure, rows: bool) -> None:
        self.structure, self.rows = structure, rows

    def forward(
        self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Return the product plus ``bias``."""
        y = products(self.structure, factors, x, _TORCH, self.rows)
        return y if bias is None else y + (bias if self.rows else bias[:, None])

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], kept: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Return gradients of x, the factors and the bias, each None if its entry of ``needs`` is False."""
        *before, for_bias = needs
        found = iter(chain_gradients(self.structure, gy, x, factors, before, self.rows) if any(before) else ())
        gradients = [next(found) if need else None for need in before]
        return *gradients, gy.sum(0 if self.rows else 1) if for_bias else None


def _arranged(step: Product, x: Tensor, tokens: int) -> Tensor:
    """Return the input as (batch, carried * tokens, contracted) if ``rows_in``, or the last two exchanged."""
    lead, count = () if step.blocks == 1 else (step.blocks,), step.carried * tokens
    x = step.arrange(x, tokens, _TORCH)
    return x.reshape((*lead, count, step.fan_in) if step.rows_in else (*lead, step.fan_in, count))


def _weight(step: Product, factor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return a factor as (batch, free, contracted)."""
    order = step.factor_order
    return (factor if order is None else factor.permute(order)).reshape((*lead, step.fan_out, step.fan_in))


def _unarranged(step: Product, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an array (batch, free, contracted) with the axes of the factor."""
    order = step.factor_order
    if order is None:
        return gradient.reshape(shape)
    inverse = [order.index(axis) for axis in range(len(order))]
    return gradient.reshape([shape[axis] for axis in order]).permute(inverse)


def _back(permute: Permute, g: Tensor, tokens: int) -> Tensor:
    """Return an array with the axes of the output of a permutation, merged in any way, with those of its input."""
    order, at = permute.order, permute.token_at
    view = (*permute.view[:at], tokens, *permute.view[at + 1 :])
    inverse = [order.index(axis) for axis in range(len(order))]
    return g.reshape([view[axis] for axis in order]).permute(inverse)


def gradient_macs(structure: Structure, needs: Sequence[bool]) -> int:
    """Return the MACs of :func:`chain_gradients` for one vector, including the recomputed intermediates."""
    macs = [math.prod(f.shape) * f.carried for f in structure.factors]
    wanted = [k for k, need in enumerate(needs[1:]) if need]
    again = sum(macs[: max(wanted, default=0)])
    passed = sum(macs[0 if needs[0] else min(wanted) + 1 :])
    return again + sum(macs[k] for k in wanted) + passed
