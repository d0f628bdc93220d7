"""Timings of the ways for a problem, or for all problems that occur in a model."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from structlin._arrays import ops
from structlin.execution import choice, rates, wisdom
from structlin.execution.choice import Problem, Way
from structlin.execution.devices import Device
from structlin.execution.machine import caches
from structlin.execution.race import race
from structlin.structure import Structure

__all__ = ["clear_wisdom", "explain", "import_wisdom", "measure", "measured", "problem_of", "tune"]

BUDGET = 0.6  # seconds (:func:`.race.race`)
# A problem whose best estimate exceeds LONGEST seconds is timed with fewer tokens, but at least ENOUGH_TOKENS, beyond
# which the time of a token does not change.
LONGEST, ENOUGH_TOKENS = 0.25, 2048


def measure(problem: Problem, among: Sequence[Way] | None = None, *, keep: bool = False) -> dict[str, float]:
    """Time the ways for a problem on random operands, and store the result (:mod:`.wisdom`).

    All ways run in turns on the same operands. The state of torch's generators does not change. A way that raises
    MemoryError or RuntimeError is omitted.

    Parameters
    ----------
    problem
        The problem (:func:`problem_of`).
    among
        Ways to time; default all that can run the problem.
    keep
        If True, existing timings are returned and not replaced.

    Returns
    -------
    dict[str, float]
        Seconds by the name of the way.

    Raises
    ------
    ValueError
        If no way can run the problem.
    """
    among = [c.way for c in choice.candidates(problem)] if among is None else list(among)
    kept: dict[str, float] = wisdom.write(problem.key, _race(problem, among, BUDGET), keep=keep)
    choice.forget()
    return kept


def measured(problem: Problem, among: Sequence[Way]) -> dict[str, float]:
    """Return the timings of a problem; those of ``among`` that can run it are measured if there are fewer."""
    able, known = [way for way in among if way.supports(problem)], choice.timings(problem)
    return known if len(known) >= len(able) else measure(problem, able, keep=True)


def _race(problem: Problem, among: Sequence[Way], budget: float, cold: bool = False) -> dict[str, float]:
    """Return the seconds of ways, which run in turns.

    ``cold``: before each call, other data replace those in the second level of cache, as other layers do in a model.
    """
    tokens = problem.tokens
    if tokens > ENOUGH_TOKENS:
        estimated = min((way.seconds(problem) for way in among), default=0.0)
        while tokens > ENOUGH_TOKENS and estimated * tokens / problem.tokens > LONGEST:
            tokens //= 2
    calls = {}
    for way in among:
        call = _call(problem, way, tokens)
        try:
            call()
        except (MemoryError, RuntimeError):
            continue
        calls[way.name] = call
    if not calls:
        raise ValueError(f"no way can run {problem.key}")
    now = rates.clock(problem.threads, problem.library, problem.device)
    other_data = np.zeros(2 * caches().l2 if cold else 0, np.uint8)
    found = race(calls, now, budget, partial(np.add, other_data, 1, out=other_data))
    return {name: seconds * problem.tokens / tokens for name, seconds in found.items()}


def _compare(problem: Problem, among: Sequence[Way]) -> dict[str, float]:
    """Time a few ways in less time, and store the result."""
    return choice.record_of(
        problem.key, [way.name for way in among], lambda: _race(problem, among, choice.QUICK, cold=True)
    )


choice.measurers[:] = [lambda problem, ways: measure(problem, ways)]
choice.comparers[:] = [_compare]


def _call(problem: Problem, way: Way, tokens: int) -> Callable[[], object]:
    """Return a call of a way on random operands, with its backward pass if the problem has one."""
    if problem.library != "torch":
        return way.call(problem, tokens)
    import torch

    from structlin.execution._guard import apart

    structure, device, kind = problem.structure, problem.device, getattr(torch, problem.dtype)
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        wide = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (wide * scale).to(kind).requires_grad_(problem.train)

    with apart(problem.train, device):
        factors = [normal(*f.shape, scale=1 / math.sqrt(f.fan_in)) for f in structure.factors]
        x = normal(*((tokens, structure.d_in) if problem.rows else (structure.d_in, tokens)))
        bias = normal(structure.d_out) if problem.rows else None
        given = [x, *factors] if bias is None else [x, *factors, bias]
        shape = (tokens, structure.d_out) if problem.rows else (structure.d_out, tokens)
        gradient = normal(*shape).detach()

    def call() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(problem.threads)
        try:
            with apart(problem.train, device):
                y = way.run(structure, factors, x, bias, problem.rows)
                if problem.train:
                    torch.autograd.grad(y, given, gradient)
            if device == "cuda":
                torch.cuda.synchronize()
        finally:
            torch.set_num_threads(threads)

    return call


def tune(
    run: Callable[[], object] | Iterable[Problem], *, progress: bool = True
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Measure the ways for all problems of a computation, and keep the timings for later processes on this machine.

    Parameters
    ----------
    run
        A function that runs the computation once (a forward pass, or a whole training step), or problems. The function
        is called once, and the problems that occur in it are timed.
    progress
        Show a progress bar (tqdm).

    Returns
    -------
    dict[str, dict[str, float]]
        Seconds by way for each problem.

    Examples
    --------
    >>> import torch, structlin
    >>> from structlin_nn.torch import StructuredLinear
    >>> layer = StructuredLinear(64, 48, structure="monarch", blocks=4)
    >>> found = tune(lambda: layer(torch.ones(32, 64)).sum().backward(), progress=False)
    >>> [sorted(ways)[0] for ways in found.values()]
    ['batched']
    """
    problems = list(_met(run)) if callable(run) else list(run)
    bar: Any = problems
    if progress:
        from tqdm import tqdm

        bar = tqdm(problems, desc="tune", unit="problem")
    found = {}
    for problem in bar:
        found[problem.key] = (
            measure(problem) if isinstance(problem, Problem) else wisdom.write(problem.key, problem.measure())
        )
        gc.collect()  # frees compiled code of ways that are not chosen
    return found


def _met(run: Callable[[], object]) -> list[Problem]:
    with choice.recording() as met:
        run()
    return list(dict.fromkeys(met))


def import_wisdom(path: str | os.PathLike[str], *, any_machine: bool = False) -> int:
    """Import the records of a file that :func:`export_wisdom` wrote, and return their number.

    Existing records are replaced, and all choices are made again.

    Parameters
    ----------
    path
        File to read.
    any_machine
        Accept records of another processor, or of other versions of the libraries.

    Raises
    ------
    ValueError
        If the file is damaged or not an export, or is from another machine and ``any_machine`` is false.
    """
    count = wisdom.import_wisdom(path, any_machine=any_machine)
    choice.forget_measured()
    return count


def clear_wisdom() -> int:
    """Delete all measurements of this processor, and return the number of deleted files. Choices are made again."""
    count = wisdom.clear()
    choice.forget_measured()
    return count


def problem_of(
    structure: Structure, tokens: int, *, dtype: str = "float32", train: bool = True, threads: int | None = None,
    rows: bool = True, library: str = "torch", device: str = "cpu",
) -> Problem:  # fmt: skip
    """Return the problem of a call.

    Parameters
    ----------
    structure
        A chain.
    tokens
        Number of vectors; it is rounded up to a power of two.
    dtype, train, rows, library, device
        As in :class:`Problem`.
    threads
        Default: the number of threads that the library uses.

    Raises
    ------
    TypeError
        If the structure is not a chain of einsums, or ``tokens`` is not an integer.
    ValueError
        If ``tokens`` is below 1, or for a library without ways.
    """
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be a chain of einsums (structlin.Structure), got {type(structure).__name__}")
    if isinstance(tokens, bool) or not hasattr(tokens, "__index__"):
        raise TypeError(f"tokens must be an integer, the number of vectors, got {tokens!r}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    ops(library)
    if library == "numpy":
        raise ValueError("products of NumPy arrays always run by single steps, without a choice: write torch or jax")
    if library == "jax":
        from structlin.execution.compiled.xla import threads as threads_of_xla

        threads = threads_of_xla() if threads is None else threads
    elif threads is None:
        import torch

        threads = torch.get_num_threads()
    return Problem(structure, rows, library, device, dtype, choice.bucket(tokens), threads, train)


def explain(
    what: Any, tokens: int, *, dtype: str | None = None, train: bool | None = None, threads: int | None = None,
    library: str | None = None, on: str | Device | None = None,
) -> str:  # fmt: skip
    """Return which way runs a structure, operator or layer, and why, with estimated and measured times of all ways.

    An operator multiplies columns (``A @ X``), a layer multiplies rows.

    Parameters
    ----------
    what
        A :class:`structlin.Structure`, or an object with an attribute ``structure`` (an operator, a layer).
    tokens
        Number of vectors; timings are kept for the next power of two.
    dtype
        Default: the dtype of the factors, or float32.
    train
        Include the backward pass. Default: True, but for an operator whether a factor requires a gradient.
    threads
        Default: the number of threads that the library uses.
    library
        ``torch`` or ``jax``; choices for jax are made for forward passes (``train=False``). Default: the library of an
        operator, or torch. Products of NumPy operators run by single steps, without a choice.
    on
        A GPU, by its name in :data:`structlin.execution.devices.DEVICES` or as
        :class:`structlin.execution.devices.Device`. It need not be present: kernels, bytes and times of torch's ways
        are predicted without a bias (:mod:`structlin.execution.traffic`).

    Raises
    ------
    TypeError
        If ``what`` neither is nor has a chain of einsums, or ``tokens`` is not an integer.
    ValueError
        If ``tokens`` is below 1, for an unknown GPU, or for ``on`` with another library than torch.

    Examples
    --------
    >>> import structlin
    >>> print(explain(structlin.design("monarch", (48, 40), blocks=4), 64, threads=1).splitlines()[0])
    pa,pqa->pq; gl,log->lo p=4,a=10,q=10,g=10,l=4,o=12 48x40 rows torch cpu float32 tokens=64 threads=1 train
    """
    structure = what if isinstance(what, Structure) else getattr(what, "structure", what)
    factors = [f for f in getattr(what, "factors", ()) if hasattr(f, "dtype")]
    backend = getattr(what, "backend", None)  # which operators have
    rows = backend is None
    train = rows or any(getattr(f, "requires_grad", False) for f in factors) if train is None else train
    dtype = dtype or (str(factors[0].dtype).removeprefix("torch.") if factors else "float32")
    make = partial(problem_of, structure, tokens, dtype=dtype, train=train, rows=rows)
    if on is not None:
        if library not in (None, "torch"):
            raise ValueError(f"traffic on a GPU is predicted for torch, got library={library!r}")
        from structlin.execution.traffic import explained

        return explained(make(threads=1, device="cuda"), on)
    library = library or backend or "torch"
    if library == "numpy":
        make(threads=1)  # checks the arguments
        return (
            "NumPy: products run by single steps, one batched product for each step of the chain; no other way exists"
        )
    device = getattr(getattr(factors[0], "device", None), "type", "cpu") if factors and library == "torch" else "cpu"
    return choice.table(make(threads=threads, library=library, device="cpu" if device == "meta" else device))
