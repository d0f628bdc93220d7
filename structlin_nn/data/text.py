"""Any text as tokens to train on: files, or the text that every CPython ships.

Each file is a document. Its end goes to the validation split, so that both splits hold something of every document,
and each part ends with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn.data.bpe import Tokenizer, load_tokenizer
from structlin_nn.data.shards import write_token_shards
from structlin_nn.data.tokens import SPLITS, TokenData, open_tokens

__all__ = ["prepare_text", "pydoc_documents"]

PIECE = 2**20
SHARD = 2**24
_WINDOW = 2**16
_SEPARATOR, _NEWLINE = re.compile(rb"[ \n]"), ord("\n")


def pydoc_documents() -> dict[str, str]:
    """The topics of Python's own documentation (`pydoc_data.topics`), by name: about half a megabyte of English.

    Licence: that of Python, https://docs.python.org/3/license.html. The text differs between versions of Python.

    >>> len(pydoc_documents()) > 50
    True
    """
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def prepare_text(
    files: Sequence[str | os.PathLike[str]] | None,
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "gpt2",
    vocabulary: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    name: str | None = None,
    workers: int | None = None,
    advance: Callable[[int, int, int], None] | None = None,
) -> TokenData:
    """Write the tokens of texts to a folder, as `structlin_nn.data.tokens.open_tokens` reads them.

    An interrupted preparation is taken up again by the same call; one that is finished is only opened.

    Args:
        files: UTF-8 text files, each a document, in this order; None: `pydoc_documents`.
        out: the folder.
        tokenizer: ``gpt2`` or ``bytes``.
        vocabulary: folder of the vocabulary of ``gpt2`` (`structlin_nn.data.bpe`).
        val_fraction: share of each document, by bytes, that goes to the validation split: its end, from the start
            of a line where there is one near. Above 0 and below 1.
        name: of the corpus; by default that of the folder.
        workers: processes; None: one for each core.
        advance: called with the shards done, all shards, and the tokens made so far.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: the folder holds something else.
        ValueError: no files, an empty file, one that is not UTF-8 (the message names the byte), a fraction out
            of range, or a text too short to leave something for both splits.
        ImportError, FileNotFoundError, ValueError: as `structlin_nn.data.bpe.GPT2Tokenizer`.
        structlin_nn.data.shards.Interrupted: a signal came; what was done is kept.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = prepare_text(None, f"{folder}/pydoc", tokenizer="bytes", workers=1)
        >>> data.vocab_size, len(data.train) > 8 * len(data.val) > 0
        (257, True)
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    if files is not None and not files:
        raise ValueError("at least one text file is needed")
    coder = load_tokenizer(tokenizer, vocabulary)
    documents = [_Document(title, None) for title in pydoc_documents()] if files is None else _documents(files)
    target = Path(out).expanduser()
    job = {
        "kind": "text",
        "tokenizer": coder.name,
        "val_fraction": val_fraction,
        "documents": [[Path(d.name).name, d.size, d.sha256] for d in documents],
        "piece": PIECE,
        "shard": SHARD,
    }
    shards = _plan(documents, val_fraction)
    make = _Encode(documents, shards, coder.name, vocabulary)
    meta = {
        "name": name or (f"pydoc-{platform.python_version()}" if files is None else target.resolve().name),
        "tokenizer": coder.name,
        "vocab_size": coder.vocab_size,
        "end_of_text": coder.end_of_text,
    }
    report = None if advance is None else lambda done, tokens: advance(done, len(shards), tokens)
    write_token_shards(target, job, len(shards), make, meta, workers=workers, advance=report)
    return open_tokens(target)


@dataclass
class _Document:
    """A file by its path, or a topic of pydoc by its name."""

    name: str
    path: Path | None

    def __post_init__(self) -> None:
        digest, self.size = hashlib.sha256(), 0
        if self.path is None:
            raw = pydoc_documents()[self.name].encode()
            digest.update(raw)
            self.size = len(raw)
        else:
            with self.path.open("rb") as file:
                while chunk := file.read(PIECE):
                    digest.update(chunk)
                    self.size += len(chunk)
        self.sha256 = digest.hexdigest()
        if not self.size:
            raise ValueError(f"{self.name} is empty")

    def read(self, start: int, stop: int) -> bytes:
        if self.path is None:
            return pydoc_documents()[self.name].encode()[start:stop]
        with self.path.open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        if len(raw) != stop - start:
            raise ValueError(f"{self.name} was {self.size} bytes long and became shorter")
        return raw


def _documents(files: Sequence[str | os.PathLike[str]]) -> list[_Document]:
    found = []
    for file in files:
        path = Path(file).expanduser()
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name its files")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        found.append(_Document(str(path), path))
    return found


_Piece = tuple[int, int, int, str, bool]
"""Document, first byte, last byte, split, whether the end of a part of the document."""


def _plan(documents: list[_Document], val_fraction: float) -> list[list[_Piece]]:
    """Pieces that can be encoded independently, about `SHARD` bytes of them in each shard."""
    shards: list[list[_Piece]] = [[]]
    size = 0
    for number, document in enumerate(documents):
        cut = _character(document, round((1 - val_fraction) * document.size))
        for split, first, last in zip(SPLITS, (0, cut), (cut, document.size), strict=True):
            start = first
            while start < last:
                stop = _boundary(document, start + PIECE, last)
                if size >= SHARD:
                    shards.append([])
                    size = 0
                shards[-1].append((number, start, stop, split, stop == last))
                size += stop - start
                start = stop
    return shards


def _character(document: _Document, place: int) -> int:
    """The start of a line shortly before `place`, or else of the character that is there."""
    # Near enough not to change the shares much.
    window = min(2**12, place // 8, (document.size - place) // 8)
    line = document.read(place - window, place).rfind(b"\n")
    if line >= 0:
        return place - window + line + 1
    rest = document.read(place, min(place + 4, document.size))
    return place + next((n for n, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))


def _boundary(document: _Document, place: int, last: int) -> int:
    """The first place from `place` on where the text can be cut without changing any token, at most `last`.

    That is after a newline or before a space that stands alone between two visible characters: in GPT-2's pattern
    such a newline is a token of its own, and such a space begins one.
    """
    while place < last:
        offset = max(0, place - 5)
        raw = document.read(offset, min(place + _WINDOW, document.size))
        for found in _SEPARATOR.finditer(raw, place - offset, len(raw) - 4):
            at = found.start()
            before = raw[max(0, at - 4) : at].decode("utf-8", "ignore")[-1:]
            after = raw[at + 1 : at + 5].decode("utf-8", "ignore")[:1]
            if before and after and not before.isspace() and not after.isspace():
                return min(offset + at + (1 if raw[at] == _NEWLINE else 0), last)
        place += _WINDOW - 5
    return last


class _Encode:
    """Shard number -> tokens of each split."""

    def __init__(self, documents: list[_Document], shards: list[list[_Piece]], name: str, vocabulary: Any) -> None:
        self.documents, self.shards, self.name, self.vocabulary = documents, shards, name, vocabulary
        self.tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokenizer": None}

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.name, self.vocabulary)
        parts: dict[str, list[np.ndarray]] = {split: [np.zeros(0, np.uint16)] for split in SPLITS}
        for index, start, stop, split, ends in self.shards[number]:
            document = self.documents[index]
            try:
                text = document.read(start, stop).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{document.name} is not UTF-8 at byte {start + error.start}") from error
            tokens = self.tokenizer.encode(text)
            if ends:
                tokens.append(self.tokenizer.end_of_text)
            parts[split].append(np.array(tokens, dtype=np.uint16))
        return {split: np.concatenate(found) for split, found in parts.items()}
