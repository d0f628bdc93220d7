"""``structlin train``: train a model by the paper's recipe, or another."""

from __future__ import annotations

import argparse
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import (
    Parser,
    UsageError,
    choice,
    given_structure_options,
    print_table,
    structure_options,
)
from structlin_nn.cli.common import print_json as print_as_json
from structlin_nn.training.config import CONFIGS, RECIPES, RunConfig, TrainConfig, overrides, recipe

NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "cifar": (("cifar-mlp", "cifar-vit"), "MLP or ViT on CIFAR-10, CIFAR-100, or the embedded images"),
    "cifar-mlp": (("cifar-mlp",), "the residual MLP on the same"),
    "cifar-vit": (("cifar-vit",), "the vision transformer on the same"),
    "imagenet": (("imagenet-vit",), "ViT/32, or a model of timm, on ImageNet or any image folders"),
    "imagenet-vit": (("imagenet-vit",), "the same"),
    "gpt2": (("gpt2",), "GPT-2 on token files"),
}
"""For each name its models, the first of which is the default, and a description."""

HELP = "train a model with dense or structured layers, by the paper's recipe unless options say otherwise"
EXAMPLES = """\
examples:
  structlin train --list
      what can be trained
  structlin train cifar --structure block_tensor_train --width 256
      the MLP of the paper by its recipe, on the images that are part of the package
  structlin train cifar --data path/to/cifar-10-batches-bin --structure monarch --blocks 4 --width 512
      on CIFAR-10, from any of its standard files (binary or python version, folder or archive)
  structlin train cifar --data DIR --data-set cifar100 --model cifar-vit --structure low_rank --rank-fraction 0.1
  structlin train imagenet --data path/to/imagenet --structure block_tensor_train --rank 2 --width 484 --device cuda
  structlin train gpt2 --data path/to/openwebtext --structure block_tensor_train --set width=1024 --set options.rank=4
  torchrun --nproc-per-node 8 --no-python structlin train gpt2 --data DIR --device cuda --parallel fsdp
      on several GPUs
  structlin train cifar --structure monarch --width 256 --out runs/first --resume
      go on after an interruption: Ctrl-C, SIGTERM, a power failure
  structlin train gpt2 --data DIR --init-from small.safetensors --lr 1e-4 --steps 1000 --warmup-steps 50
      further, from trained weights: a file of `structlin compress`, another run, or published GPT-2
  structlin train cifar --epochs 3 --batch-size 256 --no-augment --mixup 0 --label-smoothing 0
      a quick look

structlin train NAME --help lists the options of each. Record and checkpoint are written to --out, and the record is
JSON lines: see structlin_nn.training.records.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--list", action="store_true", help="print what can be trained, and end")
    names = parser.add_subparsers(dest="name", metavar="NAME", title="what to train")
    for name, (_, text) in NAMES.items():
        one = names.add_parser(name, help=text, description=f"Train: {text}.", epilog=EXAMPLES)
        _add_arguments(one, name)


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    models = NAMES[name][0]
    kind = CONFIGS[models[0]]
    run = parser.add_argument_group("the run")
    run.add_argument("--data", metavar="DIR", help=_DATA[kind.task])
    if kind.task == "cifar":
        run.add_argument("--unverified", action="store_true", help="do not compare the files with the official sums")
    if kind.task == "imagenet":
        run.add_argument("--format", metavar="NAME", help="of --data: folder, shards or datasets (what is found)")
        run.add_argument(
            "--on-broken", metavar="NAME", default="error", help="at a broken image: error, or skip it with a warning"
        )
    run.add_argument(
        "--init-from", metavar="PATH",
        help="trained weights to start from, which say what model it is: a .safetensors file, the folder of a run, or "
        "of published GPT-2 (random weights)",
    )  # fmt: skip
    run.add_argument("--out", metavar="DIR", help="folder for record and checkpoint (default: runs/ and a name)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit on a CPU")
    run.add_argument("--checkpoint-minutes", type=float, default=5.0, metavar="M", help="between checkpoints (5)")
    run.add_argument(
        "--track", action="append", default=[], metavar="NAME",
        help="show evaluations in tensorboard or wandb too, repeatable (the extra 'tracking'; none)",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument("--json", action="store_true", help="print the last evaluation as JSON")
    run.add_argument(
        "--parallel",
        type=choice("parallel", ("ddp", "fsdp")),
        default="ddp",
        metavar="NAME",
        help="how the processes that torchrun started share the model: ddp (each has it) or fsdp (in parts)",
    )
    structure_options(parser)
    group = parser.add_argument_group("the configuration (what is not given is the paper's recipe for the model)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the configuration, repeatable; the value is JSON; options.NAME=VALUE for the structure's",
    )
    hints = typing.get_type_hints(kind)
    for entry in fields(kind):
        if entry.name != "options":
            _add(group, entry, hints[entry.name], models)


_DATA = {
    "cifar": "where the standard files of CIFAR-10 (or of --data-set cifar100) are; without, and without --data-set, "
    "the embedded images are used",
    "imagenet": "a folder with train/CLASS/ and val/CLASS/, or of WebDataset shards, or Hugging Face data",
    "gpt2": "a folder with train.bin and val.bin, as `structlin prepare` and nanoGPT write them",
}


def _add(group: Any, entry: Any, kind: Any, models: tuple[str, ...]) -> None:
    name = entry.name
    flags = ["--" + name.replace("_", "-"), *(["--learning-rate"] if name == "lr" else [])]
    usual = [RECIPES[model].get(name, entry.default) for model in models]
    text = entry.metadata["help"].replace("%", "%%")
    if name not in ("data_set", "model"):
        shown = dict(zip(models, map(_shown, usual), strict=True))
        if len(set(shown.values())) == 1:
            text += f" ({shown[models[0]]})"
        else:
            text += f" ({', '.join(f'{model} {value}' for model, value in shown.items())})"
    settings: dict[str, Any] = {"default": None, "help": text}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        settings |= {"type": float, "nargs": 2, "metavar": ("B1", "B2")}
    elif entry.metadata["choices"]:
        choices = models if name == "model" else entry.metadata["choices"]
        settings |= {"type": choice(name, choices), "metavar": "NAME"}
        settings["help"] += ": " + ", ".join(choices)
    else:
        settings |= {"type": kind, "metavar": kind.__name__.upper()}
    group.add_argument(*flags, dest=name, **settings)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return {True: "yes", False: "no"}[value]
    return "none" if value == "" else str(value)


def configuration(arguments: argparse.Namespace, weights: Any = None) -> RunConfig:
    """The configuration that the arguments ask for; UsageError where it is not one.

    `weights`: what the run starts from (`structlin_nn.training.weights.InitialWeights`), which decides what model it
    is; options that say otherwise are an error. Or a dictionary of these fields, for a run that goes on.
    """
    models, _ = NAMES[arguments.name]
    kind = CONFIGS[models[0]]
    changes = {
        entry.name: getattr(arguments, entry.name)
        for entry in fields(kind)
        if entry.name != "options" and getattr(arguments, entry.name) is not None
    }
    if options := given_structure_options(arguments):
        changes["options"] = options
    try:
        for key, value in overrides(kind, arguments.set).items():
            if key == "options" and key in changes:
                twice = [f"options.{name}" for name in value if name in changes[key]]
                changes[key] = {**changes[key], **value}
            else:
                twice = [key] if key in changes else []
                changes[key] = value
            if twice:
                raise ValueError(f"{', '.join(twice)} is given by --set and by an option of its own")
        if kind is TrainConfig and "data_set" not in changes:
            changes["data_set"] = "fashion" if arguments.data is None else "cifar10"
        if weights is not None:
            return _decided(kind, models, changes, weights)
        return recipe(changes.pop("model", models[0]), **changes)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _decided(kind: type[RunConfig], models: tuple[str, ...], changes: dict[str, Any], weights: Any) -> RunConfig:
    """The configuration whose model is that of the weights."""
    from structlin_nn.training.weights import differing

    fields_of = weights if isinstance(weights, dict) else weights.fields(kind)
    if found := differing(changes, fields_of):
        raise ValueError(f"{getattr(weights, 'name', 'the run')} holds another model: {'; '.join(found)}")
    chosen = {**fields_of, **changes, **{k: v for k, v in fields_of.items() if k != "base_width"}}
    if (model := chosen.pop("model", models[0])) not in models and not model.startswith("timm:"):
        raise ValueError(f"the weights are of a {model}, and this trains {', '.join(models)}")
    # The recipe has options of its own for a structure, which the weights go before.
    own = {k: fields_of[k] for k in ("structure", "options", "rms_cap", "rule") if k in fields_of}
    return recipe(model, **{k: v for k, v in chosen.items() if k not in own}).replace(**own)


def initial_weights(arguments: argparse.Namespace) -> Any:
    """What the arguments start from: `InitialWeights`, or for a run that goes on the fields that they decided; or None.

    A run that is resumed needs the weights no more: its record says what model it is.
    """
    assigned = [text for text in arguments.set if text.startswith("init_from=")]
    given = [*([] if arguments.init_from is None else [arguments.init_from]), *(t.partition("=")[2] for t in assigned)]
    arguments.set = [text for text in arguments.set if text not in assigned]
    if len(given) > 1:
        raise UsageError("init_from is given twice")
    if arguments.resume and arguments.out is not None and (Path(arguments.out) / "record.jsonl").exists():
        from structlin_nn.training.records import read_record
        from structlin_nn.training.weights import MODEL_FIELDS, SHARED_FIELDS

        header = read_record(Path(arguments.out) / "record.jsonl").header
        kind = CONFIGS[NAMES[arguments.name][0][0]]
        if not given or not Path(given[0]).expanduser().exists():
            if (started := header.get("init_from")) is None or started["structured_layers"] is None:
                return None
            names = ("model", *SHARED_FIELDS, *MODEL_FIELDS[kind])
            return {name: header["config"][name] for name in names if name in header["config"]}
    if not given:
        return None
    from structlin_nn.training.weights import open_weights

    return open_weights(given[0])


def data_options(arguments: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    """Where the data are, as `structlin_nn.training.loop.setup` takes it."""
    if config.task == "cifar":
        return {"data_root": arguments.data, "verify": not arguments.unverified}
    if arguments.data is None:
        raise UsageError(f"--data is needed: {_DATA[config.task]}")
    if config.task == "imagenet":
        return {"data_root": arguments.data, "format": arguments.format, "on_broken": arguments.on_broken}
    return {"data_root": arguments.data}


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print_table(("name", "models", "what"), [(n, ", ".join(m), t) for n, (m, t) in NAMES.items()], left=3)
        return 0
    if arguments.name is None:
        raise UsageError(f"the following arguments are required: NAME, one of {', '.join(NAMES)}")
    if arguments.checkpoint_minutes < 0:
        raise UsageError(f"--checkpoint-minutes must be at least 0, got {arguments.checkpoint_minutes:g}")
    try:
        weights = initial_weights(arguments)
    except (OSError, ImportError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    config = configuration(arguments, weights)
    options = data_options(arguments, config)
    if weights is not None and not isinstance(weights, dict):
        options["init_from"] = weights
    folder = Path(arguments.out or default_folder(config))

    from structlin_nn.training.distributed import processes

    try:
        with processes(config.device, arguments.parallel) as group:
            return _train(arguments, config, folder, options, group)
    except ValueError as error:
        raise UsageError(_one_line(error)) from error


def _train(arguments: argparse.Namespace, config: RunConfig, folder: Path, options: dict[str, Any], group: Any) -> int:
    from structlin_nn.training.loop import TrainingError, fit, setup
    from structlin_nn.training.progress import Bar, Silent
    from structlin_nn.training.records import read_record
    from structlin_nn.training.throughput import peak_flops
    from structlin_nn.training.tracking import check_tracker, tracker

    quiet = arguments.quiet or not group.main
    try:
        for name in arguments.track:
            check_tracker(name)
        made = setup(config, folder, resume=arguments.resume, processes=group, **options)
    except FileExistsError:
        raise UsageError(f"{folder} holds a run already: add --resume to go on, or choose another --out") from None
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    peak = peak_flops(group.device, config.precision)
    flops = 2 * made.counts["training_macs"]
    progress = Silent() if quiet else Bar(made.task.unit, flops, None if peak is None else peak * group.size)
    if not quiet:
        for line in [*made.messages, *_introduction(arguments, made)]:
            print(line, file=sys.stderr)
    trackers = []
    try:
        if group.main and arguments.track:
            header = read_record(made.record.path).header
            trackers += [tracker(name, folder, header, made.step) for name in dict.fromkeys(arguments.track)]
        result = fit(made, progress, checkpoint_minutes=arguments.checkpoint_minutes, trackers=trackers)
    except (TrainingError, OSError) as error:
        print(f"structlin train: {_one_line(error)}", file=sys.stderr)
        return 1
    finally:
        for one in trackers:
            one.close()
    if not result.finished:
        assert result.signal is not None
        if group.main:
            print(
                f"structlin train: {result.signal.name} after step {result.step} of {result.steps}; checkpoint "
                f"written, go on with --out {folder} --resume",
                file=sys.stderr,
            )
        return 128 + result.signal
    if group.main and arguments.json:
        print_as_json({"record": str(result.record), "checkpoint": str(result.checkpoint), **result.evaluation})
    elif group.main:
        last = result.evaluation
        print(
            f"done: {result.steps} steps, {last['training_macs']:.3g} training MACs, {made.task.summary(last)}\n"
            f"record: {result.record}"
        )
    return 0


def default_folder(config: RunConfig) -> str:
    """Where a run is written unless `--out` says otherwise."""
    data = f"{config.data_set}-" if isinstance(config, TrainConfig) else ""
    model = config.model.replace(":", "-").replace("/", "-")
    width = f"-w{config.width}" if config.width else ""
    return f"runs/{data}{model}-{config.structure}{width}-seed{config.seed}"


def _introduction(arguments: argparse.Namespace, made: Any) -> list[str]:
    config, counts, group = made.config, made.counts, made.processes
    used = f"data: {made.task.introduction()}"
    if arguments.data is None:
        used += " (--data DIR trains on CIFAR)"
    width = f", width {config.width}" if config.width else ""
    lines = [
        used,
        f"model: {config.model}{width}, {config.structure} {config.options or ''}".rstrip(),
        f"counts: {counts['params']:,} parameters, {counts['forward_macs']:,} MACs for one sample forward, "
        f"{counts['total_training_macs']:.3g} for the whole run of {made.steps} steps",
        f"writing to {made.folder}",
    ]
    if made.init_from is not None:
        lines.insert(2, f"weights: {made.init_from['file']}")
    if group.size > 1:
        lines.insert(2, f"processes: {group.size}, {group.parallel}")
    return lines


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
