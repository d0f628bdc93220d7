"""Quantised factors: the tensors of torchao in the place of the parameters of structured layers."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from structlin_nn.torch import StructuredLinear, count, save_structured

quantization = pytest.importorskip("torchao.quantization")

FACTORS = r"re:.*factors\.\d+"
CONFIGS = {"Int8WeightOnlyConfig": 0.02, "Float8WeightOnlyConfig": 0.08}  # 8 bits, and 3 bits of mantissa


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        StructuredLinear(96, 80, structure="block_tensor_train", rank=2),
        nn.GELU(),
        StructuredLinear(80, 72, structure="low_rank", rank=16, rms_cap=True),
    ).requires_grad_(False)


def quantised(model: nn.Module, name: str) -> nn.Module:
    config = quantization.FqnToConfig(OrderedDict({FACTORS: getattr(quantization, name)()}))
    quantization.quantize_(model, config, filter_fn=None)
    return model


@pytest.mark.parametrize("name", CONFIGS)
class TestQuantised:
    def test_factors_are_quantised_and_the_error_is_small(self, name: str) -> None:
        dense, model = make(), quantised(make(), name)
        x = torch.randn(7, 96)
        kinds = {type(p).__name__ for p in model[0].factors.parameters()}
        assert kinds == {name.removesuffix("WeightOnlyConfig") + "Tensor"}
        error = (model(x) - dense(x)).norm() / dense(x).norm()
        assert 1e-4 < error < CONFIGS[name]

    def test_the_layer_multiplies_by_its_weight(self, name: str) -> None:
        model, x = quantised(make(), name), torch.randn(7, 96)
        layer = model[0]
        torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.bias)
        torch.testing.assert_close(torch.as_tensor(layer.operator @ torch.eye(96)), layer.weight)

    def test_copies_and_files_are_equal(self, name: str) -> None:
        model, x = quantised(make(), name), torch.randn(7, 96)
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        again = make()
        again.load_state_dict(torch.load(file), assign=True)
        assert torch.equal(again(x), y)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled_models_are_equal(self, name: str, backend: str) -> None:
        model, x = quantised(make(), name), torch.randn(7, 96)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))

    def test_bytes_on_disk(self, name: str) -> None:
        def size(model: nn.Module) -> int:
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            return len(file.getvalue())

        layers = [StructuredLinear(640, 512, structure="low_rank", rank=64) for _ in range(2)]
        assert size(quantised(layers[0], name)) < 0.35 * size(layers[1])

    def test_bytes_in_a_count(self, name: str) -> None:
        """One byte for each entry of a factor, and scales."""
        layer = StructuredLinear(640, 512, structure="low_rank", rank=64, bias=False).requires_grad_(False)
        entries, x = 64 * (640 + 512), torch.randn(7, 640)
        assert count(layer, x).param_bytes == 4 * entries
        found = count(quantised(layer, name), x)
        assert found.params == entries
        assert entries < found.param_bytes < 1.05 * entries


def test_one_factor_can_stay_as_it_is() -> None:
    layer, x = make()[0], torch.randn(7, 96)
    y = layer(x)
    config = OrderedDict({"factors.1": quantization.Int8WeightOnlyConfig()})
    quantization.quantize_(layer, quantization.FqnToConfig(config), filter_fn=None)
    assert [type(p).__name__ for p in layer.factors.parameters()] == ["Parameter", "Int8Tensor"]
    torch.testing.assert_close(layer(x), y, rtol=0.05, atol=0.05)


def test_a_quantised_model_is_not_written_to_a_file(tmp_path: Path) -> None:
    """All quantised tensors have the address 0, so that they would be taken for tied ones."""
    model = quantised(make(), "Int8WeightOnlyConfig")
    with pytest.raises(ValueError, match=r"0.factors.0 is a Int8Tensor, which a .safetensors file cannot hold"):
        save_structured(model, tmp_path / "quantised.safetensors")
