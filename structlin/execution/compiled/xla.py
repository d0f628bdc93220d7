"""The compiled passes of a chain for jax on a CPU: custom calls of XLA, which allots their memory and its threads.

What a pass needs beside operands and results, copies of factors and room for a few tokens of each share, is one more
result of the call, so that XLA plans it with all other memory of a program and nothing is allocated while it runs.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from structlin.execution.compiled._program import Pass, Program
from structlin.execution.compiled._rules import COPIED_SHARE, ChainRules, copy_shares, cuts, shares
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import address, host
from structlin.execution.compiled._xla_runtime import add, fill, handler, supported

Array = Any
Place = tuple[int, int]  # an array, and bytes from its start
_SCRATCH = -1
_LOCK = threading.Lock()
_REGISTERED: dict[str, object] = {}  # with what compiled programs call, which may live as long as the process
_DTYPES = {"float": "float32", "double": "float64", "bfloat": "bfloat16"}


@cache
def threads() -> int:
    """How many XLA has at most."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class XLAChain(ChainRules):
    """The two passes, on arrays of jax. They are only to be lowered for a single CPU device."""

    def suits(self, dtype: str, tokens: int) -> bool:
        """Whether this way is the fastest: XLA multiplies large blocks as fast, but in bfloat16."""
        if dtype != "bfloat16" and (self.plain or self.large_blocks(threads())):
            return False
        return self.pays(tokens, False) and self.ready(dtype) is not None

    def ready(self, dtype: str) -> Program | None:
        """What runs the chain; None where it does not run this way."""
        target = host()
        return self.program(dtype) if target is not None and supported(target) else None

    def forward(self, x: Array, factors: Sequence[Array], bias: Array | None, kept: int) -> tuple[Array, ...]:
        """The product and the activations between the steps for the first ``kept`` tokens."""
        program, tokens = self._given(str(x.dtype)), x.shape[0 if self.rows else 1]
        operands = [x, *factors]
        if bias is not None:
            operands.append(
                jnp.pad(bias, (0, program.schedule.widths[-1] - self.d_out)).astype(_DTYPES[program.inside])
            )
        results = [
            jax.ShapeDtypeStruct((tokens, self.d_out) if self.rows else (self.d_out, tokens), x.dtype),
            *(jax.ShapeDtypeStruct((size,), x.dtype) for size in self.kept_sizes(str(x.dtype), kept)),
        ]
        slices = self.front(str(x.dtype), kept > 0)
        plan = _Plan(slices.program, tokens, len(operands), len(results))
        places = [(k, 0) for k in range(len(operands) + len(results))]
        inputs, outputs = places[: len(operands)], places[len(operands) :]
        item, apart = x.dtype.itemsize, self.apart(slices, tokens, x.dtype.itemsize)
        for number in range(slices.count):
            given = _moved(inputs[1 : 1 + len(factors)], number, [n * item for n in slices.factors])
            added = _moved(inputs[1 + len(factors) :], number, [slices.end * program.size])
            ends, before = [inputs[0], (outputs[0][0], number * apart)], plan.top
            table = [*added, *plan.packed("forward", range(len(factors)), given)]
            held = _moved(outputs[1:], number, [n * item for n in slices.states or ()])
            for part, more in ((range(kept), held), (range(kept, tokens), [])):
                if part:
                    plan.run(slices.program.forward(bias is not None, bool(more)), part, ends, table, more)
            plan.top = before
        return plan.call(f"{self._chain} forward {bias is not None} {kept}", operands, results)

    def backward(
        self, gy: Array, x: Array, factors: Sequence[Array], needs: tuple[bool, ...], kept: Sequence[Array]
    ) -> tuple[Array, ...]:
        """The gradients of x, the factors and the bias that ``needs`` asks for."""
        tokens = x.shape[0 if self.rows else 1]
        slices = self.back(str(x.dtype), shares(tokens, threads()))
        program, last = slices.program, len(factors)
        if needs[-1] and slices.count > 1:
            bias = jnp.sum(gy, 0 if self.rows else 1, dtype=_DTYPES[program.inside])
            return *self.backward(gy, x, factors, (*needs[:-1], False), kept), bias
        wanted = [k for k in range(last) if needs[k + 1]]
        lowest = 0 if needs[0] else min(wanted) + 1
        operands = [gy, x, *factors, *kept]
        results = [
            *([jax.ShapeDtypeStruct(x.shape, x.dtype)] if needs[0] else []),
            *(jax.ShapeDtypeStruct(self.shapes[k], x.dtype) for k in wanted),
            *([jax.ShapeDtypeStruct((self.d_out,), _DTYPES[program.inside])] if needs[-1] else []),
        ]
        plan = _Plan(program, tokens, len(operands), len(results))
        places = [(k, 0) for k in range(len(operands) + len(results))]
        inputs, outputs = places[: len(operands)], places[len(operands) :]
        sizes = [*(math.prod(program.shapes[k]) for k in wanted), *([self.d_out] if needs[-1] else [])]
        unpacked = program.packing("gradients", tuple(wanted)).sizes
        direct = [not size for size in unpacked] + [True] * needs[-1]
        cut = kept[0].size // program.kept_rows[1] if kept else 0
        again = range(max(wanted, default=0))
        item, apart = x.dtype.itemsize, self.apart(slices, tokens, x.dtype.itemsize)
        for number in range(slices.count):
            before = plan.top
            given = _moved(inputs[2 : 2 + last], number, [n * item for n in slices.factors])
            held = _moved(inputs[2 + last :], number, [n * item for n in slices.states or ()])
            gx = _moved(outputs[:1], number, [apart]) if needs[0] else []
            starts = [*(slices.factors[k] * item for k in wanted), *([0] if needs[-1] else [])]
            found = _moved(outputs[len(gx) :], number, starts)
            ends = [place if alone else None for place, alone in zip(found, direct, strict=True)]
            grads = plan.sums(sizes, ends)
            table = [*gx, *plan.packed("back", range(lowest, last), given[lowest:])]
            for part, more in ((range(cut), held), (range(cut, tokens), None)):
                if part:
                    activations = plan.packed("forward", again, given[: len(again)]) if more is None else more
                    run = program.backward(needs, more is not None, plan.count(part) > 1)
                    here = [*_moved(inputs[1:2], number, [apart]), inputs[0]]
                    plan.run(run, part, here, table, activations, grads)
            totals = plan.added(sizes, grads, ends)
            pairs = [(t, f) for t, f, alone in zip(totals, found, direct, strict=True) if not alone]
            plan.copy("gradients", wanted, [place for pair in pairs for place in pair])
            plan.top = before
        return plan.call(f"{self._chain} backward {needs} {cut}", operands, results)

    def keeps(self, dtype: str, tokens: int) -> int:
        """Of how many tokens to keep the activations between the steps for the backward pass."""
        return self.kept_tokens(dtype, tokens, shares(tokens, threads()))

    def kept_sizes(self, dtype: str, kept: int) -> list[int]:
        """Of these activations, one after the other."""
        return [kept * row for row in self._given(dtype).schedule.rows[1:-1]] if kept else []

    def _given(self, dtype: str) -> Program:
        program = self.ready(dtype)
        assert program is not None
        return program


def _moved(places: Sequence[Place], number: int, steps: Sequence[int]) -> list[Place]:
    """So many steps further, each place by its own; where there are no places there may be steps."""
    return [(array, at + number * step) for (array, at), step in zip(places, steps, strict=False)]


class _Plan:
    """The stages of a call; see :mod:`._xla_runtime`. Sizes of sums are in numbers, of which each has a share's own."""

    def __init__(self, program: Program, tokens: int, operands: int, results: int) -> None:
        self.program, self.target, self.tokens = program, program.target, tokens
        self.operands, self.results = operands, results
        self.top = self.bytes = 0
        self.stages: list[tuple[Callable[..., None], list[list[Place]], list[int], int]] = []

    def count(self, part: range) -> int:
        return shares(len(part), threads())

    def scratch(self, size: int) -> Place:
        place = (_SCRATCH, self.top)
        self.top += -(-size // LINE) * LINE
        self.bytes = max(self.bytes, self.top)
        return place

    def stage(self, run: Callable[..., None], tables: list[list[Place]], starts: Sequence[int], total: int = 0) -> None:
        """``run(tables[k], starts[k], starts[k + 1], total)`` for all k, at the same time."""
        self.stages.append((run, tables, list(starts), total))

    def spread(self, run: Callable[..., None], table: list[Place], size: int, least: int, unit: int) -> None:
        """One range for all shares, each of at least so many; cut at multiples of a unit."""
        count = max(1, min(threads(), size // least))
        self.stage(run, [table] * count, [size * k // count // unit * unit for k in range(count)] + [size])

    def packed(self, kind: str, numbers: Sequence[int], factors: Sequence[Place]) -> list[Place]:
        """Where these factors are as the products ``kind`` read them."""
        packing = self.program.packing(kind, tuple(numbers))
        places = [self.scratch(size) if size else factor for factor, size in zip(factors, packing.sizes, strict=True)]
        ends = zip(packing.sizes, zip(factors, places, strict=True), strict=True)
        self.copy(kind, numbers, [place for size, pair in ends if size for place in pair])
        return places

    def copy(self, kind: str, numbers: Sequence[int], table: list[Place]) -> None:
        if table:
            packing = self.program.packing(kind, tuple(numbers))
            count = copy_shares(packing.numbers, threads())
            self.stage(packing.run, [table] * count, range(count + 1), count)

    def run(
        self, run: Pass, part: range, ends: list[Place], table: list[Place], more: list[Place],
        grads: Sequence[list[Place]] | None = None,
    ) -> None:  # fmt: skip
        """A pass over a part of the tokens, in scratch memory that is free after it."""
        before, tables = self.top, []
        count = self.count(part)
        for k in range(count):
            tables.append([*ends, self.scratch(run.scratch), *table, *(grads[k] if grads else []), *more])
        self.stage(run.run, tables, cuts(part, run.block, count), self.tokens)
        self.top = before

    def sums(self, sizes: list[int], to: list[Place | None]) -> list[list[Place]]:
        """Of each share the places of sums, cleared; those of a single share where they are to be in the end."""
        count, item = self.count(range(self.tokens)), self.program.size
        start, ends = self.top, to if count == 1 else [None] * len(sizes)
        grads = [[end or self.scratch(n * item) for n, end in zip(sizes, ends, strict=True)] for _ in range(count)]
        if self.top > start:
            self.clear((_SCRATCH, start), self.top - start)
        for size, place in zip(sizes, grads[0], strict=True):
            if place[0] != _SCRATCH:
                self.clear(place, size * item)
        return grads

    def clear(self, place: Place, size: int) -> None:
        self.spread(fill(self.target), [place], size, 4 * COPIED_SHARE, LINE)

    def added(self, sizes: list[int], grads: list[list[Place]], to: list[Place | None]) -> list[Place]:
        """The sums of all shares; where nothing says where they are to be, in place of the first."""
        if len(grads) == 1:
            return grads[0]
        run = add(len(grads), self.program.inside, self.target)
        totals = [first if place is None else place for first, place in zip(grads[0], to, strict=True)]
        for total, size, *parts in zip(totals, sizes, *grads, strict=True):
            self.spread(run, [total, *parts], size, COPIED_SHARE, LINE)
        return totals

    def call(self, name: str, operands: Sequence[Array], results: list[jax.ShapeDtypeStruct]) -> tuple[Array, ...]:
        target = _register(f"{name} {self.program.outside}", self._words(lambda _: 0), self._words(address), self)
        found = jax.ffi.ffi_call(target, [*results, jax.ShapeDtypeStruct((self.bytes + LINE,), jnp.uint8)])(*operands)
        return tuple(found[:-1])

    def _words(self, address_of: Callable[[Any], int]) -> list[int]:
        last = self.operands + self.results
        most = [max(len(tables) * len(tables[0]) for _, tables, *_ in self.stages), max(len(s[1]) for s in self.stages)]
        words = [self.operands, self.results + 1, len(self.stages), *most]
        for run, tables, starts, total in self.stages:
            words += [address_of(run), len(tables), len(tables[0]), total, *starts]
            words += [n for table in tables for array, at in table for n in (last if array == _SCRATCH else array, at)]
        return words


def _register(name: str, described: list[int], words: list[int], plan: _Plan) -> str:
    """The name of the target for a plan. A call that another process finds in a cache means the same by it."""
    import structlin

    text = f"{structlin.__version__} {name} {plan.target} {described}"
    target = f"structlin_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    with _LOCK:
        if target not in _REGISTERED:
            made = handler(words, plan.target)
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(address(made)), platform="cpu")
            _REGISTERED[target] = made, plan.stages
    return target
