"""The documentation builds, with warnings as errors, and has a page for each structure; its pictures show facts."""

import importlib
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import structlin
from structlin.structures.einsum_space import coordinates

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return importlib.import_module("pictures")


@pytest.mark.parametrize("name", ["einsum-space", "packages"])
def test_pictures_are_drawn(name: str, pictures: ModuleType, tmp_path: Path) -> None:
    pictures.PICTURES[name][0](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_picture_of_packages_has_every_module(pictures: ModuleType) -> None:
    for package, folder in (
        ("structlin", ROOT / "structlin"),
        ("structlin_nn", ROOT / "structlin_nn"),
        ("execution", ROOT / "structlin" / "execution"),
    ):
        drawn = [name for layer in pictures.layers_of(package) for name in layer]
        found = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        assert sorted(drawn) == sorted(found - {"__init__", "__main__"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}),
        ("low_rank", {"rank": 2**6}),
        ("kronecker", {}),
        ("tensor_train", {"rank": 2**3}),
        ("monarch", {"blocks": 2**6}),
        ("block_tensor_train", {"rank": 2**3}),
    ],
)
def test_named_structures_lie_where_the_map_of_einsums_has_them(
    name: str, options: dict[str, int], pictures: ModuleType
) -> None:
    """Exponents of a matrix of 2^12 rows, up to a constant factor of 2."""
    size = 2**12
    structure = structlin.design(name, (size, size), **options)
    found = coordinates(pictures.NAMED[name])
    assert math.log(structure.rank_bound, size) == pytest.approx(found.psi)
    assert 0 <= math.log(structure.macs, size) - (1 + found.nu) <= math.log(2.001, size)
    assert math.log(structure.macs / structure.num_params, size) == pytest.approx(found.omega, abs=0.09)


def test_picture_of_efficiency_takes_measured_rows_alone(pictures: ModuleType) -> None:
    found = pictures.measured()
    assert ("AMD EPYC (family 25, model 17)", "float32") in found
    for rows in found.values():
        assert {row["tokens"] for row in rows} == {1024}
        assert len({(row["structure"], row["widths"][0]) for row in rows}) == len(rows)


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
    assert dead_links(tmp_path / "html") == []


class Page(HTMLParser):
    """The anchors and the relative links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not urlsplit(value).scheme:
                self.links.append(value)


def dead_links(site: Path) -> list[str]:
    """Return the links within a site to files and anchors that do not exist.

    Pages of source code are left out: Sphinx links from them to each name under which an object can be imported.
    """
    pages = {path: Page(path) for path in site.rglob("*.html") if "_modules" not in path.parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            if not target.exists() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y">b</a> <a href="#x">a</a> <a href="c.html">c</a></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#x">a</a> <a href="https://example.org/#none">e</a>')
    assert dead_links(tmp_path) == ["a.html: b.html#y", "a.html: c.html"]
