"""Statistics of features and gains, against what they are said to be."""

import math
from pathlib import Path

import pytest
import torch

from structlin_nn.data.augment import normalize
from structlin_nn.models import StructureConfig, build_model
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, RunConfig, TrainConfig
from structlin_nn.training.loop import fit, load_trained, setup
from structlin_nn.training.records import read_record
from structlin_nn.training.statistics import Probe, rms


def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x, return_features=True)[1].double()


def test_rms() -> None:
    x = torch.randn(3, 5, 7)
    assert rms(x).item() == pytest.approx(math.sqrt((x.double() ** 2).sum().item() / 105), rel=1e-12)


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
        assert found["feature_rms"] == pytest.approx(rms(features(model, x)).item(), rel=1e-5)
        assert found["feature_change"] is None
        assert found["measured_steps"] == 0
        layer = model.input if name == "cifar-mlp" else model.patch_embedding
        seen = x.flatten(1)[:, model.permutation] if name == "cifar-mlp" else model.patch_norm(model.patchify(x))
        expected = rms(seen @ layer.operator.to_dense().T) / rms(seen)
        key = "input" if name == "cifar-mlp" else "patch_embedding"
        assert found["gains"][key] == pytest.approx(expected.item(), rel=1e-4)
        gains = [gain.item() for gain in layer.gains]
        assert found["learned_gains"][key] == pytest.approx(math.prod(gains), rel=1e-5)
        assert model.training

    def test_a_layer_that_reads_zeros_has_no_gain(self) -> None:
        model = build_model("cifar-mlp", width=16)
        found = Probe(model, model, torch.zeros(2, 3, 32, 32)).statistics()
        assert found["gains"]["input"] is None
        assert found["learned_gains"] == {}

    def test_leaves_no_hooks(self) -> None:
        model = build_model("cifar-mlp", width=16)
        Probe(model, model, torch.zeros(2, 3, 32, 32)).statistics()
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("every", [0, 1, 3])
def test_change_of_features_per_step(every: int, config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
    """Beside the same steps taken one by one, with the features of the whole batch before and after each."""
    config = config.replace(measure_every=every, depth=2, bias=False, schedule="constant", lr=1e-2)
    record = read_record(fit(setup(config, tmp_path / "run", data_root=small_cifar, verify=False)).record)
    run = setup(config, tmp_path / "hand", data_root=small_cifar, verify=False)
    data = run.task.data  # type: ignore[attr-defined]
    x = normalize(torch.from_numpy(data.train_images), data.mean, data.std)
    changes = []
    for step in range(21):
        before = features(run.model, x)
        run.stepper.step(run.task.parts(), run.task.loss, run.task.share(step))
        changes.append(rms(features(run.model, x) - before).item())
    measured = {0: [[], [14], [21]], 1: [[], range(1, 15), range(15, 22)], 3: [[], [3, 6, 9, 12], [15, 18, 21]]}[every]
    for line, steps in zip(record.evaluations, measured, strict=True):
        found = line["statistics"]
        assert found["measured_steps"] == len(steps)
        mean = sum(changes[step - 1] for step in steps) / len(steps) if steps else None
        assert found["feature_change"] == (None if mean is None else pytest.approx(mean, rel=1e-4))
    last = record.evaluations[-1]["statistics"]
    assert last["feature_rms"] == pytest.approx(rms(features(load_trained(tmp_path / "run"), x)).item(), rel=1e-5)
    assert set(last["gains"]) == {layer["name"] for layer in record.header["structures"]}


def test_a_model_without_biases(config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
    run = setup(config.replace(bias=False, depth=2), tmp_path, data_root=small_cifar, verify=False)
    assert not [name for name, _ in run.model.named_parameters() if "bias" in name]
    assert len(run.model.blocks) == 2


def test_sums_of_changes_are_resumed(config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
    config = config.replace(measure_every=2)
    data = {"data_root": small_cifar, "verify": False}
    whole = fit(setup(config, tmp_path / "whole", **data)).evaluation
    calls = iter(range(1, 100))
    fit(setup(config, tmp_path / "part", **data), stop=lambda: next(calls) == 18)
    part = fit(setup(config, tmp_path / "part", resume=True, **data)).evaluation
    assert part["statistics"] == whole["statistics"]
    assert whole["statistics"]["measured_steps"] == 3


def test_steps_end_within_the_last_epoch(config: TrainConfig, small_cifar: Path, tmp_path: Path) -> None:
    data = {"data_root": small_cifar, "verify": False}
    result = fit(setup(config.replace(steps=17), tmp_path, **data))
    assert (result.step, result.finished, result.evaluation["epoch"]) == (17, True, pytest.approx(17 / 7))
    for steps in (14, 22):
        with pytest.raises(ValueError, match=f"{steps} steps of 7 an epoch end in epoch [24]: epochs must be"):
            setup(config.replace(steps=steps), tmp_path / "other", **data)


@pytest.mark.parametrize("kind", ["gpt2", "imagenet", "timm"])
def test_of_every_pipeline(
    kind: str,
    gpt2_config: GPT2TrainConfig,
    imagenet_config: ImageNetTrainConfig,
    text_tokens: Path,
    image_tree: Path,
    tmp_path: Path,
) -> None:
    run_config: RunConfig = gpt2_config.replace(steps=5, eval_every=2) if kind == "gpt2" else imagenet_config
    if kind == "timm":
        pytest.importorskip("timm")
        run_config = imagenet_config.replace(
            model="timm:test_vit", width=0, base_width=0, image_size=160, epochs=1, structure="low_rank",
            options={"rank": 4}, lr=1e-3,
        )  # fmt: skip
    data = {"data_root": text_tokens if kind == "gpt2" else image_tree}
    record = read_record(fit(setup(run_config, tmp_path / "run", **data)).record)
    run = setup(run_config, tmp_path / "hand", **data)
    batch = run.task.probe()
    assert len(batch) == (4 if kind == "gpt2" else 21)

    def of_batch(model: torch.nn.Module) -> torch.Tensor:
        if kind != "timm":
            return features(model, batch)
        with torch.no_grad():
            return model.forward_head(model.forward_features(batch), pre_logits=True).double()  # type: ignore[operator]

    first, *_, last = (line["statistics"] for line in record.evaluations)
    assert (first["measured_steps"], first["feature_change"], last["measured_steps"]) == (0, None, 1)
    trained = of_batch(load_trained(tmp_path / "run"))
    assert last["feature_rms"] == pytest.approx(rms(trained).item(), rel=1e-5)
    for step in range(run.steps - 1):
        run.stepper.step(run.task.parts(), run.task.loss, run.task.share(step))
    assert last["feature_change"] == pytest.approx(rms(trained - of_batch(run.model.eval())).item(), rel=1e-3)
    assert set(last["gains"]) == {layer["name"] for layer in record.header["structures"]}
