"""Parsing of einsum chains, with errors that name the string, the step and the axis."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Step:
    """One einsum of two operands, ``input,factor->output``, with the roles of its axes.

    The role of an axis follows from the terms in which it occurs. A *contracted* axis occurs in input and factor, a
    *free* axis in factor and output, a *batch* axis in all three, a *carried* axis in input and output. Each attribute
    is a string of axes in the order of the factor (``carried``: in that of the input).

    Parameters
    ----------
    input, factor, output
        The three terms, strings in which each letter is an axis.

    Examples
    --------
    >>> step = Step.parse("pa,pfra->frp")
    >>> step.batch, step.free, step.contracted, step.carried
    ('p', 'fr', 'a', '')
    """

    input: str
    factor: str
    output: str

    @classmethod
    def parse(cls, text: str) -> Step:
        """Return the step of a string such as ``"pa,pfra->frp"``.

        Parameters
        ----------
        text
            The string ``input,factor->output``, in which each letter is an axis.

        Returns
        -------
        Step
            The step.

        Raises
        ------
        ValueError
            If the string has another form or an axis has none of the four roles. The message names the axis.
        """
        squeezed = "".join(text.split())
        left, arrow, output = squeezed.partition("->")
        terms = left.split(",")
        if not arrow or len(terms) != 2 or "->" in output or "," in output:
            raise ValueError(f"step {text.strip()!r}: expected the form 'input,factor->output', as in 'i,oi->o'")
        step = cls(terms[0], terms[1], output)
        step.validate()
        return step

    def validate(self) -> None:
        """Check that every axis has one of the four roles.

        Raises
        ------
        ValueError
            If an axis has none. The message names it.
        """
        for name, term in (("input", self.input), ("factor", self.factor), ("output", self.output)):
            if not term:
                raise ValueError(f"step {str(self)!r}: the {name} has no axis")
            for axis in term:
                if not axis.isalpha():
                    raise ValueError(f"step {str(self)!r}: {axis!r} is not a letter")
                if term.count(axis) > 1:
                    raise ValueError(f"step {str(self)!r}: axis {axis!r} occurs twice in the {name}")
        for axis in dict.fromkeys(self.input + self.factor + self.output):
            places = [
                name
                for name, term in (("input", self.input), ("factor", self.factor), ("output", self.output))
                if axis in term
            ]
            if len(places) == 1:
                raise ValueError(
                    f"step {str(self)!r}: axis {axis!r} occurs only in the {places[0]}; "
                    "each axis must occur in two or three of input, factor and output"
                )

    def __str__(self) -> str:
        return f"{self.input},{self.factor}->{self.output}"

    @property
    def contracted(self) -> str:
        return "".join(a for a in self.factor if a in self.input and a not in self.output)

    @property
    def free(self) -> str:
        return "".join(a for a in self.factor if a in self.output and a not in self.input)

    @property
    def batch(self) -> str:
        return "".join(a for a in self.factor if a in self.input and a in self.output)

    @property
    def carried(self) -> str:
        return "".join(a for a in self.input if a in self.output and a not in self.factor)

    def transpose(self) -> Step:
        return Step(self.output, self.factor, self.input)


def axis_letter(number: int) -> str:
    """Return a different letter for each number 0, 1, ...: a to z, A to Z, then letters of other alphabets.

    Each letter is an identifier that Python does not normalize to another one, so that it can be a keyword of
    :meth:`structlin.Structure.parse`. There are more than 100,000 letters.

    Examples
    --------
    >>> axis_letter(0), axis_letter(51), axis_letter(52)
    ('a', 'Z', 'À')
    """
    if number < 52:
        return chr(ord("a") + number) if number < 26 else chr(ord("A") + number - 26)
    stop = 0x400
    while len(letters := _letters(stop)) <= number - 52:
        stop *= 2
    return letters[number - 52]


@cache
def _letters(stop: int) -> tuple[str, ...]:
    """Return letters beyond ASCII with code points below ``stop``."""
    found = map(chr, range(0xC0, stop))
    return tuple(a for a in found if a.isalpha() and a.isidentifier() and unicodedata.is_normalized("NFKC", a))


def parse_chain(text: str) -> tuple[Step, ...]:
    """Return the steps of a chain, which are separated by semicolons; errors name the chain and the step."""
    if not isinstance(text, str):
        raise TypeError(f"an einsum chain is a string, got {type(text).__name__}")
    steps = []
    for number, part in enumerate(text.split(";")):
        try:
            steps.append(Step.parse(part))
        except ValueError as error:
            raise ValueError(f"{text!r}, step {number}: {error}") from None
    return tuple(steps)


def check_sizes(steps: tuple[Step, ...], sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Check that every axis of the steps, and no other, has a positive integer size.

    Return pairs of axis and size in order of first occurrence.
    """
    text = "; ".join(map(str, steps))
    needed = dict.fromkeys("".join(s.input + s.factor + s.output for s in steps))
    for axis, size in sizes.items():
        if axis not in needed:
            raise ValueError(
                f"{text!r}: size given for axis {axis!r}, which occurs in no step; axes are {', '.join(needed)}"
            )
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{text!r}: the size of axis {axis!r} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{text!r}: the size of axis {axis!r} must be at least 1, got {size}")
    for number, step in enumerate(steps):
        for axis in step.input + step.factor + step.output:
            if axis not in sizes:
                raise ValueError(f"{text!r}, step {number} {str(step)!r}: no size given for axis {axis!r}")
    return tuple((axis, int(sizes[axis])) for axis in needed)
