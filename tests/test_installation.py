"""The package installs from the public registry, with no local files, and no settings of pip or uv.

torch from a local file may have no requirements on CUDA packages, and so hides a conflict that everyone else meets.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# .ci/run selects these tests by the marker network. They are slow too, so that the test command of README.md, which
# leaves out slow tests, needs no network.
pytestmark = [pytest.mark.network, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
PYTHONS = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", CONFIG["metadata"]["classifiers"], re.MULTILINE)
EXTRAS = list(CONFIG["options.extras_require"])
PLATFORMS = {
    "linux-x86_64": "x86_64-manylinux_2_28",
    "linux-arm64": "aarch64-manylinux_2_28",
    "macos-arm64": "aarch64-apple-darwin",
}
# What the way to the registry may need. All other settings of pip and uv are left out.
KEPT = {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY", "UV_HTTP_TIMEOUT"}
STEP = """
import torch
from structlin_nn.torch import StructuredLinear
layer = StructuredLinear(24, 36, structure="block_tensor_train", rank=2)
layer(torch.randn(5, 24)).square().mean().backward()
assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
print("torch", torch.__version__)
"""


def environment() -> dict[str, str]:
    left_out = ("PIP_", "UV_", "PYTHON", "VIRTUAL_ENV")
    return {
        **{name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(left_out)},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",  # several gigabytes
        "MPLBACKEND": "Agg",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",  # the oldest that torch has files for
    }


def run(*command: str | Path, folder: Path, text: str = "") -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode} from {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout() -> Iterator[Path]:
    """A copy of the project's files, deleted afterwards: the environment made in it is large."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "structlin"
        copy.mkdir()
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copyfile(path, copy / path.name)
        for package in ("structlin", "structlin_nn"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        yield copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    run(sys.executable, "-m", "uv", "build", "-q", "--wheel", "--no-config", "--out-dir", "dist", folder=checkout)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


@pytest.mark.parametrize("extra", [*EXTRAS, ",".join(EXTRAS)])
@pytest.mark.parametrize("target", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_resolves(python: str, target: str, extra: str, wheel: Path) -> None:
    # uv evaluates environment markers for the target, pip for the Python that runs it. No package has to be compiled.
    options = ["--no-config", "--only-binary", ":all:", "--no-python-downloads", "--python", sys.executable]
    options += ["--python-version", python, "--python-platform", PLATFORMS[target], "-c", str(ROOT / "constraints.txt")]
    requirement = f"structlin[{extra}] @ {wheel.as_uri()}"
    resolved = run(sys.executable, "-m", "uv", "pip", "compile", "-", *options, folder=wheel.parent, text=requirement)
    assert "\ncola-ml==0.0.7\n" in resolved


@pytest.mark.timeout(1800)
def test_installs(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The first command of README.md, with the quick form of its job, as tests/test_readme.py runs it.
    job = "structlin demo --quick"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = readme.partition(f"<!-- tested as: {job} -->\n```sh\n")[2].partition("```")[0]
    assert "pip install" in command
    start = time.perf_counter()
    run("bash", "-euo", "pipefail", "-c", command.replace("structlin demo", job), folder=checkout)
    seconds = time.perf_counter() - start
    size = sum(path.lstat().st_size for path in (checkout / ".venv").rglob("*"))

    python = checkout / ".venv" / "bin" / "python"
    versions = run(python, "-P", "-c", STEP, folder=checkout)
    # In this environment, as a dry run too downloads what it would install, and torch is here already.
    every = f".[{','.join(EXTRAS)}]"
    run(python, "-m", "pip", "install", "--dry-run", "-c", "constraints.txt", every, folder=checkout)
    with capsys.disabled():
        text = f"\ninstalled and ran {job!r} in {seconds:.0f} s, {size / 1e9:.1f} GB on disk: {versions}"
        print(text, end="", file=sys.stderr)  # workers of xdist have no other output
