"""What the documents say of counts."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import operations_table
import pytest

from structlin_nn.counting import count_model

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_lists_of_operations() -> None:
    """After a change: python docs/operations_table.py --write."""
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    recorded = re.search(r"Of (torch .* and jax .*)\.\n", text)
    assert recorded is not None
    if recorded[1] != operations_table.versions():
        pytest.skip(f"the lists are of {recorded[1]}, installed are {operations_table.versions()}")
    # Other libraries may have added operations in this process.
    run = subprocess.run([sys.executable, operations_table.__file__], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == operations_table.LISTS.recorded


def test_macs_of_the_scaling_laws() -> None:
    """The table of accounting.md has the MACs of the command that it names."""
    text = (DOCS / "accounting.md").read_text(encoding="utf-8")
    assert "with `--factorization greedy`" in text
    table = re.search(r"structure,rank,width,forward_macs,val_error\n(.*?)\"\"\"", text, re.DOTALL)
    assert table is not None
    rows = list(csv.reader(table[1].splitlines()))
    assert len(rows) == 6
    for structure, rank, width, macs, _ in rows:
        options = {"rank": int(rank), "factorization": "greedy"} if rank else {}
        found = count_model("imagenet-vit", width=int(width), structure=structure, options=options)
        assert found["forward_macs"] == int(macs)
