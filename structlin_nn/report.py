"""One page about runs: what they cost, what they reached, the laws, and what was planned against what was spent.

The page is one HTML file without scripts, and takes nothing from the network: figures are drawn into it as SVG.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from structlin_nn import laws
from structlin_nn._files import atomic_write
from structlin_nn.figures.compute import compute_figure, curves_figure, sizes_figure, spent_figure
from structlin_nn.figures.style import label
from structlin_nn.records import failure_of, read_record
from structlin_nn.tables import Row, group_rows, read_rows, record_paths, select

__all__ = ["RESULTS", "Run", "report", "runs_of", "write_report"]

RESULTS = {"cifar": "test_error", "imagenet": "val_error", "gpt2": "val_loss"}
"""The default result of a report, by task."""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; margin-bottom: .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }}
p {{ max-width: 46rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
.wide {{ overflow-x: auto; margin: .8rem 0; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }}
th {{ background: #f6f6f6; font-weight: 600; }}
th.text, td.text {{ text-align: left; }}
figure {{ margin: 1rem 0; }}
figure svg {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: 13px; max-width: 46rem; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }}
.card {{ border: 1px solid #ddd; border-radius: 6px; padding: .6rem 1rem; min-width: 8rem; }}
.card b {{ display: block; font-size: 1.3rem; }}
.note {{ color: #8a4b00; }}
</style>
</head>
<body>
"""


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


def runs_of(groups: Mapping[str, Sequence[Row]], y: str) -> list[Run]:
    """Return the runs of grouped evaluations (:func:`structlin_nn.tables.group_rows`), each by its last one.

    Raises ValueError for rows that are of no run records, or lack the result.
    """
    found = []
    for group, rows in groups.items():
        lines: dict[str, Row] = {}
        for row in rows:
            if "record" not in row or "training_macs" not in row:
                raise ValueError(f"a report is of run records, and {group} has rows that are of none")
            lines[str(row["record"])] = row
        for record, row in lines.items():
            if not isinstance(row.get(y), int | float):
                raise ValueError(f"{record} has no {y!r} at its last evaluation; choose another result with --y")
            planned, macs = row.get("counts.total_training_flops"), row.get("counts.total_training_macs")
            if planned is None and macs is not None:
                planned = 2.0 * macs
            spent = 2.0 * row["training_macs"] + row.get("samples", 0) * row.get("counts.training_other_flops", 0)
            found.append(
                Run(
                    record, group, row.get("width"), row.get("trainable_params", row.get("params")),
                    planned, spent, row.get("training_seconds", row.get("seconds")), float(row[y]),
                    row.get("step") == row.get("counts.steps"),
                )
            )  # fmt: skip
    return found


def report(
    paths: Iterable[str | os.PathLike[str]],
    *,
    y: str | None = None,
    x: str = "training_macs",
    group: Sequence[str] = ("structure",),
    where: Mapping[str, str] | None = None,
    reference: str | None = None,
    error: float | None = None,
    floor: bool | float = False,
    samples: int = 500,
    confidence: float = 0.95,
    title: str = "Training runs",
) -> str:
    """Return the page about some run records, as HTML.

    Sections without data say why: groups with too few runs for a law, runs of one size.

    Parameters
    ----------
    paths
        Run records, or folders of them. Unfinished runs are on the page, and not in the laws.
    y
        The result, such as ``test_error``; None: that of the task (:data:`RESULTS`).
    x
        Compute of the laws.
    group
        Columns that say which runs belong together.
    where
        Only rows with these values (:func:`structlin_nn.tables.select`).
    reference
        Group to compare with; None: dense, if there is one.
    error
        Error at which groups are compared; None: the lowest that both reach.
    floor, samples
        Arguments of :func:`structlin_nn.laws.fit_groups`.
    confidence
        Confidence of the intervals.
    title
        Title of the page.
    """
    begun, empty = _begun(record_paths(paths))
    rows = select(read_rows(begun, evaluations="all", unfinished=True), dict(where or {}))
    tasks = list(dict.fromkeys(str(row.get("task", _task_of(row))) for row in rows))
    if y is None:
        if len(tasks) > 1 or tasks[0] not in RESULTS:
            raise ValueError(f"the records are of {', '.join(tasks)}; choose some with --where, or a result with --y")
        y = RESULTS[tasks[0]]
    groups = group_rows(rows, list(group))
    if reference is not None:
        laws.check_reference(reference, groups)
    runs = runs_of(groups, y)
    parts = [_HEAD.format(title=html.escape(title)), f"<h1>{html.escape(title)}</h1>"]
    parts += _summary(runs, y, rows)
    parts += _runs(runs, y)
    parts += _curves(groups, y)
    ended = _finished(groups, runs)
    parts += _laws(ended, x, y, reference, error=error, floor=floor, samples=samples, confidence=confidence)
    parts += _sizes(ended, y, reference, samples, confidence)
    parts += _spent(runs)
    parts += [
        _note(f"left out, since the run {why} before its first evaluation: {path}") for path, why in empty.items()
    ]
    return "\n".join([*parts, "</body>", "</html>", ""])


def write_report(path: Path, paths: Iterable[str | os.PathLike[str]], **settings: Any) -> None:
    """Write the page of :func:`report`, as a whole or not at all."""
    text = report(paths, **settings)
    with atomic_write(path) as file:
        file.write(text.encode())


def _begun(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return the records that can be read, and why others have no evaluation; ValueError if there are only those."""
    empty: dict[Path, str] = {}
    for path in paths:
        try:
            record = read_record(path)
        except ValueError:  # a table; or read_rows says what is wrong
            continue
        if not record.evaluations:
            failure = failure_of(path.parent) if path.name == "record.jsonl" else None
            empty[path] = "stopped" if failure is None else f"failed ({' '.join(failure.split())})"
    begun = [path for path in paths if path not in empty]
    if not begun:
        raise ValueError(f"there is no evaluation yet in {', '.join(map(str, paths))}")
    return begun, empty


def _task_of(row: Row) -> str:
    return "gpt2" if "val_perplexity" in row else "imagenet" if "val_top5_error" in row else "cifar"


def _summary(runs: Sequence[Run], y: str, rows: Sequence[Row]) -> list[str]:
    best = min(runs, key=lambda run: run.result)
    seconds = [run.seconds for run in runs if run.seconds]
    machines = dict.fromkeys(
        f"{row.get('hardware.cpu') or row.get('hardware.machine') or 'unknown'}, {row.get('hardware.device', 'cpu')}"
        for row in rows
    )
    cards = [
        (f"{len(runs)}", "runs, " + f"{sum(not run.finished for run in runs)} not finished"),
        (_engineering(sum(run.spent for run in runs)), "training FLOPs spent"),
        (_duration(sum(seconds)) if seconds else "-", "of training"),
        (f"{best.result:.4g}", f"lowest {label(y)}: {best.group}, width {best.width}"),
    ]
    shown = "".join(f'<div class="card"><b>{_text(value)}</b>{_text(what)}</div>' for value, what in cards)
    return [f'<div class="cards">{shown}</div>', f"<p>Machines: {_text('; '.join(machines))}.</p>"]


def _runs(runs: Sequence[Run], y: str) -> list[str]:
    head = ("run", "group", "width", "parameters", label(y), "training FLOPs", "seconds", "FLOP/s", "status")
    cells = [
        (
            Path(run.record).name, run.group, _or_dash(run.width, "d"), _or_dash(run.params, ",.0f"),
            f"{run.result:.4g}", _engineering(run.spent), _or_dash(run.seconds, ",.0f"),
            "-" if run.rate is None else _engineering(run.rate), "finished" if run.finished else "not finished",
        )
        for run in sorted(runs, key=lambda run: (run.group, run.width or 0, run.record))
    ]  # fmt: skip
    return ["<h2>Runs</h2>", _table(head, cells, left=2)]


def _curves(groups: Mapping[str, Sequence[Row]], y: str) -> list[str]:
    try:
        figure = curves_figure(groups, x="training_macs", y=y)
    except ValueError as problem:
        return ["<h2>Curves</h2>", _note(f"not drawn: {problem}")]
    text = (
        f"Left, {label(y)} of every run against training compute, darker for wider models. Right, where the runs end, "
        "against the cost of the model."
    )
    return ["<h2>Curves</h2>", _figure(figure, text)]


def _finished(groups: Mapping[str, Sequence[Row]], runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Return the last evaluations of the runs that have ended, by group."""
    ended = {run.record for run in runs if run.finished}
    found: dict[str, list[Row]] = {}
    for name, rows in groups.items():
        last = {str(row["record"]): row for row in rows if str(row["record"]) in ended}
        if last:
            found[name] = list(last.values())
    return found


def _laws(groups: Mapping[str, Sequence[Row]], x: str, y: str, reference: str | None, **settings: Any) -> list[str]:
    parts = ["<h2>Scaling laws</h2>"]
    floor, confidence = settings["floor"], settings["confidence"]
    fitted = partial(laws.fitted_record, groups, x, y, **settings)
    try:
        try:
            fits, record = fitted(reference=reference)
        except ValueError as problem:
            if reference is None:
                raise
            parts.append(_note(f"nothing is compared with {reference}: {problem}"))
            fits, record = fitted()
    except ValueError as problem:
        return [*parts, _note(f"no group can be fitted: {problem}")]
    above = " + floor" if floor is not False else ""
    parts.append(
        f"<p>{_text(label(y))} = a C<sup>&minus;&alpha;</sup>{above}, C the {_text(label(x))}, fitted to the "
        f"logarithms of the runs that have ended; intervals of {100 * confidence:g} % by bootstrap.</p>"
    )
    parts.append(_figure(compute_figure(fits, x=x, y=y, confidence=confidence), "Points, laws and their exponents."))
    parts.append(_table(*laws.laws_table(record, floor is not False)))
    parts += [_note(f"{name}: {note}") for name, law in fits.items() for note in law.fit.notes]
    parts += [_note(f"{name} is not fitted: {reason}") for name, reason in record["left_out"].items()]
    if "comparisons" in record:
        parts.append(f"<h2>Less compute than {_text(record['reference'])}</h2>")
    for key, what in (("comparisons", "compute"), ("comparisons_by_time", "time")):
        if compared := record.get(key):
            parts.append(
                f"<p>How many times less {what} at equal {_text(label(y))}, from the laws and from the points.</p>"
            )
            parts.append(_table(*laws.comparisons_table(compared, what)))
            parts += [_note(f"{name}: {note}") for name, row in compared.items() for note in row["notes"]]
    return parts


def _sizes(
    groups: Mapping[str, Sequence[Row]], y: str, reference: str | None, samples: int, confidence: float
) -> list[str]:  # fmt: skip
    """Return the law in two sizes: MACs of a sample, so that 6 N D are the FLOPs of training for every structure."""
    parts = ["<h2>Law in model and data</h2>"]
    try:
        drawn, left_out = laws.fit_sizes(groups, "forward_macs", "samples", y, samples=samples)
    except ValueError as problem:
        return [*parts, _note(f"not fitted, which needs runs of several lengths: {problem}")]
    fit = drawn.fit
    parts.append(
        "<p>L = E + A / N<sup>&alpha;</sup> + B / D<sup>&beta;</sup>, N the MACs of one sample, D the samples; shared "
        f"by all groups: {_text(', '.join(fit.shared) or 'nothing')}.</p>"
    )
    try:
        drawing = sizes_figure(drawn, size="forward_macs", y=y, confidence=confidence)
        parts.append(_figure(drawing, "The lowest loss of each budget, and how the law splits it."))
    except ValueError as problem:
        parts.append(_note(f"not drawn: {problem}"))
    base = reference if reference in fit.laws else laws.default_reference(fit.laws)
    recorded = partial(
        laws.sizes_record, drawn, left_out, columns=("forward_macs", "samples", y), confidence=confidence
    )
    try:
        record = recorded(reference=base)
    except ValueError as problem:  # no optimum, since an exponent or a coefficient is 0
        record = recorded()
        parts.append(_note(f"nothing is compared with {base}: {problem}"))
    parts.append(_table(*laws.sizes_table(record)))
    if "multipliers" in record:
        parts.append(_table(*laws.multipliers_table(record)))
    parts += [_note(note) for note in fit.notes]
    parts += [_note(f"{name} is not fitted: {reason}") for name, reason in left_out.items()]
    return parts


def _spent(runs: Sequence[Run]) -> list[str]:
    cells = []
    for name in dict.fromkeys(run.group for run in runs):
        own = [run for run in runs if run.group == name]
        planned: list[float] = [run.planned for run in own if run.planned is not None]
        whole, total = len(planned) == len(own), sum(planned)
        spent = sum(run.spent for run in own)
        seconds = sum(run.seconds or 0 for run in own)
        cells.append(
            (
                name, str(len(own)), _engineering(total) if whole else "-", _engineering(spent),
                f"{100 * spent / total:.1f} %" if whole and total else "-", _duration(seconds),
                _engineering(spent / seconds) if seconds else "-",
            )
        )  # fmt: skip
    head = ("group", "runs", "planned FLOPs", "spent FLOPs", "of the plan", "time", "FLOP/s")
    parts = ["<h2>Compute and time</h2>", _table(head, cells)]
    if any(run.rate for run in runs):
        text = (
            "Left, FLOPs spent against FLOPs planned, run by run: on the line the plan was kept. Right, what a second "
            "of training did."
        )
        parts.append(_figure(spent_figure(runs), text))
    if unfinished := [run for run in runs if not run.finished]:
        names = ", ".join(Path(run.record).name for run in unfinished)
        parts.append(_note(f"not finished, and left out of the laws: {names}"))
    return parts


def _figure(figure: Figure, caption: str) -> str:
    """Return the figure as SVG inside the page; its names are made unique, since all SVGs of a page share them."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "structlin"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = f"f{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="|url\(#|href="#', lambda found: found[0] + prefix, svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption, quote=True)}" ', 1)
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="text"' if place < left else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{_text(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _engineering(value: float) -> str:
    """Return a number with the exponent of its order of magnitude.

    >>> _engineering(1.5e12), _engineering(0)
    ('1.50e12', '0')
    """
    if not value:
        return "0"
    power = math.floor(math.log10(abs(value)))
    return f"{value:.4g}" if abs(power) < 4 else f"{value / 10**power:.2f}e{power}"


def _duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours.

    >>> _duration(42), _duration(5000), _duration(400_000)
    ('42 s', '1 h 23 min', '111 h 06 min')
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
