"""Tokenisers: bytes, and GPT-2's encoding from a vocabulary of its form and size."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structlin_nn.data.tokenizers import load_tokenizer

# Of GPT-2's release.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
SAMPLE = "Hello world's 'll  2nd\n\n\t naïve 你好\u3000世界 \r\n  x="


@given(st.text())
def test_bytes(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    raw = text.encode("utf-8", "ignore")
    assert tokenizer.encode(raw.decode()) == list(raw)
    assert tokenizer.decode(list(raw)) == raw.decode()
    assert tokenizer.decode([195, 256, 65]) == "\ufffd<|endoftext|>A"


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt3'"):
        load_tokenizer("gpt3")
    with pytest.raises(ValueError, match="bytes have no vocabulary"):
        load_tokenizer("bytes", "somewhere")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"structlin\[text\]"):
        load_tokenizer("gpt2")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def refuse(name: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(FileNotFoundError, match=r"not in tiktoken's cache .*no route.*name a folder"):
        load_tokenizer("gpt2")


class TestFiles:
    def test_as_tiktoken(self, gpt2_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiktoken = pytest.importorskip("tiktoken")
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # without its cache
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(gpt2_vocabulary / "merges.txt"), str(gpt2_vocabulary / "vocab.json")
        )
        end = {"<|endoftext|>": 50256}
        oracle = tiktoken.Encoding("made", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=end)
        tokenizer = load_tokenizer("gpt2", gpt2_vocabulary)
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
        for text in (SAMPLE, "", "\n", "a" * 1000, " hello  the letters", "<|endoftext|>"):
            tokens = tokenizer.encode(text)
            assert tokens == oracle.encode_ordinary(text)
            assert tokenizer.decode(tokens) == text
        assert tokenizer.decode([50256]) == "<|endoftext|>"
        # The original names.
        (tmp_path / "vocab.bpe").write_bytes((gpt2_vocabulary / "merges.txt").read_bytes())
        (tmp_path / "encoder.json").write_bytes((gpt2_vocabulary / "vocab.json").read_bytes())
        assert load_tokenizer("gpt2", tmp_path).encode(SAMPLE) == tokenizer.encode(SAMPLE)

    def test_damaged(self, gpt2_vocabulary: Path, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        with pytest.raises(FileNotFoundError, match="holds neither"):
            load_tokenizer("gpt2", tmp_path)
        (tmp_path / "merges.txt").write_bytes((gpt2_vocabulary / "merges.txt").read_bytes())
        (tmp_path / "vocab.json").write_text("{")
        with pytest.raises(ValueError, match="are not GPT-2's vocabulary"):
            load_tokenizer("gpt2", tmp_path)
        vocabulary = json.loads((gpt2_vocabulary / "vocab.json").read_text(encoding="utf-8"))
        vocabulary["<|endoftext|>"] = 60000
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        with pytest.raises(ValueError, match="is not GPT-2's vocabulary"):
            load_tokenizer("gpt2", tmp_path)
