"""``structlin train``: train a model by one of the recipes."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from structlin_nn._text import unknown
from structlin_nn.cli.common import fail, print_json, print_table

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
SHOWN = (
    "step", "epoch", "train_loss", "train_error", "test_loss", "test_error", "val_loss", "val_error", "val_perplexity",
    "batch_loss", "seconds",
)  # fmt: skip
HELP = "train a model with dense or structured layers, by the paper's recipe unless options say otherwise"
EXAMPLES = """\
examples:
  structlin train --list
      list the recipes
  structlin train cifar --structure block_tensor_train --width 256
      train the MLP of the paper by its recipe, on the images that are part of the package
  structlin train cifar --data path/to/cifar-10-batches-bin --data-set cifar10 --structure monarch --options blocks=4
      train on CIFAR-10, from the folder of its files (binary or python version)
  torchrun --nproc-per-node 8 --no-python structlin train gpt2 --data DIR --device cuda --parallel fsdp
      train on several GPUs
  structlin train cifar --structure monarch --width 256 --out runs/first --resume
      resume after an interruption (Ctrl-C, SIGTERM, a power failure)
  structlin train gpt2 --data DIR --init-from small.safetensors --lr 1e-4 --steps 1000 --warmup-steps 50
      start from trained weights: a file of `structlin compress`, another run, or published GPT-2
  structlin train cifar --model my_models:make --width 64 --structure low_rank --options rank=8
      train your own model, or one of timm (timm:NAME) or transformers (hf:CONFIG)

structlin train NAME --help lists the options of a recipe. Checkpoints and the record are written to --out. The record
is a file of JSON lines, which structlin_nn.records describes.
"""


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return the module of the recipe, the configuration and the options for arguments."""
    import tyro

    from structlin_nn.recipes import MODELS, recipe_module
    from structlin_nn.recipes._config import decided, fields_of, resumed_fields
    from structlin_nn.recipes._run import default_folder

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
    given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    # These defaults depend on the model, the structure and the device that were given.
    depend = [name for name in ("rms_cap", "compile", "input_lr_mult") if hasattr(config, name) and name not in given]
    config = config.replace(**dict.fromkeys(depend))
    if options.data is not None and "data_set" not in given and module_name.endswith("cifar"):
        config = config.replace(data_set="cifar10")
    found = resumed_fields(options.out or default_folder(config)) if options.resume else {}
    if options.init_from is not None and not found:
        found = fields_of(options.init_from, module.Config)
    if found:
        config = decided(config, default, found, options.init_from or "the run")
    return module, config, options


def main(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit code (`structlin_nn.cli.main`)."""
    if "--list" in arguments:
        print_table(("name", "recipe", "what"), [(n, r, t) for n, (r, _, t) in NAMES.items()], left=3)
        return 0
    if not arguments:
        return _misuse(f"the following arguments are required: NAME, one of {', '.join(NAMES)}")
    if arguments[0] in ("-h", "--help"):
        print(f"usage: structlin train NAME [options]\n\n{HELP[0].upper()}{HELP[1:]}.\n\n{EXAMPLES}")
        return 0
    name, *rest = arguments
    if name not in NAMES:
        return _misuse(unknown("name", name, NAMES))
    from structlin_nn.recipes._run import Interruption
    from structlin_nn.records import read_record

    with Interruption():  # handles signals before the first step
        try:
            module, config, options = parse(name, rest)
            result = module.train(config, options)
        except Exception as error:
            return _failed(error)
    first = int(os.environ.get("RANK", "0")) == 0
    if not result.finished:
        if result.signal is None:
            return 0
        # All processes return the same code, and the first one prints the message.
        if first:
            fail(
                "train", f"{result.signal.name} after step {result.step} of {result.steps}; checkpoint written, "
                f"resume with --out {result.folder} --resume"
            )  # fmt: skip
        return 128 + result.signal
    if first and options.json:
        print_json({"record": str(result.record), **result.evaluation})
    elif first:
        try:
            evaluations = read_record(result.record).evaluations
        except (OSError, ValueError) as error:  # of another process, or of the disk
            return fail("train", error)
        _print_summary(result, evaluations)
    return 0


def _failed(error: Exception) -> int:
    """Report an error, and return the exit code; an error before the start of the run is misuse."""
    from structlin_nn.recipes._run import BEGUN, TrainingError

    begun = BEGUN in getattr(error, "__notes__", ())
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, (TrainingError, OSError)) and (begun or isinstance(error, (TrainingError, BlockingIOError))):
        return fail("train", error)
    if not begun and isinstance(error, (ImportError, OSError, TypeError, ValueError)):
        return _misuse(str(error))
    traceback.print_exception(error)
    return 1


def _misuse(message: str) -> int:
    fail("train", f"{message} (see structlin train --help)")
    return 2


def _print_summary(result: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Print the last ten evaluations of a run as a table."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"

    keys = [key for key in SHOWN if key in evaluations[-1]]
    rows = [[cell(line[key]) for key in keys] for line in evaluations[-10:]]
    print_table([key.replace("_", " ") for key in keys], rows, left=0)
    print(f"done: {result.steps} steps, {result.evaluation['training_macs']:.3g} training MACs")
    print(f"record: {result.record}")
