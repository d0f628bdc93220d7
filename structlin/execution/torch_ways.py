"""The ways to run a chain in torch, and the entry that chooses one of them for a call.

A model of each way sums its products and copies at the rates of the machine (:mod:`.rates`). Two measurements correct
it, once for each way, dtype and number of threads. The time of a call on a tiny chain is added. The ratio of the
measured to the modelled time of a medium chain is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from structlin._arrays import ops
from structlin.execution import choice, models, traffic
from structlin.execution._gradients import SingleProducts
from structlin.execution._guard import guard_of, watched
from structlin.execution._kept import kept
from structlin.execution.choice import Problem, Way, register
from structlin.execution.compiled._rules import near_slice
from structlin.execution.compiled._target import CompileError
from structlin.execution.compiled.passes import FusedChain
from structlin.execution.products import products
from structlin.execution.rates import rates
from structlin.execution.token_major import token_major
from structlin.execution.torch_cpu import Passes, chain_of
from structlin.execution.torch_cuda import StridedWay, fused_way, strided_l2_way, strided_way
from structlin.execution.tuning import measured
from structlin.structure import Structure

__all__ = ["TorchChain", "torch_chain"]

_TORCH = ops("torch")
FEW_TOKENS = 8  # of the chain of medium size by which ways for a few tokens are calibrated
FEW = 1 << 15  # numbers in the widest activation, up to which calls take longer than copies, on any device


def _steps(structure: Structure) -> list[tuple[int, int, int, int]]:
    """Return (batch, contracted, free, carried) of each step."""
    return [(f.blocks, f.fan_in, f.fan_out, f.carried) for f in structure.factors]


class TorchWay(models.EstimatedWay):
    """Base class of the ways of torch; on GPUs :mod:`.traffic` estimates their times."""

    def calibration(self, problem: Problem) -> dict[str, tuple[float, float]]:
        return _calibrated(models.timed_dtype(problem.dtype), problem.threads, problem.train, models.is_large(problem))

    def seconds(self, problem: Problem) -> float:
        if problem.device == "cuda":
            return traffic.seconds(self, problem)
        return super().seconds(problem) if problem.device == "cpu" else _elsewhere(problem, self.name)


class Products(TorchWay, models.ProductsWay):
    """See :class:`structlin.execution.models.ProductsWay`."""

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        return SingleProducts(structure, rows).forward(x, factors, bias)


class TokenMajor(TorchWay):
    """One batched product for each step with the tokens as the first axis, in few calls (:mod:`.token_major`)."""

    name = "token_major"

    def supports(self, problem: Problem) -> bool:
        return problem.rows

    def model(self, problem: Problem) -> float:
        found, tokens, plan = self.rates(problem), problem.tokens, token_major(problem.structure)
        total, numbers, done = 0.0, problem.structure.d_in * tokens, 0
        steps = _steps(problem.structure)
        for blocks, left, right in (*plan.steps, plan.last):
            if left[1] is not None and done:
                total += numbers * found.single + 2 * models.fresh(problem, found, numbers)
            if blocks is None:
                continue
            batch, contracted, free, carried = steps[done]
            total += found.product(batch, contracted, free, carried * tokens, rows=True)
            if right[1] is not None:
                total += batch * contracted * free * (found.single if right[1][-1] != len(right[1]) - 1 else found.run)
            numbers, done = batch * free * carried * tokens, done + 1
        if plan.out[1] is not None:
            total += numbers * found.run + models.fresh(problem, found, numbers)
        return total * (models.PASSES if problem.train else 1)

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        return token_major(structure)(x, factors, bias)


class Dense(TorchWay, models.DenseWay):
    """See :class:`structlin.execution.models.DenseWay`."""

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        identity = torch.eye(structure.d_in, dtype=x.dtype, device=x.device)
        transposed = products(structure, factors, identity, _TORCH, True)  # (d_in, d_out)
        return F.linear(x, transposed.mT, bias) if rows else transposed.mT @ x


class PassesWay(models.CompiledWay, TorchWay):
    """A forward and a backward pass over the memory of tensors; :meth:`.torch_cpu.CPUChain.passes` names the kinds."""

    def __init__(self, name: str, forward: str, back: str | None) -> None:
        self.name, self.forward, self.back = name, forward, back
        self.group = name if name in ("batched", "chunked") else "compiled"

    def supports(self, problem: Problem) -> bool:
        if problem.device != "cpu" or (problem.train and self.back is None):
            return False
        if not problem.train and self.back not in (None, self.forward):
            return False
        chain, dtype = chain_of(problem.structure, problem.rows), getattr(torch, problem.dtype)
        kinds = {self.forward, self.back} if problem.train else {self.forward}
        return all(kind is not None and chain.passes(kind, dtype) is not None for kind in kinds)

    def least(self, problem: Problem) -> float:
        return super().least(problem) if problem.device == "cpu" else math.inf

    def compilations(self, problem: Problem) -> int:
        return (self.forward != "chunked") + (problem.train and self.back != "chunked")

    def model(self, problem: Problem) -> float:
        total = self._seconds(problem, self.forward, False)
        return total + self._seconds(problem, self.back or self.forward, True) if problem.train else total

    def _seconds(self, problem: Problem, kind: str, back: bool) -> float:
        if kind != "chunked":
            program = self._compiled(problem, kind).program(problem.dtype)
            assert program is not None
            return self.compiled(problem, program, back, self.slices(problem, back))
        found, chain = self.rates(problem), chain_of(problem.structure, problem.rows).chunked
        times = (3 if self.forward != kind else 2) if back else 1  # what the other kind keeps is computed again
        done = sum(found.product(b, k, f, c * problem.tokens) for b, k, f, c in _steps(problem.structure))
        chunks = math.ceil(problem.tokens / chain.chunk(models.BYTES[problem.dtype])) - 1
        calls = 2 * chunks * len(problem.structure.steps) * found.call
        return times * (done + calls + (problem.structure.d_in + problem.structure.d_out) * problem.tokens * found.run)

    def _compiled(self, problem: Problem, kind: str) -> FusedChain:
        passes = chain_of(problem.structure, problem.rows).passes(kind, getattr(torch, problem.dtype))
        assert isinstance(passes, FusedChain)
        return passes

    def slices(self, problem: Problem, back: bool) -> int:
        """Return the number of slices of a pass for the estimate, 0 if the factors are read as a whole."""
        return 0

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        return self.bind(structure, rows)(x, factors, bias)

    def bind(self, structure: Structure, rows: bool) -> Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]:
        chain = chain_of(structure, rows)  # which lives as long as what it is bound for

        def run(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
            forward = chain.passes(self.forward, x.dtype)
            back = forward if self.back in (None, self.forward) else chain.passes(self.back, x.dtype)
            if forward is None or back is None:  # the compiler has failed since
                return products_way.run(structure, factors, x, bias, rows)
            return chain(forward, x, factors, bias, back)

        return run

    def back_passes(self, structure: Structure, rows: bool, dtype: torch.dtype) -> Passes | None:
        return None if self.back is None else chain_of(structure, rows).passes(self.back, dtype)


class BatchedWay(PassesWay):
    """One batched product for each step, forward and backward (:mod:`.batched`)."""

    def __init__(self) -> None:
        super().__init__("batched", "batched", "batched")

    def compilations(self, problem: Problem) -> int:
        return 0  # but copies of factors

    def least(self, problem: Problem) -> float:
        return 0.0

    def model(self, problem: Problem) -> float:
        found, tokens = self.rates(problem), problem.tokens
        chain = chain_of(problem.structure, problem.rows).batched
        total = 0.0
        for number, (batch, free, contracted) in enumerate(chain.products):
            total += found.product(batch, contracted, free, tokens, rows=True)
            if number:
                total += batch * contracted * tokens * found.run
        total *= models.PASSES if problem.train else 1
        copies = 3 if problem.train else 1  # of a factor: for each pass, and of its gradient
        return total + copies * problem.structure.num_params * found.run


class TilesWay(PassesWay):
    """Compiled passes by tiles, in bfloat16 on processors with AMX (:mod:`.compiled._tiles`)."""

    most = 64

    def __init__(self) -> None:
        super().__init__("compiled-tiles", "compiled-tiles", "compiled-tiles")

    def supports(self, problem: Problem) -> bool:
        return problem.dtype == "bfloat16" and super().supports(problem)


class BlocksWay(PassesWay):
    """The passes of another way with another number of tokens in a block.

    Its effect on a large chain is measured once. For other chains there is no estimate, and the way is not chosen.
    """

    def __init__(self, whole: PassesWay, block: int) -> None:
        name = f"{whole.name}-{block}"
        super().__init__(name, name, name)
        self.whole, self.block, self.most = whole, block, whole.most

    def supports(self, problem: Problem) -> bool:
        if problem.tokens < 4 * self.block or not self.whole.supports(problem) or not super().supports(problem):
            return False
        program = self._compiled(problem, self.whole.forward).program(problem.dtype)
        return program is not None and program.block != self.block

    def least(self, problem: Problem) -> float:
        return self.whole.least(problem) if models.is_large(problem) else math.inf

    def seconds(self, problem: Problem) -> float:
        return super().seconds(problem) if models.is_large(problem) else self.whole.seconds(problem)


class NearWay(PassesWay):
    """Compiled passes in slices with factors of at most twice the second level of cache, for a slow third level."""

    least_tokens = 256  # for fewer, copies of the factors count

    def __init__(self, whole: PassesWay) -> None:
        name = f"{whole.name}-near"
        super().__init__(name, name, name)
        self.whole, self.most = whole, whole.most

    def supports(self, problem: Problem) -> bool:
        size = problem.structure.num_params * models.BYTES.get(problem.dtype, 8)
        if not self.whole.supports(problem) or size <= near_slice():
            return False
        if problem.tokens < self.least_tokens or not super().supports(problem):
            return False
        return self.slices(problem, False) > 1 and (not problem.train or self.slices(problem, True) > 1)

    def slices(self, problem: Problem, back: bool) -> int:
        chain = self._compiled(problem, self.forward)
        found = chain.back(problem.dtype, problem.threads) if back else chain.front(problem.dtype, problem.train)
        return found.count

    def calibration(self, problem: Problem) -> dict[str, tuple[float, float]]:
        """Return the calibration of passes over whole factors: the chains that are timed have smaller factors."""
        found = super().calibration(problem)
        return {self.name: found[self.whole.name]} if self.whole.name in found else {}


class StoredWay(PassesWay):
    """A compiled forward pass that copies no factor, for one or a few tokens (:mod:`.compiled.stored`)."""

    most_tokens = 64  # sums along an axis take more instructions than copies of the factors save for more tokens

    def __init__(self) -> None:
        super().__init__("stored", "stored", None)

    def supports(self, problem: Problem) -> bool:
        return problem.tokens <= self.most_tokens and super().supports(problem)

    def model(self, problem: Problem) -> float:
        program = chain_of(problem.structure, problem.rows).stored.program(getattr(torch, problem.dtype))
        instruction = program.lanes * self.wide(problem).fastest * problem.threads
        busy = problem.tokens * program.schedule.cost * instruction
        return busy + problem.structure.num_params * self.rates(problem).read

    def run(
        self, structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, rows: bool
    ) -> Tensor:  # fmt: skip
        return super().bind(structure, rows)(x, factors, bias)  # operands may be strided

    def bind(self, structure: Structure, rows: bool) -> Callable[[Tensor, Sequence[Tensor], Tensor | None], Tensor]:
        chain = chain_of(structure, rows)

        def run(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
            try:  # a call takes some microseconds, so that each attribute counts
                return chain.stored.plain(x, factors, bias)
            except CompileError:
                return chain.forward(chain.stored, x, factors, bias)[0]  # which warns, and uses another way

        return run


def _elsewhere(problem: Problem, name: str) -> float:
    """Return a relative estimate for other devices: few calls for small activations, few copies for large ones."""
    widest = max(max(f.fan_in, f.fan_out) * f.blocks * f.carried for f in problem.structure.factors)
    few = widest * problem.tokens <= FEW
    return 1.0 if (name == "token_major") == few else 2.0


@lru_cache(maxsize=64)
def _calibrated(dtype: str, threads: int, train: bool, large: bool) -> dict[str, tuple[float, float]]:
    """Return, by way, the seconds of a call, and the ratio of measured to modelled time of a chain.

    The chain is of medium size, or ``large``: its activations do not fit the second level of cache.
    """
    small, other = (
        Problem(structure, True, "torch", "cpu", dtype, tokens, threads, train)
        for structure, tokens in (models.TINY, models.LARGE if large else models.MEDIUM)
    )
    ways = [way for way in choice.ways("torch") if isinstance(way, TorchWay) and (large or way not in _block_ways)]
    calls, busy = (measured(problem, ways) for problem in (small, other))
    calls |= {way.name: calls[way.whole.name] for way in _block_ways if way.whole.name in calls}
    found = models.calibrated(calls, busy, {way.name: partial(way.model, other) for way in ways})
    few = replace(small, structure=models.MEDIUM[0], tokens=FEW_TOKENS)
    if stored_way.supports(few):
        model = {stored_way.name: partial(stored_way.model, few)}
        found |= models.calibrated(calls, measured(few, [stored_way, compiled_way]), model)
    return found


for _clear in (_calibrated.cache_clear, rates.cache_clear):
    choice.measured_with(_clear)
products_way, token_major_way = Products(), TokenMajor()
compiled_way, tiles_way = PassesWay("compiled", "compiled", "compiled"), TilesWay()
# One on each side of the number that the sizes of caches suggest on the measured processors; of tiles they suggest the
# smaller one where a block does not fit the second level of cache, but factors may be much larger than that.
_block_ways = (BlocksWay(compiled_way, 16), BlocksWay(compiled_way, 48), BlocksWay(tiles_way, 64))
stored_way = StoredWay()
for _way in (
    products_way,
    token_major_way,
    Dense(),
    BatchedWay(),
    PassesWay("chunked", "chunked", "chunked"),
    compiled_way,
    PassesWay("compiled-chunked", "compiled", "chunked"),
    *_block_ways,
    NearWay(compiled_way),
    tiles_way,
    NearWay(tiles_way),
    stored_way,
    strided_way,
    strided_l2_way,
    fused_way,
):
    register(_way)

Call = Callable[[Tensor, Sequence[Tensor], "Tensor | None"], Tensor]


class TorchChain:
    """The entry for calls with one structure, for rows or columns; it chooses a way and caches it."""

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
        """Return the product, (tokens, d_in) -> (tokens, d_out) plus ``bias``, or columns.

        Raises ValueError for operands of the wrong shape, device or dtype, and for storages that were freed.
        """
        operands = factors if bias is None else (*factors, bias)
        seen = watched()
        plain = not seen and self._guard.plain(x, operands)
        if not plain:
            self._guard.check(x, operands)
        if seen or not (plain or not x.is_cpu or self._guard.addressable(x, operands)):
            # Nothing is measured here, because the measurement would be traced.
            return self._without_pointers(x).run(self.structure, factors, x, bias, self.rows)
        train = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands))
        call, way = self._way(x, train)
        return call(x, factors, bias) if plain else way.run(self.structure, factors, x, bias, self.rows)

    def backward(
        self, gy: Tensor, x: Tensor, factors: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:  # fmt: skip
        """Return the gradients of x and the factors where ``needs`` is True, by the way of a training step."""
        way = None if watched() else self._way(x, True)[1]
        if isinstance(way, StridedWay):
            gradients = way.backward(self.structure, gy, x, factors, [*needs, False], self.rows)
            return [gradient for gradient in gradients if gradient is not None]
        back = None if way is None else way.back_passes(self.structure, self.rows, x.dtype)
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
        found = way.bind(self.structure, self.rows), way
        if tokens:
            self._taken[key] = found
        return found

    def _without_pointers(self, x: Tensor) -> Way:
        """Return the way for operands whose memory cannot be read by address."""
        if torch._C._get_tracing_state() is not None:  # where sizes are tensors
            return products_way
        few = self.rows and x.shape[0] * self._widest <= FEW
        return token_major_way if few else products_way


def torch_chain(structure: Structure, rows: bool = True) -> TorchChain:
    """Return the entry of a structure, made once for it."""
    return kept(structure, ("torch", rows), lambda: TorchChain(structure, rows))
