"""Files of transformers with structured layers: round trips by the library's own functions."""

import copy
import json

import pytest
import torch
from helpers.children import output
from helpers.layers import structured
from torch import nn

from structlin_nn.torch import StructuredLinear, project_linear, replace_linear, to_dense_linear, trainer_optimizer

transformers = pytest.importorskip("transformers")

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(3, 19).view(2, 8)


def build(kind="gpt2", auto="AutoModelForCausalLM", **sizes):
    torch.manual_seed(0)
    sizes = sizes or {"gpt2": GPT2, "llama": LLAMA, "t5": {**T5, "decoder_start_token_id": 0}}[kind]
    config = transformers.AutoConfig.for_model(kind, **sizes, **SPECIAL)
    return getattr(transformers, auto).from_config(config).eval()


def replaced(*args, structure="low_rank", **options):
    model = build(*args)
    replace_linear(model, structure, layers=options.pop("layers", "*.[0-9]*"), **{"rank": 3, **options})
    return model


def same(model, other, **inputs) -> bool:
    inputs = inputs or {"input_ids": TOKENS}
    with torch.no_grad():
        return torch.equal(model(**inputs)[0], other(**inputs)[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("saved", [{}, {"max_shard_size": "15KB"}], ids=["one file", "shards"])
def test_round_trip(tmp_path, kind, saved):
    model = replaced(kind)
    model.save_pretrained(tmp_path, **saved)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(saved)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert structured(again) == structured(model) != []
    assert same(again, model)
    assert torch.equal(*(m.generate(TOKENS, max_new_tokens=4, do_sample=False) for m in (again, model)))
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad, name
    copy.deepcopy(again).half().float()  # an ordinary model
    again.save_pretrained(tmp_path / "again")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_tied_encoder_and_decoder(tmp_path):
    model = replaced("t5", "AutoModelForSeq2SeqLM")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert same(again, model, input_ids=TOKENS, decoder_input_ids=TOKENS)
    assert again.lm_head.weight is again.shared.weight


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("block_tensor_train", {"rank": 2, "rms_cap": True}), ("monarch", {"rank": None, "blocks": 2}),
        ("permutation", {"rank": None}), ("toeplitz", {"rank": None}),
    ],
)  # fmt: skip
def test_round_trip_of_structures(tmp_path, structure, options):
    options = {name: value for name, value in {"rank": None, **options}.items() if value is not None}
    model = build()
    square = "transformer.h.*.attn.c_proj"
    replace_linear(model, structure, layers=square, **options)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert repr(again.transformer.h[1].attn.c_proj) == repr(model.transformer.h[1].attn.c_proj)
    assert same(again, model)


def test_with_and_without_the_head(tmp_path):
    model = replaced()
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert same(base, model.transformer)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(classifier.transformer, model.transformer)
    base.save_pretrained(tmp_path / "base")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), model)
    model.transformer.save_pretrained(tmp_path / "inside")
    assert same(transformers.AutoModel.from_pretrained(tmp_path / "inside"), base)


def test_dtypes_and_devices(tmp_path):
    model = replaced().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)  # in the dtype of the file
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.transformer.h[0].mlp.c_fc.factors[0], model.transformer.h[0].mlp.c_fc.factors[0].float())


def test_offloading_by_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    model = replaced()
    model.save_pretrained(tmp_path / "model")
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "transformer.ln_f": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    assert again.transformer.h[1].mlp.c_fc.factors[0].is_meta
    assert same(again, model)
    again.save_pretrained(tmp_path / "again")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_config_says_what_the_model_is(tmp_path):
    model = replaced()
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "structlin"
    assert sum(len(layer["names"]) for layer in described["layers"]) == 8
    assert len(described["layers"]) == 4  # layers that are alike are described together
    to_dense_linear(model)
    project_linear(model, "monarch", blocks=2, layers="*.c_fc")
    assert [layer["structure"] for layer in model.config.quantization_config.layers] == ["monarch"]
    to_dense_linear(model)
    assert not hasattr(model.config, "quantization_config")
    model.config.to_dict()


def test_models_inside_of_a_model(tmp_path):
    model = nn.ModuleDict({"text": build(), "head": nn.Linear(32, 4)})
    replace_linear(model, "low_rank", rank=2, layers="*.c_fc")
    model["text"].save_pretrained(tmp_path)
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model["text"])
    clip = build(
        "clip", "AutoModel", projection_dim=8,
        text_config={**LLAMA, "projection_dim": 8, **SPECIAL},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8, "projection_dim": 8},
    )  # fmt: skip
    replace_linear(clip, "low_rank", rank=2, layers="*.fc1")
    clip.save_pretrained(tmp_path / "clip")
    inputs = {"input_ids": TOKENS, "pixel_values": torch.ones(2, 3, 16, 16)}
    assert same(transformers.AutoModel.from_pretrained(tmp_path / "clip").eval(), clip, **inputs)


def test_checkpoints_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in TOKENS]

    def trainer(model, steps):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, learning_rate=1e-2, weight_decay=0.1, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=3, per_device_train_batch_size=2,
        )  # fmt: skip
        return transformers.Trainer(
            model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=trainer_optimizer(model, args)
        )

    whole = trainer(replaced(), 4)
    whole.train()
    assert len({g["multiplier"] for g in whole.optimizer.param_groups}) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same(again, whole.model.eval())
    resumed = trainer(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(resumed.model.eval(), whole.model)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_conversion_of_a_dense_model(tmp_path, kind, calibrated):
    from structlin_nn.torch.transformers import StructlinConfig

    dense = build(kind)
    dense.save_pretrained(tmp_path / "dense")
    options = {"calibration": [{"input_ids": TOKENS}]} if calibrated else {}
    config = StructlinConfig("low_rank", param_fraction=0.5, layers="*.[0-9].*", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    expected = build(kind)
    project_linear(expected, "low_rank", param_fraction=0.5, layers="*.[0-9].*", **options)
    assert same(model, expected)
    model.save_pretrained(tmp_path / "small")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), model)


def test_a_process_that_only_imports_the_package(tmp_path):
    model = replaced()
    model.save_pretrained(tmp_path)
    code = f"""
import sys
import structlin_nn
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model.transformer.h[0].mlp.c_fc).__name__, sum(p.numel() for p in model.parameters()))
"""
    assert output("-c", code).split() == ["StructuredLinear", str(sum(p.numel() for p in model.parameters()))]


def test_configurations_that_do_not_fit(tmp_path):
    from structlin_nn.torch.transformers import StructlinConfig

    model = replaced()
    dense = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    assert structured(dense) == []
    dense.save_pretrained(tmp_path)  # the configuration of the other model
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn as a structured layer, but the files have no"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"version": 2}, "the version of the described layers must be 1, got 2"),
        ({"layers": []}, "give the name of a structure"),
        ({"layers": [{"names": ["a"]}]}, "a layer must be described by"),
    ):
        changed = copy.deepcopy(content)
        changed["quantization_config"].update(change)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    changed = copy.deepcopy(content)
    for layer in changed["quantization_config"]["layers"]:
        layer["names"] = [["encoder." + name for name in names] for names in layer["names"]]
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none of the structured layers of the file: encoder"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give the name of a structure"):
        StructlinConfig(rank=3)
    config = StructlinConfig("low_rank", rank=3, calibration=[{"input_ids": TOKENS}])
    assert config.to_dict().keys() == {"quant_method", "version", "layers", "structure", "rank"}


def test_structures_that_no_file_can_describe():
    model = build()
    layer = StructuredLinear(32, 32, structure="low_rank", rank=2)
    layer.options["rank"] = object()
    model.transformer.h[0].attn.extra = layer
    with pytest.warns(UserWarning, match="save_pretrained cannot describe the structured layers"):
        replace_linear(model, "low_rank", rank=2, layers="*.h.1.mlp.c_fc")


def test_layers_and_experts_of_one_size(tmp_path):
    """The entries of two layers that differ only in the number of experts are separate."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
    }  # fmt: skip
    model = build("deepseek_v3", **sizes)
    replace_linear(model, "low_rank", rank=2, unpack=True, layers="model.layers.1.mlp.*down_proj", dearer="allow")
    model.save_pretrained(tmp_path)
    forms = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert sorted((form["names"][0][0].split(".")[4], form.get("experts")) for form in forms) == [
        ("experts", 4),
        ("shared_experts", None),
    ]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert structured(again) == structured(model)
    assert same(again, model)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_unpacked_attention_that_the_model_initialises(tmp_path, kind):
    """Their initialisation names ``attention.in_proj_weight``."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    image = {"patch_size": 8} | ({"image_size": 32} if kind == "siglip" else {"num_patches": 16})
    text = {"vocab_size": 96, "max_position_embeddings": 64, **SPECIAL}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, text_config=shared | text, vision_config=shared | image)
    ).eval()
    replace_linear(model, "low_rank", rank=2, layers="*.attention.[qk]_proj", unpack=True)
    assert len(structured(model)) == 2
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    x = torch.randn(2, 5, 32)
    heads = [one.vision_model.head for one in (model, again)]
    extra = [] if kind == "siglip" else [torch.ones(2, 5, dtype=torch.int64)]
    assert torch.equal(*(head(x, *extra) for head in heads))
    assert heads[1].attention.in_proj_bias is None
    assert not hasattr(heads[1].attention, "in_proj_weight")
    own = again.state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
