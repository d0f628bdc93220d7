"""Sphinx extension: committed results and experiments in the documentation.

``{benchmark} NAME`` shows benchmarks/results/NAME.json as benchmarks/NAME.py prints it, ``{benchmark} NAME KIND`` shows
NAME-KIND.json; ``{experiments}`` shows what the files of structlin_nn/configs/ say of themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from structlin_nn.sweeps import names

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class Benchmark(Directive):
    """The committed result of a benchmark: its settings and its table."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script, result = BENCHMARKS / f"{name}.py", BENCHMARKS / "results" / f"{'-'.join(self.arguments)}.json"
        for path in (script, result):
            self.state.document.settings.record_dependencies.add(str(path))
            if not path.exists():
                raise self.error(f"benchmarks/{path.relative_to(BENCHMARKS)} does not exist")
        found = json.loads(result.read_text(encoding="utf-8"))
        setting = {k: v for k, v in found.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
        text = "\n".join(f"{key}: {shown(value)}" for key, value in setting.items())
        table = load(script).report(found)
        return [nodes.literal_block(text, text), nodes.literal_block(table, table)]


class Experiments(Directive):
    """The experiments of the paper: a section each, from the docstring of its file."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for name in names():
            title, _, text = (inspect.getdoc(sys.modules[configs(name)]) or "").partition("\n\n")
            section = nodes.section(ids=[f"experiment-{name}"])
            section += nodes.title(title, title.rstrip("."))
            section += nodes.literal_block(text, text)
            found.append(section)
        return found


def configs(name: str) -> str:
    """The module of a sweep."""
    module = f"structlin_nn.configs.{name.replace('-', '_')}"
    importlib.import_module(module)
    return module


def shown(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def load(script: Path) -> Any:
    """The module of a benchmark."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("benchmark", Benchmark)
    app.add_directive("experiments", Experiments)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
