"""The registered ways to run a chain, and the choice between them.

A :class:`Problem` describes a call: a chain, the library of the arrays, their dtype and device, the number of tokens
(rounded up to a power of two), the number of threads, and whether a backward pass follows. The choice is made once for
each problem. The first of these that exists decides:

1. the way that a resumed run has pinned (:func:`pin`);
2. the least time that ``measure`` or :func:`structlin.execution.tune` recorded for the problem (:mod:`.wisdom`);
3. with the policy ``measure``, the least of the times that are measured now;
4. with the policy ``compare``, for calls of torch on a CPU that take a quarter of a millisecond or more: the least of a
   few timings of the ways whose estimates are close to the least one, which are recorded too;
5. the least estimate, computed from rates of the machine that were measured once (:mod:`.rates`).

The policy is ``compare`` (the default), ``estimate``, ``measure``, or names of ways in order of preference. A minus in
front of a name excludes it: ``"-compiled"`` compares the other ways. :func:`using` sets the policy; otherwise the
environment variable ``STRUCTLIN_EXECUTION`` does. ``"-compiled"`` excludes all ways of that group, ``"-block"`` all
passes over several layers (:mod:`.blocks`), and ``"-kept"`` those that store hidden features for the backward pass.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

from structlin._arrays import Array
from structlin.execution import machine, wisdom
from structlin.structure import Structure

__all__ = ["Policy", "Problem", "Way", "choose", "decisions", "pin", "recording", "register", "using", "ways"]

MODES = ("compare", "estimate", "measure")
DEFAULT = "compare"
# `compare` times ways if the least estimate is at least WORTH seconds. It times those with at most FAR times the least
# estimate. Compiled ways must be among the MOST of least estimate, with at most CLOSE times the least one, because
# compilation takes longer than timing. The fastest way had up to 1.6 times the least estimate in float32, and 3.4 times
# in bfloat16 (benchmarks/layers.py --ways).
CLOSE, FAR, MOST, WORTH = 2.0, 4.0, 5, 2.5e-4
COMPARED = "the least time of those compared"
QUICK = 0.25  # seconds in which `compare` times alternatives, beside their first calls
BLOCK = "block"
"""Name of passes over several layers; the policy ``-block`` excludes them."""
KEPT = "kept"
"""End of the names of those that store hidden features for the backward pass; the policy ``-kept`` excludes them."""


@dataclass(frozen=True)
class Problem:
    """A call to run; :func:`structlin.execution.problem_of` makes one.

    Attributes
    ----------
    structure
        The chain.
    rows
        Whether vectors are the rows of a (tokens, d_in) array, instead of columns.
    library, device, dtype
        ``torch`` or ``jax``, ``cpu`` or ``cuda``, and the name of the dtype, such as ``float32``.
    tokens
        Number of vectors, a power of two.
    threads
        Number of threads.
    train
        Whether a backward pass follows.
    """

    structure: Structure
    rows: bool
    library: str
    device: str
    dtype: str
    tokens: int
    threads: int
    train: bool

    @cached_property
    def key(self) -> str:
        """The problem as text: the name of its records."""
        chain = "; ".join(map(str, self.structure.steps))
        sizes = ",".join(f"{axis}={size}" for axis, size in self.structure.sizes)
        ends = "rows" if self.rows else "columns"
        kind = "train" if self.train else "forward"
        device = f"cuda {machine.gpu()}".rstrip() if self.device == "cuda" else self.device  # timings are of one GPU
        return (
            f"{chain} {sizes} {self.structure.d_out}x{self.structure.d_in} {ends} {self.library} {device} "
            f"{self.dtype} tokens={self.tokens} threads={self.threads} {kind}"
        )


class Way(ABC):
    """A way to run a chain. To add a way, write a subclass in its own module and :func:`register` an instance.

    Attributes
    ----------
    name
        Name in policies and tables.
    library
        Library of the arrays.
    explicit
        If True, the way is chosen only if a policy names it.
    group
        Name by which a policy excludes this way together with others.
    """

    name: str
    library: str = "torch"
    explicit: bool = False
    group: str = ""

    @abstractmethod
    def supports(self, problem: Problem) -> bool:
        """Whether the way can run the problem correctly."""

    @abstractmethod
    def seconds(self, problem: Problem) -> float:
        """Return an estimate of the seconds of a call, with the backward pass if ``problem.train``."""

    def least(self, problem: Problem) -> float:
        """Return a lower bound of :meth:`seconds` that needs no measurement; it can exclude the way."""
        return 0.0

    @abstractmethod
    def run(self, structure: Structure, factors: Any, x: Array, bias: Array | None, rows: bool) -> Array:
        """Return the product, (tokens, d_in) -> (tokens, d_out), or that of columns; ``bias`` is added to rows.

        Operands on a CPU have memory that may be read by address: other tensors are left to the ways of this library.
        """

    def bind(self, structure: Structure, rows: bool) -> Callable[[Array, Any, Array | None], Array]:
        """Return the way for one structure as a function of the contiguous input, factors and bias."""
        return lambda x, factors, bias: self.run(structure, factors, x, bias, rows)

    def call(self, problem: Problem, tokens: int) -> Callable[[], object]:
        """Return a call on random operands to time, with gradients if ``problem.train``. Ways of torch do not need it.

        ValueError for a way that cannot be timed.
        """
        raise ValueError(f"the way {self.name!r} of {self.library} is not timed")

    def back_passes(self, structure: Structure, rows: bool, dtype: Any) -> Any:
        """Return the backward pass (:class:`structlin.execution.torch_cpu.Passes`); None if autograd derives it."""
        return None


_WAYS: dict[tuple[str, str], Way] = {}
_loaders: list[Callable[[bool], None]] = []
_derived: list[Callable[[], None]] = []
measurers: list[Callable[[Problem, list[Way]], dict[str, float]]] = []
"""The function that times all ways for a problem; :mod:`.tuning` sets it."""
comparers: list[Callable[[Problem, list[Way]], dict[str, float]]] = []
"""The function that times a few ways for a problem in fewer rounds."""
_generation = 0  # increases with each registration, pin and timing; earlier choices are then made again


def register(way: Way) -> Way:
    """Add a way, and return it.

    Raises
    ------
    ValueError
        If the library has a way of this name, or the name is a mode or contains other characters than letters, digits,
        ``-`` and ``_``.
    """
    if (way.library, way.name) in _WAYS:
        raise ValueError(f"a way of {way.library} named {way.name!r} is already registered; choose another name")
    if way.name in MODES or not way.name.replace("-", "").replace("_", "").isalnum() or way.name.startswith("-"):
        raise ValueError(f"a way needs a name of letters and digits other than {', '.join(MODES)}, got {way.name!r}")
    _WAYS[way.library, way.name] = way
    forget()
    return way


def load_with(loader: Callable[[bool], None]) -> None:
    """Register a function that imports the modules of ways; it is called before ways are looked up.

    ``loader(True)`` imports the ways of all installed libraries, ``loader(False)`` those of libraries that the process
    has imported.
    """
    _loaders.append(loader)


def _load(every: bool = False) -> None:
    for loader in _loaders:
        loader(every)


def measured_with(clear: Callable[[], None]) -> None:
    """Register a function that empties a cache of values derived from measurements; it is called when they change."""
    _derived.append(clear)


def forget_measured() -> None:
    """Discard cached measurements and choices, so that both are read or made again."""
    for clear in _derived:
        clear()
    forget()


def forget() -> None:
    """Discard all choices; each is made again when it is next needed."""
    global _generation
    _generation += 1


def generation() -> int:
    """Return a counter that increases whenever choices are discarded."""
    return _generation


def ways(library: str) -> list[Way]:
    """Return all ways of a library in the order of registration."""
    _load()
    return [way for (of, _), way in _WAYS.items() if of == library]


# -- policy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A policy: ``mode`` is one of :data:`MODES`, ``names`` are preferred, and ``without`` are excluded."""

    mode: str = DEFAULT
    names: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@lru_cache(maxsize=64)
def policy_of(text: str) -> Policy:
    """Read a policy such as ``"measure"``, ``"compiled,chunked"`` or ``"measure,-dense"``.

    Raises ValueError for a name that no library has.

    Examples
    --------
    >>> policy_of("measure,-dense")
    Policy(mode='measure', names=(), without=('dense',))
    """
    _load()
    words = [word.strip() for word in text.split(",")]
    known = {name for _, name in _WAYS} | {BLOCK, KEPT}
    if not {word.removeprefix("-") for word in words} <= known | set(MODES):
        _load(every=True)
        known = {name for _, name in _WAYS} | {BLOCK, KEPT}
    mode = DEFAULT
    names: list[str] = []
    without: list[str] = []
    for word in words:
        if word in MODES:
            mode = word
        elif word.removeprefix("-") in known and word not in (BLOCK, KEPT):
            (without if word.startswith("-") else names).append(word.removeprefix("-"))
        else:
            raise ValueError(
                f"execution {text!r}: {word!r} is neither a mode ({', '.join(MODES)}) nor a way "
                f"({', '.join(sorted(known))}); separate names by commas, and exclude a way by a minus in front of it"
            )
    return Policy(mode, tuple(names), tuple(without))


_POLICY: ContextVar[str | None] = ContextVar("structlin_execution", default=None)


def own_policy() -> str | None:
    """Return the policy of the enclosing ``with`` statement; the environment is read when a problem is first met."""
    return _POLICY.get()


def policy_text() -> str:
    """Return the policy in force, as text."""
    text = _POLICY.get()
    return os.environ.get("STRUCTLIN_EXECUTION", DEFAULT) if text is None else text


@contextmanager
def using(policy: str) -> Iterator[None]:
    """Set the policy within a ``with`` statement, for this thread or task.

    Parameters
    ----------
    policy
        ``compare``, ``estimate``, ``measure``, or names of ways in order of preference, separated by commas. A minus
        in front of a name excludes it. :mod:`structlin.execution.choice` describes the policies.

    Raises
    ------
    ValueError
        If a word is neither a mode nor the name of a way.

    Examples
    --------
    >>> with using("products"):
    ...     pass
    """
    policy_of(policy)
    token = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(token)


# -- the choice --------------------------------------------------------------------------------------------------------

_pinned: dict[str, str] = {}
_made: dict[str, tuple[str, str]] = {}  # text of each problem: text of its structure, and the way
_recordings: list[list[Any]] = []  # lists of the problems and other choices that occurred


@dataclass(frozen=True)
class Candidate:
    """A way for a problem, with estimated and measured seconds (None if not measured)."""

    way: Way
    estimated: float
    measured: float | None = None


def bucket(tokens: int) -> int:
    """Return the least power of two that is not below a number of tokens."""
    return 1 << max(0, tokens - 1).bit_length()


def candidates(problem: Problem, policy: Policy | None = None, *, within: float = math.inf) -> list[Candidate]:
    """Return the ways that can run a problem, sorted by estimate.

    Ways whose lower bound exceeds ``within`` times the least estimate may be omitted.
    """
    policy, timed = policy or Policy(), timings(problem)
    found: list[Candidate] = []
    best = math.inf
    for way in sorted(ways(problem.library), key=lambda way: way.least(problem)):
        left_out = way.name in policy.without or way.group in policy.without
        if left_out or (way.explicit and way.name not in policy.names):
            continue
        if way.least(problem) > within * best:
            break
        if way.supports(problem):
            found.append(Candidate(way, way.seconds(problem), timed.get(way.name)))
            best = min(best, found[-1].estimated)
    return sorted(found, key=lambda c: c.estimated)


def record_of(key: str, names: Iterable[str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the timings of some alternatives from disk, or measure and store them.

    If several processes measure at the same time, such as the ranks of a run, all use the record that was written
    first.
    """
    key = f"{key} among {', '.join(sorted(names))}"
    found = timings_of(key)
    return found or wisdom.write(key, measure(), keep=True)


def timings(problem: Problem) -> dict[str, float]:
    """Return the seconds of each way that was measured for a problem."""
    return timings_of(problem.key)


def timings_of(key: str) -> dict[str, float]:
    """Return the same by the text of the problem."""
    found = wisdom.read(key)
    return dict(found) if isinstance(found, Mapping) else {}


def choose(problem: Problem) -> Way:
    """Return the way for a problem; it is the same until a way is registered, pinned or measured."""
    policy = policy_of(policy_text())
    way = _choose(problem, policy)[0]
    _made[problem.key] = repr(problem.structure), way.name
    for met in _recordings:
        met.append(problem)
    return way


def _choose(problem: Problem, policy: Policy) -> tuple[Way, str]:
    """Return the way, and the reason."""
    for name, why in (
        (_pinned.get(problem.key), "pinned by the run that is resumed"),
        *((name, f"named by the policy {policy_text()!r}") for name in policy.names),
    ):
        way = _WAYS.get((problem.library, name or ""))
        if way is not None and way.supports(problem):
            return way, why
    every = policy.mode == "measure" or timings(problem)
    within = math.inf if every else 1.0 if policy.mode == "estimate" else FAR
    found = candidates(problem, policy, within=within)
    if not found:
        raise ValueError(f"policy {policy_text()!r} leaves no way to run {problem.key}")
    if len(found) == 1:
        return found[0].way, "no other way can run it"
    timed = [c for c in found if c.measured is not None]
    if len(timed) < 2 and policy.mode == "measure":
        measured = measurers[0](problem, [c.way for c in found])
        timed = [replace(c, measured=measured[c.way.name]) for c in found if c.way.name in measured]
    if len(timed) > 1:
        best = min(timed, key=lambda c: c.measured or 0.0)
        return best.way, "the least measured time"
    if policy.mode == "compare" and (compared := _compared(problem, found)):
        return min(found, key=lambda c: compared.get(c.way.name, math.inf)).way, COMPARED
    return found[0].way, "the least estimate"


def _compared(problem: Problem, found: list[Candidate]) -> dict[str, float]:
    """Return the seconds of the ways with estimates close to the least; empty if there is one way or calls are short.

    jax is excluded because XLA would compile each way, and CUDA because a call may be captured in a graph.
    """
    least = found[0].estimated
    close = [
        c.way for place, c in enumerate(found)
        if c.estimated <= (FAR if c.way.group != "compiled" else CLOSE if place < MOST else 0.0) * least
    ]  # fmt: skip
    if len(close) < 2 or least < WORTH or (problem.library, problem.device) != ("torch", "cpu"):
        return {}
    return comparers[0](problem, close)


def way_of(problem: Problem) -> Way:
    """Return the way that :func:`choose` would take, without an entry in :func:`decisions`."""
    return _choose(problem, policy_of(policy_text()))[0]


class Alternatives(Protocol):
    """A choice between named alternatives, made by the same rules as the choice of a way."""

    @property
    def key(self) -> str:
        """Text that identifies the choice."""

    @property
    def structure(self) -> Structure:
        """The structure under which :func:`decisions` lists the choice."""

    @property
    def without(self) -> str:
        """The alternative that the policy ``-block`` takes."""

    def able(self) -> Collection[str]:
        """Return the alternatives that can run under the policy in force."""

    def estimate(self) -> str:
        """Return the alternative to take without measurements."""

    def close(self) -> list[str]:
        """Return the alternatives to time under the policy ``compare``; none if the estimate decides."""

    def measure(self, names: list[str] | None = None, budget: float = 0.6) -> dict[str, float]:
        """Return the seconds of alternatives, by default of all; ``budget``: as in :func:`.race.race`."""


def settle(question: Alternatives) -> str:
    """Return the chosen alternative: pinned by a resumed run, fastest as measured, or estimated."""
    policy, key = policy_of(policy_text()), question.key
    name = question.without if BLOCK in policy.without else _pinned.get(key)
    if name is not None:
        name = name.removesuffix(KEPT) if KEPT in policy.without else name
        name = name if name in question.able() else question.without
    if name is None and policy.names:
        name = question.estimate()  # names of a policy are those of ways for chains
    if name is None:
        timed = timings_of(key)
        if question.estimate() not in timed:  # of an earlier state, or measured with other alternatives excluded
            timed = {}
        if not timed and policy.mode == "measure":
            timed = wisdom.write(key, question.measure())
        if KEPT in policy.without:
            able = question.able()
            timed = {one: seconds for one, seconds in timed.items() if one in able}
        if not timed and policy.mode == "compare" and (close := question.close()):
            timed = record_of(key, close, lambda: question.measure(close, QUICK))
        name = min(timed, key=lambda one: timed[one]) if timed else question.estimate()
    _made[key] = repr(question.structure), name
    for met in _recordings:
        met.append(question)
    return name


@contextmanager
def recording() -> Iterator[list[Any]]:
    """Return a list to which each problem that occurs within a ``with`` statement is added."""
    met: list[Any] = []
    forget()  # so that choices for known problems are made again
    _recordings.append(met)
    try:
        yield met
    finally:
        _recordings[:] = [other for other in _recordings if other is not met]


def decisions(structures: Collection[Structure] | None = None) -> dict[str, str]:
    """Return the choices of this process so far: the name of the way by the text of the problem.

    A run stores them in its record and its checkpoints; :func:`pin` makes the same choices again.

    Parameters
    ----------
    structures
        Return only the problems of these structures.
    """
    wanted = None if structures is None else {repr(structure) for structure in structures}
    return {key: way for key, (of, way) in sorted(_made.items()) if wanted is None or of in wanted}


def pin(chosen: Mapping[str, str]) -> None:
    """Make the choices that :func:`decisions` returned, so that a resumed run is bit-identical.

    If a way does not exist on this machine, the choice is made as usual.

    Raises
    ------
    ValueError
        If an entry does not map the text of a problem to the name of a way.
    """
    for key, name in chosen.items():
        if not isinstance(key, str) or not isinstance(name, str):
            raise ValueError(f"decisions must map the text of a problem to the name of a way, got {key!r}: {name!r}")
    _pinned.update(chosen)
    forget()


def table(problem: Problem) -> str:
    """Return a table of the ways for a problem, with estimated and measured times, the choice and its reason."""
    policy = policy_of(policy_text())
    taken, why = _choose(problem, policy)
    rows, found = [("way", "estimated", "measured", "")], candidates(problem, policy)
    compared = _compared(problem, found) if why == COMPARED else {}
    for c in found:
        seconds = compared.get(c.way.name, c.measured)
        measured = "-" if seconds is None else _time(seconds)
        rows.append((c.way.name, _time(c.estimated), measured, f"<- {why}" if c.way is taken else ""))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    table = [
        f"{row[0].ljust(widths[0])}  {row[1].rjust(widths[1])}  {row[2].rjust(widths[2])}  {row[3]}".rstrip()
        for row in rows
    ]
    return "\n".join([problem.key, *table])


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
