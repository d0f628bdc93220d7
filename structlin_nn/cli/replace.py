"""``structlin replace``: preview the replacement of the layers of any model."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from structlin_nn.cli.common import (
    UsageError,
    choice,
    given_structure_options,
    name_and_value,
    print_json,
    structure_options,
)

HELP = "preview which layers of a model a structure replaces, and what they cost"
DEARER = ("warn", "error", "skip", "allow")
EXAMPLES = """\
examples:
  structlin replace timm:vit_small_patch16_224 --structure block_tensor_train --rank 2
  structlin replace hf:llama --structure monarch --blocks 8 --layers 'model.layers.*'
  structlin replace my_package.models:make_model --structure low_rank --rank 16 --json

MODEL is timm:NAME, hf:CONFIG (a model type, or a folder with config.json), or a function of a module that Python can
import. The model is built on the meta device, without memory. The command prints a line for each layer that would be
replaced, and for each weight matrix that would stay dense, with the reason.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="timm:NAME, hf:CONFIG, or package.module:function")
    parser.add_argument("--structure", required=True, metavar="NAME", help="one of `structlin structures`")
    parser.add_argument(
        "--layers", action="append", metavar="PATTERN",
        help="all, all_but_last, intermediate, or patterns of names, repeatable (all_but_last)",
    )  # fmt: skip
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave, repeatable")
    parser.add_argument("--min-features", type=int, default=0, metavar="N", help="leave smaller layers dense")
    parser.add_argument("--convolutions", action="store_true", help="replace convolutions of kernel size 1 too")
    parser.add_argument(
        "--dearer", type=choice("choice", DEARER), default="warn", metavar="WHAT",
        help="for layers that would cost more than dense: warn, error, skip, allow (warn)",
    )  # fmt: skip
    parser.add_argument(
        "--model-option", type=name_and_value, action="append", default=[], metavar="NAME=JSON",
        help="argument of the model or its configuration, repeatable",
    )  # fmt: skip
    structure_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from structlin_nn._replacement import PRESETS
    from structlin_nn.models.named import open_named
    from structlin_nn.torch import replace_linear

    layers: Any = arguments.layers or "all_but_last"
    if isinstance(layers, list) and len(layers) == 1 and layers[0] in PRESETS:
        (layers,) = layers
    told: list[str] = []
    try:
        model = open_named(arguments.model, **dict(arguments.model_option))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = replace_linear(
                model, arguments.structure, layers=layers, exclude=arguments.exclude, shared_weights="skip",
                min_features=arguments.min_features, convolutions=arguments.convolutions, dearer=arguments.dearer,
                **given_structure_options(arguments),
            )  # fmt: skip
        told = [str(w.message) for w in caught if "dearer" in str(w.message)]
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(report.to_dict())
    else:
        print(report)
        for text in told:
            print(f"warning: {text}")
    return 0
