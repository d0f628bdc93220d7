"""Planned against used resources, and the speed of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure

from structlin_nn.figures.style import finish, legend, new_figure, series

__all__ = ["SpentRun", "spent_figure"]


class SpentRun(Protocol):
    """The properties of a run that are drawn; :class:`structlin_nn.report.Run` has them."""

    @property
    def group(self) -> str:
        """Structure and options."""

    @property
    def planned(self) -> float | None:
        """Training FLOPs of the plan."""

    @property
    def spent(self) -> float:
        """Training FLOPs of the run."""

    @property
    def params(self) -> int | None:
        """Number of parameters."""

    @property
    def rate(self) -> float | None:
        """FLOPs per second."""


def spent_figure(runs: Sequence[SpentRun]) -> Figure:
    """Left, FLOPs spent against FLOPs planned, with the line of equality; right, FLOPs a second against parameters.

    Parameters
    ----------
    runs
        Those without a plan, or without times, are left out of the panel that needs them.
    """
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    styles = series(dict.fromkeys(run.group for run in runs))
    for name, style in styles.items():
        own = [run for run in runs if run.group == name]
        pairs = [(run.planned, run.spent) for run in own if run.planned and run.spent]
        left.plot([p for p, _ in pairs], [s for _, s in pairs], label=style.label, **style.points())
        rates = [(run.params, run.rate) for run in own if run.params and run.rate]
        right.plot([p for p, _ in rates], [r for _, r in rates], **style.points())
    ends = [value for run in runs for value in (run.planned, run.spent) if value]
    if ends:
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=1, zorder=0)
    finish(left, x="training FLOPs planned", y="training FLOPs spent")
    finish(right, x="parameters", y="FLOPs a second of training")
    legend(figure, left, 4)
    return figure
