"""``structlin plan``: what fits into a budget."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structlin_nn.cli.common import UsageError, choice, print_json, print_table
from structlin_nn.cli.count import DEVICES, DTYPES, LAYERS, MODELS

HELP = "find the widths, ranks, cores, blocks and depths that spend a budget best, structure by structure"
NAMES = ("layer", *MODELS)
RESOURCES = ("macs", "forward_macs", "params", "bytes", "training_flops", "step_seconds", "run_seconds")
STRUCTURES = ("dense", "low_rank", "monarch", "kronecker", "tensor_train", "block_tensor_train")
PREFERENCES = ("spent", "width", "params")
CHOICES = ("rank", "cores", "blocks", "depth")
EXAMPLES = """\
examples:
  structlin plan layer --shape 3072,768 --macs 3e5
  structlin plan cifar-mlp --forward-macs 5e6
  structlin plan imagenet-vit --forward-macs 3e8 --structure dense --structure block_tensor_train:rank=2
  structlin plan gpt2 --training-flops 1e21 --samples 288000000 --structure dense --multiple-of 64
  structlin plan cifar-mlp --params 1e6 --width 1024 --structure block_tensor_train --cores 2,3 --depth 1:6
  structlin plan cifar-mlp --forward-macs 1e5,1e6,1e7
  structlin plan gpt2 --step-seconds 0.1 --device h100 --batch-size 64 --dtype bfloat16 --structure dense
  structlin plan my_package.my_module:make_model --params 1e6 --structure monarch:blocks=4
  structlin plan cifar-mlp --laws laws.json --error 0.3
  structlin plan cifar-mlp --laws sizes.json --run-seconds 60 --device h100 --batch-size 1024

A layer of shape OUT,IN is planned by its rank, blocks and cores; a model by its width or, with one --width, by the
rank. Of a structure of factors some widths cost more than larger ones: the widest is found among all. Several values,
1,2,4 or FIRST:LAST[:STEP], are all tried. Several budgets of one kind make a table, of several kinds all are kept.
NAME is also a function of a width in a module that Python can import, which returns a torch model that has
example_input(batch), or (model, inputs). Seconds are the least that the roofline model gives, on a device by its data
sheet or on this machine (cpu), measured. laws.json is what `structlin fit --json` prints. With --error the law of each
structure gives its budget. Laws of `structlin fit --size forward_macs --data samples` give the structure, width and
number of samples of the lowest loss within a budget of the run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("name", metavar="NAME", type=_name, help=", ".join(NAMES) + ", or package.module:function")
    budget = parser.add_argument_group("the budget (N[,N,...])")
    for name, text in (
        ("macs", "MACs for one vector (layer)"),
        ("forward-macs", "MACs of one sample, forward (model); FFTs count with half their FLOPs"),
        ("params", "parameters"),
        ("bytes", "bytes of the factors, or of a training step"),
        ("training-flops", "FLOPs of a run of --samples (model)"),
        ("step-seconds", "the least time of a training step on --device (model)"),
        ("run-seconds", "the least time of a run of --samples on --device (model)"),
    ):
        budget.add_argument(f"--{name}", type=_budgets, metavar="N", help=text)
    budget.add_argument(
        "--laws",
        metavar="FILE",
        help="fitted laws: in compute, for --error; in two sizes, for a budget of a run (model)",
    )
    budget.add_argument("--error", type=float, metavar="E", help="the target error, for --laws of one size")
    parser.add_argument(
        "--structure", action="append", metavar="NAME[:OPTION=VALUE,...]", help="repeatable; " + ", ".join(STRUCTURES)
    )
    choices = parser.add_argument_group("what is chosen (V, V,V,... or FIRST:LAST[:STEP])")
    choices.add_argument("--width", type=_values, metavar="V", help="of the model (all); one: plan the rank at it")
    choices.add_argument("--rank", type=_values, metavar="V", help="of structures that have one (their own)")
    choices.add_argument("--cores", type=_values, metavar="V", help="number of factors (2; of a layer all)")
    choices.add_argument("--blocks", type=_values, metavar="V", help="number of blocks (4; of a layer all)")
    choices.add_argument("--depth", type=_values, metavar="V", help="blocks of the model (the model's own)")
    choices.add_argument("--multiple-of", type=int, metavar="N", help="search only widths that are multiples of N (1)")
    choices.add_argument("--even-widths", action="store_true", help="widths that split into equal factors alone")
    choices.add_argument(
        "--prefer", type=choice("preference", PREFERENCES), metavar="WHAT",
        help="which is best: most spent, width, or params (spent)",
    )  # fmt: skip
    parser.add_argument("--shape", type=_shape, metavar="OUT,IN", help="of the layer")
    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=choice("layers", LAYERS), metavar="NAME", help=", ".join(LAYERS))
    model.add_argument("--rms-cap", action="store_true", help="RMS-capped factors, with learned gains")
    model.add_argument("--batch-size", type=int, metavar="N", help="samples in a step, for bytes and seconds (1)")
    model.add_argument("--samples", type=int, metavar="N", help="of a run, for its FLOPs and seconds")
    model.add_argument(
        "--device", type=choice("device", DEVICES), metavar="NAME", help="for seconds: " + ", ".join(DEVICES)
    )
    for name in ("num-classes", "heads", "head-dim", "expansion", "patch", "vocabulary", "context"):
        model.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--dtype", type=choice("dtype", DTYPES), default="float32", metavar="NAME", help="(float32)")
    parser.add_argument(
        "--activation-dtype", type=choice("dtype", DTYPES), metavar="NAME", help="of activations (--dtype; model)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _name(text: str) -> str:
    return text if ":" in text else choice("name", NAMES)(text)


def _budgets(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or several with commas, got {text!r}") from None
    for value in found:
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"a budget must be positive and finite, got {value:g}")
    return found


def _values(text: str) -> int | list[int]:
    try:
        if ":" in text:
            first, last, *step = (int(part) for part in text.split(":"))
            found = list(range(first, last + 1, *step))
        else:
            found = [int(part) for part in text.split(",")]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be V, V,V,... or FIRST:LAST[:STEP] in integers, got {text!r}") from None
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, and one at least, got {text!r}")
    return found[0] if len(found) == 1 else found


def _shape(text: str) -> tuple[int, int]:
    try:
        d_out, d_in = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be OUT,IN in integers, got {text!r}") from None
    if d_out < 1 or d_in < 1:
        raise argparse.ArgumentTypeError(f"must be OUT,IN in positive integers, got {text!r}")
    return d_out, d_in


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    given = [name for name in RESOURCES if getattr(arguments, name) is not None]
    asked = ", ".join("--" + name.replace("_", "-") for name in RESOURCES)
    if arguments.laws is None and arguments.error is not None:
        raise UsageError("--error needs --laws")
    if not given and arguments.error is None:
        raise UsageError(f"a budget is needed: {asked}, or --laws with --error")
    if given and arguments.error is not None:
        raise UsageError("--error needs no budget: the law gives it")
    if len(given) > 1 and any(len(getattr(arguments, name)) > 1 for name in given):
        raise UsageError("several values make a table of one kind of budget, several kinds are all kept: not both")
    try:
        if arguments.name == "layer":
            return _layer(arguments, given)
        return _model(arguments, given)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error


_MODEL_OPTIONS = (
    "width", "multiple_of", "layers", "batch_size", "samples", "num_classes", "heads", "head_dim", "depth",
    "expansion", "patch", "vocabulary", "context", "activation_dtype", "prefer", "device",
)  # fmt: skip


def _layer(arguments: argparse.Namespace, given: list[str]) -> int:
    from structlin.planning import plan_layer, plan_layers
    from structlin_nn.planning import parse_structure

    of_models = [name for name in _MODEL_OPTIONS if getattr(arguments, name) is not None]
    of_models += [name for name in ("even_widths", "rms_cap") if getattr(arguments, name)]
    if of_models:
        raise ValueError(f"--{of_models[0].replace('_', '-')} is an option of models, not of a layer")
    if arguments.shape is None:
        raise ValueError("a layer needs --shape OUT,IN")
    if len(given) != 1 or given[0] not in ("macs", "params", "bytes") or len(getattr(arguments, given[0])) > 1:
        raise ValueError("the budget of a layer is one number of --macs, --params or --bytes")
    (resource,) = given
    (budget,) = getattr(arguments, resource)
    choices = {
        name: value if isinstance(value, list) else [value]
        for name in CHOICES
        if (value := getattr(arguments, name)) is not None
    }
    if choices and arguments.structure is None:
        raise ValueError(f"--{next(iter(choices))} of a layer needs --structure")
    settings: dict[str, Any] = {"resource": resource, "dtype": arguments.dtype}
    if arguments.structure is None:
        plans, left_out = plan_layers(arguments.shape, budget, **settings)
    else:
        chosen = [parse_structure(text) for text in arguments.structure]
        plans = [
            plan_layer(name, arguments.shape, budget, given={**options, **choices}, **settings)
            for name, options in chosen
        ]
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
    from structlin_nn.law_planning import plan_for_error
    from structlin_nn.planning import best_plan, parse_structure, plan_models, plans_record

    if arguments.shape is not None:
        raise ValueError("--shape is an option of a layer, not of a model")
    if "macs" in given:
        raise ValueError("the compute of a model is --forward-macs or --training-flops")
    settings: dict[str, Any] = {
        name: getattr(arguments, name) for name in (*_MODEL_OPTIONS, *CHOICES) if getattr(arguments, name) is not None
    }
    settings |= {"rms_cap": arguments.rms_cap, "even_widths": arguments.even_widths, "dtype": arguments.dtype}
    if arguments.laws is not None:
        if arguments.structure is not None:
            raise ValueError("with --laws the structures are those of the laws")
        laws = json.loads(Path(arguments.laws).read_text(encoding="utf-8"))
        if arguments.error is None:
            return _by_law(arguments, given, laws, settings)
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
    chosen = [parse_structure(text) for text in arguments.structure or STRUCTURES]
    if len(getattr(arguments, given[0])) > 1:
        return _table(arguments, given[0], chosen, settings)
    budgets = {name: getattr(arguments, name)[0] for name in given}
    plans, left_out = plan_models(arguments.name, budgets, chosen, **settings)
    if not plans:
        raise ValueError(_reason(left_out.values()))
    best = best_plan(plans, arguments.prefer or "spent")
    if arguments.json:
        print_json({
            "model": arguments.name, "budgets": budgets, "plans": plans_record(plans), "left_out": left_out,
            "best": plans.index(best),
        })  # fmt: skip
        return 0
    flops = ["training FLOPs"] if arguments.samples else []
    seconds = ["step at least"] if arguments.device else []
    depths = ["depth"] if arguments.depth is not None else []
    print_table(
        ("structure", "options", "width", *depths, "MACs/sample", "parameters", "bytes/step", *flops, *seconds,
         "of budget", "next"),
        [
            (
                p.structure, _shown(_usual(p.structure, p.options)), str(p.width), *([str(p.depth)] if depths else []),
                f"{p.forward_macs:,.0f}", f"{p.params:,}", f"{p.bytes:,}",
                *([f"{p.training_flops:.4g}"] if flops else []),
                *([f"{1e3 * p.step_seconds:.4g} ms"] if p.step_seconds is not None else []),
                f"{100 * p.share:.1f} %", f"{p.planned} {p.next}" if p.next else "-",
            )
            for p in plans
        ],
        left=2,
    )  # fmt: skip
    if arguments.prefer is not None:
        print(f"best by {arguments.prefer}: {best.structure} of width {best.width}")
    for text in left_out.values():
        print(text)
    return 0


def _by_law(arguments: argparse.Namespace, given: list[str], laws: Any, settings: dict[str, Any]) -> int:
    """Print the structure, width and number of samples of the lowest loss within one budget."""
    from structlin_nn.law_planning import plan_by_law
    from structlin_nn.planning import plans_record

    if len(given) != 1 or len(getattr(arguments, given[0])) > 1:
        raise ValueError("with --laws and without --error, one budget is needed: --run-seconds or --training-flops")
    chosen = {"width", "depth", "prefer", "samples", *CHOICES} & settings.keys()
    if settings.pop("even_widths") or chosen:
        option = min(chosen, default="even_widths").replace("_", "-")
        raise ValueError(f"--{option} is not used with --laws in two sizes, which give width and samples")
    (budget,) = getattr(arguments, given[0])
    rows = plan_by_law(arguments.name, laws, budget, resource=given[0], **settings)
    if arguments.json:
        print_json([row | {"plan": row["plan"] and plans_record([row["plan"]])[0]} for row in rows])
        return 0
    print(f"lowest {laws['y']} first, within {budget:g} {given[0].replace('_', ' ')}\n")
    print_table(
        ("group", laws["y"], "width", "parameters", "MACs/sample", "samples", ""),
        [
            (row["group"], "-", "-", "-", "-", "-", row["reason"])
            if row["plan"] is None
            else (
                row["group"], f"{row['loss']:.4g}", str(row["plan"].width), f"{row['plan'].params:,}",
                f"{row['plan'].forward_macs:,.0f}", f"{row['samples']:,}",
                "outside the fitted points" if row["extrapolated"] else "",
            )
            for row in rows
        ],
    )  # fmt: skip
    return 0


def _table(
    arguments: argparse.Namespace, resource: str, chosen: list[tuple[str, dict[str, Any]]], settings: dict[str, Any]
) -> int:  # fmt: skip
    """Structures against budgets: the width of each, and its parameters."""
    from structlin_nn.planning import iso_table, plans_record

    rows = iso_table(arguments.name, getattr(arguments, resource), chosen, resource=resource, **settings)
    if not any(row["plans"] for row in rows):
        raise ValueError(_reason(text for row in rows for text in row["left_out"].values()))
    if arguments.json:
        print_json([
            row | {"plans": {name: plans_record([plan])[0] for name, plan in row["plans"].items()}} for row in rows
        ])  # fmt: skip
        return 0
    labels = list(dict.fromkeys(name for row in rows for name in (*row["plans"], *row["left_out"])))

    def cell(plan: Any) -> str:
        if plan is None:
            return "-"
        deep = f", depth {plan.depth}" if arguments.depth is not None else ""
        return f"{plan.width}{deep} ({plan.params:.3g})"

    print(f"widest model within {resource.replace('_', ' ')}, and its parameters\n")
    print_table(
        ("structure", *(f"{row['budget']:g}" for row in rows)),
        [(label, *(cell(row["plans"].get(label)) for row in rows)) for label in labels],
    )
    for text in dict.fromkeys(text for row in rows for text in row["left_out"].values()):
        print(text)
    return 0


def _reason(reasons: Iterable[str]) -> str:
    """Why there is no plan at all, in one line."""
    first, *others = dict.fromkeys(reasons)
    return f"{first}; nor does one of the others fit" if others else first


def _for_error(row: dict[str, Any]) -> tuple[str, ...]:
    plan = row["plan"]
    if plan is None:
        return row["group"], "-", "-", "-", "-", "never reached"
    note = "outside the fitted points" if row["extrapolated"] else ""
    return (
        row["group"], f"{row['compute']:.4g}", str(plan.width), f"{plan.params:,}", f"{plan.forward_macs:,.0f}", note,
    )  # fmt: skip


def _usual(structure: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, and the rank and the number of blocks that a structure has by default."""
    import structlin

    known = structlin.structure_options(structure)
    names = [name for name in ("rank", "blocks") if name in known and "rank_fraction" not in options]
    return {name: "sqrt(d)" if known[name] is None else known[name] for name in names} | options


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
