"""Bytes, training FLOPs and roofline times, from counts written out here."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import structlin
from structlin_nn.cli import common as cli_common
from structlin_nn.counting import (
    DEVICES,
    Device,
    count,
    count_loss,
    count_model,
    device,
    format_count,
    measure_cpu,
    roofline,
    training_bytes,
)

TOY = Device("toy", {"float32": 1e9, "bfloat16": 4e9}, 1e6, None, "made up")


def two_layers() -> Any:
    """6 -> 10 -> 3, with GELU: 70 + 33 parameters; a batch of 5 keeps 30 + 50 + 50 numbers."""
    return count(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)), torch.randn(5, 6))


class TestBytes:
    @pytest.mark.parametrize(("optimizer", "states"), [("adam", 2), ("adamw", 2), ("sign", 1), ("sgd", 1)])
    def test_against_formulas(self, optimizer: str, states: int) -> None:
        assert training_bytes(two_layers(), optimizer=optimizer) == {
            "weights": 4 * 103,
            "buffers": 0,
            "gradients": 4 * 103,
            "optimizer_states": states * 4 * 103,
            "activations": 4 * 130,
            "loss": 0,
            "total": 4 * ((2 + states) * 103 + 130),
        }

    def test_dtypes(self) -> None:
        found = training_bytes(two_layers(), dtype="float64", activation_dtype="bfloat16", optimizer="sgd")
        assert (found["weights"], found["activations"], found["optimizer_states"]) == (8 * 103, 2 * 130, 8 * 103)

    @pytest.mark.parametrize("soft", [False, True])
    def test_loss_against_torch(self, soft: bool) -> None:
        """What autograd really holds for model and loss, each storage once, without parameters."""
        model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7))
        x = torch.randn(5, 6)
        targets = torch.rand(5, 7) if soft else torch.randint(7, (5,))
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(x), targets)
        for parameter in model.parameters():
            held.pop(parameter.untyped_storage().data_ptr(), None)
        found = training_bytes(count(model, x), loss=count_loss((5, 7), soft=soft))
        assert found["activations"] + found["loss"] == sum(held.values())
        assert found["loss"] >= 4 * 35
        assert loss.requires_grad

    def test_loss_of_named_models(self) -> None:
        """Of a language model an array of the size of its logits, in float32 whatever the activations are."""
        sizes = {"depth": 1, "heads": 2, "context": 8, "vocabulary": 50}
        record = count_model("gpt2", width=16, batch_size=3, activation_dtype="bfloat16", **sizes)
        assert record["bytes"]["loss"] == 4 * (3 * 8 * 50 + 1) + 8 * 3 * 8
        assert record["bytes"]["total"] == sum(
            record["bytes"][key]
            for key in ("weights", "buffers", "gradients", "optimizer_states", "activations", "loss")
        )
        assert count_model("cifar-mlp", width=16, batch_size=3)["bytes"]["loss"] >= 4 * 2 * 3 * 10

    def test_against_torch(self) -> None:
        """Gradients and states of a real optimiser, with a frozen layer and a buffer."""
        model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 3))
        model[0].requires_grad_(False)
        x = torch.randn(5, 6)
        found = training_bytes(count(model, x))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        model(x).sum().backward()
        optimizer.step()
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        assert found["weights"] == size(model.parameters())
        assert found["buffers"] == size(model.buffers())
        assert found["gradients"] == size(p.grad for p in model.parameters() if p.grad is not None)
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert found["optimizer_states"] == size(moments)

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown optimizer 'lion'; one of adam, adamw, sign, sgd"):
            training_bytes(two_layers(), optimizer="lion")
        with pytest.raises(ValueError, match=r"unknown dtype 'int4' \(did you mean int8\?\); one of float64, float32"):
            training_bytes(two_layers(), dtype="int4")


class TestRoofline:
    def test_against_formulas(self) -> None:
        """All is bound by the slow memory of the toy but for its FLOPs, which are counted apart."""
        found = roofline(two_layers(), TOY)
        moved = (60 + 5 * 16) + (30 + 5 * 13)
        back = (60 + 5 * 16) + 2 * (30 + 5 * 13)  # the data need no gradient
        flops = 2 * 5 * (60 + 30) + 2 * 5 * (60 + 2 * 30)
        assert found.forward == pytest.approx(4 * moved / 1e6)
        assert found.backward == pytest.approx(4 * back / 1e6)
        assert found.compute == pytest.approx(flops / 1e9)
        assert found.intensity == pytest.approx(flops / (4 * (moved + back)))
        assert found.ridge == 1000
        assert found.update == pytest.approx(7 * 4 * 103 / 1e6), "read 4 and write 3 numbers for each parameter"
        assert found.step == found.forward + found.backward + found.update
        assert found.other > 0
        half = roofline(two_layers(), TOY, "bfloat16", optimizer="sgd")
        assert half.forward == found.forward / 2
        assert half.update == pytest.approx(5 * 4 * 103 / 1e6)

    def test_bound_by_compute(self) -> None:
        layer = nn.Linear(4096, 4096, bias=False, device="meta")
        counted = count(layer, torch.zeros(65536, 4096, device="meta"))
        found = roofline(counted, DEVICES["h100"], "bfloat16")
        assert found.forward == pytest.approx(2 * 65536 * 4096**2 / 989e12)
        assert found.compute == pytest.approx(found.forward + found.backward)
        few = roofline(count(layer, torch.zeros(1, 4096, device="meta")), DEVICES["h100"], "bfloat16")
        assert few.forward == pytest.approx(2 * (4096**2 + 2 * 4096) / 3.35e12)

    def test_devices(self) -> None:
        assert {"a100", "h100", "h200", "b200", "l40s", "rtx4090"} <= DEVICES.keys()
        assert (*DEVICES, "cpu") == cli_common.DEVICES
        for found in DEVICES.values():
            assert found.rate("bfloat16") >= 2 * found.rate("tfloat32") * 0.98
            assert found.rate("tfloat32") >= found.rate("float32")
            assert "NVIDIA" in found.source
            assert found.capability in {(8, 0), (8, 9), (9, 0), (10, 0)}
            assert found.bandwidth < found.l2_bandwidth
            assert found.rate("int8") >= 1.99 * found.rate("bfloat16"), "half the bytes, twice the rate"
            assert found.peak.get("float8_e5m2", 2e15) >= 1.99 * found.rate("bfloat16")
        assert device("a100") is DEVICES["a100"]
        with pytest.raises(ValueError, match=r"unknown device 'b300' \(did you mean b200\?\); one of a100, h100, h200"):
            device("b300")
        with pytest.raises(ValueError, match="the rate of toy in 'float64' is not known; one of float32, bfloat16"):
            TOY.rate("float64")

    def test_this_cpu(self) -> None:
        """Some three numbers that any machine of this century has."""
        found = measure_cpu("float32")
        assert 1e8 < found.rate("float32") < 1e15
        assert 1e8 < found.bandwidth < 1e13
        assert found.source == "measured now"
        with pytest.raises(ValueError, match="unknown dtype 'int4'"):
            measure_cpu("int4")
        with pytest.raises(ValueError, match="in float64, float32, bfloat16 or float16, got int8"):
            measure_cpu("int8")


class TestRecord:
    def test_run(self) -> None:
        sizes = {"width": 24, "depth": 2, "heads": 3, "head_dim": 10, "vocabulary": 35, "context": 9}
        record = count_model("gpt2", batch_size=4, steps=10, device="h100", dtype="bfloat16", **sizes)
        assert record["tokens"] == 9
        assert record["per_token"]["forward_macs"] == record["forward_macs"] / 9
        assert record["per_token"]["training_flops"] == 2 * record["training_macs"] / 9
        assert record["run"] == {
            "batch_size": 4,
            "steps": 10,
            "samples": 40,
            "tokens": 360,
            "training_flops_per_step": 2 * 4 * record["training_macs"],
            "training_flops": 2 * 40 * record["training_macs"],
        }
        assert record["bytes"]["weights"] == 2 * record["trainable_params"]
        assert record["roofline"]["run"] == 10 * record["roofline"]["step"] > 0
        assert record["roofline"]["device"] == "NVIDIA H100 SXM 80 GB"
        head = record["layers"][-1]
        assert head["intensity"] == structlin.intensity(structlin.design("dense", (35, 24)), 4 * 9, "bfloat16")
        assert json.loads(json.dumps(record, allow_nan=False)) is not None
        table = format_count(record)
        for text in ("training FLOPs, 10 steps", "bytes of a training step, batch of 4, bfloat16", "products, forward"):
            assert text in table, text

    def test_activations_grow_with_the_batch(self) -> None:
        one, three = (count_model("cifar-mlp", width=16, batch_size=n)["bytes"] for n in (1, 3))
        assert three["activations"] == 3 * one["activations"]
        assert three["weights"] == one["weights"]
        assert count_model("cifar-mlp", width=16)["bytes"] == one

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"steps": 3}, "steps need a batch size"),
            ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
            ({"batch_size": 2, "steps": 1.5}, "steps must be a positive integer, got 1.5"),
            ({"dtype": "int4"}, "unknown dtype 'int4'"),
            ({"device": "h300"}, "unknown device 'h300'"),
        ],
    )
    def test_refused(self, keywords: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            count_model("cifar-mlp", width=16, **keywords)
