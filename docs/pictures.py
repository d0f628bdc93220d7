"""Draw the pictures of the guide that are made from committed data and from the packages themselves.

    python docs/pictures.py NAME FILE

- ``efficiency``: efficiency by structure and size, a row for each processor, from benchmarks/results/;
- ``einsum-space``: rank, compute and weight sharing of two-factor einsums, and where the named structures lie;
- ``packages``: the layers of the packages, from the import rules in setup.cfg.

The build of the documentation calls the same functions (``{picture} NAME``), so the pictures are always up to date.
"""

from __future__ import annotations

import configparser
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from structlin.structures.einsum_space import Theta, coordinates
from structlin_nn.figures.style import STYLES, finish, new_figure, save, style

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = {"forward": "forward", "forward_backward": "forward + backward"}
SHORT = {"btt": "block_tensor_train", "tt": "tensor_train"}
OPTIONS = {"block_tensor_train": "rank", "tensor_train": "rank", "monarch": "blocks"}
LINES = ("-", "--", ":", "-.")
TOKENS = 1024

# Exponents (alpha, beta, gamma, delta, epsilon, phi, rho) of the named structures with the default factorisation.
NAMED = {
    "dense": (1, 0, 0, 1, 0, 0, 0),
    "low_rank": (1, 0, 0, 0, 1, 0, 0.5),
    "kronecker": (0.5, 0.5, 0, 0.5, 0.5, 0, 0),
    "tensor_train": (0.5, 0.5, 0, 0.5, 0.5, 0, 0.25),
    "monarch": (0.5, 0, 0.5, 0, 0.5, 0.5, 0),
    "block_tensor_train": (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25),
}


def measured() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of square layers on one thread with 1024 tokens, by processor and dtype.

    If several files have the same row, the row is that of tuned ways (``layers-ways``).
    """
    found: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*/layers*.json"), key=lambda path: ("ways" in path.stem, path)):
        result = json.loads(path.read_text(encoding="utf-8"))
        setting = result["setting"]
        if setting["device"] != "cpu" or setting["threads"] != 1 or setting.get("compiled"):
            continue
        for row in result["rows"]:
            if len(row["widths"]) == 2 and row["widths"][0] == row["widths"][1] and row["tokens"] == TOKENS:
                rows = found.setdefault((processor_of(result), setting["dtype"]), {})
                rows[row["structure"], row["widths"][0]] = row
    return {key: list(rows.values()) for key, rows in sorted(found.items())}


def processor_of(result: dict[str, Any]) -> str:
    """Return the name of a processor with family and model; results of early versions do not have these."""
    machine = result["machine"]
    processor = machine.get("processor") or {"name": machine["cpu"]}
    if "model" not in processor:
        return f"{processor['name']}, model not recorded"
    return f"{processor['name']} (family {processor['family']}, model {processor['model']})"


def dense_rates(rows: list[dict[str, Any]], kind: str) -> str:
    """Return the range of the rates of the dense layers of some rows, with two operations for each MAC."""
    products = 3 if kind == "forward_backward" else 1
    rates = [
        2 * products * row["widths"][0] * row["widths"][1] * row["tokens"] / row["dense"][f"{kind}_seconds"] / 1e9
        for row in rows
    ]
    low, high = round(min(rates)), round(max(rates))
    return f"dense at {low} GFLOP/s" if low == high else f"dense at {low} to {high} GFLOP/s"


def efficiency(path: Path) -> None:
    """Draw efficiency against width: a row for each processor and dtype, a line for each structure.

    Results with a single width are left out; the plots of the results show them.
    """
    panels = {key: rows for key, rows in measured().items() if len({row["widths"][0] for row in rows}) > 1}
    names = sorted({row["structure"] for rows in panels.values() for row in rows}, key=order)
    drawn = {name: appearance(name, names) for name in names}
    figure = new_figure(8.4, 2.3 * len(panels) + 0.9)
    grid = figure.subplots(len(panels), 2, sharex=True, sharey=True, squeeze=False)
    for line, ((processor, dtype), rows) in zip(grid, panels.items(), strict=True):
        for axes, (kind, title) in zip(line, KINDS.items(), strict=True):
            for name in names:
                points = sorted(
                    (row["widths"][0], row["implementations"]["structlin"][f"{kind}_efficiency"])
                    for row in rows
                    if row["structure"] == name
                )
                if points:
                    axes.plot(*zip(*points, strict=True), markersize=5, linewidth=1.4, **drawn[name])
            axes.axhline(1, color="0.35", linewidth=1)
            finish(axes, x="", y="", log_y=False)
            axes.set_title(f"{processor}, {dtype}\n{title}, 1 thread, {dense_rates(rows, kind)}", fontsize=8)
            axes.set_xticks(ticks := [256, 1024, 2304, 4096], [f"{tick}" for tick in ticks])
            axes.minorticks_off()
    grid[0, 0].set_ylim(0, None)
    for axes in grid[-1]:
        axes.set_xlabel("width d of the layer (d to d)", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("efficiency", fontsize=8)
    shown = [grid[0, 0].plot([], [], label=name_of(name), **drawn[name])[0] for name in names]
    figure.legend(handles=shown, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    save(figure, path)


def split_name(text: str) -> tuple[str, str]:
    """Return structure and option of a label of benchmarks/layers.py.

    Examples
    --------
    >>> split_name("btt_4"), split_name("low_rank")
    (('block_tensor_train', '4'), ('low_rank', ''))
    """
    head, _, number = text.rpartition("_")
    return (SHORT.get(head, head), number) if number.isdigit() else (text, "")


def order(text: str) -> tuple[int, int]:
    """Return the place of a label in a legend."""
    name, number = split_name(text)
    return list(STYLES).index(name), int(number or 0)


def name_of(text: str) -> str:
    """Return the label of a legend."""
    name, number = split_name(text)
    return style(name)[0] + (f", {OPTIONS[name]} {number}" if number else "")


def appearance(text: str, names: list[str]) -> dict[str, Any]:
    """Return colour and marker of a structure, and a line for each of its options."""
    name, _ = split_name(text)
    _, colour, marker = style(name)
    same = [other for other in names if split_name(other)[0] == name]
    return {"color": colour, "marker": marker, "linestyle": LINES[same.index(text) % len(LINES)]}


def thetas(step: float = 0.25) -> Iterator[Theta]:
    """Yield a grid of the space: all exponents that are multiples of ``step``."""
    values = [n * step for n in range(round(1 / step) + 1)]
    splits = [s for s in itertools.product(values, repeat=3) if abs(sum(s) - 1) < 1e-9]
    for input_split, output_split, rho in itertools.product(splits, splits, values):
        yield Theta(*input_split, *output_split, rho)


def einsum_space(path: Path) -> None:
    """Draw rank and compute exponents of the space, with and without weight sharing, and the named structures."""
    points = {coordinates(theta) for theta in thetas()}
    figure = new_figure(8.4, 4.3)
    grid = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {False: "every weight is used once", True: "weights are shared"}
    for axes, (shares, title) in zip(grid, titles.items(), strict=True):
        here = {(p.psi, p.nu) for p in points if (p.omega > 1e-9) == shares}
        axes.axvspan(0.985, 1.1, color="0.94", lw=0)
        axes.axhline(1, color="0.35", linewidth=1)
        axes.plot(*zip(*sorted(here), strict=True), "o", color="0.78", markersize=4)
        for name, theta in NAMED.items():
            found = coordinates(theta)
            if (found.omega > 1e-9) == shares:
                mark(axes, name, found.psi, found.nu)
        axes.set_title(title, fontsize=10)
        finish(axes, x=r"rank exponent $\psi$:  rank $= d^{\psi}$", y="", log_x=False, log_y=False)
        axes.set_xlim(-0.06, 1.1)
        axes.set_ylim(-0.06, 2.1)
    grid[0].set_ylabel(r"compute exponent $\nu$:  MACs $= d^{1 + \nu}$")
    grid[0].text(0.02, 1.03, "a dense matrix", fontsize=8, color="0.35")
    grid[0].text(1.04, 1.9, "full rank", fontsize=8, color="0.35", rotation=90, ha="center", va="top")
    save(figure, path)


def mark(axes: Axes, name: str, x: float, y: float) -> None:
    """Mark a named structure and write its name next to it."""
    label, colour, marker = style(name)
    if name in ("low_rank",):
        label += r", $r = \sqrt{d}$"
    elif name in ("tensor_train", "block_tensor_train"):
        label += r", $r = d^{1/4}$"
    elif name == "monarch":
        label += r", $\sqrt{d}$ blocks;" + "\n" + r"Block Tensor-Train, $r = 1$"
    axes.plot([x], [y], marker, color=colour, markersize=9, zorder=3)
    axes.annotate(label, (x, y), (-9, -3), textcoords="offset points", fontsize=8, ha="right", va="top", color=colour)


def layers_of(contract: str) -> list[list[str]]:
    """Return the layers of a contract of setup.cfg, the uppermost first."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config[f"importlinter:contract:{contract}"]["layers"].splitlines()
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def packages(path: Path) -> None:
    """Draw the layers of both packages and of structlin.execution as stacks of boxes."""
    stacks = {
        "structlin_nn": ("#D55E00", layers_of("structlin_nn")),
        "structlin": ("#0072B2", layers_of("structlin")),
        "structlin.execution": ("#009E73", layers_of("execution")),
    }
    tallest = max(len(layers) for _, layers in stacks.values())
    figure = new_figure(11, 0.42 * tallest + 0.9)
    grid = figure.subplots(1, len(stacks), width_ratios=[1, 1, 1.25])
    for axes, (name, (colour, layers)) in zip(grid, stacks.items(), strict=True):
        for place, layer in enumerate(layers):
            box_row(axes, tallest - place, layer, colour)
        axes.set_title(name, fontsize=11, family="monospace", color=colour)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(tallest - max(len(v) for _, v in stacks.values()) + 0.4, tallest + 0.6)
        axes.set_axis_off()
    figure.supxlabel(
        "A module may import modules of lower layers. structlin does not import structlin_nn.",
        fontsize=9,
    )
    save(figure, path)


def box_row(axes: Axes, y: float, names: list[str], colour: str) -> None:
    """Draw the modules of one layer as boxes side by side, wider for longer names."""
    gap = 0.012
    sizes = [len(name) + 2 for name in names]
    scale = (1 - gap * (len(names) - 1)) / sum(sizes)
    x = 0.0
    for name, size in zip(names, sizes, strict=True):
        shape = FancyBboxPatch(
            (x, y - 0.38), size * scale, 0.76, boxstyle="round,pad=0,rounding_size=0.01", mutation_aspect=20,
            facecolor=colour, edgecolor=colour, alpha=0.16, linewidth=0.8,
        )  # fmt: skip
        axes.add_patch(shape)
        axes.text(x + size * scale / 2, y, name, fontsize=7.5, family="monospace", ha="center", va="center")
        x += size * scale + gap


PICTURES: dict[str, tuple[Callable[[Path], None], str]] = {
    "efficiency": (efficiency, "Efficiency by structure and width, a row for each processor and dtype"),
    "einsum-space": (einsum_space, "Compute exponent against rank exponent of two-factor einsums"),
    "packages": (packages, "The modules of the packages in layers"),
}
"""By name: the function that draws a picture, and its alternative text."""


if __name__ == "__main__":
    PICTURES[sys.argv[1]][0](Path(sys.argv[2]))
