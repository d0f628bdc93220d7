"""Tokenisers: GPT-2's byte-pair encoding by tiktoken (by tokenizers, from files), and bytes without a vocabulary.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019, section 2.2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from structlin_nn._on_import import needed
from structlin_nn._text import check_known
from structlin_nn.data.tokens import GPT2_VOCABULARY

__all__ = ["TOKENIZERS", "Tokenizer", "load_tokenizer"]

TOKENIZERS = ("gpt2", "bytes")
_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back.

    `name` is one of `TOKENIZERS`; tokens are below `vocab_size`, and `end_of_text` ends a document, which `encode` does
    not mark. What is not UTF-8 is decoded to U+FFFD.
    """

    name: str
    vocab_size: int
    end_of_text: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]


def load_tokenizer(name: str, folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Return a tokenizer by its name.

    Parameters
    ----------
    name
        ``gpt2``, or ``bytes``: the bytes of UTF-8 as tokens 0 to 255, and 256 for the end of a document.
    folder
        Folder of GPT-2's vocabulary: ``encoder.json`` and ``vocab.bpe``, or ``vocab.json`` and ``merges.txt`` as
        transformers keeps them. None: tiktoken's cache (``TIKTOKEN_CACHE_DIR``), then the network.

    Raises
    ------
    ValueError, ImportError, FileNotFoundError
        An unknown name, or files that are not those of GPT-2; tiktoken is not installed, or the vocabulary is missing.

    Examples
    --------
    >>> tokenizer = load_tokenizer("bytes")
    >>> tokenizer.encode("añ"), tokenizer.decode([97, 195, 177, 256])
    ([97, 195, 177], 'añ<|endoftext|>')
    """
    check_known("tokenizer", name, TOKENIZERS)
    if name == "bytes":
        if folder is not None:
            raise ValueError(f"bytes have no vocabulary, got the folder {os.fspath(folder)}")
        return Tokenizer(name, 257, 256, lambda text: list(text.encode()), _bytes_to_text)
    end = GPT2_VOCABULARY - 1
    tiktoken, tokenizers = (needed(name, "GPT-2's tokens need tiktoken", "text") for name in ("tiktoken", "tokenizers"))
    if folder is None:
        try:
            coder = tiktoken.get_encoding("gpt2")
        except Exception as error:
            # Of the network, in whatever way it fails: tiktoken has no exception of its own for it.
            raise FileNotFoundError(
                "GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded "
                f"({type(error).__name__}: {error}); name a folder that holds encoder.json and vocab.bpe, or "
                "vocab.json and merges.txt"
            ) from error
        return Tokenizer(name, GPT2_VOCABULARY, end, coder.encode_ordinary, lambda tokens: coder.decode(list(tokens)))
    # tiktoken reads such files too, but caches them by their path.
    place = Path(folder).expanduser()
    pair = next((pair for pair in _FILES if all((place / file).is_file() for file in pair)), None)
    if pair is None:
        raise FileNotFoundError(f"{place} holds neither encoder.json and vocab.bpe nor vocab.json and merges.txt")
    try:
        found = tokenizers.ByteLevelBPETokenizer.from_file(str(place / pair[1]), str(place / pair[0]))
    except Exception as error:
        raise ValueError(f"{place}: {' and '.join(pair)} are not GPT-2's vocabulary ({error})") from error
    size = found.get_vocab_size(), found.token_to_id("<|endoftext|>")
    if size != (GPT2_VOCABULARY, end):
        raise ValueError(f"{place / pair[1]} is not GPT-2's vocabulary: (size, end of text) is {size}")
    return Tokenizer(
        name, GPT2_VOCABULARY, end, lambda text: found.encode(text, add_special_tokens=False).ids,
        lambda tokens: found.decode(list(tokens), skip_special_tokens=False),
    )  # fmt: skip


def _bytes_to_text(tokens: Iterable[int]) -> str:
    return b"".join(b"<|endoftext|>" if token == 256 else bytes([token]) for token in tokens).decode(errors="replace")
