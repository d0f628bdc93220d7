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
from functools import cache, lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from structlin._parse import Step, parse_chain
from structlin.execution.compiled import _plans
from structlin.execution.compiled._plans import SCRATCH, SUMS, Plan
from structlin.execution.compiled._program import NAMES, Program
from structlin.execution.compiled._rules import ChainRules, shares
from structlin.execution.compiled._schedule import LINE
from structlin.execution.compiled._target import CompileError, address, host, warn_once
from structlin.execution.compiled._xla_runtime import TARGET, TYPES, register, unsupported
from structlin.structure import Structure

Array = Any
T = TypeVar("T")
FORMAT = 1  # of descriptions: another one for each change of what they say, or of what they ask for
INSTEAD = "XLA's own products"  # what runs where nothing is compiled


@cache
def threads() -> int:
    """Return the largest number of threads of XLA."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Call(_plans.Call):
    """A call whose description any process can read."""

    def text(self, numbers: Sequence[int]) -> str:
        """Return the attribute of a call whose arrays have these ``numbers``."""
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

    team_macs = 0  # XLA's threads run already

    def __init__(
        self, steps: tuple[Step, ...], sizes: tuple[tuple[str, int], ...], d_in: int, d_out: int, rows: bool
    ) -> None:  # fmt: skip
        super().__init__(steps, sizes, d_in, d_out, rows)  # a program is found again by these alone

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
            operands.append(jnp.pad(bias, (0, spare)).astype(NAMES[program.inside]))
        return _call(Call(self, dtype, self._tokens(x), threads(), kept, bias=bias is not None), operands)

    def backward(
        self, gy: Array, x: Array, factors: Sequence[Array], needs: tuple[bool, ...], held: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Return the gradients of x, the factors and the bias that ``needs`` selects; ``held``: stored activations."""
        dtype, tokens, program = str(x.dtype), self._tokens(x), self.given(str(x.dtype))
        if needs[-1] and self.back(dtype, shares(tokens, threads())).count > 1:
            bias = jnp.sum(gy, 0 if self.rows else 1, dtype=NAMES[program.inside])
            return *self.backward(gy, x, factors, (*needs[:-1], False), held), bias
        kept = held[0].size // program.schedule.rows[1] if held else 0
        return _call(Call(self, dtype, tokens, threads(), kept, needs=needs), [gy, x, *factors, *held])

    def keeps(self, dtype: str, tokens: int) -> int:
        """Return the number of tokens whose activations between the steps to store for the backward pass."""
        return attempt(lambda: self.kept_tokens(dtype, tokens, shares(tokens, threads())), 0)

    def program(self, dtype: str, packed: bool = True) -> Program | None:
        """Return the program, or None if this way should not run the chain."""
        return super().program(dtype, packed) if dtype in TYPES else None

    def _tokens(self, x: Array) -> int:
        return x.shape[0 if self.rows else 1]


def _call(call: Call, operands: Sequence[Array]) -> tuple[Array, ...]:
    plan = plan_of(call)
    numbers = [n for _, n in _arrays(call, plan)]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (*plan.results, ((numbers[-1],), "uint8"))]
    found = jax.ffi.ffi_call(TARGET, results)(*operands, plan=call.text(numbers))
    return tuple(found[:-1])


@lru_cache(maxsize=64)
def plan_of(call: Call) -> Plan:
    """Raise CompileError if anything in it fails."""
    try:
        return call.plan()
    except Exception as error:
        raise error if isinstance(error, CompileError) else CompileError(f"no plan of a chain: {error!r}") from error


def _prepare(text: str) -> tuple[list[int], object]:
    """Return what a handler runs for a call that was traced here, or in another process and for another processor."""
    call, numbers = Call.read(text)
    plan = plan_of(call)
    *given, room = numbers
    *wanted, scratch = (n for _, n in _arrays(call, plan))
    if given != wanted or room < scratch:
        raise CompileError(
            "a program was compiled for another processor, whose passes need less memory or store other activations; "
            "compile it again"
        )
    return words(call, plan, room), plan.stages


register(_prepare)


def _arrays(call: Call, plan: Plan) -> list[tuple[str, int]]:
    """Return dtype and number of elements of operands, results and scratch memory, which has the sums first."""
    chain, dtype, program = call.chain, call.dtype, call.chain.given(call.dtype)
    factors, kept = [math.prod(shape) for shape in chain.shapes], chain.kept_sizes(dtype, call.kept)
    x, y = (call.tokens * d for d in (chain.d_in, chain.d_out))
    operands = [(dtype, n) for n in ([x, *factors] if call.needs is None else [y, x, *factors, *kept])]
    if call.bias:
        operands.append((NAMES[program.inside], program.schedule.widths[-1]))
    results = [(kind, math.prod(shape)) for shape, kind in plan.results]
    return [*operands, *results, ("uint8", sum(plan.bytes.values()) + LINE)]


def words(call: Call, plan: Plan, room: int) -> list[int]:
    """Return the words of a plan for calls with this much scratch memory."""
    *arrays, scratch = _arrays(call, plan)
    last = len(arrays)
    most = [max(len(tables) * len(tables[0]) for _, tables, *_ in plan.stages), max(len(s[1]) for s in plan.stages)]
    found = [plan.operands, last + 1 - plan.operands, len(plan.stages), *most]
    for dtype, numbers in (*arrays, (scratch[0], room)):
        found += [TYPES[dtype], numbers]
    starts = {SUMS: 0, SCRATCH: plan.bytes[SUMS]}
    for run, tables, cuts, total in plan.stages:
        found += [address(run), len(tables), len(tables[0]), total, *cuts]
        for array, at in (place for table in tables for place in table):
            found += (last, starts[array] + at) if array in starts else (array, at)
    return found
