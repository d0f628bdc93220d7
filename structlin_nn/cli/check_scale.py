"""``structlin check-scale``: check the parametrisation of a model across widths."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from structlin_nn._text import table
from structlin_nn.cli import common
from structlin_nn.cli.common import add

HELP = "check that features, and their change in a step, keep their size when the width grows"
OPTIMIZERS = ("adam", "adamw", "sgd", "muon")
EXAMPLES = """\
examples:
  structlin check-scale cifar-mlp --structure block_tensor_train --naive --plot check.png
  structlin check-scale gpt2 --structure monarch --blocks 4 --widths 64,128,256 --optimizer adamw
  structlin check-scale my_package.my_module:make_model --base-width 64 --structure low_rank --rule rank_corrected
  structlin check-scale hf:gpt2 --width-option n_embd --base-width 64 --widths 64,128 --model-option n_layer=2
  structlin check-scale timm:vit_tiny_patch16_224 --width-option embed_dim --base-width 48 --widths 48,96 \\
      --parameter-rule '*_token=1' --structure monarch

MODEL is a named model, at small sizes; a function of a width in a module that Python can import; or timm:NAME or
hf:CONFIG, with the argument that sets the width. The function returns a torch model that has example_input(batch), or
(model, inputs). --structure replaces all linear layers but the last, or those of --layers. Without --structure,
--layers, --rms-cap and --rule apply to dense layers. The command trains for a few steps on random inputs. The table
shows for each layer the RMS of its outputs at initialisation and of their change, and the slopes of both by width. A
slope of 0 is flat. The exit code is 0 if all layers are flat with the structure-aware learning rates, and 1 otherwise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "MODEL", f"{', '.join(common.MODELS)}, {common.FORMS}")
    add(parser, "--widths W", default=(64, 256, 1024), kind=common.integers)
    add(parser, "--base-width W0", "where the learning rate was tuned", kind=int)
    common.model_options(parser, None, "small ones")
    add(parser, "--rule NAME", default="paper", among=common.RULES)
    add(parser, "--optimizer NAME", default="adam", among=OPTIMIZERS)
    add(parser, "--lr X", "rate at base width (0.001; sgd 0.05, muon 0.02)", kind=float)
    add(parser, "--steps N", "steps of the optimiser", 4)
    add(parser, "--seeds N", "number of initialisations to average", 3)
    add(parser, "--batch-size N", "samples", 32)
    add(parser, "--threshold S", "largest absolute slope of a flat layer (0.33)", kind=float)
    add(parser, "--naive", "also run with naive learning rates, to compare")
    common.own_model_options(parser)
    rule = "learning-rate multiplier of parameters by name, repeatable"
    add(parser, "--parameter-rule PATTERN=X", rule, [], partial(common.name_and_value, "NAME=JSON"))
    add(parser, "--json", "print JSON instead of a table")
    add(parser, "--plot FILE", "write a figure: .png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.scale_check import check_scale
    from structlin_nn.torch import ParameterRule

    settings = build_settings(arguments) | common.given(
        arguments, ("widths", "optimizer", "lr", "steps", "seeds", "batch_size", "threshold")
    )
    if isinstance(arguments.widths, int):
        raise ValueError(f"--widths must be two or more numbers with commas, got {arguments.widths}")
    settings["rules"] = {pattern: ParameterRule(value) for pattern, value in arguments.parameter_rule}
    rules = (False, True) if arguments.naive else (True,)
    checks = [check_scale(**settings, structure_aware=aware) for aware in rules]
    records = [check.to_dict() for check in checks]
    if arguments.plot:
        from structlin_nn.figures.scale import check_figure
        from structlin_nn.figures.style import save

        save(check_figure(records), Path(arguments.plot))
    texts = [*map(_text, checks), *([f"figure {arguments.plot}"] if arguments.plot else [])]
    common.show(arguments, records, "\n".join(texts))
    return 0 if checks[-1].passed else 1


def build_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the builder of the model, as arguments of `structlin_nn.scale_check.check_scale`."""
    from structlin_nn.models import StructureConfig
    from structlin_nn.scale_check import builder_of

    structure: StructureConfig | None = StructureConfig(
        arguments.structure or "dense", common.given_structure_options(arguments), layers=arguments.layers,
        rms_cap=arguments.rms_cap, rule=arguments.rule,
    )  # fmt: skip
    if arguments.structure is None and structure == StructureConfig():
        structure = None
    return builder_of(
        arguments.model, base_width=arguments.base_width, structure=structure, width_option=arguments.width_option,
        model_options=dict(arguments.model_option), **common.given(arguments, common.SIZES),
    )  # fmt: skip


def _text(check: Any) -> str:
    rule = "structure-aware" if check.structure_aware else "naive"
    head = ("layer", "initial", "slope", *(f"change {width}" for width in check.widths), "slope", "verdict")
    rows = [
        (
            layer.name or "(model)", f"{layer.initial[-1]:.3g}", _slope(layer.initial_slope),
            *(f"{value:.3g}" for value in layer.change[-1]), _slope(layer.change_slope), layer.verdict,
        )
        for layer in check.layers
    ]  # fmt: skip
    off = sum(layer.verdict not in ("flat", "fixed") for layer in check.layers)
    found = f"{off} of {len(check.layers)} layers are not" if off else "all layers are"
    return (
        f"{check.model}, {check.optimizer} at {check.lr:g}, base width {check.base_width}, {rule} learning rates: "
        f"RMS of the change (steps: {check.steps}, seeds: {check.seeds})\n\n{table(head, rows)}\n\n"
        f"{found} flat (slopes from -{check.threshold:g} to {check.threshold:g})\n"
    )


def _slope(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
