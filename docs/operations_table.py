"""The lists of docs/operations.md: which operations of torch and of jax compute products.

    python docs/operations_table.py --write

Every name in the registries of the installed torch and jax is asked for its list.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import jax
import torch
from jax._src.interpreters import ad, mlir

from structlin_nn.flax import _primitives
from structlin_nn.torch.counting import classify_name, operation_names

DOCUMENT = Path(__file__).parent / "operations.md"
BEGIN, END = "<!-- made by docs/operations_table.py -->", "<!-- end -->"
TITLES = {
    "product": "Products, with a formula",
    "unknown": "Unknown",
    "no product": "No product",
    "composite": "Made of others, which are counted",
}


def primitives() -> list[str]:
    """Names of the primitives that jax can lower or differentiate."""
    from jax.experimental import sparse

    assert sparse is not None  # its import makes its primitives
    found = [*mlir._lowerings, *(p for rules in mlir._platform_specific_lowerings.values() for p in rules)]
    return sorted({p.name for p in (*found, *ad.primitive_jvps)})


def lists(names: Iterable[str], title: str, of: dict[str, str]) -> list[str]:
    """Format a section: the names of each list."""
    found = defaultdict(list)
    for name in names:
        found[of[name]].append(name.removeprefix("aten::"))
    lines = [f"## {title}", ""]
    for key, heading in TITLES.items():
        lines += [f"### {heading}: {len(found[key])}", "", ", ".join(f"`{name}`" for name in found[key]) or "None.", ""]
    return lines


def versions() -> str:
    """Return the versions of the libraries that the lists are made from."""
    return f"torch {torch.__version__.partition('+')[0]} and jax {jax.__version__}"


def made() -> str:
    """Return the text between the marks."""
    aten = [name for name in operation_names() if name.startswith("aten::")]
    ours = [name for name in primitives() if "structlin" not in name]
    lines = [f"Of {versions()}.", ""]
    lines += lists(aten, "torch: `aten`", {name: classify_name(name) for name in aten})
    lines += lists(ours, "jax", {name: _primitives.classify(name) for name in ours})
    return "\n".join(lines)


def written(text: str) -> str:
    """Return the document with the generated text in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the document; else print")
    if parser.parse_args().write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(made())


if __name__ == "__main__":
    main()
