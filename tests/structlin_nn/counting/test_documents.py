"""What the documents say of counts."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import operations_table
import pytest
from helpers.children import output

# The jaxpr does not show the cost of these, or it depends on the positions of the values of two sparse arrays.
UNKNOWN = {
    "bcoo_spdot_general", "call_exported", "custom_lin", "ffi_call", "io_callback", "pallas_call", "pure_callback",
    "spsolve",
}  # fmt: skip
DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture(scope="module")
def registered() -> dict[str, Any]:
    """The page's lists and the primitives of jax, in a process where no other code has added operations."""
    code = (
        "import json, operations_table as table; from structlin_nn.flax import counting\n"
        "names = [name for name in table.primitives() if 'structlin' not in name]\n"
        "unknown = [name for name in names if counting.classify(name) == 'unknown']\n"
        "print(json.dumps({'made': table.made(), 'number': len(names), 'unknown': unknown}))"
    )
    return json.loads(output("-c", code, PYTHONPATH=os.pathsep.join([str(DOCS), os.environ.get("PYTHONPATH", "")])))


def test_lists_of_operations(registered: dict[str, Any]) -> None:
    """After a change: python docs/operations_table.py --write."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    recorded = re.search(r"Of (torch .* and jax .*)\.\n", text)
    assert recorded is not None
    if recorded[1] != operations_table.versions():
        pytest.skip(f"the lists are of {recorded[1]}, installed are {operations_table.versions()}")
    assert registered["made"] == operations_table.LISTS.recorded


def test_every_primitive_is_in_a_list(registered: dict[str, Any]) -> None:
    """An unlisted primitive of a new version of jax fails here."""
    assert registered["number"] > 250
    assert set(registered["unknown"]) <= UNKNOWN


def test_macs_of_the_scaling_laws() -> None:
    """The table of accounting.md has the MACs of the paper's models, which models/test_reference.py counts."""
    text = (DOCS / "accounting.md").read_text(encoding="utf-8")
    assert "with `--factorization greedy`" in text
    table = re.search(r"structure,rank,width,forward_macs,val_error\n(.*?)\"\"\"", text, re.DOTALL)
    assert table is not None
    rows = list(csv.reader(table[1].splitlines()))
    assert len(rows) == 6
    paper = json.loads((DOCS.parent / "tests/data/reference_models/imagenet-vit.json").read_text(encoding="utf-8"))
    names = {"dense": "none", "block_tensor_train": "btt_norm"}
    for structure, rank, width, macs, _ in rows:
        (found,) = (
            c["forward_macs"]
            for c in paper
            if (c["structure"], c["width"]) == (names[structure], int(width))
            and c["options"] == ({"tt_rank": int(rank)} if rank else {})
        )
        assert found == int(macs)
