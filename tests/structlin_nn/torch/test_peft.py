"""peft: LoRA on structured layers, and adapters whose update is structured."""

import copy
import warnings

import pytest
import torch
from torch import nn

from structlin_nn.torch import StructuredLinear, replace_linear, to_dense_linear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(3, 19).view(2, 8)
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2(structured: bool):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    if structured:
        replace_linear(model, "monarch", blocks=4, layers="*.h.*")
    return model


def config(kind: str):
    from structlin_nn.torch.peft import StructuredAdapterConfig, lora_config

    if kind == "lora":
        return lora_config(r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True)
    options = {"kronecker": {}, "monarch": {"blocks": 4}, "block_tensor_train": {"rank": 2}}[kind]
    return StructuredAdapterConfig(
        structure=kind, structure_options=options, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


CASES = [("lora", True), ("monarch", True), ("monarch", False), ("block_tensor_train", False), ("kronecker", False)]


@pytest.mark.parametrize(("kind", "structured"), CASES)
def test_an_adapter(tmp_path, kind, structured):
    base = gpt2(structured)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config(kind)).eval()
    assert torch.equal(logits(model), before)  # the update starts at zero
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config(kind)).eval()
    assert torch.equal(logits(again), after)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)
    whole = model.merge_and_unload()
    merged = logits(whole)
    torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), merged)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert isinstance(whole.transformer.h[0].mlp.c_proj, StructuredLinear) == structured


def test_updates_have_the_structure():
    model = peft.get_peft_model(gpt2(False), config("monarch"))
    updates = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    assert len(updates) == 4
    assert all(update.zero_init and "monarch" in repr(update) for update in updates)


def test_bad_configurations():
    from structlin_nn.torch.peft import StructuredAdapterConfig

    with pytest.raises(ValueError, match="structure 'monarch' has no option rank; its options are blocks"):
        StructuredAdapterConfig(structure="monarch", structure_options={"rank": 2})
    with pytest.raises(ValueError, match="unknown structure"):
        StructuredAdapterConfig(structure="monarchy")
    with pytest.raises(TypeError, match="scale must be a number, got '1'"):
        StructuredAdapterConfig(scale="1")
    with pytest.raises(ValueError, match="structured adapters have no use_rslora, init_lora_weights, use_dora"):
        StructuredAdapterConfig(use_dora=True, init_lora_weights="pissa", use_rslora=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(24, 36), nn.Linear(36, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def net(structured: bool) -> Net:
    torch.manual_seed(0)
    model = Net()
    if structured:
        replace_linear(model, "monarch", blocks=4, layers=["a", "b"])
    return model


def small(kind: str, **options):
    from structlin_nn.torch.peft import StructuredAdapterConfig, lora_config

    options = {"target_modules": ["a", "b"], **options}
    if kind == "lora":
        return lora_config(r=4, **options)
    return StructuredAdapterConfig(structure="monarch", structure_options={"blocks": 2}, scale=0.5, **options)


def drawn(model):
    """Give all adapters values."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


X = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("kind", ["lora", "monarch"])
def test_each_row_of_a_batch_has_its_adapter(kind, structured):
    model = peft.get_peft_model(net(structured), small(kind), adapter_name="one")
    model.add_adapter("two", small(kind))
    model.add_adapter("part", small(kind, target_modules=["b"]))
    drawn(model)
    expected = {}
    for name in ("one", "two", "part"):
        model.set_adapter(name)
        expected[name] = model(X)
    with model.disable_adapter():
        expected["__base__"] = model(X)
    names = ["two", "__base__", "one", "two", "part", "one"]
    wanted = torch.stack([expected[name][row] for row, name in enumerate(names)])
    assert all((wanted - expected[name]).abs().max() > 0.01 for name in expected)
    torch.testing.assert_close(model(X, adapter_names=names), wanted)
    torch.testing.assert_close(model(X[:, None].expand(6, 3, 24), adapter_names=names)[:, 1], wanted)
    with pytest.raises(ValueError, match="got 2 and 6"):
        model(X, adapter_names=names[:2])
    model.set_adapter("one")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(X, adapter_names=names)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(init):
    extra = {"loftq_config": peft.LoftQConfig()} if init == "loftq" else {}
    if init == "lora_ga":
        extra = {"lora_ga_config": peft.LoraGAConfig()}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the weight of the base layer"):
        peft.get_peft_model(net(True), small("lora", init_lora_weights=init, **extra))


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_keep_the_function(init):
    model = net(True)
    before = model(X)
    after = peft.get_peft_model(model, small("lora", init_lora_weights=init))(X)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_initialisation_that_changes_a_dense_base_is_not_refused():
    model = net(True)
    before = model(X)
    adapted = peft.get_peft_model(model, small("lora", target_modules=["head"], init_lora_weights="olora"))
    torch.testing.assert_close(adapted(X), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "monarch", "plain"])
def test_all_linear_has_structured_layers(kind):
    from structlin_nn.torch.peft import LoraOnStructured, StructuredAdapter

    def made():
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return peft.LoraConfig(r=4, **options) if kind == "plain" else small(kind, **options)

    model = gpt2(False)
    replace_linear(model, "monarch", blocks=4, layers="*.c_fc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, made())
        adapted.add_adapter("second", made())
    found = {name.split("h.")[-1]: m for name, m in adapted.named_modules() if hasattr(m, "base_layer")}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(found) == [f"{layer}.{part}" for layer in range(2) for part in parts]
    assert isinstance(found["0.mlp.c_fc"], StructuredAdapter if kind == "monarch" else LoraOnStructured)
    assert all(set(one.lora_B) == {"default", "second"} for one in found.values())


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("kind", ["lora", "monarch"])
def test_files_say_what_the_adapters_are(tmp_path, kind, structured):
    model = drawn(peft.get_peft_model(net(structured), small(kind)))
    model.save_pretrained(tmp_path)
    after = model(X)
    again = peft.PeftModel.from_pretrained(net(structured), tmp_path).eval()  # without a configuration
    assert torch.equal(again(X), after)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path, "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(again(X), after)
    assert all(p.requires_grad == (".second." in name) for name, p in again.named_parameters())
    again.save_pretrained(tmp_path / "both")
    third = peft.PeftModel.from_pretrained(net(structured), tmp_path / "both/second", adapter_name="x").eval()
    assert torch.equal(third(X), after)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("kind", ["lora", "monarch"])
def test_a_merged_model_moves_with_its_base(kind, structured):
    model = drawn(peft.get_peft_model(net(structured), small(kind)))
    before = model(X)
    model.merge_adapter()
    keys = set(model.state_dict())
    model.double().train()
    assert set(model.state_dict()) == keys
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model(X.double()), before.double(), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(copy.deepcopy(model)(X.double()), before.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "monarch"])
def test_a_layer_without_the_merged_adapter_keeps_its_structure(kind):
    model = peft.get_peft_model(net(True), small(kind))
    model.add_adapter("part", small(kind, target_modules=["b"]))
    drawn(model).set_adapter("part")
    before = model(X)
    whole = model.merge_and_unload()
    torch.testing.assert_close(whole(X), before)
    assert isinstance(whole.a, StructuredLinear)
    assert type(whole.b) is nn.Linear


def test_what_structured_adapters_cannot_do():
    model = peft.get_peft_model(net(False), small("monarch"), adapter_name="one")
    model.add_adapter("two", small("monarch"))
    with pytest.raises(ValueError, match="add_weighted_adapter cannot add them"):
        model.base_model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="linear")
    for config in (small("lora"), peft.LoraConfig(r=2, target_modules=["a"])):
        with pytest.raises(ValueError, match="cannot have adapters of LoRA and of StructuredAdapterConfig"):
            model.add_adapter("mix", config)
    assert list(model.peft_config) == ["one", "two"]
    assert list(model.base_model.model.a.lora_B) == ["one", "two"]
    lora = peft.get_peft_model(net(False), peft.LoraConfig(r=2, target_modules=["a"]))
    with pytest.raises(ValueError, match="cannot have adapters of LoRA and of StructuredAdapterConfig"):
        lora.add_adapter("mix", small("monarch"))
    with pytest.raises(ValueError, match="target_modules selects a Embedding"):
        peft.get_peft_model(nn.ModuleDict({"a": nn.Embedding(3, 4)}), small("monarch"))
    convolutions = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 5))
    replace_linear(convolutions, "monarch", blocks=2, convolutions=True)
    with pytest.raises(ValueError, match="adapters on StructuredPointwise are not supported"):
        peft.get_peft_model(convolutions, small("monarch", target_modules=["0"]))


def test_scales_are_those_of_the_configuration():
    model = drawn(peft.get_peft_model(net(False), small("monarch")))
    layer, before = model.base_model.model.a, model(X)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer()
    assert torch.equal(model(X), before)
    layer.set_scale("default", 2.0)
    assert layer.scaling["default"] == 1.0


def test_a_weighted_sum_of_lora_on_structured_layers():
    model = peft.get_peft_model(net(True), small("lora", fan_in_fan_out=True), adapter_name="one")
    model.add_adapter("two", small("lora"))
    drawn(model)
    layer = model.base_model.model.a
    wanted = 0.5 * layer.get_delta_weight("one") + 2 * layer.get_delta_weight("two")
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "mix", combination_type="cat")
    assert wanted.shape == (36, 24)
    torch.testing.assert_close(layer.get_delta_weight("mix"), wanted)


@pytest.mark.parametrize("merge", [True, False])
def test_a_dense_model_is_one_of_its_class(tmp_path, merge):
    """The Conv1D of GPT-2 come back, so that its files fit; the square one too."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, n_inner=32)).eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    replace_linear(model, "monarch", blocks=4, layers=["*.c_fc", "*.c_attn"])
    model.save_pretrained(tmp_path / "structured")  # a loaded layer knows what it replaced
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "structured")
    if merge:
        adapted = drawn(peft.get_peft_model(model, config("lora")))
        after = logits(adapted)
        model = adapted.merge_and_unload()
    else:
        after = logits(model)
        to_dense_linear(model)
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-4)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    model.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(model))
