"""Runs in flax: the same record as in torch, to the bit after an interruption, and one checkpoint for both."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structlin_nn.training.checkpoint import load_checkpoint
from structlin_nn.training.config import TrainConfig
from structlin_nn.training.loop import CHECKPOINT, RECORD, RunResult, fit, load_trained, setup
from structlin_nn.training.records import read_record

COMMON: dict[str, Any] = {
    "data_set": "cifar10", "width": 24, "depth": 1, "structure": "block_tensor_train", "options": {"rank": 2},
    "batch_size": 32, "threads": 1, "epochs": 1, "rms_cap": True,
}  # fmt: skip
VIT = {"model": "cifar-vit", "optimizer": "adamw", "weight_decay": 0.05, "clip": 0.5, "ema": 0.9, "accumulate": 2}


class Stop:
    """Says True after a number of steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train(config: TrainConfig, folder: Path, data: Path, stop_after: int | None = None, **options: Any) -> RunResult:
    made = setup(config, folder, data_root=data, verify=False, **options)
    return fit(made, stop=None if stop_after is None else Stop(stop_after))


def assert_close(ours: Any, theirs: Any, path: str = "") -> None:
    """Losses to 1e-4 relative, statistics to 1e-3, everything else equal; of few images, one may be wrong in one."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key in theirs:
            if key not in ("seconds", "started"):
                assert_close(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, float) and path.endswith("error"):
        assert ours == pytest.approx(theirs, abs=0.011), path
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3 if "statistics" in path else 1e-4, abs=1e-6), path
    else:
        assert ours == theirs, path


def compare(config: TrainConfig, data: Path, folder: Path) -> None:
    """A run in each framework, and everything that is written of it."""
    results = {f: train(config.replace(framework=f), folder / f, data) for f in ("torch", "flax")}
    theirs, ours = (read_record(results[f].record) for f in ("torch", "flax"))
    for line, expected in zip(ours.evaluations, theirs.evaluations, strict=True):
        assert_close(line, expected)
    assert theirs.evaluations[-1]["train_loss"] < theirs.evaluations[0]["train_loss"]
    assert {k: v for k, v in ours.header["config"].items() if k != "framework"} == {
        k: v for k, v in theirs.header["config"].items() if k != "framework"
    }
    assert ours.header["structures"] == theirs.header["structures"]
    assert ours.header["counts"] == theirs.header["counts"]
    assert ours.header["versions"].keys() - theirs.header["versions"].keys() == {"jax", "flax", "optax"}
    states = [load_checkpoint(folder / f / CHECKPOINT) for f in ("flax", "torch")]
    for part in ("model", "optimizer", "average"):
        assert states[0][part].keys() == states[1][part].keys()
    theirs_names = states[1]["optimizer"]  # the buffers are equal integers
    ours_all, theirs_all = (torch.cat([s["model"][n].double().flatten() for n in theirs_names]) for s in states)
    # Adam divides by the size of the gradient, so that rounding shows where gradients are tiny: no closer than this.
    assert (ours_all - theirs_all).norm() < 0.02 * theirs_all.norm()


def test_is_the_run_in_torch(small_cifar: Path, tmp_path: Path) -> None:
    compare(TrainConfig(**COMMON), small_cifar, tmp_path)


@pytest.mark.slow
def test_vit_with_every_option_is_the_run_in_torch(small_cifar: Path, tmp_path: Path) -> None:
    compare(TrainConfig(**{**COMMON, **VIT, "input_lr_mult": 0.5, "epochs": 2}), small_cifar, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, VIT], ids=["mlp", "vit"])
def test_resumes_to_the_bit(more: dict[str, Any], small_cifar: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**COMMON, **more, "framework": "flax", "epochs": 2})
    train(config, tmp_path / "whole", small_cifar)
    for stop in (3, 6, None):
        train(config, tmp_path / "parts", small_cifar, stop_after=stop, resume=True)
    whole, parts = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
    for name, entries in whole["optimizer"].items():
        assert all(torch.equal(entries[key], parts["optimizer"][name][key]) for key in entries), name
    lines = [read_record(tmp_path / name / RECORD).evaluations for name in ("whole", "parts")]
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in record] for record in lines]
    assert strip[0] == strip[1]


@pytest.mark.slow
@pytest.mark.parametrize("frameworks", [("torch", "flax"), ("flax", "torch")])
def test_goes_on_from_a_checkpoint_of_the_other(frameworks: tuple[str, str], small_cifar: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**COMMON, **VIT, "model": "cifar-mlp"})
    train(config, tmp_path / "whole", small_cifar)
    first, second = frameworks
    train(config.replace(framework=first), tmp_path / "parts", small_cifar, stop_after=4)
    train(config.replace(framework=second), tmp_path / "parts", small_cifar, resume=True)
    whole, parts = (read_record(tmp_path / name / RECORD) for name in ("whole", "parts"))
    for line, expected in zip(parts.evaluations, whole.evaluations, strict=True):
        assert_close(line, expected)


@pytest.mark.slow
def test_kill_and_resume_on_the_command_line(small_cifar: Path, tmp_path: Path) -> None:
    """kill -9 after a checkpoint, then --resume: the record of a run that was left alone."""

    def command(out: str, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "structlin_nn.cli", "train", "cifar", "--framework", "flax",
            "--data", str(small_cifar),
            "--unverified", "--width", "16", "--structure", "monarch", "--epochs", "3", "--batch-size", "16",
            "--eval-every", "1", "--threads", "1", "--quiet", "--out", out, *more,
        ]  # fmt: skip

    subprocess.run(command(str(tmp_path / "whole")), check=True)
    process = subprocess.Popen(command(str(tmp_path / "parts"), "--checkpoint-minutes", "0"))
    record = tmp_path / "parts" / RECORD
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (record.exists() and record.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command(str(tmp_path / "parts"), "--resume"), check=True)
    lines = [read_record(tmp_path / name / RECORD).evaluations for name in ("whole", "parts")]
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in each] for each in lines]
    assert strip[0] == strip[1]
    assert len(strip[0]) == 4


def test_what_flax_does_not_do_is_refused() -> None:
    for name, value in (("precision", "bfloat16"), ("compile", True), ("recompute", True)):
        with pytest.raises(ValueError, match=f"{name} must be .* with framework='flax', got {value!r}"):
            TrainConfig(framework="flax", **{name: value})
    with pytest.raises(ValueError, match="unknown framework 'jax'"):
        TrainConfig(framework="jax")


@pytest.mark.slow
def test_trained_model_is_the_torch_model(small_cifar: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**COMMON, "framework": "flax"})
    made = setup(config, tmp_path, data_root=small_cifar, verify=False)
    fit(made)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        expected = load_trained(tmp_path)(x)
    torch.testing.assert_close(made.call(x), expected, rtol=1e-4, atol=1e-5)
