"""``structlin count``: what a model costs."""

from __future__ import annotations

import argparse

from structlin_nn.cli import common
from structlin_nn.cli.common import add

OPTIMIZERS = ("adam", "adamw", "sign", "sgd")
PRODUCT_DTYPES = (*common.DTYPES, "float8_e4m3fn", "float8_e5m2")
PASSED = (
    "width", "base_width", "structure", "rms_cap", "rule", "layers", "optimizer", "batch_size", "steps", "dtype",
    "activation_dtype", "device", "causal_discount", "flash_backward", "strict", "zero_stage",
    "devices", *common.SIZES,
)  # fmt: skip
HELP = "count parameters and multiply-accumulates of a model, layer by layer and factor by factor"
EXAMPLES = """\
examples:
  structlin count cifar-mlp --width 256
  structlin count cifar-mlp --width 1024 --structure block_tensor_train --rank 2 --factorization greedy
  structlin count gpt2 --width 1024 --structure block_tensor_train --rank 4 --rms-cap --layers all
  structlin count gpt2 --width 768 --batch-size 480 --steps 600000 --activation-dtype bfloat16 --device h100

Counts are for one sample (gpt2: one sequence of full length). 1 MAC = 2 FLOPs. The learning-rate multipliers are those
of the structure-aware rule, relative to the dense model at base width. The rates of devices are the peak rates of their
data sheets (cpu: measured), so the times are lower bounds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "MODEL", among=common.MODELS)
    add(parser, "--width W", "width of the model", kind=int, required=True)
    add(parser, "--base-width W0", "where the learning rate was tuned (the paper's)", kind=int)
    common.model_options(parser, "dense", "the paper's")
    add(parser, "--rule NAME", default="paper", among=common.RULES)
    add(parser, "--optimizer NAME", default="adam", among=OPTIMIZERS)
    run = parser.add_argument_group("a training run: FLOPs, bytes, and the least time by the roofline model")
    add(run, "--batch-size N", "samples in a step", kind=int)
    add(run, "--steps N", "steps of the run", kind=int)
    add(run, "--dtype NAME", "of weights, gradients and states", "float32", among=common.DTYPES)
    add(run, "--activation-dtype NAME", "of activations and products", among=PRODUCT_DTYPES, what="dtype")
    add(run, "--zero-stage N", "what devices share: 1 states, 2 gradients, 3 weights", 0)
    add(run, "--devices N", "number of devices that share", 1)
    add(run, "--device --on NAME", among=common.DEVICES)
    how = parser.add_argument_group("what counts")
    add(how, "--causal-discount", "count only attention that a causal mask leaves")
    add(how, "--flash-backward", "count scores that fused attention computes again")
    add(how, "--strict", "an unknown operation is an error")
    add(parser, "--json", "print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from structlin_nn.counting import count_model, format_count

    record = count_model(
        arguments.model, options=common.given_structure_options(arguments), **common.given(arguments, PASSED)
    )
    common.show(arguments, record, format_count(record))
