"""The entries of a report about runs, with planned against used resources and the speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from structlin_nn.figures.style import finish, legend, new_figure, series

__all__ = ["Run", "spent_figure"]


@dataclass(frozen=True)
class Run:
    """The entries of a report about one run.

    ``params`` are trainable ones, if the record has them. ``planned`` are the FLOPs of the training of the whole run,
    and ``spent`` those so far; ``seconds`` are those of training, without evaluations if the record separates them.
    ``result`` is that of the last evaluation.
    """

    record: str
    group: str
    width: int | None
    params: int | None
    planned: float | None
    spent: float
    seconds: float | None
    result: float
    finished: bool

    @property
    def rate(self) -> float | None:
        """FLOPs a second; None where nothing was timed."""
        return self.spent / self.seconds if self.seconds else None


def spent_figure(runs: Sequence[Run]) -> Figure:
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
