"""Which arrays a block of tokens needs in a pass, and in which forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structlin.execution.compiled._product import BYTES
from structlin.execution.compiled._schedule import Operation

Key = tuple[str, int, str]  # activation ("state") or gradient ("flow"), its number, its form


class Forms:
    """Which arrays a block needs. There may be several of one activation.

    ``plain``: in the type that is computed in. In bfloat16: ``half``, ``zipped`` along an axis, and with the numbers of
    two ``tokens`` side by side. ``kept``: by the forward pass, only to be copied. For products by tiles there are
    copies of a "turned state" or a "turned flow": ``turned`` (:class:`._tiles.Turn`), and with the tokens ``last``.
    """

    def __init__(self, inside: str, rows: Sequence[int]) -> None:
        self.elements = {"plain": inside, "half": "bfloat", "zipped": "i32", "tokens": "i32", "kept": ""}
        self.elements |= {"turned": "i32", "last": "i32"}
        self._rows = rows
        self._keys: list[Key] = []

    def read(self, kind: str, number: int, form: str = "plain") -> None:
        if (kind, number, form) not in self._keys:
            self._keys.append((kind, number, form))

    def read_by(self, operation: Operation, kind: str, number: int) -> None:
        self.read(kind, number, operation.reads)
        if operation.turn is not None:
            self.read(f"turned {kind}", number, "turned")

    def keep(self, kind: str, numbers: range, form: str = "plain") -> list[Key]:
        """Arrays outside of scratch memory."""
        for number in numbers:
            self.read(kind, number, form)
        return [(kind, number, form) for number in numbers]

    def sizes(self, outside: Sequence[Key]) -> dict[Key, int]:
        """Numbers of each token of the arrays in scratch memory, without gradients that share it (:meth:`shared`)."""
        return {key: self._rows[key[1]] for key in self._keys if key not in outside and not self._shared(key, outside)}

    def shared(self, outside: Sequence[Key]) -> dict[Key, Key]:
        """Gradients that are written where an activation is, which is not read any more then, and that activation."""
        return {key: ("state", *key[1:]) for key in self._keys if self._shared(key, outside)}

    def _shared(self, key: Key, outside: Sequence[Key]) -> bool:
        held = ("state", *key[1:])
        return key[0] == "flow" and held in self._keys and held not in outside

    def bytes(self, outside: Sequence[Key]) -> int:
        """Of each token, that are read and written in scratch memory."""
        number = {"plain": BYTES[self.elements["plain"]]}
        return sum(row * number.get(key[2], BYTES["bfloat"]) for key, row in self.sizes(outside).items())

    def of(self, arrays: Mapping[Key, Array], kind: str, number: int) -> list[Array]:
        return [array for key, array in arrays.items() if key[:2] == (kind, number)]

    def one(self, arrays: Mapping[Key, Array], kind: str, number: int, form: str = "plain") -> Array:
        return arrays[kind, number, form]


@dataclass(frozen=True)
class Array:
    """Of the table: ``row`` numbers for each token, 0 for what is no row of each token."""

    pointer: str
    element: str
    row: int
    zipped: bool = False
