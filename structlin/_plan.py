"""How a chain is executed: one batched product for each step, permutations worked out once.

Two forms of a batched product, with the tokens (vectors) as one more carried axis ``*``:

- feature-major, ``(batch, free, contracted) @ (batch, contracted, carried * tokens)``: tokens innermost, so that
  what is copied between steps moves in whole runs of tokens;
- token-major, ``(batch, tokens * carried, contracted) @ (batch, contracted, free)``.

Column-major input stays feature-major throughout. Row-major input is token-major where no step has a batch axis;
otherwise only the last step is, which then writes rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from structlin._arrays import Array
from structlin._parse import Step

_TOKENS = "*"


@dataclass(frozen=True)
class _Permute:
    """Split the incoming array into ``view`` (tokens at ``token_at``) and permute it by ``order``."""

    view: tuple[int, ...]
    token_at: int
    order: tuple[int, ...]

    def __call__(self, x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        x = x.reshape((*self.view[: self.token_at], tokens, *self.view[self.token_at + 1 :]))
        return x if self.order == tuple(range(len(self.order))) else xp.permute(x, self.order)


@dataclass(frozen=True)
class _Product:
    """One batched product, after ``arrange`` has put the activation into (batch, contracted, rest) order."""

    arrange: _Permute
    token_major: bool
    factor_order: tuple[int, ...] | None  # None: already (batch, free, contracted)
    blocks: int
    fan_in: int
    fan_out: int
    carried: int

    def __call__(self, factor: Array, x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        count, lead = self.carried * tokens, () if self.blocks == 1 else (self.blocks,)
        if self.factor_order is not None:
            factor = xp.permute(factor, self.factor_order)
        weight = factor.reshape((*lead, self.fan_out, self.fan_in))
        x = self.arrange(x, tokens, xp)
        if self.token_major:
            return x.reshape((*lead, count, self.fan_in)) @ weight.swapaxes(-1, -2)
        return weight @ x.reshape((*lead, self.fan_in, count))


@dataclass(frozen=True)
class Plan:
    """Executable form of a chain for rows (tokens first) or columns (tokens last)."""

    steps: tuple[_Product | _Permute, ...]

    def __call__(self, factors: Sequence[Array], x: Array, tokens: int, xp: SimpleNamespace) -> Array:
        """Run on ``x``, which holds the (padded) input axes and ``tokens`` in the plan's order.

        Returns the output with its axes split, tokens first (rows) or last (columns).
        """
        number = 0
        for step in self.steps:
            if isinstance(step, _Product):
                x = step(factors[number], x, tokens, xp)
                number += 1
            else:
                x = step(x, tokens, xp)
        return x


def make_plan(steps: Sequence[Step], sizes: Mapping[str, int], rows: bool) -> Plan:
    """Work out the permutations for row-major (``rows``) or column-major activations."""

    def size(axes: str) -> int:
        return math.prod(sizes[a] for a in axes)

    def permute(source: str, target: str) -> _Permute:
        view = tuple(0 if a == _TOKENS else sizes[a] for a in source)
        return _Permute(view, source.index(_TOKENS), tuple(source.index(a) for a in target))

    def written(axes: str) -> str:
        return _TOKENS + axes if rows else axes + _TOKENS

    no_batch = not any(step.batch for step in steps)
    labels = written(steps[0].input)
    plan: list[_Product | _Permute] = []
    for number, step in enumerate(steps):
        if number and step.input != steps[number - 1].output:
            plan.append(permute(labels, written(steps[number - 1].output)))
            labels = written(step.input)
        batch, carried = ("".join(a for a in labels if a in role) for role in (step.batch, step.carried))
        token_major = rows and (no_batch or number == len(steps) - 1)
        rest = _TOKENS + carried if token_major else carried + _TOKENS
        target = batch + rest + step.contracted if token_major else batch + step.contracted + rest
        factor_target = batch + step.free + step.contracted
        plan.append(
            _Product(
                arrange=permute(labels, target),
                token_major=token_major,
                factor_order=None
                if factor_target == step.factor
                else tuple(step.factor.index(a) for a in factor_target),
                blocks=size(batch),
                fan_in=size(step.contracted),
                fan_out=size(step.free),
                carried=size(carried),
            )
        )
        labels = batch + rest + step.free if token_major else batch + step.free + rest
    plan.append(permute(labels, written(steps[-1].output)))
    return Plan(tuple(plan))
