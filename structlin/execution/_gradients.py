"""Gradients of a chain as einsums over all tokens at once.

Plain torch, so that they can be differentiated and batched in turn. This is what the gradients of the operator
``structlin::chain`` are where the contraction has no backward pass of its own (:mod:`structlin.execution.torch_cpu`).
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin.structure import Structure

__all__ = ["chain_gradients", "gradient_macs"]

_TOKENS = "*"


class _Step(NamedTuple):
    forward: str  # einsum(input, factor)
    factor: str  # einsum(gradient of the output, input): gradient of the factor
    input: str  # einsum(gradient of the output, factor): gradient of the input
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]


@lru_cache(maxsize=4096)
def _steps(structure: Structure) -> tuple[_Step, ...]:
    sizes, steps = dict(structure.sizes), []
    for step in structure.steps:
        # torch.einsum knows only the letters a to z and A to Z.
        axes = dict.fromkeys(_TOKENS + step.input + step.factor)
        letters = dict(zip(axes, string.ascii_letters, strict=False))
        if len(letters) < len(axes):
            raise ValueError(f"a step of {len(axes)} axes, {str(step)!r}, is more than torch.einsum takes")
        x, w, y = ("".join(letters[a] for a in t) for t in (_TOKENS + step.input, step.factor, _TOKENS + step.output))
        dims = (tuple(sizes[a] for a in t) for t in (step.input, step.output))
        steps.append(_Step(f"{x},{w}->{y}", f"{y},{x}->{w}", f"{y},{w}->{x}", *dims))
    return tuple(steps)


def chain_gradients(
    structure: Structure, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of ``x`` (tokens, d_in) and of the factors where ``needs`` (x first) is True, from ``gy`` of y."""
    steps, tokens, (pad_in, pad_out) = _steps(structure), x.shape[0], structure.padding
    highest = max((k for k, need in enumerate(needs[1:]) if need), default=0)
    lowest = 0 if needs[0] else min(k for k, need in enumerate(needs[1:]) if need)
    states = [F.pad(x, (0, pad_in)) if pad_in else x]
    for step, factor in zip(steps[:highest], factors, strict=False):
        states.append(torch.einsum(step.forward, states[-1].reshape(tokens, *step.in_dims), factor))
    grads: list[Tensor] = []
    g = F.pad(gy, (0, pad_out)) if pad_out else gy
    for k in range(len(steps) - 1, lowest - 1, -1):
        step = steps[k]
        g = g.reshape(tokens, *step.out_dims)
        if needs[k + 1]:
            grads.append(torch.einsum(step.factor, g, states[k].reshape(tokens, *step.in_dims).conj()))
        if k > lowest or needs[0]:
            g = torch.einsum(step.input, g, factors[k].conj())
    if needs[0]:
        grads.append(g.reshape(tokens, -1)[:, : structure.d_in] if tokens else torch.zeros_like(x))
    return tuple(reversed(grads))


def gradient_macs(structure: Structure, needs: Sequence[bool]) -> int:
    """MACs for one vector of :func:`chain_gradients`, with the intermediates that it computes again."""
    macs = [math.prod(f.shape) * f.carried for f in structure.factors]
    wanted = [k for k, need in enumerate(needs[1:]) if need]
    again = sum(macs[: max(wanted, default=0)])
    passed = sum(macs[0 if needs[0] else min(wanted) + 1 :])
    return again + sum(macs[k] for k in wanted) + passed
