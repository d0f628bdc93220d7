"""Figures of error against compute: fitted laws, training curves, laws in two sizes, reports, and the demonstration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from structlin.scaling_laws import FLOPS, LossBootstrap
from structlin_nn.figures.style import Series, finish, label, legend, new_figure, series, style
from structlin_nn.laws import GroupLaw
from structlin_nn.tables import Row, by_run, column

__all__ = ["compute_figure", "curves_figure", "demo_figure", "plain_ticks", "sizes_figure", "spent_figure"]


def compute_figure(laws: Mapping[str, GroupLaw], *, x: str, y: str, confidence: float = 0.95) -> Figure:
    """Draw points with their laws on logarithmic axes, and a bar for each exponent, with its interval.

    `laws` are those of :func:`structlin_nn.laws.fit_groups`, of the columns ``x`` and ``y``. `confidence` is that of
    the shaded bands and of the intervals.
    """
    figure, styles = new_figure(8.6, 4.4), series(laws)
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _bars(right, laws, styles, confidence)
    for name, law in laws.items():
        _law(left, law, styles[name], confidence)
    finish(left, x=label(x), y=label(y))
    # Limits by the points: the band of few points can be far wider.
    errors = np.concatenate([law.fit.error for law in laws.values()])
    room = max((errors.max() / errors.min()) ** 0.08, 1.02)
    left.set_ylim(errors.min() / room, errors.max() * room)
    plain_ticks(left)
    legend(figure, left, 4)
    return figure


def _law(axes: Axes, law: GroupLaw, style: Series, confidence: float) -> None:
    fit = law.fit
    grid = np.geomspace(fit.compute.min(), fit.compute.max(), 60)
    if law.bootstrap is not None and len(fit.compute) > fit.free_parameters:
        band = [law.bootstrap.error(c, confidence) for c in grid]
        axes.fill_between(grid, [b.low for b in band], [b.high for b in band], color=style.colour, alpha=0.12, lw=0)
    axes.plot(grid, fit.law(grid), color=style.colour, linestyle=style.line, linewidth=1.4)
    axes.plot(fit.compute, fit.error, label=style.label, **style.points())


def _bars(axes: Axes, laws: Mapping[str, GroupLaw], styles: Mapping[str, Series], confidence: float) -> None:
    places = np.arange(len(laws))
    for place, (name, law) in zip(places, laws.items(), strict=True):
        value, style = law.fit.law.exponent, styles[name]
        axes.barh(place, value, color=style.colour if style.filled else "white", edgecolor=style.colour, height=0.7)
        end = value
        if law.bootstrap is not None:
            found = law.bootstrap.exponent(confidence)
            axes.plot([found.low, found.high], [place, place], color="0.45", linewidth=1.6, solid_capstyle="butt")
            end = max(end, found.high)
        axes.annotate(f"{value:.3f}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    finish(axes, x=r"exponent $\alpha$", y="", log_x=False, log_y=False)
    axes.set_yticks(places, [styles[name].label for name in laws], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    axes.margins(x=0.22)


def plain_ticks(axes: Axes) -> None:
    """Write ticks of a logarithmic vertical axis as numbers, also if it spans less than a decade."""
    low, high = axes.get_ylim()
    few = high / low < 8
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 2.5 else (1, 2, 3, 4, 6)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs if few else (1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def curves_figure(groups: Mapping[str, Sequence[Row]], *, x: str, y: str) -> Figure:
    """Draw the evaluations of runs against the spent compute, and the last ones against the cost of the model.

    On the left is a line for each run, in the colour of its group, darker for wider models. On the right are the last
    values, with a line through the means of runs of one cost (seeds). `groups` are all evaluations of runs by label,
    with ``record``, ``width``, ``forward_macs`` and the columns ``x`` (evaluations at 0 are left out) and ``y``;
    ValueError for missing columns.
    """
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1), sharey=True)
    styles = series(groups)
    ends: list[float] = []
    starts: list[float] = []
    for name, rows in groups.items():
        runs = by_run([row for row, cost in zip(rows, column(rows, x), strict=True) if cost > 0])
        if not runs:
            raise ValueError(f"{name} has no evaluation after the start of a run")
        ends += _curves(left, runs, styles[name], x, y)
        starts += [max(column(lines, y)) for lines in runs]
        _ends(right, [lines[-1] for lines in runs], styles[name], y)
    finish(left, x=label(x), y=label(y))
    finish(right, x=label("forward_macs"), y="")
    least, most = right.get_xlim()
    if most < 16 * least:  # models of almost one cost stand close together, and ticks have room
        middle = (least * most) ** 0.5
        right.set_xlim(middle / 4, middle * 4)
        right.xaxis.set_minor_formatter(NullFormatter())
    # Curves may start far above their ends: the panel shows at most twice the range of the ends.
    low, high = min(ends), max(ends)
    room = max(high / low, 1.15)
    left.set_ylim(low / room**0.12, min(high * room, max(starts) * 1.05))
    plain_ticks(left)
    legend(figure, right, 4)
    return figure


def _curves(axes: Axes, runs: Sequence[Sequence[Row]], style: Series, x: str, y: str) -> list[float]:
    of_run = column([lines[0] for lines in runs], "width")
    widths = sorted(set(of_run))
    ends = []
    for lines, width in zip(runs, of_run, strict=True):
        # Narrow models are light, and the widest has the full colour.
        share = (widths.index(width) + 1) / len(widths)
        colour = tuple(1 - (1 - c) * (0.35 + 0.65 * share) for c in to_rgb(style.colour))
        values = column(lines, y)
        # A single evaluation is a point.
        marker = style.marker if len(lines) == 1 else ""
        axes.plot(column(lines, x), values, color=colour, linestyle=style.line, linewidth=1.2, marker=marker)
        ends.append(values[-1])
    return ends


def _ends(axes: Axes, lines: Sequence[Row], style: Series, y: str) -> None:
    points: dict[float, list[float]] = {}
    for cost, error in zip(column(lines, "forward_macs"), column(lines, y), strict=True):
        points.setdefault(cost, []).append(error)
    costs = sorted(points)
    means = [float(np.mean(points[c])) for c in costs]
    axes.plot(costs, means, linewidth=1.5, label=style.label, **style.points(line=style.line))


def sizes_figure(
    drawn: LossBootstrap,
    *,
    size: str = "params",
    y: str = "loss",
    budgets: Sequence[float] | None = None,
    flops: float = FLOPS,
    confidence: float = 0.95,
) -> Figure:
    """Draw the loss against compute, and the best split of the compute.

    Left are the runs and the lowest loss of the law, with its band. Right is, for one group, the law at equal compute:
    loss against N, a curve for each budget, with the runs near it and a star at its minimum. For several groups it is
    the best N of each budget, with its band.

    Parameters
    ----------
    drawn, size, y
        Laws with intervals (:func:`structlin_nn.laws.fit_sizes`), and the columns of N and of the loss, for the
        axes.
    budgets
        Budgets of the curves at equal compute; None: six over the range of the runs.
    flops, confidence
        FLOPs of training for each unit of N and of D, and confidence of the bands.
    """
    fit = drawn.fit
    compute = flops * fit.params * fit.tokens
    if budgets is None:
        budgets = list(np.geomspace(compute.min(), compute.max(), 8)[1:-1])
    figure = new_figure(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    styles = series(fit.laws)
    grid = np.geomspace(min(compute.min(), *budgets), max(compute.max(), *budgets), 50)
    for number, name in enumerate(fit.laws):
        own, style = fit.group == number, styles[name]
        best = [drawn.optimum(float(c), name, flops=flops, confidence=confidence) for c in grid]
        left.plot(compute[own], fit.loss[own], alpha=0.45, markeredgewidth=0.8, **style.points(4))
        for axes, key in ((left, "loss"), (right, "params"))[: 1 if len(fit.laws) == 1 else 2]:
            low, high = ([getattr(b[key], end) for b in best] for end in ("low", "high"))
            axes.fill_between(grid, low, high, color=style.colour, alpha=0.15, lw=0)
            axes.plot(
                grid, [b[key].value for b in best], color=style.colour, linestyle=style.line, linewidth=1.6,
                label=style.label,
            )  # fmt: skip
    finish(left, x="training compute (FLOPs)", y=label(y))
    plain_ticks(left)
    if len(fit.laws) == 1:
        _slices(right, drawn, compute, budgets, flops)
        finish(right, x=f"N, {label(size)}", y=label(y))
        plain_ticks(right)
        right.legend(title="FLOPs", frameon=False, fontsize=8)
    else:
        finish(right, x="training compute (FLOPs)", y=f"best N, {label(size)}")
        legend(figure, left, 4)
    return figure


def _slices(
    axes: Axes, drawn: LossBootstrap, compute: np.ndarray, budgets: Sequence[float], flops: float
) -> None:  # fmt: skip
    fit, law = drawn.fit, drawn.fit.law
    colours = colormaps["viridis"](np.linspace(0.05, 0.85, len(budgets)))
    for colour, budget in zip(colours, sorted(budgets), strict=True):
        best = law.optimum(budget, flops=flops)
        n = np.geomspace(best.params / 12, best.params * 12, 80)
        axes.plot(n, law(n, budget / (flops * n)), color=colour, linewidth=1.4, label=f"{budget:.1e}")
        axes.plot(best.params, best.loss, color=colour, marker="*", markersize=12, markeredgecolor="white")
        near = np.abs(np.log(compute / budget)) < 0.25
        # Points are moved along the law to the budget of the curve, to be compared with it.
        moved = fit.loss[near] * law(fit.params[near], budget / (flops * fit.params[near]))
        moved = moved / law(fit.params[near], fit.tokens[near])
        axes.plot(fit.params[near], moved, color=colour, marker="o", markersize=3.5, linestyle="", alpha=0.6)
    low, high = min(law.optimum(b, flops=flops).loss for b in budgets), float(fit.loss.max())
    axes.set_ylim(low * 0.97, min(high, 1.9 * low))


def spent_figure(runs: Sequence[Any]) -> Figure:
    """Left, FLOPs spent against FLOPs planned, with the line of equality; right, FLOPs a second against parameters.

    Parameters
    ----------
    runs
        Those without a plan, or without times, are left out of the panel that needs them.
    """
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    styles = series(dict.fromkeys(run.group for run in runs))
    for name, own_style in styles.items():
        own = [run for run in runs if run.group == name]
        pairs = [(run.planned, run.spent) for run in own if run.planned and run.spent]
        left.plot([p for p, _ in pairs], [s for _, s in pairs], label=own_style.label, **own_style.points())
        rates = [(run.params, run.rate) for run in own if run.params and run.rate]
        right.plot([p for p, _ in rates], [r for _, r in rates], **own_style.points())
    ends = [value for run in runs for value in (run.planned, run.spent) if value]
    if ends:
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=1, zorder=0)
    finish(left, x="training FLOPs planned", y="training FLOPs spent")
    finish(right, x="parameters", y="FLOPs a second of training")
    legend(figure, left, 4)
    return figure


_DEMO_ERROR = "training error (%)"


def demo_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return the figure of the demonstration.

    Left: training error against training compute, a line for each structure, structure-aware learning rates. Middle:
    the same against the seconds of training. Right: for each structured network the training error with the naive and
    with the structure-aware learning rate. Training errors, as in the paper's scaling figures, are those on training
    images without augmentation.

    Parameters
    ----------
    rows
        As `structlin_nn.demo.row_of` gives them.
    """
    figure = new_figure(16, 4.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    structures = list(dict.fromkeys(row["structure"] for row in rows))
    _cost_panel(left, rows, structures, "training_macs")
    finish(left, x="training compute (multiply-accumulates)", y=_DEMO_ERROR, log_y=False)
    left.set_title("equal compute, structure-aware learning rates", fontsize=11, pad=26)
    left.legend(
        frameon=False, fontsize=9, ncols=len(structures), loc="lower center", bbox_to_anchor=(0.5, 0.995),
        handlelength=1.2, columnspacing=0.9, handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip
    _cost_panel(middle, rows, structures, "training_seconds")
    finish(middle, x="seconds of training on one core of this machine", y=_DEMO_ERROR, log_y=False)
    # A decade or less: numbers without powers of ten.
    middle.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    middle.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    middle.xaxis.set_minor_formatter(NullFormatter())
    middle.set_title("the same networks by time", fontsize=11, pad=26)
    _rule_panel(right, rows, [name for name in structures if name != "dense"])
    return figure


def _cost_panel(axes: Axes, rows: Sequence[dict[str, Any]], structures: Sequence[str], cost: str) -> None:
    for name in structures:
        label, colour, marker = style(name)
        chosen = [row for row in rows if row["structure"] == name and row["learning_rate"] != "naive"]
        chosen.sort(key=lambda row: row["training_macs"])
        x = [row[cost] for row in chosen]
        y = [100 * row["train_error"] for row in chosen]
        axes.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.8, label=label)


def _rule_panel(axes: Axes, rows: Sequence[dict[str, Any]], structures: Sequence[str]) -> None:
    ticks: list[int] = []
    labels: list[str] = []
    for name in structures:
        label, colour, marker = style(name)
        own = [row for row in rows if row["structure"] == name]
        widths = sorted({row["width"] for row in own})
        start = ticks[-1] + 2 if ticks else 0
        for x, width in enumerate(widths, start):
            errors = {row["learning_rate"]: 100 * row["train_error"] for row in own if row["width"] == width}
            axes.annotate(
                "", (x, errors["aware"]), (x, errors["naive"]),
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.5, "shrinkA": 4, "shrinkB": 4},
            )  # fmt: skip
            axes.plot(x, errors["naive"], marker=marker, color=colour, markerfacecolor="white", markersize=8)
            axes.plot(x, errors["aware"], marker=marker, color=colour, markersize=8)
            ticks.append(x)
            labels.append(str(width))
        middle = start + (len(widths) - 1) / 2
        place = axes.get_xaxis_transform()
        axes.text(middle, 1.015, label, color=colour, ha="center", va="bottom", fontsize=10, transform=place)
    finish(axes, x="width of the network", y=_DEMO_ERROR, log_x=False, log_y=False)
    axes.grid(False, axis="x")
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_title("effect of the learning-rate rule", fontsize=11, pad=26)
    axes.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=8, label="naive")
    axes.plot([], [], "o", color="0.4", markersize=8, label="structure-aware")
    axes.legend(frameon=False, loc="upper left", fontsize=10)
    axes.margins(y=0.12)
