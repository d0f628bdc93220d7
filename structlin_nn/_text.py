"""Tables, the nearest known word, a check of integers, and the progress bar."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, rule: bool = True) -> str:
    """Return a table as text, its first `left` columns aligned left and the others right.

    A negative `left` counts the left-aligned columns at the right end. With `rule`, a line is below the head.

    Examples
    --------
    >>> print(table(("name", "MACs"), [("dense", "64"), ("low_rank", "7")]))
    name      MACs
    --------  ----
    dense       64
    low_rank     7
    """
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    is_left = [i < left if left >= 0 else i >= len(head) + left for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows] if rule else [head, *rows]
    cells = [[c.ljust(w) if at else c.rjust(w) for c, w, at in zip(r, widths, is_left, strict=True)] for r in lines]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean x?)" for the known word nearest to `word`, or "" if none is near.

    Examples
    --------
    >>> suggestion("widht", ["width", "depth"])
    ' (did you mean width?)'
    """
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def unknown(what: str, word: Any, known: Iterable[str], *more: str) -> str:
    """Return the message about an unknown word, with the nearest known one, and `more` forms that are allowed."""
    known = list(known)
    return f"unknown {what} {word!r}{suggestion(str(word), known)}; one of {', '.join((*known, *more))}"


def check_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless a name is known."""
    if name not in known:
        raise ValueError(unknown(what, name, known))


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def read_value(text: str) -> int | float | str:
    """Return the number that a text states, or else the text without the spaces around it.

    Examples
    --------
    >>> read_value("12"), read_value("1e3"), read_value(" dense ")
    (12, 1000.0, 'dense')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def progress_bar(
    total: float, label: str, *, done: float = 0, unit: str = "it", quiet: bool = False, **more: Any
) -> Any:
    """Return a bar of tqdm on stderr, with `more` of its options.

    If stderr is a file, each refresh is a line of its own, every 30 seconds.
    """
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=done, desc=label, unit=unit, unit_scale=True, dynamic_ncols=True, mininterval=interval,
        disable=quiet, **more,
    )  # fmt: skip


def occurrences(counts: Mapping[str, int]) -> str:
    """Return names with the number of times that each occurs.

    Examples
    --------
    >>> occurrences({"aten.relu": 2, "aten.add": 1})
    'aten.relu x2, aten.add x1'
    """
    return ", ".join(f"{name} x{number}" for name, number in counts.items())


def sizes_text(experts: int | None, shape: Sequence[int]) -> str:
    """Return the sizes of a weight, with the number of experts first if it has a matrix for each."""
    return " x ".join(map(str, shape if experts is None else (experts, *shape)))
