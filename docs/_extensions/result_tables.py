"""Sphinx extension: committed results and experiments in the documentation.

``{benchmarks} NAME`` shows every benchmarks/results/PROCESSOR/NAME*.json that exists, by processor, as
benchmarks/NAME.py prints it, with a plot where there is a benchmarks/plot_NAME.py; ``{benchmarks} NAME KIND`` shows the
files NAME-KIND*.json alone. ``{experiments}`` shows what the files of structlin_nn/configs/ say of themselves.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from structlin_nn.sweeps import names

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PLOTS = ROOT / "docs" / "_build" / "plots"


class Benchmarks(SphinxDirective):
    """The committed results of a benchmark: a section for each processor, with plots, tables and settings."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script, plot = BENCHMARKS / f"{name}.py", BENCHMARKS / f"plot_{name}.py"
        if not script.exists():
            raise self.error(f"benchmarks/{script.name} does not exist")
        files = BENCHMARKS.glob(f"results/*/{'-'.join(self.arguments)}*.json")
        results = sorted(files, key=lambda path: (path.parent.name, path.stem))
        for path in (script, plot, *results):
            self.env.note_dependency(str(path))
        found: list[nodes.Node] = []
        for folder, paths in groupby(results, key=lambda path: path.parent.name):
            section = nodes.section(ids=[f"{'-'.join(self.arguments).replace('_', '-')}-{folder}"])
            for path in paths:
                result = json.loads(path.read_text(encoding="utf-8"))
                text = load("_measure").describe(result)
                if not section.children:
                    section += nodes.title("", text.partition(",")[0].partition(" (")[0])
                section += nodes.rubric("", path.stem)
                section += nodes.paragraph("", text + ".")
                if plot.exists():
                    section += self.plotted(load(plot.stem), result, f"{folder}-{path.stem}.png")
                section += folded(load(name).report(result), result)
            found.append(section)
        return found

    def plotted(self, plot: Any, result: Mapping[str, object], file: str) -> nodes.image:
        """Draw a result in a folder that git ignores."""
        PLOTS.mkdir(parents=True, exist_ok=True)
        plot.plot(result, PLOTS / file)
        where = f"/{PLOTS.relative_to(ROOT / 'docs')}/{file}"
        return nodes.image(uri=where, alt=f"{file.removesuffix('.png')}: efficiency of each layer")


def folded(table: str, result: Mapping[str, object]) -> list[nodes.Node]:
    """Fold a wide table and the settings behind a summary line."""
    setting = {k: v for k, v in result.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
    text = "\n".join(f"{key}: {shown(value)}" for key, value in setting.items())
    blocks = [nodes.literal_block(part, part, language="text") for part in (table, text)]
    opened = '<details><summary>Table and settings</summary><div style="overflow-x: auto">'
    return [nodes.raw("", opened, format="html"), *blocks, nodes.raw("", "</div></details>", format="html")]


class Experiments(SphinxDirective):
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
    """Return the module of a sweep."""
    module = f"structlin_nn.configs.{name.replace('-', '_')}"
    importlib.import_module(module)
    return module


def shown(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def load(name: str) -> Any:
    """Import a module of benchmarks/."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("benchmarks", Benchmarks)
    app.add_directive("experiments", Experiments)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
