"""The compiled passes of a chain for jax on a CPU: custom calls of XLA, with memory and threads of XLA.

Copies of factors and scratch memory are one more result of the call. So XLA plans them with all other memory of a
program, and nothing is allocated while it runs.

A call carries a description of its computation (:class:`Call`). A plan is made from it, once when a program is traced,
to know the results, and once for each executable (:mod:`._xla_runtime`), which another process may have compiled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from structlin._parse import parse_chain
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._program import Program
from structlin.execution.compiled._rules import COPIED_SHARE, ChainRules, copy_shares, cuts, shares
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import CompileError, address, host, warn_once
from structlin.execution.compiled._writer import Pass
from structlin.execution.compiled._xla_runtime import TARGET, TYPES, add, fill, register, unsupported
from structlin.structure import Structure

Array = Any
Place = tuple[int, int]  # an array, and bytes from its start
Spec = tuple[tuple[int, ...], str]  # a shape and a dtype
T = TypeVar("T")
FORMAT = 1  # of descriptions: another one for each change of what they say, or of what they ask for
INSTEAD = "XLA's own products"  # what runs where nothing is compiled
_SCRATCH = -1
_DTYPES = {"float": "float32", "double": "float64", "bfloat": "bfloat16"}


@cache
def threads() -> int:
    """Return the largest number of threads of XLA."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Call:
    """All that the plan of a call depends on, beside the processor.

    ``threads``: how many shares there may be, ``kept``: of how many tokens the activations are kept. A forward pass
    has a ``bias`` or not, a backward pass says which gradients it ``needs``.
    """

    chain: XLAChain
    dtype: str
    tokens: int
    threads: int
    kept: int
    bias: bool = False
    needs: tuple[bool, ...] | None = None

    def text(self, numbers: Sequence[int]) -> str:
        """Return the attribute of a call whose arrays have these ``numbers``, in a form that any process can read."""
        steps, sizes, d_in, d_out, rows = self.chain.parts
        chain = {"steps": "; ".join(map(str, steps)), "sizes": sizes, "d_in": d_in, "d_out": d_out, "rows": rows}
        own = {name: value for name, value in vars(self).items() if name != "chain"}
        return json.dumps({"format": FORMAT, **chain, **own, "numbers": numbers})

    @staticmethod
    def read(text: str) -> tuple[Call, list[int]]:
        """Raise CompileError for a text that this version does not write."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise ValueError(text)
            steps, sizes = parse_chain(found.pop("steps")), tuple((axis, n) for axis, n in found.pop("sizes"))
            given = Structure(steps, sizes, found.pop("d_in"), found.pop("d_out"))
            chain = XLAChain(given.steps, given.sizes, given.d_in, given.d_out, found.pop("rows"))
            needs, numbers = found.pop("needs"), found.pop("numbers")
            call = Call(chain, **found, needs=None if needs is None else tuple(needs))
            if not 0 <= call.kept <= call.tokens or (needs is not None and len(needs) != 2 + len(steps)):
                raise ValueError(text)
            return call, numbers
        except Exception as error:
            raise CompileError("a program was compiled with another version of structlin; compile it again") from error


def attempt(make: Callable[[], T], otherwise: T) -> T:
    """Run a function for the choice of a way; a failure gives one warning per process instead of an error."""
    try:
        return make()
    except Exception as error:
        warn_once(CompileError(f"a chain was not prepared: {error!r}"), INSTEAD)
        return otherwise


class XLAChain(ChainRules):
    """The two passes, on arrays of jax. They are only to be lowered for a single CPU device."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """Steps, sizes, d_in, d_out and rows."""
        return self._chain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, XLAChain) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def ready(self, dtype: str) -> Program | None:
        """Return the object that runs the chain; None if this way cannot run it."""
        if host() is None or dtype not in TYPES:
            return None
        reason = unsupported()
        if reason is not None:
            warn_once(CompileError(reason), INSTEAD)
            return None
        return attempt(lambda: self.program(dtype), None)

    def forward(self, x: Array, factors: Sequence[Array], bias: Array | None, kept: int) -> tuple[Array, ...]:
        """Return the product and the activations between the steps for the first ``kept`` tokens."""
        dtype, operands = str(x.dtype), [x, *factors]
        if bias is not None:
            program = self.given(dtype)
            spare = program.schedule.widths[-1] - self.d_out
            operands.append(jnp.pad(bias, (0, spare)).astype(_DTYPES[program.inside]))
        return _call(Call(self, dtype, self._tokens(x), threads(), kept, bias=bias is not None), operands)

    def backward(
        self, gy: Array, x: Array, factors: Sequence[Array], needs: tuple[bool, ...], held: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Return the gradients of x, the factors and the bias that ``needs`` selects; ``held``: stored activations."""
        dtype, tokens, program = str(x.dtype), self._tokens(x), self.given(str(x.dtype))
        if needs[-1] and self.back(dtype, shares(tokens, threads())).count > 1:
            bias = jnp.sum(gy, 0 if self.rows else 1, dtype=_DTYPES[program.inside])
            return *self.backward(gy, x, factors, (*needs[:-1], False), held), bias
        kept = held[0].size // program.schedule.rows[1] if held else 0
        return _call(Call(self, dtype, tokens, threads(), kept, needs=needs), [gy, x, *factors, *held])

    def keeps(self, dtype: str, tokens: int) -> int:
        """Return the number of tokens whose activations between the steps to store for the backward pass."""
        return attempt(lambda: self.kept_tokens(dtype, tokens, shares(tokens, threads())), 0)

    def kept_sizes(self, dtype: str, kept: int) -> list[int]:
        """Return the sizes of these activations in order."""
        return [kept * row for row in self.given(dtype).schedule.rows[1:-1]] if kept else []

    def given(self, dtype: str) -> Program:
        """Return the program of a dtype; raise CompileError if this processor has none."""
        program = self.program(dtype) if dtype in TYPES else None
        if program is None:
            raise CompileError(f"this processor has no passes for the chain in {dtype}")
        return program

    def _tokens(self, x: Array) -> int:
        return x.shape[0 if self.rows else 1]


def _call(call: Call, operands: Sequence[Array]) -> tuple[Array, ...]:
    plan = plan_of(call)
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in plan.arrays[plan.operands :]]
    found = jax.ffi.ffi_call(TARGET, results)(*operands, plan=call.text(plan.numbers))
    return tuple(found[:-1])


@lru_cache(maxsize=64)
def plan_of(call: Call) -> Plan:
    """Raise CompileError if anything in it fails."""
    try:
        return _forward(call) if call.needs is None else _backward(call, call.needs)
    except Exception as error:
        raise error if isinstance(error, CompileError) else CompileError(f"no plan of a chain: {error!r}") from error


def _prepare(text: str) -> tuple[list[int], object]:
    """Return what a handler runs for a call that was traced here, or in another process and for another processor."""
    call, numbers = Call.read(text)
    plan = plan_of(call)
    *given, room = numbers
    *wanted, scratch = plan.numbers
    if given != wanted or room < scratch:
        raise CompileError(
            "a program was compiled for another processor, whose passes need less memory or store other activations; "
            "compile it again"
        )
    return plan.words(room), plan.stages


register(_prepare)


def _forward(call: Call) -> Plan:
    chain, tokens, kept = call.chain, call.tokens, call.kept
    program, slices, last = chain.given(call.dtype), chain.front(call.dtype, kept > 0), len(chain.shapes)
    x, y = ((tokens, d) if chain.rows else (d, tokens) for d in (chain.d_in, chain.d_out))
    added = [((program.schedule.widths[-1],), _DTYPES[program.inside])] if call.bias else []
    held = [((size,), call.dtype) for size in chain.kept_sizes(call.dtype, kept)]
    operands = [(x, call.dtype), *((shape, call.dtype) for shape in chain.shapes), *added]
    plan = Plan(slices.program, call, operands, [(y, call.dtype), *held])
    inputs, outputs = plan.places
    item = BYTES[program.outside]
    apart = chain.apart(slices, tokens, item)
    for number in range(slices.count):
        given = _moved(inputs[1 : 1 + last], number, [n * item for n in slices.factors])
        bias = _moved(inputs[1 + last :], number, [slices.end * program.size])
        ends, before = [inputs[0], (outputs[0][0], number * apart)], plan.top
        table = [*bias, *plan.packed("forward", range(last), given)]
        states = _moved(outputs[1:], number, [n * item for n in slices.states or ()])
        for part, more in ((range(kept), states), (range(kept, tokens), [])):
            if part:
                plan.run(slices.program.forward(call.bias, bool(more)), part, ends, table, more)
        plan.top = before
    return plan


def _backward(call: Call, needs: tuple[bool, ...]) -> Plan:
    chain, tokens, cut = call.chain, call.tokens, call.kept
    slices = chain.back(call.dtype, shares(tokens, call.threads))
    program, last = slices.program, len(chain.shapes)
    wanted = [k for k in range(last) if needs[k + 1]]
    lowest = 0 if needs[0] else min(wanted) + 1
    x, gy = (((tokens, d) if chain.rows else (d, tokens), call.dtype) for d in (chain.d_in, chain.d_out))
    kept = [((size,), call.dtype) for size in chain.kept_sizes(call.dtype, cut)]
    gradients = [((chain.shapes[k]), call.dtype) for k in wanted]
    if needs[-1]:
        gradients.append(((chain.d_out,), _DTYPES[program.inside]))
    operands = [gy, x, *((shape, call.dtype) for shape in chain.shapes), *kept]
    plan = Plan(program, call, operands, [*[x] * needs[0], *gradients])
    inputs, outputs = plan.places
    sizes = [*(math.prod(program.shapes[k]) for k in wanted), *([chain.d_out] if needs[-1] else [])]
    unpacked = program.packing("gradients", tuple(wanted)).sizes
    direct = [not size for size in unpacked] + [True] * needs[-1]
    again = range(max(wanted, default=0))
    item = BYTES[program.outside]
    apart = chain.apart(slices, tokens, item)
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
    return plan


def _moved(places: Sequence[Place], number: int, steps: Sequence[int]) -> list[Place]:
    """So many steps further, each place by its own; where there are no places there may be steps."""
    return [(array, at + number * step) for (array, at), step in zip(places, steps, strict=False)]


class Plan:
    """The stages of a call; see :mod:`._xla_runtime`. Sizes of sums are in numbers, of which each has a share's own."""

    def __init__(self, program: Program, call: Call, operands: list[Spec], results: list[Spec]) -> None:
        self.program, self.target, self.tokens, self.threads = program, program.target, call.tokens, call.threads
        self.operands, self._arrays = len(operands), [*operands, *results]
        self.top = self.bytes = 0
        self.stages: list[tuple[Callable[..., None], list[list[Place]], list[int], int]] = []

    @property
    def arrays(self) -> list[Spec]:
        """Shapes and dtypes of operands, results and scratch memory."""
        return [*self._arrays, ((self.bytes + LINE,), "uint8")]

    @property
    def numbers(self) -> list[int]:
        """The number of elements of each array."""
        return [math.prod(shape) for shape, _ in self.arrays]

    @property
    def places(self) -> tuple[list[Place], list[Place]]:
        """The places of operands and of results."""
        found = [(k, 0) for k in range(len(self._arrays))]
        return found[: self.operands], found[self.operands :]

    def count(self, part: range) -> int:
        """Return the number of shares of a part of the tokens."""
        return shares(len(part), self.threads)

    def scratch(self, size: int) -> Place:
        """Reserve scratch memory of ``size`` bytes."""
        place = (_SCRATCH, self.top)
        self.top += -(-size // LINE) * LINE
        self.bytes = max(self.bytes, self.top)
        return place

    def stage(self, run: Callable[..., None], tables: list[list[Place]], starts: Sequence[int], total: int = 0) -> None:
        """``run(tables[k], starts[k], starts[k + 1], total)`` for all k, at the same time."""
        self.stages.append((run, tables, list(starts), total))

    def spread(self, run: Callable[..., None], table: list[Place], size: int, least: int, unit: int) -> None:
        """One range for all shares, each of at least so many; cut at multiples of a unit."""
        count = max(1, min(self.threads, size // least))
        self.stage(run, [table] * count, [size * k // count // unit * unit for k in range(count)] + [size])

    def packed(self, kind: str, numbers: Sequence[int], factors: Sequence[Place]) -> list[Place]:
        """Return the places of these factors in the layout that the products ``kind`` read."""
        packing = self.program.packing(kind, tuple(numbers))
        places = [self.scratch(size) if size else factor for factor, size in zip(factors, packing.sizes, strict=True)]
        ends = zip(packing.sizes, zip(factors, places, strict=True), strict=True)
        self.copy(kind, numbers, [place for size, pair in ends if size for place in pair])
        return places

    def copy(self, kind: str, numbers: Sequence[int], table: list[Place]) -> None:
        """Add a call that copies factors into their arrangements."""
        if table:
            packing = self.program.packing(kind, tuple(numbers))
            count = copy_shares(packing.numbers, self.threads)
            self.stage(packing.run, [table] * count, range(count + 1), count)

    def run(
        self, run: Pass, part: range, ends: list[Place], table: list[Place], more: list[Place],
        grads: Sequence[list[Place]] | None = None,
    ) -> None:  # fmt: skip
        """Run a pass over a part of the tokens, in scratch memory that is free afterwards."""
        before, tables = self.top, []
        count = self.count(part)
        for k in range(count):
            tables.append([*ends, self.scratch(run.scratch), *table, *(grads[k] if grads else []), *more])
        self.stage(run.run, tables, cuts(part, run.block, count), self.tokens)
        self.top = before

    def sums(self, sizes: list[int], to: list[Place | None]) -> list[list[Place]]:
        """Return the places of each share's sums, cleared; a single share uses the places of the results."""
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
        """Add a call that sets memory to zero."""
        self.spread(fill(self.target), [place], size, 4 * COPIED_SHARE, LINE)

    def added(self, sizes: list[int], grads: list[list[Place]], to: list[Place | None]) -> list[Place]:
        """Return the sums of all shares; where nothing says where they are to be, in place of the first."""
        if len(grads) == 1:
            return grads[0]
        run = add(len(grads), self.program.inside, self.target)
        totals = [first if place is None else place for first, place in zip(grads[0], to, strict=True)]
        for total, size, *parts in zip(totals, sizes, *grads, strict=True):
            self.spread(run, [total, *parts], size, COPIED_SHARE, LINE)
        return totals

    def words(self, room: int) -> list[int]:
        """Return the words of a plan for calls with this much scratch memory."""
        last = len(self._arrays)
        most = [max(len(tables) * len(tables[0]) for _, tables, *_ in self.stages), max(len(s[1]) for s in self.stages)]
        words = [self.operands, last + 1 - self.operands, len(self.stages), *most]
        for (_, dtype), numbers in zip(self.arrays, [*self.numbers[:-1], room], strict=True):
            words += [TYPES[dtype], numbers]
        for run, tables, starts, total in self.stages:
            words += [address(run), len(tables), len(tables[0]), total, *starts]
            words += [n for table in tables for array, at in table for n in (last if array == _SCRATCH else array, at)]
        return words
