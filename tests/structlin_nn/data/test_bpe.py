"""Tokenisers: bytes, and GPT-2's encoding from a vocabulary of its size (a made one, and the real one if at hand)."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structlin_nn.data.bpe import ByteTokenizer, GPT2Tokenizer, load_tokenizer
from structlin_nn.data.text import pydoc_documents

SAMPLE = "Hello world's 'll  2nd\n\n\t naïve 你好\u3000世界 \r\n  x="


class TestBytes:
    @given(st.text())
    def test_round_trip(self, text: str) -> None:
        tokenizer = ByteTokenizer()
        tokens = tokenizer.encode(text.encode("utf-8", "ignore").decode())
        assert tokens == list(text.encode("utf-8", "ignore"))
        assert tokenizer.decode(tokens) == text.encode("utf-8", "ignore").decode()

    def test_halves_of_a_character(self) -> None:
        assert ByteTokenizer().decode([195, 256, 65]) == "\ufffd<|endoftext|>A"


class TestLoad:
    def test_names(self) -> None:
        assert load_tokenizer("bytes").name == "bytes"
        with pytest.raises(ValueError, match="unknown tokenizer 'gpt3'"):
            load_tokenizer("gpt3")
        with pytest.raises(ValueError, match="bytes have no vocabulary"):
            load_tokenizer("bytes", "somewhere")

    def test_without_tiktoken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
        with pytest.raises(ImportError, match=r"structlin\[text\]"):
            load_tokenizer("gpt2")


class TestGPT2:
    @pytest.fixture(autouse=True)
    def needs_tiktoken(self) -> None:
        pytest.importorskip("tiktoken")

    def test_merges_are_applied(self, gpt2_vocabulary: Path) -> None:
        tokenizer = GPT2Tokenizer(gpt2_vocabulary)
        vocabulary = json.loads((gpt2_vocabulary / "vocab.json").read_text(encoding="utf-8"))
        # The made vocabulary merges pairs of bytes, in an order that makes "he" come before "el".
        assert tokenizer.encode("hello") == [vocabulary[part] for part in _merged("hello", vocabulary)]
        assert tokenizer.encode(" hi") == [vocabulary[part] for part in _merged("Ġhi", vocabulary)]
        assert tokenizer.encode("<|endoftext|>") != [50256]
        assert tokenizer.decode([50256]) == "<|endoftext|>"

    @pytest.mark.parametrize("text", [SAMPLE, "", "\n", "a" * 1000])
    def test_round_trip(self, gpt2_vocabulary: Path, text: str) -> None:
        tokenizer = GPT2Tokenizer(gpt2_vocabulary)
        tokens = tokenizer.encode(text)
        assert all(0 <= token < 50256 for token in tokens)
        assert tokenizer.decode(tokens) == text

    def test_files_under_the_original_names(self, gpt2_vocabulary: Path, tmp_path: Path) -> None:
        (tmp_path / "vocab.bpe").write_bytes((gpt2_vocabulary / "merges.txt").read_bytes())
        (tmp_path / "encoder.json").write_bytes((gpt2_vocabulary / "vocab.json").read_bytes())
        assert GPT2Tokenizer(tmp_path).encode(SAMPLE) == GPT2Tokenizer(gpt2_vocabulary).encode(SAMPLE)

    def test_damaged(self, gpt2_vocabulary: Path, tmp_path: Path) -> None:
        merges = (gpt2_vocabulary / "merges.txt").read_text(encoding="utf-8")
        vocabulary = (gpt2_vocabulary / "vocab.json").read_text(encoding="utf-8")
        with pytest.raises(FileNotFoundError, match="holds neither"):
            GPT2Tokenizer(tmp_path)
        for broken_merges, broken_vocabulary in (
            (merges[: len(merges) // 2], vocabulary),
            (merges, vocabulary[:1000]),
            (merges, "{}"),
            (merges, "[]"),
            ("a b c\n", vocabulary),
        ):
            (tmp_path / "merges.txt").write_text(broken_merges, encoding="utf-8")
            (tmp_path / "vocab.json").write_text(broken_vocabulary, encoding="utf-8")
            with pytest.raises(ValueError, match="are not GPT-2's vocabulary"):
                GPT2Tokenizer(tmp_path)

    def test_not_at_hand(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import tiktoken

        def refuse(name: str) -> None:
            raise ConnectionError("no network")

        monkeypatch.setattr(tiktoken, "get_encoding", refuse)
        monkeypatch.setattr("structlin_nn.data.bpe._transformers_cache", lambda: None)
        with pytest.raises(FileNotFoundError, match=r"neither in a cache .*no network.*name a folder"):
            GPT2Tokenizer()

    def test_the_real_one(self) -> None:
        try:
            tokenizer = GPT2Tokenizer()
        except FileNotFoundError as error:
            pytest.skip(str(error))
        assert tokenizer.encode("Hello world") == [15496, 995]
        text = "\n\n".join(pydoc_documents().values())
        assert tokenizer.decode(tokenizer.encode(text)) == text


def _merged(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Byte-pair encoding by its definition: of all neighbours, those with the lowest number are joined first."""
    parts = list(word)
    while True:
        pairs = [(vocabulary.get(a + b, 10**9), place) for place, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, place = min(pairs, default=(10**9, 0))
        if rank == 10**9:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
