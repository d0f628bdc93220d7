"""The part of ``structlin fit`` that fits laws in two sizes."""

from __future__ import annotations

import argparse
import math
from typing import Any

from structlin_nn.cli.common import print_json, print_table, save_figure

OPTIONS = ("shared", "flops", "budget", "approach", "tolerance", "delta")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("laws in two sizes, L = E + A/N^alpha + B/D^beta")
    group.add_argument("--size", metavar="COLUMN", help="N, the size of the model; with --data")
    group.add_argument("--data", metavar="COLUMN", help="D, the size of the data; with --size")
    group.add_argument("--shared", metavar="TERMS", help="terms that all groups share, with commas, or none (E,B,beta)")
    group.add_argument("--flops", type=float, metavar="K", help="training FLOPs for each unit of N and D (6)")
    group.add_argument(
        "--budget", type=float, action="append", metavar="FLOPS",
        help="print the best split of it, repeatable; the budgets of approach 2",
    )  # fmt: skip
    group.add_argument(
        "--approach", type=int, choices=(1, 2, 3), metavar="N",
        help="of Hoffmann et al. 2022: 1 envelope of the curves, 2 iso-FLOP parabolas, 3 the law (3)",
    )  # fmt: skip
    group.add_argument("--tolerance", type=float, metavar="T", help="of the budgets of approach 2 (0.1)")
    group.add_argument("--delta", type=float, metavar="D", help="of the Huber loss (0.001)")


def run_sizes(arguments: argparse.Namespace, groups: dict[str, Any]) -> int:
    """Fit, print and draw."""
    flops = 6.0 if arguments.flops is None else arguments.flops
    for name, values in (("--flops", [flops]), ("--budget", arguments.budget or [])):
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value:g}")
    if arguments.approach in (1, 2):
        return _allocation(arguments, groups, flops)
    return _law(arguments, groups, flops)


def _law(arguments: argparse.Namespace, groups: dict[str, Any], flops: float) -> int:
    from structlin.scaling_laws import TERMS
    from structlin_nn.size_laws import SHARED, fit_sizes, multipliers, sizes_record

    if arguments.tolerance is not None:
        raise ValueError("--tolerance is an option of --approach 2")
    shared = SHARED
    if arguments.shared is not None:
        shared = () if arguments.shared == "none" else tuple(arguments.shared.split(","))
    method = "residuals" if arguments.method is None else arguments.method
    drawn, left_out = fit_sizes(
        groups, arguments.size, arguments.data, arguments.y, shared=shared, samples=arguments.samples,
        delta=1e-3 if arguments.delta is None else arguments.delta, seed=arguments.seed, method=method,
    )  # fmt: skip
    fit = drawn.fit
    reference = arguments.reference or ("dense" if "dense" in fit.laws and len(fit.laws) > 1 else None)
    common: dict[str, Any] = {"flops": flops, "confidence": arguments.confidence}
    budgets = arguments.budget or []
    record = sizes_record(
        drawn, left_out, columns=(arguments.size, arguments.data, arguments.y), budgets=budgets, reference=reference,
        loss=arguments.at, **common,
    )  # fmt: skip
    if arguments.plot:
        from structlin_nn.figures.compute import sizes_figure

        drawing = sizes_figure(drawn, size=arguments.size, y=arguments.y, budgets=budgets or None, **common)
        save_figure(drawing, arguments.plot)
    if arguments.json:
        print_json(record)
        return 0
    percent = f"{100 * arguments.confidence:g} %"
    print(
        f"{arguments.y} = E + A/N^alpha + B/D^beta, N = {arguments.size}, D = {arguments.data}; "
        f"shared: {', '.join(fit.shared) or 'nothing'}; intervals of {percent}\n"
    )
    rows = []
    for number, name in enumerate(fit.laws):
        values = [drawn.term(term, name, arguments.confidence) for term in TERMS]
        values.append(drawn.allocation(name, arguments.confidence))
        rows.append((name, str(int((fit.group == number).sum())), *(_interval(v) for v in values)))
    print_table(("group", "points", *TERMS, "a of N_opt ~ C^a"), rows)
    print(f"\n{100 * fit.agreement:.0f} % of the starts end at this minimum")
    for note in fit.notes:
        print(f"warning: {note}")
    _print_left_out(left_out)
    if budgets:
        print(f"\nthe best split of a budget, {flops:g} FLOPs for each unit of N and D\n")
        rows = []
        for name in fit.laws:
            for budget in budgets:
                best = drawn.optimum(budget, name, **common)
                rows.append((name, f"{budget:.3g}", *(_interval(best[k]) for k in ("params", "tokens", "loss"))))
        print_table(("group", "FLOPs", arguments.size, arguments.data, arguments.y), rows)
    if reference is not None:
        print(f"\nagainst {reference}, each at its best split\n")
        found = multipliers(drawn, reference, loss=arguments.at, **common)
        rows = [
            (name, f"{at:.4g}", f"{v.value:.3g} x", f"[{v.low:.3g}, {v.high:.3g}]") for name, (at, v) in found.items()
        ]
        print_table(("group", f"at {arguments.y}", "less compute", "interval"), rows)
    if arguments.plot:
        print(f"\nfigure {arguments.plot}")
    return 0


def _allocation(arguments: argparse.Namespace, groups: dict[str, Any], flops: float) -> int:
    from structlin.scaling_laws import IsoFlop
    from structlin_nn.size_laws import allocations

    for name in ("shared", "delta", "reference", "plot", "at", "method"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is an option of --approach 3")
    if arguments.approach == 1 and arguments.tolerance is not None:
        raise ValueError("--tolerance is an option of --approach 2")
    found, left_out = allocations(
        groups, arguments.size, arguments.data, arguments.y, approach=arguments.approach, flops=flops,
        budgets=arguments.budget if arguments.approach == 2 else None,
        tolerance=0.1 if arguments.tolerance is None else arguments.tolerance,
    )  # fmt: skip
    rows, points = [], []
    record: dict[str, Any] = {"approach": arguments.approach, "flops": flops, "left_out": left_out, "groups": {}}
    for name, each in found.items():
        law = each.allocation
        interval = law.interval(arguments.confidence)
        known = not math.isnan(interval.low)
        at = [(b, *law.optimum(b)) for b in arguments.budget or []]
        if isinstance(each, IsoFlop):
            own = [{"compute": p.compute, "params": p.best[0], "loss": p.best[1]} for p in each.parabolas]
            without = {f"{budget:.4g}": reason for budget, reason in each.left_out.items()}
        else:
            own = [{"compute": float(c), "params": float(n)} for c, n in zip(each.compute, each.params, strict=True)]
            without = {}
        record["groups"][name] = {
            "exponent": {"value": interval.value, "low": interval.low if known else None,
                         "high": interval.high if known else None},
            "log_coefficient": law.log_coefficient, "minima": own, "left_out": without,
            "optima": [{"compute": b, "params": n, "tokens": d} for b, n, d in at],
        }  # fmt: skip
        rows.append((name, str(len(law.compute)), _interval(interval) if known else f"{interval.value:.4g}"))
        points += [
            (name, f"{p['compute']:.4g}", f"{p['params']:.4g}", f"{p['loss']:.4g}" if "loss" in p else "-") for p in own
        ]
        points += [(name, budget, "-", reason) for budget, reason in without.items()]
    if arguments.json:
        print_json(record)
        return 0
    what = "envelope of the curves" if arguments.approach == 1 else "iso-FLOP parabolas"
    print(f"{what}: N_opt ~ C^a, N = {arguments.size}, D = {arguments.data}\n")
    print_table(("group", "budgets" if arguments.approach == 2 else "runs", "a"), rows)
    print()
    print_table(("group", "FLOPs", arguments.size, arguments.y), points)
    if arguments.budget:
        print("\nthe best split of a budget\n")
        best = [
            (name, f"{o['compute']:.3g}", f"{o['params']:.4g}", f"{o['tokens']:.4g}")
            for name, row in record["groups"].items()
            for o in row["optima"]
        ]
        print_table(("group", "FLOPs", arguments.size, arguments.data), best)
    _print_left_out(left_out)
    return 0


def _print_left_out(left_out: dict[str, str]) -> None:
    for name, reason in left_out.items():
        print(f"not fitted: {name}: {reason}")


def _interval(value: Any) -> str:
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
