"""Rows from records and tables: values by name, groups, and errors that name what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from structlin_nn.tables import column, failed_runs, group_rows, read_rows, record_paths, select

WriteRun = Callable[..., Path]


def test_run_record(write_run: WriteRun) -> None:
    path = write_run("monarch", 32, errors=(0.9, 0.4, 0.2), macs=3000, options={"blocks": 4}, seed=7)
    (row,) = read_rows([path])
    assert row["training_macs"] == row["evaluation.training_macs"] == 3000, "the plain name is that of the evaluation"
    assert row["counts.training_macs"] == 300
    assert (row["test_error"], row["forward_macs"], row["params"]) == (0.2, 100, 320)
    assert (row["structure"], row["blocks"], row["config.options.blocks"], row["seed"]) == ("monarch", 4, 4, 7)
    assert row["record"] == str(path)
    every = read_rows([path], evaluations="all")
    assert [r["test_error"] for r in every] == [0.9, 0.4, 0.2]
    assert [r["step"] for r in every] == [0, 5, 10]


def test_unfinished_run(write_run: WriteRun) -> None:
    path = write_run(errors=(0.9, 0.4), steps=10, last_step=6)
    with pytest.raises(ValueError, match=r"run0.jsonl: the run stopped after step 6 of 10"):
        read_rows([path])
    assert read_rows([path], unfinished=True)[0]["step"] == 6
    with pytest.raises(ValueError, match=r"run1.jsonl holds no evaluation yet"):
        read_rows([write_run(errors=())], unfinished=True)


def test_failed_runs(write_run: WriteRun, tmp_path: Path) -> None:
    """A run of a sweep failed if its folder says so and its record does not end with the last step."""
    states = {"good": 10, "bad": 6, "retried": 10, "begun": 6, "cut": 6}
    paths = {}
    for name, last in states.items():
        source = write_run(errors=(0.9, 0.4), steps=10, last_step=last)
        paths[name] = tmp_path / "sweep" / name / "record.jsonl"
        paths[name].parent.mkdir(parents=True)
        source.rename(paths[name])
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:-5])
    for name in ("bad", "retried", "cut"):
        (paths[name].parent / "failed.json").write_text('{"error": "ValueError: the loss is nan"}')
    assert failed_runs([tmp_path]) == dict.fromkeys((paths["bad"], paths["cut"]), "ValueError: the loss is nan")
    assert failed_runs([paths["good"], paths["bad"]]) == {paths["bad"]: "ValueError: the loss is nan"}
    with pytest.raises(
        ValueError, match=r"bad/record.jsonl: the run failed \(ValueError: the loss is nan\) after step 6"
    ):
        read_rows([paths["bad"]])
    with pytest.raises(ValueError, match=r"begun/record.jsonl: the run stopped after step 6 of 10"):
        read_rows([paths["begun"]])


def test_folder(write_run: WriteRun, tmp_path: Path) -> None:
    paths = [write_run(), write_run("monarch")]
    assert record_paths([tmp_path]) == paths
    assert [row["structure"] for row in read_rows([tmp_path])] == ["dense", "monarch"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is a folder without records"):
        record_paths([tmp_path / "empty"])


def test_tables(tmp_path: Path) -> None:
    rows = [{"structure": "dense", "macs": 10, "error": 0.5}, {"structure": "btt", "macs": 2.5e9, "error": 0.25}]
    contents = {
        "a.json": json.dumps(rows),
        "b.jsonl": "\n".join(map(json.dumps, rows)),
        "c.csv": "structure,macs,error\ndense,10,0.5\nbtt,2.5e9,0.25\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        assert read_rows([tmp_path / name]) == rows, name
    (tmp_path / "d.csv").write_text('a,"b, c"\n1,\n,"x, y"\n')
    assert read_rows([tmp_path / "d.csv"]) == [{"a": 1}, {"b, c": "x, y"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", r"a.json must hold a list of objects"),
        ("a.json", "[", r"a.json must be JSON"),
        ("a.jsonl", '{"a": 1}\n{', r"a.jsonl, line 2 is damaged"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1 must be a JSON object, got b'\[1\]'"),
        ("a.csv", "", r"must start with a line of different column names, got \[\]"),
        ("a.csv", "a,a\n1,2\n", r"different column names, got \['a', 'a'\]"),
        ("a.csv", "a,b\n1\n", r"a.csv, line 2 has 1 cells and the head 2"),
        ("a.csv", "a,b\n", r"there are no rows in .*a.csv"),
        ("a.txt", "a", r"a.txt must be .jsonl, .json or .csv"),
    ],
)
def test_damaged(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows([tmp_path / name])


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        read_rows([tmp_path / "nowhere.json"])
    with pytest.raises(ValueError, match="unknown evaluations 'first'; one of last, all"):
        read_rows([tmp_path], evaluations="first")
    with pytest.raises(ValueError, match=r"a row has no 'eror' \(did you mean error\?\) \(run.jsonl\)"):
        column([{"error": 1, "record": "run.jsonl"}], "eror")
    for value in ("x", None, True, float("nan")):
        with pytest.raises(ValueError, match="'error' must be a finite number in every row, got"):
            column([{"error": value}], "error")


def test_groups() -> None:
    rows = [
        {"structure": "low_rank", "rank": 2},
        {"structure": "dense"},
        {"structure": "low_rank", "rank": None},
        {"structure": "low_rank", "rank": 2, "seed": 1},
    ]
    grouped = group_rows(rows, ["structure", "rank"])
    assert {name: len(group) for name, group in grouped.items()} == {"low_rank, rank 2": 2, "dense": 1, "low_rank": 1}
    assert list(group_rows(rows, [])) == ["all"]
    with pytest.raises(ValueError, match=r"a row has no 'structur' \(did you mean structure\?\)"):
        group_rows(rows, ["structur"])
    assert select(rows, {"structure": "low_rank", "rank": "2"}) == [rows[0], rows[3]]
    assert select(rows, {}) == rows
    flags = [{"aware": True}, {"aware": False}, {"aware": "true"}, {"aware": None}, {"aware": 1}]
    assert select(flags, {"aware": "true"}) == [flags[0], flags[2]]
    assert select(flags, {"aware": "True"}) == [flags[0]]
    assert select(flags, {"aware": "null"}) == [flags[3]]
    with pytest.raises(ValueError, match="no row has structure=btt"):
        select(rows, {"structure": "btt"})
    with pytest.raises(ValueError, match="a row has no 'width'"):
        select(rows, {"width": "2"})
