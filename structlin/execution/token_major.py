"""The contraction of a chain token by token, with as few calls of torch as possible.

For few tokens the time of a layer is that of its calls. Each step is one batched product with the tokens as the first
axis, reshapes are computed in advance, and the last product adds the bias. The activations are copied between the
steps, so other ways are faster for many tokens. The operations are those of torch, so they can be differentiated any
number of times and used in every transformation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, baddbmm, bmm
from torch.nn import functional as F

from structlin.execution._kept import kept
from structlin.structure import Structure

__all__ = ["TokenMajor", "token_major"]

NODE_TOKENS, NODE_NUMBERS = 512, 1 << 18
_TOKENS = "*"  # no axis of a chain
_EXACT = (torch.float32, torch.float64)  # half precision would lose digits of products before they are added

Sizes = tuple[int, ...]
Arrangement = tuple[Sizes | None, Sizes | None, Sizes | None]  # view, permutation, reshape; None: nothing to do


def _arrange(source: Sequence[str], target: Sequence[str], sizes: Mapping[str, int]) -> Arrangement:
    """Return the view, permutation and reshape from one array to another, whose axes merge labelled axes."""

    def dims(groups: Sequence[str]) -> Sizes:
        return tuple(-1 if _TOKENS in g else math.prod(sizes[a] for a in g) for g in groups)

    source, target = list(source), list(target)
    before, after = "".join(source), "".join(target)
    if source == target:
        return None, None, None
    if before == after:
        return None, None, dims(target)
    runs = [after[0]]  # of axes that stay together
    for left, right in pairwise(after):
        if left + right in before:
            runs[-1] += right
        else:
            runs.append(right)
    split = sorted(runs, key=before.index)
    order = tuple(split.index(run) for run in runs)
    return None if split == source else dims(split), order, None if runs == target else dims(target)


class TokenMajor:
    """A chain for inputs of shape (tokens, d_in) with at least one token."""

    def __init__(self, structure: Structure) -> None:
        sizes = dict(structure.sizes)
        self.structure = structure
        self.pad, self.cut = structure.padding
        # For each product (batch, tokens * carried, contracted) @ (batch, contracted, free): whether there are blocks,
        # and how to arrange the activation and the factor. Where a vector is regrouped there is a step without factor.
        self.steps: list[tuple[bool | None, Arrangement, Arrangement]] = []
        labels, written = [_TOKENS, structure.steps[0].input], structure.steps[0].input
        nothing: Arrangement = (None, None, None)
        batch = ""
        for step in structure.steps:
            if step.input != written:  # read in the order in which it is written
                self.steps.append((None, _arrange(labels, [_TOKENS, written], sizes), nothing))
                labels = [_TOKENS, step.input]
            flat = "".join(labels)
            batch, carried = ("".join(a for a in flat if a in role) for role in (step.batch, step.carried))
            lead = [batch] if batch else []
            left = _arrange(labels, [*lead, _TOKENS + carried, step.contracted], sizes)
            right = _arrange(list(step.factor), [*lead, step.free, step.contracted], sizes)
            self.steps.append((bool(batch), left, right))
            labels, written = [*lead, _TOKENS + carried, step.free], step.output
        self.last = self.steps.pop()
        self.out = _arrange(labels, [_TOKENS, written], sizes)
        # The last product adds the bias, unless an entry of the bias belongs to several positions.
        last = structure.steps[-1]
        self.fuses_bias = not last.carried and not self.cut
        self.bias = nothing
        if self.fuses_bias:
            self.bias = _arrange([last.output], [batch, "", last.free] if batch else [last.free], sizes)
        widths = [math.prod(sizes[a] for a in axes) for s in structure.steps for axes in (s.input, s.output)]
        # Chains without blocks and wide intermediates are as fast by single products.
        worthwhile = any(s.batch for s in structure.steps) or max(widths) > max(widths[0], widths[-1])
        self.least_node_tokens = max(NODE_TOKENS, NODE_NUMBERS // max(widths)) if worthwhile else None

    def __reduce__(self) -> tuple[object, ...]:
        return token_major, (self.structure,)

    def is_single(self, x: Tensor) -> bool:
        """Whether a compiled graph for the CPU should run ``x`` by :meth:`single`."""
        return x.is_cpu and x.shape[0] == 1 and x.dtype in _EXACT and not torch.compiler.is_exporting()

    def pays_as_node(self, x: Tensor) -> bool:
        """Whether a compiled graph for the CPU should run the contraction of ``x`` as the one node structlin::chain.

        For a dynamic number of tokens two graphs are made, for few and for many.
        """
        if self.least_node_tokens is None or not x.is_cpu or torch.compiler.is_exporting():
            return False
        return x.shape[0] >= self.least_node_tokens

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the product, (tokens, d_in) -> (tokens, d_out); the factors, the bias and x have one dtype."""
        if self.pad:
            x = F.pad(x, (0, self.pad))
        number = 0
        for blocks, left, right in self.steps:
            x = _arranged(x, left)
            if blocks is None:
                continue
            factor = _arranged(factors[number], right)
            x = bmm(x, factor.mT) if blocks else F.linear(x, factor)
            number += 1
        blocks, left, right = self.last
        x, factor = _arranged(x, left), _arranged(factors[number], right)
        if bias is None or not self.fuses_bias:
            x = bmm(x, factor.mT) if blocks else F.linear(x, factor)
        elif blocks:
            x = baddbmm(_arranged(bias, self.bias), x, factor.mT)
        else:
            x = F.linear(x, factor, _arranged(bias, self.bias))
        x = _arranged(x, self.out)
        if self.cut:
            x = x[:, : -self.cut]
        return x if bias is None or self.fuses_bias else x + bias

    def single(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the same for a single token, for a compiler that fuses products with the operations between them.

        A compiler would compute the index of each number of a permuted activation, which takes longer than all
        products. So the sums of a product are written in the order of the next one.
        """
        if self.pad:
            x = F.pad(x, (0, self.pad))
        number, arranged = 0, False
        steps = (*self.steps, self.last)
        for k, (blocks, left, right) in enumerate(steps):
            x, arranged = x if arranged else _arranged(x, left), False
            if blocks is None:
                continue
            factor = _arranged(factors[number], right)
            number += 1
            after = steps[k + 1][1] if k + 1 < len(steps) else self.out
            if blocks and after[1] is not None:
                x, arranged = _summed(x.unsqueeze(2) * factor.unsqueeze(1), after), True
            else:
                x = bmm(x, factor.mT) if blocks else F.linear(x, factor)
        x = x if arranged else _arranged(x, self.out)
        if self.cut:
            x = x[:, : -self.cut]
        return x if bias is None else x + bias


def _arranged(x: Tensor, how: Arrangement) -> Tensor:
    view, order, shape = how
    if view is not None:
        x = x.reshape(*view)  # torch reads separate integers faster than a tuple
    if order is not None:
        x = x.permute(*order)
    return x if shape is None else x.reshape(*shape)


def _summed(products: Tensor, how: Arrangement) -> Tensor:
    """Return the sums over the last axis, arranged by :func:`_arranged`."""
    view, order, shape = how
    assert order is not None
    if view is not None:
        products = products.reshape(*view, products.shape[-1])
    sums = products.permute(*order, products.ndim - 1).sum(-1)
    return sums if shape is None else sums.reshape(*shape)


def token_major(structure: Structure) -> TokenMajor:
    """Return the plan of a structure; made once."""
    return kept(structure, ("token_major",), lambda: TokenMajor(structure))
