"""``structlin structures``: list the structures."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from typing import Any

from structlin_nn.cli.common import add, print_json

HELP = "list the structures with formula, parameters, options and source"
EXAMPLES = """\
examples:
  structlin structures            a readable list
  structlin structures --json     the same for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "--json", "print JSON instead of a list")


def describe(name: str) -> dict[str, Any]:
    """Return name, summary, formula, parameters, options with defaults, and source of a structure."""
    import structlin

    cls = structlin.structure_class(name)
    summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    return {
        "name": name, "summary": summary, "formula": cls.formula, "parameters": cls.parameters,
        "options": structlin.structure_options(name), "source": cls.source,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    import structlin

    structures = [describe(name) for name in structlin.structure_names()]
    if arguments.json:
        print_json(structures)
        return
    print("A formula is a chain of steps 'vector,factor->vector'; vectors are rows of shape (d_in,) and (d_out,).")
    for structure in structures:
        print(f"\n{structure['name']}")
        options = ", ".join(f"{name}={value!r}" for name, value in structure["options"].items()) or "none"
        for key, text in (structure | {"options": options}).items():
            if key not in ("name", "summary") and text != "-":
                print(textwrap.fill(text, 110, initial_indent=f"  {key:<11}", subsequent_indent=" " * 13))
