"""Slices of a pass that share no result.

A backward pass reads the factors and adds to their gradients once for each block of tokens. If they do not fit into
cache, memory limits its speed. If every factor has the first axis of the input, slices along this axis are separate
chains. Each has its part of the input, of its gradient and of the gradients of all factors, and needs the whole
gradient of the output. So the slices run one after the other for all tokens, each fits into cache, and nothing is
computed twice. The same holds for a forward pass and the first axis of the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from structlin._parse import Step
from structlin.execution.compiled._program import Part, Program, make_program

RUN = 8  # numbers that are copied together, if this does not make the slices too large
LARGER = 2  # times the wanted size of slices that are to stay in the last level of cache
Chain = tuple[tuple[Step, ...], tuple[tuple[str, int], ...], int, int, bool]  # steps, sizes, d_in, d_out, rows


@dataclass(frozen=True)
class Slices:
    """``count`` times the program, for slices that start so many numbers apart.

    ``factors``: in each factor, ``end``: in the input or the output, ``states``: in a kept token of each activation
    between steps, None if its slices do not lie in one piece.
    """

    program: Program
    count: int
    factors: tuple[int, ...]
    end: int
    states: tuple[int, ...] | None


def whole(program: Program) -> Slices:
    """Return the whole program as one slice."""
    return Slices(program, 1, (0,) * len(program.shapes), 0, (0,) * (len(program.shapes) - 1))


def counts(chain: Chain, program: Program, of_input: bool) -> list[int]:
    """Return the number of slices into which a program can be divided, along the first axis of input or output."""
    axis = _axis(chain, program, of_input)
    size = 1 if axis is None else dict(chain[1])[axis]
    return [n for n in range(1, size + 1) if size % n == 0]


def enough(counts: list[int], numel: int, most: int, larger: int = LARGER) -> int:
    """Return the fewest slices of so many numbers that have at most ``most`` each, or the most that there are.

    Slices with fewer than ``RUN`` neighbours become wider, to at most ``larger * most`` numbers.
    """
    size = counts[-1]
    count = next((n for n in counts if numel <= n * most), size)
    # Where the axis comes last in a factor, neighbours of a slice are copied together.
    wider = [n for n in counts if RUN * n <= size and numel <= larger * n * most]
    return wider[-1] if wider and RUN * count > size else count


def slices(
    chain: Chain, program: Program, of_input: bool, count: int, keeps: bool = False
) -> Slices:  # fmt: skip
    """Return a program in this number of slices; the whole program if it cannot be divided.

    Of the input for a backward pass, or else of the output for a forward one, which may be one that ``keeps``
    activations as the whole program would.
    """
    axis = _axis(chain, program, of_input)
    found = None
    if axis is not None and count > 1:
        found = _slices(chain, program, axis, count, of_input, keeps)
    return whole(program) if found is None or (keeps and found.states is None) else found


def _axis(chain: Chain, program: Program, of_input: bool) -> str | None:
    """Return the axis to cut, if all factors have it, the other end does not, and no padding prevents it."""
    steps, sizes, d_in, d_out, _ = chain
    first, other = (steps[0].input, steps[-1].output) if of_input else (steps[-1].output, steps[0].input)
    axis = next((a for a in first if dict(sizes)[a] > 1), None)
    cut = program.schedule.widths[0 if of_input else -1] != (d_in if of_input else d_out)
    if axis is None or cut or axis in other or any(axis not in step.factor for step in steps):
        return None
    return axis


def _slices(
    chain: Chain, program: Program, axis: str, count: int, of_input: bool, keeps: bool
) -> Slices | None:  # fmt: skip
    steps, sizes, d_in, d_out, rows = chain
    size = dict(sizes)
    part = Part(count, of_input, program.shapes, *((sizes, program.schedule.states) if keeps else ()))
    size[axis] //= count
    ends = (d_in // count, d_out) if of_input else (d_in, d_out // count)
    one = make_program(
        steps, tuple(size.items()), *ends, rows, program.name, program.target, part, True, program.given
    )  # fmt: skip
    if one is None:
        return None
    factors = []
    for step, shape in zip(steps, one.shapes, strict=True):
        at = step.factor.index(axis)
        factors.append(shape[at] * math.prod(shape[at + 1 :]))
    between = range(1, len(steps)) if of_input or keeps else ()
    states = [_state(program, one, k, axis, dict(sizes), size) for k in between]
    lie = tuple(state for state in states if state is not None)
    return Slices(one, count, tuple(factors), ends[0 if of_input else 1], lie if len(lie) == len(states) else None)


def _state(
    program: Program, one: Program, k: int, axis: str, whole_sizes: dict[str, int], sizes: dict[str, int]
) -> int | None:  # fmt: skip
    """Return the distance of slices of an activation; None if their layout differs from that of the slice."""
    before = [a for a in program.schedule.states[k] if whole_sizes[a] > 1]
    after = [a for a in one.schedule.states[k] if sizes[a] > 1]
    if [a for a in before if a in after] != after:
        return None
    distance = sizes[axis] * math.prod(whole_sizes[a] for a in before[before.index(axis) + 1 :])
    # What is read has to lie in one piece; what is written does not.
    return distance if one.part is None or one.part.between or before[0] == axis else None
