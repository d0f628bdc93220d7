"""``structlin plan``: what fits into a budget."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import UsageError, choice, print_json, print_table
from structlin_nn.cli.count import DTYPES, LAYERS, MODELS

HELP = "find the widths and ranks that spend a budget of compute, parameters or bytes, structure by structure"
NAMES = ("layer", *MODELS)
RESOURCES = ("macs", "forward_macs", "params", "bytes", "training_flops")
STRUCTURES = ("dense", "low_rank", "monarch", "kronecker", "tensor_train", "block_tensor_train")
EXAMPLES = """\
examples:
  structlin plan layer --shape 3072,768 --macs 3e5
  structlin plan cifar-mlp --forward-macs 5e6
  structlin plan imagenet-vit --forward-macs 3e8 --structure dense --structure block_tensor_train:rank=2
  structlin plan gpt2 --training-flops 1e21 --samples 288000000 --structure dense --multiple-of 64
  structlin plan cifar-mlp --params 1e6 --width 1024 --structure block_tensor_train
  structlin plan cifar-mlp --laws laws.json --error 0.3

A layer of shape OUT,IN is planned by its rank or blocks, a model by its width or, with --width, by the rank.
laws.json is what `structlin fit --json` prints: the budget of each structure is then what its law asks for.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", type=choice("name", NAMES), help=", ".join(NAMES))
    budget = parser.add_argument_group("the budget (one of)")
    budget.add_argument("--macs", type=float, metavar="N", help="MACs for one vector (layer)")
    budget.add_argument("--forward-macs", type=float, metavar="N", help="MACs of one sample, forward (model)")
    budget.add_argument("--params", type=float, metavar="N", help="parameters")
    budget.add_argument("--bytes", type=float, metavar="N", help="bytes of the factors, or of a training step")
    budget.add_argument("--training-flops", type=float, metavar="N", help="FLOPs of a run of --samples (model)")
    budget.add_argument("--laws", metavar="FILE", help="fitted laws, for --error (model)")
    budget.add_argument("--error", type=float, metavar="E", help="the target error, for --laws")
    parser.add_argument(
        "--structure", action="append", metavar="NAME[:OPTION=VALUE,...]", help="repeatable; " + ", ".join(STRUCTURES)
    )
    parser.add_argument("--shape", type=_shape, metavar="OUT,IN", help="of the layer")
    model = parser.add_argument_group("the model")
    model.add_argument("--width", type=int, metavar="W", help="plan the rank at this width")
    model.add_argument("--multiple-of", type=int, metavar="N", help="of which widths are multiples (1)")
    model.add_argument("--any-width", action="store_true", help="widths that split unevenly into factors, too")
    model.add_argument("--layers", type=choice("layers", LAYERS), metavar="NAME", help=", ".join(LAYERS))
    model.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    model.add_argument("--batch-size", type=int, metavar="N", help="samples in a step, for the bytes (1)")
    model.add_argument("--samples", type=int, metavar="N", help="of a run, for its FLOPs")
    for name in ("num-classes", "heads", "head-dim", "depth", "expansion", "patch", "vocabulary", "context"):
        model.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--dtype", type=choice("dtype", DTYPES), default="float32", metavar="NAME", help="(float32)")
    parser.add_argument(
        "--activation-dtype", type=choice("dtype", DTYPES), metavar="NAME", help="of activations (--dtype; model)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _shape(text: str) -> tuple[int, int]:
    try:
        d_out, d_in = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be OUT,IN in integers, got {text!r}") from None
    if d_out < 1 or d_in < 1:
        raise argparse.ArgumentTypeError(f"must be OUT,IN in positive integers, got {text!r}")
    return d_out, d_in


def run(arguments: argparse.Namespace) -> int:
    given = [name for name in RESOURCES if getattr(arguments, name) is not None]
    asked = ", ".join("--" + name.replace("_", "-") for name in RESOURCES)
    if (arguments.laws is None) != (arguments.error is None):
        raise UsageError("--laws and --error go together")
    if len(given) + (arguments.laws is not None) != 1:
        raise UsageError(f"one budget is needed: {asked}, or --laws with --error")
    try:
        if arguments.name == "layer":
            return _layer(arguments, given)
        return _model(arguments, given)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error


_MODEL_OPTIONS = (
    "width", "multiple_of", "layers", "batch_size", "samples", "num_classes", "heads", "head_dim", "depth",
    "expansion", "patch", "vocabulary", "context", "activation_dtype",
)  # fmt: skip


def _layer(arguments: argparse.Namespace, given: list[str]) -> int:
    from structlin.planning import plan_layer, plan_layers
    from structlin_nn.planning import parse_structure

    of_models = [name for name in _MODEL_OPTIONS if getattr(arguments, name) is not None]
    of_models += [name for name in ("any_width", "rms_cap") if getattr(arguments, name)]
    if of_models:
        raise ValueError(f"--{of_models[0].replace('_', '-')} is an option of models, not of a layer")
    if arguments.shape is None:
        raise ValueError("a layer needs --shape OUT,IN")
    if not given or given[0] not in ("macs", "params", "bytes"):
        raise ValueError("the budget of a layer is --macs, --params or --bytes")
    (resource,) = given
    budget = getattr(arguments, resource)
    settings: dict[str, Any] = {"resource": resource, "dtype": arguments.dtype}
    if arguments.structure is None:
        plans, left_out = plan_layers(arguments.shape, budget, **settings)
    else:
        chosen = [parse_structure(text) for text in arguments.structure]
        plans = [plan_layer(name, arguments.shape, budget, given=options, **settings) for name, options in chosen]
        left_out = {}
    plans.sort(key=lambda plan: -plan.share)
    if arguments.json:
        print_json({
            "shape": arguments.shape, "resource": resource, "budget": budget, "left_out": left_out,
            "plans": [asdict(p) for p in plans],
        })  # fmt: skip
        return 0
    print_table(
        ("structure", "options", "MACs", "parameters", "bytes", "of budget"),
        [
            (p.structure, _shown(p.options), f"{p.macs:,}", f"{p.params:,}", f"{p.bytes:,}", f"{100 * p.share:.1f} %")
            for p in plans
        ],
        left=2,
    )
    for text in left_out.values():
        print(text)
    return 0


def _model(arguments: argparse.Namespace, given: list[str]) -> int:
    from structlin_nn.planning import parse_structure, plan_for_error, plan_model, plan_models, plans_record

    if arguments.shape is not None:
        raise ValueError("--shape is an option of a layer, not of a model")
    if given == ["macs"]:
        raise ValueError("the compute of a model is --forward-macs or --training-flops")
    settings: dict[str, Any] = {
        name: getattr(arguments, name) for name in _MODEL_OPTIONS if getattr(arguments, name) is not None
    }
    settings |= {"rms_cap": arguments.rms_cap, "any_width": arguments.any_width, "dtype": arguments.dtype}
    if arguments.laws is not None:
        if arguments.structure is not None:
            raise ValueError("with --laws the structures are those of the laws")
        laws = json.loads(Path(arguments.laws).read_text(encoding="utf-8"))
        rows = plan_for_error(arguments.name, laws, arguments.error, **settings)
        if arguments.json:
            print_json([row | {"plan": row["plan"] and plans_record([row["plan"]])[0]} for row in rows])
            return 0
        print(f"the cheapest first, for {laws['y']} {arguments.error:g}\n")
        print_table(
            ("group", laws["x"], "width", "parameters", "MACs/sample", ""),
            [_for_error(row) for row in rows],
        )
        return 0
    (resource,) = given
    settings["resource"] = resource
    budget = getattr(arguments, resource)
    if arguments.structure is None:
        plans, left_out = plan_models(arguments.name, budget, [(name, {}) for name in STRUCTURES], **settings)
        if not plans:
            raise ValueError("; ".join(left_out.values()))
    else:
        chosen = [parse_structure(text) for text in arguments.structure]
        plans = [plan_model(arguments.name, budget, structure=s, options=o, **settings) for s, o in chosen]
        left_out = {}
    if arguments.json:
        print_json({
            "model": arguments.name, "resource": resource, "budget": budget, "plans": plans_record(plans),
            "left_out": left_out,
        })  # fmt: skip
        return 0
    flops = ["training FLOPs"] if arguments.samples else []
    print_table(
        ("structure", "options", "width", "MACs/sample", "parameters", "bytes/step", *flops, "of budget", "next"),
        [
            (
                p.structure, _shown(_usual(p.structure, p.options)), str(p.width),
                f"{p.forward_macs:,}", f"{p.params:,}", f"{p.bytes:,}",
                *([f"{p.training_flops:.4g}"] if flops else []), f"{100 * p.share:.1f} %", f"{p.planned} {p.next}",
            )
            for p in plans
        ],
        left=2,
    )  # fmt: skip
    for text in left_out.values():
        print(text)
    return 0


def _for_error(row: dict[str, Any]) -> tuple[str, ...]:
    plan = row["plan"]
    if plan is None:
        return row["group"], "-", "-", "-", "-", "never reached"
    note = "outside the fitted points" if row["extrapolated"] else ""
    return (
        row["group"], f"{row['compute']:.4g}", str(plan.width), f"{plan.params:,}", f"{plan.forward_macs:,}", note,
    )  # fmt: skip


def _usual(structure: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and the rank and the number of blocks that a structure has unless told otherwise."""
    import structlin

    known = structlin.options(structure)
    names = [name for name in ("rank", "blocks") if name in known and "rank_fraction" not in options]
    return {name: "sqrt(d)" if known[name] is None else known[name] for name in names} | options


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
