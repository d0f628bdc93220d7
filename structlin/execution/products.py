"""A chain as one batched product for each step, with permutations that are computed once.

The tokens (vectors) are a further carried axis ``*``. Between the steps the tokens are innermost, so copies move
contiguous runs of tokens: ``(batch, free, contracted) @ (batch, contracted, carried * tokens)``. For row-major input
the first step reads rows and the last one writes them, as transposed operands of their products. In chains without
batch axes every step reads and writes rows, ``(tokens * carried, contracted) @ (contracted, free)``. With one column,
each step takes the one of the two forms for which the activation is already in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from structlin._arrays import Array
from structlin._parse import Step
from structlin.structure import Structure

_TOKENS = "*"


@dataclass(frozen=True)
class Permute:
    """Split the incoming array into ``view`` (tokens at ``token_at``) and permute it by ``order``."""

    view: tuple[int, ...]
    token_at: int
    order: tuple[int, ...]

    def __call__(self, x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        """Arrange the activation for its product."""
        x = x.reshape((*self.view[: self.token_at], tokens, *self.view[self.token_at + 1 :]))
        return x if self.order == tuple(range(len(self.order))) else xp.permute(x, self.order)


@dataclass(frozen=True)
class Product:
    """One batched product, after ``arrange`` has put the activation into (batch, contracted, rest) order."""

    arrange: Permute
    rows_in: bool  # arranged as (batch, rest, contracted), not (batch, contracted, rest)
    rows_out: bool  # gives (batch, rest, free), not (batch, free, rest)
    factor_order: tuple[int, ...] | None  # None: already (batch, free, contracted)
    blocks: int
    fan_in: int
    fan_out: int
    carried: int

    def __call__(self, factor: Array, x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        """Multiply by a factor."""
        count, lead = self.carried * tokens, () if self.blocks == 1 else (self.blocks,)
        if self.factor_order is not None:
            factor = xp.permute(factor, self.factor_order)
        weight = factor.reshape((*lead, self.fan_out, self.fan_in))
        x = self.arrange(x, tokens, xp)
        if self.rows_in:
            return x.reshape((*lead, count, self.fan_in)) @ weight.swapaxes(-1, -2)
        x = x.reshape((*lead, self.fan_in, count))
        return x.swapaxes(-1, -2) @ weight.swapaxes(-1, -2) if self.rows_out else weight @ x


@dataclass(frozen=True)
class Plan:
    """Executable form of a chain for rows (tokens first) or columns (tokens last)."""

    steps: tuple[Product | Permute, ...]

    def __call__(self, factors: Sequence[Array], x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        """Run on ``x``, which holds the (padded) input axes and ``tokens`` in the plan's order.

        Returns the output with its axes split, tokens first (rows) or last (columns).
        """
        number = 0
        for step in self.steps:
            if isinstance(step, Product):
                x = step(factors[number], x, tokens, xp)
                number += 1
            else:
                x = step(x, tokens, xp)
        return x


def make_plan(steps: Sequence[Step], sizes: Mapping[str, int], rows: bool, one: bool = False) -> Plan:
    """Compute the permutations for row-major (``rows``) or column-major activations, or for ``one`` column."""

    def size(axes: str) -> int:
        return math.prod(sizes[a] for a in axes)

    def permute(source: str, target: str) -> Permute:
        view = tuple(0 if a == _TOKENS else sizes[a] for a in source)
        return Permute(view, source.index(_TOKENS), tuple(source.index(a) for a in target))

    def written(axes: str) -> str:
        return _TOKENS + axes if rows or one else axes + _TOKENS

    no_batch = not any(step.batch for step in steps)
    labels = written(steps[0].input)
    plan: list[Product | Permute] = []
    for number, step in enumerate(steps):
        if number and step.input != steps[number - 1].output:
            plan.append(permute(labels, written(steps[number - 1].output)))
            labels = written(step.input)
        batch, carried = ("".join(a for a in labels if a in role) for role in (step.batch, step.carried))
        rows_in = labels == _TOKENS + batch + carried + step.contracted if one else rows and no_batch
        rows_out = rows_in or (rows and number == len(steps) - 1)
        first, rest = (_TOKENS, carried) if one else ("", _TOKENS + carried if rows_in else carried + _TOKENS)
        target = first + batch + (rest + step.contracted if rows_in else step.contracted + rest)
        factor_target = batch + step.free + step.contracted
        plan.append(
            Product(
                arrange=permute(labels, target),
                rows_in=rows_in,
                rows_out=rows_out,
                factor_order=None
                if factor_target == step.factor
                else tuple(step.factor.index(a) for a in factor_target),
                blocks=size(batch),
                fan_in=size(step.contracted),
                fan_out=size(step.free),
                carried=size(carried),
            )
        )
        labels = first + batch + (rest + step.free if rows_out else step.free + rest)
    plan.append(permute(labels, written(steps[-1].output)))
    return Plan(tuple(plan))


def plan_of(structure: Structure, rows: bool = True, one: bool = False) -> Plan:
    """Return the plan of a structure, which is computed once."""
    key = "products", rows, one
    found = structure._kept.get(key)
    if found is None:
        found = structure._kept[key] = make_plan(structure.steps, dict(structure.sizes), rows, one)
    return found


def products(structure: Structure, factors: Sequence[Array], x: Array, xp: SimpleNamespace, rows: bool = True) -> Array:
    """Return the product by single operations of the array library, on any device, differentiable and batchable.

    ``x`` has shape (tokens, d_in) if ``rows``, otherwise (d_in, tokens); the result has d_out in place of d_in.
    """
    pad_in, pad_out = structure.padding
    tokens = x.shape[0 if rows else 1]
    if pad_in:
        x = xp.pad_last(x, pad_in) if rows else xp.pad_first(x, pad_in)
    full = structure.d_out + pad_out
    plan = plan_of(structure, rows, one=not rows and tokens == 1)
    y = plan(factors, x, tokens, xp).reshape((tokens, full) if rows else (full, tokens))
    if not pad_out:
        return y
    return y[:, : structure.d_out] if rows else y[: structure.d_out]
