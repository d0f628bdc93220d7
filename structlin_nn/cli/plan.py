"""``structlin plan``: what fits into a budget."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from structlin_nn.cli import common

HELP = "find the widths, ranks, cores, blocks and depths that use most of a budget, structure by structure"
NAMES = ("layer", *common.MODELS)
BUDGETS = {
    "macs": "MACs for one vector (layer)",
    "forward_macs": "MACs of one sample, forward (model); FFTs count with half their FLOPs",
    "params": "parameters",
    "bytes": "bytes of the factors (layer), or of a training step (model)",
    "training_flops": "FLOPs of a run of --samples (model)",
    "step_seconds": "minimum time of a training step on --device (model)",
    "run_seconds": "minimum time of a run of --samples on --device (model)",
}
STRUCTURES = ("dense", "low_rank", "monarch", "kronecker", "tensor_train", "block_tensor_train")
PREFERENCES = ("spent", "width", "params")
CHOICES = ("rank", "cores", "blocks", "depth")
OF_MODELS = (
    "width", "multiple_of", "even_widths", "prefer", "layers", "rms_cap", "batch_size", "samples", "activation_dtype",
    "device", *(name for name in common.SIZES if name != "depth"),
)  # fmt: skip
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

The plan of a layer of shape OUT,IN is its rank, blocks and cores. The plan of a model is its width, or with one --width
the rank. Several values, 1,2,4 or FIRST:LAST[:STEP], are all tried. Several budgets of one kind make a table, and
budgets of several kinds are all met. NAME may be a function of a width in a module that Python can import, which
returns a torch model that has example_input(batch), or (model, inputs). Seconds are the minimum by the roofline model,
with the data sheet of a device or with measured rates of this machine (cpu). laws.json and sizes.json are outputs of
`structlin fit --json`. With --error, the law of each structure gives its budget. Laws of `structlin fit --size
forward_macs --data samples` give the structure, width and number of samples of the lowest loss within a budget of the
run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", type=_name, help=", ".join(NAMES) + ", or package.module:function")
    budget = parser.add_argument_group("the budget (N[,N,...])")
    for name, text in BUDGETS.items():
        budget.add_argument(f"--{name.replace('_', '-')}", type=_budgets, metavar="N", help=text)
    budget.add_argument(
        "--laws", metavar="FILE", help="laws in one size, for --error, or in two sizes, for a budget of a run (model)"
    )
    budget.add_argument("--error", type=float, metavar="E", help="target error, for --laws of one size")
    parser.add_argument(
        "--structure", action="append", metavar="NAME[:OPTION=VALUE,...]", help="repeatable; " + ", ".join(STRUCTURES)
    )
    choices = parser.add_argument_group("what is chosen (V, V,V,... or FIRST:LAST[:STEP])")
    choices.add_argument("--width", type=_values, metavar="V", help="of the model (all); one: plan the rank")
    choices.add_argument("--rank", type=_values, metavar="V", help="of structures that have one (their own)")
    choices.add_argument("--cores", type=_values, metavar="V", help="number of factors (2; of a layer all)")
    choices.add_argument("--blocks", type=_values, metavar="V", help="number of blocks (4; of a layer all)")
    choices.add_argument("--depth", type=_values, metavar="V", help="blocks of the model (the model's own)")
    choices.add_argument("--multiple-of", type=int, metavar="N", help="search only widths that are multiples of N (1)")
    choices.add_argument(
        "--even-widths", action="store_true", default=None, help="search only widths that split into equal factors"
    )
    common.add_choice(
        choices, "--prefer", PREFERENCES, about="the best choice: most spent, width, or params (spent)",
        kind="preference",
    )  # fmt: skip
    parser.add_argument("--shape", type=common.integers, metavar="OUT,IN", help="of the layer")
    model = parser.add_argument_group("the model")
    common.add_choice(model, "--layers", common.LAYERS)
    model.add_argument("--rms-cap", action="store_true", default=None, help="RMS-capped factors, with learned gains")
    model.add_argument("--batch-size", type=int, metavar="N", help="samples in a step, for bytes and seconds (1)")
    model.add_argument("--samples", type=int, metavar="N", help="samples of a run, for its FLOPs and seconds")
    common.add_choice(model, "--device", common.DEVICES, about="for seconds")
    common.size_options(model, [name for name in common.SIZES if name != "depth"])
    common.add_choice(parser, "--dtype", common.DTYPES, "float32")
    common.add_choice(
        parser, "--activation-dtype", common.DTYPES, about="of activations (--dtype; model)", kind="dtype"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _name(text: str) -> str:
    return text if ":" in text else common.choice("name", NAMES)(text)


def _budgets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or several with commas, got {text!r}") from None


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


def run(arguments: argparse.Namespace) -> int:
    budgets = common.given(arguments, BUDGETS)
    if arguments.error is not None and (arguments.laws is None or budgets):
        raise ValueError(
            "--error needs --laws" if arguments.laws is None else "--error needs no budget: the law gives it"
        )
    if not budgets and arguments.error is None:
        asked = ", ".join("--" + name.replace("_", "-") for name in BUDGETS)
        raise ValueError(f"a budget is needed: {asked}, or --laws with --error")
    if len(budgets) > 1 and any(len(values) > 1 for values in budgets.values()):
        raise ValueError("give several budgets of one kind, or one budget of each of several kinds")
    return (_layer if arguments.name == "layer" else _model)(arguments, budgets)


def _layer(arguments: argparse.Namespace, budgets: dict[str, list[float]]) -> int:
    from structlin.planning import RESOURCES, plan_layer, plan_layers
    from structlin_nn.planning import parse_structure

    if wrong := [*common.given(arguments, (*OF_MODELS, "depth", "laws", "error"))]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} is an option of models, not of a layer")
    if not isinstance(arguments.shape, tuple) or len(arguments.shape) != 2 or min(arguments.shape) < 1:
        raise ValueError(f"a layer needs --shape OUT,IN, two positive integers, got {arguments.shape}")
    ((resource, amounts), *others) = budgets.items()
    if others or len(amounts) > 1 or resource not in RESOURCES:
        raise ValueError("the budget of a layer is one number of --macs, --params or --bytes")
    choices = {
        name: value if isinstance(value, list) else [value] for name, value in common.given(arguments, CHOICES).items()
    }
    if choices and arguments.structure is None:
        raise ValueError(f"--{next(iter(choices))} of a layer needs --structure")
    settings: dict[str, Any] = {"resource": resource, "dtype": arguments.dtype}
    left_out: dict[str, str] = {}
    if arguments.structure is None:
        plans, left_out = plan_layers(arguments.shape, amounts[0], **settings)
    else:
        plans = [
            plan_layer(name, arguments.shape, amounts[0], given={**options, **choices}, **settings)
            for name, options in map(parse_structure, arguments.structure)
        ]
    plans.sort(key=lambda plan: -plan.share)
    if arguments.json:
        common.print_json({
            "shape": arguments.shape, "resource": resource, "budget": amounts[0], "left_out": left_out,
            "plans": [asdict(p) for p in plans],
        })  # fmt: skip
        return 0
    rows = [
        (p.structure, _shown(p.options), f"{p.macs:,}", f"{p.params:,}", f"{p.bytes:,}", f"{100 * p.share:.1f} %")
        for p in plans
    ]
    common.print_table(("structure", "options", "MACs", "parameters", "bytes", "of budget"), rows, left=2)
    for text in left_out.values():
        print(text)
    return 0


def _model(arguments: argparse.Namespace, budgets: dict[str, list[float]]) -> int:
    from structlin_nn.law_planning import plan_for_error
    from structlin_nn.planning import best_plan, parse_structure, plan_models, plans_record

    if arguments.shape is not None:
        raise ValueError(f"--shape is an option of a layer, and NAME is {arguments.name}")
    if "macs" in budgets:
        raise ValueError("the compute of a model is --forward-macs or --training-flops, --macs is of a layer")
    settings = common.given(arguments, (*OF_MODELS, *CHOICES, "dtype"))
    if arguments.laws is not None:
        if arguments.structure is not None:
            raise ValueError("with --laws the structures are those of the laws")
        laws = json.loads(Path(arguments.laws).read_text(encoding="utf-8"))
        if arguments.error is None:
            return _by_law(arguments, budgets, laws, settings)
        rows = plan_for_error(arguments.name, laws, arguments.error, **settings)
        if arguments.json:
            common.print_json([row | {"plan": row["plan"] and plans_record([row["plan"]])[0]} for row in rows])
            return 0
        print(f"the cheapest first, for {laws['y']} {arguments.error:g}\n")
        columns = ("group", laws["x"], "width", "parameters", "MACs/sample", "")
        common.print_table(columns, [_for_error(row) for row in rows])
        return 0
    chosen = [parse_structure(text) for text in arguments.structure or STRUCTURES]
    if len(budgets) == 1 and len(next(iter(budgets.values()))) > 1:
        return _table(arguments, *next(iter(budgets.items())), chosen, settings)
    single = {name: value for name, (value,) in budgets.items()}
    plans, left_out = plan_models(arguments.name, single, chosen, **settings)
    if not plans:
        raise ValueError(_reason(left_out.values()))
    best = best_plan(plans, arguments.prefer or "spent")
    if arguments.json:
        common.print_json({
            "model": arguments.name, "budgets": single, "plans": plans_record(plans), "left_out": left_out,
            "best": plans.index(best),
        })  # fmt: skip
        return 0
    head = [
        "structure", "options", "width", *(["depth"] if arguments.depth is not None else []), "MACs/sample",
        "parameters", "bytes/step", *(["training FLOPs"] if arguments.samples else []),
        *(["step at least"] if arguments.device else []), "of budget", "next",
    ]  # fmt: skip
    common.print_table(head, [_cells(plan, arguments) for plan in plans], left=2)
    if arguments.prefer is not None:
        print(f"best by {arguments.prefer}: {best.structure} of width {best.width}")
    for text in left_out.values():
        print(text)
    return 0


def _cells(p: Any, arguments: argparse.Namespace) -> list[str]:
    return [
        p.structure, _shown(_usual(p.structure, p.options)), str(p.width),
        *([str(p.depth)] if arguments.depth is not None else []), f"{p.forward_macs:,.0f}", f"{p.params:,}",
        f"{p.bytes:,}", *([f"{p.training_flops:.4g}"] if arguments.samples else []),
        *([f"{1e3 * p.step_seconds:.4g} ms"] if arguments.device else []), f"{100 * p.share:.1f} %",
        f"{p.planned} {p.next}" if p.next else "-",
    ]  # fmt: skip


def _by_law(
    arguments: argparse.Namespace, budgets: dict[str, list[float]], laws: Any, settings: dict[str, Any]
) -> int:  # fmt: skip
    """Print the structure, width and number of samples of the lowest loss within one budget."""
    from structlin_nn.law_planning import plan_by_law
    from structlin_nn.planning import plans_record

    ((resource, amounts), *others) = budgets.items()
    if others or len(amounts) > 1:
        raise ValueError("with --laws and without --error, one budget is needed: --run-seconds or --training-flops")
    if chosen := {"width", "prefer", "samples", "even_widths", *CHOICES} & settings.keys():
        option = min(chosen).replace("_", "-")
        raise ValueError(f"--{option} is not used with --laws in two sizes, which give width and samples")
    rows = plan_by_law(arguments.name, laws, amounts[0], resource=resource, **settings)
    if arguments.json:
        common.print_json([row | {"plan": row["plan"] and plans_record([row["plan"]])[0]} for row in rows])
        return 0
    print(f"lowest {laws['y']} first, within {amounts[0]:g} {resource.replace('_', ' ')}\n")
    cells = []
    for row in rows:
        if (plan := row["plan"]) is None:
            cells.append((row["group"], "-", "-", "-", "-", "-", row["reason"]))
            continue
        cells.append((
            row["group"], f"{row['loss']:.4g}", str(plan.width), f"{plan.params:,}", f"{plan.forward_macs:,.0f}",
            f"{row['samples']:,}", "outside the fitted points" if row["extrapolated"] else "",
        ))  # fmt: skip
    common.print_table(("group", laws["y"], "width", "parameters", "MACs/sample", "samples", ""), cells)
    return 0


def _table(
    arguments: argparse.Namespace, resource: str, budgets: list[float], chosen: list[tuple[str, dict[str, Any]]],
    settings: dict[str, Any],
) -> int:  # fmt: skip
    """Print the width of each structure for each budget, and its parameters."""
    from structlin_nn.planning import iso_table, plans_record

    rows = iso_table(arguments.name, budgets, chosen, resource=resource, **settings)
    if not any(row["plans"] for row in rows):
        raise ValueError(_reason(text for row in rows for text in row["left_out"].values()))
    if arguments.json:
        common.print_json([
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
    common.print_table(
        ("structure", *(f"{row['budget']:g}" for row in rows)),
        [(label, *(cell(row["plans"].get(label)) for row in rows)) for label in labels],
    )
    for text in dict.fromkeys(text for row in rows for text in row["left_out"].values()):
        print(text)
    return 0


def _reason(reasons: Iterable[str]) -> str:
    """Return why there is no plan, in one line."""
    first, *others = dict.fromkeys(reasons)
    return f"{first}; none of the other structures fits" if others else first


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
