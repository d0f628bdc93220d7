"""``structlin train``: from the options to a run, and from every end of a run to an exit code."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from structlin_nn.cli import main
from structlin_nn.cli.train import NAMES, parse
from structlin_nn.recipes import cifar, recipe
from structlin_nn.records import read_record

QUICK = "--batch-size 1000 --epochs 1 --no-augment --mixup 0 --label-smoothing 0 --threads 1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_layers_with_more_macs_than_dense_ones_are_named(folder: Path, cli) -> None:
    told = "layers with more MACs than dense ones"
    for rank, text in ((16, f"{told}: 7 of 8; input has 49,408, and a dense one 49,152"), (1, None)):
        line = f"train cifar --width 16 --structure low_rank --options rank={rank} {QUICK} --steps 1 --out runs/{rank}"
        err = cli(line).err
        assert told not in err if text is None else text in err, err


def test_on_the_embedded_images(folder: Path, cli) -> None:
    line = f"train cifar --width 16 --structure monarch {QUICK}"
    out, err = cli(line)
    assert "data: fashion-32x32-rgb; training images 10,000, test images 2,000" in err
    assert "monarch 16: 100%" in err
    assert "img/s" in err
    table = out.splitlines()
    names = "step epoch train loss train error test loss test error batch loss seconds"
    assert table[0].split() == names.split()
    assert [row.split()[0] for row in table[2:4]] == ["0", "10"]
    folder = Path("runs/fashion-cifar-mlp-monarch-w16-seed0")
    record = read_record(folder / "record.jsonl")
    assert record.finished
    expected = recipe(
        "cifar-mlp", width=16, structure="monarch", batch_size=1000, epochs=1, augment=False, mixup=0,
        label_smoothing=0, threads=1,
    )  # fmt: skip
    assert record.header["config"] == expected.to_dict()

    assert "holds a run already: resume it (--resume), or choose another folder (--out)" in cli(line, code=2).err
    out, err = cli(line, "--resume", "--quiet", "--json")
    assert err == ""
    printed = json.loads(out)
    assert printed["test_loss"] == record.evaluations[-1]["test_loss"]
    assert printed["record"] == str(folder / "record.jsonl")
    assert "another configuration: lr was 0.003 and is 1.0" in cli(line, "--resume", "--lr", "1", code=2).err


def test_on_cifar_files(folder: Path, small_cifar: Path, cli) -> None:
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --out run --data {small_cifar}"
    assert "data_batch_1.bin" in cli(line, code=2).err
    assert not Path("run").exists()
    assert "data: cifar10; training images 240, test images 60" in cli(line, "--unverified").err
    assert read_record("run/record.jsonl").header["data"]["name"] == "cifar10"


def test_a_loss_that_is_not_finite(folder: Path, small_cifar: Path, cli) -> None:
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --out run --unverified --quiet --lr 1e30"
    err = cli(line, "--data", small_cifar, code=1).err
    assert "finite" in err or "the loss is" in err
    assert f"the last good checkpoint is {Path('run') / 'checkpoints' / '000000000'}" in err
    assert err.count("\n") == 1


def test_a_signal(
    folder: Path, small_cifar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, before = cifar.batch_rows, signal.getsignal(signal.SIGTERM)

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return rows(*arguments)

    monkeypatch.setattr(cifar, "batch_rows", interrupted)
    line = f"train cifar --width 16 {QUICK} --batch-size 25 --epochs 9 --eval-every 9 --out run --unverified"
    code = main([*line.split(), "--data", str(small_cifar)])
    signal.signal(signal.SIGTERM, before)  # the run's handler stays, for the seconds in which the process ends
    out, err = capsys.readouterr()
    assert code == 128 + signal.SIGTERM
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("structlin train: SIGTERM after step ")
    assert last.endswith("checkpoint written, resume with --out run --resume")


def test_a_damaged_record(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged before the run is resumed, or before its table is printed: one line, and no table."""
    train = cifar.train

    def damaging(*arguments: Any) -> Any:
        result = train(*arguments)
        raw = bytearray(result.record.read_bytes())
        raw[-40] ^= 1
        result.record.write_bytes(raw)
        return result

    line = f"train cifar --width 16 {QUICK} --steps 1 --out run --quiet --resume"
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "train", damaging)
        assert main(line.split()) == 1
    first = capsys.readouterr()
    assert main(line.split()) == 2
    for out, err in (first, capsys.readouterr()):
        assert out == ""
        assert err.startswith(f"structlin train: {Path('run') / 'record.jsonl'}, line 3 is damaged")
        assert err.count("\n") == 1


def test_the_list(cli) -> None:
    out, _ = cli("train", "--list")
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(NAMES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cifar --widht 3", "Perhaps you meant"),
        ("cifar --structure low_rank --options rnk=4", "has no option 'rnk' (did you mean rank?)"),
        ("cifar --structure low_rank --options 4", "must be NAME=VALUE"),
        ("gpt2 --context 1.5 --data .", "--context"),
        ("gpt2", "--data is needed: a folder with train.bin and val.bin"),
        ("gpt2 --mixup 0.2", "Unrecognized options: --mixup"),
        ("gpt2 --data .", "train.bin"),
        ("gtp2 --data .", "unknown name 'gtp2' (did you mean gpt2?)"),
        ("imagenet --data nowhere --epochs 1 --warmup-epochs 0", "nowhere"),
        ("cifar --epochs 1 --accumulate 3", "1024 samples in a process's share cannot be split into 3 parts"),
        ("cifar --epochs 3 --steps 500 --batch-size 1000", "epochs must be 50, got 3"),
        ("cifar --optimizer muon", "adam_lr and optimizer='muon' must be given together"),
        ("cifar --track tensorbord", "tensorbord"),
    ],
)
def test_misuse(line: str, message: str, folder: Path, cli) -> None:
    err = " ".join(cli("train", *line.split(), code=2).err.replace("│", " ").split())
    assert message in err
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []


def test_a_value_that_is_the_name_of_an_option_gives_no_option() -> None:
    for folder in ("other", "data_set", "rms-cap"):
        _, config, options = parse("cifar", ["--data", folder])
        assert (config.data_set, config.rms_cap, options.data) == ("cifar10", False, Path(folder))
    for words in (["--data_set", "cifar100"], ["--data-set=cifar100"]):
        assert parse("cifar", ["--data", "other", *words])[1].data_set == "cifar100"


def test_the_caps_and_options_of_the_paper() -> None:
    _, config, _ = parse("gpt2", ["--structure", "block_tensor_train", "--width", "1024"])
    assert (config.rms_cap, config.options) == (True, {"rank": 4, "factorization": "greedy"})
    _, config, _ = parse("gpt2", ["--structure", "block_tensor_train", "--rms-cap", "False", "--options", "rank=2"])
    assert (config.rms_cap, config.options) == (False, {"rank": 2, "factorization": "greedy"})
    assert parse("cifar-vit", [])[1] == recipe("cifar-vit")
