"""The structure of a matrix: an ordered chain of einsums of two operands, from which all other quantities follow.

A chain is applied to an activation. Each step contracts the activation with one factor. The roles of the axes (see
:class:`Step`) determine the fans and the number of blocks of the factor, the parameters, the multiply-accumulates, the
transpose, and the scale at which the factor is initialised. The order of the steps is part of the structure.

A structure is data. It holds no arrays, it is frozen and hashable, and it can be a static argument of ``jax.jit``.
It does not know how it is run: :mod:`structlin.execution` runs it, and registers itself as its :class:`Executor`.
Shapes are ``(d_out, d_in)``, as in SciPy, CoLA and ``torch.nn.Linear.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from structlin._abstract import AbstractStructure, Factor
from structlin._arrays import Array
from structlin._parse import Step, axis_letter, check_sizes, parse_chain
from structlin.verdicts import Answer

__all__ = ["AbstractStructure", "Executor", "Factor", "Step", "Structure", "axis_letter"]


class Executor(Protocol):
    """The interface through which a :class:`Structure` is run. :mod:`structlin.execution` implements it."""

    def prepare(self, structure: Structure) -> None:
        """Compute what depends on the structure alone. Called once for each new structure.

        Code that traces the use of a structure, such as ``torch.compile``, then finds the result as a constant.
        """

    def run(
        self, structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool,
        xp: SimpleNamespace,
    ) -> Array:  # fmt: skip
        """Apply the chain to ``x``, whose shape has been checked.

        ``x`` has shape (tokens, d_in) if ``rows``, otherwise (d_in, tokens). ``bias`` (d_out,) is added if ``rows``.
        ``xp`` holds the operations of the array library (:func:`structlin._arrays.ops`).
        """


_executors: list[Executor] = []  # set by structlin.execution when it is imported
_algebras: list[Any] = []  # set by structlin.algebra when it is imported: of one chain, and of two


@dataclass(frozen=True, repr=False)
class Structure(AbstractStructure):
    """An ordered chain of einsums of two operands, with the sizes of their axes.

    Build it with :meth:`parse`. If ``d_in`` is smaller than the product of the axes of the first input, zeros are
    appended to the vector. If ``d_out`` is smaller than the product of the axes of the last output, the end of the
    result is cut off.

    If the input of a step has other axes than the output before it, the vector is *regrouped*: it is read in row-major
    order and split into the new axes. No letter may occur on both sides of such a boundary.

    Parameters
    ----------
    steps
        The einsums, in the order in which they are applied.
    sizes
        Pairs of axis and size.
    d_in, d_out
        Sizes of the matrix.

    Raises
    ------
    ValueError
        If the steps, the sizes of axes, or d_in and d_out contradict one another.

    Examples
    --------
    >>> s = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=3, a=2, f=5, r=2, e=7)
    >>> s.shape, s.num_params, s.macs
    ((35, 6), 270, 270)
    >>> [(f.fan_in, f.fan_out, f.blocks) for f in s.factors]
    [(2, 10, 3), (6, 7, 5)]
    """

    steps: tuple[Step, ...]
    sizes: tuple[tuple[str, int], ...]
    d_in: int
    d_out: int
    factors: tuple[Factor, ...] = field(init=False, compare=False)
    _pad: tuple[int, int] = field(init=False, compare=False)
    # A cache for structlin.execution, freed with the structure. It is not compared, hashed or pickled.
    _kept: dict[Any, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        sizes = dict(self.sizes)
        axes = dict.fromkeys("".join(s.input + s.factor + s.output for s in self.steps))
        # A canonical order, so that equal structures compare equal.
        object.__setattr__(self, "sizes", tuple((a, sizes[a]) for a in axes))
        text = "; ".join(map(str, self.steps))

        def size(axes: str) -> int:
            return math.prod(sizes[a] for a in axes)

        closed: set[str] = set()
        for number, (before, after) in enumerate(zip(self.steps, self.steps[1:], strict=False)):
            if before.output == after.input:
                continue
            if set(before.output) == set(after.input):
                raise ValueError(
                    f"{text!r}, step {number + 1}: input {after.input!r} permutes the output "
                    f"{before.output!r} of the step before; write the axes in the same order"
                )
            closed |= set("".join(s.input + s.factor + s.output for s in self.steps[: number + 1]))
            if reused := closed & set("".join(s.input + s.factor + s.output for s in self.steps[number + 1 :])):
                raise ValueError(
                    f"{text!r}, step {number + 1}: input {after.input!r} is not the output "
                    f"{before.output!r} of the step before, and axis {min(reused)!r} occurs on both sides; "
                    "the axes of a regrouped vector must have new letters"
                )
            if size(before.output) != size(after.input):
                raise ValueError(
                    f"{text!r}, step {number + 1}: input {after.input!r} has {size(after.input)} elements, "
                    f"the output {before.output!r} before it has {size(before.output)}"
                )
        seen: set[str] = set()
        for number, step in enumerate(self.steps):
            if back := seen & set(step.free):
                raise ValueError(
                    f"{text!r}, step {number}: axis {min(back)!r} is contracted in an earlier step; "
                    "a new axis must have a new letter"
                )
            seen |= set(step.input + step.factor + step.output)
        inner_in, inner_out = size(self.steps[0].input), size(self.steps[-1].output)
        for name, given, inner in (("d_in", self.d_in, inner_in), ("d_out", self.d_out, inner_out)):
            if isinstance(given, bool) or not hasattr(given, "__index__"):
                raise TypeError(f"{text!r}: {name} must be an integer, got {given!r}")
            if not 1 <= given <= inner:
                raise ValueError(
                    f"{text!r}: {name} must lie between 1 and the {inner} elements of its axes "
                    f"(if smaller, the vector is padded or cut), got {given}"
                )
        factors = tuple(
            Factor(
                f"W{number}",
                tuple(sizes[a] for a in step.factor),
                size(step.contracted),
                size(step.free),
                size(step.batch),
                size(step.carried),
            )
            for number, step in enumerate(self.steps)
        )
        set_ = object.__setattr__
        set_(self, "factors", factors)
        set_(self, "_pad", (inner_in - self.d_in, inner_out - self.d_out))
        set_(self, "_kept", {})
        for executor in _executors:
            executor.prepare(self)

    @classmethod
    def parse(
        cls, chain: str, sizes: Mapping[str, int] | None = None, /, *, d_in: int | None = None,
        d_out: int | None = None, **more: int,
    ) -> Structure:  # fmt: skip
        """Return the structure of a chain with the given sizes of axes.

        Parameters
        ----------
        chain
            Steps ``input,factor->output``, separated by semicolons.
        sizes
            Sizes of axes. A mapping also takes letters that are not identifiers of Python.
        d_in, d_out
            Sizes of the matrix. Default: the products of the axes of the first input and of the last output. A smaller
            d_in pads the input with zeros; a smaller d_out cuts the end of the output off.
        **more
            Sizes of axes by keyword.

        Returns
        -------
        Structure
            The structure.

        Raises
        ------
        ValueError
            If a step, an axis or a size is wrong. The message names the chain, the step and the axis.
        TypeError
            If the chain is not a string or a size is not an integer.

        Examples
        --------
        >>> Structure.parse("i,ri->r; r,or->o", i=8, r=2, o=6)
        Structure.parse('i,ri->r; r,or->o', i=8, r=2, o=6)
        >>> Structure.parse("i,ri->r; r,or->o", i=8, r=2)
        Traceback (most recent call last):
        ...
        ValueError: 'i,ri->r; r,or->o', step 1 'r,or->o': no size given for axis 'o'
        """
        steps = parse_chain(chain)
        both = set(sizes or {}) & set(more)
        if both:
            raise ValueError(f"sizes of {', '.join(sorted(both))} are given both in the mapping and by keyword")
        checked = check_sizes(steps, {**(sizes or {}), **more})
        table = dict(checked)
        full_in = math.prod(table[a] for a in steps[0].input)
        full_out = math.prod(table[a] for a in steps[-1].output)
        return cls(steps, checked, full_in if d_in is None else d_in, full_out if d_out is None else d_out)

    def __repr__(self) -> str:
        chain = "; ".join(map(str, self.steps))
        args = [f"{a}={n}" for a, n in self.sizes]
        args += [f"d_in={self.d_in}"] if self._pad[0] else []
        args += [f"d_out={self.d_out}"] if self._pad[1] else []
        return f"Structure.parse({chain!r}, {', '.join(args)})"

    def __str__(self) -> str:
        """Return a table with a row for each step."""
        head = ("step", "factor shape", "fan_in", "fan_out", "blocks", "carried", "params", "MACs")
        rows: list[tuple[object, ...]] = [
            (s, "x".join(map(str, f.shape)), f.fan_in, f.fan_out, f.blocks, f.carried, f.numel, f.numel * f.carried)
            for s, f in zip(self.steps, self.factors, strict=True)
        ]
        rows.append((f"{self.d_out} x {self.d_in}", *[""] * 5, self.num_params, self.macs))
        cells = [tuple(map(str, row)) for row in (head, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )

    @property
    def padding(self) -> tuple[int, int]:
        """Number of zeros appended to the input, and of elements cut from the output."""
        return self._pad

    @property
    def macs(self) -> int:
        """Number of multiply-accumulates for one vector: the sum of parameters times carried positions."""
        return sum(f.numel * f.carried for f in self.factors)

    @cached_property
    def rank_bound(self) -> int:
        """Upper bound of the rank: the smallest cut of the axes of the chain between input and output.

        A cut puts each factor on the side of the input or on that of the output. Its value is the product of the sizes
        of the axes that touch both sides. The smallest cut is a minimum cut of a network whose capacities are the
        logarithms of the sizes (Ford and Fulkerson 1956), so its cost is polynomial in the number of steps. It is
        computed at the first access.
        """
        bound, start = min(self.d_in, self.d_out), 0
        for stop in range(1, len(self.steps) + 1):
            if stop == len(self.steps) or self.steps[stop].input != self.steps[stop - 1].output:
                bound = min(bound, _cheapest_cut(self.steps[start:stop], self.sizes))
                start = stop
        return bound

    def transpose(self) -> Structure:
        """Return the structure with reversed steps and exchanged inputs and outputs; factors keep their layout."""
        return Structure(tuple(s.transpose() for s in reversed(self.steps)), self.sizes, self.d_out, self.d_in)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Return the factors in reverse order."""
        return tuple(reversed(factors))

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace, bias: Array | None = None) -> Array:
        """Apply the chain to rows, (tokens, d_in) -> (tokens, d_out), and add ``bias`` (d_out,). Nothing is checked."""
        return _executors[0].run(self, factors, x, bias, True, xp)

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        return _executors[0].run(self, factors, x, None, False, xp)

    # -- algebra, from the roles of the axes: structlin.algebra --------------------------------------------------------

    def inverse(self, A: Any) -> Answer[Any] | None:
        """Return the inverse, found from the roles of the axes."""
        return _algebras[0].inverse(A)

    def pinv(self, A: Any) -> Answer[Any] | None:
        """Return the pseudo-inverse, found from the roles of the axes."""
        return _algebras[0].pinv(A)

    def solve(self, A: Any, b: Array) -> Answer[Any] | None:
        """Return ``A^-1 b``, found from the roles of the axes."""
        return _algebras[0].solve(A, b)

    def slogdet(self, A: Any) -> Answer[Any] | None:
        """Return the determinant, found from the roles of the axes."""
        return _algebras[0].slogdet(A)

    def diagonal(self, A: Any, k: int) -> Answer[Any] | None:
        """Return the k-th diagonal by contracting the factors."""
        return _algebras[0].diagonal(A, k)

    def trace(self, A: Any) -> Answer[Any] | None:
        """Return the trace by contracting the factors."""
        return _algebras[0].trace(A)

    def eig(self, A: Any) -> Answer[Any] | None:
        """Return eigenvalues and eigenvectors, found from the roles of the axes."""
        return _algebras[0].eig(A)

    def svd(self, A: Any) -> Answer[Any] | None:
        """Return the singular value decomposition, found from the roles of the axes."""
        return _algebras[0].svd(A)

    def function(self, A: Any, f: Any) -> Answer[Any] | None:
        """Return f(A), found from the roles of the axes."""
        return _algebras[0].function(A, f)

    def power(self, A: Any, k: int) -> Answer[Any] | None:
        """Return the power as one operator, found from the roles of the axes."""
        return _algebras[0].power(A, k)

    def frobenius_norm(self, A: Any) -> Answer[Any] | None:
        """Return the Frobenius norm by contracting the factors with themselves."""
        return _algebras[0].frobenius_norm(A)

    def spectral_norm(self, A: Any) -> Answer[Any] | None:
        """Return the largest singular value, found from the roles of the axes."""
        return _algebras[0].spectral_norm(A)

    def product(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the product as one operator if the axes match."""
        return _algebras[1].product(A, B)

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the sum as one operator if the axes match."""
        return _algebras[1].sum(A, B)

    def shifted(self, A: Any, value: Any) -> Answer[Any] | None:
        """Return ``A + diag(value)`` as one operator if the axes match."""
        return _algebras[1].shifted(A, value)

    def kron(self, A: Any, B: Any) -> Answer[Any] | None:
        """Return the Kronecker product as one chain."""
        return _algebras[1].kron(A, B)

    def __reduce__(self) -> tuple[object, ...]:
        return Structure, (self.steps, self.sizes, self.d_in, self.d_out)


@lru_cache(maxsize=1024)  # layers of a model, and widths that are tried for one, have equal structures
def _cheapest_cut(steps: tuple[Step, ...], named_sizes: tuple[tuple[str, int], ...]) -> int:
    """Return the smallest cut of steps without regrouping: the product of the sizes of axes that touch both sides.

    The first node of the network is the input, the last one the output, those between them are the factors. An axis
    touches two or more nodes. It becomes an arc between two further nodes, whose capacity limits the flow through it.
    """
    sizes = dict(named_sizes)
    places = [steps[0].input, *(s.factor for s in steps), steps[-1].output]
    axes = [a for a in dict.fromkeys("".join(places)) if sizes[a] > 1]
    touched = [[n for n, place in enumerate(places) if a in place] for a in axes]
    # SciPy requires capacities of 32 bits. Cuts that agree to about seven digits count as equal.
    total = math.fsum(math.log2(sizes[a]) for a in axes)
    unit = (2**31 - 2 - len(axes)) / max(total, 1.0)
    arcs: list[tuple[int, int, int]] = []
    for number, (axis, nodes) in enumerate(zip(axes, touched, strict=True)):
        enter, leave = (len(places) + 2 * number + i for i in (0, 1))
        arcs.append((enter, leave, round(math.log2(sizes[axis]) * unit)))
        arcs += [arc for n in nodes for arc in ((n, enter, 2**31 - 1), (leave, n, 2**31 - 1))]
    rows, columns, capacities = zip(*arcs, strict=True) if arcs else ((), (), ())
    count = len(places) + 2 * len(axes)
    graph = csr_array((np.array(capacities, np.int32), (rows, columns)), shape=(count, count))
    sink = len(places) - 1
    left = graph - maximum_flow(graph, 0, sink).flow
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, 0, return_predecessors=False).tolist())
    return math.prod(
        sizes[axis] for axis, nodes in zip(axes, touched, strict=True) if 0 < len(reached & set(nodes)) < len(nodes)
    )
