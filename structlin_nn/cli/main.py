"""``structlin``: find the command, check its options, and run it.

A command is a module with its HELP and EXAMPLES, ``add_arguments(parser)``, and ``run(arguments)``, which returns the
exit code, or None for 0.

The exit code is 0 for success, 1 for a run that failed or could not be written, 2 for misuse, with one line on stderr,
and 128 + number after a signal. Functions below the commands check their arguments, and their ImportError, TypeError,
ValueError and errors of a wrong path are misuse. No large library is imported before a command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from structlin_nn._text import unknown
from structlin_nn.cli.common import Parser, fail

NAMES = (
    "demo", "prepare", "train", "sweep", "compress", "generate", "structures", "replace", "count", "tune", "fit",
    "plan", "check-scale", "figure", "report",
)  # fmt: skip
COMMANDS = {name: f"structlin_nn.cli.{name.replace('-', '_')}" for name in NAMES}
_WRONG_PATHS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
DESCRIPTION = "Structured matrices in neural networks: list structures, count costs, train and compress models."
EXAMPLES = """\
examples:
  structlin demo                  train dense and structured networks at equal compute, in a few minutes
  structlin structures            list the structures
  structlin count cifar-mlp --width 256 --structure block_tensor_train
  structlin train cifar --structure monarch --width 256 --epochs 10

structlin COMMAND --help explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    Parameters
    ----------
    argv
        Arguments without the program's name. None takes those of this process.

    Examples
    --------
    >>> main(["structures", "--jsn"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("structlin: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`structlin structures | head`): flush nothing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name not in COMMANDS:
        _no_command(name, arguments)
    module = importlib.import_module(COMMANDS[name])
    if name == "train":  # reads its own arguments
        return int(module.main(rest))
    about = module.HELP[0].upper() + module.HELP[1:] + "."
    command = Parser(prog=f"structlin {name}", description=about, epilog=module.EXAMPLES)
    module.add_arguments(command)
    parsed = command.parse(rest)
    try:
        return int(module.run(parsed) or 0)
    except BrokenPipeError:
        raise
    except (*_WRONG_PATHS, ImportError, TypeError, ValueError) as error:
        command.error(str(error))
    except OSError as error:
        return fail(name, error)


def _no_command(word: str, arguments: list[str]) -> NoReturn:
    """Print help or the version, or report the misuse, and exit."""
    about = {name: importlib.import_module(place).HELP for name, place in COMMANDS.items()}
    listed = "\n".join(f"  {name:<13} {text}" for name, text in about.items())
    parser = Parser(
        prog="structlin", usage="structlin COMMAND ...", description=DESCRIPTION,
        epilog=f"commands:\n{listed}\n\n{EXAMPLES}",
    )  # fmt: skip
    try:
        known = version("structlin")
    except PackageNotFoundError:
        known = "(not installed)"
    parser.add_argument("--version", action="version", version=f"structlin {known}")
    if word and not word.startswith("-"):
        parser.error(unknown("command", word, COMMANDS))
    parser.parse(arguments)
    parser.error(f"a command is needed: {', '.join(COMMANDS)}")
