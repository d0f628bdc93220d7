"""The demonstration: matched compute, and from runs to table and figure."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import structlin_nn
from structlin_nn import demo
from structlin_nn.cli import main
from structlin_nn.counting import count_model
from structlin_nn.demo import TOLERANCE, WIDTHS, configurations, row_of
from structlin_nn.figures.compute import demo_figure
from structlin_nn.figures.style import STYLES, save
from structlin_nn.recipes.cifar import Options, train
from structlin_nn.records import read_record
from structlin_nn.sweeps.local import Outcome

STRUCTURES = ("block_tensor_train", "monarch", "low_rank", "kronecker")
RULES = {"dense": {"dense"}, **{name: {"aware", "naive"} for name in STRUCTURES}}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from structlin_nn.cli import main; sys.exit(main())", "demo", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_compute_is_matched() -> None:
    counts = {
        structure: [
            count_model("cifar-mlp", width=width, structure=structure, options=options)["training_macs"]
            for width in row
        ]
        for structure, options, row in WIDTHS
    }
    assert len(counts) == 5
    for structure, found in counts.items():
        assert found == pytest.approx(counts["dense"], rel=TOLERANCE), structure


@pytest.mark.parametrize("quick", [False, True])
def test_all_runs_differ_in_structure_width_and_rule_alone(quick: bool) -> None:
    configs = configurations(seed=3, quick=quick)
    levels = 1 if quick else 4
    assert len(configs) == levels * (1 + 4 * 2)
    assert len({config.width for config in configs.values() if config.structure == "dense"}) == levels
    first = next(iter(configs.values()))
    for config in configs.values():
        assert config.seed == 3
        assert set(first.differences(config)) <= {"structure", "options", "width", "structure_aware"}
    for name, config in configs.items():
        if config.structure != "dense":
            other = configs[name.replace("aware", "other").replace("naive", "aware").replace("other", "naive")]
            assert config.differences(other) == ["structure_aware"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, printed JSON and stderr of a quick demonstration; one of its runs existed already."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    name, config = next(iter(configurations(1, quick=True).items()))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        train(config, Options(out=folder / name, quiet=True))
        line = f"demo --quick --out {folder} --seed 1 --workers 1 --json"
        assert main(line.split()) == 0, err.getvalue()
    return folder, json.loads(out.getvalue()), err.getvalue()


@pytest.mark.slow
def test_an_interrupted_one_resumes(tmp_path: Path) -> None:
    arguments = command("--quick", "--out", str(tmp_path), "--seed", "1")
    with subprocess.Popen(
        [*arguments, "--workers", "1"], env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/checkpoints/0*")):
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "structlin demo: SIGTERM; the same command resumes the demonstration" in err
    assert not (tmp_path / "demo.png").exists()
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").exists()


class TestQuick:
    def test_table_is_that_of_the_records(self, finished: tuple[Path, dict[str, Any], str]) -> None:
        folder, printed, _ = finished
        assert printed["seed"] == 1
        assert printed["rows"] == json.loads((folder / "demo.json").read_text())
        assert len(printed["records"]) == len(printed["rows"]) == 9
        for path, row in zip(printed["records"], printed["rows"], strict=True):
            assert row == row_of(row["name"], read_record(path))
            assert row["forward_macs"] < row["training_macs"]
            assert 0 < row["error"] < 0.9
        rules = {}
        for row in printed["rows"]:
            rules.setdefault(row["structure"], set()).add(row["learning_rate"])
        assert rules == RULES

    def test_compute_is_equal(self, finished: tuple[Path, dict[str, Any], str]) -> None:
        macs = [row["training_macs"] for row in finished[1]["rows"]]
        assert max(macs) / min(macs) < (1 + TOLERANCE) ** 2
        assert finished[1]["largest_compute_difference"] <= TOLERANCE

    def test_every_network_learned(self, finished: tuple[Path, dict[str, Any], str]) -> None:
        for record in map(read_record, finished[1]["records"]):
            first, last = record.evaluations[0], record.evaluations[-1]
            assert last["test_loss"] < 0.97 * first["test_loss"]

    def test_figure_is_a_picture_with_something_in_it(self, finished: tuple[Path, dict[str, Any], str]) -> None:
        with Image.open(finished[1]["figure"]) as image:
            assert image.format == "PNG"
            assert image.width >= 1200
            pixels = np.asarray(image.convert("RGB"), dtype=int) @ (1 << 16, 1 << 8, 1)
        colours = {int(code[1:], 16) for _, code, _ in STYLES.values()}
        assert len(colours & set(np.unique(pixels).tolist())) >= 5

    def test_progress_and_finished_runs_are_printed(self, finished: tuple[Path, dict[str, Any], str]) -> None:
        assert "already holds" in finished[2]
        assert "100%" in finished[2]

    def test_again_it_shows_what_is_there(self, finished: tuple[Path, dict[str, Any], str], cli) -> None:
        folder, printed, _ = finished
        before = {path: path.read_bytes() for path in folder.glob("*/*") if path.is_file()}
        out, err = cli("demo", "--quick", "--out", folder, "--seed", "1", "--quiet")
        assert err == ""
        assert {path: path.read_bytes() for path in folder.glob("*/*") if path.is_file()} == before
        for row in printed["rows"]:
            assert f"{row['loss']:.4f}" in out
            assert f"{row['params']:,}" in out
        assert str(folder / "demo.png") in out

    def test_another_seed_needs_another_folder(self, finished: tuple[Path, dict[str, Any], str], cli) -> None:
        err = cli("demo", "--quick", "--out", finished[0], "--seed", "2", "--quiet", code=2).err
        assert "another configuration: seed was 1 and is 2" in err
        assert err.count("\n") == 1


def test_a_failure_in_a_run_is_printed(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """How an error comes out of the process of a run is tested in cli/test_sweep.py."""
    monkeypatch.setattr(demo, "run_all", lambda jobs, **_: Outcome(dict.fromkeys(jobs, "NotADirectoryError: x"), None))
    err = cli("demo", "--quick", "--out", tmp_path, "--quiet", "--workers", "1", code=1).err
    assert err.startswith("structlin demo: ")
    assert all(f"{name}: NotADirectoryError: x" in err for name in configurations(0, quick=True))
    assert err.count("\n") == 1


def test_figure_shows_every_row(tmp_path: Path) -> None:
    rows = [
        {
            "structure": structure, "width": width, "learning_rate": rule, "training_macs": 10.0**9 * width,
            "training_seconds": 2.0 * width + number, "error": 0.1 + 0.01 * number, "train_error": 0.05 + 0.02 * number,
        }
        for number, structure in enumerate(RULES)
        for width in (10, 30)
        for rule in RULES[structure]
    ]  # fmt: skip
    figure = demo_figure(rows)
    assert isinstance(figure, Figure)
    left, middle, right = figure.axes
    for axes in (left, middle, right):
        assert axes.get_xlabel()
        assert "%" in axes.get_ylabel()
    for axes, cost in ((left, "training_macs"), (middle, "training_seconds")):
        drawn = {tuple(map(float, point)) for line in axes.lines for point in line.get_xydata()}
        wanted = {(row[cost], 100 * row["train_error"]) for row in rows if row["learning_rate"] != "naive"}
        assert {(x, round(y, 9)) for x, y in wanted} <= {(x, round(y, 9)) for x, y in drawn}
    heights = sorted(round(float(y), 9) for line in right.lines for y in np.asarray(line.get_ydata()))
    assert heights == sorted(round(100 * row["train_error"], 9) for row in rows if row["structure"] != "dense")
    save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_quick_demonstration_has_a_folder_of_its_own(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full one would find runs of another configuration there."""
    folders = []

    def refuse(folder: Path, **options: object) -> None:
        folders.append(folder)
        raise RuntimeError("not run")

    monkeypatch.setattr("structlin_nn.demo.demo", refuse)
    for words in ([], ["--quick"], ["--quick", "--out", "mine"]):
        cli("demo", "--quiet", *words, code=1)
    assert folders == [Path("runs/demo"), Path("runs/demo-quick"), Path("mine")]
