"""``structlin count``: what a model costs."""

from __future__ import annotations

import argparse

from structlin_nn.cli.common import UsageError, choice, given_structure_options, print_json, structure_options

MODELS = ("cifar-mlp", "cifar-vit", "imagenet-vit", "gpt2")
LAYERS = ("all", "all_but_last", "intermediate")
RULES = ("paper", "rank_corrected")
OPTIMIZERS = ("adam", "adamw", "sign", "sgd")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PRODUCT_DTYPES = (*DTYPES, "float8_e4m3fn", "float8_e5m2")
DEVICES = ("a100", "h100", "h200", "b200", "l40s", "rtx4090", "cpu")
HELP = "count parameters and multiply-accumulates of a model, layer by layer and factor by factor"
EXAMPLES = """\
examples:
  structlin count cifar-mlp --width 256
  structlin count cifar-mlp --width 1024 --structure block_tensor_train --rank 2 --factorization greedy
  structlin count imagenet-vit --width 484 --structure block_tensor_train --rank 2 --json
  structlin count gpt2 --width 1024 --structure block_tensor_train --rank 4 --rms-cap --layers all
  structlin count gpt2 --width 768 --batch-size 480 --steps 600000 --activation-dtype bfloat16 --device h100

Counts are for one sample (gpt2: one sequence of full length). 1 MAC = 2 FLOPs. The learning-rate multipliers are
those of the structure-aware rule, relative to the dense model at base width. Devices are counted at the peak rates of
their data sheets (cpu: measured), so that times are the least that are possible.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", type=choice("model", MODELS), help=", ".join(MODELS))
    parser.add_argument("--width", type=int, required=True, metavar="W", help="width of the model")
    parser.add_argument("--base-width", type=int, metavar="W0", help="where the learning rate was tuned (the paper's)")
    parser.add_argument("--structure", default="dense", metavar="NAME", help="one of `structlin structures` (dense)")
    parser.add_argument("--layers", type=choice("layers", LAYERS), metavar="NAME", help=", ".join(LAYERS))
    parser.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    parser.add_argument("--rule", type=choice("rule", RULES), default="paper", metavar="NAME", help=", ".join(RULES))
    parser.add_argument(
        "--optimizer", type=choice("optimizer", OPTIMIZERS), default="adam", metavar="NAME", help=", ".join(OPTIMIZERS)
    )
    sizes = parser.add_argument_group("sizes of the model (the paper's unless given)")
    for name in ("num-classes", "heads", "head-dim", "depth", "expansion", "patch", "vocabulary", "context"):
        sizes.add_argument(f"--{name}", type=int, metavar="N")
    run = parser.add_argument_group("a training run: FLOPs, bytes, and the least time by the roofline")
    run.add_argument("--batch-size", type=int, metavar="N", help="samples in a step")
    run.add_argument("--steps", type=int, metavar="N", help="steps of the run")
    run.add_argument(
        "--dtype", type=choice("dtype", DTYPES), default="float32", metavar="NAME",
        help="of weights, gradients and states (float32): " + ", ".join(DTYPES),
    )  # fmt: skip
    run.add_argument(
        "--activation-dtype",
        type=choice("dtype", PRODUCT_DTYPES),
        metavar="NAME",
        help="of activations and products (--dtype): " + ", ".join(PRODUCT_DTYPES),
    )
    run.add_argument(
        "--zero-stage",
        type=int,
        default=0,
        metavar="N",
        help="devices share: 1 states, 2 gradients too, 3 weights too",
    )
    run.add_argument("--devices", type=int, default=1, metavar="N", help="devices that share (1)")
    run.add_argument("--optimizer-states", type=int, metavar="N", help="numbers kept for each parameter")
    run.add_argument("--device", "--on", type=choice("device", DEVICES), metavar="NAME", help=", ".join(DEVICES))
    how = parser.add_argument_group("what counts")
    how.add_argument("--causal-discount", action="store_true", help="of attention only pairs that a causal mask leaves")
    how.add_argument("--flash-backward", action="store_true", help="scores that fused attention computes again, too")
    how.add_argument("--strict", action="store_true", help="an error where an operation is unknown")
    structure_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from structlin_nn.counting import count_model, format_count

    names = ("num_classes", "heads", "head_dim", "depth", "expansion", "patch", "vocabulary", "context")
    sizes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        record = count_model(
            arguments.model,
            width=arguments.width,
            base_width=arguments.base_width,
            structure=arguments.structure,
            options=given_structure_options(arguments),
            rms_cap=arguments.rms_cap,
            rule=arguments.rule,
            layers=arguments.layers,
            optimizer=arguments.optimizer,
            batch_size=arguments.batch_size,
            steps=arguments.steps,
            dtype=arguments.dtype,
            activation_dtype=arguments.activation_dtype,
            optimizer_states=arguments.optimizer_states,
            device=arguments.device,
            causal_discount=arguments.causal_discount,
            flash_backward=arguments.flash_backward,
            strict=arguments.strict,
            zero_stage=arguments.zero_stage,
            devices=arguments.devices,
            **sizes,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print_json(record)
    else:
        print(format_count(record))
    return 0
