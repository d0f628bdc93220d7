"""Sphinx extension: committed results, pictures and experiments in the documentation.

``{benchmarks} NAME`` shows every benchmarks/results/PROCESSOR/NAME*.json that exists, by processor: a plot where there
is a benchmarks/plot_NAME.py, and the table that benchmarks/NAME.py prints. ``{benchmarks} NAME KIND`` shows the files
NAME-KIND*.json alone. ``{picture} NAME`` draws a picture of docs/pictures.py. ``{experiments}`` shows the docstrings of
the files of structlin_nn/configs/.
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
DOCS = ROOT / "docs"
PLOTS = DOCS / "_build" / "plots"


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
            read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
            section += nodes.title(
                "", max((load("pictures", DOCS).processor_of(result) for _, result in read), key=len)
            )
            for path, result in read:
                text = load("_measure").describe(result)
                shown: list[nodes.Node] = [nodes.paragraph("", text + ".")]
                if plot.exists():
                    load(plot.stem).plot(result, plot_path(file := f"{folder}-{path.stem}"))
                    shown.append(image_of(file, f"{path.stem} on {text.partition(',')[0]}"))
                section += folded(path.stem, shown + tables(load(name).report(result), result))
            found.append(section)
        return found


class Picture(SphinxDirective):
    """A picture of docs/pictures.py, drawn for this build."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        pictures = load("pictures", DOCS)
        if name not in pictures.PICTURES:
            raise self.error(f"docs/pictures.py has no picture {name!r}; it draws {', '.join(pictures.PICTURES)}")
        for path in (DOCS / "pictures.py", ROOT / "setup.cfg", *BENCHMARKS.glob("results/*/layers*.json")):
            self.env.note_dependency(str(path))
        draw, text = pictures.PICTURES[name]
        draw(plot_path(name))
        return [image_of(name, text)]


def plot_path(name: str) -> Path:
    """Return the path of a picture in a folder that git ignores."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    return PLOTS / f"{name}.png"


def image_of(name: str, alt: str) -> nodes.image:
    """Return the image node of a picture in that folder."""
    return nodes.image(uri=f"/{plot_path(name).relative_to(DOCS)}", alt=alt)


def tables(table: str, result: Mapping[str, object]) -> list[nodes.Node]:
    """Return a table and the settings as text; a table that is wider than the page has its own scroll bar."""
    setting = {k: v for k, v in result.items() if not (isinstance(v, list) and v and isinstance(v[0], dict))}
    text = "\n".join(f"{key}: {shown(value)}" for key, value in setting.items())
    return [
        nodes.literal_block(table, table, language="text"),
        nodes.literal_block(text, text, language="text", classes=["wrapped"]),
    ]


def folded(summary: str, content: list[nodes.Node]) -> list[nodes.Node]:
    """Fold content behind a summary line."""
    opened = f'<details class="result"><summary>{summary}</summary>'
    return [nodes.raw("", opened, format="html"), *content, nodes.raw("", "</details>", format="html")]


class Experiments(SphinxDirective):
    """The experiments of the paper: a section each, from the docstring of its file."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for name in names():
            title, _, text = (inspect.getdoc(sys.modules[configs(name)]) or "").partition("\n\n")
            section = nodes.section(ids=[f"experiment-{name}"])
            section += nodes.title(title, title.rstrip("."))
            section += nodes.literal_block(text, text, language="text", classes=["wrapped"])
            found.append(section)
        return found


def configs(name: str) -> str:
    """Return the module of a sweep."""
    module = f"structlin_nn.configs.{name.replace('-', '_')}"
    importlib.import_module(module)
    return module


def shown(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def load(name: str, folder: Path = BENCHMARKS) -> Any:
    """Import a module of benchmarks/ or docs/."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("benchmarks", Benchmarks)
    app.add_directive("picture", Picture)
    app.add_directive("experiments", Experiments)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
