"""Training runs: they learn, they say what they did, and an interruption leaves no trace in the result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import structlin
import structlin_nn
from structlin import execution
from structlin_nn.data import batch_rows, load_images
from structlin_nn.training import checkpoint, loop
from structlin_nn.training.checkpoint import load_checkpoint, save_checkpoint
from structlin_nn.training.config import TrainConfig
from structlin_nn.training.interrupt import Interruption
from structlin_nn.training.loop import Run, RunResult, TrainingError, fit, setup
from structlin_nn.training.records import COMMON_KEYS, HEADER_KEYS, TASK_KEYS, read_record

STEPS_PER_EPOCH = 7  # 240 images in batches of 32, the incomplete one left out


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


def same(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ, tensors to the bit; times apart."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        # Ways are those of the process, which other runs of the same structures have added to.
        keys = [key for key in a if key not in ("seconds", "record_size", "execution")]
        return [f"{path}: keys"] if a.keys() != b.keys() else [d for k in keys for d in same(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return [f"{path}: length"] if len(a) != len(b) else [d for x, y in pairs for d in same(x, y, path + "[]")]
    return [] if a == b else [path]


def lines(path: Path) -> list[dict[str, Any]]:
    """A record without what may differ between two runs of one configuration: times."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "started")}
        for line in path.read_text().splitlines()
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert same(load_checkpoint(one / loop.CHECKPOINT), load_checkpoint(other / loop.CHECKPOINT)) == []
    assert lines(one / loop.RECORD) == lines(other / loop.RECORD)


class TestLearning:
    def test_loss_falls_on_the_embedded_images(self, tmp_path: Path) -> None:
        config = TrainConfig(
            width=64, structure="block_tensor_train", epochs=1, batch_size=100,
            augment=False, mixup=0, label_smoothing=0, threads=1,
        )  # fmt: skip
        result = loop.train(config, tmp_path / "run")
        first, *_, last = read_record(result.record).evaluations
        assert first["test_loss"] == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=1e-4)
        assert last["train_loss"] < 0.35 * first["train_loss"]
        assert last["test_loss"] < 0.35 * first["test_loss"]
        assert last["test_error"] < 0.35

    @pytest.mark.parametrize("structure", ["dense", "monarch", "low_rank", "kronecker"])
    def test_memorises_a_few_images(self, structure: str, small_cifar: Path, tmp_path: Path) -> None:
        config = TrainConfig(
            data_set="cifar10", width=36, structure=structure, epochs=8, eval_every=8, batch_size=32,
            augment=False, mixup=0, label_smoothing=0, threads=1, input_lr_mult=1.0,
        )  # fmt: skip
        result = train(config, tmp_path, small_cifar)
        assert result.evaluation["train_loss"] < 1.2 < 2.3

    def test_vit_trains(self, small_cifar: Path, tmp_path: Path) -> None:
        config = TrainConfig(
            model="cifar-vit", data_set="cifar10", width=32, structure="block_tensor_train", epochs=4, eval_every=4,
            batch_size=32, augment=False, mixup=0, label_smoothing=0, threads=1, optimizer="adamw", weight_decay=0.05,
            input_lr_mult=0.5, warmup_epochs=0.5,
        )  # fmt: skip
        result = train(config, tmp_path, small_cifar)
        assert result.evaluation["train_loss"] < 2.0


def test_a_resumed_run_repeats_the_ways_of_its_products(small_cifar: Path, tmp_path: Path) -> None:
    """To the bit, whatever would be chosen now; and the run names its ways."""
    config = TrainConfig(
        data_set="cifar10", width=40, structure="block_tensor_train", epochs=2, batch_size=32, augment=False, threads=1
    )
    with execution.using("products"):
        train(config, tmp_path / "whole", small_cifar)
        train(config, tmp_path / "parts", small_cifar, stop_after=3)
    with execution.using("token_major"):
        train(config, tmp_path / "other", small_cifar)
        resumed = train(config, tmp_path / "parts", small_cifar, resume=True)
    assert resumed.finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = json.loads((tmp_path / "parts" / "ways.json").read_text())
    assert found["threads"] == 1
    assert set(found["ways"].values()) == {"products"}
    states = [load_checkpoint(tmp_path / name / loop.CHECKPOINT) for name in ("whole", "other")]
    assert states[0]["execution"] == found["ways"]
    assert same(states[0]["model"], states[1]["model"]) != []  # the ways do round differently


class TestRecord:
    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, small_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
        config = TrainConfig(
            data_set="cifar10", width=24, structure="block_tensor_train", options={"rank": 2}, epochs=3, batch_size=32,
            eval_every=2, threads=1,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("record")
        train(config, folder, small_cifar)
        return config, folder

    def test_schema(self, made: tuple[TrainConfig, Path]) -> None:
        config, folder = made
        raw = [json.loads(line) for line in (folder / loop.RECORD).read_text().splitlines()]
        assert set(raw[0]) == {"kind", *HEADER_KEYS}
        assert all(set(line) == {"kind", *COMMON_KEYS, *TASK_KEYS["cifar"]} for line in raw[1:])
        record = read_record(folder / loop.RECORD)
        assert record.finished
        assert TrainConfig.from_dict(record.header["config"]) == config
        assert [line["epoch"] for line in record.evaluations] == [0, 2, 3]
        assert [line["step"] for line in record.evaluations] == [0, 14, 21]
        assert record.evaluations[0]["batch_loss"] is None
        assert all(0 <= line["batch_error"] <= 1 for line in record.evaluations[1:])
        assert record.header["versions"]["torch"].startswith(torch.__version__.split("+")[0])

    def test_compute_is_counted(self, made: tuple[TrainConfig, Path]) -> None:
        _, folder = made
        record = read_record(folder / loop.RECORD)
        counts = record.header["counts"]
        chain = [(24, 3072), *[(96, 24), (24, 96)] * 3]
        factors = [structlin.design("block_tensor_train", shape, rank=2).factors for shape in chain]
        forward = sum(f.numel for pair in factors for f in pair) + 24 * 10
        assert counts["forward_macs"] == forward
        # Nobody asks for the gradient of the images.
        assert counts["training_macs"] == 3 * forward - factors[0][0].numel
        assert counts["trainable_params"] == forward + 24 + 3 * (96 + 24 + 2 * 24) + 10
        last = record.evaluations[-1]
        assert last["samples"] == 3 * STEPS_PER_EPOCH * 32
        assert last["training_macs"] == counts["total_training_macs"] == last["samples"] * counts["training_macs"]

    def test_structures_and_multipliers(
        self, made: tuple[TrainConfig, Path], small_cifar: Path, tmp_path: Path
    ) -> None:
        config, folder = made
        aware = read_record(folder / loop.RECORD).header["structures"]
        setup(config.replace(structure_aware=False), tmp_path / "naive", data_root=small_cifar, verify=False)
        naive = read_record(tmp_path / "naive" / loop.RECORD).header["structures"]
        names = ["input", *(f"blocks.{i}.{side}" for i in range(3) for side in ("up", "down")), "output"]
        assert [layer["name"] for layer in aware] == names
        for layer, other in zip(aware, naive, strict=True):
            base_in = {"input": 3072, "up": 64, "down": 256, "output": 64}[layer["name"].rpartition(".")[2]]
            extra = 0.1 if layer["name"] == "input" else 1.0
            for factor, plain in zip(layer["factors"], other["factors"], strict=True):
                fan_in, count = factor["fan_in"], len(layer["factors"])
                assert factor["lr_multiplier"] == pytest.approx(extra * base_in / (fan_in * count), rel=1e-12)
                assert plain["lr_multiplier"] == pytest.approx(extra * base_in / layer["in_features"], rel=1e-12)
        assert [layer["factors"][-1]["init_std"] == 0 for layer in aware] == [False, *[False, True] * 3, True]

    def test_names_no_path(self, made: tuple[TrainConfig, Path], small_cifar: Path) -> None:
        text = (made[1] / loop.RECORD).read_text()
        assert str(small_cifar.parent) not in text
        assert str(made[1]) not in text
        assert not re.search(r'"/\w+/', text)

    def test_evaluation_against_a_direct_computation(
        self, made: tuple[TrainConfig, Path], small_cifar: Path, tmp_path: Path
    ) -> None:
        config, folder = made
        shutil.copytree(folder, tmp_path / "copy")
        run = setup(config, tmp_path / "copy", data_root=small_cifar, verify=False, resume=True)
        data = load_images("cifar10", small_cifar, verify=False)
        last = read_record(folder / loop.RECORD).evaluations[-1]
        for split, images, labels in (
            ("train", data.train_images, data.train_labels),
            ("test", data.test_images, data.test_labels),
        ):
            x = torch.from_numpy(images).double() / 255
            x = (x - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
            with torch.no_grad():
                logits = run.model.double()(x)
            y = torch.from_numpy(labels)
            loss = -logits.log_softmax(1)[torch.arange(len(y)), y].mean().item()
            assert last[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)
            assert last[f"{split}_error"] == pytest.approx((logits.argmax(1) != y).double().mean().item(), abs=1e-12)


class TestBatchStatistics:
    def test_mean_loss_and_error_of_the_steps(self, small_cifar: Path, tmp_path: Path) -> None:
        config = TrainConfig(data_set="cifar10", width=24, epochs=1, batch_size=32, threads=1)
        run = setup(config, tmp_path / "a", data_root=small_cifar, verify=False)
        losses, errors = [], []
        other = setup(config, tmp_path / "b", data_root=small_cifar, verify=False)
        for number in range(STEPS_PER_EPOCH):
            rows = batch_rows(len(other.task.labels), 32, config.seed, number)
            images, labels = other.task.images[rows], other.task.labels[rows]
            rate = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * number / STEPS_PER_EPOCH, dtype=torch.float64))).item()
            for group, base in zip(other.optimizer.param_groups, other.stepper.rates, strict=True):
                group["lr"] = base * rate
            inputs, targets = other.task.augment(images, labels, other.task.generator)
            logits = other.model(inputs)
            loss = -(targets * logits.log_softmax(1)).sum(1).mean()
            other.optimizer.zero_grad()
            loss.backward()
            other.optimizer.step()
            losses.append(loss.item())
            guesses = logits.argmax(1)
            hits = max((guesses == labels).sum().item(), (guesses == labels.flip(0)).sum().item())
            errors.append(1 - hits / 32)
            if number == STEPS_PER_EPOCH - 1:
                break
        last = fit(run).evaluation
        assert last["batch_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert last["batch_error"] == pytest.approx(sum(errors) / len(errors), abs=0.02)


class TestResume:
    @pytest.fixture
    def whole(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> Path:
        assert train(config, tmp_path / "whole", small_cifar).finished
        return tmp_path / "whole"

    @pytest.mark.parametrize("structure", ["dense", "block_tensor_train"])
    @pytest.mark.parametrize("after", [1, 5, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, 20])
    def test_is_exact_to_the_bit(
        self, structure: str, after: int, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        config = config.replace(structure=structure)
        train(config, tmp_path / "whole", small_cifar)
        part = train(config, tmp_path / "part", small_cifar, stop_after=after)
        assert part.step == after
        assert not part.finished
        torch.manual_seed(12345)  # what other code does with the global generator must not matter
        assert train(config, tmp_path / "part", small_cifar, resume=True).finished
        assert_same_run(tmp_path / "whole", tmp_path / "part")

    def test_many_times(self, whole: Path, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        for _ in range(5):
            train(config, tmp_path / "part", small_cifar, stop_after=4, resume=True)
        assert train(config, tmp_path / "part", small_cifar, resume=True).finished
        assert_same_run(whole, tmp_path / "part")

    def test_after_a_kill_in_the_middle_of_a_line(
        self, whole: Path, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        part = tmp_path / "part"
        train(config, part, small_cifar, stop_after=10)
        with (part / loop.RECORD).open("ab") as file:
            file.write(b'{"kind": "evaluation", "step": 14, "epo')
        made = setup(config, part, data_root=small_cifar, verify=False, resume=True)
        assert any("cut off after 39 bytes" in message for message in made.messages)
        assert fit(made).finished
        assert_same_run(whole, part)

    def test_after_a_kill_between_record_and_checkpoint(
        self, whole: Path, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        part = tmp_path / "part"
        train(config, part, small_cifar, stop_after=10)
        shutil.copy(part / loop.CHECKPOINT, tmp_path / "older.pt")
        train(config, part, small_cifar, stop_after=4, resume=True)
        assert len(lines(part / loop.RECORD)) == 3
        shutil.copy(tmp_path / "older.pt", part / loop.CHECKPOINT)
        made = setup(config, part, data_root=small_cifar, verify=False, resume=True)
        assert any("dropped 1 line(s)" in message for message in made.messages)
        assert fit(made).finished
        assert_same_run(whole, part)

    def test_before_the_first_checkpoint(
        self, whole: Path, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        setup(config, tmp_path / "part", data_root=small_cifar, verify=False)
        made = setup(config, tmp_path / "part", data_root=small_cifar, verify=False, resume=True)
        assert any("starting from the beginning" in message for message in made.messages)
        assert fit(made).finished
        assert_same_run(whole, tmp_path / "part")

    def test_of_a_finished_run_changes_nothing(self, whole: Path, config: TrainConfig, small_cifar: Path) -> None:
        before = {path.name: path.read_bytes() for path in whole.iterdir()}
        assert train(config, whole, small_cifar, resume=True).finished
        assert {path.name: path.read_bytes() for path in whole.iterdir()} == before

    def test_with_another_configuration(self, whole: Path, config: TrainConfig, small_cifar: Path) -> None:
        other = config.replace(width=48, lr=0.1)
        with pytest.raises(
            ValueError, match=r"another configuration: width was 24 and is 48, lr was 0.003 and is 0.1$"
        ):
            train(other, whole, small_cifar, resume=True)

    def test_with_other_data(self, whole: Path, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        other = tmp_path / small_cifar.name
        shutil.copytree(small_cifar, other)
        raw = bytearray((other / "data_batch_3.bin").read_bytes())
        raw[1000] ^= 1
        (other / "data_batch_3.bin").write_bytes(raw)
        with pytest.raises(ValueError, match="was trained on other cifar10 data"):
            train(config, whole, other, resume=True)

    def test_with_a_damaged_checkpoint(self, whole: Path, config: TrainConfig, small_cifar: Path) -> None:
        (whole / loop.CHECKPOINT).write_bytes((whole / loop.CHECKPOINT).read_bytes()[:-100])
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            train(config, whole, small_cifar, resume=True)

    def test_without_its_record(self, whole: Path, config: TrainConfig, small_cifar: Path) -> None:
        (whole / loop.RECORD).unlink()
        with pytest.raises(FileNotFoundError, match=r"record.jsonl is missing"):
            train(config, whole, small_cifar, resume=True)

    def test_is_asked_for(self, whole: Path, config: TrainConfig, small_cifar: Path) -> None:
        with pytest.raises(FileExistsError, match="holds a run already"):
            train(config, whole, small_cifar)


class TestTrouble:
    def test_a_loss_that_is_not_finite(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        # Finite weights for a while, so that there is a checkpoint to name.
        made = setup(config, tmp_path, data_root=small_cifar, verify=False)
        fit(made, stop=Stop(STEPS_PER_EPOCH + 2))
        with torch.no_grad():
            made.model.output.factors[0].fill_(1e38)
        with pytest.raises(
            TrainingError, match=rf"the loss is (nan|inf) at step 10; the last good .*{loop.CHECKPOINT}"
        ):
            fit(made)
        state = load_checkpoint(tmp_path / loop.CHECKPOINT)
        assert state["step"] == STEPS_PER_EPOCH + 2
        assert all(torch.isfinite(value).all() for value in state["model"].values())

    def test_a_learning_rate_far_too_high(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"(the loss is (nan|inf) at|not finite after) step \d+; the last good"):
            train(config.replace(lr=1e30), tmp_path, small_cifar)
        assert load_checkpoint(tmp_path / loop.CHECKPOINT)["step"] == 0

    def test_weights_that_are_not_finite_are_not_saved(
        self, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        made = setup(config, tmp_path, data_root=small_cifar, verify=False)
        fit(made, stop=Stop(1))
        with torch.no_grad():
            made.model.output.bias[3] = float("inf")
        with pytest.raises(TrainingError, match=r"output\.bias is not finite after step 1; the last good"):
            made.save()
        assert torch.isfinite(load_checkpoint(tmp_path / loop.CHECKPOINT)["model"]["output.bias"]).all()

    def test_a_disk_that_is_full(
        self, config: TrainConfig, small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, part = tmp_path / "whole", tmp_path / "part"
        train(config, whole, small_cifar)
        train(config, part, small_cifar, stop_after=3)

        def full(path: Path, state: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(checkpoint, "save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            train(config, part, small_cifar, resume=True)
        monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
        assert train(config, part, small_cifar, resume=True).finished
        assert_same_run(whole, part)

    def test_data_that_are_missing_or_damaged(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            train(config, tmp_path / "run", tmp_path / "nothing")
        broken = tmp_path / small_cifar.name
        shutil.copytree(small_cifar, broken)
        (broken / "data_batch_2.bin").write_bytes(b"x" * 100)
        with pytest.raises(ValueError, match=r"data_batch_2.bin has 100 bytes"):
            train(config, tmp_path / "run", broken)
        with pytest.raises(ValueError, match="the official file has"):
            setup(config, tmp_path / "run", data_root=small_cifar)
        assert not (tmp_path / "run").exists()

    def test_fewer_images_than_a_batch(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="240 samples are less than one batch of 256"):
            train(config.replace(batch_size=256), tmp_path / "run", small_cifar)

    def test_a_size_that_the_structure_cannot_have(
        self, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="29 cannot be split"):
            train(config.replace(width=29), tmp_path / "run", small_cifar)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_device_that_is_not_there(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="device 'cuda' is not there"):
            train(config.replace(device="cuda"), tmp_path / "run", small_cifar)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_write_a_checkpoint_and_stop(
        self, number: signal.Signals, config: TrainConfig, small_cifar: Path, tmp_path: Path
    ) -> None:
        before = signal.getsignal(number)
        made = setup(config, tmp_path / "part", data_root=small_cifar, verify=False)

        def interrupt() -> bool:
            if made.step == 9:
                signal.raise_signal(number)
            return False

        result = fit(made, stop=interrupt)
        assert result.signal == number
        # The signal comes while the step at hand is looked at; the one after it is the last.
        assert result.step == 10
        assert signal.getsignal(number) == before
        assert train(config, tmp_path / "part", small_cifar, resume=True).finished
        train(config, tmp_path / "whole", small_cifar)
        assert_same_run(tmp_path / "whole", tmp_path / "part")

    def test_a_second_one_is_an_order_only_when_it_comes_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C reaches the processes of torchrun, and torchrun hands it on to them."""
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if started in the background
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            now += 4
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert interruption.signal == signal.SIGINT
            now += 2
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        signal.signal(signal.SIGINT, inherited)

    def test_threads_are_put_back(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        before = torch.get_num_threads()
        seen: list[int] = []
        made = setup(config.replace(threads=before + 1), tmp_path, data_root=small_cifar, verify=False)
        fit(made, stop=lambda: seen.append(torch.get_num_threads()) is None)
        assert seen == [before + 1]
        assert torch.get_num_threads() == before

    def test_works_outside_the_main_thread(self, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
        results: list[RunResult] = []
        thread = threading.Thread(target=lambda: results.append(train(config, tmp_path, small_cifar, stop_after=2)))
        thread.start()
        thread.join()
        assert results[0].step == 2


@pytest.mark.slow
def test_kill_at_any_time(small_cifar: Path, config: TrainConfig, tmp_path: Path) -> None:
    """kill -9, again and again, until the run is through; a checkpoint after every step."""
    config = config.replace(epochs=16, eval_every=4)
    train(config, tmp_path / "whole", small_cifar)
    part = tmp_path / "part"
    code = (
        "import json, sys; from structlin_nn.training.config import TrainConfig\n"
        "from structlin_nn.training.loop import fit, setup\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[1]))\n"
        "made = setup(config, sys.argv[2], data_root=sys.argv[3], verify=False, resume=True)\n"
        "print('ready', made.step, flush=True)\n"
        "assert fit(made, checkpoint_minutes=0).finished\n"
    )
    command = [sys.executable, "-c", code, json.dumps(config.to_dict()), str(part), str(small_cifar)]
    environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
    started, kills = [], 0
    for delay in (0.05, 0.2, 0.11, 0.3, None):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            started.append(int(process.stdout.readline().split()[1]))
            if delay is None:
                assert process.wait() == 0
            else:
                time.sleep(delay)
                process.kill()
                kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    assert started == sorted(started)
    assert started[-1] > 0
    assert_same_run(tmp_path / "whole", part)


def test_run_holds_what_a_checkpoint_needs(config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
    made = setup(config, tmp_path, data_root=small_cifar, verify=False)
    assert isinstance(made, Run)
    save_checkpoint(tmp_path / "x.pt", made.state())
    assert same(load_checkpoint(tmp_path / "x.pt"), made.state()) == []
