"""Projection of models of other libraries, made from configurations."""

import copy

import pytest
import torch
from torch import nn

from structlin_nn.counting import count
from structlin_nn.torch import StructuredLinear, project_linear, to_dense_linear
from structlin_nn.torch._project_calibration import gather


@pytest.mark.slow
def test_timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=4, num_classes=10
    ).eval()
    images = [torch.randn(8, 3, 32, 32) for _ in range(3)]
    with torch.no_grad():
        expected = model(images[0])
    macs = count(model, images[0][:1]).macs("linear")
    report = project_linear(model, "block_tensor_train", calibration=images, mac_fraction=0.5)
    names = [f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [line.names[0] for line in report.layers] == names
    assert report.macs_after <= 0.5 * report.macs_before
    saved = report.macs_before - report.macs_after
    assert macs - count(model, images[0][:1]).macs("linear") == 17 * saved  # 16 patches and the class token
    with torch.no_grad():
        compressed = model(images[0])
        to_dense_linear(model)
        torch.testing.assert_close(model(images[0]), compressed, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, StructuredLinear) for m in model.modules())
    full = project_linear(model, "low_rank", calibration=images, target_error=1e-3)
    assert all(line.output_error < 2e-3 for line in full.layers)
    assert expected.shape == compressed.shape


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(config).train()


def test_hugging_face_gpt2(gpt2):
    ids = [{"input_ids": torch.randint(100, (4, 16)), "use_cache": False} for _ in range(3)]
    report = project_linear(gpt2, "low_rank", layers="all", calibration=ids, mac_fraction=0.5)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert [line.names[0] for line in report.layers] == [f"transformer.h.{i}.{n}" for i in range(2) for n in parts]
    assert [name for name, _ in report.skipped] == ["lm_head"]
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert report.layers[0].shape == (144, 48)
    assert gpt2.training
    gpt2.eval()
    out = gpt2(**ids[0]).logits
    out.square().mean().backward()
    assert all(f.grad is not None for f in gpt2.transformer.h[0].mlp.c_fc.factors)
    to_dense_linear(gpt2)
    assert type(gpt2.transformer.h[0].attn.c_attn).__name__ == "Conv1D"  # as before
    torch.testing.assert_close(gpt2(**ids[0]).logits, out, rtol=1e-4, atol=1e-5)
    gpt2.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_conv1d_of_full_rank_is_exact(gpt2):
    """A weight that has the structure comes through a layer that stores it as (in, out)."""
    layer = gpt2.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        layer.weight.copy_(torch.randn(48, 5) @ torch.randn(5, 192))
        layer.bias.normal_()
    x = torch.randn(7, 48)
    expected = layer(x)
    (line,) = project_linear(gpt2, "low_rank", layers="transformer.h.1.mlp.c_fc", target_error=1e-5).layers
    assert line.options == {"rank": 5}
    torch.testing.assert_close(gpt2.transformer.h[1].mlp.c_fc(x), expected, rtol=1e-4, atol=1e-4)


def test_tied_head_of_gpt2_on_request(gpt2):
    ids = torch.randint(100, (4, 16))
    table = copy.deepcopy(gpt2.transformer.wte.weight)
    report = project_linear(gpt2, "low_rank", layers="lm_head", tied=True, rank=8, calibration=[{"input_ids": ids}])
    assert isinstance(gpt2.lm_head, StructuredLinear)
    assert torch.equal(gpt2.transformer.wte.weight, table)
    assert report.layers[0].shape == (100, 48)
    assert gpt2(ids).logits.shape == (4, 16, 100)


def test_torch_transformer_layers():
    """The fused inference path would not call the layers: calibration sees them, and it is off afterwards."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    data = [torch.randn(5, 7, 24) for _ in range(3)]
    report = project_linear(model, "low_rank", rank=4, layers="*.linear*", calibration=data)
    assert len(report.layers) == 4
    assert all(0 < line.output_error < 1 for line in report.layers)
    assert any("fused inference path switched off" in note for note in report.notes)
    with torch.no_grad():
        fast = model(data[0])
    torch.testing.assert_close(fast, model(data[0].requires_grad_()).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["linear", "keywords", "matmul", "called"])
def test_calibration_sees_the_inputs_of_weights_that_parents_read(way):
    """BEiT, EVA-02 and SwinV2 hand the weight to F.linear, and Mamba multiplies by it from the left."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(12, 8, bias=False), nn.Linear(8, 4)

        def forward(self, x):
            weight = self.inner.weight
            if way == "linear":
                y = nn.functional.linear(x, weight)
            elif way == "keywords":
                y = nn.functional.linear(input=x, weight=weight, bias=None)
            elif way == "matmul":
                y = (weight @ x.mT).mT
            else:
                y = self.inner(x)
            return self.head(y)

    torch.manual_seed(0)
    data = [torch.randn(3, 5, 12) for _ in range(4)]
    model = Parent()
    found = gather(model, {model.inner: "inner", model.head: "head"}, data, None)
    rows = torch.cat(data).reshape(-1, 12).double()
    torch.testing.assert_close(found[model.inner], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    weight = model.inner.weight.detach().double()
    torch.testing.assert_close(found[model.head], weight @ found[model.inner] @ weight.T, rtol=1e-5, atol=1e-5)
    report = project_linear(model, "low_rank", rank=4, layers="all", calibration=data)
    assert report.layers[0].output_error is not None


def test_a_parametrized_layer_is_named_as_such():
    """Its own originals are no other owners of a tied parameter."""
    model = nn.Sequential(nn.Linear(12, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="layer '1' has parametrizations, which would be lost"):
        project_linear(model, "low_rank", rank=2, layers="1")
    report = project_linear(model, "low_rank", rank=2)
    assert "layer '1' has parametrizations" in str(report)
