"""Counts of some published architectures (benchmarks/counts.py has many), and of mixtures of experts by formulas."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from structlin_nn.torch import count

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("benchmark_counts", ROOT / "benchmarks" / "counts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnetx_002", "convnext_atto", "levit_128s"])
def test_timm(script: ModuleType, name: str) -> None:
    """With convolutions in groups, whose gradients torch's counter takes for those of every channel."""
    row = script.compare(name, *script.build_timm(name))
    assert row["exact"], row
    assert row["unknown"] == {}


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "mobilenet_v2"])
def test_transformers(script: ModuleType, name: str) -> None:
    row = script.compare(name, *script.build_transformers(name))
    assert row["exact"], row


def test_correction_of_the_reference(script: ModuleType) -> None:
    """For a convolution in two groups, each gradient costs as much as the forward pass."""
    layer = nn.Conv2d(6, 8, 3, groups=2, device="meta")
    x = torch.ones(2, 6, 7, 5, device="meta", requires_grad=True)
    forward = 2 * 8 * 5 * 3 * 3 * 9
    assert [script.reference(layer, {"input": x}, train) for train in (False, True)] == [forward, 3 * forward]


def test_mixture_of_experts_against_formulas(script: ModuleType) -> None:
    """Each token meets two of six experts, of three layers; the router, attention, and the head."""
    rows = {row["name"]: row for row in script.expert_models(("mixtral", "gpt_oss"))}
    assert all(row["exact"] for row in rows.values()), rows
    tokens, d, f, heads, size, keys = 32, 64, 96, 4, 16, 2
    projections = 2 * d * heads * size + 2 * d * keys * size
    scores = 2 * 2 * 16 * 16 * heads * size
    block = tokens * (projections + 6 * d + 2 * 3 * d * f) + scores
    assert rows["mixtral"]["grouped_mm"] == [2 * block + tokens * d * 128, 3 * (2 * block + tokens * d * 128)]


def test_long_short_term_memory_against_formulas() -> None:
    """What a CPU fuses into one operation counts as on the meta device: 4 gates of 10 for 8 features and 10 states."""
    for device in ("cpu", "meta"):
        layer = nn.LSTM(8, 10, batch_first=True, device=device)
        assert count(layer, torch.ones(4, 7, 8, device=device)).macs("linear") == 4 * 7 * 4 * 10 * (8 + 10)


def test_recorded_models() -> None:
    """What was recorded of all models: 150 of timm and 50 of transformers or more, none of them different."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "counts.json").read_text(encoding="utf-8"))
    for library, number in (("timm", 150), ("transformers", 50)):
        rows = [row for row in recorded[library] if "left_out" not in row]
        assert len(rows) >= number
        assert [row["name"] for row in rows if not row["exact"]] == []
        assert all(row["training_macs"] > 2 * row["forward_macs"] for row in rows)
    assert len(recorded["experts"]) >= 5
    assert all(row["exact"] for row in recorded["experts"])
