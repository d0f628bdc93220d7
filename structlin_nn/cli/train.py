"""``structlin train``: train a model by the paper's recipe, or another."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import UsageError, choice, given_structure_options, print_json, structure_options
from structlin_nn.training.config import MODELS, RECIPES, TrainConfig, recipe

NAMES = ("cifar",)
HELP = "train a model with dense or structured layers, by the paper's recipe unless options say otherwise"
EXAMPLES = """\
examples:
  structlin train cifar --structure block_tensor_train --width 256
      the MLP of the paper by its recipe, on the images that are part of the package
  structlin train cifar --data path/to/cifar-10-batches-bin --structure monarch --blocks 4 --width 512
      on CIFAR-10, from any of its standard files (binary or python version, folder or archive)
  structlin train cifar --data DIR --data-set cifar100 --model cifar-vit --structure low_rank --rank-fraction 0.1
  structlin train cifar --structure monarch --width 256 --out runs/first --resume
      go on after an interruption: Ctrl-C, SIGTERM, a power failure
  structlin train cifar --epochs 3 --batch-size 256 --no-augment --mixup 0 --label-smoothing 0
      a quick look

Record and checkpoint are written to --out, and the record is JSON lines: see structlin_nn.training.records.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", type=choice("name", NAMES), help="what to train: cifar")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--data",
        metavar="DIR",
        help="where the standard files of CIFAR-10 (or of --data-set cifar100) are; without, and without "
        "--data-set, the embedded images are used",
    )
    run.add_argument("--unverified", action="store_true", help="do not compare the files with the official md5 sums")
    run.add_argument("--out", metavar="DIR", help="folder for record and checkpoint (default: runs/ and a name)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit on a CPU")
    run.add_argument("--checkpoint-minutes", type=float, default=5.0, metavar="M", help="between checkpoints (5)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument("--json", action="store_true", help="print the last evaluation as JSON")
    structure_options(parser)
    group = parser.add_argument_group("the configuration (what is not given is the paper's recipe for the model)")
    for entry in fields(TrainConfig):
        if entry.name != "options":
            _add(group, entry.name, str(TrainConfig.__annotations__[entry.name]), entry)


def _add(group: Any, name: str, kind: str, entry: Any) -> None:
    flags = ["--" + name.replace("_", "-"), *(["--learning-rate"] if name == "lr" else [])]
    usual = [RECIPES[model].get(name, entry.default) for model in MODELS]
    text = entry.metadata["help"].replace("%", "%%")
    if name not in ("data_set", "model"):
        mlp, vit = map(_shown, usual)
        text += f" ({mlp})" if mlp == vit else f" (mlp {mlp}, vit {vit})"
    settings: dict[str, Any] = {"default": None, "help": text}
    if kind == "bool":
        settings["action"] = argparse.BooleanOptionalAction
    elif kind.startswith("tuple"):
        settings |= {"type": float, "nargs": 2, "metavar": ("B1", "B2")}
    elif entry.metadata["choices"]:
        settings |= {"type": choice(name, entry.metadata["choices"]), "metavar": "NAME"}
        settings["help"] += ": " + ", ".join(entry.metadata["choices"])
    else:
        settings |= {"type": {"int": int, "float": float, "str": str}[kind], "metavar": kind.upper()}
    group.add_argument(*flags, dest=name, **settings)


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def configuration(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments ask for; UsageError where it is not one."""
    changes = {
        entry.name: getattr(arguments, entry.name)
        for entry in fields(TrainConfig)
        if entry.name not in ("options", "model") and getattr(arguments, entry.name) is not None
    }
    if "data_set" not in changes:
        changes["data_set"] = "fashion" if arguments.data is None else "cifar10"
    if options := given_structure_options(arguments):
        changes["options"] = options
    try:
        return recipe(arguments.model or "cifar-mlp", **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def run(arguments: argparse.Namespace) -> int:
    if arguments.checkpoint_minutes < 0:
        raise UsageError(f"--checkpoint-minutes must be at least 0, got {arguments.checkpoint_minutes:g}")
    config = configuration(arguments)
    folder = Path(arguments.out or default_folder(config))

    from structlin_nn.training.loop import TrainingError, fit, setup
    from structlin_nn.training.progress import Bar, Silent

    progress = Silent() if arguments.quiet else Bar()
    try:
        made = setup(config, folder, data_root=arguments.data, verify=not arguments.unverified, resume=arguments.resume)
    except FileExistsError:
        raise UsageError(f"{folder} holds a run already: add --resume to go on, or choose another --out") from None
    except (OSError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    if not arguments.quiet:
        for line in [*made.messages, *_introduction(arguments, made)]:
            print(line, file=sys.stderr)
    try:
        result = fit(made, progress, checkpoint_minutes=arguments.checkpoint_minutes)
    except (TrainingError, OSError) as error:
        print(f"structlin train: {_one_line(error)}", file=sys.stderr)
        return 1
    if not result.finished:
        assert result.signal is not None
        print(
            f"structlin train: {result.signal.name} after step {result.step} of {result.steps}; checkpoint written, "
            f"go on with --out {folder} --resume",
            file=sys.stderr,
        )
        return 128 + result.signal
    if arguments.json:
        print_json({"record": str(result.record), "checkpoint": str(result.checkpoint), **result.evaluation})
    else:
        last = result.evaluation
        print(
            f"done: {last['epoch']} epochs, {last['training_macs']:.3g} training MACs, "
            f"test loss {last['test_loss']:.4f}, test error {100 * last['test_error']:.2f} %\nrecord: {result.record}"
        )
    return 0


def default_folder(config: TrainConfig) -> str:
    """Where a run is written unless `--out` says otherwise."""
    return f"runs/{config.data_set}-{config.model}-{config.structure}-w{config.width}-seed{config.seed}"


def _introduction(arguments: argparse.Namespace, made: Any) -> list[str]:
    config, data, counts = made.config, made.data, made.counts
    images = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
    used = f"data: {data.name}, {images}; {data.source}"
    if arguments.data is None and config.data_set == "fashion":
        used += " (--data DIR trains on CIFAR)"
    return [
        used,
        f"model: {config.model}, width {config.width}, {config.structure} {config.options or ''}".rstrip(),
        f"counts: {counts['params']:,} parameters, {counts['forward_macs']:,} MACs for one image forward, "
        f"{counts['total_training_macs']:.3g} for the whole run of {made.steps} steps",
        f"writing to {made.folder}",
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
