"""The package as it is distributed: metadata, dependencies, contents of the wheel, cost of the import."""

import ast
import configparser
import email
import email.message
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import structlin

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("structlin", "structlin_nn")
EXTRAS = {"", "torch", "jax", "train", "vision", "text", "tracking", "transformers", "test", "docs", "cluster", "peers"}
MAX_LINES = 600
MAX_IMPORT_SECONDS = 0.5
DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".npz", ".png", ".svg"}
# Import names that differ from the name of the distribution. plum comes with cola-ml, which pins it.
OPTIONAL = ("structlin_nn/torch/peft.py", "structlin_nn/torch/transformers.py", "structlin/execution/fused/_kernels.py")
DISTRIBUTIONS = {"PIL": "pillow", "cola": "cola-ml", "orbax": "orbax-checkpoint", "plum": "cola-ml"}
TRAINING_MODULES = {
    "PIL", "flax", "matplotlib", "optax", "pandas", "safetensors", "structlin_nn", "timm", "torchvision", "tqdm",
    "tyro",
}  # fmt: skip


def repository_files() -> list[Path]:
    """Files that are tracked, or would be by `git add .`; relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout to tell the project's files from others")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for name in listed.split("\0") if name and (ROOT / (path := Path(name))).is_file())


def sources(folder: str) -> list[Path]:
    return [path for path in repository_files() if path.parts[0] == folder and path.suffix == ".py"]


def run_python(code: str, *arguments: str, path: Path | None = None) -> str:
    """What a new interpreter prints; it imports the packages from `path`, or from where this process does."""
    environment = dict(os.environ, PYTHONPATH=str(path or Path(structlin.__file__).parents[1]))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(config: configparser.ConfigParser) -> dict[str, list[Requirement]]:
    """Requirements by extra; those of the core under the empty string."""
    lists = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in lists.items()}


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator, f"constraints.txt: {line!r} does not pin one version"
        found[canonicalize_name(name)] = version
    assert len(found) == len(lines), "constraints.txt pins a package twice"
    return found


class TestVersion:
    def test_is_stated_in_one_place(self, config: configparser.ConfigParser) -> None:
        assert config["metadata"]["version"] == "attr: structlin.__version__"
        assert re.fullmatch(r"\d+\.\d+\.\d+", structlin.__version__)
        version = re.compile(rf"(?<![\d.]){re.escape(structlin.__version__)}(?![\d.])")
        stated = [
            path.as_posix()
            for path in repository_files()
            if path.as_posix() in ("setup.cfg", "pyproject.toml") or path.parts[0] in PACKAGES
            if path.suffix in (".py", ".cfg", ".toml")
            if version.search((ROOT / path).read_text(encoding="utf-8"))
        ]
        assert stated == ["structlin/__init__.py"]


def imported() -> dict[str, Any]:
    """What a new process finds after ``import structlin``, and after ``import structlin_nn.torch``."""
    code = """
import sys, time, json
import cola
before = set(sys.modules)
start = time.process_time()
import structlin
seconds = time.process_time() - start
modules = sorted(set(sys.modules) - before)
import structlin_nn.torch
print(json.dumps({"seconds": seconds, "modules": modules, "compiler": "torch._dynamo" in sys.modules}))
"""
    return json.loads(run_python(code).splitlines()[-1])


@pytest.fixture(scope="module")
def first_import() -> dict[str, Any]:
    return imported()


class TestImport:
    def test_is_fast_and_leaves_training_dependencies_alone(self, first_import: dict[str, Any]) -> None:
        packages = {name.partition(".")[0] for name in first_import["modules"]}
        assert "structlin" in packages
        assert packages & TRAINING_MODULES == set()
        seconds = first_import["seconds"]
        if seconds >= MAX_IMPORT_SECONDS:  # of a busy machine
            seconds = imported()["seconds"]
        assert seconds < MAX_IMPORT_SECONDS


class TestFiles:
    def test_are_short(self) -> None:
        lengths = {
            path.as_posix(): len((ROOT / path).read_bytes().splitlines())
            for path in repository_files()
            if path.suffix not in DATA_SUFFIXES
        }
        assert len(lengths) > 10
        assert {name: lines for name, lines in lengths.items() if lines >= MAX_LINES} == {}

    def test_name_no_path_of_one_machine(self) -> None:
        # Spelled in parts so that this file does not match itself.
        folders = [("work",), ("farm",), ("opt", "wheels"), ("opt", "pypi"), ("tmp", "venv"), ("root",)]
        paths = re.compile(b"|".join(rb"(?<![\w.}])/" + "/".join(parts).encode() + rb"\b" for parts in folders))
        named = [path.as_posix() for path in repository_files() if paths.search((ROOT / path).read_bytes())]
        assert named == []


class TestRequirements:
    def test_extras(self, config: configparser.ConfigParser) -> None:
        assert set(requirements(config)) == EXTRAS

    def test_all_have_a_tested_version_within_their_range(self, config: configparser.ConfigParser) -> None:
        tested = pins()
        for extra, wanted in requirements(config).items():
            for requirement in wanted:
                if requirement.name == "structlin":
                    assert requirement.extras <= set(requirements(config)), f"extra {extra!r}: {requirement}"
                    continue
                name = canonicalize_name(requirement.name)
                assert name in tested, f"extra {extra!r}: constraints.txt does not pin {name}"
                assert tested[name] in requirement.specifier, f"extra {extra!r}: {requirement}, {tested[name]}"
                assert requirement.specifier, f"extra {extra!r}: {name} has no lower bound"

    def test_cola_is_pinned(self, config: configparser.ConfigParser) -> None:
        assert "cola-ml==0.0.7" in map(str, requirements(config)[""])

    @pytest.mark.parametrize(
        ("folder", "extras"),
        [
            ("structlin", ("", "torch", "jax", "peers")),
            ("structlin_nn", tuple(sorted(EXTRAS - {"test", "docs"}))),
            ("tests", tuple(sorted(EXTRAS - {"docs"}))),
        ],
    )
    def test_cover_every_import(self, config: configparser.ConfigParser, folder: str, extras: tuple[str, ...]) -> None:
        declared = {canonicalize_name(r.name) for extra in extras for r in requirements(config)[extra]}
        files = sources(folder)
        # Tests also import the scripts of docs/ and benchmarks/, and what they share.
        scripts = [*files, *sources("docs"), *sources("benchmarks")] if folder == "tests" else []
        local = {*PACKAGES, "helpers", *(path.stem for path in scripts)}
        undeclared = {
            (path.as_posix(), module)
            for path in files
            for module, _ in imports(ROOT / path)
            if module not in sys.stdlib_module_names and module not in local
            if module != "triton"  # comes with torch for CUDA
            if canonicalize_name(DISTRIBUTIONS.get(module, module)) not in declared
        }
        assert files
        assert undeclared == set()

    def test_core_imports_torch_and_jax_only_where_used(self, first_import: dict[str, Any]) -> None:
        eager = {
            (path.as_posix(), module)
            for path in sources("structlin")
            for module, at_import in imports(ROOT / path)
            if at_import and module in ("torch", "jax")
        }
        # Modules for one library alone, which are themselves imported only where they are used.
        alone = {
            "torch": "blocks torch_ways torch_cpu _guard _memory _gradients token_major batched _ordered chunked "
            "strided torch_cuda traffic fused compiled.passes compiled.stored",
            "jax": "jax_ways jax_cpu compiled.xla",
        }
        modules = {f"structlin.execution.{name}": lib for lib, names in alone.items() for name in names.split()}
        files = {name: Path(*name.split(".")) for name in modules}
        paths = {n: p / "__init__.py" if (ROOT / p).is_dir() else p.with_suffix(".py") for n, p in files.items()}
        assert eager == {(paths[name].as_posix(), library) for name, library in modules.items()}
        assert set(first_import["modules"]) & set(modules) == set()
        assert not first_import["compiler"], "torch's compiler takes seconds to import"


def imports(source: Path) -> Iterator[tuple[str, bool]]:
    """(top-level module, whether importing the file imports it) for every absolute import in the file."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], at_import
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import)

    return visit(ast.parse(source.read_text(encoding="utf-8")), True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """A wheel from a copy of the project's files, so that nothing stale in build/ gets into it."""
    copy = tmp_path_factory.mktemp("source")
    for path in repository_files():
        if path.parts[0] in PACKAGES or len(path.parts) == 1:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--wheel-dir", "wheels"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "wheels").iterdir()
    return zipfile.Path(wheel)


@pytest.fixture(scope="module")
def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.Path, names: set[str]) -> email.message.Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.root.read(name))


class TestWheel:
    def test_holds_the_files_of_both_packages_and_nothing_else(self, names: set[str]) -> None:
        expected = {path.as_posix() for path in repository_files() if path.parts[0] in PACKAGES}
        assert {f"{package}/py.typed" for package in PACKAGES} <= expected
        assert {name for name in names if ".dist-info/" not in name} == expected

    def test_metadata(self, metadata: email.message.Message, names: set[str]) -> None:
        assert metadata["Name"] == "structlin"
        assert Version(metadata["Version"]) == Version(structlin.__version__)
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.11"
        assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    def test_every_module_imports_and_the_command_starts(
        self, wheel: zipfile.Path, names: set[str], tmp_path: Path
    ) -> None:
        wheel.root.extractall(tmp_path)
        modules = sorted(
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in names
            if name.endswith(".py") and not name.endswith("__main__.py")
            # They import what may not be installed, and torchvision, which conftest.py repairs for the tests alone.
            if name not in OPTIONAL
        )
        imported = run_python(
            "import importlib, sys\nfor name in sys.argv[1:]:\n    print(importlib.import_module(name).__file__)\n"
            "from structlin_nn.cli import main\nsys.exit(main(['--help']))",
            *modules,
            path=tmp_path,
        ).splitlines()
        imported, told = imported[: len(modules)], imported[len(modules) :]
        assert len(imported) == len(modules) > 10
        assert all(file.startswith(str(tmp_path)) for file in imported)

        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(wheel.root.read(entry_points).decode())
        assert dict(parser["console_scripts"]) == {"structlin": "structlin_nn.cli:main"}
        assert "structures" in "".join(told)
