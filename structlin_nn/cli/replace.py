"""``structlin replace``: preview the replacement of the layers of any model."""

from __future__ import annotations

import argparse
import sys
import warnings

from structlin_nn.cli import common
from structlin_nn.cli.common import add

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
    add(parser, "MODEL", common.FORMS)
    add(parser, "--structure NAME", "one of `structlin structures`", required=True)
    common.layer_patterns(parser, "all_but_last")
    add(parser, "--min-features N", "leave smaller layers dense", 0)
    add(parser, "--convolutions", "replace convolutions of kernel size 1 too")
    add(parser, "--dearer NAME", "for layers that would cost more than dense", "warn", among=DEARER, what="choice")
    common.add_model_option(parser)
    common.structure_options(parser)
    add(parser, "--json", "print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from structlin_nn.models.named import open_named
    from structlin_nn.torch import replace_linear

    model = open_named(arguments.model, **dict(arguments.model_option))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {' '.join(str(message).split())}", file=sys.stderr
        )
        report = replace_linear(
            model, arguments.structure, layers=common.layers_of(arguments.layers or ["all_but_last"]),
            exclude=arguments.exclude, shared_weights="skip", min_features=arguments.min_features,
            convolutions=arguments.convolutions, dearer=arguments.dearer, **common.given_structure_options(arguments),
        )  # fmt: skip
    common.show(arguments, report.to_dict(), report)
