"""The arrays that a block of tokens needs in a pass, and their forms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._schedule import Operation

ENDS = "state", "flow"
Key = tuple[str, int, str]  # activation ("state") or gradient ("flow"), or a copy of one, its number, its form


class Forms:
    """The arrays that a block needs; an activation may have several, in different forms.

    ``plain``: in the type that is computed in. In bfloat16: ``half``, ``zipped`` along an axis, and with the numbers of
    two ``tokens`` side by side. ``kept``: by the forward pass, only to be copied. For products by tiles there are
    copies of a "turned state" or a "turned flow": ``turned`` (:class:`._tiles.Turn`), and with the tokens ``last``; for
    other products ``exchanged`` (:mod:`._turns`).

    Arrays that are not needed at the same time share memory. ``now`` is the number of the product to which the next
    calls of :meth:`read` and :meth:`write` belong; None if it is unknown.
    """

    def __init__(self, inside: str, rows: Sequence[int]) -> None:
        self.elements = {"plain": inside, "half": "bfloat", "zipped": "i32", "tokens": "i32", "kept": ""}
        self.elements |= {"turned": "i32", "last": "i32", "exchanged": inside}
        self.rows = rows
        self._keys: list[Key] = []
        self.now: int | None = None
        self._reads: dict[Key, tuple[int, int]] = {}  # the first and the last
        self._written: dict[tuple[str, int], int] = {}

    def read(self, kind: str, number: int, form: str = "plain") -> None:
        key = kind, number, form
        if key not in self._keys:
            self._keys.append(key)
        if self.now is not None:
            first, last = self._reads.get(key, (self.now, self.now))
            self._reads[key] = min(first, self.now), max(last, self.now)

    def read_by(self, operation: Operation, kind: str, number: int) -> None:
        self.read(kind, number, operation.reads)
        if operation.turn is not None:
            self.read(f"turned {kind}", number, operation.copied)

    def write(self, kind: str, number: int) -> None:
        """Record that all forms of an activation are written now."""
        if self.now is not None:
            self._written[kind, number] = self.now

    def keep(self, kind: str, numbers: range, form: str = "plain") -> list[Key]:
        """Return the keys of activations that lie outside of scratch memory."""
        self.now = None
        for number in numbers:
            self.read(kind, number, form)
        return [(kind, number, form) for number in numbers]

    def entered(self, when: int, skip: Collection[Key]) -> list[Key]:
        """Return the arrays that no product writes and that product ``when`` is the first to read."""
        return [
            key for key in self._keys
            if self._reads.get(key, (-1,))[0] == when and key[:2] not in self._written and key[0] in ENDS
            and key not in skip
        ]  # fmt: skip

    def places(self, outside: Collection[Key]) -> tuple[dict[Key, int], int]:
        """Return the start of each array in scratch memory, and the size of that memory, in bytes of a token.

        The largest arrays are placed first, each at the lowest place that no array needed at the same time occupies.
        """
        sizes = {k: self.rows[k[1]] * BYTES[self.elements[k[2]]] for k in self._keys if k not in outside}
        found: dict[Key, int] = {}
        for key in sorted(sizes, key=lambda key: -sizes[key]):
            (first, last), start = self._span(key), 0
            taken = [(found[k], found[k] + sizes[k]) for k in found if self._meet(self._span(k), (first, last))]
            for low, high in sorted(taken):
                if start + sizes[key] <= low:
                    break
                start = max(start, high)
            found[key] = start
        return found, max((found[key] + sizes[key] for key in found), default=0)

    def bytes(self, outside: Collection[Key]) -> int:
        """Return the most bytes of a token that are in use in scratch memory at the same time."""
        number = dict.fromkeys(("plain", "exchanged"), BYTES[self.elements["plain"]])
        used = {
            k: self.rows[k[1]] * number.get(k[2], BYTES["bfloat"]) for k in self._keys if k not in outside
        }  # fmt: skip
        times = {self._span(key)[0] for key in used}
        return max((sum(used[k] for k in used if self._meet(self._span(k), (t, t))) for t in times), default=0)

    def _span(self, key: Key) -> tuple[float, float]:
        if key not in self._reads:
            return -math.inf, math.inf
        first, last = self._reads[key]
        return min(first, self._written.get(key[:2], first)), last

    @staticmethod
    def _meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[1] and other[0] <= one[1]

    def of(self, arrays: Mapping[Key, Array], kind: str, number: int) -> list[Array]:
        return [array for key, array in arrays.items() if key[:2] == (kind, number)]

    def one(self, arrays: Mapping[Key, Array], kind: str, number: int, form: str = "plain") -> Array:
        return arrays[kind, number, form]


@dataclass(frozen=True)
class Array:
    """An array of the table: ``row`` numbers for each token; 0 if it does not have a row for each token."""

    pointer: str
    element: str
    row: int
    zipped: bool = False
