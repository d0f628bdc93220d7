"""``structlin fit``: scaling laws of runs."""

from __future__ import annotations

import argparse
from typing import Any

from structlin_nn.cli._fit_sizes import OPTIONS, add_size_options, run_sizes
from structlin_nn.cli.common import add_choice, print_json, print_table, save_figure

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

RECORDS are run records, folders of run records, or tables (.jsonl, .json, .csv). The law is error = a C^-alpha. --floor
adds an irreducible error. The law is fitted to logarithms, and a bootstrap gives the intervals. "Less compute" is the
ratio of the compute of the reference to that of a group at equal error. The error is --at, or the lowest error that
both reach. The ratio is computed from the laws, and by interpolation between the points. Few points need --noise for
intervals. If all rows have the seconds of training, groups are also compared by time.

With --size and --data the law is L = E + A/N^alpha + B/D^beta. All groups are fitted together, and share the terms that
--shared names. --budget prints the best split of a compute budget. --approach 1 and 2 find it without a law.
"""
TIME = "training_seconds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", metavar="RECORDS", nargs="+", help="run records, folders of them, or tables")
    add_row_options(parser)
    law = parser.add_argument_group("the law")
    law.add_argument("--frontier", action="store_true", help="fit only the Pareto frontier of each group")
    law.add_argument(
        "--floor", nargs="?", const=True, default=False, type=float, metavar="E",
        help="add an irreducible error: fitted, or E if it is known",
    )  # fmt: skip
    add_choice(law, "--loss", LOSSES, "soft_l1")
    law.add_argument("--samples", type=int, default=1000, metavar="N", help="draws of the bootstrap (1000)")
    law.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (0)")
    add_choice(law, "--method", METHODS, about="of the bootstrap (parametric; in two sizes residuals)")
    law.add_argument("--noise", type=float, metavar="E", help="known standard deviation of an error")
    law.add_argument("--confidence", type=float, default=0.95, metavar="P", help="confidence of the intervals (0.95)")
    law.add_argument("--reference", metavar="GROUP", help="group to compare with (dense, if there is one)")
    law.add_argument("--at", type=float, metavar="E", help="error to compare at; also prints the compute for it")
    add_size_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="write a figure: .png, .svg or .pdf")


def add_row_options(parser: argparse.ArgumentParser, x: str = "training_macs", y: str = "test_error") -> None:
    """Add the options that select columns, groups and rows."""
    group = parser.add_argument_group("what is read")
    group.add_argument("--x", default=x, metavar="COLUMN", help="compute (%(default)s)")
    group.add_argument("--y", default=y, metavar="COLUMN", help="error (%(default)s)")
    group.add_argument("--group", default="structure", metavar="COLUMNS", help="one law each, with commas (structure)")
    group.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only rows with this value, repeatable"
    )
    group.add_argument("--all-evaluations", action="store_true", help="all evaluations of a run, not only its last")
    group.add_argument("--unfinished", action="store_true", help="take runs that have not ended")


def conditions_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the values that --where asks for, by column. Raises ValueError for what is no COLUMN=VALUE."""
    conditions = {}
    for text in arguments.where:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--where must be COLUMN=VALUE, got {text!r}")
        conditions[name] = value
    return conditions


def read_groups(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that the options ask for, by group. Raises OSError and ValueError as the reading does."""
    from structlin_nn.tables import group_rows, read_rows, select

    conditions = conditions_of(arguments)
    every = "all" if arguments.all_evaluations else "last"
    rows = select(read_rows(arguments.records, evaluations=every, unfinished=arguments.unfinished), conditions)
    return group_rows(rows, [name for name in arguments.group.split(",") if name])


def run(arguments: argparse.Namespace) -> int:
    from structlin_nn.laws import compare_laws, comparisons_record, fit_groups, laws_record

    if not 0 < arguments.confidence < 1:
        raise ValueError(f"--confidence must be between 0 and 1, got {arguments.confidence:g}")
    if (arguments.size is None) != (arguments.data is None):
        raise ValueError("--size and --data must be given together")
    if arguments.size is not None:
        if arguments.frontier or arguments.floor or arguments.noise is not None:
            raise ValueError("--frontier, --floor and --noise are options of laws in one size")
        arguments.all_evaluations |= arguments.approach == 1
        return run_sizes(arguments, read_groups(arguments))
    for name in OPTIONS:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is an option of laws in two sizes, with --size and --data")
    groups = read_groups(arguments)

    def fitted(x: str) -> tuple[dict[str, Any], dict[str, str]]:
        return fit_groups(
            groups, x, arguments.y, frontier=arguments.frontier, floor=arguments.floor, loss=arguments.loss,
            samples=arguments.samples, seed=arguments.seed, method=arguments.method or "parametric",
            noise=arguments.noise,
        )  # fmt: skip

    laws, left_out = fitted(arguments.x)
    if arguments.reference in left_out:
        raise ValueError(f"{arguments.reference} cannot be fitted: {left_out[arguments.reference]}")
    reference = arguments.reference or ("dense" if "dense" in laws and len(laws) > 1 else None)
    compared, timed = {}, {}
    if reference is not None:
        compared = compare_laws(laws, reference, error=arguments.at, confidence=arguments.confidence)
        if arguments.x != TIME and all(row.get(TIME) for rows in groups.values() for row in rows):
            try:
                by_time, without = fitted(TIME)
            except ValueError as error:
                by_time, without = {}, {"all groups": str(error)}
            left_out |= {f"{name} by time": reason for name, reason in without.items()}
            if reference in by_time:
                timed = compare_laws(by_time, reference, error=arguments.at, confidence=arguments.confidence)
    if arguments.plot:
        from structlin_nn.figures.compute import compute_figure

        drawn = compute_figure(laws, x=arguments.x, y=arguments.y, confidence=arguments.confidence)
        save_figure(drawn, arguments.plot)
    if arguments.json:
        record = laws_record(
            laws, arguments.x, arguments.y, reference=reference, error=arguments.at, confidence=arguments.confidence
        )
        record["left_out"] = left_out
        if timed:
            record["comparisons_by_time"] = comparisons_record(timed)
        print_json(record)
        return 0
    _print(laws, compared, timed, reference, arguments, left_out)
    return 0


def _print(
    laws: Any, compared: Any, timed: Any, reference: str | None, arguments: argparse.Namespace,
    left_out: dict[str, str],
) -> None:  # fmt: skip
    percent = f"{100 * arguments.confidence:g} %"
    floor = "fitted" if arguments.floor is True else f"{arguments.floor:g}" if arguments.floor else "none"
    print(f"{arguments.y} = a C^-alpha, C = {arguments.x}, irreducible error {floor}; intervals of {percent}\n")
    rows = []
    for name, law in laws.items():
        fit = law.fit
        points = str(law.points) if law.used == law.points else f"{law.used} of {law.points}"
        interval = _interval(law.bootstrap.exponent(arguments.confidence)) if law.bootstrap else "-"
        floors = [f"{fit.law.floor:.4g}"] if arguments.floor else []
        rows.append(
            (name, points, f"{fit.law.exponent:.4f}", interval, f"{fit.law.coefficient:.4g}", *floors,
             f"{fit.r_squared:.4f}")
        )  # fmt: skip
    print_table(("group", "points", "alpha", "interval", "a", *(["floor"] if arguments.floor else []), "R2"), rows)
    for name, law in laws.items():
        for note in law.fit.notes:
            print(f"warning: {name}: {note}")
    for name, reason in left_out.items():
        print(f"not fitted: {name}: {reason}")
    for found, what, by in ((compared, "compute", ""), (timed, "time", ", by the seconds of training")):
        if found:
            print(f"\nagainst {reference}{by}\n")
            head = ("group", "alpha", "interval", "at error", f"less {what} (law)", "interval", "(points)", "interval")
            print_table(head, [_compared(name, row) for name, row in found.items()])
            for name, row in found.items():
                for note in row["notes"]:
                    print(f"{name}: {note}")
    if arguments.at is not None:
        print(f"\ncompute for an error of {arguments.at:g}\n")
        rows = []
        for name, law in laws.items():
            falls = law.fit.law.exponent > 0
            needed = law.bootstrap.compute(arguments.at, arguments.confidence) if falls and law.bootstrap else None
            value = law.fit.law.compute(arguments.at) if falls else float("inf")
            rows.append((value, (name, f"{value:.4g}", _interval(needed) if needed else "-")))
        print_table(("group", arguments.x, "interval"), [row for _, row in sorted(rows, key=lambda r: r[0])])
    if arguments.plot:
        print(f"\nfigure {arguments.plot}")


def _compared(name: str, row: Any) -> tuple[str, ...]:
    difference, multiplier, points = row["exponent_difference"], row["multiplier"], row["interpolated"]
    either = multiplier or points
    return (
        name,
        f"{difference.value:+.4f}" if difference else "-",
        _interval(difference) if difference else "-",
        f"{either.error:.4g}" if either else "-",
        f"{multiplier.value:.3g} x" + (" extrapolated" if multiplier.extrapolated else "") if multiplier else "-",
        _interval(multiplier) if multiplier else "-",
        f"{points.value:.3g} x" if points else "-",
        _interval(points) if points and points.low == points.low else "-",
    )


def _interval(value: Any) -> str:
    return f"[{value.low:.4g}, {value.high:.4g}]"
