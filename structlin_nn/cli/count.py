"""``structlin count``: what a model costs."""

from __future__ import annotations

import argparse

from structlin_nn.cli import common

OPTIMIZERS = ("adam", "adamw", "sign", "sgd")
PRODUCT_DTYPES = (*common.DTYPES, "float8_e4m3fn", "float8_e5m2")
PASSED = (
    "width", "base_width", "structure", "rms_cap", "rule", "layers", "optimizer", "batch_size", "steps", "dtype",
    "activation_dtype", "optimizer_states", "device", "causal_discount", "flash_backward", "strict", "zero_stage",
    "devices", *common.SIZES,
)  # fmt: skip
HELP = "count parameters and multiply-accumulates of a model, layer by layer and factor by factor"
EXAMPLES = """\
examples:
  structlin count cifar-mlp --width 256
  structlin count cifar-mlp --width 1024 --structure block_tensor_train --rank 2 --factorization greedy
  structlin count imagenet-vit --width 484 --structure block_tensor_train --rank 2 --json
  structlin count gpt2 --width 1024 --structure block_tensor_train --rank 4 --rms-cap --layers all
  structlin count gpt2 --width 768 --batch-size 480 --steps 600000 --activation-dtype bfloat16 --device h100

Counts are for one sample (gpt2: one sequence of full length). 1 MAC = 2 FLOPs. The learning-rate multipliers are those
of the structure-aware rule, relative to the dense model at base width. The rates of devices are the peak rates of their
data sheets (cpu: measured), so the times are lower bounds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_choice(parser, "model", common.MODELS)
    parser.add_argument("--width", type=int, required=True, metavar="W", help="width of the model")
    parser.add_argument("--base-width", type=int, metavar="W0", help="where the learning rate was tuned (the paper's)")
    common.model_options(parser, "dense", "the paper's")
    common.add_choice(parser, "--rule", common.RULES, "paper")
    common.add_choice(parser, "--optimizer", OPTIMIZERS, "adam")
    run = parser.add_argument_group("a training run: FLOPs, bytes, and the least time by the roofline model")
    run.add_argument("--batch-size", type=int, metavar="N", help="samples in a step")
    run.add_argument("--steps", type=int, metavar="N", help="steps of the run")
    common.add_choice(run, "--dtype", common.DTYPES, "float32", "of weights, gradients and states")
    common.add_choice(run, "--activation-dtype", PRODUCT_DTYPES, about="of activations and products", kind="dtype")
    run.add_argument(
        "--zero-stage", type=int, default=0, metavar="N", help="what devices share: 1 states, 2 gradients, 3 weights"
    )
    run.add_argument("--devices", type=int, default=1, metavar="N", help="number of devices that share (1)")
    run.add_argument("--optimizer-states", type=int, metavar="N", help="numbers kept for each parameter")
    common.add_choice(run, "--device", common.DEVICES, also="--on")
    how = parser.add_argument_group("what counts")
    how.add_argument("--causal-discount", action="store_true", help="count only attention that a causal mask leaves")
    how.add_argument("--flash-backward", action="store_true", help="count scores that fused attention computes again")
    how.add_argument("--strict", action="store_true", help="an unknown operation is an error")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.counting import count_model, format_count

    record = count_model(
        arguments.model, options=common.given_structure_options(arguments), **common.given(arguments, PASSED)
    )
    if arguments.json:
        common.print_json(record)
    else:
        print(format_count(record))
    return 0
