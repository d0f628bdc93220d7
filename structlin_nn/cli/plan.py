"""``structlin plan``: what fits into a budget."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from structlin_nn._text import table
from structlin_nn.cli import common
from structlin_nn.cli.common import add, given, show

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
    "width", "multiple_of", "prefer", "layers", "rms_cap", "batch_size", "samples", "activation_dtype",
    "device", *(name for name in common.SIZES if name != "depth"),
)  # fmt: skip
EXAMPLES = """\
examples:
  structlin plan layer --shape 3072,768 --macs 3e5
  structlin plan cifar-mlp --forward-macs 5e6
  structlin plan gpt2 --training-flops 1e21 --samples 288000000 --structure dense --multiple-of 64
  structlin plan cifar-mlp --params 1e6 --width 1024 --structure block_tensor_train --cores 2,3 --depth 1:6
  structlin plan cifar-mlp --forward-macs 1e5,1e6,1e7
  structlin plan gpt2 --step-seconds 0.1 --device h100 --batch-size 64 --dtype bfloat16 --structure dense
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
Shown = tuple[Any, list[str]]
"""A record for JSON, and the lines of the text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "NAME", ", ".join(NAMES) + ", or package.module:function", kind=_name)
    budget = parser.add_argument_group("the budget (N[,N,...])")
    for name, text in BUDGETS.items():
        add(budget, f"--{name.replace('_', '-')} N", text, kind=_budgets)
    add(budget, "--laws FILE", "laws in one size, for --error, or in two sizes, for a budget of a run (model)")
    add(budget, "--error E", "target error, for --laws of one size", kind=float)
    add(parser, "--structure NAME[:OPTION=VALUE,...]", "repeatable; " + ", ".join(STRUCTURES), action="append")
    choices = parser.add_argument_group("what is chosen (V, V,V,... or FIRST:LAST[:STEP])")
    add(choices, "--width V", "of the model (all); one: plan the rank", kind=_values)
    add(choices, "--rank V", "of structures that have one (their own)", kind=_values)
    add(choices, "--cores V", "number of factors (2; of a layer all)", kind=_values)
    add(choices, "--blocks V", "number of blocks (4; of a layer all)", kind=_values)
    add(choices, "--depth V", "blocks of the model (the model's own)", kind=_values)
    add(choices, "--multiple-of N", "search only widths that are multiples of N (1)", kind=int)
    about = "the best choice: most spent, width, or params (spent)"
    add(choices, "--prefer NAME", about, among=PREFERENCES, what="preference")
    add(parser, "--shape OUT,IN", "of the layer", kind=common.integers)
    model = parser.add_argument_group("the model")
    add(model, "--layers NAME", among=common.LAYERS)
    add(model, "--rms-cap", "RMS-capped factors, with learned gains")
    add(model, "--batch-size N", "samples in a step, for bytes and seconds (1)", kind=int)
    add(model, "--samples N", "samples of a run, for its FLOPs and seconds", kind=int)
    add(model, "--device NAME", "for seconds", among=common.DEVICES)
    common.size_options(model, [name for name in common.SIZES if name != "depth"])
    add(parser, "--dtype NAME", default="float32", among=common.DTYPES)
    add(parser, "--activation-dtype NAME", "of activations (--dtype; model)", among=common.DTYPES, what="dtype")
    add(parser, "--json", "print JSON instead of a table")


def _name(text: str) -> str:
    return text if ":" in text else common.one_of("name", NAMES, text)


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


def run(arguments: argparse.Namespace) -> None:
    budgets = given(arguments, BUDGETS)
    if arguments.error is not None and (arguments.laws is None or budgets):
        raise ValueError(
            "--error needs --laws" if arguments.laws is None else "--error needs no budget: the law gives it"
        )
    if not budgets and arguments.error is None:
        asked = ", ".join("--" + name.replace("_", "-") for name in BUDGETS)
        raise ValueError(f"a budget is needed: {asked}, or --laws with --error")
    if len(budgets) > 1 and any(len(values) > 1 for values in budgets.values()):
        raise ValueError("give several budgets of one kind, or one budget of each of several kinds")
    if arguments.name == "layer":
        record, lines = _layer(arguments, budgets)
    else:
        record, lines = _of_model(arguments, budgets)
    show(arguments, record, "\n".join(lines))


def _of_model(arguments: argparse.Namespace, budgets: dict[str, list[float]]) -> Shown:
    if arguments.shape is not None:
        raise ValueError(f"--shape is an option of a layer, and NAME is {arguments.name}")
    if "macs" in budgets:
        raise ValueError("the compute of a model is --forward-macs or --training-flops, --macs is of a layer")
    settings = given(arguments, (*OF_MODELS, *CHOICES, "dtype"))
    if arguments.laws is not None:
        return _by_law(arguments, budgets, settings)
    if any(len(values) > 1 for values in budgets.values()):
        return _table(arguments, *next(iter(budgets.items())), settings)
    return _model(arguments, {name: value for name, (value,) in budgets.items()}, settings)


def _layer(arguments: argparse.Namespace, budgets: dict[str, list[float]]) -> Shown:
    from structlin.planning import RESOURCES, BudgetError, plan_layer, plan_layers
    from structlin_nn.planning import UNITS, parse_structure

    if wrong := [*given(arguments, (*OF_MODELS, "depth", "laws", "error"))]:
        raise ValueError(f"--{wrong[0].replace('_', '-')} is an option of models, not of a layer")
    if not isinstance(arguments.shape, tuple) or len(arguments.shape) != 2 or min(arguments.shape) < 1:
        raise ValueError(f"a layer needs --shape OUT,IN, two positive integers, got {arguments.shape}")
    ((resource, amounts), *others) = budgets.items()
    if others or len(amounts) > 1 or resource not in RESOURCES:
        raise ValueError("the budget of a layer is one number of --macs, --params or --bytes")
    choices = {k: value if isinstance(value, list) else [value] for k, value in given(arguments, CHOICES).items()}
    if choices and arguments.structure is None:
        raise ValueError(f"--{next(iter(choices))} of a layer needs --structure")
    settings: dict[str, Any] = {"resource": resource, "dtype": arguments.dtype}
    errors: dict[str, ValueError] = {}
    if arguments.structure is None:
        plans, errors = plan_layers(arguments.shape, amounts[0], **settings)
    else:
        plans = []
        for text in arguments.structure:
            name, options = parse_structure(text)
            try:
                plans.append(plan_layer(name, arguments.shape, amounts[0], given={**options, **choices}, **settings))
            except BudgetError as error:
                errors[text] = error
    for label, problem in errors.items():  # structlin names the resource by its argument
        if isinstance(problem, BudgetError):
            errors[label] = BudgetError(problem.what, problem.least, UNITS[resource], problem.budget)
    _check_any(plans, errors.values())
    plans.sort(key=lambda plan: -plan.share)
    record = {"shape": arguments.shape, "resource": resource, "budget": amounts[0], "left_out": errors, "plans": plans}
    rows = [
        (p.structure, _shown(p.options), f"{p.macs:,}", f"{p.params:,}", f"{p.bytes:,}", f"{100 * p.share:.1f} %")
        for p in plans
    ]
    lines = [table(("structure", "options", "MACs", "parameters", "bytes", "of budget"), rows, left=2)]
    return record, [*lines, *map(str, errors.values())]


def _model(arguments: argparse.Namespace, budgets: dict[str, float], settings: dict[str, Any]) -> Shown:
    from structlin_nn.planning import best_plan, parse_structure, plan_models

    chosen = [parse_structure(text) for text in arguments.structure or STRUCTURES]
    plans, errors = plan_models(arguments.name, budgets, chosen, **settings)
    _check_any(plans, errors.values())
    best = best_plan(plans, arguments.prefer or "spent")
    columns: dict[str, Callable[[Any], str] | None] = {
        "structure": lambda p: p.structure,
        "options": lambda p: _shown(_usual(p.structure, p.options)),
        "width": lambda p: str(p.width),
        "depth": (lambda p: str(p.depth)) if arguments.depth is not None else None,
        "MACs/sample": lambda p: f"{p.forward_macs:,.0f}",
        "parameters": lambda p: f"{p.params:,}",
        "bytes/step": lambda p: f"{p.bytes:,}",
        "training FLOPs": (lambda p: f"{p.training_flops:.4g}") if arguments.samples else None,
        "step at least": (lambda p: f"{1e3 * p.step_seconds:.4g} ms") if arguments.device else None,
        "of budget": lambda p: f"{100 * p.share:.1f} %",
        "next": lambda p: f"{p.planned} {p.next}" if p.next else "-",
    }
    shown = {name: cell for name, cell in columns.items() if cell is not None}
    lines = [table(list(shown), [[cell(plan) for cell in shown.values()] for plan in plans], left=2)]
    if arguments.prefer is not None:
        lines.append(f"best by {arguments.prefer}: {best.structure} of width {best.width}")
    record = {"model": arguments.name, "budgets": budgets, "plans": plans, "left_out": errors}
    return record | {"best": plans.index(best)}, [*lines, *map(str, errors.values())]


def _by_law(arguments: argparse.Namespace, budgets: dict[str, list[float]], settings: dict[str, Any]) -> Shown:
    """Return the cheapest model for an error, or the one of the lowest loss within one budget of a run."""
    from structlin_nn.law_planning import plan_by_law, plan_for_error

    if arguments.structure is not None:
        raise ValueError("with --laws the structures are those of the laws")
    laws = json.loads(Path(arguments.laws).read_text(encoding="utf-8"))
    if arguments.error is not None:
        rows = plan_for_error(arguments.name, laws, arguments.error, **settings)
        about = f"the cheapest first, for {laws['y']} {arguments.error:g}"
        number, more = ("compute", laws.get("x", "")), []
    else:
        ((resource, amounts), *others) = budgets.items()
        if others or len(amounts) > 1:
            raise ValueError("with --laws and without --error, one budget is needed: --run-seconds or --training-flops")
        if chosen := {"width", "prefer", "samples", *CHOICES} & settings.keys():
            option = min(chosen).replace("_", "-")
            raise ValueError(f"--{option} is not used with --laws in two sizes, which give width and samples")
        rows = plan_by_law(arguments.name, laws, amounts[0], resource=resource, **settings)
        about = f"lowest {laws['y']} first, within {amounts[0]:g} {resource.replace('_', ' ')}"
        number, more = ("loss", laws["y"]), ["samples"]
    cells = []
    for row in rows:
        if (plan := row["plan"]) is None:
            cells.append((row["group"], *["-"] * (4 + len(more)), row.get("reason", "never reached")))
            continue
        sizes = (str(plan.width), f"{plan.params:,}", f"{plan.forward_macs:,.0f}", *(f"{row[k]:,}" for k in more))
        note = "outside the fitted points" if row["extrapolated"] else ""
        cells.append((row["group"], f"{row[number[0]]:.4g}", *sizes, note))
    return rows, [f"{about}\n", table(("group", number[1], "width", "parameters", "MACs/sample", *more, ""), cells)]


def _table(arguments: argparse.Namespace, resource: str, budgets: list[float], settings: dict[str, Any]) -> Shown:
    """Return the width of each structure for each budget, and its parameters."""
    from structlin_nn.planning import iso_table, parse_structure

    chosen = [parse_structure(text) for text in arguments.structure or STRUCTURES]
    rows = iso_table(arguments.name, budgets, chosen, resource=resource, **settings)
    errors = [error for row in rows for error in row["left_out"].values()]
    _check_any([plan for row in rows for plan in row["plans"].values()], errors)

    def cell(plan: Any) -> str:
        if plan is None:
            return "-"
        deep = f", depth {plan.depth}" if arguments.depth is not None else ""
        return f"{plan.width}{deep} ({plan.params:.3g})"

    labels = dict.fromkeys(name for row in rows for name in (*row["plans"], *row["left_out"]))
    cells = [(label, *(cell(row["plans"].get(label)) for row in rows)) for label in labels]
    lines = [f"widest model within {resource.replace('_', ' ')}, and its parameters\n"]
    lines += [table(("structure", *(f"{row['budget']:g}" for row in rows)), cells)]
    # A reason that is the same at several budgets is shown once.
    return rows, [*lines, *dict.fromkeys(map(str, errors))]


def _check_any(plans: Sequence[Any], errors: Iterable[ValueError]) -> None:
    """Raise ValueError if there is no plan, about the structure that is nearest to the budget."""
    from structlin.planning import BudgetError

    if plans:
        return
    different = {str(error): error for error in errors}
    first, *others = different
    over = [error for error in different.values() if isinstance(error, BudgetError)]
    if not others:
        raise ValueError(first)
    if not over:  # no structure is too large for the budget
        raise ValueError(f"{first}; the other structures have no plan either")
    nearest = min(over, key=lambda error: error.least / error.budget)
    raise ValueError(f"none of the structures fits; the nearest: {nearest}")


def _usual(structure: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, and the rank and the number of blocks that a structure has by default."""
    import structlin

    known = structlin.structure_options(structure)
    names = [name for name in ("rank", "blocks") if name in known and "rank_fraction" not in options]
    return {name: "sqrt(d)" if known[name] is None else known[name] for name in names} | options


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
