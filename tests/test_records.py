"""The committed run records are those of the sweeps that they are said to be, and every picture comes from them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from structlin_nn.recipes import recipe_module
from structlin_nn.records import read_record
from structlin_nn.sweeps import find
from structlin_nn.tables import record_paths

ROOT = Path(__file__).resolve().parents[1]
RECORDS, IMAGES, SWEEPS = ROOT / "benchmarks" / "records", ROOT / "docs" / "images", ROOT / "benchmarks" / "sweeps"
FOLDERS = sorted(path.name for path in RECORDS.iterdir())
DEMO = "demo.png"  # drawn from the rows of `structlin demo`


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS)
def test_records_are_finished_runs_of_their_sweep(folder: str) -> None:
    file = SWEEPS / f"{folder.replace('-', '_')}.py"
    runs = find(str(file) if file.exists() else folder).runs({"threads": 1})
    for path in record_paths([RECORDS / folder]):
        record = read_record(path)
        assert record.finished, path.name
        recorded = recipe_module(record.header["recipe"]).Config.from_dict(renamed(record.header["config"]))
        assert recorded == runs[path.stem], f"{path.name}: {recorded.differences(runs[path.stem])}"


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of the first records as it is said today; what is said of all was then so."""
    config = {key: value for key, value in config.items() if key != "framework"}
    if "eval_batches" in config:
        config["eval_sequences"] = config.pop("eval_batches") * config["batch_size"] // config["accumulate"]
        config |= {"base_expansion": 1, "decay_embeddings": False}
    return config


def test_documents_show_the_pictures_that_the_script_draws(script: ModuleType) -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for path in documents for name in re.findall(r"images/([\w.-]+)", path.read_text(encoding="utf-8"))}
    committed = {path.name for path in IMAGES.iterdir()}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    others = {name for name in committed if name in scripts}
    assert shown == committed == {*script.FIGURES, DEMO, *others}
    assert {records for _, records, _ in script.FIGURES.values()} == set(FOLDERS)


def test_committed_pictures_are_those_of_the_records(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--out", str(tmp_path / "new")]) == 0
    for name in (*script.FIGURES, DEMO):
        drawn, committed = (
            np.asarray(Image.open(folder / name).convert("L"), dtype=float) for folder in (tmp_path / "new", IMAGES)
        )
        assert drawn.shape == committed.shape, name
        # Other releases of the fonts move a few pixels; another record moves lines.
        assert np.abs(drawn - committed).mean() < 1, name


def test_commands_are_printed(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", str(tmp_path / "new"), "--print"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(script.FIGURES)
    assert all(line.startswith("structlin figure ") for line in printed)
    assert not (tmp_path / "new").exists()
