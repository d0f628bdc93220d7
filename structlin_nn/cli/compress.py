"""``structlin compress``: replace the dense layers of a trained model by structured layers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from structlin_nn._text import table
from structlin_nn.cli import common
from structlin_nn.cli.common import add

HELP = "replace the dense layers of a trained model by the nearest structured ones, and write it to a file"
EXAMPLES = """\
examples:
  structlin compress runs/first --structure low_rank --mac-fraction 0.5 --out half.safetensors
      a run of `structlin train` on the embedded images, to half of the MACs of its layers
  structlin compress timm:vit_small_patch32_224 --weights vit.safetensors --data path/to/imagenet \\
      --structure low_rank --target-error 0.1 --out vit.small.safetensors
  structlin compress path/to/gpt2 --data path/to/tokens --structure low_rank --param-fraction 0.7 --out g.safetensors
      published GPT-2: a folder with config.json and model.safetensors
  structlin compress runs/first --structure monarch --blocks 4 --layers 'blocks.*' --exclude '*.up' --out m.safetensors

With data, the projection minimises the errors of the outputs on training samples instead of the errors of the weights,
and the model is evaluated before and after. The command does not train. `structlin train NAME --init-from FILE` trains
the file further, `structlin generate FILE` samples from a language model, and structlin_nn.models.load_model("FILE")
returns the torch model.
"""
BUDGETS = ("mac_fraction", "max_macs", "param_fraction", "max_params", "target_error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(
        parser, "MODEL", "a run of `structlin train` (its folder), a file of this command, timm:NAME with --weights, "
        "or a folder of GPT-2 as transformers saves it",
    )  # fmt: skip
    add(parser, "--out FILE", "file to write: .safetensors", required=True)
    add(parser, "--overwrite", "replace --out if it exists")
    add(parser, "--structure NAME", "one of `structlin structures`", required=True)
    much = parser.add_argument_group("budget: one of these, or options of the structure, for all layers")
    add(much, "--mac-fraction F", "share of the MACs of the chosen layers", kind=float)
    add(much, "--max-macs N", "MACs of the chosen layers, for one vector at each place", kind=int)
    add(much, "--param-fraction F", "share of their parameters", kind=float)
    add(much, "--max-params N", "number of parameters", kind=int)
    add(much, "--target-error E", "largest relative error of every layer", kind=float)
    common.layer_patterns(parser.add_argument_group("which layers"), "all_but_last; GPT-2: all")
    common.structure_options(parser)
    add(parser, "--rms-cap", "cap the RMS of factors; gains keep the function")
    add(parser, "--rule NAME", default="paper", among=common.RULES)
    data = parser.add_argument_group("data for calibration and evaluation")
    add(data, "--data DIR", "as for `structlin train` (the embedded images, for a run on them)")
    add(data, "--data-set NAME", "cifar10, cifar100 or fashion (that of the run)")
    add(data, "--unverified", "do not verify the checksums of CIFAR")
    about = "training samples for calibration, 0 for none (2000 images; 500 of ImageNet; 32 sequences)"
    add(data, "--calibrate N", about, kind=int)
    add(data, "--evaluate N", "test samples for evaluation, 0 for none (all images; 64 sequences)", kind=int)
    add(data, "--context N", "tokens in a sequence (the model's)", kind=int)
    add(data, "--damping D", "damping of the calibration", 0.01)
    add(data, "--seed N", "seed of the drawn samples", 0)
    model = parser.add_argument_group("the model")
    add(model, "--weights FILE", "state dictionary of timm:NAME, .safetensors")
    add(model, "--num-classes N", "classes of timm:NAME (those of the weights)", kind=int)
    add(model, "--image-size N", "side of the images of timm:NAME (the model's)", kind=int)
    add(model, "--average", "take the average of the weights of a run")
    add(model, "--untie", "give GPT-2 an untied head, and compress it too")
    add(model, "--device NAME", "cpu, cuda or cuda:N", "cpu")
    add(parser, "--json", "print JSON instead of tables")


def run(arguments: argparse.Namespace) -> None:
    import structlin
    from structlin_nn.compress import CALIBRATION, compress, costs
    from structlin_nn.models.files import save_model
    from structlin_nn.trained import open_trained

    out = Path(arguments.out).expanduser()
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must be a .safetensors file, got {out.name!r}")
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} exists already: add --overwrite to replace it, or choose another --out")
    common.check_folder("--out", str(out))
    for name, value in common.given(arguments, ("calibrate", "evaluate", "seed")).items():
        if value < 0:
            raise ValueError(f"--{name} must be at least 0, got {value}")
    structlin.structure_class(arguments.structure)
    device = str(common.device_of(arguments.device))
    trained = open_trained(
        arguments.model, weights=arguments.weights, num_classes=arguments.num_classes,
        image_size=arguments.image_size, average=arguments.average, untie=arguments.untie,
    )  # fmt: skip
    data = _data(arguments, trained, device)

    def state() -> dict[str, Any]:
        evaluated = data is not None and arguments.evaluate != 0
        quality = data.evaluate(trained.model, arguments.evaluate) if evaluated else None
        return {"costs": costs(trained), "quality": quality}

    trained.model.to(device)
    before = state()
    number = 0 if data is None else CALIBRATION[trained.task] if arguments.calibrate is None else arguments.calibrate
    calibration = list(data.samples(number)) if number else None
    options: dict[str, Any] = common.given_structure_options(arguments) | common.given(arguments, BUDGETS)
    if arguments.layers is not None:
        options["layers"] = common.layers_of(arguments.layers)
    start = time.perf_counter()
    report = compress(
        trained, arguments.structure, calibration=calibration, exclude=tuple(arguments.exclude), rule=arguments.rule,
        damping=arguments.damping, rms_cap=arguments.rms_cap, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    record = {
        "source": trained.name, "structure": arguments.structure,
        "calibration_samples": 0 if calibration is None else sum(len(batch) for batch in calibration),
        "data": None if data is None else data.about, "before": before, "after": state(),
    }  # fmt: skip
    trained.model.to("cpu")
    save_model(trained.model, out, build=trained.build, metadata={"compress": json.dumps(record)})
    record |= {
        "build": trained.build, "seconds": round(seconds, 3), "file": str(out), "bytes": out.stat().st_size,
        "report": report.to_dict(),
    }  # fmt: skip
    common.show(arguments, record, _text(record, report))
    one, two = (part["costs"]["forward_macs"] for part in (record["before"], record["after"]))
    if two > one:
        print(f"structlin compress: the model has more MACs than before, {two:,} in place of {one:,}", file=sys.stderr)


def _data(arguments: argparse.Namespace, trained: Any, device: str) -> Any:
    from structlin_nn.compress import open_data

    wanted = common.given(arguments, ("data_set", "context"))
    embedded = "fashion" in (arguments.data_set, (trained.config or {}).get("data_set"))
    if arguments.data is None and not embedded:
        if asked := [*wanted, *(name for name in ("calibrate", "evaluate") if getattr(arguments, name))]:
            raise ValueError(f"--{asked[0].replace('_', '-')} needs --data")
        return None
    if arguments.calibrate == 0 and arguments.evaluate == 0:
        return None
    return open_data(
        trained, arguments.data, verify=not arguments.unverified, device=device, seed=arguments.seed, **wanted
    )


_SHOWN = {
    "test_error": ("test error", "{:.2%}"), "val_error": ("top-1 error", "{:.2%}"),
    "val_top5_error": ("top-5 error", "{:.2%}"), "test_loss": ("test loss", "{:.4f}"),
    "val_loss": ("validation loss", "{:.4f}"), "val_perplexity": ("perplexity", "{:.2f}"),
}  # fmt: skip


def _text(record: dict[str, Any], report: Any) -> str:
    before, after = record["before"], record["after"]
    rows = []
    for key, label in (("params", "parameters"), ("forward_macs", "MACs, one sample")):
        one, two = before["costs"][key], after["costs"][key]
        rows.append((label, f"{one:,}", f"{two:,}", f"{two / one:.3f}"))
    for key, (label, form) in _SHOWN.items():
        if before["quality"] is not None and key in before["quality"]:
            rows.append((label, form.format(before["quality"][key]), form.format(after["quality"][key]), ""))
    whole = table(("the whole model", "before", "after", "ratio"), rows)
    used = f"calibrated on {record['calibration_samples']:,} samples" if record["calibration_samples"] else (
        "not calibrated: the projection minimises the errors of the weights; with --data those of the outputs"
    )  # fmt: skip
    return f"{report}\n\n{whole}\n\n{used}; {record['seconds']:.1f} s\n{record['file']}: {record['bytes']:,} bytes"
