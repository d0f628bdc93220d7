"""What may import what: the contracts of setup.cfg hold, notice a wrong import, and are what the guide draws."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("structlin", "structlin_nn")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports_command as run; sys.argv[1:] = ['--no-cache']; run()"
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-P", "-c", code], cwd=root, env=environment, capture_output=True, text=True)


def test_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 4 kept, 0 broken." in done.stdout


WRONG = [
    ("structlin/structure.py", "import structlin.execution.products", "structlin.structure -> structlin.execution"),
    ("structlin/execution/products.py", "import structlin.operators", "products -> structlin.operators"),
    ("structlin/execution/rates.py", "import structlin.execution.torch_ways", "rates -> structlin.execution.torch"),
    ("structlin/execution/chunked.py", "import structlin.execution.compiled", "chunked -> structlin.execution.com"),
    ("structlin/linalg/_solve.py", "import structlin_nn.torch", "structlin.linalg._solve -> structlin_nn.torch"),
    ("structlin/execution/new.py", "", "- structlin.execution.new"),
    ("structlin_nn/torch/groups.py", "import structlin_nn.recipes", "structlin_nn.torch.groups -> structlin_nn"),
    ("structlin_nn/flax/rates.py", "import structlin_nn.models", "structlin_nn.flax.rates -> structlin_nn.models"),
]


def test_wrong_imports_are_found(tmp_path: Path) -> None:
    """Also those inside of functions."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "setup.cfg", tmp_path / "setup.cfg")
    for file, line, _ in WRONG:
        with (tmp_path / file).open("a", encoding="utf-8") as source:
            source.write(f"\n\ndef imports():\n    {line or 'pass'}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [found for _, _, found in WRONG if found not in done.stdout] == []
