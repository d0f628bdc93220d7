"""Checkpoints: whole or not at all, and no code in them."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from structlin_nn import _files as files
from structlin_nn._files import atomic_write
from structlin_nn.training.checkpoint import load_checkpoint, save_checkpoint

STATE = {"weights": torch.arange(1000.0), "step": 3, "plain": {"betas": (0.9, 0.99), "name": "x", "none": None}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    return path


def test_round_trip(path: Path) -> None:
    state = load_checkpoint(path)
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {key: STATE[key] for key in ("step", "plain")}
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_cut_off(path: Path, kept: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged or no checkpoint"):
        load_checkpoint(path)


def test_one_bit_of_a_weight(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    place = raw.index(STATE["weights"].numpy().tobytes()[:64]) + 40
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        load_checkpoint(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"version": 99, "state": {}}, path)
    with pytest.raises(ValueError, match="must be a checkpoint of version 2, got 99"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="version 2, got 'list'"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(path)


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("hostile",)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 2, "state": Hostile()}, "checkpoint.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    Path("plain.pickle").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(tmp_path / "plain.pickle")
    assert not Path("hostile").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_failed_write_leaves_the_last_one(path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"No space left|could not be written"):
        save_checkpoint(path, {"step": 4})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = path.with_name(".checkpoint.pt.partial")
    partial.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint|space"):
        save_checkpoint(path, STATE)
    assert load_checkpoint(path)["step"] == 3


def test_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    with atomic_write(tmp_path / "x") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]
