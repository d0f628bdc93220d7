"""Models of timm and transformers: the table of docs/compatibility.md, and some of its rows."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("compatibility", ROOT / "benchmarks" / "compatibility.py")
table = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = table  # dataclasses look their module up
_spec.loader.exec_module(table)
CASES = {case.name: case for case in table.CASES}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "convnext_atto", "gpt2", "gemma2", "t5", "mamba"]
)
def test_replace_groups_train_save_and_load(name):
    assert table.check(CASES[name], table.QUICK) == dict.fromkeys(table.QUICK, "yes")


def test_models_have_names_of_their_own():
    assert len(CASES) == len(table.CASES) >= 25


@pytest.mark.slow
def test_the_page_is_what_the_script_finds():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    listed = [case for case in table.CASES if f"\n| {case.name} |" in page]
    assert listed
    assert page == table.page({case: table.check(case) for case in listed})
