"""Models of the time of ways: products and copies at the rates of a machine (:mod:`.rates`), without calls.

They do not depend on an array library. Two timings of each way correct its model (:func:`calibrated`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace

from structlin.execution.choice import Problem, Way
from structlin.execution.compiled._program import Program
from structlin.execution.compiled._rules import shares
from structlin.execution.machine import caches
from structlin.execution.products import Product, plan_of
from structlin.execution.rates import Rates, rates
from structlin.structure import Structure

__all__ = [
    "BYTES",
    "COMPILING",
    "LARGE",
    "MEDIUM",
    "PASSES",
    "TINY",
    "CompiledWay",
    "DenseWay",
    "EstimatedWay",
    "ProductsWay",
    "calibrated",
    "is_large",
    "timed_dtype",
]

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
COMPILING = 0.15 / 10_000  # seconds that LLVM takes for a pass, for each of the calls in which they are to be won back
MOST_BYTES = 1 << 28  # of a dense matrix: a quarter of a gigabyte, beside which nothing here is large
PASSES = 3  # products of a training step for each one of the forward pass
# A chain whose products take no time beside its calls, and one of medium size, each with a number of tokens: large
# enough for the rate to be that of larger ones, and small enough for all its ways to be timed in a tenth of a second.
TINY = Structure.parse("pa,pfa->fp; fp,fep->fe", p=4, a=4, f=4, e=4), 1
MEDIUM = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=16, a=16, f=16, r=2, e=16), 256
# One whose activation between the products has 8 MB in float32: more than the second level of cache holds.
LARGE = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=32, a=32, f=32, r=4, e=32), 512


class EstimatedWay(Way):
    """A way whose time is estimated from a model, and from timings of two small chains (:func:`calibrated`)."""

    @abstractmethod
    def model(self, problem: Problem) -> float:
        """Return the seconds of products and copies, without calls."""

    @abstractmethod
    def calibration(self, problem: Problem) -> Mapping[str, tuple[float, float]]:
        """Return the results of :func:`calibrated` for the ways of this library."""

    def rates(self, problem: Problem) -> Rates:
        """Return the measured rates of this machine for a problem."""
        return rates(timed_dtype(problem.dtype), problem.threads, self.library)

    def seconds(self, problem: Problem) -> float:
        """Estimate the time of a problem in seconds."""
        call, factor = self.calibration(problem).get(self.name, (self.rates(problem).call, 1.0))
        return call * len(problem.structure.steps) / len(TINY[0].steps) + factor * self.model(problem)


class ProductsWay(EstimatedWay):
    """One batched product for each step, activations between them with the tokens innermost (:mod:`.products`)."""

    name = "products"

    def supports(self, problem: Problem) -> bool:
        """Return True: single products run every chain."""
        return True

    def model(self, problem: Problem) -> float:
        """Return the seconds of products and copies, without calls."""
        return products(problem, self.rates(problem))


class DenseWay(EstimatedWay):
    """The dense matrix, made by the chain from the identity, and one product with it.

    It is faster if the products of the chain run at a much lower rate than a dense one.
    """

    name = "dense"

    def supports(self, problem: Problem) -> bool:
        """Whether the dense matrix is small enough to be made."""
        item, structure = BYTES.get(problem.dtype), problem.structure
        if problem.device not in ("cpu", "cuda") or item is None:
            return False
        return structure.d_in * structure.d_out * item <= MOST_BYTES

    def model(self, problem: Problem) -> float:
        """Return the seconds of making the matrix by the chain from the identity, and of one product with it."""
        structure, found = problem.structure, self.rates(problem)
        wide = replace(problem, rows=True, tokens=structure.d_in)
        product = found.product(1, structure.d_in, structure.d_out, problem.tokens, rows=problem.rows)
        return products(wide, found) + product * (PASSES if problem.train else 1)


class CompiledWay(EstimatedWay):
    """A way whose passes are compiled. The time of LLVM is divided among some calls."""

    most = 4  # times the speed of products in float32, at most: of pairs, and if the calibration was slow

    def compilations(self, problem: Problem) -> int:
        """Return the number of passes that are compiled for a problem."""
        return 2 if problem.train else 1

    def wide(self, problem: Problem) -> Rates:
        """Return the rates of the dtype that the passes compute in."""
        return rates("float64" if problem.dtype == "float64" else "float32", problem.threads, self.library)

    def least(self, problem: Problem) -> float:
        """Return a lower bound of the time in seconds."""
        macs = problem.structure.macs * problem.tokens * (PASSES if problem.train else 1)
        return self.compilations(problem) * COMPILING + macs * self.wide(problem).fastest / self.most

    def seconds(self, problem: Problem) -> float:
        """Estimate the time of a problem in seconds."""
        return self.compilations(problem) * COMPILING + super().seconds(problem)

    def compiled(self, problem: Problem, program: Program, back: bool, slices: int = 0) -> float:
        """Return the seconds of a compiled pass: its instructions at the rate of those of a dense product.

        If the factors do not fit into cache, they are also read for each block of tokens. With ``slices`` that fit, the
        input or the output is read for each slice instead.
        """
        found = self.wide(problem)
        cost = program.schedule.back_cost if back else program.schedule.cost
        instruction = program.lanes * found.fastest * problem.threads  # seconds, on one thread
        threads = shares(problem.tokens, problem.threads, problem.structure.macs)
        numbers = problem.structure.num_params
        touched = 3 if back else 1  # the factors are read, and their gradients read and written
        busy = problem.tokens * cost * instruction
        if slices:
            busy += problem.tokens * (slices - 1) * min(problem.structure.d_in, problem.structure.d_out) * found.run
        elif numbers * BYTES[problem.dtype] > caches().l2:
            busy += touched * numbers * found.read * problem.tokens / program.block
        return busy / threads + touched * numbers * found.run


def timed_dtype(dtype: str) -> str:
    """Return the dtype whose rates are used for ``dtype``."""
    return dtype if dtype in BYTES else "float32"


def is_large(problem: Problem) -> bool:
    """Whether the widest activation has more bytes than the second level of cache holds twice.

    Not in float16, in which a large chain takes CPUs too long to be timed in advance.
    """
    if problem.dtype == "float16":
        return False
    factors, steps = problem.structure.factors, problem.structure.steps
    widest = max(f.blocks * f.fan_out * f.carried for f in factors[:-1]) if len(steps) > 1 else problem.structure.d_out
    return widest * problem.tokens * BYTES.get(problem.dtype, 8) > 2 * caches().l2


def products(problem: Problem, found: Rates) -> float:
    """Return the seconds of one batched product for each step with the tokens innermost (:mod:`.products`)."""
    tokens, plan = problem.tokens, plan_of(problem.structure, problem.rows)
    total, number = 0.0, 0
    for step in plan.steps:
        moved = step.arrange if isinstance(step, Product) else step
        permuted = moved.order != tuple(range(len(moved.order)))
        if permuted and number:  # the first product reads the input where it is
            numbers = math.prod(n for n in moved.view if n) * tokens
            total += numbers * found.run + 2 * fresh(problem, found, numbers)
        if isinstance(step, Product):
            total += found.product(step.blocks, step.fan_in, step.fan_out, step.carried * tokens, rows=step.rows_in)
            number += 1
    ends = problem.structure.d_out * tokens  # a bias is added by an operation of its own
    total += ends * found.run + fresh(problem, found, ends)
    return total * (PASSES if problem.train else 1)


def fresh(problem: Problem, found: Rates, numbers: int) -> float:
    """Return the additional seconds of an array that does not fit into cache, because it uses new memory pages.

    The result is 0 up to the size of the second level of cache, full from that of the third one, and partial between.
    """
    size, near, far = numbers * BYTES.get(problem.dtype, 8), caches().l2, caches().l3
    part = math.log(max(size, near) / near) / math.log(far / near) if far > near else float(size > far)
    return numbers * found.fresh * min(1.0, part)


def calibrated(
    small: Mapping[str, float], medium: Mapping[str, float], model: Mapping[str, Callable[[], float]]
) -> dict[str, tuple[float, float]]:
    """Return, for each way, the seconds of a call, and the ratio of its measured to its modelled time.

    ``small`` and ``medium`` are the measured seconds of each way for the chains :data:`TINY` and :data:`MEDIUM`.
    ``model`` has the modelled seconds for the latter.
    """
    found = {}
    for name in model:
        if name in small and name in medium:
            call = small[name]
            busy = max(medium[name] - call, 0.1 * medium[name])  # some of the call may be hidden
            found[name] = call, busy / model[name]()
    return found
