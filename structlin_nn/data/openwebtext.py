"""OpenWebText, or any text data set that Hugging Face `datasets` reads, as tokens to train on.

The data are streamed: no copy of the text is kept. Whole documents, chosen at random by a seed, make the validation
split; each document ends with the end-of-text token, as in nanoGPT.

Source: Gokaslan and Cohen, OpenWebText Corpus, 2019, http://Skylion007.github.io/OpenWebTextCorpus
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn.data._checks import natural
from structlin_nn.data.bpe import Tokenizer, load_tokenizer
from structlin_nn.data.hub import load_hub
from structlin_nn.data.shards import write_token_shards
from structlin_nn.data.tokens import SPLITS, TokenData, open_tokens

__all__ = ["OPENWEBTEXT", "prepare_documents"]

OPENWEBTEXT = "Skylion007/openwebtext"
ROWS = 50_000
"""Documents in a shard of a data set that is saved on disk; streams come in shards of their own."""


def prepare_documents(
    out: str | os.PathLike[str],
    *,
    dataset: str | os.PathLike[str] = OPENWEBTEXT,
    split: str = "train",
    column: str = "text",
    tokenizer: str = "gpt2",
    vocabulary: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.0005,
    seed: int = 2357,
    name: str | None = None,
    workers: int | None = None,
    advance: Callable[[int, int, int], None] | None = None,
) -> TokenData:
    """Write the tokens of a data set of documents to a folder, as `structlin_nn.data.tokens.open_tokens` reads them.

    An interrupted preparation is taken up again by the same call, shard by shard; one that is finished is only
    opened. A shard is a file of the data set, or `ROWS` documents of one that was saved on disk.

    Args:
        out: the folder.
        dataset: a name on the Hugging Face hub; a folder of parquet, JSON or text files; or a folder that
            ``datasets`` saved.
        split: which of its splits.
        column: of the text.
        tokenizer: ``gpt2`` or ``bytes``.
        vocabulary: folder of the vocabulary of ``gpt2`` (`structlin_nn.data.bpe`).
        val_fraction: probability with which a document goes to the validation split, above 0 and below 1.
        seed: of that choice.
        name: of the corpus; by default that of the data set.
        workers: processes; None: one for each core.
        advance: called with the shards done, all shards, and the tokens made so far.

    Raises:
        ImportError: `datasets` or tiktoken is not installed.
        FileNotFoundError: the data set cannot be loaded, or the vocabulary is not at hand.
        FileExistsError: the folder holds something else.
        ValueError: a split or column that is not there, a fraction out of range, a document that is no text, or
            no document at all in one of the two splits.
        structlin_nn.data.shards.Interrupted: a signal came; what was done is kept.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1, got {val_fraction}")
    coder = load_tokenizer(tokenizer, vocabulary)
    source = _Source(os.fspath(dataset), split, column)
    count, identity = source.describe()
    title = Path(source.place).name if Path(source.place).exists() else source.place
    job = {
        "kind": "documents",
        "dataset": [title, split, column, count, identity],
        "tokenizer": coder.name,
        "val_fraction": val_fraction,
        "seed": natural("seed", seed),
    }
    meta = {
        "name": name or title,
        "tokenizer": coder.name,
        "vocab_size": coder.vocab_size,
        "end_of_text": coder.end_of_text,
    }
    make = _Encode(source, count, coder.name, vocabulary, val_fraction, seed)
    report = None if advance is None else lambda done, tokens: advance(done, count, tokens)
    write_token_shards(Path(out).expanduser(), job, count, make, meta, workers=workers, advance=report)
    return open_tokens(Path(out).expanduser())


@dataclass
class _Source:
    """A data set by its name or folder, which every process opens for itself."""

    place: str
    split: str
    column: str

    def open(self) -> Any:
        """The split: a data set of rows where it was saved on disk, a stream otherwise."""
        return load_hub(self.place, split=self.split, streaming=True)

    def describe(self) -> tuple[int, Any]:
        """Number of shards, and what tells the data set from another of its name, as far as that can be had."""
        found = self.open()
        if found.column_names is not None and self.column not in found.column_names:
            raise ValueError(f"{self.place} has the columns {', '.join(found.column_names)}, not {self.column!r}")
        if hasattr(found, "num_rows"):
            if not found.num_rows:
                raise ValueError(f"{self.place} is empty")
            return -(-found.num_rows // ROWS), [found._fingerprint, ROWS]
        known = (found.info.splits or {}).get(self.split)
        return found.num_shards, None if known is None else known.num_examples

    def documents(self, count: int, number: int) -> Iterable[Any]:
        """The documents of shard `number` of `count`."""
        found = self.open()
        if hasattr(found, "num_rows"):
            rows = found.select(range(number * ROWS, min((number + 1) * ROWS, found.num_rows)))
        else:
            rows = found.shard(num_shards=count, index=number)
        return (row.get(self.column) for row in rows)


class _Encode:
    """Shard number -> tokens of each split."""

    def __init__(self, source: _Source, count: int, name: str, vocabulary: Any, val_fraction: float, seed: int) -> None:
        self.source, self.count, self.name, self.vocabulary = source, count, name, vocabulary
        self.val_fraction, self.seed = val_fraction, seed
        self.tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokenizer": None}

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.name, self.vocabulary)
        found = {split: array("H") for split in SPLITS}
        chances = _uniform(self.seed, number)
        for place, text in enumerate(self.source.documents(self.count, number)):
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.source.place}: document {place} of shard {number} is no text in the column "
                    f"{self.source.column!r} but {text!r}"
                )
            tokens = found["val" if next(chances) < self.val_fraction else "train"]
            tokens.extend(self.tokenizer.encode(text))
            tokens.append(self.tokenizer.end_of_text)
        return {split: np.frombuffer(tokens, dtype=np.uint16) for split, tokens in found.items()}


def _uniform(seed: int, shard: int) -> Iterator[float]:
    """Numbers from 0 to below 1, from a raw stream that no release of NumPy changes."""
    stream = np.random.Philox(np.random.SeedSequence([seed, shard]))
    while True:
        yield from (stream.random_raw(4096) >> np.uint64(11)) * 2.0**-53
