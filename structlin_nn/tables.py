"""Results as rows: run records, JSON, JSON lines and CSV, read into one flat form for fits and figures.

A row is a dictionary. A row of a run record (:mod:`structlin_nn.records`) is one evaluation together with the header. A
plain name is looked up in the evaluation and its statistics, then in the configuration and the options of its
structure, then in the counts. A dotted name (``evaluation.training_macs``, ``counts.training_macs``,
``config.options.rank``) states the place.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from structlin_nn._text import check_known, read_value, suggestion
from structlin_nn.records import Record, failure_of, read_record, unsealed

__all__ = ["EVALUATIONS", "Row", "by_run", "column", "failed_runs", "group_rows", "read_rows", "record_paths", "select"]

Row = dict[str, Any]
EVALUATIONS = ("last", "all")


def record_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files, and every ``*.jsonl`` below a folder, by name; FileNotFoundError if there is none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.rglob("*.jsonl"))
            if not inside:
                raise FileNotFoundError(f"{path} is a folder without records (*.jsonl)")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return found


def failed_runs(paths: Iterable[str | os.PathLike[str]]) -> dict[Path, str]:
    """Return the records of the runs of sweeps that failed, among :func:`record_paths`, with the errors of the runs."""
    reasons = {path: _failure(path) for path in record_paths(paths)}
    return {path: reason for path, reason in reasons.items() if reason is not None and not _ended(path)}


def _failure(path: Path) -> str | None:
    return failure_of(path.parent) if path.name == "record.jsonl" else None


def _ended(path: Path) -> bool:
    try:
        return read_record(path).finished
    except ValueError:  # the error may have cut off the record
        return False


def read_rows(
    paths: Iterable[str | os.PathLike[str]], *, evaluations: str = "last", unfinished: bool = False
) -> list[Row]:
    r"""Read rows from files and folders.

    Parameters
    ----------
    paths
        Run records (``.jsonl`` whose first line is a header), JSON lines or a JSON list of objects, CSV with a head
        line (empty cells are left out, and numbers are read as such), or folders of ``.jsonl`` files.
    evaluations
        Evaluations of a run record: ``last`` or ``all``.
    unfinished
        Accept runs that have not reached their last step.

    Examples
    --------
    >>> Path("points.csv").write_text("structure,macs,error\ndense,1e6,0.5\nmonarch,2e6,\n")
    48
    >>> read_rows(["points.csv"])
    [{'structure': 'dense', 'macs': 1000000.0, 'error': 0.5}, {'structure': 'monarch', 'macs': 2000000.0}]
    """
    check_known("evaluations", evaluations, EVALUATIONS)
    files = record_paths(paths)
    rows = [row for path in files for row in _rows_of(path, evaluations, unfinished)]
    if not rows:
        raise ValueError(f"there are no rows in {', '.join(map(str, files))}")
    return rows


def _rows_of(path: Path, evaluations: str, unfinished: bool) -> list[Row]:
    if path.suffix == ".csv":
        return _from_csv(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        if unsealed(path, text.partition("\n")[0].encode()).get("kind") == "header":
            return _from_record(path, read_record(path), evaluations, unfinished)
        lines = enumerate(text.splitlines(), 1)
        return [unsealed(path, line.encode(), number) for number, line in lines if line.strip()]
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} must be JSON: {error}") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path} must hold a list of objects, one for each point")
        return found
    raise ValueError(f"{path} must be .jsonl, .json or .csv")


def _from_csv(path: Path) -> list[Row]:
    table = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    head, *lines = [line for line in table if line] or [[]]
    if not head or len(set(head)) < len(head):
        raise ValueError(f"{path} must start with a line of different column names, got {head}")
    for number, line in enumerate(lines, 2):
        if len(line) != len(head):
            raise ValueError(f"{path}, line {number} has {len(line)} cells and the head {len(head)}")
    return [{name: read_value(cell) for name, cell in zip(head, line, strict=True) if cell.strip()} for line in lines]


def _from_record(path: Path, record: Record, evaluations: str, unfinished: bool) -> list[Row]:
    header = record.header
    if not record.evaluations:
        raise ValueError(f"{path} holds no evaluation yet")
    if not record.finished and not unfinished:
        failure = _failure(path)
        ended = "stopped" if failure is None else f"failed ({failure})"
        raise ValueError(
            f"{path}: the run {ended} after step {record.evaluations[-1]['step']} of {header['counts']['steps']}; "
            "resume it, or take unfinished runs (--unfinished)"
        )
    common: Row = {"record": str(path), "task": header["task"]}
    # A plain name finds the value that is set last.
    for section in ("counts", "config"):
        common |= _flat(header[section], section)
        common |= header[section]
        common |= header[section].get("options", {})
    common |= _flat(header["data"], "data") | _flat(header["hardware"], "hardware")
    common["structures"] = header["structures"]
    chosen = record.evaluations if evaluations == "all" else record.evaluations[-1:]
    return [common | (line.get("statistics") or {}) | line | _flat(line, "evaluation") for line in chosen]


def _flat(values: Mapping[str, Any], name: str) -> Row:
    found: Row = {}
    for key, value in values.items():
        found |= _flat(value, f"{name}.{key}") if isinstance(value, Mapping) else {f"{name}.{key}": value}
    return found


def column(rows: Sequence[Row], name: str) -> list[float]:
    """Return the numbers of a column; ValueError for a row without it, or with something other than a finite number.

    Examples
    --------
    >>> column([{"error": 0.5}], "eror")
    Traceback (most recent call last):
    ...
    ValueError: a row has no 'eror' (did you mean error?)
    """
    found = []
    for row in rows:
        value = _lookup(row, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name!r} must be a finite number in every row, got {value!r}{_where(row)}")
        found.append(float(value))
    return found


def _lookup(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"a row has no {name!r}{suggestion(name, row)}{_where(row)}")
    return row[name]


def _where(row: Row) -> str:
    return f" ({row['record']})" if "record" in row else ""


def by_run(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each run, by their column ``record``; ValueError for a row without it."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(_lookup(row, "record"), []).append(row)
    return list(found.values())


def group_rows(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    """Return rows by the values of some columns, in order of their first occurrence; without names one group, "all".

    A label is the first value, followed by the names and values of the other columns. Rows without a column are a group
    of their own. ValueError if no row has a column.

    Examples
    --------
    >>> rows = [{"structure": "dense"}, {"structure": "low_rank", "rank": 2}]
    >>> list(group_rows(rows, ["structure", "rank"]))
    ['dense', 'low_rank, rank 2']
    """
    _check_columns(rows, names)
    found: dict[str, list[Row]] = {}
    for row in rows:
        known = [(number, name) for number, name in enumerate(names) if row.get(name) is not None]
        parts = [f"{name} {row[name]}" if number else str(row[name]) for number, name in known]
        found.setdefault(", ".join(parts) or "all", []).append(row)
    return found


def _check_columns(rows: Sequence[Row], names: Iterable[str]) -> None:
    """Raise ValueError for a column that no row has."""
    for name in names:
        if rows and not any(name in row for row in rows):
            _lookup(rows[0], name)


def select(rows: Sequence[Row], conditions: Mapping[str, str]) -> list[Row]:
    """Return the rows with given values, compared as text; ``true``, ``false`` and ``null`` are as in JSON.

    ValueError for a column that no row has, or if no row has the values.
    """
    _check_columns(rows, conditions)
    kept = [row for row in rows if all(_reads(row.get(name), value) for name, value in conditions.items())]
    if not kept:
        wanted = ", ".join(f"{name}={value}" for name, value in conditions.items())
        raise ValueError(f"no row has {wanted}")
    return kept


def _reads(value: Any, text: str) -> bool:
    return text == str(value) or ((value is None or isinstance(value, bool)) and text == json.dumps(value))
