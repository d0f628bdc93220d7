"""Evaluations in TensorBoard and Weights & Biases."""

import importlib.util
from pathlib import Path

import pytest

from structlin_nn.cli import main
from structlin_nn.training.records import read_record
from structlin_nn.training.tracking import check_tracker, scalars

ARGUMENTS = [
    "train", "cifar", "--width", "16", "--structure", "low_rank", "--epochs", "1", "--batch-size", "5000",
    "--eval-every", "1", "--no-augment", "--threads", "1", "--quiet",
]  # fmt: skip


def test_unknown_and_absent_trackers_are_refused_before_the_run(tmp_path, capsys, monkeypatch):
    assert main([*ARGUMENTS, "--out", str(tmp_path / "run"), "--track", "tensorbord"]) == 2
    assert "tensorbord" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"structlin\[tracking\]"):
        check_tracker("wandb")
    assert not (tmp_path / "run").exists()


def test_scalars_are_the_numbers_alone():
    assert scalars({"a": 1, "b": None, "c": "text", "d": {"e": 2.5, "f": True}}) == {"a": 1.0, "d/e": 2.5}


def test_tensorboard_shows_what_the_record_holds(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*ARGUMENTS, "--out", str(tmp_path / "run"), "--track", "tensorboard"]) == 0
    evaluations = read_record(tmp_path / "run" / "record.jsonl").evaluations
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("test_loss")]
    assert shown == [(e["step"], pytest.approx(e["test_loss"], rel=1e-6)) for e in evaluations]
    assert "statistics/feature_rms" in events.Tags()["scalars"]


@pytest.mark.slow
def test_wandb_gets_a_run_without_a_network(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main([*ARGUMENTS, "--out", str(tmp_path / "run"), "--track", "wandb"]) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
