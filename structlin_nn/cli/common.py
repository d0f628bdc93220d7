"""Common parts of the commands: the parser, groups of options, and printing.

`structlin train` reads its options with tyro, from the dataclasses of the recipes. The other commands have no such
dataclasses. Their parser needs no library, so that `structlin structures` runs without the extra ``train``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from structlin_nn._text import suggestion, table

# The help must not import torch, so these names are repeated here. A test compares them with the library's.
MODELS = ("cifar-mlp", "cifar-vit", "imagenet-vit", "gpt2")
LAYERS = ("all", "all_but_last", "intermediate")
RULES = ("paper", "rank_corrected")
DTYPES = ("float64", "float32", "bfloat16", "float16")
DEVICES = ("a100", "h100", "h200", "b200", "l40s", "rtx4090", "cpu")
SIZES = ("num_classes", "heads", "head_dim", "depth", "expansion", "patch", "vocabulary", "context")
FORMS = "timm:NAME, hf:CONFIG, or package.module:function"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that prints one line on misuse and exits with 2."""

    def __init__(self, **settings: Any) -> None:
        settings["formatter_class"] = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, and exit with code 2."""
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def check_options(self, arguments: Sequence[str]) -> None:
        """Exit with code 2 for an unknown option, before argparse reads it as a value."""
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


def choice(kind: str, known: Sequence[str]) -> Callable[[str], str]:
    """Return an argparse type that accepts some names, and suggests the nearest name for any other word."""

    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {kind} {word!r}{suggestion(word, known)} (one of {', '.join(known)})"
            )
        return word

    return check


def add_choice(
    parser: Any, name: str, known: Sequence[str], default: str | None = None, about: str = "", kind: str = "",
    also: str = "",
) -> None:  # fmt: skip
    """Add an argument that accepts one of some names; its help lists them. `also` is a second name of it."""
    names, usual = ", ".join(known), f" ({default})" if default else ""
    parser.add_argument(
        *filter(None, (name, also)), type=choice(kind or name.strip("-").replace("-", " "), known), default=default,
        metavar="NAME" if name.startswith("-") else name.upper(),
        help=f"{about}: {names}{usual}" if about else names + usual,
    )  # fmt: skip


def model_options(parser: argparse.ArgumentParser, structure: str | None, usual: str) -> None:
    """Add the options of a model with structured layers. `structure` is the default, and `usual` names the sizes'."""
    default = structure or "dense, or the model as it is"
    parser.add_argument(
        "--structure", default=structure, metavar="NAME", help=f"one of `structlin structures` ({default})"
    )
    add_choice(parser, "--layers", LAYERS)
    parser.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    size_options(parser.add_argument_group(f"sizes of a named model ({usual} unless given)"), SIZES)
    structure_options(parser)


def size_options(parser: Any, names: Iterable[str]) -> None:
    """Add an integer option for each size of the named models."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")


def own_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of models other than the named ones."""
    own = parser.add_argument_group(f"models by {FORMS}")
    own.add_argument("--width-option", metavar="NAME", help="argument that sets the width (timm, hf)")
    add_model_option(own)


def add_model_option(parser: Any) -> None:
    """Add ``--model-option NAME=JSON``."""
    parser.add_argument(
        "--model-option", type=name_and_value, action="append", default=[], metavar="NAME=JSON",
        help="argument of the model or its configuration, repeatable",
    )  # fmt: skip


def structure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of structlin's structures, and ``--option`` for those of other structures."""
    group = parser.add_argument_group("options of the structure")
    group.add_argument("--rank", type=integers, metavar="R", help="rank, or one rank for each inner bond: 2,4")
    group.add_argument("--rank-fraction", type=float, metavar="F", help="rank as a share of min(inputs, outputs)")
    group.add_argument("--blocks", type=int, metavar="B", help="number of blocks")
    group.add_argument("--cores", type=int, metavar="C", help="number of factors (Kronecker, Tensor-Train)")
    group.add_argument("--factorization", metavar="RULE", help="split of sizes: balanced, or greedy (the paper's)")
    group.add_argument(
        "--option", type=name_and_value, action="append", default=[], metavar="NAME=JSON",
        help="another option of the structure, repeatable",
    )  # fmt: skip


def layer_patterns(parser: Any, usual: str) -> None:
    """Add ``--layers`` and ``--exclude``, which select layers by name (`layers_of`)."""
    parser.add_argument(
        "--layers", action="append", metavar="PATTERN",
        help=f"{', '.join(LAYERS)}, or patterns of names, repeatable ({usual})",
    )  # fmt: skip
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave, repeatable")


def layers_of(patterns: Sequence[str]) -> str | tuple[str, ...]:
    """Return the patterns of ``--layers``, or the name of a preset."""
    return patterns[0] if len(patterns) == 1 and patterns[0] in LAYERS else tuple(patterns)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options of these names that are not None."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def given_structure_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of the structure as keywords of `structlin.design`."""
    found = given(arguments, ("rank", "rank_fraction", "blocks", "cores", "factorization"))
    for name, value in arguments.option:
        if name in found:
            raise ValueError(f"option {name!r} of the structure is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    return found


def integers(text: str) -> int | tuple[int, ...]:
    """Return an integer, or a tuple of several."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or several with commas, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


def positive(text: str) -> int:
    """Return an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def device_of(name: str) -> Any:
    """Return a device of torch; ValueError for one that does not exist."""
    from structlin_nn.recipes._processes import available_device

    try:
        return available_device(name)
    except RuntimeError as error:  # torch's error for a name that is no device
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error


def check_folder(option: str, path: str) -> None:
    """Raise FileNotFoundError if the folder of a file that will be written does not exist."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {Path(path).parent} does not exist")


def name_and_value(text: str) -> tuple[str, Any]:
    """Return an option NAME=JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the value of {name} must be JSON, got {value!r}") from None


def save_figure(figure: Any, path: str) -> None:
    """Write a figure of `structlin_nn.figures` to a file."""
    from structlin_nn.figures.style import save

    save(figure, Path(path))


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table (`structlin_nn._text.table`) on stdout."""
    print(table(head, rows, left))


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning in one line on stderr, in place of ``warnings.showwarning``."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def fail(command: str, reason: object) -> int:
    """Print why a command failed, in one line on stderr, and return the exit code 1."""
    print(f"structlin {command}: {' '.join(str(reason).split())}", file=sys.stderr)
    return 1
