"""The ways to run a chain in torch, and the entry that picks one of them for a call.

An estimate adds up products and copies at the rates of the machine (:mod:`.rates`): a model that knows how the time of
a way depends on sizes. What the model does not know is measured once for each way, dtype and number of threads: the
time of a call of a tiny chain, which is added, and by what a chain of medium size takes longer than the model says,
which all its estimates are multiplied by.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._arrays import ops
from structlin.execution import choice
from structlin.execution._guard import guard_of, watched
from structlin.execution.choice import Problem, Way, register
from structlin.execution.compiled._rules import shares
from structlin.execution.compiled._target import CompileError
from structlin.execution.machine import caches
from structlin.execution.products import Product, plan_of, products
from structlin.execution.rates import Rates, rates
from structlin.execution.token_major import token_major
from structlin.execution.torch_cpu import Passes, chain_of
from structlin.execution.tuning import measure
from structlin.structure import Structure

__all__ = ["TorchChain", "torch_chain"]

_TORCH = ops("torch")
_TIMED = ("float32", "float64", "bfloat16", "float16")  # dtypes whose rates are measured
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FEW = 1 << 15  # numbers in the widest activation, up to which calls take longer than copies, on any device
COMPILING, CALLS = 0.15, 10_000  # seconds that LLVM takes for a pass, and calls in which they are to be won back
_PASSES = 3  # products of a training step for each one of the forward pass


def _rates(problem: Problem) -> Rates:
    return rates(problem.dtype if problem.dtype in _TIMED else "float32", problem.threads)


def _steps(structure: Structure) -> list[tuple[int, int, int, int]]:
    """(batch, contracted, free, carried) of each step."""
    return [(f.blocks, f.fan_in, f.fan_out, f.carried) for f in structure.factors]


class TorchWay(Way):
    """What the ways have in common: how an estimate is made from a model."""

    @abstractmethod
    def model(self, problem: Problem) -> float:
        """Seconds of products and copies, without calls."""

    def seconds(self, problem: Problem) -> float:
        if problem.device != "cpu":
            return _elsewhere(problem, self.name)
        kind = (problem.dtype if problem.dtype in _TIMED else "float32"), problem.threads, problem.train
        call, factor = _calibrated(*kind).get(self.name, (_rates(problem).call, 1.0))
        return call * len(problem.structure.steps) / len(_TINY.steps) + factor * self.model(problem)


class Products(TorchWay):
    """One batched product for each step, activations between them with the tokens innermost (:mod:`.products`)."""

    name = "products"

    def supports(self, problem: Problem) -> bool:
        return True

    def model(self, problem: Problem) -> float:
        found, tokens, plan = _rates(problem), problem.tokens, plan_of(problem.structure, problem.rows)
        total, number = 0.0, 0
        for step in plan.steps:
            moved = step.arrange if isinstance(step, Product) else step
            permuted = moved.order != tuple(range(len(moved.order)))
            if permuted and number:  # the first product reads the input where it is
                numbers = math.prod(n for n in moved.view if n) * tokens
                total += numbers * found.run + 2 * _fresh(problem, found, numbers)
            if isinstance(step, Product):
                total += found.product(step.blocks, step.fan_in, step.fan_out, step.carried * tokens, rows=step.rows_in)
                number += 1
        return total * (_PASSES if problem.train else 1)

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        y = products(structure, factors, x, _TORCH, rows)
        return y if bias is None else y + bias


class TokenMajor(TorchWay):
    """One batched product for each step with the tokens in front, in as few calls as possible (:mod:`.token_major`)."""

    name = "token_major"

    def supports(self, problem: Problem) -> bool:
        return problem.rows

    def model(self, problem: Problem) -> float:
        found, tokens, plan = _rates(problem), problem.tokens, token_major(problem.structure)
        total, numbers, done = 0.0, problem.structure.d_in * tokens, 0
        steps = _steps(problem.structure)
        for blocks, left, right in (*plan.steps, plan.last):
            if left[1] is not None and done:
                total += numbers * found.single + 2 * _fresh(problem, found, numbers)
            if blocks is None:
                continue
            batch, contracted, free, carried = steps[done]
            total += found.product(batch, contracted, free, carried * tokens, rows=True)
            if right[1] is not None:
                total += batch * contracted * free * (found.single if right[1][-1] != len(right[1]) - 1 else found.run)
            numbers, done = batch * free * carried * tokens, done + 1
        if plan.out[1] is not None:
            total += numbers * found.run + _fresh(problem, found, numbers)
        return total * (_PASSES if problem.train else 1)

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        return token_major(structure)(x, factors, bias)


class Dense(TorchWay):
    """The dense matrix, made by the chain from the identity, and one product with it.

    For chains whose own products are so much slower than a dense one that making the matrix pays.
    """

    name = "dense"
    most_bytes = 1 << 28  # of the matrix: a quarter of a gigabyte, beside which nothing here is large

    def supports(self, problem: Problem) -> bool:
        item = _BYTES.get(problem.dtype)
        size = problem.structure.d_in * problem.structure.d_out
        return item is not None and problem.device == "cpu" and size * item <= self.most_bytes

    def model(self, problem: Problem) -> float:
        structure, found = problem.structure, _rates(problem)
        wide = replace(problem, rows=True, tokens=structure.d_in)
        product = found.product(1, structure.d_in, structure.d_out, problem.tokens, rows=problem.rows)
        return products_way.model(wide) + product * (_PASSES if problem.train else 1)

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        identity = torch.eye(structure.d_in, dtype=x.dtype, device=x.device)
        transposed = products(structure, factors, identity, _TORCH, True)  # (d_in, d_out)
        return F.linear(x, transposed.mT, bias) if rows else transposed.mT @ x


class PassesWay(TorchWay):
    """A forward and a backward pass over the memory of tensors; :meth:`.torch_cpu.CPUChain.passes` names the kinds."""

    pointers = True

    def __init__(self, name: str, forward: str, back: str | None) -> None:
        self.name, self.forward, self.back = name, forward, back

    def supports(self, problem: Problem) -> bool:
        if problem.device != "cpu" or (problem.train and self.back is None):
            return False
        if not problem.train and self.back not in (None, self.forward):
            return False
        chain, dtype = chain_of(problem.structure, problem.rows), getattr(torch, problem.dtype)
        kinds = {self.forward, self.back} if problem.train else {self.forward}
        return all(kind is not None and chain.passes(kind, dtype) is not None for kind in kinds)

    def least(self, problem: Problem) -> float:
        if problem.device != "cpu":
            return math.inf
        wide = "float64" if problem.dtype == "float64" else "float32"
        macs = problem.structure.macs * problem.tokens * (_PASSES if problem.train else 1)
        return self._once(problem) + macs * rates(wide, problem.threads).fastest / 4  # pairs, and a slow calibration

    def seconds(self, problem: Problem) -> float:
        return self._once(problem) + super().seconds(problem)

    def _once(self, problem: Problem) -> float:
        """What compiling takes, for each of the calls that share it."""
        passes = (self.forward != "chunked") + (problem.train and self.back != "chunked")
        return passes * COMPILING / CALLS

    def model(self, problem: Problem) -> float:
        total = self._seconds(problem, self.forward, False)
        return total + self._seconds(problem, self.back or self.forward, True) if problem.train else total

    def _seconds(self, problem: Problem, kind: str, back: bool) -> float:
        if kind != "chunked":
            return self._compiled(problem, back)
        found, chain = _rates(problem), chain_of(problem.structure, problem.rows).chunked
        times = (3 if self.forward != kind else 2) if back else 1  # what the other kind keeps is computed again
        done = sum(found.product(b, k, f, c * problem.tokens) for b, k, f, c in _steps(problem.structure))
        chunks = math.ceil(problem.tokens / chain.chunk(_BYTES[problem.dtype])) - 1
        calls = 2 * chunks * len(problem.structure.steps) * found.call
        return times * (done + calls + (problem.structure.d_in + problem.structure.d_out) * problem.tokens * found.run)

    def _compiled(self, problem: Problem, back: bool) -> float:
        """Instructions at the rate of those of a dense product, or the reading of factors for each block of tokens."""
        program = chain_of(problem.structure, problem.rows).compiled.program(problem.dtype)
        assert program is not None
        machine = rates("float64" if problem.dtype == "float64" else "float32", problem.threads)
        cost = program.schedule.back_cost if back else program.schedule.cost
        instruction = program.lanes * machine.fastest * problem.threads  # seconds, on one thread
        threads, numbers = shares(problem.tokens, problem.threads), problem.structure.num_params
        touched = 3 if back else 1  # the factors are read, and their gradients read and written
        busy = problem.tokens * cost * instruction
        if numbers * _BYTES[problem.dtype] > caches().l2:
            busy = max(busy, touched * numbers * machine.read * problem.tokens / program.block)
        return busy / threads + touched * numbers * machine.run

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        chain, dtype = chain_of(structure, rows), x.dtype
        forward, back = chain.passes(self.forward, dtype), chain.passes(self.back or self.forward, dtype)
        if forward is None or back is None:  # the compiler has failed since
            return products_way.run(structure, factors, x, bias, rows)
        return chain(forward, x, factors, bias, back)

    def back_passes(self, structure: Structure, rows: bool, dtype: torch.dtype) -> Passes | None:
        return None if self.back is None else chain_of(structure, rows).passes(self.back, dtype)


class BlocksWay(PassesWay):
    """Compiled passes with another number of tokens in a block. It is measured, and no estimate says that it pays."""

    def __init__(self, block: int) -> None:
        super().__init__(f"compiled-{block}", f"compiled-{block}", f"compiled-{block}")
        self.block = block

    def supports(self, problem: Problem) -> bool:
        if problem.tokens < 4 * self.block or not compiled_way.supports(problem) or not super().supports(problem):
            return False
        program = chain_of(problem.structure, problem.rows).compiled.program(problem.dtype)
        return program is not None and program.block != self.block

    def least(self, problem: Problem) -> float:
        return math.inf

    def seconds(self, problem: Problem) -> float:
        return compiled_way.seconds(problem)


class StoredWay(PassesWay):
    """A compiled forward pass that copies no factor, for one or a few tokens (:mod:`.compiled.stored`)."""

    most_tokens = 8  # each token reads all factors again, which more tokens share in a compiled pass

    def __init__(self) -> None:
        super().__init__("stored", "stored", None)

    def supports(self, problem: Problem) -> bool:
        return problem.tokens <= self.most_tokens and super().supports(problem)

    def model(self, problem: Problem) -> float:
        structure, found = problem.structure, _rates(problem)
        return problem.tokens * max(structure.num_params * found.read, structure.macs * found.fastest)

    def bind(self, structure: Structure, rows: bool) -> Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]:
        chain = chain_of(structure, rows)

        def run(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
            try:  # a call takes some microseconds: none is to be lost on the way to it
                return chain.stored.plain(x, factors, bias)
            except CompileError:
                return chain.forward(chain.stored, x, factors, bias)[0]  # which warns, and goes another way

        return run


def _fresh(problem: Problem, found: Rates, numbers: int) -> float:
    """Seconds that an array takes longer for not staying in cache: its memory comes from the system, page by page."""
    return numbers * found.fresh if numbers * _BYTES.get(problem.dtype, 8) > caches().l3 else 0.0


def _elsewhere(problem: Problem, name: str) -> float:
    """On another device nothing is measured in advance: few numbers are a matter of calls, many of copies."""
    widest = max(max(f.fan_in, f.fan_out) * f.blocks * f.carried for f in problem.structure.factors)
    few = widest * problem.tokens <= FEW
    return 1.0 if (name == "token_major") == few else 2.0


# A chain whose products take no time beside its calls, and one of medium size with its number of tokens: large enough
# for the rate to be that of larger ones, and small enough for all its ways to be timed in a tenth of a second.
_TINY = Structure.parse("pa,pfa->fp; fp,fep->fe", p=4, a=4, f=4, e=4)
_MEDIUM, _MEDIUM_TOKENS = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=16, a=16, f=16, r=2, e=16), 256


@lru_cache(maxsize=64)
def _calibrated(dtype: str, threads: int, train: bool) -> dict[str, tuple[float, float]]:
    """Of each way the seconds of a call, and by what a chain of medium size takes longer than the model says."""
    small, medium = (
        Problem(structure, True, "torch", "cpu", dtype, tokens, threads, train)
        for structure, tokens in ((_TINY, 1), (_MEDIUM, _MEDIUM_TOKENS))
    )
    timed = []
    for problem in (small, medium):
        known = choice.timings(problem)
        among = [way for way in choice.ways("torch") if isinstance(way, TorchWay) and way.supports(problem)]
        timed.append(known if len(known) >= len(among) else measure(problem, among, keep=True))
    found = {}
    for way in choice.ways("torch"):
        if way.name in timed[0] and isinstance(way, TorchWay):
            call = timed[0][way.name]
            if way.name not in timed[1]:  # it is for few tokens alone
                found[way.name] = call, 1.0
                continue
            busy = max(timed[1][way.name] - call, 0.1 * timed[1][way.name])  # some of the call may be hidden
            found[way.name] = call, busy / way.model(medium)
    return found


products_way, token_major_way = Products(), TokenMajor()
compiled_way = PassesWay("compiled", "compiled", "compiled")
for _way in (
    products_way,
    token_major_way,
    Dense(),
    PassesWay("chunked", "chunked", "chunked"),
    compiled_way,
    PassesWay("compiled-chunked", "compiled", "chunked"),
    # One on each side of what the sizes of caches suggest on the processors that were looked at.
    BlocksWay(16),
    BlocksWay(48),
    StoredWay(),
):
    register(_way)

Call = Callable[[Tensor, Sequence[Tensor], "Tensor | None"], Tensor]


class TorchChain:
    """The entry for calls with one structure, for rows or columns: picks a way and remembers it."""

    def __init__(self, structure: Structure, rows: bool) -> None:
        self.structure, self.rows = structure, rows
        self._guard = guard_of(structure)
        self._taken: dict[tuple[Any, ...], tuple[Call, Way]] = {}
        self._generation = choice.generation()
        self._widest = max(max(f.fan_in, f.fan_out) * f.blocks * f.carried for f in structure.factors)
        self._axis = 0 if rows else 1

    def __reduce__(self) -> tuple[object, ...]:
        return torch_chain, (self.structure, self.rows)

    def __call__(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """(tokens, d_in) -> (tokens, d_out) plus ``bias``, or columns.

        Raises ValueError for operands of the wrong shape, device or dtype, and for storages that were freed.
        """
        operands = factors if bias is None else (*factors, bias)
        plain = self._guard.plain(x, operands)
        if not plain:
            self._guard.check(x, operands)
        if watched() or not (plain or not x.is_cpu or self._guard.addressable(x, operands)):
            # Nor is this the place to measure anything.
            return self._without_pointers(x).run(self.structure, factors, x, bias, self.rows)
        train = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands))
        call, way = self._way(x, train)
        return call(x, factors, bias) if plain else way.run(self.structure, factors, x, bias, self.rows)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:  # fmt: skip
        """Gradients of x and the factors, those that ``needs`` asks for, by the way that a training step takes."""
        back = None if watched() else self._way(x, True)[1].back_passes(self.structure, self.rows, x.dtype)
        found = chain_of(self.structure, self.rows).backward(back, gy, x, factors, [*needs, False])
        return [gradient for gradient in found if gradient is not None]

    def _way(self, x: Tensor, train: bool) -> tuple[Call, Way]:
        tokens = x.shape[self._axis]
        if self._generation != choice.generation():
            self._taken.clear()
            self._generation = choice.generation()
        key = x.dtype, x.is_cpu, (tokens - 1).bit_length(), train, torch.get_num_threads(), choice.own_policy()
        return self._taken.get(key) or self._choose(key, x, tokens)

    def _choose(self, key: tuple[Any, ...], x: Tensor, tokens: int) -> tuple[Call, Way]:
        way: Way = products_way
        if tokens:
            problem = Problem(
                self.structure, self.rows, "torch", x.device.type, str(x.dtype).removeprefix("torch."),
                choice.bucket(tokens), key[4], key[3],
            )  # fmt: skip
            way = choice.choose(problem)
            self._taken[key] = way.bind(self.structure, self.rows), way
        return way.bind(self.structure, self.rows), way

    def _without_pointers(self, x: Tensor) -> Way:
        """For tensors that stand for more than their memory, or for less."""
        if torch._C._get_tracing_state() is not None:  # where sizes are tensors
            return products_way
        few = self.rows and x.shape[0] * self._widest <= FEW
        return token_major_way if few else products_way


def torch_chain(structure: Structure, rows: bool = True) -> TorchChain:
    """The entry of a structure, made once for it."""
    key = "torch", rows
    found = structure._kept.get(key)
    if found is None:
        found = structure._kept[key] = TorchChain(structure, rows)
    return found
