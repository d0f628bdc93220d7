"""``structlin``: find the command, check its options, and run it.

A command is a module with its HELP and EXAMPLES, ``add_arguments(parser)``, and ``run(arguments)``, which returns the
exit code.

The exit code is 0 for success, 1 for a run that failed or could not be written, 2 for misuse, with one line on stderr,
and 128 + number after a signal. Functions below the commands check their arguments, and their ImportError, TypeError,
ValueError and errors of a wrong path are misuse. No large library is imported before a command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from structlin_nn._text import suggestion
from structlin_nn.cli.common import Parser, fail

NAMES = (
    "demo", "prepare", "train", "sweep", "compress", "generate", "structures", "replace", "count", "tune", "fit",
    "plan", "check-scale", "figure", "report",
)  # fmt: skip
COMMANDS = {name: f"structlin_nn.cli.{name.replace('-', '_')}" for name in NAMES}
TYRO = ("train",)
"""Commands that read their own arguments."""
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
    parser = Parser(prog="structlin", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    # Only the chosen command adds its arguments: those of the others may need slow imports.
    asked = next((word for word in arguments if not word.startswith("-")), None)
    if arguments and asked == arguments[0] and asked in TYRO:
        return int(importlib.import_module(COMMANDS[asked]).main(arguments[1:]))
    if asked is not None and asked not in COMMANDS:
        parser.error(f"unknown command {asked!r}{suggestion(asked, COMMANDS)} (one of {', '.join(COMMANDS)})")
    chosen: tuple[Parser, ModuleType] | None = None
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        about = module.HELP[0].upper() + module.HELP[1:] + "."
        command = commands.add_parser(name, help=module.HELP, description=about, epilog=module.EXAMPLES)
        if name == asked:
            module.add_arguments(command)
            chosen = command, module
    before = arguments if asked is None else arguments[: arguments.index(asked)]
    parser.check_options(before)
    if chosen is None:
        parser.parse_args(arguments)
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    command, module = chosen
    command.check_options(arguments[arguments.index(command.prog.split()[-1]) + 1 :])
    parsed = parser.parse_args(arguments)
    try:
        return int(module.run(parsed))
    except BrokenPipeError:
        raise
    except (*_WRONG_PATHS, ImportError, TypeError, ValueError) as error:
        command.error(str(error))
    except OSError as error:
        return fail(asked or "", error)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"structlin {version('structlin')}"
    except PackageNotFoundError:
        return "structlin (not installed)"
