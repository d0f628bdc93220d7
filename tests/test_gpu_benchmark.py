"""benchmarks/gpu.py, rehearsed on a CPU with tiny sizes."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from structlin import execution
from structlin.execution import choice

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module, with so few cases that it takes some seconds."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("gpu")
    tiny = replace(module.TINY, chains=("BTT 2", "low rank"), compiled=(), tokens=(16,), product=16, copy=1 << 10)
    monkeypatch.setattr(module, "TINY", tiny)
    monkeypatch.setattr(module, "SPEED", ("BTT 2",))
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {"einsum": module.IMPLEMENTATIONS["einsum"]})
    yield module
    for name in ("gpu", "_measure", "_implementations"):
        sys.modules.pop(name, None)
    choice.forget()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trains.*")
def test_rehearsal(gpu: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--minutes", "3", "--backend", "eager", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert {row["what"].split()[0] for row in found["rates"]} == {"product", "copy", "launch"}
    assert all(row.get("right") for row in found["results"] if row["mode"] == "eager")
    eager = {(row["chain"], row["dtype"], row["way"]) for row in found["results"] if row["mode"] == "eager"}
    assert {("BTT 2", dtype, "strided") for dtype in ("float64", "float32", "bfloat16", "float16")} <= eager
    (row,) = found["layers"]
    assert {"dense layer", "strided", "products", "einsum"} <= row["seconds"].keys()
    assert row["predicted"]["strided"] < row["predicted"]["products"]
    assert {(row["model"], row["structure"]) for row in found["steps"]} >= {
        ("GPT-2 small", "dense"),
        ("ViT-S/32", "BTT 4"),
    }
    assert all("seconds" in row for row in found["steps"])
    assert found["wisdom"] > 0
    # The timings are those of the problem on CUDA, which is then decided by them.
    assert execution.import_wisdom(out.with_suffix(".wisdom.json")) == found["wisdom"]
    layer = gpu.make_layer("BTT 2", (64, 64), "float32", "cpu")
    problem = gpu.problem_of(layer, 16, "float32", False)
    assert choice.timings(problem)["strided"] == row["seconds"]["strided"]


def test_a_cut_loses_nothing_and_says_what_is_left_out(gpu: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["results"] == found["layers"] == found["steps"] == []
    assert any(text.startswith("results: ") for text in found["left_out"])
    assert any(text.startswith("layers: ") for text in found["left_out"])
    assert any(text.startswith("steps: ") for text in found["left_out"])


def test_a_wrong_result_is_seen(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = choice._WAYS["torch", "strided"]
    right = type(way).run
    monkeypatch.setattr(type(way), "run", lambda *given: right(*given) * 1.1)
    run = gpu.Run(gpu.parse(["--device", "cpu", "--out", str(tmp_path / "gpu.json")]))
    layer = gpu.make_layer("BTT 2", (24, 36), "float32", "cpu")
    gpu.check(run, layer, 5, "float32", {}, False)
    verdicts = {row["way"]: row.get("right") for row in run.result["results"]}
    assert verdicts["strided"] is False
    assert verdicts["products"] is True


def test_what_cannot_run_says_so(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--minutes", "0", "--out", "gpu"])
    assert "--minutes must be positive, got 0.0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.parse(["--out", "gpu"])
        assert "--device cpu runs a test with tiny sizes" in capsys.readouterr().err
