"""``structlin train``: from the options to a run, and from every end of a run to an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import structlin_nn
from structlin_nn.cli import main
from structlin_nn.cli.train import NAMES
from structlin_nn.data import load_images
from structlin_nn.training.config import recipe
from structlin_nn.training.records import read_record

QUICK = "--batch-size 1000 --epochs 1 --no-augment --mixup 0 --label-smoothing 0 --threads 1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_cifar(folder: Path) -> Path:
    """100 training images in five files, 20 test images."""
    data = load_images("fashion").as_32x32_rgb()
    (folder / "cifar-10-batches-bin").mkdir()
    for number in range(6):
        name = f"data_batch_{number + 1}.bin" if number < 5 else "test_batch.bin"
        part = slice(20 * number, 20 * number + 20)
        rows = [data.train_labels[part, None].astype(np.uint8), data.train_images[part].reshape(20, -1)]
        (folder / "cifar-10-batches-bin" / name).write_bytes(np.concatenate(rows, axis=1).tobytes())
    return folder / "cifar-10-batches-bin"


def test_on_the_embedded_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"train cifar --width 16 --structure monarch {QUICK}".split()) == 0
    out, err = capsys.readouterr()
    assert "data: fashion-32x32-rgb, 10,000 training and 2,000 test images; embedded" in err
    assert "--data DIR trains on CIFAR" in err
    assert "monarch 16: 100%" in err
    assert "img/s" in err
    assert re.search(r"error: train \d+\.\d\d %, test \d+\.\d\d %", out)
    record = read_record("runs/fashion-cifar-mlp-monarch-w16-seed0/record.jsonl")
    assert record.finished
    expected = recipe(
        "cifar-mlp", width=16, structure="monarch", batch_size=1000, epochs=1, augment=False, mixup=0,
        label_smoothing=0, threads=1,
    )  # fmt: skip
    assert record.header["config"] == expected.to_dict()

    assert main(f"train cifar --width 16 --structure monarch {QUICK}".split()) == 2
    assert "holds a run already: add --resume to go on, or choose another --out" in capsys.readouterr().err
    assert main(f"train cifar --width 16 --structure monarch {QUICK} --resume --quiet --json".split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    printed = json.loads(out)
    assert printed["test_loss"] == record.evaluations[-1]["test_loss"]
    assert printed["record"] == "runs/fashion-cifar-mlp-monarch-w16-seed0/record.jsonl"
    assert main(f"train cifar --width 16 --structure monarch {QUICK} --resume --lr 1".split()) == 2
    assert "another configuration: lr was 0.003 and is 1.0" in capsys.readouterr().err


def test_on_cifar_files(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --out run --data {small_cifar}"
    assert main(line.split()) == 2
    assert "data_batch_1.bin (" in capsys.readouterr().err
    assert not Path("run").exists()
    assert main([*line.split(), "--unverified"]) == 0
    assert "data: cifar10, 100 training and 20 test images" in capsys.readouterr().err
    assert read_record("run/record.jsonl").header["data"]["name"] == "cifar10"


def test_a_loss_that_is_not_finite(small_cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --out run --unverified --quiet --lr 1e30"
    assert main([*line.split(), "--data", str(small_cifar)]) == 1
    err = capsys.readouterr().err
    assert "finite" in err or "the loss is" in err
    assert f"the last good checkpoint is {Path('run') / 'checkpoint.pt'}" in err
    assert err.count("\n") == 1


def test_a_signal(small_cifar: Path) -> None:
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --epochs 100000 --eval-every 100000 --out run --unverified"
    code = "import sys; from structlin_nn.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *line.split(), "--data", str(small_cifar)]
    environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not Path("run/checkpoint.pt").exists():
            assert time.monotonic() < deadline, "no checkpoint after a minute"
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("structlin train: SIGTERM after step ")
    assert last.endswith("checkpoint written, go on with --out run --resume")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    out, _ = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(NAMES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cifar --set widht=3", "unknown key 'widht' in 'widht=3', did you mean 'width'?"),
        ("cifar --set width=3 --width 4", "width is given by --set and by an option of its own"),
        ("cifar --structure low_rank --rank 3 --set options.rank=4", "options.rank is given by --set and by"),
        ("gpt2 --set context=a", "the value in 'context=a' must be JSON"),
        ("gpt2 --set context=1.5 --data .", "context must be an integer, got 1.5"),
        ("gpt2", "--data is needed: a folder with train.bin and val.bin"),
        ("gpt2 --mixup 0.2", "unknown option --mixup"),
        ("gpt2 --data .", "train.bin is missing"),
        ("gtp2 --data .", "unknown name 'gtp2', did you mean gpt2?"),
        ("cifar-vit --model cifar-mlp", "unknown model 'cifar-mlp'"),
        ("imagenet --data nowhere --epochs 1 --warmup-epochs 0", "nowhere"),
        ("cifar --accumulate 3", "256 samples in a process's share cannot be split into 3 parts"),
        ("cifar --epochs 3 --steps 500 --batch-size 1000", "epochs must be 50, got 3"),
    ],
)
def test_misuse(line: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = " --epochs 1 --batch-size 256" if line == "cifar --accumulate 3" else ""
    assert main(["train", *(line + quick).split()]) == 2
    err = capsys.readouterr().err
    lines = err.splitlines()
    if "--data nowhere" in line:  # where the hub cannot be reached, its client tells of every attempt
        lines = [text for text in lines if text.startswith("structlin train: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(folder.iterdir()) == []


def test_set_decides_what_options_do_not(folder: Path) -> None:
    line = f"train cifar-mlp {QUICK} --structure low_rank --set options.rank=3 --set width=16 --set lr=0.01 --quiet"
    assert main(line.split()) == 0
    config = read_record("runs/fashion-cifar-mlp-low_rank-w16-seed0/record.jsonl").header["config"]
    assert (config["width"], config["lr"], config["options"]) == (16, 0.01, {"rank": 3})
