"""Replacement of linear layers in models of several kinds."""

import copy
import re

import pytest
import torch
from helpers.layers import Tied, losses, structured
from torch import nn
from torch.nn import functional as F

import structlin
from structlin_nn.torch import StructuredLinear, replace_linear


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """Patches of 16 numbers in, 10 logits out."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(16, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.patch(x)).mean(1)))


VIT_LAYERS = (
    "patch",
    *(f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")),
    "head",
)


@pytest.mark.parametrize(
    ("layers", "exclude", "chosen"),
    [
        ("all", (), VIT_LAYERS),
        ("all_but_last", (), VIT_LAYERS[:-1]),
        ("intermediate", (), VIT_LAYERS[1:-1]),
        ("blocks.*.attn.*", (), [n for n in VIT_LAYERS if "attn" in n]),
        (["*.qkv", "head"], (), [n for n in VIT_LAYERS if n.endswith("qkv") or n == "head"]),
        (re.compile(r"blocks\.\d+\.mlp\.\d"), (), [n for n in VIT_LAYERS if "mlp" in n]),
        (re.compile(r"patch"), (), ["patch"]),
        (lambda name, layer: layer.bias is None, (), [n for n in VIT_LAYERS if n.endswith("qkv")]),
        ("all", "head", VIT_LAYERS[:-1]),
        ("all_but_last", ["*.attn.*", re.compile("patch")], [n for n in VIT_LAYERS if "mlp" in n]),
    ],
)
def test_selection(layers, exclude, chosen):
    model = SmallViT()
    report = replace_linear(model, "low_rank", rank=2, layers=layers, exclude=exclude)
    assert structured(model) == list(chosen)
    assert [r.names for r in report.layers] == [(n,) for n in chosen]


def test_small_vit_trains():
    torch.manual_seed(0)
    model = SmallViT()
    report = replace_linear(model, "block_tensor_train", layers="all_but_last", zero_init=["*.attn.proj", "*.mlp.2"])
    for block in model.blocks:
        assert block.attn.qkv.bias is None
        for layer in (block.attn.proj, block.mlp[2]):
            assert layer.zero_init
            assert not layer.factors[-1].any()
        assert block.mlp[0].factors[-1].any()
    assert sum(r.params_after for r in report.layers) == sum(
        p.numel() for m in model.modules() if isinstance(m, StructuredLinear) for p in m.parameters()
    )
    x, labels = torch.randn(32, 5, 16), torch.randint(0, 10, (32,))
    first, *_, last = losses(torch.optim.Adam(model.parameters(), 1e-2), lambda: F.cross_entropy(model(x), labels), 30)
    assert last < 0.5 * first


def test_report():
    model = nn.Sequential(nn.Linear(6, 35), nn.ReLU(), nn.Linear(35, 6, bias=False), nn.Linear(6, 3))
    report = replace_linear(model, "block_tensor_train", rank=2, rms_cap=True)
    first, second = report.layers
    structure = structlin.design("block_tensor_train", (35, 6), rank=2)
    assert (first.names, first.structure) == (("0",), structure)
    assert (first.params_before, first.params_after) == (6 * 35 + 35, structure.num_params + 35 + 2)
    assert (first.macs_before, first.macs_after) == (6 * 35, structure.macs)
    assert (second.params_before, second.params_after) == (6 * 35, second.structure.num_params + 2)
    assert second.structure.shape == (6, 35)
    lines = str(report).splitlines()
    assert lines[1].split() == ["0", "35", "x", "6", "245", str(structure.num_params + 37), "210", str(structure.macs)]
    assert lines[-2].split()[:2] == ["total", "455"]
    assert lines[-1] == "stays dense: *.weight (not chosen, 18 parameters)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept(dtype):
    model = SmallViT().to(dtype).eval()
    model.patch.train()
    model.patch.weight.requires_grad_(False)
    model.blocks[0].mlp[0].bias.requires_grad_(False)
    replace_linear(model, "monarch", rms_cap=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.patch.training
    assert not model.blocks[0].mlp[0].training
    assert [n for n, p in model.patch.named_parameters() if p.requires_grad] == ["bias"]
    assert [n for n, p in model.blocks[0].mlp[0].named_parameters() if not p.requires_grad] == ["bias"]
    assert model.blocks[0].attn.qkv.bias is None
    assert model(torch.randn(2, 5, 16, dtype=dtype)).dtype == dtype


def test_meta_device():
    with torch.device("meta"):
        model = SmallViT()
    replace_linear(model, "block_tensor_train")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.empty(2, 5, 16, device="meta")).shape == (2, 10)


def test_structure_by_function_and_by_object():
    def choose(name, layer):
        shape = (layer.out_features, layer.in_features)
        return structlin.design("kronecker" if "attn" in name else "low_rank", shape)

    model = SmallViT()
    replace_linear(model, choose)
    assert model.blocks[0].attn.qkv.structure == structlin.design("kronecker", (72, 24))
    assert model.blocks[0].mlp[0].structure == structlin.design("low_rank", (96, 24))
    one = structlin.design("block_tensor_train", (24, 24), rank=3)
    model = SmallViT()
    replace_linear(model, one, layers="*.attn.proj")
    assert model.blocks[1].attn.proj.structure == one


# -- shared modules and parameters -------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"again": self.first, "own": nn.Linear(12, 12)})
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.inner["own"](self.inner["again"](self.first(x))))


@pytest.mark.parametrize("layers", ["all", "first", "inner.again"])
def test_module_at_two_places_stays_one_module(layers):
    model = Shared()
    report = replace_linear(model, "low_rank", layers=layers)
    assert isinstance(model.first, StructuredLinear)
    assert model.inner["again"] is model.first
    assert report.layers[0].names == ("first", "inner.again")
    assert "first = inner.again" in str(report)
    assert len(list(model.first.parameters())) == 3
    model(torch.randn(2, 12)).sum().backward()


@pytest.mark.parametrize("exclude", ["first", "inner.again"])
def test_module_at_two_places_is_excluded_by_either_name(exclude):
    model = Shared()
    report = replace_linear(model, "low_rank", layers="all", exclude=exclude)
    assert [r.names for r in report.layers] == [("inner.own",), ("head",)]


def test_tied_weights():
    model = Tied(30, 12)
    before = model.body
    with pytest.raises(ValueError, match=r"layer 'head' shares embedding.weight"):
        replace_linear(model, "low_rank", layers="all")
    assert model.body is before
    report = replace_linear(model, "low_rank", layers="all", shared_weights="skip")
    assert structured(model) == ["body"]
    assert report.skipped == (("head", "shares embedding.weight"),)
    assert "left alone: head" in str(report)
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ValueError, match=r"no selected layer can be replaced \(head: shares embedding.weight"):
        replace_linear(model, "low_rank", layers="head", shared_weights="skip")
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match=r"'0' shares 1.bias"):
        replace_linear(model, "low_rank")


# -- torch's own Transformer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer(norm_first):
    torch.manual_seed(0)
    model = nn.Transformer(24, 4, 2, 2, 48, batch_first=True, norm_first=norm_first, dropout=0.0)
    with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn.out_proj.*MultiheadAttention.*exclude it"):
        replace_linear(model, "low_rank", layers="all", impossible="error")
    assert structured(model) == []
    report = replace_linear(model, "low_rank", layers="all")
    assert {name for name, _ in report.skipped} == {
        f"{place}.out_proj" for i in (0, 1) for place in (
            f"encoder.layers.{i}.self_attn", f"decoder.layers.{i}.self_attn", f"decoder.layers.{i}.multihead_attn"
        )
    }  # fmt: skip
    assert structured(model) == [f"{s}coder.layers.{i}.linear{j}" for s in ("en", "de") for i in (0, 1) for j in (1, 2)]
    assert any("encoder.layers.0" in note for note in report.notes)
    source, target = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    trained = model(source, target)
    model.eval()
    with torch.no_grad():  # where torch's fused path would read the weights of linear1 and linear2
        torch.testing.assert_close(model(source, target), trained)


def test_transformer_encoder_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    replace_linear(model, "low_rank", layers="*.linear?")
    x, padding = torch.randn(2, 5, 24), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    trained = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_split_name_the_layer_and_change_nothing():
    model = nn.Sequential(nn.Linear(6, 35), nn.Linear(35, 13), nn.Linear(13, 2))
    with pytest.raises(ValueError, match=r"layer '1' \(35 -> 13\): .*13"):
        replace_linear(model, "block_tensor_train", impossible="error")
    assert structured(model) == []


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Differs from nn.Linear in nothing that is called."""


def test_layers_that_are_more_than_linear():
    with pytest.raises(ValueError, match="layer '0' is a Doubling"):
        replace_linear(nn.Sequential(Doubling(4, 4)), "low_rank", layers="all")
    model = nn.Sequential(Named(4, 4))
    replace_linear(model, "low_rank", layers="all")
    assert structured(model) == ["0"]
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="layer '0' has parametrizations"):
        replace_linear(model, "low_rank", layers="all")
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        model = nn.Sequential(nn.Linear(4, 4))
        getattr(model[0], register)(lambda *_: None)
        with pytest.raises(ValueError, match="layer '0' has hooks"):
            replace_linear(model, "low_rank", layers="all")


# -- models of others --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize(
    ("layers", "shared"), [("all_but_last", "error"), ("all", "skip"), ("transformer.h.*", "error")]
)
def test_gpt2_of_transformers(gpt2, layers, shared):
    report = replace_linear(gpt2, "low_rank", layers=layers, shared_weights=shared, rank=3, checkpoint=True)
    assert structured(gpt2) == [f"transformer.h.{i}.{n}" for i in range(2) for n in CONV1D]
    attention = gpt2.transformer.h[0].attn.c_attn
    assert attention.structure.shape == (72, 24)  # its Conv1D had a weight of (24, 72)
    assert attention.checkpoint
    assert report.skipped == ((("lm_head", "shares transformer.wte.weight"),) if shared == "skip" else ())
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_replaced_gpt2_trains_generates_and_is_saved(gpt2, tmp_path):
    replace_linear(gpt2, "block_tensor_train", layers="transformer.h.*", zero_init="*.c_proj")
    ids = torch.randint(0, 50, (4, 12))
    first, *_, last = losses(torch.optim.Adam(gpt2.parameters(), lr=1e-2), lambda: gpt2(ids, labels=ids).loss, 25)
    assert last < 0.5 * first
    gpt2.eval()
    gpt2.generation_config.pad_token_id = 0
    made = gpt2.generate(ids[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with torch.no_grad():  # with the cache of keys and values as without
        assert torch.equal(made[:, 4], gpt2(ids[:, :4]).logits[:, -1].argmax(-1))
    gpt2.save_pretrained(tmp_path)
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(tmp_path / "model.safetensors")
    other = copy.deepcopy(gpt2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state, strict=False)
    other.tie_weights()
    assert torch.equal(other(ids).logits, gpt2(ids).logits)


def test_conv1d_is_replaced_the_right_way_round():
    """The factor of a dense structure, set to the weight: the same outputs."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(7, 5))
    weight, x = model[0].weight.detach().clone(), torch.randn(3, 5)
    wanted = model(x)
    replace_linear(model, "dense", layers="all")
    with torch.no_grad():
        model[0].factors[0].copy_(weight.T)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=64)
    before = sum(p.numel() for p in model.parameters())
    report = replace_linear(model, "low_rank", layers="all_but_last", rank=2)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 1  # the head
    assert len(structured(model)) == len(report.layers) >= 12
    after = sum(p.numel() for p in model.parameters())
    assert before - after == sum(r.params_before - r.params_after for r in report.layers) > 0
    x = torch.randn(2, 3, 64, 64)
    F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
