"""The lists of docs/operations.md: which operations of torch and of jax compute products.

    python docs/operations_table.py --write

Each operation in the registries of the installed torch and jax is in one list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import jax
import torch
from generated import Generated
from jax._src.interpreters import ad, mlir

from structlin_nn.flax import counting
from structlin_nn.torch.counting import classify_name, operation_names

TITLES = {
    "product": "Products, with a formula",
    "unknown": "Unknown",
    "no product": "No product",
    "composite": "Composite, counted by their parts",
}


def primitives() -> list[str]:
    """Return the names of the primitives that jax can lower or differentiate."""
    from jax.experimental import sparse

    assert sparse is not None  # the import registers its primitives
    found = [*mlir._lowerings, *(p for rules in mlir._platform_specific_lowerings.values() for p in rules)]
    return sorted({p.name for p in (*found, *ad.primitive_jvps)})


def lists(names: Iterable[str], title: str, of: dict[str, str]) -> list[str]:
    """Return a section: the names of each list."""
    found = defaultdict(list)
    for name in names:
        found[of[name]].append(name.removeprefix("aten::"))
    lines = [f"## {title}", ""]
    for key, heading in TITLES.items():
        lines += [f"### {heading}: {len(found[key])}", "", ", ".join(f"`{name}`" for name in found[key]) or "None.", ""]
    return lines


def versions() -> str:
    """Return the versions of the libraries whose lists these are."""
    return f"torch {torch.__version__.partition('+')[0]} and jax {jax.__version__}"


def made() -> str:
    """Return the lists of both libraries."""
    aten = [name for name in operation_names() if name.startswith("aten::")]
    ours = [name for name in primitives() if "structlin" not in name]
    lines = [f"Of {versions()}.", ""]
    lines += lists(aten, "torch: `aten`", {name: classify_name(name) for name in aten})
    lines += lists(ours, "jax", {name: counting.classify(name) for name in ours})
    return "\n".join(lines).rstrip()


LISTS = Generated(__file__, "operations.md", made)

if __name__ == "__main__":
    LISTS.main(__doc__)
