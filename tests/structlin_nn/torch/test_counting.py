"""Counts of models of other libraries against FlopCounterMode, and tensors saved for the backward pass."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from structlin_nn.torch import ModelCount, StructuredLinear, count


def assert_same_as_torch(model: nn.Module, *inputs: Any, **keywords: Any) -> ModelCount:
    """Forward, and forward with backward, to the MAC."""
    counted = count(model, *inputs, **keywords)
    for train, macs in ((False, counted.macs()), (True, counted.training_macs)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(*inputs, **keywords)
            if train:
                (output if isinstance(output, torch.Tensor) else output.logits).sum().backward()
        assert 2 * macs == counter.get_total_flops(), "training" if train else "forward"
    return counted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}),
        ("vit_small_patch32_224", {"num_classes": 11, "global_pool": "avg", "depth": 2}),
        pytest.param("vit_base_patch16_clip_224", {"depth": 2}, marks=pytest.mark.slow),
        pytest.param("deit3_small_patch16_224", {"depth": 2}, marks=pytest.mark.slow),
        ("vit_relpos_small_patch16_224", {"depth": 2}),
        ("swin_tiny_patch4_window7_224", {"img_size": 112}),
        ("mixer_s32_224", {}),
    ],
)
def test_timm(name: str, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **options).eval()
        size = options.get("img_size", 224)
        x = torch.zeros(2, 3, size, size)
    counted = assert_same_as_torch(model, x)
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert counted.macs("convolution") > 0 or name == "mixer_s32_224"
    if "vit" in name and "relpos" not in name:
        assert counted.macs("attention") > 0
    assert any("head" in c.name for c in counted.calls)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_transformers_gpt2(kind: str, where: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=3, n_positions=20, vocab_size=71, attn_implementation=kind, use_cache=False,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(where):
        model = transformers.GPT2LMHeadModel(config)
        tokens = torch.zeros(2, 17, dtype=torch.int64)
        # The library reads values to build a mask, and meta tensors have no values.
        mask = {"attention_mask": torch.ones(1, 1, 17, 17).bool()} if where == "meta" else {}
    counted = assert_same_as_torch(model, tokens, **mask)
    d, t = 48, 17
    attention = 2 * 2 * 2 * t * t * d
    assert counted.macs("linear") == 2 * t * (2 * 12 * d * d + d * 71)
    assert counted.macs("attention" if kind == "sdpa" else "product") == attention
    assert counted.params == (71 + 20) * d + 2 * (12 * d * d + 13 * d) + 2 * d, "the head is the embedding"
    assert counted.embedding_params == (71 + 20) * d
    layers = {c.name: c for c in counted.calls}
    assert layers["transformer.h.0.attn.c_attn"].in_features == d
    assert layers["transformer.h.0.attn.c_attn"].out_features == 3 * d
    assert "transformer.h.1.mlp.c_fc" in str(counted)


def test_full_gpt2_on_meta() -> None:
    """124 M parameters; 12 d^2 per token and block, and the head. Nothing is allocated."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
        mask = torch.ones(1, 1, 1024, 1024).bool()
        counted = count(model, torch.zeros(1, 1024, dtype=torch.int64), attention_mask=mask)
    assert counted.params == 124_439_808
    assert counted.macs("linear") == 1024 * (12 * 12 * 768**2 + 768 * 50257)
    assert counted.macs("attention") == 12 * 2 * 1024**2 * 768


@pytest.mark.parametrize("name", ["llama", "bart", "mixtral"])
def test_transformers_on_meta_as_on_a_cpu(name: str) -> None:
    """Masks of two axes, whose values the library reads, and products of groups in float32."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "num_local_experts": 3, "d_model": 32,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "use_cache": False,
    }  # fmt: skip
    known = transformers.AutoConfig.for_model(name).to_dict()
    config = transformers.AutoConfig.for_model(name, **{key: v for key, v in sizes.items() if key in known})
    is_tracing = transformers.masking_utils.is_tracing
    found = {}
    for where in ("cpu", "meta"):
        with torch.device(where):
            model = transformers.AutoModel.from_config(config)
            inputs = {
                "input_ids": torch.arange(14).reshape(2, 7),
                "attention_mask": torch.ones(2, 7, dtype=torch.int64),
            }
        counted = count(model, **inputs)
        found[where] = {(c.name, c.kind): (c.macs, c.backward_macs) for c in counted.calls}, counted.unknown_ops
    assert found["cpu"] == found["meta"]
    assert transformers.masking_utils.is_tracing is is_tracing
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        model(**inputs)


class TestSaved:
    def test_mlp_against_formulas(self) -> None:
        """The input (for the gradient of the first weight), the activation's input, and its output."""
        model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3))
        counted = count(model, torch.randn(5, 6))
        assert (counted.saved, counted.saved_bytes) == (5 * 6 + 5 * 10 + 5 * 10, 0)

    def test_what_needs_no_gradient_is_not_kept(self) -> None:
        model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3)).requires_grad_(False)
        assert count(model, torch.randn(5, 6)).saved == 0
        model[1].requires_grad_(True)
        assert count(model, torch.randn(5, 6)).saved == 50

    def test_an_array_counts_once_and_views_as_a_whole(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 7)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.a(x).sum() + self.b(x[:2]).sum()

        assert count(Twice(), torch.randn(5, 6)).saved == 30

    def test_masks_and_indices_are_bytes(self) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(9, 4)

            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                x = self.table(tokens).relu()
                return x.masked_fill(x > 1, 0)

        counted = count(Masked(), torch.zeros(2, 3, dtype=torch.int64))
        assert counted.saved == 2 * 3 * 4, "the result of the ReLU"
        assert counted.saved_bytes == 8 * 6 + 24, "indices, and a mask of one byte each"

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_attention_as_if_fused(self, device: str) -> None:
        class Attend(nn.Module):
            def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v)

        q, k, v = (torch.randn(2, 3, t, 8, device=device).requires_grad_() for t in (5, 7, 7))
        for backends in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            with sdpa_kernel(backends):
                assert count(Attend(), q, k, v).saved == 2 * 3 * 8 * (5 + 7 + 7 + 5) + 2 * 3 * 5

    def test_structured_layer_keeps_its_input_and_at_most_the_intermediate(self) -> None:
        layer = StructuredLinear(12, 8, structure="low_rank", rank=2)
        assert 512 * 12 <= count(layer, torch.randn(512, 12)).saved <= 512 * (12 + 2)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bytes_of_sparse_parameters() -> None:
    """Five values of 4 bytes, and indices of 8 bytes."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.diag(torch.ones(6), 1)[:5]
            self.rows, self.pairs = (nn.Parameter(w) for w in (weight.to_sparse_csr(), weight.to_sparse()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows @ x + self.pairs @ x

    found = count(Sparse(), torch.ones(7, 3), backward=False)
    assert (found.macs(), found.params) == (2 * 5 * 3, 2 * 35)
    assert found.param_bytes == (5 * 4 + 8 * (5 + 6)) + (5 * 4 + 8 * 2 * 5)
    assert found.trainable_bytes == 4 * found.params, "gradients are dense"


def test_numbers_moved() -> None:
    """Operands and results of each product once; of a chain the intermediate twice."""
    layer = StructuredLinear(12, 8, structure="low_rank", rank=2)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), layer)
    first, second = count(model, torch.randn(5, 6)).calls
    assert first.moved == 6 * 12 + 5 * (6 + 12)
    assert second.moved == 2 * (12 + 8) + 5 * (12 + 2 + 2 + 8)
    assert first.backward_moved == first.moved, "the data need no gradient"
    assert second.backward_moved == 2 * second.moved
    assert count(model, torch.randn(5, 6)).uncounted_moved >= 2 * 60
