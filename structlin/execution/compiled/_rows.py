"""Operations on the rows of a block of tokens between products: activations, norms, residuals."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from structlin.execution.compiled._activations import activation
from structlin.execution.compiled._emit import Emitter, Memory
from structlin.execution.compiled._ir import Int, Values

Place = tuple[Memory, int]  # an array, and its numbers from row to row


class Norm(Protocol):
    """The norm of rows of ``d_in`` numbers: ``layer``, ``rms`` or None."""

    @property
    def norm(self) -> str | None: ...
    @property
    def eps(self) -> float: ...
    @property
    def d_in(self) -> int: ...


class Rows:
    """Operations on the rows of all tokens of a block, number by number."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter, self.code = emitter, emitter.code

    def _vectors(self, width: int, body: Callable[[Int, int], None]) -> None:
        """``body(first, lanes)`` for all vectors of a row."""
        self.code.parts(width, self.emitter.lanes, body)

    def _tokens(self, body: Callable[[Int], None]) -> None:
        self.code.loop(0, self.emitter.tokens, 1, lambda number, _: body(number))

    def _zeros(self, target: Memory, start: Int, width: int, wide: int) -> None:
        for k in range(width, wide, self.emitter.lanes):
            self.emitter.store(target, self.code.add(start, k), "zeroinitializer", min(self.emitter.lanes, wide - k))

    def clear(self, target: Memory, row: int, width: int) -> None:
        """Set the row after an odd number of tokens to zero."""
        emitter, code = self.emitter, self.code

        def token(number: Int, _: Values) -> None:
            start = code.multiply(number, row)
            self._vectors(width, lambda k, lanes: emitter.store(target, code.add(start, k), "zeroinitializer", lanes))

        code.loop(emitter.tokens, emitter.even, 1, token)

    def _map(
        self, width: int, read: Sequence[Place], written: Sequence[Place], compute: Callable[..., Sequence[str]],
        wide: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Write to the rows of some arrays the vectors that ``compute`` makes of those of others.

        ``wide``: up to which number zeros follow in each row that is written.
        """
        emitter, code = self.emitter, self.code

        def token(number: Int) -> None:
            starts, to = ([code.multiply(number, row) for _, row in arrays] for arrays in (read, written))

            def vector(k: Int, lanes: int) -> None:
                held = [
                    emitter.load(memory, code.add(start, k), lanes)
                    for (memory, _), start in zip(read, starts, strict=True)
                ]
                for (memory, _), start, value in zip(written, to, compute(*held), strict=True):
                    emitter.store(memory, code.add(start, k), value, lanes)

            self._vectors(width, vector)
            for (memory, _), start, full in zip(written, to, wide, strict=False):
                self._zeros(memory, start, width, full)

        self._tokens(token)

    def _multiply(self, a: str, b: str) -> str:
        return self.code.value(f"fmul {self.emitter.vector} {a}, {b}")

    def add(self, source: Place, target: Place, width: int) -> None:
        """Add rows to others."""
        kind = self.emitter.vector
        self._map(width, [source, target], [target], lambda a, b: [self.code.value(f"fadd {kind} {a}, {b}")])

    def activate(
        self, name: str, hidden: Sequence[Place], target: Place, width: int, wide: int, slopes: Place | None = None
    ) -> None:  # fmt: skip
        """Write the features; ``slopes``: where to write the derivative, if there is one input of the activation."""

        def features(first: str, *others: str) -> list[str]:
            value, slope = activation(name, self.emitter, first)
            for other in others:
                value = self._multiply(value, other)
            return [value] if slopes is None else [value, slope]

        self._map(width, hidden, [target] if slopes is None else [target, slopes], features, [wide])

    def slopes(self, name: str, hidden: Place, width: int) -> None:
        """Overwrite the input of the activation by the derivative."""
        self._map(width, [hidden], [hidden], lambda x: activation(name, self.emitter, x)[1:])

    def derive(
        self, name: str, hidden: Sequence[Place], gradient: Place, targets: Sequence[Place], width: int,
        wide: Sequence[int],
    ) -> None:  # fmt: skip
        """Write the gradients of the inputs of the activation, given that of the features; zeros beyond ``width``.

        ``hidden``: the inputs if there are two, otherwise the derivative (:meth:`activate`).
        """

        def gradients(flow: str, slope: str, *others: str) -> list[str]:
            if not others:
                return [self._multiply(flow, slope)]
            value, slope = activation(name, self.emitter, slope)
            return [self._multiply(self._multiply(flow, others[0]), slope), self._multiply(flow, value)]

        self._map(width, [gradient, *hidden], targets, gradients, wide)

    # -- norms ---------------------------------------------------------------------------------------------------------

    def _sums(self, width: int, count: int, terms: Callable[[Int, int], list[str]]) -> list[str]:
        """``count`` sums over a row, of vectors that ``terms`` makes, which are 0 beyond the row."""
        emitter, code, lanes = self.emitter, self.code, self.emitter.lanes

        def step(k: Int, held: Values, there: int) -> Values:
            return [code.value(f"fadd {emitter.vector} {a}, {b}") for a, b in zip(held, terms(k, there), strict=True)]

        whole = width // lanes * lanes
        start = ["zeroinitializer"] * count
        sums = code.loop(0, whole, lanes, lambda k, held: step(k, held, lanes), start, emitter.vector)
        if whole < width:
            sums = step(whole, sums, width - whole)
        kind = emitter.element
        name = f"llvm.vector.reduce.fadd.v{lanes}{emitter.short[kind]}"
        code.declarations.add(f"declare {kind} @{name}({kind}, {emitter.vector})")
        return [code.value(f"call reassoc {kind} @{name}({kind} -0.0, {emitter.vector} {s})") for s in sums]

    def _number(self, value: float) -> str:
        if self.emitter.element == "float":
            value = struct.unpack("f", struct.pack("f", value))[0]
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"

    def _centre(self, spec: Norm, source: Memory, start: Int) -> tuple[str | None, str]:
        """Return the mean of a row (None where the norm takes none) and the inverse of its deviation, in all lanes."""
        emitter, code, kind = self.emitter, self.code, self.emitter.element
        width, share = spec.d_in, self._number(1 / spec.d_in)

        def load(k: Int, lanes: int) -> str:
            return emitter.load(source, code.add(start, k), lanes)

        mean = None
        if spec.norm == "layer":
            (total,) = self._sums(width, 1, lambda k, lanes: [load(k, lanes)])
            mean = emitter._spread(code.value(f"fmul {kind} {total}, {share}"), kind)

        def square(k: Int, lanes: int) -> list[str]:
            x = load(k, lanes)
            if mean is not None:
                x = code.value(f"fsub {emitter.vector} {x}, {mean}")
                if lanes < emitter.lanes:  # beyond the row there is 0, not the negative mean
                    mask = emitter._mask(lanes)
                    x = code.value(
                        f"select {mask[0]} {mask[1]}, {emitter.vector} {x}, {emitter.vector} zeroinitializer"
                    )
            return [code.value(f"fmul {emitter.vector} {x}, {x}")]

        (total,) = self._sums(width, 1, square)
        variance = code.value(f"fmul {kind} {total}, {share}")
        variance = code.value(f"fadd {kind} {variance}, {self._number(spec.eps)}")
        root = code.call(kind, f"llvm.sqrt.{emitter.short[kind]}", (kind, variance))
        return mean, emitter._spread(code.value(f"fdiv {kind} {self._number(1.0)}, {root}"), kind)

    def normalise(
        self, spec: Norm, source: Memory, target: Memory, row: int, weight: Memory | None, bias: Memory | None
    ) -> None:  # fmt: skip
        emitter, code = self.emitter, self.code

        def token(number: Int) -> None:
            start, to = code.multiply(number, spec.d_in), code.multiply(number, row)
            mean, scale = self._centre(spec, source, start)

            def vector(k: Int, lanes: int) -> None:
                x = self._centred(emitter.load(source, code.add(start, k), lanes), mean, scale)
                if weight is not None:
                    x = code.value(f"fmul {emitter.vector} {x}, {emitter.load(weight, k, lanes)}")
                if bias is not None:
                    x = code.value(f"fadd {emitter.vector} {x}, {emitter.load(bias, k, lanes)}")
                emitter.store(target, code.add(to, k), x, lanes)

            self._vectors(spec.d_in, vector)

        self._tokens(token)

    def _centred(self, x: str, mean: str | None, scale: str) -> str:
        code, kind = self.code, self.emitter.vector
        if mean is not None:
            x = code.value(f"fsub {kind} {x}, {mean}")
        return code.value(f"fmul {kind} {x}, {scale}")

    def leave(
        self, spec: Norm, source: Memory, flows: Sequence[tuple[Memory, int]], target: Memory,
        weight: Memory | None, sums: tuple[Memory | None, Memory | None], added: Memory | None,
    ) -> None:  # fmt: skip
        """Compute the gradient of the input of a norm, with g the gradient of its result and z the normalised row.

        ``(w g - mean(w g) - z mean(w g z)) / deviation``, without the first mean for an RMS norm.
        """
        emitter, code, kind = self.emitter, self.code, self.emitter.vector
        width = spec.d_in

        def token(number: Int) -> None:
            start = code.multiply(number, width)
            starts = [code.multiply(number, stride) for _, stride in flows]

            def flow(k: Int, lanes: int) -> str:
                total = ""
                for (memory, _), first in zip(flows, starts, strict=True):
                    g = emitter.load(memory, code.add(first, k), lanes)
                    total = code.value(f"fadd {kind} {total}, {g}") if total else g
                return total

            def put(k: Int, lanes: int, g: str) -> None:
                if added is not None:
                    g = code.value(f"fadd {kind} {g}, {emitter.load(added, code.add(start, k), lanes)}")
                emitter.store(target, code.add(start, k), g, lanes)

            if spec.norm is None:
                return self._vectors(width, lambda k, lanes: put(k, lanes, flow(k, lanes)))
            mean, scale = self._centre(spec, source, start)

            def weighted(k: Int, lanes: int) -> tuple[str, str, str]:
                g, z = flow(k, lanes), self._centred(emitter.load(source, code.add(start, k), lanes), mean, scale)
                h = g if weight is None else code.value(f"fmul {kind} {g}, {emitter.load(weight, k, lanes)}")
                return g, h, z

            def terms(k: Int, lanes: int) -> list[str]:
                _, h, z = weighted(k, lanes)
                return [h, code.value(f"fmul {kind} {h}, {z}")]

            share = self._number(1 / width)
            means = [
                emitter._spread(code.value(f"fmul {emitter.element} {total}, {share}"), emitter.element)
                for total in self._sums(width, 2, terms)
            ]

            def vector(k: Int, lanes: int) -> None:
                g, h, z = weighted(k, lanes)
                for memory, more in ((sums[0], lambda: code.value(f"fmul {kind} {g}, {z}")), (sums[1], lambda: g)):
                    if memory is not None:
                        held = emitter.load(memory, k, lanes)
                        emitter.store(memory, k, code.value(f"fadd {kind} {held}, {more()}"), lanes)
                if spec.norm == "layer":
                    h = code.value(f"fsub {kind} {h}, {means[0]}")
                h = code.value(f"fsub {kind} {h}, {code.value(f'fmul {kind} {z}, {means[1]}')}")
                put(k, lanes, code.value(f"fmul {kind} {h}, {scale}"))

            return self._vectors(width, vector)

        self._tokens(token)
