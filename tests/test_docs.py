"""The documentation builds, with warnings as errors, and has a page for every structure."""

import subprocess
import sys
from pathlib import Path

import pytest

import structlin

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in structlin.structure_names():
        assert (tmp_path / "html" / "structures" / "generated" / f"{name}.html").exists()
        assert (tmp_path / "html" / "_images" / f"{name}.png").exists()
    for result in (ROOT / "benchmarks" / "results").glob("*/layers*.json"):
        assert (tmp_path / "html" / "_images" / f"{result.parent.name}-{result.stem}.png").exists()
    api = (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
    for name in (
        "structlin.project",
        "structlin.execution.explain",
        "structlin.scale.lr_multipliers",
        "structlin_nn.torch.StructuredLinear",
    ):
        assert f'id="{name}"' in api, f"{name} is not in the API page"
