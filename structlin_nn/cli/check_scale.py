"""``structlin check-scale``: check that a model is parametrised right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import (
    choice,
    given_structure_options,
    misuse,
    name_and_value,
    print_json,
    print_table,
    structure_options,
    suggestion,
)  # fmt: skip
from structlin_nn.cli.count import LAYERS, MODELS, RULES

HELP = "check that features, and what a step changes of them, keep their size when the width grows"
OPTIMIZERS = ("adam", "adamw", "sgd", "muon")
FORMS = "timm:NAME, hf:CONFIG, or package.module:function"
SIZES = ("num-classes", "heads", "head-dim", "depth", "expansion", "patch", "vocabulary", "context")
EXAMPLES = """\
examples:
  structlin check-scale cifar-mlp --structure block_tensor_train --naive --plot check.png
  structlin check-scale gpt2 --structure monarch --blocks 4 --widths 64,128,256 --optimizer adamw
  structlin check-scale my_package.my_module:make_model --base-width 64 --structure low_rank --rule rank_corrected
  structlin check-scale hf:gpt2 --width-option n_embd --base-width 64 --widths 64,128 --model-option n_layer=2
  structlin check-scale timm:vit_tiny_patch16_224 --width-option embed_dim --base-width 48 --widths 48,96 \\
      --parameter-rule '*_token=1' --structure monarch

MODEL is one of the named models, at small sizes; a function of a width in a module that Python can import, which
returns a torch model that has example_input(batch), or (model, inputs); or timm:NAME or hf:CONFIG, with the argument
that sets their width. --structure replaces all linear layers but the last. The command trains for a few steps on
random inputs. For every layer the table shows the RMS of its outputs at initialisation and of their change, and the
slopes of both by width: a slope of 0 is flat. The exit code is 0 where all layers are flat under the structure-aware
learning rates, and 1 where one is not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model", metavar="MODEL", help=", ".join(MODELS) + ", timm:NAME, hf:CONFIG, or package.module:function"
    )
    parser.add_argument("--widths", type=_widths, default=(64, 256, 1024), metavar="W,...", help="(64,256,1024)")
    parser.add_argument("--base-width", type=int, metavar="W0", help="where the learning rate was tuned")
    parser.add_argument("--structure", metavar="NAME", help="one of `structlin structures` (dense; as it is)")
    parser.add_argument("--layers", type=choice("layers", LAYERS), metavar="NAME", help=", ".join(LAYERS))
    parser.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    parser.add_argument("--rule", type=choice("rule", RULES), default="paper", metavar="NAME", help=", ".join(RULES))
    parser.add_argument(
        "--optimizer", type=choice("optimizer", OPTIMIZERS), default="adam", metavar="NAME", help=", ".join(OPTIMIZERS)
    )
    parser.add_argument("--lr", type=float, metavar="X", help="rate at base width (0.001; sgd 0.05, muon 0.02)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of the optimiser (4)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="initialisations to average over (3)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="samples (32)")
    parser.add_argument("--threshold", type=float, metavar="S", help="a slope beyond it is not flat (0.33)")
    parser.add_argument("--naive", action="store_true", help="the same with naive learning rates, to compare")
    sizes = parser.add_argument_group("sizes of a named model (small ones unless given)")
    for name in SIZES:
        sizes.add_argument(f"--{name}", type=int, metavar="N")
    structure_options(parser)
    own_model_options(parser)
    parser.add_argument(
        "--parameter-rule", type=name_and_value, action="append", default=[], metavar="PATTERN=X",
        help="learning-rate multiplier of parameters by name, repeatable",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="write a figure: .png, .svg or .pdf")


def own_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of models that are not named ones."""
    own = parser.add_argument_group("models by timm:NAME, hf:CONFIG or package.module:function")
    own.add_argument("--width-option", metavar="NAME", help="argument that sets the width (timm, hf)")
    own.add_argument(
        "--model-option", type=name_and_value, action="append", default=[], metavar="NAME=JSON",
        help="argument of the model or its configuration, repeatable",
    )  # fmt: skip


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas, got {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from structlin_nn.scale_check import THRESHOLD, check_scale
    from structlin_nn.torch import ParameterRule

    with misuse(ImportError, OSError, TypeError, ValueError):
        settings = build_settings(arguments) | {
            "widths": arguments.widths, "optimizer": arguments.optimizer, "lr": arguments.lr,
            "steps": arguments.steps, "seeds": arguments.seeds, "batch_size": arguments.batch_size,
            "threshold": THRESHOLD if arguments.threshold is None else arguments.threshold,
            "rules": {pattern: ParameterRule(value) for pattern, value in arguments.parameter_rule},
        }  # fmt: skip
        rules = (False, True) if arguments.naive else (True,)
        checks = [check_scale(**settings, structure_aware=aware) for aware in rules]
        if arguments.plot:
            from structlin_nn.figures.scale import check_figure
            from structlin_nn.figures.style import save

            save(check_figure([check.to_dict() for check in checks]), Path(arguments.plot))
    if arguments.json:
        print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            _print(check)
        if arguments.plot:
            print(f"figure {arguments.plot}")
    return 0 if checks[-1].passed else 1


def build_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the function that builds a named model."""
    from structlin_nn.models import StructureConfig
    from structlin_nn.scale_check import builder_of, named_builder

    options = given_structure_options(arguments)
    sizes = {key: value for name in SIZES if (value := getattr(arguments, key := name.replace("-", "_"))) is not None}
    common = {"rms_cap": arguments.rms_cap, "rule": arguments.rule}
    if ":" not in arguments.model:
        if arguments.model not in MODELS:
            raise ValueError(
                f"unknown model {arguments.model!r}{suggestion(arguments.model, MODELS)} "
                f"(one of {', '.join(MODELS)}, or package.module:function)"
            )
        if arguments.width_option or arguments.model_option:
            raise ValueError("--width-option and --model-option are for models that are not named")
        config = StructureConfig(arguments.structure or "dense", options, layers=arguments.layers, **common)
        return named_builder(arguments.model, structure=config, base_width=arguments.base_width, **sizes)
    if sizes:
        raise ValueError(f"--{next(iter(sizes)).replace('_', '-')} is an option of named models")
    if arguments.base_width is None:
        raise ValueError("a model of your own needs --base-width, where its learning rate is tuned")
    if arguments.structure is None and (options or arguments.rms_cap or arguments.layers or arguments.rule != "paper"):
        raise ValueError("options of a structure need --structure")
    return builder_of(
        arguments.model, base_width=arguments.base_width, structure=arguments.structure,
        layers=arguments.layers or "all_but_last", options=options, width_option=arguments.width_option,
        model_options=dict(arguments.model_option), **common,
    )  # fmt: skip


def _print(check: Any) -> None:
    rule = "structure-aware" if check.structure_aware else "naive"
    print(
        f"{check.model}, {check.optimizer} at {check.lr:g}, base width {check.base_width}, {rule} learning rates: "
        f"RMS of the change after {_number(check.steps, 'step')}, {_number(check.seeds, 'seed')}\n"
    )
    head = ("layer", "initial", "slope", *(f"change {width}" for width in check.widths), "slope", "verdict")
    rows = [
        (
            layer.name or "(model)", f"{layer.initial[-1]:.3g}", _slope(layer.initial_slope),
            *(f"{value:.3g}" for value in layer.change[-1]), _slope(layer.change_slope), layer.verdict,
        )
        for layer in check.layers
    ]  # fmt: skip
    print_table(head, rows)
    off = sum(layer.verdict not in ("flat", "fixed") for layer in check.layers)
    found = f"{off} of {len(check.layers)} are not" if off else "all layers are"
    print(f"\n{found} flat: a slope beyond {check.threshold:g} grows or vanishes with the width\n")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _slope(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
