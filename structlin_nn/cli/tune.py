"""``structlin tune``: measure which way of running each layer of a model is the fastest on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from structlin_nn.cli import common
from structlin_nn.cli.check_scale import build_settings
from structlin_nn.cli.common import add

HELP = "measure which way of running each layer of a model is the fastest on this machine"
DTYPES = ("float32", "bfloat16", "float16", "float64")
EXAMPLES = """\
examples:
  structlin tune gpt2 --width 512 --structure block_tensor_train --rank 4 --batch-size 8
  structlin tune cifar-mlp --width 1024 --structure monarch --blocks 4 --dtype bfloat16 --threads 2
  structlin tune --export wisdom.json
  structlin tune --import wisdom.json

MODEL is one of the named models; a function of a width in a module that Python can import, which returns a torch model
that has example_input(batch), or (model, inputs); or timm:NAME or hf:CONFIG, with the argument that sets their width.
--structure replaces all linear layers but the last, or those of --layers. Without --structure, --layers and --rms-cap
apply to dense layers. The command runs one forward pass without gradients and one training step on random inputs, and
times every way to run each layer that they use. It stores the timings in the user's cache folder (STRUCTLIN_CACHE), for
this processor and these versions of the libraries. Later runs choose by them.

The table has a row for each problem: the shape and the chain of a layer, the number of tokens (rounded up to a power of
two), and the pass (train: forward and backward). The column ms is the time of the fastest way.
"""
CHAIN = 40  # characters of a chain that the table shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "MODEL", f"{', '.join(common.MODELS)}, {common.FORMS}", nargs="?")
    add(parser, "--width W", "width of the model", kind=int)
    add(parser, "--batch-size N", "samples in a step", 32, common.positive)
    add(parser, "--dtype NAME", default="float32", among=DTYPES)
    add(parser, "--threads N", "threads of torch (torch's default)", kind=common.positive)
    parser.set_defaults(rule="paper", base_width=None)  # they set learning rates, which change no timing
    common.model_options(parser, None, "small ones")
    common.own_model_options(parser)
    kept = parser.add_argument_group("timings that are kept")
    add(kept, "--forget", "first delete all timings of this machine")
    add(kept, "--import FILE", "then add the timings of a file", dest="import_")
    add(kept, "--any-machine", "--import: also from another processor or version")
    add(kept, "--export FILE", "at the end write all timings of this machine to a file")
    add(parser, "--json", "print JSON instead of a table, in seconds")


def run(arguments: argparse.Namespace) -> None:
    if arguments.model is None and not (arguments.export or arguments.import_ or arguments.forget):
        raise ValueError("give a model to tune, or --export, --import or --forget")
    if arguments.model is None and (arguments.width is not None or arguments.structure is not None):
        raise ValueError("--width and --structure need a model")
    if arguments.model is not None and arguments.width is None:
        raise ValueError("--width is needed: the width of the model")
    if arguments.any_machine and not arguments.import_:
        raise ValueError("--any-machine is an option of --import")
    if arguments.export:
        common.check_folder("--export", arguments.export)

    from structlin import execution

    def say(what: str, count: int, where: object) -> None:
        number = f"{count} record{'' if count == 1 else 's'}"
        print(f"{what} {number} {where}", file=sys.stderr if arguments.json else sys.stdout)

    # Errors in the model are found before anything is deleted or measured.
    step = _step(arguments) if arguments.model is not None else None
    if arguments.forget:
        say("deleted", execution.clear_wisdom(), f"in {execution.wisdom_folder()}")
    if arguments.import_:
        try:
            count = execution.import_wisdom(arguments.import_, any_machine=arguments.any_machine)
        except ValueError as error:
            raise ValueError(str(error).replace("pass any_machine=True", "give --any-machine")) from error
        say("added", count, f"of {arguments.import_}")
    found = {} if step is None else execution.tune(step, progress=not arguments.json)
    if arguments.json:
        common.print_json(found)
    elif step is not None:
        _print(found)
    if arguments.export:
        say("wrote", execution.export_wisdom(arguments.export), f"to {arguments.export}")
    if found and not arguments.json:
        print(f"kept in {execution.wisdom_folder()}")


def _step(arguments: argparse.Namespace) -> Any:
    """Return a function that runs the model forward without gradients, and then a training step."""
    import torch
    from torch.utils._pytree import tree_map_only

    from structlin_nn.scale_check import logits_of, with_inputs

    if ":" in arguments.model:
        arguments.base_width = arguments.width
    settings = build_settings(arguments)
    model, inputs = with_inputs(settings["build"](arguments.width), arguments.batch_size, arguments.width)
    dtype = getattr(torch, arguments.dtype)
    model = model.to(dtype)
    inputs = tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    def step() -> None:
        with torch.no_grad():
            logits_of(model, inputs)
        logits_of(model, inputs).float().square().mean().backward()

    return step


# The text of a problem (structlin.execution.choice.Problem.key).
_PROBLEM = re.compile(
    r"(?P<chain>.*) (?P<shape>\d+x\d+) (?P<ends>rows|columns) (?P<library>\S+) (?P<device>\S+) (?P<dtype>\S+) "
    r"tokens=(?P<tokens>\d+) threads=(?P<threads>\d+) (?P<kind>\S+)"
)


def _print(found: dict[str, dict[str, float]]) -> None:
    if not found:
        print("nothing to tune: the model has no layer that is a chain of einsums; give --structure")
        return
    problems = [(match, seconds) for text, seconds in found.items() if (match := _PROBLEM.fullmatch(text))]
    shared = {name: sorted({problem[name] for problem, _ in problems}) for name in ("device", "dtype", "threads")}
    groups: dict[str, list[tuple[str, ...]]] = {}
    for problem, seconds in problems:
        kind = [problem["kind"]] + ["columns"] * (problem["ends"] == "columns")
        kind += [problem[name] for name in ("device", "dtype") if len(shared[name]) > 1]
        best, *others = sorted(seconds, key=lambda name: seconds[name]) or ["-"]
        chain = problem["chain"]
        row = (
            problem["shape"], problem["tokens"].rjust(6), " ".join(kind), best,
            f"{seconds[best] * 1e3:.3f}".rjust(8) if seconds else "-".rjust(8),
            f"{others[0]} ({seconds[others[0]] / seconds[best]:.2f})" if others else "-",
            chain if len(chain) <= CHAIN else chain[: CHAIN - 3].rstrip() + "...",
        )  # fmt: skip
        groups.setdefault(chain + problem["shape"], []).append(row)
    rows = [row for group in groups.values() for row in group]
    head = ("shape", "tokens", "pass", "fastest", "      ms", "next (times as long)", "chain")
    common.print_table(head, rows, left=len(head))
    about = "; ".join(f"{name} {', '.join(values)}" for name, values in shared.items())
    print(f"\n{len(rows)} problem{'' if len(rows) == 1 else 's'}: {about}")
