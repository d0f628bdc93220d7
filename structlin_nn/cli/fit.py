"""``structlin fit``: scaling laws of runs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from structlin_nn._text import table
from structlin_nn.cli.common import add, check_confidence, given, name_and_value, show

HELP = "fit scaling laws to run records or tables, with intervals, and compare them at equal error"
LOSSES = ("soft_l1", "linear")
METHODS = ("parametric", "residuals", "cases")
EXAMPLES = """\
examples:
  structlin fit runs/*/record.jsonl
  structlin fit runs --group structure,rank --y train_error --floor --plot laws.svg
  structlin fit points.csv --x macs --y error --reference dense --at 0.3 --json
  structlin fit runs --size params --data tokens --y val_loss --budget 1e21
  structlin fit runs --size params --data tokens --y val_loss --approach 2

RECORDS are run records, folders of run records, or tables (.jsonl, .json, .csv). Failed runs of a sweep are left out,
with a line on stderr for each, unless --unfinished takes them. The law is error = a C^-alpha. --floor adds an
irreducible error. The law is fitted to logarithms, and a bootstrap gives the intervals. "Less compute" is the ratio of
the compute of the reference to that of a group at equal error. The error is --at, or the lowest error that both reach.
The ratio is computed from the laws, and by interpolation between the points. Few points need --noise for intervals. If
all rows have the seconds of training, groups are also compared by time.

With --size and --data the law is L = E + A/N^alpha + B/D^beta. All groups are fitted together, and share the terms that
--shared names. --budget prints the best split of a compute budget. --approach 1 and 2 find it without a law.
"""
OF_TWO_SIZES = ("shared", "flops", "budget", "approach")
OF_APPROACH_3 = ("shared", "reference", "plot", "at", "method")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rows(parser, "training_macs", "test_error")
    law = parser.add_argument_group("the law")
    add(law, "--frontier", "fit only the Pareto frontier of each group")
    add_floor(law)
    add(law, "--loss NAME", default="soft_l1", among=LOSSES)
    add(law, "--samples N", "draws of the bootstrap", 1000)
    add(law, "--method NAME", "of the bootstrap (parametric; in two sizes residuals)", among=METHODS)
    add(law, "--noise E", "known standard deviation of an error", kind=float)
    add(law, "--confidence P", "confidence of the intervals", 0.95)
    add(law, "--reference GROUP", "group to compare with (dense, if there is one)")
    add(law, "--at E", "error to compare at; also prints the compute for it", kind=float)
    sizes = parser.add_argument_group("laws in two sizes, L = E + A/N^alpha + B/D^beta")
    add(sizes, "--size COLUMN", "N, the size of the model; with --data")
    add(sizes, "--data COLUMN", "D, the size of the data; with --size")
    add(sizes, "--shared TERMS", "terms that all groups share, with commas, or none (E,B,beta)")
    add(sizes, "--flops K", "training FLOPs for each unit of N and D (6)", kind=float)
    about = "print the best split of it, repeatable; the budgets of approach 2"
    add(sizes, "--budget FLOPS", about, kind=float, action="append")
    about = "of Hoffmann et al. 2022: 1 envelope of the curves, 2 iso-FLOP parabolas, 3 the law (3)"
    add(sizes, "--approach N", about, kind=int, choices=(1, 2, 3))
    add(parser, "--json", "print JSON instead of a table")
    add(parser, "--plot FILE", "write a figure: .png, .svg or .pdf")


def add_rows(parser: argparse.ArgumentParser, x: str | None = None, y: str | None = None) -> None:
    """Add the records, and the options that select columns, groups and rows."""
    add(parser, "RECORDS", "run records, folders of them, or tables", nargs="+")
    group = parser.add_argument_group("what is read")
    add(group, "--x COLUMN", "compute", x)
    add(group, "--y COLUMN", "error", y)
    add_selection(group)
    add(group, "--all-evaluations", "all evaluations of a run, not only its last")
    add(group, "--unfinished", "take runs that have not ended, and failed ones")


def add_selection(parser: Any) -> None:
    add(parser, "--group COLUMNS", "one law each, with commas", "structure")
    condition = partial(name_and_value, "COLUMN=VALUE")
    add(parser, "--where COLUMN=VALUE", "only rows with this value, repeatable", [], condition)


def add_floor(parser: Any) -> None:
    about = "add an irreducible error: fitted, or E if it is known"
    add(parser, "--floor E", about, False, float, nargs="?", const=True)


def read_groups(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that the options ask for, by group. Raises OSError and ValueError as the reading does.

    Failed runs are left out, with a line each on stderr, unless the options ask for unfinished runs.
    """
    from structlin_nn.tables import failed_runs, group_rows, read_rows, record_paths, select

    every = "all" if arguments.all_evaluations else "last"
    paths = record_paths(arguments.records)
    failed = {} if arguments.unfinished else failed_runs(paths)
    for path, reason in failed.items():
        print(f"left out, since the run failed: {path.parent}: {' '.join(reason.split())}", file=sys.stderr)
    if failed and len(failed) == len(paths):
        raise ValueError(f"all runs failed in {', '.join(arguments.records)}; --unfinished takes them as they are")
    rows = read_rows([path for path in paths if path not in failed], evaluations=every, unfinished=arguments.unfinished)
    rows = select(rows, dict(arguments.where))
    return group_rows(rows, [name for name in arguments.group.split(",") if name])


def run(arguments: argparse.Namespace) -> None:
    check_confidence(arguments.confidence)
    if (arguments.size is None) != (arguments.data is None):
        raise ValueError("--size and --data must be given together")
    if arguments.size is None:
        _refuse(arguments, OF_TWO_SIZES, "laws in two sizes, with --size and --data")
    elif given(arguments, ("frontier", "floor", "noise")):
        raise ValueError("--frontier, --floor and --noise are options of laws in one size")
    arguments.flops = 6.0 if arguments.flops is None else arguments.flops
    for name, values in (("--flops", [arguments.flops]), ("--budget", arguments.budget or [])):
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value:g}")
    if arguments.approach in (1, 2):
        _refuse(arguments, OF_APPROACH_3, "--approach 3")
    arguments.all_evaluations |= arguments.approach == 1
    fit = _one_size if arguments.size is None else _allocation if arguments.approach in (1, 2) else _two_sizes
    record, lines, draw = fit(arguments, read_groups(arguments))
    if arguments.plot:
        from structlin_nn.figures.style import save

        save(draw(), Path(arguments.plot))
        lines.append(f"\nfigure {arguments.plot}")
    show(arguments, record, "\n".join(lines))


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is an option of {what}")


Fitted = tuple[dict[str, Any], list[str], Callable[[], Any]]
"""The record, the lines of the text, and a function that draws the figure."""


def _one_size(arguments: argparse.Namespace, groups: dict[str, Any]) -> Fitted:
    from structlin_nn import laws

    fitted, record = laws.fitted_record(
        groups, arguments.x, arguments.y, reference=arguments.reference, error=arguments.at,
        confidence=arguments.confidence, frontier=arguments.frontier, floor=arguments.floor, loss=arguments.loss,
        samples=arguments.samples, method=arguments.method or "parametric", noise=arguments.noise,
    )  # fmt: skip
    percent = f"{100 * arguments.confidence:g} %"
    floor = "fitted" if arguments.floor is True else f"{arguments.floor:g}" if arguments.floor else "none"
    lines = [f"{arguments.y} = a C^-alpha, C = {arguments.x}, irreducible error {floor}; intervals of {percent}\n"]
    lines.append(table(*laws.laws_table(record, bool(arguments.floor))))
    lines += [f"warning: {name}: {note}" for name, law in record["groups"].items() for note in law["notes"]]
    lines += _left_out(record)
    for key, what, by in (
        ("comparisons", "compute", ""),
        ("comparisons_by_time", "time", ", by the seconds of training"),
    ):
        if found := record.get(key):
            lines += [f"\nagainst {record['reference']}{by}\n", table(*laws.comparisons_table(found, what))]
            lines += [f"{name}: {note}" for name, row in found.items() for note in row["notes"]]
    if arguments.at is not None:
        needed = {name: law.get("compute_at_error", {"value": "inf"}) for name, law in record["groups"].items()}
        names = sorted(needed, key=lambda name: float(needed[name]["value"]))
        rows = [(name, laws.value_text(needed[name]), laws.interval_text(needed[name])) for name in names]
        lines += [f"\ncompute for an error of {arguments.at:g}\n", table(("group", arguments.x, "interval"), rows)]

    def draw() -> Any:
        from structlin_nn.figures.compute import compute_figure

        return compute_figure(fitted, x=arguments.x, y=arguments.y, confidence=arguments.confidence)

    return record, lines, draw


def _two_sizes(arguments: argparse.Namespace, groups: dict[str, Any]) -> Fitted:
    from structlin_nn import laws

    shared = laws.SHARED
    if arguments.shared is not None:
        shared = () if arguments.shared == "none" else tuple(arguments.shared.split(","))
    columns = (arguments.size, arguments.data, arguments.y)
    method = arguments.method or "residuals"
    drawn, left_out = laws.fit_sizes(groups, *columns, shared=shared, samples=arguments.samples, method=method)
    budgets = arguments.budget or []
    reference = arguments.reference or laws.default_reference(drawn.fit.laws)
    common: dict[str, Any] = {"flops": arguments.flops, "confidence": arguments.confidence}
    record = laws.sizes_record(
        drawn, left_out, columns=columns, budgets=budgets, reference=reference, loss=arguments.at, **common
    )
    lines = [
        f"{arguments.y} = E + A/N^alpha + B/D^beta, N = {arguments.size}, D = {arguments.data}; shared: "
        f"{', '.join(record['shared']) or 'nothing'}; intervals of {100 * arguments.confidence:g} %\n",
        table(*laws.sizes_table(record)),
        f"\n{100 * record['agreement']:.0f} % of the starts end at this minimum",
        *(f"warning: {note}" for note in record["notes"]),
        *_left_out(record),
    ]
    if budgets:
        lines.append(f"\nthe best split of a budget, {arguments.flops:g} FLOPs for each unit of N and D\n")
        rows = [
            (name, f"{best['compute']:.3g}", *(laws.estimate_text(best[key]) for key in ("params", "tokens", "loss")))
            for name, law in record["groups"].items()
            for best in law["optima"]
        ]
        lines.append(table(("group", "FLOPs", *columns), rows))
    if reference is not None:
        lines += [f"\nagainst {reference}, each at its best split\n", table(*laws.multipliers_table(record))]

    def draw() -> Any:
        from structlin_nn.figures.compute import sizes_figure

        return sizes_figure(drawn, size=arguments.size, y=arguments.y, budgets=budgets or None, **common)

    return record, lines, draw


def _allocation(arguments: argparse.Namespace, groups: dict[str, Any]) -> Fitted:
    from structlin.scaling_laws import IsoFlop
    from structlin_nn import laws

    approach, budgets = arguments.approach, arguments.budget or []
    found, left_out = laws.allocations(
        groups, arguments.size, arguments.data, arguments.y, approach=approach, flops=arguments.flops,
        budgets=arguments.budget if approach == 2 else None,
    )  # fmt: skip
    rows, points, best = [], [], []
    record: dict[str, Any] = {"approach": approach, "flops": arguments.flops, "left_out": left_out, "groups": {}}
    for name, each in found.items():
        law, without = each.allocation, {}
        if isinstance(each, IsoFlop):
            own = [{"compute": p.compute, "params": p.best[0], "loss": p.best[1]} for p in each.parabolas]
            without = {f"{budget:.4g}": reason for budget, reason in each.left_out.items()}
        else:
            own = [{"compute": float(c), "params": float(n)} for c, n in zip(each.compute, each.params, strict=True)]
        optima = [dict(zip(("compute", "params", "tokens"), (b, *law.optimum(b)), strict=True)) for b in budgets]
        interval = law.interval(arguments.confidence)
        exponent = {key: laws.plain(getattr(interval, key)) for key in ("value", "low", "high")}
        record["groups"][name] = {
            "exponent": exponent, "log_coefficient": law.log_coefficient, "minima": own, "left_out": without,
            "optima": optima,
        }  # fmt: skip
        rows.append((name, str(len(law.compute)), laws.estimate_text(exponent)))
        points += [(name, *(f"{p[k]:.4g}" if k in p else "-" for k in ("compute", "params", "loss"))) for p in own]
        points += [(name, budget, "-", reason) for budget, reason in without.items()]
        best += [(name, f"{o['compute']:.3g}", f"{o['params']:.4g}", f"{o['tokens']:.4g}") for o in optima]
    what = "envelope of the curves" if approach == 1 else "iso-FLOP parabolas"
    lines = [
        f"{what}: N_opt ~ C^a, N = {arguments.size}, D = {arguments.data}\n",
        table(("group", "budgets" if approach == 2 else "runs", "a"), rows),
        "",
        table(("group", "FLOPs", arguments.size, arguments.y), points),
    ]
    if budgets:
        head = ("group", "FLOPs", arguments.size, arguments.data)
        lines += ["\nthe best split of a budget\n", table(head, best)]
    return record, [*lines, *_left_out(record)], lambda: None


def _left_out(record: dict[str, Any]) -> list[str]:
    return [f"not fitted: {name}: {reason}" for name, reason in record["left_out"].items()]
