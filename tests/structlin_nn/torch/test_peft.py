"""peft: LoRA on structured layers, and adapters whose update is structured."""

import copy
import warnings

import pytest
import torch

from structlin_nn.torch import StructuredLinear, replace_linear

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
    torch.testing.assert_close(logits(whole), after, rtol=1e-4, atol=1e-4)
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
