"""Tokenisers: GPT-2's byte-pair encoding where its vocabulary is at hand, and bytes, which need none.

The encoding itself is tiktoken's. Its vocabulary is two files, from wherever they are: a folder that is named (the
original ``encoder.json`` and ``vocab.bpe``, or ``vocab.json`` and ``merges.txt`` as transformers keeps them), the
cache of tiktoken, the cache of transformers, or the network, which tiktoken asks.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from structlin_nn.data.tokens import GPT2_VOCABULARY

__all__ = ["TOKENIZERS", "ByteTokenizer", "GPT2Tokenizer", "Tokenizer", "load_tokenizer"]

TOKENIZERS = ("gpt2", "bytes")
_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
# As in the release of GPT-2, in the words of tiktoken, so that no network is needed to know it.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; the end of a document is not marked."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """The bytes of UTF-8 as tokens 0 to 255, and 256 for the end of a document.

    >>> ByteTokenizer().encode("añ")
    [97, 195, 177]
    >>> ByteTokenizer().decode([97, 195, 177, 256])
    'añ<|endoftext|>'
    """

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        raw = b"".join(b"<|endoftext|>" if token == self.end_of_text else bytes([token]) for token in tokens)
        return raw.decode(errors="replace")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, 50257 tokens.

    Args:
        folder: holds the vocabulary, see the module's description; None: the caches, then the network.

    Raises:
        ImportError: tiktoken is not installed.
        FileNotFoundError: no vocabulary in the folder, or none at hand at all.
        ValueError: files that are not those of GPT-2.
    """

    name = "gpt2"
    vocab_size = GPT2_VOCABULARY
    end_of_text = GPT2_VOCABULARY - 1

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(f"GPT-2's tokens need tiktoken: pip install 'structlin[text]' ({error})") from error
        if folder is not None:
            self._encoding = _from_files(Path(folder).expanduser())
            return
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:
            # Of the network, in whatever way it fails: tiktoken has no exception of its own for it.
            cached = _transformers_cache()
            if cached is None:
                raise FileNotFoundError(
                    "GPT-2's vocabulary is neither in a cache of tiktoken or transformers, nor can it be downloaded "
                    f"({type(error).__name__}: {error}); name a folder that holds encoder.json and vocab.bpe, or "
                    "vocab.json and merges.txt"
                ) from error
            self._encoding = _from_files(cached)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode(list(tokens), errors="replace")


def load_tokenizer(name: str, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A tokeniser by its name.

    Args:
        name: one of `TOKENIZERS`.
        folder: of the vocabulary of ``gpt2``; ``bytes`` has none.

    Raises:
        ValueError: an unknown name, or a folder for ``bytes``.
        ImportError, FileNotFoundError, ValueError: as `GPT2Tokenizer`.

    Example:
        >>> load_tokenizer("bytes").vocab_size
        257
    """
    if name == "gpt2":
        return GPT2Tokenizer(folder)
    if name != "bytes":
        raise ValueError(f"unknown tokenizer {name!r}; one of {', '.join(TOKENIZERS)}")
    if folder is not None:
        raise ValueError(f"bytes have no vocabulary, got the folder {os.fspath(folder)}")
    return ByteTokenizer()


def _from_files(folder: Path) -> Any:
    import tiktoken

    for merges, vocabulary in _FILES:
        if not ((folder / merges).is_file() and (folder / vocabulary).is_file()):
            continue
        try:
            ranks = _ranks((folder / merges).read_text("utf-8"), json.loads((folder / vocabulary).read_text("utf-8")))
        except (ValueError, KeyError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"{folder / merges} and {vocabulary} are not GPT-2's vocabulary ({found})") from error
        special = {"<|endoftext|>": GPT2_VOCABULARY - 1}
        return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    raise FileNotFoundError(f"{folder} holds neither encoder.json and vocab.bpe nor vocab.json and merges.txt")


def _ranks(merges: str, vocabulary: dict[str, int]) -> dict[bytes, int]:
    """Bytes of each token -> its number, from the merges in their order; ValueError unless the vocabulary agrees.

    tiktoken has this too, but copies every file that it reads into a shared cache.
    """
    # GPT-2 writes bytes that are no visible characters as the characters from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = [*visible, *(byte for byte in range(256) if byte not in visible)]
    byte_of = {
        chr(byte if place < len(visible) else 256 + place - len(visible)): byte for place, byte in enumerate(order)
    }

    def raw(text: str) -> bytes:
        return bytes(byte_of[character] for character in text)

    ranks = {bytes([byte]): place for place, byte in enumerate(order)}
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    for line in lines:
        first, second = line.split()
        ranks[raw(first) + raw(second)] = len(ranks)
    stated = {raw(text): number for text, number in vocabulary.items() if text != "<|endoftext|>"}
    if stated != ranks or len(ranks) != GPT2_VOCABULARY - 1:
        raise ValueError(
            f"{len(lines)} merges make {len(ranks)} tokens, of the {len(stated)} in the vocabulary "
            f"{sum(stated.get(token) == number for token, number in ranks.items())} have their number"
        )
    return ranks


def _transformers_cache() -> Path | None:
    """The folder in which transformers keeps the vocabulary of GPT-2, where it does."""
    try:
        from transformers.utils import cached_file

        found = cached_file("openai-community/gpt2", "merges.txt", local_files_only=True)
    except (ImportError, OSError):
        return None
    return None if found is None else Path(found).parent
