"""``structlin train``: train a model by one of the recipes."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from structlin_nn._text import suggestion, table

NAMES: dict[str, tuple[str, str, str]] = {
    "cifar": ("cifar", "cifar-mlp", "MLP or ViT (--model) on CIFAR-10, CIFAR-100, or the embedded images"),
    "cifar-mlp": ("cifar", "cifar-mlp", "the residual MLP on the same"),
    "cifar-vit": ("cifar", "cifar-vit", "the vision transformer on the same, by its own recipe"),
    "imagenet": ("imagenet", "imagenet-vit", "ViT/32, or a model of timm, on ImageNet or any image folders"),
    "gpt2": ("gpt2", "gpt2", "GPT-2 on token files"),
    "flax-cifar": ("flax_cifar", "cifar-mlp", "the models of cifar in flax"),
    "flax-gpt2": ("flax_gpt2", "gpt2", "GPT-2 in flax"),
}
"""For each name its recipe, the model whose configuration is the default, and a description."""

HELP = "train a model with dense or structured layers, by the paper's recipe unless options say otherwise"
EXAMPLES = """\
examples:
  structlin train --list
      list the recipes
  structlin train cifar --structure block_tensor_train --width 256
      train the MLP of the paper by its recipe, on the images that are part of the package
  structlin train cifar --data path/to/cifar-10-batches-bin --data-set cifar10 --structure monarch --options blocks=4
      train on CIFAR-10, from the folder of its files (binary or python version)
  structlin train imagenet --data path/to/imagenet --structure block_tensor_train --options rank=2 --width 484 \\
      --device cuda
  torchrun --nproc-per-node 8 --no-python structlin train gpt2 --data DIR --device cuda --parallel fsdp
      train on several GPUs
  structlin train cifar --structure monarch --width 256 --out runs/first --resume
      resume after an interruption (Ctrl-C, SIGTERM, a power failure)
  structlin train gpt2 --data DIR --init-from small.safetensors --lr 1e-4 --steps 1000 --warmup-steps 50
      start from trained weights: a file of `structlin compress`, another run, or published GPT-2
  structlin train cifar --model my_models:make --width 64 --structure low_rank --options rank=8
      train a model of your own, of timm (timm:NAME) or of transformers (hf:CONFIG)
  structlin train cifar --epochs 3 --batch-size 256 --no-augment --mixup 0 --label-smoothing 0
      train for a short time

structlin train NAME --help lists the options of a recipe. --out gets checkpoints and the record, JSON lines that
structlin_nn.records describes.
"""


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return the module of the recipe, the configuration and the options for arguments.

    Raises
    ------
    ValueError, TypeError, ImportError
        Invalid values of a configuration.
    SystemExit
        Misuse, which tyro explains on stderr.
    """
    import tyro

    from structlin_nn.recipes import MODELS, recipe_module

    module_name, model, about = NAMES[name]
    module = recipe_module(module_name)
    default = module.Config.from_dict(MODELS[model][1])

    def call(config: Any, options: Any) -> Any:
        return config, options

    call.__annotations__ = {"config": module.Config, "options": module.Options}
    call.__defaults__ = (default, module.Options())
    config, options = tyro.cli(
        call, prog=f"structlin train {name}", args=list(arguments), config=(tyro.conf.OmitArgPrefixes,),
        description=f"Train {about}.\n\nThe defaults are the paper's recipe.",
    )  # fmt: skip
    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    # These defaults depend on the model, the structure and the device that were given.
    usual = {"rms_cap": None, "compile": None} | ({"input_lr_mult": None} if hasattr(config, "input_lr_mult") else {})
    kept = {word.removeprefix("--").replace("-", "_") for word in given}
    config = config.replace(**{name: value for name, value in usual.items() if name not in kept})
    if options.data is not None and "--data-set" not in given and module_name.endswith("cifar"):
        config = config.replace(data_set="cifar10")
    found: dict[str, Any] = {}
    if options.resume:
        from structlin_nn.recipes._run import default_folder
        from structlin_nn.recipes._starting import resumed_fields

        found = resumed_fields(options.out or default_folder(config))
    if options.init_from is not None and not found:
        from structlin_nn.recipes._starting import fields_of

        found = fields_of(options.init_from, module.Config)
    if found:
        from structlin_nn.recipes._starting import decided

        config = decided(config, default, found, options.init_from or "the run")
    return module, config, options


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code is that of `structlin_nn.cli.main`."""
    if "--list" in arguments:
        print(table(("name", "recipe", "what"), [(n, r, t) for n, (r, _, t) in NAMES.items()], left=3))
        return 0
    if not arguments:
        return _misuse(f"the following arguments are required: NAME, one of {', '.join(NAMES)}")
    if arguments[0] in ("-h", "--help"):
        print(f"usage: structlin train NAME [options]\n\n{HELP[0].upper()}{HELP[1:]}.\n\n{EXAMPLES}")
        return 0
    name, *rest = arguments
    if name not in NAMES:
        return _misuse(f"unknown name {name!r}{suggestion(name, NAMES)} (one of {', '.join(NAMES)})")
    from structlin_nn.recipes._telling import Interruption

    with Interruption():  # signals that come before the first step are answered there
        try:
            module, config, options = parse(name, rest)
            result = module.train(config, options)
        except Exception as error:
            return _failed(error)
    if not result.finished:
        if result.signal is None:
            return 0
        # Every process answers with the same code, and the first one tells.
        if _is_first():
            print(
                f"structlin train: {result.signal.name} after step {result.step} of {result.steps}; checkpoint "
                f"written, resume with --out {result.folder} --resume",
                file=sys.stderr,
            )
        return 128 + result.signal
    if _is_first() and options.json:
        print(json.dumps({"record": str(result.record), **result.evaluation}, indent=2, allow_nan=False))
    elif _is_first():
        print(_summary(result))
    return 0


def _failed(error: Exception) -> int:
    """Report an error, and return the exit code; an error before the start of the run is misuse."""
    from structlin_nn.recipes._run import BEGUN, TrainingError

    begun = BEGUN in getattr(error, "__notes__", ())
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, (TrainingError, OSError)) and (begun or isinstance(error, (TrainingError, BlockingIOError))):
        print(f"structlin train: {_one_line(error)}", file=sys.stderr)
        return 1
    if not begun and isinstance(error, (ImportError, OSError, TypeError, ValueError)):
        return _misuse(_one_line(error))
    traceback.print_exception(error)
    return 1


def _misuse(message: str) -> int:
    print(f"structlin train: {message} (see structlin train --help)", file=sys.stderr)
    return 2


def _summary(result: Any) -> str:
    """Return the evaluations of a run as a table, the last ten of them."""
    from structlin_nn.records import read_record

    record = read_record(result.record)
    shown = (
        "step", "epoch", "train_loss", "train_error", "test_loss", "test_error", "val_loss", "val_error",
        "val_perplexity", "batch_loss", "seconds",
    )  # fmt: skip
    keys = [key for key in shown if key in record.evaluations[-1]]
    rows = [[_shown(line[key]) for key in keys] for line in record.evaluations[-10:]]
    cost = f"{result.steps} steps, {result.evaluation['training_macs']:.3g} training MACs"
    return f"{table([key.replace('_', ' ') for key in keys], rows, left=0)}\ndone: {cost}\nrecord: {result.record}"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _is_first() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
