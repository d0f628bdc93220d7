"""The comparison of compression methods runs, at equal costs, and its table has a row for each."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from structlin import execution

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import compress
import compress_text

ROOT = Path(__file__).parents[3]


def test_methods_are_compared_at_equal_costs(monkeypatch):
    training, validation = compress_text.text()
    monkeypatch.setattr(compress_text, "text", lambda: (training, validation[: 4 * compress_text.CONTEXT]))
    sizes = {"width": 32, "depth": 1, "steps": 3, "further": 2, "calibration": 2, "fractions": [0.5]}
    arguments = argparse.Namespace(**sizes, methods=list(compress_text.METHODS))
    with execution.using("products"):  # measures no ways to run
        rows = compress_text.run(0, arguments)
    assert [row["method"] for row in rows] == ["dense", *compress_text.METHODS]
    for row in rows[1:]:
        assert 0.4 < row["mac_fraction"] <= 0.5
        assert abs(row["param_fraction"] - row["mac_fraction"]) < 0.02  # biases
        assert torch.isfinite(torch.tensor([row["before"], row["after"]])).all()
    table = compress_text.report({"rows": rows}).splitlines()
    assert len(table) == 2 + len(rows)


def test_asvd_is_exact_at_full_rank():
    """Scaling by the inputs and back changes nothing where nothing is truncated."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128, "vocab_size": 256}
    model = compress_text.GPT2LMHeadModel(compress_text.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():  # of rank 4
        for name, parameter in model.named_parameters():
            if name.endswith(("c_fc.weight", "c_proj.weight", "c_attn.weight")):
                parameter.copy_(torch.randn(parameter.shape[0], 4) @ torch.randn(4, parameter.shape[1]) * 0.02)
    data = [torch.randint(256, (4, 16)) for _ in range(4)]
    before = model(data[0]).logits
    compress_text.METHODS["asvd"](model, 0.5, data)
    assert torch.allclose(model(data[0]).logits, before, atol=1e-3)


def test_the_page_has_the_table_of_the_record():
    (path,) = (ROOT / "benchmarks" / "results").glob("*/compress_text_study.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
    assert compress_text.report(record) in page
    assert str(path.relative_to(ROOT)) in page
    losses = {(row["seed"], row["vectors"], row["damping"]): row["change"] for row in record["rows"]}
    default = {key: value for key, value in losses.items() if key[1] and key[2] == compress_text.DAMPING}
    assert all(value < losses[seed, 0, 0.0] for (seed, _, _), value in default.items())


def test_numbers_of_vectors_are_compared(monkeypatch):
    monkeypatch.setattr(compress_text, "STUDY", ((0, 0.0), (256, 0.01), (128, 1.0)))
    with execution.using("products"):
        rows = compress_text.study(0, argparse.Namespace(width=32, depth=1, steps=2))
    assert [(row["vectors"], row["damping"]) for row in rows] == list(compress_text.STUDY)
    assert len({row["change"] for row in rows}) == 3
    assert len(compress_text.report({"rows": rows}).splitlines()) == 5


def test_images_are_compared_with_the_dense_network():
    sizes = {"width": 16, "epochs": 1, "structures": ["low_rank"], "calibration_images": 500}
    with execution.using("products"):
        dense, rows = compress.run(0, argparse.Namespace(**sizes, fractions=[1.0, 0.5, 0.001]))
    assert 0.1 < dense["test_error"] < 0.6
    exact, small, impossible = rows[:2], rows[2:4], rows[4:]
    for row in exact:
        assert abs(row["loss_change"]) < 1e-6
        assert abs(row["divergence"]) < 1e-6
    assert 0 < small[1]["divergence"] < small[0]["divergence"], "calibration keeps the predictions"
    assert all("budget" in row["error"] for row in impossible)
    table = compress.report({"rows": rows}).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[-1].endswith("| - | - | - |")
