"""Parts shared by the commands: a parser whose errors are one line, options of structures, and tables.

`structlin train` reads its options with tyro, from the dataclasses of the recipes. The commands that share this parser
have no such dataclasses.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from structlin_nn._text import suggestion, table

__all__ = ["Parser", "UsageError", "choice", "misuse", "print_json", "print_table", "structure_options", "suggestion"]


class UsageError(Exception):
    """Misuse of a command: printed as one line, with exit code 2."""


@contextmanager
def misuse(*kinds: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into a `UsageError` within the block."""
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that prints one line on misuse and exits with 2."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, and exit with code 2."""
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def check_options(self, arguments: Sequence[str]) -> None:
        """Exit with code 2 for an unknown option, before argparse takes it for a value."""
        known = self._option_string_actions
        below = next((action for action in self._actions if isinstance(action, argparse._SubParsersAction)), None)
        for place, argument in enumerate(arguments):
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if below is not None and not name.startswith("-"):
                if name not in below.choices:
                    nearest = suggestion(name, below.choices)
                    self.error(f"unknown name {name!r}{nearest} (one of {', '.join(below.choices)})")
                below.choices[name].check_options(arguments[place + 1 :])
                return
            if not name.startswith("-") or re.fullmatch(r"-|-(\d.*|\.\d.*|inf|nan)", name) or name in known:
                continue
            self.error(f"unknown option {name}{suggestion(name, known)}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def choice(kind: str, known: Sequence[str]) -> Callable[[str], str]:
    """Return an argparse type that accepts some names, and names the nearest for any other word."""

    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {kind} {word!r}{suggestion(word, known)} (one of {', '.join(known)})"
            )
        return word

    return check


def structure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of structlin's structures, and ``--option`` for those of other structures."""
    group = parser.add_argument_group("options of the structure")
    group.add_argument("--rank", type=_integers, metavar="R", help="rank, or one for each inner bond: 2,4")
    group.add_argument("--rank-fraction", type=float, metavar="F", help="rank as a share of min(inputs, outputs)")
    group.add_argument("--blocks", type=int, metavar="B", help="number of blocks")
    group.add_argument("--cores", type=int, metavar="C", help="number of factors (Kronecker, Tensor-Train)")
    group.add_argument("--factorization", metavar="RULE", help="split of sizes: balanced, or greedy (the paper's)")
    group.add_argument(
        "--option",
        type=name_and_value,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another option of the structure, repeatable",
    )


def given_structure_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of the structure as keywords of `structlin.design`."""
    names = ("rank", "rank_fraction", "blocks", "cores", "factorization")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name, value in arguments.option:
        if name in given:
            raise UsageError(f"option {name!r} of the structure is given twice")
        given[name] = value
    return given


def _integers(text: str) -> Any:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or several with commas, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def name_and_value(text: str) -> tuple[str, Any]:
    """Return an option NAME=JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the value of {name} must be JSON, got {value!r}") from None


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table (`structlin_nn._text.table`) on stdout."""
    print(table(head, rows, left))
