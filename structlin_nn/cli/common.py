"""Common parts of the commands: the parser, groups of options, and printing.

`structlin train` reads its options with tyro, from the dataclasses of the recipes. The other commands have no such
dataclasses. Their parser needs no library, so that `structlin structures` runs without the extra ``train``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from structlin_nn._text import suggestion, table, unknown

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

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed arguments; an unknown option is reported first, before argparse reads it as a value."""
        known = self._option_string_actions
        for word in takewhile(lambda word: word != "--", arguments):
            name = word.partition("=")[0]
            if name.startswith("-") and name not in known and not re.fullmatch(r"-|-(\d.*|\.\d.*|inf|nan)", name):
                self.error(f"unknown option {name}{suggestion(name, known)}")
        return self.parse_args(arguments)


def add(
    to: Any, spec: str, about: str = "", default: Any = None, kind: Any = None, *, among: Sequence[str] = (),
    what: str = "", **more: Any,
) -> None:  # fmt: skip
    """Add an argument to a parser or a group.

    `spec` is its names and what stands for its value, such as ``--steps N``, or ``MODEL`` for a positional one. Without
    a value it is a flag. It has the type `kind`, or that of `default`, or is one of the names `among`, which messages
    call `what`. If the default is a list, the option is repeatable. The help shows other defaults.
    """
    names = [word for word in spec.split() if word.startswith("-")]
    values = [word for word in spec.split() if not word.startswith("-")]
    if not values:
        to.add_argument(*names, action="store_true", help=about)
        return
    if among:
        about = f"{about}: {', '.join(among)}" if about else ", ".join(among)
        kind = partial(one_of, what or (names or values)[0].strip("-").replace("-", " ").lower(), among)
    if isinstance(default, list):
        more["action"] = "append"
    elif default is not None and default is not False and default != "":
        about += f" ({','.join(map(str, default)) if isinstance(default, tuple) else default})"
    kind = kind or (type(default) if isinstance(default, int | float) else str)
    to.add_argument(
        *names or [values[0].lower()], type=kind, default=default, metavar=values[0], help=about.strip(), **more
    )


def one_of(what: str, known: Sequence[str], word: str) -> str:
    """Return a word if it is known; argparse's error, with the nearest, for any other."""
    if word not in known:
        raise argparse.ArgumentTypeError(unknown(what, word, known))
    return word


def model_options(parser: argparse.ArgumentParser, structure: str | None, usual: str) -> None:
    """Add the options of a model with structured layers. `structure` is the default, and `usual` names the sizes'."""
    about = "one of `structlin structures`"
    add(parser, "--structure NAME", about if structure else f"{about} (dense, or the model as it is)", structure)
    add(parser, "--layers NAME", among=LAYERS)
    add(parser, "--rms-cap", "RMS-capped factors, with learned gains")
    size_options(parser.add_argument_group(f"sizes of a named model ({usual} unless given)"), SIZES)
    structure_options(parser)


def size_options(parser: Any, names: Iterable[str]) -> None:
    """Add an integer option for each size of the named models."""
    for name in names:
        add(parser, f"--{name.replace('_', '-')} N", kind=int)


def own_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of models other than the named ones."""
    own = parser.add_argument_group(f"models by {FORMS}")
    add(own, "--width-option NAME", "argument that sets the width (timm, hf)")
    add_model_option(own)


def add_model_option(parser: Any) -> None:
    """Add ``--model-option NAME=JSON``."""
    about = "argument of the model or its configuration, repeatable"
    add(parser, "--model-option NAME=JSON", about, [], partial(name_and_value, "NAME=JSON"))


def structure_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of structlin's structures, and ``--option`` for those of other structures."""
    group = parser.add_argument_group("options of the structure")
    add(group, "--rank R", "rank, or one rank for each inner bond: 2,4", kind=integers)
    add(group, "--rank-fraction F", "rank as a share of min(inputs, outputs)", kind=float)
    add(group, "--blocks B", "number of blocks", kind=int)
    add(group, "--cores C", "number of factors (Kronecker, Tensor-Train)", kind=int)
    add(group, "--factorization RULE", "split of sizes: balanced, or greedy (the paper's)")
    of_json = partial(name_and_value, "NAME=JSON")
    add(group, "--option NAME=JSON", "another option of the structure, repeatable", [], of_json)


def layer_patterns(parser: Any, usual: str) -> None:
    """Add ``--layers`` and ``--exclude``, which select layers by name (`layers_of`)."""
    add(parser, "--layers PATTERN", f"{', '.join(LAYERS)}, or patterns of names, repeatable ({usual})", action="append")
    add(parser, "--exclude PATTERN", "layers to leave, repeatable", [])


def layers_of(patterns: Sequence[str]) -> str | tuple[str, ...]:
    """Return the patterns of ``--layers``, or the name of a preset."""
    return patterns[0] if len(patterns) == 1 and patterns[0] in LAYERS else tuple(patterns)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options of these names that are neither None nor flags that are off."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None and value is not False}


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


def name_and_value(form: str, text: str) -> tuple[str, Any]:
    """Return name and value of an option of the form NAME=VALUE, or NAME=JSON with the value that it states."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
    if not form.endswith("JSON"):
        return name, value
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the value of {name} must be JSON, got {value!r}") from None


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


def check_confidence(value: float) -> None:
    """Raise ValueError for a confidence that is not between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"--confidence must be between 0 and 1, got {value:g}")


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout: plans and other dataclasses by their fields, and errors by their messages."""

    def plain(part: Any) -> Any:
        return str(part) if isinstance(part, Exception) else asdict(part)

    print(json.dumps(value, indent=2, allow_nan=False, default=plain))


def show(arguments: argparse.Namespace, record: Any, text: object) -> None:
    """Print a record as JSON, if the option --json is given, or else a text."""
    if arguments.json:
        print_json(record)
    else:
        print(text)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table (`structlin_nn._text.table`) on stdout."""
    print(table(head, rows, left))


def fail(command: str, reason: object) -> int:
    """Print why a command failed, in one line on stderr, and return the exit code 1."""
    print(f"structlin {command}: {' '.join(str(reason).split())}", file=sys.stderr)
    return 1
