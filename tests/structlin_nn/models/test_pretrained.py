"""Published GPT-2 in our model: logits equal to those of transformers, and projections."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from structlin_nn.generate import generate
from structlin_nn.models import build_model
from structlin_nn.models.files import load_gpt2


def hugging_face(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 20, "vocab_size": 67, **changes}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        # Biases and norms too: at their initial values a mistake in them would not show.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(67, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hugging_face().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


class TestLogits:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"n_inner": 96},
            {"activation_function": "gelu"},
            {"tie_word_embeddings": False},
            {"n_head": 1, "n_layer": 1},
        ],
    )
    def test_are_those_of_transformers(self, changes: dict[str, Any], tokens: Tensor) -> None:
        theirs = hugging_face(**changes)
        ours = load_gpt2(theirs)
        expected = logits(theirs, tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits(ours, tokens), expected, rtol=0, atol=1e-4)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        assert not ours.training

    def test_in_double_precision(self, tokens: Tensor) -> None:
        theirs = hugging_face().double()
        ours = load_gpt2(theirs)
        assert ours.tokens.weight.dtype == torch.float64
        torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), rtol=1e-10, atol=1e-10)

    def test_weights_are_copies(self, tokens: Tensor) -> None:
        theirs = hugging_face()
        before = logits(theirs, tokens)
        ours = load_gpt2(theirs)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.zero_()
        assert torch.equal(logits(theirs, tokens), before)

    def test_without_head(self, tokens: Tensor) -> None:
        theirs = hugging_face()
        torch.testing.assert_close(
            logits(load_gpt2(theirs.transformer), tokens), logits(theirs, tokens), rtol=0, atol=1e-4
        )

    def test_untied(self, tokens: Tensor) -> None:
        theirs = hugging_face()
        ours = load_gpt2(theirs, untie=True)
        torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), rtol=0, atol=1e-4)
        assert ours.head is not None
        with torch.no_grad():
            ours.tokens.weight[5] += 1
        assert not torch.equal(ours.head.factors[0][5], ours.tokens.weight[5])

    def test_generation(self) -> None:
        theirs, prompt = hugging_face(), torch.tensor([[3, 5, 8]])
        expected = theirs.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(generate(load_gpt2(theirs), prompt, 10, temperature=0), expected)


class TestFiles:
    def test_folder_and_file(self, saved: Path, tokens: Tensor) -> None:
        expected = logits(hugging_face(), tokens)
        for source in (saved, saved / "model.safetensors", str(saved)):
            torch.testing.assert_close(logits(load_gpt2(source), tokens), expected, rtol=0, atol=1e-4)

    def test_names_and_masks_of_old_files(self, saved: Path, tokens: Tensor) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name.removeprefix("transformer."): t for name, t in load_file(saved / "model.safetensors").items()}
        tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 20, 20) for n in range(3)}
        save_file(tensors, saved / "model.safetensors")
        expected = logits(hugging_face(), tokens)
        torch.testing.assert_close(logits(load_gpt2(saved), tokens), expected, rtol=0, atol=1e-4)

    def test_damaged(self, saved: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = saved / "model.safetensors"
        tensors = load_file(path)
        for name, tensor in (("transformer.h.1.ln_1.bias", None), ("transformer.h.7.ln_1.bias", torch.zeros(48))):
            changed = {key: value for key, value in tensors.items() if key != name}
            save_file(changed | ({} if tensor is None else {name: tensor}), path)
            which = r"lacks blocks\.1\.attention_norm\.bias" if tensor is None else "the model lacks, blocks"
            with pytest.raises(ValueError, match=which):
                load_gpt2(saved)
        save_file({**tensors, "transformer.wpe.weight": torch.zeros(19, 48)}, path)
        with pytest.raises(ValueError, match=r"positions\.weight has shape \(19, 48\) in the file, but \(20, 48\)"):
            load_gpt2(saved)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load_gpt2(saved)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
            load_gpt2(saved)
        (saved / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"not a \.safetensors file"):
            load_gpt2(saved / "pytorch_model.bin")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True is not supported"),
            ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-06 is not supported"),
            ("activation_function", "relu", "activation_function 'relu' is not supported"),
            ("n_inner", 100, "n_inner 100 is not supported"),
            ("n_head", 5, "n_embd 48 cannot be divided among 5 heads"),
            ("n_embd", None, "n_embd must be an integer in the configuration, got None"),
            ("model_type", "bert", "must have the model_type .gpt2., got .bert."),
        ],
    )
    def test_other_configurations(self, saved: Path, key: str, value: Any, message: str) -> None:
        settings = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(ValueError, match=message):
            load_gpt2(saved)

    def test_other_modules(self) -> None:
        with pytest.raises(TypeError, match="must be a GPT-2 of transformers, got Linear"):
            load_gpt2(torch.nn.Linear(2, 2))


def test_command_continues_with_published_weights(tmp_path: Path, gpt2_vocabulary: Path, cli) -> None:
    pytest.importorskip("tiktoken")
    from structlin_nn.data.tokenizers import load_tokenizer

    theirs = hugging_face(n_embd=8, n_layer=1, n_head=2, vocab_size=50257)
    theirs.save_pretrained(tmp_path)
    line = f"generate {tmp_path} --vocabulary {gpt2_vocabulary} --tokens 6 --temperature 0 --endless --json"
    found = json.loads(cli(line, "--json", "--prompt", "here it is").out)
    prompt = torch.tensor([load_tokenizer("gpt2", gpt2_vocabulary).encode("here it is")])
    expected = theirs.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found["samples"][0]["tokens"] == expected[0, prompt.shape[1] :].tolist()

    small = tmp_path / "small"
    hugging_face().save_pretrained(small)
    line = f"generate {small} --vocabulary {gpt2_vocabulary}"
    assert "does not state its tokenizer: give --tokenizer" in cli(line, code=2).err
    assert "the model has 67 tokens, but the tokenizer gpt2 has 50257" in cli(line, "--tokenizer", "gpt2", code=2).err


class TestOptions:
    SIZES: ClassVar[dict[str, Any]] = {"width": 24, "depth": 2, "heads": 2, "vocabulary": 30, "context": 8}

    def test_parameters(self) -> None:
        plain = build_model("gpt2", **self.SIZES)
        count = sum(p.numel() for p in plain.parameters())
        without = build_model("gpt2", **self.SIZES, qk_norm=False)
        assert count - sum(p.numel() for p in without.parameters()) == 2 * 2 * 12
        biased = build_model("gpt2", **self.SIZES, qk_norm=False, bias=True)
        more = 2 * (3 * 24 + 24 + 4 * 24 + 24 + 2 * 24) + 24
        assert sum(p.numel() for p in biased.parameters()) - sum(p.numel() for p in without.parameters()) == more
        tied = build_model("gpt2", **self.SIZES, tied=True)
        assert count - sum(p.numel() for p in tied.parameters()) == 30 * 24

    def test_count(self) -> None:
        from structlin_nn.counting import count

        tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
        options = {"qk_norm": False, "bias": True, "tied": True}
        macs = [count(build_model("gpt2", **self.SIZES, device="meta", **o), tokens).macs() for o in ({}, options)]
        assert macs[0] == macs[1]

    def test_attention_scale(self) -> None:
        model = build_model("gpt2", **self.SIZES, attention_scale=8 / 12)
        other = build_model("gpt2", **self.SIZES)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for one, two in zip(model.parameters(), other.parameters(), strict=True):
                noise = torch.randn_like(one)
                one.add_(noise)
                two.add_(noise)
        tokens = torch.arange(8)[None]
        assert torch.equal(logits(model, tokens), logits(other, tokens))
        other.blocks[0].attention.scale = 1.0  # type: ignore[union-attr]
        assert not torch.allclose(logits(model, tokens), logits(other, tokens))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"qk_norm": 1}, TypeError, "qk_norm must be True or False, got 1"),
            ({"attention_scale": 0.0}, ValueError, "attention_scale must be positive"),
            ({"gelu": "new"}, ValueError, "gelu must be 'none' or 'tanh', got 'new'"),
        ],
    )
    def test_bad(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build_model("gpt2", **self.SIZES, **options)
