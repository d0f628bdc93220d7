"""Each pipeline on small real data: it learns, records, checkpoints, is killed, resumes, and refuses damaged data."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import structlin_nn
from structlin_nn.data.augment import normalize
from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from structlin_nn.data.tokens import open_tokens
from structlin_nn.training import loop
from structlin_nn.training.checkpoint import load_checkpoint
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, RunConfig, TrainConfig, recipe
from structlin_nn.training.gpt2 import token_loss
from structlin_nn.training.imagenet import image_recipe
from structlin_nn.training.loop import fit, load_trained, setup, train
from structlin_nn.training.records import COMMON_KEYS, HEADER_KEYS, TASK_KEYS, read_record

Setting = tuple[RunConfig, dict[str, Any]]


@pytest.fixture(params=["cifar", "gpt2", "imagenet"])
def setting(
    request: pytest.FixtureRequest,
    config: TrainConfig,
    gpt2_config: GPT2TrainConfig,
    imagenet_config: ImageNetTrainConfig,
    small_cifar: Path,
    text_tokens: Path,
    image_tree: Path,
) -> Setting:
    """Each pipeline in turn: its configuration, and where its data are."""
    return {
        "cifar": (config, {"data_root": small_cifar, "verify": False}),
        "gpt2": (gpt2_config, {"data_root": text_tokens}),
        "imagenet": (imagenet_config, {"data_root": image_tree}),
    }[request.param]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "started")}
        for line in (folder / loop.RECORD).read_text().splitlines()
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / loop.CHECKPOINT)["model"]


def assert_same(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class TestEveryPipeline:
    def test_records(self, setting: Setting, tmp_path: Path) -> None:
        config, data = setting
        result = train(config, tmp_path, **data)
        assert result.finished
        raw = [json.loads(line) for line in (tmp_path / loop.RECORD).read_text().splitlines()]
        assert set(raw[0]) == {"kind", *HEADER_KEYS}
        assert raw[0]["task"] == config.task
        assert all(set(line) == {"kind", *COMMON_KEYS, *TASK_KEYS[config.task]} for line in raw[1:])
        record = read_record(result.record)
        assert record.finished
        last = record.evaluations[-1]
        assert last["samples"] == result.steps * config.batch_size
        assert last["training_macs"] == record.header["counts"]["total_training_macs"]
        assert str(tmp_path) not in (tmp_path / loop.RECORD).read_text()
        assert str(data["data_root"]) not in (tmp_path / loop.RECORD).read_text()

    @pytest.mark.parametrize("after", [1, 7])
    def test_resumes_to_the_bit(self, after: int, setting: Setting, tmp_path: Path) -> None:
        config, data = setting
        config = config.replace(ema=0.9, clip=1.0, precision="bfloat16")
        train(config, tmp_path / "whole", **data)
        calls = iter(range(1, 100))
        made = setup(config, tmp_path / "part", **data)
        assert not fit(made, stop=lambda: next(calls) == after).finished
        torch.manual_seed(777)
        assert train(config, tmp_path / "part", resume=True, **data).finished
        assert_same(tmp_path / "whole", tmp_path / "part")

    def test_a_full_disk_leaves_the_last_checkpoint(
        self, setting: Setting, tmp_path: Path, full_disk: Callable[[int], Any]
    ) -> None:
        config, data = setting
        calls = iter(range(1, 100))
        fit(setup(config, tmp_path, **data), stop=lambda: next(calls) == 3)
        before = (tmp_path / loop.CHECKPOINT).read_bytes()
        made = setup(config, tmp_path, resume=True, **data)
        with full_disk(50_000), pytest.raises(OSError, match=r"checkpoint|too large|space"):
            fit(made, checkpoint_minutes=0)
        assert (tmp_path / loop.CHECKPOINT).read_bytes() == before
        assert load_checkpoint(tmp_path / loop.CHECKPOINT)["step"] == 3
        assert train(config, tmp_path, resume=True, **data).finished

    def test_a_checkpoint_of_another_pipeline(self, setting: Setting, tmp_path: Path) -> None:
        config, data = setting
        fit(setup(config, tmp_path, **data), stop=lambda: True)
        other = TrainConfig() if config.task != "cifar" else GPT2TrainConfig()
        with pytest.raises(ValueError, match=f"trains {config.task}, and this is {other.task}"):
            setup(other, tmp_path, resume=True)

    @pytest.mark.parametrize("changes", [{"accumulate": 4}, {"recompute": True}])
    def test_execution_does_not_change_losses(self, changes: dict[str, Any], setting: Setting, tmp_path: Path) -> None:
        config, data = setting
        config = config.replace(accumulate=1, ema=0.0)
        calls = iter(range(1, 100))
        found = []
        for number, one in enumerate((config, config.replace(**changes))):
            made = setup(one, tmp_path / str(number), **data)
            result = fit(made, stop=lambda: next(calls) % 6 == 0)
            assert result.step == 6
            found.append(made.sums[0].item())
        assert found[0] == pytest.approx(found[1], rel=1e-5)


class TestGPT2:
    def test_learns(self, text_tokens: Path, tmp_path: Path) -> None:
        config = GPT2TrainConfig(
            width=64, base_width=64, depth=2, heads=4, context=32, batch_size=16, steps=100, warmup_steps=10, lr=3e-3,
            structure="block_tensor_train", options={"rank": 4}, rms_cap=True, optimizer="adamw", weight_decay=0.1,
            clip=1.0, betas=(0.9, 0.95), final_lr=0.1, eval_every=100, eval_batches=10, threads=1,
        )  # fmt: skip
        first, last = read_record(train(config, tmp_path, data_root=text_tokens).record).evaluations
        assert first["val_loss"] == pytest.approx(math.log(256), abs=1e-3)
        assert first["val_perplexity"] == pytest.approx(256, rel=1e-3)
        assert last["val_loss"] < 0.6 * first["val_loss"]
        assert last["train_loss"] < 0.6 * first["train_loss"]
        assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-12)
        assert last["tokens"] == 100 * 16 * 32

    def test_validation_is_the_whole_split(
        self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        config = gpt2_config.replace(ema=0.0)
        result = train(config, tmp_path, data_root=text_tokens)
        tokens = torch.from_numpy(np.array(open_tokens(text_tokens).val, dtype=np.int64))
        model, total = load_trained(tmp_path).double(), 0.0
        for start in range(0, len(tokens) - 1, config.context):
            piece = tokens[start : start + config.context + 1]
            with torch.no_grad():
                logits = model(piece[None, :-1])[0]
            total -= logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]].sum().item()
        assert result.evaluation["val_tokens"] == len(tokens) - 1
        assert result.evaluation["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)

    def test_sampled_validation_is_the_same_every_time(
        self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        config = gpt2_config.replace(lr=1e-30, ema=0.0, weight_decay=0.0, whole_validation=False)
        found = []
        for accumulate in (1, 4):  # which may change on resume
            folder = tmp_path / str(accumulate)
            train(config.replace(accumulate=accumulate), folder, data_root=text_tokens)
            evaluations = read_record(folder / loop.RECORD).evaluations
            found += [[e["train_loss"], e["val_loss"], e["val_tokens"]] for e in evaluations]
        assert len(found) == 6
        for each in found:
            assert each == pytest.approx(found[0], rel=1e-6)
        assert found[0][2] == config.eval_batches * config.batch_size * config.context

    def test_averages_are_evaluated_and_reloaded(
        self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        run = setup(gpt2_config, tmp_path, data_root=text_tokens)
        mean = {name: p.detach().double().clone() for name, p in run.model.named_parameters()}
        original = run.stepper.step

        def step(*arguments: Any) -> Any:
            found = original(*arguments)
            for name, p in run.model.named_parameters():
                mean[name] += 0.1 * (p.detach().double() - mean[name])
            return found

        run.stepper.step = step  # type: ignore[method-assign]
        evaluation = fit(run).evaluation
        averaged, plain = load_trained(tmp_path, average=True), load_trained(tmp_path)
        for name, parameter in averaged.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), mean[name], rtol=1e-5, atol=1e-6)
        losses = [
            token_loss(model, run.task._evaluated(run.task.data.train))[0]  # type: ignore[attr-defined]
            for model in (averaged, plain)
        ]
        assert evaluation["train_loss"] == pytest.approx(losses[0], rel=1e-6)
        assert losses[0] != losses[1]

    def test_base_and_vocabulary(self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path) -> None:
        config = gpt2_config.replace(base_width=16, vocabulary=300)
        run = setup(config, tmp_path, data_root=text_tokens)
        assert run.model.head.out_features == 300
        for layer in read_record(tmp_path / loop.RECORD).header["structures"]:
            # Base FFN expansion 1, base width 16, whatever the number of heads.
            for factor in layer["factors"]:
                assert factor["lr_multiplier"] == pytest.approx(16 / (factor["fan_in"] * len(layer["factors"])))
        with pytest.raises(ValueError, match="vocabulary 200 is smaller than that of the data, 256"):
            setup(config.replace(vocabulary=200), tmp_path / "other", data_root=text_tokens)

    @pytest.mark.parametrize(
        ("split", "tokens", "message"),
        [("train", [0] * 100 + [256], "token 100 is 256"), ("val", [], "empty"), ("val", [1] * 10, "too few")],
    )
    def test_damaged_tokens(
        self,
        split: str,
        tokens: list[int],
        message: str,
        gpt2_config: GPT2TrainConfig,
        text_tokens: Path,
        tmp_path: Path,
    ) -> None:
        shutil.copytree(text_tokens, tmp_path / "tokens")
        np.array(tokens, dtype="<u2").tofile(tmp_path / "tokens" / f"{split}.bin")
        (tmp_path / "tokens" / "meta.json").write_text('{"version": 1, "vocab_size": 256}')
        with pytest.raises(ValueError, match=message):
            setup(gpt2_config.replace(whole_validation=False), tmp_path / "run", data_root=tmp_path / "tokens")
        assert not (tmp_path / "run").exists()

    def test_paper_sizes(self) -> None:
        """The counts of the paper's models are those of `structlin count`."""
        from structlin_nn.counting import count_model
        from structlin_nn.training.model import make_model

        config = recipe("gpt2", width=1024, structure="block_tensor_train", head_dim=64)
        model = make_model(config, 50304, "meta")
        counted = count_model(
            "gpt2", width=1024, head_dim=64, structure="block_tensor_train", rank=4, factorization="greedy",
            rms_cap=True,
        )  # fmt: skip
        assert sum(p.numel() for p in model.parameters()) == counted["trainable_params"]


class TestImageNet:
    def test_learns(self, image_tree: Path, tmp_path: Path) -> None:
        config = ImageNetTrainConfig(
            width=32, base_width=32, depth=2, heads=2, patch=8, image_size=32, batch_size=16, epochs=10, lr=2e-3,
            warmup_epochs=1.0, structure="block_tensor_train", options={"rank": 1}, rms_cap=True, augment="",
            erasing=0.0, color_jitter=0.0, mixup=0.0, optimizer="adamw", weight_decay=0.05, clip=1.0, workers=0,
            eval_every=10, threads=1,
        )  # fmt: skip
        first, last = read_record(train(config, tmp_path, data_root=image_tree).record).evaluations
        assert first["val_loss"] == pytest.approx(math.log(3), abs=1e-4)
        assert last["val_loss"] < 0.75 * first["val_loss"]
        assert last["val_error"] < 0.5
        assert last["val_top5_error"] == pytest.approx(0, abs=1e-12)

    def test_evaluation_against_a_direct_computation(
        self, imagenet_config: ImageNetTrainConfig, image_tree: Path, tmp_path: Path
    ) -> None:
        run = setup(imagenet_config, tmp_path, data_root=image_tree)
        last = fit(run).evaluation
        model = load_trained(tmp_path)
        batches = list(run.task.data.val_batches(50, size=32))  # type: ignore[attr-defined]
        images, labels = batches[0]
        assert len(labels) == 21
        with torch.no_grad():
            logits = model(normalize(images, IMAGENET_MEAN, IMAGENET_STD))
        assert last["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert last["val_error"] == pytest.approx((logits.argmax(1) != labels).double().mean().item())

    def test_mixed_neighbours_do_not_depend_on_parts(
        self, imagenet_config: ImageNetTrainConfig, image_tree: Path, tmp_path: Path
    ) -> None:
        sums = []
        for parts in (1, 4):
            config = imagenet_config.replace(mixup=0.5, accumulate=parts)
            found = setup(config, tmp_path / str(parts), data_root=image_tree).task.parts()
            assert len(found) == parts
            assert all(len(inputs) == 16 // parts for inputs, _, _ in found)
            inputs, targets = (torch.cat([part[i] for part in found]) for i in (0, 1))
            assert torch.allclose(targets.sum(1), torch.ones(16))
            order = inputs.flatten(1).sum(1).argsort()
            sums.append((inputs[order], targets[order]))
        torch.testing.assert_close(sums[0], sums[1])

    def test_recipe(self) -> None:
        made = image_recipe(recipe("imagenet-vit"))
        assert (made.rand_augment, made.random_erasing, made.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.25, 0.4)
        assert (made.mixup, made.smoothing, made.size) == (0.2, 0.1, 224)

    def test_a_broken_image(self, imagenet_config: ImageNetTrainConfig, image_tree: Path, tmp_path: Path) -> None:
        shutil.copytree(image_tree, tmp_path / "tree")
        path = tmp_path / "tree" / "train" / "bag" / "3.png"
        path.write_bytes(path.read_bytes()[:50])
        made = setup(imagenet_config, tmp_path / "run", data_root=tmp_path / "tree")
        with pytest.raises(ValueError, match=r"3\.png"):
            fit(made)
        assert load_checkpoint(tmp_path / "run" / loop.CHECKPOINT)["step"] == 0
        made = setup(imagenet_config, tmp_path / "skip", data_root=tmp_path / "tree", on_broken="skip")
        with pytest.warns(UserWarning, match=r"3\.png"):
            assert fit(made).finished

    def test_an_empty_class(self, imagenet_config: ImageNetTrainConfig, image_tree: Path, tmp_path: Path) -> None:
        shutil.copytree(image_tree, tmp_path / "tree")
        shutil.rmtree(tmp_path / "tree" / "val")
        (tmp_path / "tree" / "val" / "bag").mkdir(parents=True)
        with pytest.raises((ValueError, FileNotFoundError), match=r"val"):
            setup(imagenet_config, tmp_path / "run", data_root=tmp_path / "tree")
        assert not (tmp_path / "run").exists()

    def test_the_whole_recipe_and_a_model_of_timm(self, image_tree: Path, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        pytest.importorskip("torchvision")
        config = recipe(
            "timm:test_vit", structure="low_rank", options={"rank": 8}, image_size=160, batch_size=16, epochs=1,
            warmup_epochs=0.0, eval_every=1, workers=2, threads=1, lr=1e-3,
        )  # fmt: skip
        result = train(config, tmp_path, data_root=image_tree)
        assert result.finished
        header = read_record(result.record).header
        assert {layer["structure"] for layer in header["structures"]}
        assert load_trained(tmp_path)(torch.zeros(2, 3, 160, 160)).shape == (2, 3)


@pytest.mark.parametrize("structure", ["dense", "block_tensor_train", "monarch", "low_rank", "kronecker"])
def test_recomputation_changes_nothing(
    structure: str, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
) -> None:
    found = []
    for again in (False, True):
        config = gpt2_config.replace(
            structure=structure, options={}, rms_cap=False, steps=4, eval_every=4, warmup_steps=1, recompute=again
        )
        result = train(config, tmp_path / str(again), data_root=text_tokens)
        found.append([result.evaluation[key] for key in ("batch_loss", "val_loss")])
    assert found[0] == found[1]


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_losses_are_near_those_of_float32(
        self, precision: str, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        found = {}
        for name in ("float32", precision):
            config = gpt2_config.replace(precision=name, ema=0.0)
            result = train(config, tmp_path / name, data_root=text_tokens)
            found[name] = [e["val_loss"] for e in read_record(result.record).evaluations]
        assert found[precision] == pytest.approx(found["float32"], rel=0.02)
        assert found[precision] != found["float32"]
        state = load_checkpoint(tmp_path / precision / loop.CHECKPOINT)
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in state["model"].values())
        assert bool(state["scaler"]) == (precision == "float16")

    def test_the_scale_of_float16_is_resumed(
        self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        config = gpt2_config.replace(precision="float16")
        made = setup(config, tmp_path, data_root=text_tokens)
        made.stepper.scaler.load_state_dict({**made.stepper.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 5})
        fit(made, stop=lambda: True)
        again = setup(config, tmp_path, resume=True, data_root=text_tokens)
        assert again.stepper.scaler.state_dict()["scale"] == 1024.0
        assert again.stepper.scaler.state_dict()["_growth_tracker"] == 6

    def test_clipping(self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path) -> None:
        made = setup(gpt2_config.replace(clip=1e-3), tmp_path, data_root=text_tokens)
        fit(made, stop=lambda: True)
        gradients = [p.grad.flatten().double() for p in made.model.parameters() if p.grad is not None]
        assert torch.cat(gradients).norm().item() == pytest.approx(1e-3, rel=1e-4)

    @pytest.mark.slow
    def test_compiled_losses_are_those_of_the_model_as_it_is(
        self, gpt2_config: GPT2TrainConfig, text_tokens: Path, tmp_path: Path
    ) -> None:
        losses = []
        for compiled in (False, True):
            config = gpt2_config.replace(compile=compiled, steps=8, eval_every=8, accumulate=1)
            result = train(config, tmp_path / str(compiled), data_root=text_tokens)
            losses.append((result.evaluation["val_loss"], result.evaluation["batch_loss"]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        names = [set(weights(tmp_path / str(compiled))) for compiled in (False, True)]
        assert names[0] == names[1]


@pytest.mark.slow
def test_kill_at_any_time(setting: Setting, tmp_path: Path) -> None:
    """kill -9 in the middle of a run with a checkpoint after every step, twice; then the run goes on to its end."""
    config, data = setting
    config = config.replace(steps=60, eval_every=20) if config.task == "gpt2" else config.replace(epochs=8)
    train(config, tmp_path / "whole", **data)
    part = tmp_path / "part"
    code = (
        "import json, sys; from structlin_nn.training.config import config_from_dict\n"
        "from structlin_nn.training.loop import fit, setup\n"
        "config, data = json.loads(sys.argv[1])\n"
        "made = setup(config_from_dict(sys.argv[3], config), sys.argv[2], resume=True, **data)\n"
        "print('ready', made.step, flush=True)\n"
        "assert fit(made, checkpoint_minutes=0).finished\n"
    )
    given = json.dumps(
        [config.to_dict(), {key: value if key == "verify" else str(value) for key, value in data.items()}]
    )
    command = [sys.executable, "-c", code, given, str(part), config.task]
    environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
    started, kills = [], 0
    for delay in (0.2, 0.4, None):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            started.append(int(process.stdout.readline().split()[1]))
            if delay is None:
                assert process.wait() == 0
            else:
                time.sleep(delay)
                process.kill()
                kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    assert started == sorted(started)
    assert started[-1] > 0
    assert_same(tmp_path / "whole", part)
