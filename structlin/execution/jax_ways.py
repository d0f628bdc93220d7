"""The ways to run a chain in jax on a CPU, and the entry that chooses one of them while a program is traced.

- ``products``: one batched product for each step, by XLA (:mod:`.products`),
- ``compiled``: the passes that are compiled for the chain, as custom calls (:mod:`.jax_cpu`),
- ``dense``: the dense matrix, made by the chain from the identity, and one product with it.

The way is chosen when jax traces the call, by the chain, the dtype and the number of tokens. A trace does not know
whether gradients follow. So the way is chosen for a forward pass, and derivatives use the same way. ``jit`` caches
traces, so the policy is that of the first call with the same shapes. Under ``vmap`` the number of tokens is that of one
example.

Estimates come from models (:mod:`.models`) at the rates of XLA on this machine, and from timings of two small chains.
These are measured once for each dtype and stored on disk. The chain itself is timed only under the policy ``measure``.
Measurements run in a separate thread, in which nothing is traced.

Programs for other devices, under a mesh, with mixed dtypes, or with symbolic numbers of tokens use single products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structlin.execution import choice, jax_cpu, models
from structlin.execution.choice import Problem, Way, register
from structlin.execution.compiled import xla
from structlin.execution.models import MEDIUM, TINY
from structlin.execution.tuning import measured
from structlin.structure import Structure

__all__ = ["JaxWay", "run"]

Array = Any


class JaxWay(models.EstimatedWay):
    """Base class of the ways of jax; it defines how a call is timed."""

    library = "jax"

    def calibration(self, problem: Problem) -> dict[str, tuple[float, float]]:
        """Return, for each way, the time of a call and the factor of the estimate."""
        return _calibrated(models.timed_dtype(problem.dtype), problem.threads, problem.train)

    def call(self, problem: Problem, tokens: int) -> Callable[[], object]:
        """Return a call of a jitted program of the chain alone; with ``problem.train`` of its gradients."""
        structure, device, rng = problem.structure, jax.devices("cpu")[0], np.random.default_rng(0)

        def normal(*shape: int, scale: float = 1.0) -> Array:
            numbers = rng.standard_normal(shape, np.float32) * scale
            return jax.device_put(numbers.astype(jnp.dtype(problem.dtype)), device)

        def forward(x: Array, bias: Array | None, *factors: Array) -> Array:
            return self.run(structure, factors, x, bias, problem.rows)

        def both(gradient: Array, *operands: Array) -> Array:
            y, back = jax.vjp(forward, *operands)
            return y, back(gradient)

        doubles = problem.dtype == "float64"
        with jax.enable_x64(doubles):
            x = normal(*((tokens, structure.d_in) if problem.rows else (structure.d_in, tokens)))
            bias = normal(structure.d_out) if problem.rows else None
            operands = [x, bias, *(normal(*f.shape, scale=1 / math.sqrt(f.fan_in)) for f in structure.factors)]
            if problem.train:
                operands.insert(0, normal(*((tokens, structure.d_out) if problem.rows else (structure.d_out, tokens))))
        program = jax.jit(both if problem.train else forward)

        def call() -> None:
            with jax.enable_x64(doubles), jax_cpu.failing():
                jax.block_until_ready(program(*operands))

        return call


class Products(JaxWay, models.ProductsWay):
    """See :class:`structlin.execution.models.ProductsWay`."""

    def run(
        self, structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool
    ) -> Array:  # fmt: skip
        return jax_cpu.single(structure, factors, x, bias, rows)


class Dense(JaxWay, models.DenseWay):
    """See :class:`structlin.execution.models.DenseWay`."""

    def run(
        self, structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool
    ) -> Array:  # fmt: skip
        transposed = jax_cpu.single(structure, factors, jnp.eye(structure.d_in, dtype=x.dtype), None, True)
        y = x @ transposed if rows else transposed.mT @ x
        return y if bias is None else y + bias


class Compiled(models.CompiledWay, JaxWay):
    """The passes that are compiled for the chain, which XLA calls (:mod:`.compiled.xla`)."""

    name = "compiled"

    def supports(self, problem: Problem) -> bool:
        return jax_cpu.chain_of(problem.structure, problem.rows).ready(problem.dtype) is not None

    def model(self, problem: Problem) -> float:
        program = jax_cpu.chain_of(problem.structure, problem.rows).given(problem.dtype)
        return sum(self.compiled(problem, program, back) for back in ((False, True) if problem.train else (False,)))

    def run(
        self, structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool
    ) -> Array:  # fmt: skip
        return jax_cpu.chain(structure, factors, x, bias, rows)


@lru_cache(maxsize=64)
def _calibrated(dtype: str, threads: int, train: bool) -> dict[str, tuple[float, float]]:
    """Return, for each way, the seconds of a call, and the ratio of measured to modelled time of a medium chain."""
    small, medium = (
        Problem(structure, True, "jax", "cpu", dtype, tokens, threads, train) for structure, tokens in (TINY, MEDIUM)
    )
    calls, busy = (measured(problem, _WAYS) for problem in (small, medium))
    return models.calibrated(calls, busy, {way.name: partial(way.model, medium) for way in _WAYS})


products_way = Products()
_WAYS: tuple[JaxWay, ...] = products_way, Compiled(), Dense()
for _way in _WAYS:
    register(_way)


def run(
    structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None = None, rows: bool = True
) -> Array:
    """Return the product, (tokens, d_in) -> (tokens, d_out) plus ``bias``, or columns."""
    operands = (x, *factors) if bias is None else (x, *factors, bias)
    way = _way_of(structure, x, rows) if jax_cpu.alone(operands, rows) else products_way
    return way.run(structure, factors, x, bias, rows)


def _way_of(structure: Structure, x: Array, rows: bool) -> Way:
    """Return the way for this number of tokens; it is chosen again after a measurement or a pin."""
    tokens, dtype = x.shape[0 if rows else 1], str(x.dtype)
    kept = structure._kept.setdefault(("jax_ways", rows), {})
    key = dtype, choice.bucket(tokens), xla.threads(), choice.policy_text(), choice.generation()
    if key not in kept:
        problem = Problem(structure, rows, "jax", "cpu", dtype, choice.bucket(tokens), xla.threads(), False)
        way = _untraced(lambda: choice.choose(problem))
        for old in [old for old in kept if old[-1] != choice.generation()]:
            kept.pop(old, None)
        kept[(*key[:-1], choice.generation())] = way  # which measuring has changed
        return way
    found: Way = kept[key]
    return found


def _untraced(function: Callable[[], Way]) -> Way:
    """Call a function in another thread, where jax does not trace, with the policy of this thread."""
    choice.ways("jax")  # imports are made here
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, function).result()
