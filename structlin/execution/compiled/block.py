"""The passes over a block of a network: several chains and the operations between them, as machine code.

A block reads rows of one input, and may normalise them. Each chain of ``first`` is applied to the result. Either their
outputs are those of the block (the projections of an attention layer), or an activation function computes hidden
features, to which the chain ``second`` is applied (an MLP, gated or not). The input may be added to the output. Without
``second`` the hidden features are the output (the first half of an MLP).

All steps run for a few tokens at a time, so all intermediate results stay in cache. The backward pass computes them
again from the input, or reads some of them that the forward pass has stored (:meth:`BlockProgram.stored`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, TypeVar

from structlin.execution._kept import once
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._forms import Array, Forms, Key
from structlin.execution.compiled._ir import Int
from structlin.execution.compiled._plans import Plan, Plans, Spec
from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._program import NAMES, Program, make_program
from structlin.execution.compiled._rows import Rows
from structlin.execution.compiled._schedule import row as row_of
from structlin.execution.compiled._target import Target
from structlin.execution.compiled._writer import At, Pass, Writer
from structlin.structure import Structure

__all__ = ["BlockProgram", "BlockSpec", "make_block"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """The computation of a block.

    ``first``: the chains that read the input (tokens, d_in); ``second``: the one that reads the hidden features, None
    if there are none. ``activation`` is applied to the output of the first chain, which multiplies that of the other
    one if there are two (``silu(gate(x)) * up(x)``). ``biases``: of which chains there is one. ``norm``: ``layer`` or
    ``rms``, with ``eps``, and whether it has a weight and a bias. ``residual``: add the input to the output.
    """

    first: tuple[Structure, ...]
    second: Structure | None
    activation: str | None
    biases: tuple[bool, ...]
    norm: str | None = None
    eps: float = 0.0
    affine: tuple[bool, bool] = (False, False)
    residual: bool = False

    @cached_property
    def structures(self) -> tuple[Structure, ...]:
        """All chains, in the order in which they are applied."""
        return self.first if self.second is None else (*self.first, self.second)

    @cached_property
    def macs(self) -> int:
        """The MACs of one token."""
        return sum(structure.macs for structure in self.structures)

    @property
    def d_in(self) -> int:
        """Number of input features."""
        return self.first[0].d_in

    @property
    def outputs(self) -> tuple[int, ...]:
        """Numbers of a row of each output."""
        if self.second is not None:
            return (self.second.d_out,)
        return tuple(s.d_out for s in (self.first if self.activation is None else self.first[:1]))


class BlockProgram:
    """The passes of a block in one dtype, compiled at their first use.

    Tables of the passes: x, the outputs (or their gradients), scratch memory, for the backward pass the gradient of x,
    weight and bias of the norm, biases of chains (with zeros where the chain pads its output; for the backward pass
    those of ``first`` alone), and factors. Of the backward pass further: factors for it, and sums of gradients of
    weight and bias of the norm, of biases and of factors. At the end the activations that are ``kept`` for the backward
    pass, if it reads any.
    """

    def __init__(self, spec: BlockSpec, target: Target, dtype: str, programs: Sequence[Program], block: int | None):
        self.spec, self.target, self.programs, self.given = spec, target, tuple(programs), block
        self.first = self.programs[: len(spec.first)]
        self.second = self.programs[-1] if spec.second is not None else None
        self.half = self.second is None and spec.activation is not None
        self.inside, self.outside = programs[0].inside, programs[0].outside
        self.row = row_of(spec.d_in, self.inside)
        self.made: dict[tuple[object, ...], Any] = {}  # passes
        self.plans = Plans()

    def forward_plan(self, tokens: int, threads: int, keeps: bool) -> Plan:
        """Return the plan of :meth:`forward`, of x, what is added, and factors: the outputs, and what is stored."""
        spec, given = self.spec, 1 + sum(self.spec.affine) + sum(self.spec.biases)
        sizes = [*spec.outputs, *(self.stored_rows() if keeps else ())]
        results: list[Spec] = [((tokens, size), NAMES[self.outside]) for size in sizes]
        factors = sum(len(p.shapes) for p in self.programs)
        plan = Plan(self.programs[0], tokens, threads, spec.macs, given + factors, results)
        inputs, outputs = plan.places
        table, ends = inputs[1:given], [inputs[0], *outputs[: len(spec.outputs)]]
        for program, own in self._by_program(inputs[given:]):
            table += plan.packed(program, "forward", range(len(own)), own)
        plan.run(self.forward(keeps), range(tokens), ends, table, outputs[len(spec.outputs) :])
        return plan

    def backward_plan(self, tokens: int, threads: int, kept: bool) -> Plan:
        """Return the plan of :meth:`backward`, of x, gradients of the outputs, what is added, and factors.

        Its results are gradients of x, of weight and bias of the norm, of biases and of factors.
        """
        spec, shapes = self.spec, [shape for program in self.programs for shape in program.shapes]
        first = 1 + len(spec.outputs)
        given = first + sum(spec.affine) + sum(spec.biases[: len(spec.first)])
        ends = [spec.d_in] * sum(spec.affine)
        ends += [s.d_out for s, there in zip(spec.structures, spec.biases, strict=True) if there]
        results: list[Spec] = [((tokens, spec.d_in), NAMES[self.outside])]
        results += [((size,), NAMES[self.inside]) for size in ends]
        results += [(shape, NAMES[self.outside]) for shape in shapes]
        held = len(self.stored()) if kept else 0
        plan = Plan(self.programs[0], tokens, threads, spec.macs, given + len(shapes) + held, results)
        inputs, (gx, *found) = plan.places
        sizes = [*ends, *map(math.prod, shapes)]
        copied = [0] * len(ends)
        copied += [size for p in self.programs for size in p.packing("gradients", tuple(range(len(p.shapes)))).sizes]
        sums = plan.sums(sizes, [None if size else place for size, place in zip(copied, found, strict=True)])
        table = [gx, *inputs[first:given]]
        factors = list(self._by_program(inputs[given:]))
        for (program, own), again in zip(factors, self.again(kept), strict=True):
            table += plan.packed(program, "forward", again, [own[k] for k in again])
        for program, own in factors:
            table += plan.packed(program, "back", range(len(own)), own)
        read, more = inputs[:first], inputs[given + len(shapes) :]
        plan.run(self.backward(kept), range(tokens), read, table, more, sums)
        totals = [[*pair] if size else [] for *pair, size in zip(plan.added(sizes, sums), found, copied, strict=True)]
        for program, pairs in self._by_program(totals[len(ends) :]):
            plan.copy(program, "gradients", range(len(pairs)), [place for pair in pairs for place in pair])
        return plan

    def _by_program(self, places: Sequence[T]) -> Iterator[tuple[Program, Sequence[T]]]:
        """Yield each program with its part of what there is for the factors of all of them."""
        rest = iter(places)
        for program in self.programs:
            yield program, list(islice(rest, len(program.shapes)))

    def stored(self) -> list[tuple[int, int]]:
        """Return the activations that may be stored, as the number of a chain and that of an activation in it.

        Of an MLP these are the outputs of the first chains; the derivative of the activation function replaces that of
        the only one of a first half. The activations between the steps of the second chain are added if all together
        are no more than dense layers store: input and output of the activation function. Of projections nothing is
        stored: these activations are larger than what they are computed from.
        """
        if self.spec.activation is None:
            return []
        found = [(number, len(program.schedule.forward)) for number, program in enumerate(self.first)]
        if self.second is None:
            return found
        between = self.second.schedule.widths[1:-1]
        if sum(between) <= len(found) * self.second.d_in:
            found += [(len(self.first), k + 1) for k in range(len(between))]
        return found

    def stored_rows(self) -> list[int]:
        """Return the numbers of a row of each array of :meth:`stored`."""
        return [self.programs[number].schedule.rows[k] for number, k in self.stored()]

    def again(self, kept: bool = False) -> list[list[int]]:
        """Return the steps of each chain that the backward pass runs again: all, but the last one of an output."""
        held, found = set(self.stored()) if kept else set(), []
        for number, program in enumerate(self.programs):
            last = len(program.schedule.forward)
            needed = last + self._hidden(program)
            found.append([k for k in range(needed - 1) if (number, k + 1) not in held])
        return found

    def _hidden(self, program: Program) -> bool:
        """Whether the output of a chain is an input of the activation function."""
        return self.spec.activation is not None and program is not self.second

    def _writer(self, all_forms: Sequence[Forms]) -> Writer:
        each = sum(forms.bytes([]) for forms in all_forms) + self.row * BYTES[self.inside]
        return Writer(self.first[0], self.given or self.first[0].near_block(each))

    def _direct(self, program: Program) -> bool:
        """Whether a row of the input lies in scratch memory as the chain reads it."""
        return program.schedule.widths[0] == self.spec.d_in and program.schedule.rows[0] == self.row

    @once
    def forward(self, keeps: bool = False) -> Pass:
        """Return the forward pass; ``keeps``: it stores the activations of :meth:`stored`."""
        spec, all_forms = self.spec, [program.front_forms() for program in self.programs]
        writer = self._writer(all_forms)
        if keeps:
            for number, k in self.stored():  # which are copied after the last product of their chain
                all_forms[number].now = len(self.programs[number].schedule.forward)
                all_forms[number].read("state", k)
        frame = _Frame(self, writer, all_forms, backward=False, kept=keeps)
        last = [len(program.schedule.forward) for program in self.programs]

        def body(emitter: Emitter, at: At) -> None:
            rows = Rows(emitter)
            self._enter(rows, at, frame)
            outputs = iter(frame.ends)
            for number, program in enumerate(self.programs):
                if program is self.second:
                    self._activate(rows, at, frame)
                self._product_rows(emitter, at, frame, number, range(last[number]), emitter.tokens)
                if not self.half:
                    self._keep(emitter, at, frame, number)
                if not self._hidden(program):
                    y = next(outputs)
                    if program.cuts_front:
                        forms, arrays = frame.forms[number], frame.arrays[number]
                        source = at(forms.one(arrays, "state", last[number]))
                        wide = program.strides[1], program.d_out
                        program.write(emitter, source, program.schedule.rows[last[number]], at(y), wide)
                    if spec.residual:
                        rows.add((at(frame.x), spec.d_in), (at(y), spec.d_in), spec.d_in)
            if self.half:
                self._activate(rows, at, frame, slopes=keeps)
                for number in range(len(self.first)):
                    self._keep(emitter, at, frame, number)

        operations = [operation for program in self.programs for operation in program.schedule.forward]
        return writer.compile(body, [frame.x], [*frame.ends, *frame.kept.values()], operations)

    @once
    def backward(self, kept: bool = False) -> Pass:
        """Return the backward pass; ``kept``: it reads the activations of :meth:`stored`."""
        spec, all_forms = self.spec, []
        for program, again in zip(self.programs, self.again(kept), strict=True):
            needs = (True,) * (2 + len(program.shapes))
            forms, _ = program.back_forms(needs, False, again)
            last = len(program.schedule.forward)
            forms.now = 0
            forms.write("state", 0)  # all forms of the ends are written when the first one is
            for k in range(last):
                if kept and k not in again:
                    forms.write("state", k + 1)
            for k in again:
                forms.now = program.when("forward", k)
                forms.read_by(program.schedule.forward[k], "state", k)
                forms.write("state", k + 1)
            forms.now = program.when("gradients", last - 1)
            forms.write("flow", last)
            all_forms.append(forms)
        writer = self._writer(all_forms)
        frame = _Frame(self, writer, all_forms, backward=True, kept=kept)
        even = any(p.gradient_in_pairs(k) for p in self.programs for k in range(len(p.shapes)))

        def body(emitter: Emitter, at: At) -> None:
            rows = Rows(emitter)
            tokens = emitter.even if even else emitter.tokens
            self._enter(rows, at, frame, even)
            gradients = iter(frame.ends)
            for number, (program, again) in enumerate(zip(self.programs, self.again(kept), strict=True)):
                if program is self.second:
                    self._activate(rows, at, frame, even, slopes=True)
                self._restore(emitter, at, frame, number, even)
                self._product_rows(emitter, at, frame, number, again, tokens)
            if self.half:
                if not kept and len(self.first) == 1 and spec.activation is not None:
                    rows.slopes(spec.activation, frame.places(at, [frame.slope])[0], spec.outputs[0])
                self._derive(rows, at, frame, even)
            for number, program in reversed(list(enumerate(self.programs))):
                last = len(program.schedule.forward)
                if not self._hidden(program):
                    gy = frame.ends[number] if self.second is None else next(gradients)
                    self._flow(emitter, at, frame, number, at(gy), program.strides[1], even)
                    bias = at(gy), program.strides[1]
                else:
                    source = at(frame.arrays[number]["flow", last, "plain"])
                    self._flow(emitter, at, frame, number, source, program.schedule.rows[last], even, there=True)
                    bias = source, program.schedule.rows[last]
                if (total := frame.bias_sums[number]) is not None:
                    emitter.add_rows(*bias, at(total), program.d_out)
                program.write_gradients(
                    frame.writer, emitter, at, frame.forms[number], frame.arrays[number], frame.sums[number],
                    frame.back[number], tokens, None,
                )  # fmt: skip
                if program is self.second:
                    self._derive(rows, at, frame, even)
            self._leave(rows, at, frame)

        operations = []
        for program, again in zip(self.programs, self.again(kept), strict=True):
            schedule = program.schedule
            operations += [*(schedule.forward[k] for k in again), *schedule.back, *schedule.gradients]
        assert frame.gx is not None
        return writer.compile(body, [frame.x, *frame.ends, *frame.kept.values()], [frame.gx], operations)

    def _keep(self, emitter: Emitter, at: At, frame: _Frame, number: int) -> None:
        """Copy the activations of a chain that the backward pass reads, unless they were written to their places."""
        schedule = self.programs[number].schedule
        for (_, k), kept in frame.copied_of(number):
            row, source = schedule.rows[k], at(frame.arrays[number]["state", k, "plain"])
            emitter.copy(source, row, at(kept), row, *(schedule.widths[k],) * 2)

    def _restore(self, emitter: Emitter, at: At, frame: _Frame, number: int, even: bool) -> None:
        """Copy the activations of a chain that are kept to scratch memory, in all forms that products read.

        Those that were written to their places are read from there.
        """
        program, schedule = self.programs[number], self.programs[number].schedule
        for (_, k), kept in frame.copied_of(number):
            row, width = schedule.rows[k], schedule.widths[k]
            for array in frame.forms[number].of(frame.arrays[number], "state", k):
                emitter.copy(at(kept), row, at(array), row, width, width, even)
            program.clear_all(emitter, at, frame.arrays[number], "state", k)

    def _product_rows(
        self, emitter: Emitter, at: At, frame: _Frame, number: int, steps: Sequence[int], tokens: Int
    ) -> None:  # fmt: skip
        """Write the steps of a chain, the last one with the bias."""
        program, forms, arrays = self.programs[number], frame.forms[number], frame.arrays[number]
        factors = frame.factors[number]
        last = len(program.schedule.forward) - 1
        inner = {k: factors[k] for k in steps if k < last}
        program.write_states(frame.writer, emitter, at, forms, arrays, inner, tokens)
        if last in steps:
            operation, bias = program.schedule.forward[last], frame.biases[number]
            to = [at(array) for array in forms.of(arrays, "state", last + 1)]
            if not to:
                to = [at(frame.ends[0 if program is self.second else number])]
                tokens = emitter.tokens
            source = frame.writer.source(emitter, at, forms, arrays, operation, "state", last, tokens)
            added = None if bias is None else at(bias)
            frame.writer.multiply(emitter, operation, to, source, at(factors[last]), bias=added, tokens=tokens)
            program.clear_all(emitter, at, arrays, "state", last + 1)

    def _enter(self, rows: Rows, at: At, frame: _Frame, even: bool = False) -> None:
        """Write the normalised input in the form that each of the first chains reads."""
        spec, held = self.spec, frame.held
        emitter = rows.emitter
        if spec.norm is None:
            emitter.copy(at(frame.x), spec.d_in, at(held), self.row, spec.d_in, spec.d_in, even)
        else:
            weight, bias = (None if a is None else at(a) for a in (frame.weight, frame.shift))
            rows.normalise(spec, at(frame.x), at(held), self.row, weight, bias)
            if even:
                rows.clear(at(held), self.row, spec.d_in)
        for number in range(len(self.first)):
            self._copies(emitter, at, frame, number, "state", 0, at(held), self.row, even)

    def _copies(
        self, emitter: Emitter, at: At, frame: _Frame, number: int, kind: str, at_step: int, source: Memory, row: int,
        even: bool, there: bool = False,
    ) -> None:  # fmt: skip
        """Write an end of a chain in its other forms; the plain form exists (``there``) or is ``source``."""
        program, forms, arrays = self.programs[number], frame.forms[number], frame.arrays[number]
        schedule = program.schedule
        width = program.d_in if at_step == 0 else program.d_out
        reader = schedule.forward[0] if at_step == 0 else schedule.back[-1]
        for array in forms.of(arrays, kind, at_step):
            if (there and array.element == self.inside) or array is frame.held:
                continue
            program.read(
                emitter, source, (row, width), at(array), schedule.rows[at_step], schedule.widths[at_step],
                reader.enters, even,
            )  # fmt: skip
        program.clear_all(emitter, at, arrays, kind, at_step)

    def _flow(
        self, emitter: Emitter, at: At, frame: _Frame, number: int, source: Memory, row: int, even: bool,
        there: bool = False,
    ) -> None:  # fmt: skip
        last = len(self.programs[number].schedule.forward)
        self._copies(emitter, at, frame, number, "flow", last, source, row, even, there)

    def _activate(self, rows: Rows, at: At, frame: _Frame, even: bool = False, slopes: bool = False) -> None:
        """Compute the hidden features from the outputs of the first chains.

        ``slopes``: write the derivative, if there is one output.
        """
        assert self.spec.activation is not None
        hidden, (target, row) = frame.places(at, frame.hidden), frame.features
        width = wide = self.spec.outputs[0]  # of a half
        if self.second is not None:
            width, wide = self.second.d_in, self.second.schedule.widths[0]
        # Of two outputs the gradients are computed from both of them.
        (slope,) = frame.places(at, [frame.slope]) if slopes and len(hidden) == 1 else (None,)
        rows.activate(self.spec.activation, hidden, (at(target), row), width, wide, slope)
        if self.second is None:
            return
        number = len(self.first)
        if even:
            rows.clear(at(target), row, wide)
        self._copies(rows.emitter, at, frame, number, "state", 0, at(target), row, even, there=True)

    def _derive(self, rows: Rows, at: At, frame: _Frame, even: bool) -> None:
        """Write the gradients of the outputs of the first chains."""
        assert self.spec.activation is not None
        hidden = frame.places(at, frame.hidden if len(self.first) == 2 else [frame.slope])
        targets = frame.places(at, frame.flows)
        wide = [program.schedule.widths[-1] for program in self.first]
        if self.second is None:
            gradient, row, size = at(frame.ends[0]), *self.spec.outputs * 2
        else:
            gradient = at(frame.arrays[len(self.first)]["flow", 0, "plain"])
            row, size = self.second.schedule.rows[0], self.second.d_in
        rows.derive(self.spec.activation, hidden, (gradient, row), targets, size, wide)
        if even:
            for (memory, row), width in zip(targets, wide, strict=True):
                rows.clear(memory, row, width)

    def _leave(self, rows: Rows, at: At, frame: _Frame) -> None:
        """Sum the gradients of the input that the chains give."""
        spec = self.spec
        assert frame.gx is not None
        flows = []
        for number, program in enumerate(self.first):
            flows.append((at(frame.arrays[number]["flow", 0, "plain"]), program.schedule.rows[0]))
        weight = None if frame.weight is None else at(frame.weight)
        sums = [None if a is None else at(a) for a in frame.norm_sums]
        added = at(frame.ends[0]) if spec.residual else None
        rows.leave(spec, at(frame.x), flows, at(frame.gx), weight, (sums[0], sums[1]), added)


class _Frame:
    """The arrays of a pass, in the order of its table."""

    def __init__(
        self, block: BlockProgram, writer: Writer, forms: Sequence[Forms], backward: bool, kept: bool = False
    ) -> None:
        spec = block.spec
        self.writer, self.forms = writer, list(forms)
        inside, outside = block.inside, block.outside
        self.x = writer.rows(outside, spec.d_in)
        self.ends = [writer.rows(outside, size) for size in spec.outputs]
        writer.enter()
        self.gx = writer.rows(outside, spec.d_in) if backward else None
        self.weight, self.shift = (writer.whole(inside) if there else None for there in spec.affine)
        inner = len(spec.first) if backward else len(block.programs)
        self.biases = [
            writer.whole(inside) if there and k < inner else None for k, there in enumerate(spec.biases)
        ]  # fmt: skip
        steps = block.again(kept) if backward else [list(range(len(p.shapes))) for p in block.programs]
        self.factors = [
            {k: writer.factor(program.schedule.forward[k]) for k in again}
            for program, again in zip(block.programs, steps, strict=True)
        ]
        self.back, self.sums = [], []
        self.norm_sums: list[Array | None] = [None, None]
        self.bias_sums: list[Array | None] = [None] * len(block.programs)
        if backward:
            for program in block.programs:
                self.back.append(dict(enumerate(map(writer.factor, program.schedule.back))))
            self.norm_sums = [writer.whole(inside) if there else None for there in spec.affine]
            self.bias_sums = [writer.whole(inside) if there else None for there in spec.biases]
            for program in block.programs:
                self.sums.append({k: writer.whole(inside) for k in range(len(program.shapes))})
        # Rows have the strides of scratch memory, so products write and read activations of the same dtype in place.
        # Only operations on rows use the derivative, and they convert it.
        alone = block.half and len(spec.first) == 1
        rows = zip(block.stored(), block.stored_rows(), strict=True) if kept else ()
        self.kept = {key: writer.rows(outside, row) for key, row in rows}
        self.direct = self.kept if inside == outside or alone else {}
        self.held = writer.take(block.row, inside)
        self.arrays: list[dict[Key, Array]] = []
        self.hidden: list[tuple[Array, int]] = []  # outputs of the first chains, with the numbers of a row
        self.flows: list[tuple[Array, int]] = []  # their gradients
        for number, program in enumerate(block.programs):
            given: dict[Key, Array] = {("state", k, "plain"): a for (n, k), a in self.direct.items() if n == number}
            last, hidden = len(program.schedule.forward), block._hidden(program)
            if program is not block.second and block._direct(program):
                given["state", 0, "plain"] = self.held
            if hidden:
                row, place = program.schedule.rows[last], self.direct.get((number, last))
                state = writer.take(row, inside) if place is None or alone else place
                # The gradient is written where the output was, unless that is kept.
                flow = writer.take(row, inside) if backward and state is place else state
                given["state", last, "plain"], given["flow", last, "plain"] = state, flow
                self.hidden.append((state, row))
                self.flows.append((flow, row))
                self.slope = flow if place is None or not alone else place, row
            if program is block.second:
                row = program.schedule.rows[0]
                one = len(self.hidden) == 1 and not backward and not self.direct and row == self.hidden[0][1]
                features = self.hidden[0][0] if one else writer.take(row, inside)
                self.features = features, row
                given["state", 0, "plain"] = features
            # The gradient of the input is written where that is, unless several chains read it.
            if backward and (program is block.second or len(spec.first) == 1) and ("state", 0, "plain") in given:
                given["flow", 0, "plain"] = given["state", 0, "plain"]
            self.arrays.append(writer.arrays(forms[number], [], given))

        if block.half:
            self.features = self.ends[0], spec.outputs[0]

    def places(self, at: At, arrays: Sequence[tuple[Array, int]]) -> list[tuple[Memory, int]]:
        """Return where the parts of a block start, with the numbers of a row."""
        return [(at(array), row) for array, row in arrays]

    def copied_of(self, number: int) -> list[tuple[tuple[int, int], Array]]:
        """Return the arrays outside of scratch memory to and from which activations of a chain are copied."""
        kept = {} if self.direct else self.kept
        return [(key, array) for key, array in kept.items() if key[0] == number]


@lru_cache(maxsize=32)
def make_block(spec: BlockSpec, dtype: str, target: Target, block: int | None = None) -> BlockProgram | None:
    """Return the passes; None if a chain has no schedule, or a ``target`` with tiles has no product that uses them."""
    programs = []
    for number, s in enumerate(spec.structures):
        inner_out = spec.activation is not None and number < len(spec.first)
        program = make_program(
            s.steps, s.sizes, s.d_in, s.d_out, True, dtype, target, None, True, block, (True, inner_out)
        )  # fmt: skip
        if program is None:
            return None
        programs.append(program)
    if target.tiles and not any(program.uses_tiles for program in programs):
        return None
    return BlockProgram(spec, target, dtype, programs, block)
