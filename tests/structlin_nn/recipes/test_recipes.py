"""Each recipe on small real data, against what it is said to compute."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from structlin_nn.cli import main
from structlin_nn.compress import compress
from structlin_nn.data import batch_rows, load_images
from structlin_nn.data.augment import normalize
from structlin_nn.data.tokens import open_tokens
from structlin_nn.models import StructureConfig, build_model, save_model
from structlin_nn.models.named import build_named
from structlin_nn.recipes import cifar, gpt2, imagenet, recipe
from structlin_nn.recipes._config import fields_of
from structlin_nn.recipes._probe import Probe
from structlin_nn.recipes._torch import Average, base_of, make_optimizer
from structlin_nn.records import read_record
from structlin_nn.torch import StructuredExperts, StructuredLinear
from structlin_nn.trained import load_trained, open_trained


def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x, return_features=True)[1].double()


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


class TestCifar:
    @pytest.fixture
    def options(self, small_cifar: Path, tmp_path: Path) -> cifar.Options:
        return cifar.Options(data=small_cifar, unverified=True, quiet=True, out=tmp_path / "run")

    def test_learns_the_embedded_images(self, tmp_path: Path) -> None:
        config = cifar.Config(
            width=64, structure="block_tensor_train", epochs=1, batch_size=100, augment=False, mixup=0,
            label_smoothing=0, threads=1, eval_every=1,
        )  # fmt: skip
        result = cifar.train(config, cifar.Options(out=tmp_path / "run", quiet=True))
        first, last = read_record(result.record).evaluations
        assert first["test_loss"] == pytest.approx(math.log(10), abs=1e-4)
        assert last["test_loss"] < 0.35 * first["test_loss"]
        assert last["test_error"] < 0.35

    @pytest.mark.parametrize("structure", ["dense", "monarch", "low_rank", "kronecker"])
    def test_memorises_a_few_images(self, structure: str, options: cifar.Options) -> None:
        config = cifar.Config(
            data_set="cifar10", width=36, structure=structure, epochs=8, eval_every=8, batch_size=32, augment=False,
            mixup=0, label_smoothing=0, threads=1, input_lr_mult=1.0,
        )  # fmt: skip
        assert cifar.train(config, options).evaluation["train_loss"] < 1.2 < 2.3

    def test_steps_and_evaluations_against_a_plain_loop(self, config: cifar.Config, options: cifar.Options) -> None:
        """Beside torch's own Adam on the same batches; the mixed labels, the change of features, and the evaluation."""
        config = config.replace(epochs=1, eval_every=1, measure_every=1, lr=1e-2, augment=False, mixup=0.0)
        result = cifar.train(config, options)
        data = load_images("cifar10", options.data, verify=False).as_32x32_rgb()
        torch.manual_seed(config.seed)
        model = cifar.build(config, 10)
        base = base_of(cifar.build, config, 10)
        optimizer = make_optimizer(config, model, base, extra_multipliers={"input": 0.1})
        rates = [group["lr"] for group in optimizer.param_groups]
        x = normalize(torch.from_numpy(data.train_images), data.mean, data.std)
        y, losses, right, changes = torch.from_numpy(data.train_labels), [], 0, []
        for step in range(7):
            rows = torch.from_numpy(batch_rows(240, 32, config.seed, step))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / 7)) / 2
            before, logits = features(model, x), model(x[rows])
            losses.append(F.cross_entropy(logits, y[rows], label_smoothing=config.label_smoothing))
            right += int((logits.argmax(1) == y[rows]).sum())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            changes.append(rms(features(model, x) - before))
        last = result.evaluation
        assert last["batch_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 7, rel=1e-5)
        assert last["batch_error"] == pytest.approx(1 - right / 224)
        assert last["statistics"]["feature_change"] == pytest.approx(sum(changes) / 7, rel=1e-4)
        with torch.no_grad():
            logits = model(normalize(torch.from_numpy(data.test_images), data.mean, data.std))
        labels = torch.from_numpy(data.test_labels)
        assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        assert last["test_error"] == pytest.approx((logits.argmax(1) != labels).double().mean().item())
        trained = load_trained(options.out).state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)

    def test_steps_end_within_the_last_epoch(self, config: cifar.Config, options: cifar.Options) -> None:
        result = cifar.train(config.replace(steps=17), options)
        assert (result.step, result.finished, result.evaluation["epoch"]) == (17, True, pytest.approx(17 / 7))
        for steps in (14, 22):
            with pytest.raises(ValueError, match=f"{steps} steps of 7 an epoch end in epoch [24]: epochs must be"):
                cifar.train(config.replace(steps=steps), replace(options, out=options.out / "other"))

    def test_a_rate_of_zero_keeps_the_first_layer(self, config: cifar.Config, options: cifar.Options) -> None:
        config = config.replace(optimizer="adamw", weight_decay=0.1, independent_decay=True, input_lr_mult=0.0)
        seen: list[dict[str, torch.Tensor]] = []

        def watch(run: Any, loss: float | None) -> bool:
            seen.append({name: value.detach().clone() for name, value in run.model.named_parameters()})
            return len(seen) == 3

        cifar.train(config, options, watch=watch)
        moved = {name for name, value in seen[0].items() if not torch.equal(value, seen[2][name])}
        kept = {name for name in seen[0] if name.startswith("input.factors")}
        assert kept
        assert moved == seen[0].keys() - kept

    def test_muon_learns(self, config: cifar.Config, options: cifar.Options) -> None:
        config = config.replace(optimizer="muon", lr=0.02, adam_lr=3e-3, mixup=0.0, label_smoothing=0.0, augment=False)
        whole = cifar.train(config, options)
        assert whole.evaluation["train_loss"] < 2.1
        part = replace(options, out=options.out.with_name("part"))
        cifar.train(config, part, watch=lambda run, loss: run.step == 9)
        resumed = cifar.train(config, replace(part, resume=True))
        assert resumed.evaluation["test_loss"] == whole.evaluation["test_loss"]

    def test_own_data_and_model(self, options: cifar.Options) -> None:
        """A model of one's own is structured, rated against its own base width, recorded, and loaded again."""
        data = load_images("fashion")
        few = replace(data, train_images=data.train_images[:300], train_labels=data.train_labels[:300])

        def build(config: cifar.Config, classes: int) -> torch.nn.Module:
            hidden = StructureConfig(config.structure, config.options)
            from structlin_nn.models import MLP, MLPConfig

            inner = MLP(MLPConfig(config.width, 1, classes, (1, 28, 28), structure=hidden))
            return torch.nn.Sequential(torch.nn.Identity(), inner)

        config = cifar.Config(
            width=32, structure="monarch", epochs=2, batch_size=50, augment=False, mixup=0.0, input_lr_mult=1.0,
            threads=1,
        )  # fmt: skip
        result = cifar.train(config, options, build=build, data=few)
        record = read_record(result.record)
        assert record.evaluations[-1]["train_loss"] < record.evaluations[0]["train_loss"]
        assert record.evaluations[-1]["statistics"]["feature_rms"] is None
        up = next(layer for layer in record.header["structures"] if layer["name"] == "1.blocks.0.up")
        assert up["factors"][0]["lr_multiplier"] == pytest.approx(64 / (up["factors"][0]["fan_in"] * 2))
        with pytest.raises(ValueError, match="trained your own model"):
            load_trained(options.out)
        model = load_trained(options.out, model=build(config, 10))
        assert torch.isfinite(model(torch.zeros(1, 1, 28, 28))).all()


class TestGPT2:
    @pytest.fixture
    def options(self, text_tokens: Path, tmp_path: Path) -> gpt2.Options:
        return gpt2.Options(data=text_tokens, quiet=True, out=tmp_path / "run")

    def test_learns(self, options: gpt2.Options) -> None:
        config = gpt2.Config(
            width=64, base_width=64, depth=2, heads=4, context=32, batch_size=16, steps=70, warmup_steps=10, lr=3e-3,
            structure="block_tensor_train", rms_cap=True, eval_every=70, eval_sequences=160, threads=1,
        )  # fmt: skip
        first, last = read_record(gpt2.train(config, options).record).evaluations
        assert first["val_loss"] == pytest.approx(math.log(256), abs=1e-3)
        assert last["val_loss"] < 0.6 * first["val_loss"]
        assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-12)
        assert last["tokens"] == 70 * 16 * 32

    def test_validation_is_the_whole_split(self, gpt2_config: gpt2.Config, options: gpt2.Options) -> None:
        config = gpt2_config.replace(ema=0.0)
        result = gpt2.train(config, options)
        tokens = torch.from_numpy(np.array(open_tokens(options.data).val, dtype=np.int64))
        model, total = load_trained(options.out).double(), 0.0
        for start in range(0, len(tokens) - 1, config.context):
            piece = tokens[start : start + config.context + 1]
            with torch.no_grad():
                logits = model(piece[None, :-1])[0]
            total -= logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]].sum().item()
        assert result.evaluation["val_tokens"] == len(tokens) - 1
        assert result.evaluation["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)

    def test_the_validation_set_does_not_depend_on_parts(self, gpt2_config: gpt2.Config, options: gpt2.Options) -> None:
        """Nor on the time: with a rate of nearly 0 all evaluations are the same, also of a run that is resumed."""
        config = gpt2_config.replace(
            lr=1e-30, ema=0.0, weight_decay=0.0, whole_validation=False, steps=4, eval_every=2, accumulate=1
        )
        found = []
        for parts in (1, 4):
            out = options.out / str(parts)
            gpt2.train(config, replace(options, out=out), watch=lambda run, loss: run.step == 3)
            gpt2.train(config.replace(accumulate=parts), replace(options, out=out, resume=True))
            lines = read_record(out / "record.jsonl").evaluations
            found += [(line["val_tokens"], line["train_loss"], line["val_loss"]) for line in lines]
        assert {tokens for tokens, _, _ in found} == {24 * 16}
        for part in (1, 2):
            assert [line[part] for line in found] == pytest.approx([found[0][part]] * len(found), rel=1e-6)

    def test_averages_are_evaluated_and_reloaded(self, gpt2_config: gpt2.Config, options: gpt2.Options) -> None:
        mean: dict[str, torch.Tensor] = {}

        def follow(run: Any, loss: float | None) -> None:
            for name, p in run.model.named_parameters():
                mean[name] += 0.1 * (p.detach().double() - mean[name])

        def build(config: gpt2.Config, vocabulary: int) -> torch.nn.Module:
            model = gpt2.build(config, vocabulary)
            if next(model.parameters()).device.type == "cpu":
                mean.update({name: p.detach().double().clone() for name, p in model.named_parameters()})
            return model

        evaluation = gpt2.train(gpt2_config, options, build=build, watch=follow).evaluation
        averaged, plain = load_trained(options.out, average=True), load_trained(options.out)
        for name, parameter in averaged.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), mean[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(averaged.head.factors[0], plain.head.factors[0])
        val = torch.from_numpy(np.array(open_tokens(options.data).val[:401], dtype=np.int64))
        x, y = val[:-1].view(-1, 16), val[1:].view(-1, 16)
        with torch.no_grad():
            expected = F.cross_entropy(averaged(x).flatten(0, 1), y.flatten()).item()
        assert evaluation["val_loss"] == pytest.approx(expected, rel=1e-5)

    def test_base_and_vocabulary(self, gpt2_config: gpt2.Config, options: gpt2.Options) -> None:
        """The base model has this one's expansion, or the paper's; the dense base trains at the rate itself."""
        for expansion, width in ((0, 64), (1, 16)):
            config = gpt2_config.replace(
                base_width=16, vocabulary=300, base_expansion=expansion, steps=4, whole_validation=False
            )
            gpt2.train(config, replace(options, out=options.out / str(width)))
            for layer in read_record(options.out / str(width) / "record.jsonl").header["structures"]:
                base = width if layer["name"].endswith("down") else 16
                for factor in layer["factors"]:
                    expected = base / (factor["fan_in"] * len(layer["factors"]))
                    assert factor["lr_multiplier"] == pytest.approx(expected), layer["name"]
        dense = gpt2_config.replace(structure="dense", options={}, rms_cap=False, base_width=32)
        model = gpt2.build(dense, 256)
        groups = make_optimizer(dense, model, base_of(gpt2.build, dense, 256)).param_groups
        assert {group["lr"] for group in groups} == {dense.lr}
        with pytest.raises(ValueError, match="vocabulary 200 is smaller than that of the data, 256"):
            gpt2.train(gpt2_config.replace(vocabulary=200), options)

    def test_decay_is_nanogpts(self, gpt2_config: gpt2.Config) -> None:
        """All matrices, embeddings too; and by lr * weight_decay for all of them where it is independent."""
        for decayed, independent in ((True, False), (False, True)):
            config = gpt2_config.replace(decay_embeddings=decayed, independent_decay=independent, lr=1e-3)
            model = gpt2.build(config, 256)
            decay = ("factor", "weight", "embedding") if decayed else ("factor", "weight")
            optimizer = make_optimizer(config, model, base_of(gpt2.build, config, 256), decay=decay)
            found = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["names"]}
            for name, (lr, coefficient) in found.items():
                matrix = ".factors." in name or (decayed and name in ("tokens.weight", "positions.weight"))
                assert (coefficient > 0) == matrix, name
                if matrix and independent:
                    assert lr * coefficient == pytest.approx(1e-3 * 0.1), name
            assert len({lr for lr, _ in found.values()}) > 2

    def test_damaged_tokens(self, gpt2_config: gpt2.Config, options: gpt2.Options, tmp_path: Path) -> None:
        shutil.copytree(options.data, tmp_path / "tokens")
        np.array([0] * 100 + [256], dtype="<u2").tofile(tmp_path / "tokens" / "train.bin")
        with pytest.raises(ValueError, match="256"):
            gpt2.train(gpt2_config, replace(options, data=tmp_path / "tokens"))
        assert not options.out.exists()


LARGER = ("resnet18", "fastvit_t8")


class TestImageNet:
    @pytest.fixture
    def options(self, image_tree: Path, tmp_path: Path) -> imagenet.Options:
        return imagenet.Options(data=image_tree, quiet=True, out=tmp_path / "run")

    def test_learns(self, options: imagenet.Options) -> None:
        config = imagenet.Config(
            width=32, base_width=32, depth=2, heads=2, patch=8, image_size=32, batch_size=16, epochs=10, lr=2e-3,
            warmup_epochs=1.0, structure="block_tensor_train", augment="", erasing=0.0, color_jitter=0.0, mixup=0.0,
            workers=0, eval_every=10, threads=1,
        )  # fmt: skip
        first, last = read_record(imagenet.train(config, options).record).evaluations
        assert first["val_loss"] == pytest.approx(math.log(3), abs=1e-4)
        assert last["val_loss"] < 0.75 * first["val_loss"]
        assert last["val_error"] < 0.5
        assert last["val_top5_error"] == pytest.approx(0, abs=1e-12)

    def test_the_papers_augmentation_trains(self, imagenet_config: imagenet.Config, options: imagenet.Options) -> None:
        """Rand-augment, jitter, erasing and mixup, with workers, for some epochs: no image is refused."""
        paper = recipe("imagenet-vit")
        config = imagenet_config.replace(
            augment=paper.augment, erasing=paper.erasing, color_jitter=paper.color_jitter, workers=2, epochs=2
        )
        assert imagenet.train(config, options).finished

    @pytest.mark.parametrize(
        "name",
        ["test_resnet", "test_efficientnet", "test_vit", *(pytest.param(n, marks=pytest.mark.slow) for n in LARGER)],
    )
    def test_models_of_timm_of_any_size(self, name: str, imagenet_config: Any, options: imagenet.Options) -> None:
        timm = pytest.importorskip("timm")
        if not timm.is_model(name):
            pytest.skip(f"this timm has no {name}")
        config = imagenet_config.replace(
            model=f"timm:{name}", image_size=64, epochs=1, structure="dense", options={}, batch_size=8, ema=0.5,
            depth=12, heads=4, patch=32, width=0, base_width=0,
        )  # fmt: skip
        result = imagenet.train(config, options, watch=lambda run, loss: run.step == 2)
        assert result.step == 2
        averaged, plain = (load_trained(options.out, average=average) for average in (True, False))
        assert averaged(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
        for buffer, value in averaged.named_buffers():  # batch norm's statistics are averaged too
            if value.is_floating_point() and value.numel():
                assert not torch.equal(value, plain.get_buffer(buffer)), buffer
        assert open_trained(options.out).image_size == 64

    def test_a_broken_image(self, imagenet_config: Any, options: imagenet.Options, tmp_path: Path) -> None:
        shutil.copytree(options.data, tmp_path / "tree")
        path = tmp_path / "tree" / "train" / "bag" / "3.png"
        path.write_bytes(path.read_bytes()[:50])
        options = replace(options, data=tmp_path / "tree")
        with pytest.raises(ValueError, match=r"3\.png") as caught:
            imagenet.train(imagenet_config, options)
        assert "The run had begun." in caught.value.__notes__


def test_the_average_holds_buffers() -> None:
    norm = torch.nn.BatchNorm1d(3)
    average = Average(norm, decay=0.75)
    norm(torch.randn(8, 3) + 5)
    average.update()
    expected = 0.25 * norm.running_mean.double()
    with average.in_place():
        torch.testing.assert_close(norm.running_mean.double(), expected)
        assert int(norm.num_batches_tracked) == 1


class TestProbe:
    @pytest.mark.parametrize("name", ["cifar-mlp", "cifar-vit"])
    def test_gains_are_those_of_the_layers(self, name: str) -> None:
        torch.manual_seed(0)
        structure = StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True)
        model = build_model(name, width=32, structure=structure)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(6, 3, 32, 32)
        found = Probe(model, model, x).statistics()
        assert found["feature_rms"] == pytest.approx(rms(features(model, x)), rel=1e-5)
        assert (found["feature_change"], found["measured_steps"]) == (None, 0)
        layer = model.input if name == "cifar-mlp" else model.patch_embedding
        seen = x.flatten(1)[:, model.permutation] if name == "cifar-mlp" else model.patch_norm(model.patchify(x))
        key = "input" if name == "cifar-mlp" else "patch_embedding"
        assert found["gains"][key] == pytest.approx(rms(seen @ layer.operator.to_dense().T) / rms(seen), rel=1e-4)
        gains = [gain.item() for gain in layer.gains]
        assert found["learned_gains"][key] == pytest.approx(math.prod(gains), rel=1e-5)
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())

    def test_layers_of_experts_are_left_out(self) -> None:
        class Mixture(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = StructuredExperts(3, 8, 8, structure="low_rank", rank=2, rms_cap=True)
                self.output = StructuredLinear(8, 4, structure="low_rank", rank=2)

            def forward(self, x: torch.Tensor, return_features: bool = False) -> object:
                features = self.experts(x, [1, 0, 4])
                return (self.output(features), features) if return_features else self.output(features)

        found = Probe(model := Mixture(), model, torch.randn(5, 8)).statistics()
        assert (set(found["gains"]), found["learned_gains"]) == ({"output"}, {})

    def test_a_layer_that_reads_zeros_has_no_gain(self) -> None:
        model = build_model("cifar-mlp", width=16)
        found = Probe(model, model, torch.zeros(2, 3, 32, 32)).statistics()
        assert found["gains"]["input"] is None
        assert found["learned_gains"] == {}


class TestStartingWeights:
    @pytest.fixture(scope="class")
    @classmethod
    def dense(cls, tmp_path_factory: pytest.TempPathFactory, text_tokens: Path) -> Path:
        """A small GPT-2, trained for some steps."""
        config = gpt2.Config(
            width=32, base_width=32, depth=2, heads=2, context=16, batch_size=16, steps=30, warmup_steps=3, lr=3e-3,
            eval_every=30, eval_sequences=32, threads=1,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("dense") / "run"
        gpt2.train(config, gpt2.Options(data=text_tokens, out=folder, quiet=True))
        return folder

    @pytest.fixture
    def projected(self, dense: Path, tmp_path: Path) -> Path:
        opened = open_trained(dense)
        compress(opened, "low_rank", mac_fraction=0.5)
        save_model(opened.model, tmp_path / "projected.safetensors")
        return tmp_path / "projected.safetensors"

    def config(self, source: Path, **changes: Any) -> gpt2.Config:
        usual = {"batch_size": 16, "steps": 20, "eval_every": 10, "eval_sequences": 32, "lr": 2e-3, "warmup_steps": 0}
        return gpt2.Config(**{**usual, **fields_of(str(source), gpt2.Config), **changes}, threads=1)

    def test_of_a_file_are_evaluated_first_and_improve(
        self, projected: Path, text_tokens: Path, tmp_path: Path
    ) -> None:
        ours = open_trained(projected).model.state_dict()
        seen: dict[str, Any] = {}
        options = gpt2.Options(data=text_tokens, out=tmp_path / "run", init_from=str(projected), quiet=True)
        config = self.config(projected, ema=0.9)

        def follow(run: Any, loss: float | None) -> None:
            seen.setdefault("ranks", {tuple(m.structure.factors[0].shape) for m in run.model.modules()
                                      if hasattr(m, "structure")})  # fmt: skip

        lines = read_record(gpt2.train(config, options, watch=follow).record).evaluations
        assert lines[-1]["batch_loss"] < lines[1]["batch_loss"]
        assert len(seen["ranks"]) > 2
        # A resumed run is bit-identical, and does not need the file.
        part = replace(options, out=tmp_path / "part")
        gpt2.train(config, part, watch=lambda run, loss: run.step == 13)
        projected.unlink()
        gpt2.train(config, replace(part, resume=True, init_from=None))
        one, two = (read_record(tmp_path / name / "record.jsonl") for name in ("run", "part"))
        assert [line | {"seconds": 0, "training_seconds": 0} for line in one.evaluations] == [
            line | {"seconds": 0, "training_seconds": 0} for line in two.evaluations
        ]
        assert one.header["init_from"] == two.header["init_from"]
        assert one.header["init_from"]["structured_layers"] == sum("factors.1" in name for name in ours)

    def test_of_tensors_alone_need_the_configuration(self, dense: Path, text_tokens: Path, tmp_path: Path) -> None:
        tensors = load_trained(dense).state_dict()
        path = tmp_path / "plain.safetensors"
        save_file(tensors, path)
        sizes = {"width": 32, "base_width": 32, "depth": 2, "heads": 2, "context": 16}
        assert fields_of(str(path), gpt2.Config) == {}
        options = gpt2.Options(data=text_tokens, out=tmp_path / "run", init_from=str(path), quiet=True)
        gpt2.train(self.config(path, **sizes, lr=1e-30, weight_decay=0.0), options)
        trained = load_trained(tmp_path / "run").state_dict()
        assert all(torch.equal(tensors[name], value) for name, value in trained.items())
        for changes, message in (
            ({"depth": 3}, "the file lacks blocks.2"),
            ({"depth": 1}, "but the model lacks, blocks.1"),
            ({"context": 8}, r"positions\.weight has shape \(16, 32\) in the file, but \(8, 32\)"),
        ):
            with pytest.raises(ValueError, match=message):
                gpt2.train(self.config(path, **{**sizes, **changes}), replace(options, out=tmp_path / "no"))
        assert not (tmp_path / "no").exists()

    def test_refused(self, projected: Path, dense: Path, text_tokens: Path, tmp_path: Path) -> None:
        options = gpt2.Options(data=text_tokens, out=tmp_path / "no", init_from=str(projected), quiet=True)
        with pytest.raises(ValueError, match="qk_norm is True there and False here"):
            gpt2.train(self.config(projected, qk_norm=False), options)
        with pytest.raises(ValueError, match="holds a model of gpt2, and this trains cifar"):
            fields_of(str(projected), cifar.Config)
        raw = bytearray(projected.read_bytes())
        raw[-3] ^= 1
        projected.write_bytes(raw)
        with pytest.raises(ValueError, match="the checksum of its tensors differs"):
            fields_of(str(projected), gpt2.Config)

    def test_on_the_command_line(self, projected: Path, text_tokens: Path, tmp_path: Path, cli) -> None:
        from structlin_nn.cli import main

        line = f"train gpt2 --data {text_tokens} --init-from {projected} --steps 4 --warmup-steps 1 --batch-size 4"
        line += f" --eval-sequences 4 --threads 1 --quiet --out {tmp_path / 'run'}"
        for more, message in (
            ("--width 48", "width is 32 there and 48 here"),
            ("--structure monarch", "structure is 'low_rank' there and 'monarch' here"),
        ):
            assert message in cli(line, *more.split(), code=2).err
        assert main([*line.split(), "--structure", "low_rank"]) == 0
        projected.unlink()
        assert main([*line.replace(f"--init-from {projected} ", "").split(), "--resume"]) == 0
        assert read_record(tmp_path / "run" / "record.jsonl").header["config"]["heads"] == 2


OWN_MODELS = """
from torch import nn

def images(width, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                         nn.Linear(width, outputs))

def tokens(width, outputs, hidden=2):
    layers = [nn.Embedding(outputs, width)]
    for _ in range(hidden):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
"""


class TestModelsByName:
    """`--model` of the command: a model of timm, of transformers, or of a module of one's own."""

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("cifar", "--model own_models:images --width 32 --structure monarch --options blocks=4 --batch-size 40 "
             "--epochs 1 --data-set cifar10"),
            ("cifar", "--model timm:test_resnet --batch-size 40 --epochs 1 --data-set cifar10"),
            ("gpt2", "--model own_models:tokens --width 32 --base-width 16 --structure low_rank "
             "--model-options hidden=1"),
            ("gpt2", "--model hf:gpt2 --structure low_rank --model-options n_layer=1 n_embd=32 n_head=2"),
            ("imagenet", "--model hf:vit --structure monarch --options blocks=4 --epochs 1 --batch-size 16 "
             "--image-size 32 "
             "--augment= --workers 0 --warmup-epochs 0 --model-options num_hidden_layers=1 hidden_size=32 "
             "num_attention_heads=2 intermediate_size=64 patch_size=8"),
        ],
    )  # fmt: skip
    def test_trains_and_resumes(
        self, name: str, arguments: str, small_cifar: Path, text_tokens: Path, image_tree: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        for library in ("timm:", "hf:"):
            if library in arguments:
                pytest.importorskip({"timm:": "timm", "hf:": "transformers"}[library])
        monkeypatch.chdir(tmp_path)
        (tmp_path / "own_models.py").write_text(OWN_MODELS)
        words = ["train", name, *arguments.split(), "--threads", "1", "--quiet", "--out", "run"]
        words += {
            "cifar": ["--data", str(small_cifar), "--unverified"],
            "gpt2": ["--data", str(text_tokens), "--context", "16", "--batch-size", "4", "--eval-sequences", "4",
                     "--steps", "3", "--warmup-steps", "1", "--eval-every", "3"],
            "imagenet": ["--data", str(image_tree)],
        }[name]  # fmt: skip
        assert main(words) == 0, capsys.readouterr().err
        record = read_record(tmp_path / "run" / "record.jsonl")
        assert record.finished
        structured = "--structure" in words
        assert bool(record.header["structures"]) == structured
        if structured:
            multipliers = [f["lr_multiplier"] for layer in record.header["structures"] for f in layer["factors"]]
            assert min(multipliers) > 0
        assert main([*words, "--resume"]) == 0
        if "timm:" not in arguments:
            model = words[words.index("--model") + 1]
            with pytest.raises(ValueError, match=f"trained {re.escape(model)}, whose .* model=..."):
                load_trained(tmp_path / "run")


def test_a_cap_without_a_structure_caps_dense_layers() -> None:
    pytest.importorskip("transformers")
    options = {"n_layer": 1, "n_head": 2, "n_embd": 32, "bos_token_id": 0, "eos_token_id": 0}
    model = build_named("hf:gpt2", 50, StructureConfig(rms_cap=True), size_of_outputs="vocab_size", **options)
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    assert len(layers) == 4
    assert all(layer.rms_cap and layer.structure.macs == layer.in_features * layer.out_features for layer in layers)


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(config: cifar.Config, small_cifar: Path, tmp_path: Path) -> None:
    config = config.replace(epochs=1, eval_every=1, depth=1, lr=1e-3)
    found = []
    for compiled in (False, True):
        options = cifar.Options(data=small_cifar, unverified=True, quiet=True, out=tmp_path / str(compiled))
        found.append(cifar.train(config.replace(compile=compiled), options).evaluation)
    for key in ("batch_loss", "test_loss"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4), key
