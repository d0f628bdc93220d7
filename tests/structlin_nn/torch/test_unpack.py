"""Packed weights as linear layers: the same function, replaceable, saved and loaded, and packed again."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.layers import losses
from torch import nn

from structlin_nn.torch import (
    ExpertLinear,
    ParameterRule,
    StructuredExperts,
    StructuredLinear,
    load_structured,
    pack_linear,
    parameter_groups,
    project_linear,
    replace_linear,
    save_structured,
    to_dense_linear,
    unpack_linear,
)

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
    "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases and clamps
}
TOKENS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def moe(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_keep_their_function_and_values(kind):
    model = moe(kind)
    before, state = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    names = list(unpack_linear(model))
    assert names == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    layer = model.get_submodule(names[0]).gate_up_proj
    assert type(layer) is ExpertLinear
    assert layer.weight.shape[:2] == (4, layer.out_features)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-5, atol=1e-6)
    assert list(pack_linear(model)) == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_train_and_are_loaded_with_structured_layers(kind, tmp_path):
    model = moe(kind)
    report = replace_linear(model, "low_rank", rank=4, layers="*.experts.*", unpack=True)
    assert [row.experts for row in report.layers] == [4] * 4
    for row in report.layers:
        assert row.params_before - row.params_after == 4 * (row.macs_before - row.structure.num_params)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    first, *_, last = losses(optimizer, lambda: model.train()(input_ids=TOKENS, labels=TOKENS).loss, 8)
    assert last < first
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert isinstance(again.model.layers[1].mlp.experts.down_proj, StructuredExperts)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    save_structured(model, tmp_path / "own.safetensors")
    assert torch.equal(load_structured(moe(kind), tmp_path / "own.safetensors").eval()(TOKENS).logits,
                       model(TOKENS).logits)  # fmt: skip


def test_experts_are_projected_with_calibration_and_come_back():
    model = moe("mixtral")
    before = model(TOKENS).logits
    report = project_linear(
        model, "low_rank", rank=25, layers="*.experts.gate_up_proj", unpack=True, calibration=[TOKENS] * 4
    )
    assert [row.experts for row in report.layers] == [4, 4]
    assert all(line.output_error < 0.3 for line in report.layers)
    projected = model(TOKENS).logits
    assert (projected - before).norm() < 0.3 * before.norm()
    names = to_dense_linear(model)
    assert len(names) == 2
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert torch.allclose(model(TOKENS).logits, projected, atol=1e-4)


def test_an_expert_multiplies_by_its_own_tokens_alone():
    model = moe("mixtral")
    replace_linear(model, "low_rank", rank=4, layers="*.experts.*", unpack=True)
    seen = []
    layer = model.model.layers[0].mlp.experts.down_proj
    layer.register_forward_hook(lambda module, args, y: seen.append((len(args[0]), sum(args[1]))))
    model(TOKENS)
    assert seen == [(TOKENS.numel() * 2, TOKENS.numel() * 2)]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=str)
def test_attention_is_that_of_torch(batch_first, options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)})
    other = copy.deepcopy(model)
    assert list(unpack_linear(other)) == ["attention"]
    query, key, value = (torch.randn(3, 5, n) for n in (16, options.get("kdim", 16), options.get("vdim", 16)))
    length, batch = (5, 3) if batch_first else (3, 5)
    mask = torch.rand(length, length) > 0.6
    mask.fill_diagonal_(False)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    added = torch.randn(batch * 4, length, length)
    cases = itertools.product((True, False), (None, mask, added), (None, padding), (True, False))
    for need, attn_mask, ignored, average in cases:
        if need and ignored is not None and attn_mask is mask:
            attn_mask = torch.zeros(length, length).masked_fill(mask, -1e4)  # no row is all -inf
        if ignored is not None and attn_mask is not None and attn_mask.dtype == torch.bool:
            continue
        given = {"need_weights": need, "attn_mask": attn_mask, "average_attn_weights": average}
        with torch.no_grad():
            expected, weights = model["attention"](
                query, key, value, key_padding_mask=None if ignored is None else torch.zeros(batch, length)
                .masked_fill(ignored, -torch.inf), **given,
            )  # fmt: skip
            found, own = other["attention"](query, key, value, key_padding_mask=ignored, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (own is None) == (weights is None)
        if own is not None:
            torch.testing.assert_close(own, weights, rtol=1e-4, atol=1e-5)
    if not options:
        torch.testing.assert_close(other["attention"](*[query[0]] * 3), model["attention"](*[query[0]] * 3))
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
        other["attention"](query, key, value, is_causal=True)
    pack_linear(other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_encoders_of_torch_have_structured_projections(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)

    model, x = build().eval(), torch.randn(2, 5, 16)
    before = model(x)
    unpack_linear(model)
    torch.testing.assert_close(model(x), before)
    pack_linear(model)
    replace_linear(model, "monarch", blocks=2, layers="*.q_proj", unpack=True)
    assert isinstance(model.layers[0].self_attn.q_proj, StructuredLinear)
    save_structured(model, tmp_path / "encoder.safetensors")
    again = load_structured(build(), tmp_path / "encoder.safetensors").eval()
    assert torch.equal(again(x), model(x))


def test_what_stays_dense_stays_packed_and_errors_change_nothing():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(16, 4), "b": nn.MultiheadAttention(16, 4), "c": nn.Linear(16, 16)}
    )
    replace_linear(model, "low_rank", rank=2, layers=["a.q_proj", "c"], unpack=True)
    assert type(model["b"]) is nn.MultiheadAttention
    assert isinstance(model["a"].q_proj, StructuredLinear)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 4)})
    with pytest.raises(ValueError, match="no linear layer matches 'head'"):
        replace_linear(model, "low_rank", rank=2, layers="head", unpack=True)
    assert type(model["a"]) is nn.MultiheadAttention


def test_shared_parameters_are_left_alone():
    first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    second.in_proj_weight = first.in_proj_weight
    model = nn.ModuleDict({"first": first, "second": second, "odd": nn.MultiheadAttention(8, 2, add_zero_attn=True)})
    assert unpack_linear(model) == {}
    with pytest.raises(TypeError, match=r"unpack_linear takes a torch\.nn\.Module"):
        unpack_linear(list(model.parameters()))


def test_rates_are_those_of_the_layers():
    model = moe("gpt_oss")
    replace_linear(model, "low_rank", rank=4, layers="*.experts.down_proj", unpack=True)
    rules = {"*sinks": ParameterRule(1.0, False)}
    groups = parameter_groups(model, lr=1e-3, rules=rules)
    held = {id(p): group["multiplier"] for group in groups for p in group["params"]}
    layer = model.model.layers[0].mlp.experts.down_proj
    alone = nn.Sequential(StructuredLinear(64, 32, structure="low_rank", rank=4))
    expected = [group["multiplier"] for group in parameter_groups(alone, lr=1e-3) if "factors" in group["names"][0]]
    assert [held[id(factor)] for factor in layer.factors] == expected
