"""Plans of calls of passes: the functions that run one after the other, and the memory that they share.

A plan depends on sizes alone, and holds no arrays. A library runs it on its own arrays and threads: torch
(:mod:`.passes`), and XLA (:mod:`._xla_runtime`). Each stage is a function that runs for several shares at the same
time, with a table of places for each of them: arrays, and bytes from their starts.

Copies of factors, the memory of blocks of tokens and the sums of other shares than the first are in one array
(:data:`SCRATCH`). The sums of the first share that the results do not hold themselves are in another one
(:data:`SUMS`), because they are needed for longer.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from structlin.execution.compiled._ir import Code, Int, Values
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._program import NAMES, Program
from structlin.execution.compiled._rules import COPIED_SHARE, ChainRules, copy_shares, cuts, shares
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._slices import Slices, whole
from structlin.execution.compiled._target import Target, load
from structlin.execution.compiled._writer import Pass

SCRATCH, SUMS = -1, -2  # numbers of arrays; those of operands and of results after them start at 0
Place = tuple[int, int]  # an array, and bytes from its start
Spec = tuple[tuple[int, ...], str]  # a shape and a dtype


@dataclass(frozen=True)
class Call:
    """All that the plan of a call depends on, beside the processor.

    ``threads``: how many shares there may be, ``kept``: of how many tokens the activations are kept. A forward pass
    has a ``bias`` or not, a backward pass says which gradients it ``needs``.
    """

    chain: ChainRules
    dtype: str
    tokens: int
    threads: int
    kept: int
    bias: bool = False
    needs: tuple[bool, ...] | None = None

    def back(self) -> Slices:
        """Return how the backward pass runs."""
        found = self.chain.back(self.dtype, self.chain.shares(self.tokens, self.threads))
        # With another number of threads kept activations were not to be read in slices.
        return whole(self.chain.given(self.dtype)) if self.kept and found.states is None else found

    def plan(self) -> Plan:
        """Make the plan."""
        return _forward(self) if self.needs is None else _backward(self, self.needs)


class Plan:
    """The ``stages`` of a call. Sizes of sums are in numbers, of which each share has its own.

    ``macs``: of a token, as for :func:`._rules.shares`. ``results``: of the call, without its memory.
    """

    def __init__(
        self, program: Program, tokens: int, threads: int, macs: int, operands: int, results: list[Spec]
    ) -> None:  # fmt: skip
        self.target, self.size, self._inside = program.target, program.size, program.inside
        self.tokens, self.threads, self._macs = tokens, threads, macs
        self.operands, self.results = operands, results
        self._used = {SCRATCH: 0, SUMS: 0}
        self.bytes = dict(self._used)  # at most
        self.stages: list[tuple[Callable[..., None], list[list[Place]], list[int], int]] = []

    @property
    def places(self) -> tuple[list[Place], list[Place]]:
        """The places of operands and of results."""
        found = [(k, 0) for k in range(self.operands + len(self.results))]
        return found[: self.operands], found[self.operands :]

    @cached_property
    def lives(self) -> list[tuple[list[int], list[int]]]:
        """Return, for each stage, the results and other memory that it is the first, or the last one to use."""
        used = [{array for table in tables for array, _ in table} for _, tables, *_ in self.stages]
        ends: dict[int, list[int]] = {}
        for number, arrays in enumerate(used):
            for array in arrays:
                if not 0 <= array < self.operands:
                    ends.setdefault(array, [number, number])[1] = number
        return [
            tuple([array for array, one in ends.items() if one[side] == number] for side in range(2))  # type: ignore[misc]
            for number in range(len(used))
        ]

    def count(self, part: range) -> int:
        """Return the number of shares of a part of the tokens."""
        return shares(len(part), self.threads, self._macs)

    def reserve(self, size: int, array: int = SCRATCH) -> Place:
        """Reserve ``size`` bytes."""
        place = (array, self._used[array])
        self._used[array] += -(-size // LINE) * LINE
        self.bytes[array] = max(self.bytes[array], self._used[array])
        return place

    def free(self) -> None:
        """Reserve all memory anew: what follows does not read what is in it."""
        self._used = {SCRATCH: 0, SUMS: 0}

    def stage(self, run: Callable[..., None], tables: list[list[Place]], starts: Sequence[int], total: int = 0) -> None:
        """``run(tables[k], starts[k], starts[k + 1], total)`` for all k, at the same time."""
        self.stages.append((run, tables, list(starts), total))

    def spread(self, run: Callable[..., None], table: list[Place], size: int, least: int, unit: int) -> None:
        """One range for all shares, each of at least so many; cut at multiples of a unit."""
        count = max(1, min(self.threads, size // least))
        self.stage(run, [table] * count, [size * k // count // unit * unit for k in range(count)] + [size])

    def packed(self, program: Program, kind: str, numbers: Sequence[int], factors: Sequence[Place]) -> list[Place]:
        """Return the places of these factors in the layout that the products ``kind`` read."""
        sizes = program.packing(kind, tuple(numbers)).sizes
        places = [self.reserve(size) if size else factor for factor, size in zip(factors, sizes, strict=True)]
        ends = zip(sizes, factors, places, strict=True)
        self.copy(program, kind, numbers, [place for size, *pair in ends if size for place in pair])
        return places

    def copy(self, program: Program, kind: str, numbers: Sequence[int], table: list[Place]) -> None:
        """Add a stage that copies factors into the order of their products, or gradients back."""
        if table:
            packing = program.packing(kind, tuple(numbers))
            count = copy_shares(packing.numbers, self.threads)
            self.stage(packing.run, [table] * count, range(count + 1), count)

    def run(
        self, run: Pass, part: range, ends: list[Place], table: list[Place], more: list[Place],
        grads: Sequence[list[Place]] | None = None,
    ) -> None:  # fmt: skip
        """Run a pass over a part of the tokens, in memory that is free afterwards."""
        before, tables = self._used[SCRATCH], []
        count = self.count(part)
        for k in range(count):
            tables.append([*ends, self.reserve(run.scratch), *table, *(grads[k] if grads else []), *more])
        self.stage(run.run, tables, cuts(part, run.block, count), self.tokens)
        self._used[SCRATCH] = before

    def sums(self, sizes: Sequence[int], to: Sequence[Place | None]) -> list[list[Place]]:
        """Return the places of each share's sums, cleared; those of the first share are ``to``, unless it is None."""
        before, others = dict(self._used), range(1, self.count(range(self.tokens)))
        first = [end or self.reserve(n * self.size, SUMS) for n, end in zip(sizes, to, strict=True)]
        grads = [first, *([self.reserve(n * self.size) for n in sizes] for _ in others)]  # needed until they are added
        for array, start in before.items():
            self.clear((array, start), self._used[array] - start)
        for size, place in zip(sizes, first, strict=True):
            if place[0] != SUMS:
                self.clear(place, size * self.size)
        return grads

    def clear(self, place: Place, size: int) -> None:
        """Add a stage that sets memory to zero."""
        if size:
            self.spread(fill(self.target), [place], size, 4 * COPIED_SHARE, LINE)

    def added(self, sizes: Sequence[int], grads: list[list[Place]]) -> list[Place]:
        """Return the sums of all shares, in place of the first ones."""
        if len(grads) > 1:
            run = add(len(grads), self._inside, self.target)
            for size, *parts in zip(sizes, *grads, strict=True):
                self.spread(run, [parts[0], *parts], size, COPIED_SHARE, LINE)
        return grads[0]


class Plans:
    """Plans by what they depend on. At most so many are held, such as those for other numbers of tokens."""

    most = 128

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Plan] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """Return a plan, made if it is not held; if there are too many, the oldest go."""
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
            for old in list(self._made)[: -self.most]:
                self._made.pop(old, None)
        return found


def _forward(call: Call) -> Plan:
    chain, tokens, kept = call.chain, call.tokens, call.kept
    program, slices, last = chain.given(call.dtype), chain.front(call.dtype, kept > 0), len(chain.shapes)
    y = (tokens, chain.d_out) if chain.rows else (chain.d_out, tokens)
    held: list[Spec] = [((size,), call.dtype) for size in chain.kept_sizes(call.dtype, kept)]
    operands = 1 + last + call.bias
    plan = Plan(slices.program, tokens, call.threads, chain.team_macs, operands, [(y, call.dtype), *held])
    inputs, outputs = plan.places
    item = BYTES[program.outside]
    apart = chain.apart(slices, tokens, item)
    for number in range(slices.count):
        plan.free()
        given = moved(inputs[1 : 1 + last], number, [n * item for n in slices.factors])
        bias = moved(inputs[1 + last :], number, [slices.end * program.size])
        ends = [inputs[0], (outputs[0][0], number * apart)]
        table = [*bias, *plan.packed(slices.program, "forward", range(last), given)]
        states = moved(outputs[1:], number, [n * item for n in slices.states or ()])
        for part, more in ((range(kept), states), (range(kept, tokens), [])):
            if part:
                plan.run(slices.program.forward(call.bias, bool(more)), part, ends, table, more)
    return plan


def _backward(call: Call, needs: tuple[bool, ...]) -> Plan:
    chain, tokens, cut = call.chain, call.tokens, call.kept
    slices, last = call.back(), len(chain.shapes)
    program = slices.program
    wanted = [k for k in range(last) if needs[k + 1]]
    lowest = 0 if needs[0] else min(wanted) + 1
    results: list[Spec] = [(chain.shapes[k], call.dtype) for k in wanted]
    if needs[0]:
        results.insert(0, ((tokens, chain.d_in) if chain.rows else (chain.d_in, tokens), call.dtype))
    if needs[-1]:
        results.append(((chain.d_out,), NAMES[program.inside]))
    operands = 2 + last + len(chain.kept_sizes(call.dtype, cut))
    plan = Plan(program, tokens, call.threads, chain.team_macs, operands, results)
    inputs, outputs = plan.places
    sizes = [math.prod(program.shapes[k]) for k in wanted] + [chain.d_out] * needs[-1]
    direct = [not size for size in program.packing("gradients", tuple(wanted)).sizes] + [True] * needs[-1]
    again = range(max(wanted, default=0))
    item = BYTES[program.outside]
    apart = chain.apart(slices, tokens, item)
    for number in range(slices.count):
        plan.free()
        given = moved(inputs[2 : 2 + last], number, [n * item for n in slices.factors])
        held = moved(inputs[2 + last :], number, [n * item for n in slices.states or ()])
        gx = moved(outputs[:1], number, [apart]) if needs[0] else []
        starts = [*(slices.factors[k] * item for k in wanted), *([0] if needs[-1] else [])]
        found = moved(outputs[len(gx) :], number, starts)
        grads = plan.sums(sizes, [place if alone else None for place, alone in zip(found, direct, strict=True)])
        table = [*gx, *plan.packed(program, "back", range(lowest, last), given[lowest:])]
        for part, more in ((range(cut), held), (range(cut, tokens), None)):
            if part:
                rest = plan.packed(program, "forward", again, given[: len(again)]) if more is None else more
                run = program.backward(needs, more is not None, plan.count(part) > 1)
                plan.run(run, part, [*moved(inputs[1:2], number, [apart]), inputs[0]], table, rest, grads)
        ends = zip(plan.added(sizes, grads), found, direct, strict=True)
        plan.copy(program, "gradients", wanted, [place for *pair, alone in ends if not alone for place in pair])
    return plan


def moved(places: Sequence[Place], number: int, steps: Sequence[int]) -> list[Place]:
    """So many steps further, each place by its own; where there are no places there may be steps."""
    return [(array, at + number * step) for (array, at), step in zip(places, steps, strict=False)]


@cache
def fill(target: Target) -> Callable[..., None]:
    """Clear bytes ``first`` to ``last`` of an array."""
    code = Code()
    start = code.at("i8", code.value("load ptr, ptr %table"), "%first")
    size = code.subtract("%last", "%first")
    code.call("void", "llvm.memset.p0.i64", ("ptr", start), ("i8", 0), ("i64", size), ("i1", "false"))
    text = code.function("fill", "ptr %table, i64 %first, i64 %last, i64 %total", "nounwind")
    return load(text, "fill", target, [ctypes.c_void_p, *[ctypes.c_int64] * 3])


@lru_cache(maxsize=64)
def add(parts: int, element: str, target: Target) -> Callable[..., None]:
    """Sum the numbers ``first`` to ``last`` of arrays; the table has the sum (it may be one of them) and the arrays."""
    code, lanes = Code(), target.width // BYTES[element]
    to, *given = (code.value(f"load ptr, ptr {code.at('ptr', '%table', k)}") for k in range(1 + parts))

    def write(kind: str) -> Callable[[Int, Values], None]:
        def sums(k: Int, _: Values) -> None:
            total = ""
            for pointer in given:
                part = code.value(f"load {kind}, ptr {code.at(element, pointer, k)}, align {BYTES[element]}")
                total = code.value(f"fadd {kind} {total}, {part}") if total else part
            code.put(f"store {kind} {total}, ptr {code.at(element, to, k)}, align {BYTES[element]}")

        return sums

    rest = code.add("%first", code.whole(code.subtract("%last", "%first"), lanes))
    code.loop("%first", rest, lanes, write(f"<{lanes} x {element}>"))
    code.loop(rest, "%last", 1, write(element))
    text = code.function("add", "ptr %table, i64 %first, i64 %last, i64 %total", target.attributes)
    return load(text, "add", target, [ctypes.c_void_p, *[ctypes.c_int64] * 3])
