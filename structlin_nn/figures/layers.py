"""Layers of trained networks: their gains, from run records, and their spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from structlin_nn.figures.compute import plain_ticks
from structlin_nn.figures.style import finish, new_figure, series
from structlin_nn.tables import Row, column

if TYPE_CHECKING:
    from torch import nn

__all__ = ["gains_figure", "layer_spectra", "spectrum_figure"]


def gains_figure(groups: Mapping[str, Sequence[Row]]) -> Figure:
    """Gain of every structured layer, RMS(A x) / RMS(x) on data, at the first evaluation and at the last.

    One line for each group, layers from input to output; open markers and dots for the first evaluation. Runs of a
    group count with their geometric mean. A layer that multiplies by 0 (zero-initialised) has no marker.

    Args:
        groups: all evaluations of runs by label, with ``record``, ``step`` and ``gains`` (a record's statistics).

    Raises:
        ValueError: rows without gains, or runs of a group with different layers.
    """
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    styles = series(groups)
    names: list[str] = []
    for name, rows in groups.items():
        runs: dict[str, list[Row]] = {}
        for row in rows:
            if not row.get("gains"):
                raise ValueError(f"{row.get('record', name)} has no gains of layers")
            runs.setdefault(str(row["record"]), []).append(row)
        for first, lines in ((True, [r[0] for r in runs.values()]), (False, [r[-1] for r in runs.values()])):
            layers = list(lines[0]["gains"])
            if any(list(row["gains"]) != layers for row in lines):
                raise ValueError(f"the runs of {name} have different layers")
            names += [layer for layer in layers if layer not in names]
            values = [_geometric([row["gains"][layer] for row in lines]) for layer in layers]
            style = styles[name]
            axes.plot(
                [names.index(layer) for layer in layers], values, color=style.colour, marker=style.marker, markersize=5,
                linestyle=":" if first else style.line, markerfacecolor="white" if first else style.colour,
                linewidth=1 if first else 1.5, label=None if first else style.label,
            )  # fmt: skip
    finish(axes, x="", y="gain RMS(A x) / RMS(x)", log_x=False)
    plain_ticks(axes)
    shown = range(0, len(names), max(1, len(names) // 24))
    axes.set_xticks(list(shown), [names[i] for i in shown], rotation=60, ha="right", fontsize=7)
    axes.plot([], [], color="0.4", linestyle=":", marker="o", markerfacecolor="white", markersize=5, label="at first")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _geometric(values: Sequence[float | None]) -> float:
    """NaN, which is not drawn, where a value is 0 or missing."""
    numbers = np.array([v if v else np.nan for v in values], dtype=float)
    return float(np.exp(np.log(numbers).mean()))


def spectrum_figure(groups: Mapping[str, Sequence[Row]]) -> Figure:
    """Singular values of layers, sorted, over those that a matrix of right scale has: of order 1 is right.

    A panel for each group, a line for each layer that is not 0, from early (dark) to late; the horizontal axis is the
    index over min(inputs, outputs).

    Args:
        groups: rows of :func:`layer_spectra` by label.

    Raises:
        ValueError: rows without ``singular_values``, ``in_features`` and ``out_features``.
    """
    figure = new_figure(1.2 + 3.6 * len(groups), 4.2)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    styles = series(groups)
    for axes, (name, rows) in zip(panels, groups.items(), strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(rows)))
        shapes = zip(column(rows, "in_features"), column(rows, "out_features"), strict=True)
        for colour, row, (d_in, d_out) in zip(colours, rows, shapes, strict=True):
            if not row.get("singular_values"):
                raise ValueError(f"a row of {name} has no singular_values")
            values = np.sort(np.array(row["singular_values"], dtype=float))[::-1] / np.sqrt(d_out / d_in)
            kept = values > 1e-6 * values[0]
            if not kept.any():
                continue  # a layer that starts at zero
            places = (np.arange(len(values)) + 1) / min(d_in, d_out)
            axes.plot(places[kept], values[kept], color=colour, linewidth=1.2, label=str(row.get("layer", "")))
        finish(axes, x="index / min(inputs, outputs)", y="", log_x=False)
        axes.set_title(styles[name].label, fontsize=10)
        axes.set_xlim(0, 1.02)
    panels[0].set_ylabel(r"singular value / $\sqrt{d_{out} / d_{in}}$")
    handles, labels = panels[0].get_legend_handles_labels()
    named = sorted({round(i) for i in np.linspace(0, len(handles) - 1, min(len(handles), 18))})
    figure.legend(
        [handles[i] for i in named], [labels[i] for i in named], loc="outside right upper", frameon=False, fontsize=7
    )
    return figure


def layer_spectra(model: nn.Module, **labels: Any) -> list[dict[str, Any]]:
    """The singular values of every structured layer of a model, as rows for :func:`spectrum_figure`.

    Each matrix is formed in full, in float64.

    Args:
        model: with layers of :class:`structlin_nn.torch.StructuredLinear`.
        **labels: further entries of each row, such as ``structure="monarch"``.

    Raises:
        ValueError: a model without such layers.

    >>> from structlin_nn.models import StructureConfig, build_model
    >>> model = build_model("cifar-mlp", width=16, depth=1, structure=StructureConfig("low_rank", {"rank": 2}))
    >>> rows = layer_spectra(model, structure="low_rank")
    >>> [row["layer"] for row in rows], len(rows[0]["singular_values"])
    (['input', 'blocks.0.up', 'blocks.0.down', 'output'], 16)
    """
    import torch

    from structlin_nn.torch import StructuredLinear

    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, StructuredLinear):
            with torch.no_grad():
                values = torch.linalg.svdvals(layer.operator.to_dense().double())
            found.append(
                labels
                | {
                    "layer": name, "in_features": layer.in_features, "out_features": layer.out_features,
                    "singular_values": values.tolist(),
                }
            )  # fmt: skip
    if not found:
        raise ValueError("the model has no structured layers")
    return found
