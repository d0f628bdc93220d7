"""``structlin tune``: measure which way of running each layer of a model is the fastest on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from structlin_nn.cli.check_scale import SIZES, build_settings
from structlin_nn.cli.common import UsageError, choice, print_json, print_table, structure_options
from structlin_nn.cli.count import LAYERS, MODELS, RULES

HELP = "measure which way of running each layer of a model is the fastest on this machine"
DTYPES = ("float32", "bfloat16", "float64")
EXAMPLES = """\
examples:
  structlin tune gpt2 --width 512 --structure block_tensor_train --rank 4 --batch-size 8
  structlin tune cifar-mlp --width 1024 --structure monarch --blocks 4 --dtype bfloat16 --threads 2
  structlin tune --export wisdom.json
  structlin tune --import wisdom.json

MODEL is one of the named models, or a function of a width in a module that Python can import, which returns a torch
model that has example_input(batch), or (model, inputs). One forward pass without gradients and one training step are
run on random inputs, then every way to run each layer that they met is timed. The timings are kept in the user's cache
folder (STRUCTLIN_CACHE), for this processor and these versions of the libraries; all later runs choose by them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=", ".join(MODELS) + ", or package.module:function")
    parser.add_argument("--width", type=int, metavar="W", help="width of the model")
    parser.add_argument("--structure", metavar="NAME", help="one of `structlin structures`")
    parser.add_argument("--layers", type=choice("layers", LAYERS), metavar="NAME", help=", ".join(LAYERS))
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="samples in a step (32)")
    parser.add_argument(
        "--dtype", type=choice("dtype", DTYPES), default="float32", metavar="NAME", help=", ".join(DTYPES)
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (its own choice)")
    parser.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    parser.add_argument("--rule", type=choice("rule", RULES), default="paper", metavar="NAME", help=", ".join(RULES))
    parser.add_argument("--base-width", type=int, metavar="W0", help="needed for a model of your own with --structure")
    sizes = parser.add_argument_group("sizes of a named model (small ones unless given)")
    for name in SIZES:
        sizes.add_argument(f"--{name}", type=int, metavar="N")
    structure_options(parser)
    kept = parser.add_argument_group("what was measured")
    kept.add_argument("--export", metavar="FILE", help="write all timings of this machine to a file")
    kept.add_argument("--import", dest="import_", metavar="FILE", help="take the timings of a file")
    kept.add_argument("--any-machine", action="store_true", help="--import: also from another processor or version")
    kept.add_argument("--forget", action="store_true", help="delete all timings of this machine first")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from structlin import execution

    if arguments.model is None and not (arguments.export or arguments.import_ or arguments.forget):
        raise UsageError("name a model to tune, or give --export, --import or --forget")
    if arguments.any_machine and not arguments.import_:
        raise UsageError("--any-machine is an option of --import")
    if arguments.forget:
        print(f"deleted {execution.clear_wisdom()} records in {execution.wisdom_folder()}")
    try:
        if arguments.import_:
            count = execution.import_wisdom(arguments.import_, any_machine=arguments.any_machine)
            print(f"took {count} records from {arguments.import_}")
        found = _tuned(arguments) if arguments.model is not None else {}
        if arguments.export:
            print(f"wrote {execution.export_wisdom(arguments.export)} records to {arguments.export}")
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(found)
    elif found:
        _print(found)
        print(f"\nkept in {execution.wisdom_folder()}")
    return 0


def _tuned(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    import torch

    from structlin import execution
    from structlin_nn.scale_check import with_inputs

    if arguments.width is None:
        raise ValueError("--width is needed: the width of the model")
    if arguments.base_width is None and ":" in arguments.model:
        arguments.base_width = arguments.width  # it matters for learning rates alone
    settings = build_settings(arguments)
    model, inputs = with_inputs(settings["build"](arguments.width), arguments.batch_size, arguments.width)
    model = model.to(getattr(torch, arguments.dtype))
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        inputs = inputs.to(getattr(torch, arguments.dtype))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    def call() -> Any:
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def step() -> None:
        with torch.no_grad():
            call()
        found = call()
        logits = found if isinstance(found, torch.Tensor) else found.logits
        logits.float().square().mean().backward()

    return execution.tune(step, progress=not arguments.json)


def _print(found: dict[str, dict[str, float]]) -> None:
    rows = []
    for problem, seconds in found.items():
        best, *others = sorted(seconds, key=lambda name: seconds[name])
        chain, _, rest = problem.partition(" rows ")
        behind = f"{others[0]} ({seconds[others[0]] / seconds[best]:.2f})" if others else "-"
        rows.append((chain, rest.removeprefix("torch cpu "), best, f"{seconds[best] * 1e3:.3f}", behind))
    print_table(("chain", "problem", "fastest", "ms", "next (times as long)"), rows, left=3)
