"""A writer of LLVM's intermediate language: one function, with counted loops and integer arithmetic on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

Int = int | str  # a constant, or the name of a value of 64 bits
Values = list[str]


class Code:
    """The body of a function. Values are named as they are made; constants are folded."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self._names = count()
        self._block = "entry"

    def put(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def value(self, text: str) -> str:
        name = f"%v{next(self._names)}"
        self.put(f"{name} = {text}")
        return name

    def call(self, result: str, function: str, *operands: tuple[str, Int]) -> str:
        """Call an intrinsic of LLVM; ``operands`` are types and values."""
        self.declarations.add(f"declare {result} @{function}({', '.join(t for t, _ in operands)})")
        text = f"call {result} @{function}({', '.join(f'{t} {v}' for t, v in operands)})"
        if result == "void":
            self.put(text)
            return ""
        return self.value(text)

    def add(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.value(f"add i64 {a}, {b}")

    def multiply(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self.value(f"mul i64 {a}, {b}")

    def subtract(self, a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.value(f"sub i64 {a}, {b}")

    def least(self, a: Int, b: Int) -> Int:
        return self.call("i64", "llvm.smin.i64", ("i64", a), ("i64", b))

    def whole(self, a: Int, size: int) -> Int:
        """Return the largest multiple of ``size`` that is at most ``a``."""
        if isinstance(a, int):
            return a // size * size
        return a if size == 1 else self.multiply(self.value(f"udiv i64 {a}, {size}"), size)

    def at(self, element: str, pointer: str, offset: Int) -> str:
        """Return the address of element number ``offset``."""
        return pointer if offset == 0 else self.value(f"getelementptr inbounds {element}, ptr {pointer}, i64 {offset}")

    def loop(
        self, start: Int, stop: Int, step: Int, body: Callable[[Int, Values], Values | None],
        carried: Sequence[str] = (), kind: str = "", once: bool = False,
    ) -> Values:  # fmt: skip
        """``for i in range(start, stop, step): carried = body(i, carried)``; what is carried has the type ``kind``.

        ``once``: at least one pass is certain, and not tested for.
        """
        carried = list(carried)
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
            if start >= stop:
                return carried
            if start + step >= stop:
                return body(start, carried) or []
            once = True
        number, before = next(self._names), self._block
        head, done = f"head{number}", f"done{number}"
        if once:
            self.put(f"br label %{head}")
        else:
            self.put(f"br i1 {self.value(f'icmp slt i64 {start}, {stop}')}, label %{head}, label %{done}")
        self._open(head)
        place = len(self.lines)
        index, inside = f"%i{number}", [f"%c{number}.{k}" for k in range(len(carried))]
        after = body(index, inside) or []
        following = self.value(f"add nuw nsw i64 {index}, {step}")
        self.put(f"br i1 {self.value(f'icmp slt i64 {following}, {stop}')}, label %{head}, label %{done}")
        merged = [(kind, *three) for three in zip(inside, carried, after, strict=True)]
        self.lines[place:place] = [
            f"  {name} = phi {t} [ {first}, %{before} ], [ {again}, %{self._block} ]"
            for t, name, first, again in [("i64", index, start, following), *merged]
        ]
        last = self._block
        self._open(done)
        if once:
            return after
        return [self.value(f"phi {t} [ {first}, %{before} ], [ {again}, %{last} ]") for t, _, first, again in merged]

    def parts(self, size: int, step: int, body: Callable[[Int, int], None]) -> None:
        """``body(start, count)`` for each part of ``size``: whole ones of ``step`` in a loop, and then the rest."""
        whole = size // step * step
        self.loop(0, whole, step, lambda k, _: body(k, step))
        if whole < size:
            body(whole, size - whole)

    def _open(self, block: str) -> None:
        self.lines.append(f"{block}:")
        self._block = block

    def function(self, name: str, parameters: str, attributes: str) -> str:
        """Return the text of a module with this one function, which returns nothing."""
        function = [f"define void @{name}({parameters}) #0 {{", "entry:", *self.lines, "  ret void", "}"]
        return "\n".join([*sorted(self.declarations), *function, f"attributes #0 = {{ {attributes} }}", ""])
