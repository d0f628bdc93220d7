"""Runs that start from trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from structlin_nn.cli import main
from structlin_nn.compress import compress
from structlin_nn.models import save_model
from structlin_nn.trained import open_trained
from structlin_nn.training.config import GPT2TrainConfig, TrainConfig, config_from_dict
from structlin_nn.training.loop import fit, setup, train
from structlin_nn.training.records import read_record
from structlin_nn.training.run import load_trained
from structlin_nn.training.weights import open_weights


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, text_tokens: Path) -> Path:
    """A small GPT-2, trained for some steps."""
    config = GPT2TrainConfig(
        width=32, base_width=32, depth=2, heads=2, context=16, batch_size=16, steps=30, warmup_steps=3, lr=3e-3,
        eval_every=30, eval_batches=2, threads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense") / "run"
    train(config, folder, data_root=text_tokens)
    return folder


@pytest.fixture
def projected(dense: Path, tmp_path: Path) -> Path:
    opened = open_trained(dense)
    compress(opened, "low_rank", mac_fraction=0.5)
    path = tmp_path / "projected.safetensors"
    save_model(opened.model, path)
    return path


def config_of(weights: Any, **changes: Any) -> GPT2TrainConfig:
    settings = {"batch_size": 16, "steps": 20, "eval_every": 10, "eval_batches": 2, "lr": 2e-3, "threads": 1}
    return GPT2TrainConfig(**{**settings, **open_weights(weights).fields(GPT2TrainConfig), **changes})


def test_the_first_evaluation_is_of_the_weights_and_the_loss_falls(
    projected: Path, text_tokens: Path, tmp_path: Path
) -> None:
    made = setup(config_of(projected), tmp_path / "run", data_root=text_tokens, init_from=projected)
    given = open_weights(projected).tensors
    assert all(torch.equal(given[name], value) for name, value in made.model.state_dict().items())
    result = fit(made)
    lines = read_record(result.record).evaluations
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] - 0.1
    ranks = {tuple(m.structure.factors[0].shape) for m in made.model.modules() if hasattr(m, "structure")}
    assert len(ranks) > 2


def test_resumed_to_the_bit_without_the_file(projected: Path, text_tokens: Path, tmp_path: Path) -> None:
    config = config_of(projected, ema=0.9)
    whole = train(config, tmp_path / "whole", data_root=text_tokens, init_from=projected)
    made = setup(config, tmp_path / "parts", data_root=text_tokens, init_from=projected)
    assert fit(made, stop=lambda: made.step == 13).step == 13
    projected.unlink()
    resumed = train(config, tmp_path / "parts", data_root=text_tokens, resume=True)
    a, b = (read_record(result.record) for result in (whole, resumed))
    assert [line | {"seconds": 0} for line in a.evaluations] == [line | {"seconds": 0} for line in b.evaluations]
    assert a.header["init_from"] == b.header["init_from"]
    for average in (False, True):
        one, two = (load_trained(tmp_path / name, average=average).state_dict() for name in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_of_a_run(dense: Path, text_tokens: Path, tmp_path: Path) -> None:
    made = setup(config_of(dense), tmp_path / "run", data_root=text_tokens, init_from=dense)
    trained = load_trained(dense).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in made.model.state_dict().items())
    assert made.config.base_width == 32


def test_plain_tensors_take_the_model_of_the_configuration(dense: Path, text_tokens: Path, tmp_path: Path) -> None:
    tensors = load_trained(dense).state_dict()
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path)
    sizes = {"width": 32, "base_width": 32, "depth": 2, "heads": 2, "context": 16}
    config = config_of(path, **sizes)
    made = setup(config, tmp_path / "run", data_root=text_tokens, init_from=path)
    assert all(torch.equal(tensors[name], value) for name, value in made.model.state_dict().items())
    assert made.init_from == {"file": path.name, "sha256": open_weights(path).sha256, "structured_layers": None}
    for changes, message in (
        ({"depth": 3}, "the file lacks blocks.2"),
        ({"depth": 1}, "and the model lacks, blocks.1"),
        ({"context": 8}, r"positions\.weight has shape \(16, 32\) in the file and \(8, 32\)"),
        ({"structure": "low_rank", "options": {"rank": 2}}, r"the file lacks .*factors\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            setup(config_of(path, **{**sizes, **changes}), tmp_path / "no", data_root=text_tokens, init_from=path)
    assert not (tmp_path / "no").exists()


def test_refused(projected: Path, dense: Path, text_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qk_norm is True there and False here"):
        setup(config_of(projected, qk_norm=False), tmp_path / "no", data_root=text_tokens, init_from=projected)
    with pytest.raises(ValueError, match="holds a GPT2 of gpt2, and this trains cifar"):
        open_weights(projected).fields(TrainConfig)
    own = config_from_dict("gpt2", read_record(dense / "record.jsonl").header["config"])
    with pytest.raises(ValueError, match="did not start from trained weights"):
        setup(own, dense, data_root=text_tokens, resume=True, init_from=dense)
    with pytest.raises(ValueError, match="init_from needs framework='torch'"):
        setup(TrainConfig(framework="flax"), tmp_path / "no", init_from=projected)
    config = config_of(projected)
    made = setup(config, tmp_path / "run", data_root=text_tokens, init_from=projected)
    fit(made, stop=lambda: made.step == 3)
    with pytest.raises(ValueError, match="started from other weights than run: projected"):
        setup(config, tmp_path / "run", data_root=text_tokens, resume=True, init_from=open_weights(dense))
    raw = bytearray(projected.read_bytes())
    raw[-3] ^= 1
    projected.write_bytes(raw)
    with pytest.raises(ValueError, match="another sum"):
        open_weights(projected)


def test_command_line(projected: Path, text_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = f"train gpt2 --data {text_tokens} --set init_from={projected} --steps 4 --warmup-steps 1 --batch-size 4"
    start += f" --eval-batches 1 --threads 1 --quiet --out {tmp_path / 'run'}"
    for more, message in (
        ("--width 48", "width is 32 there and 48 here"),
        ("--structure monarch", "structure is 'low_rank' there and 'monarch' here"),
        ("--rank 3", "rank is another in each layer there and 3 here"),
        (f"--init-from {projected}", "init_from is given twice"),
    ):
        assert main([*start.split(), *more.split()]) == 2
        assert message in capsys.readouterr().err
    assert main([*start.split(), "--structure", "low_rank", "--width", "32"]) == 0
    capsys.readouterr()
    projected.unlink()
    again = start.replace(f"--set init_from={projected} ", "")
    assert main([*again.split(), "--resume"]) == 0
    assert main([*start.split(), "--resume"]) == 0
    assert read_record(tmp_path / "run" / "record.jsonl").header["config"]["heads"] == 2
