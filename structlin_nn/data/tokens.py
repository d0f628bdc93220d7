"""Tokens of a text: files as nanoGPT writes them, and batches of them as NumPy arrays, for torch and flax.

A folder holds ``train.bin`` and ``val.bin``, raw little-endian uint16 numbers, one for each token, without a header:
the format of nanoGPT's data scripts (Karpathy, https://github.com/karpathy/nanoGPT). Beside
them, ``structlin prepare`` writes ``meta.json`` with the size of the vocabulary, the tokenizer, and the number and
sha256 sum of the tokens of each split. nanoGPT's ``meta.pkl`` is a pickle, which can run code, and is never read.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "EVALUATION_SEED", "GPT2_VOCABULARY", "IGNORE", "SPLITS", "TokenData", "evaluation_batches", "open_tokens",
    "token_batch", "token_vocabulary",
]  # fmt: skip

GPT2_VOCABULARY = 50257
"""Tokens of GPT-2's byte-pair encoding, the last of which, 50256, ends a document."""

IGNORE = -100
"""Target that counts for nothing: the default ``ignore_index`` of torch's cross-entropy."""

EVALUATION_SEED = 2**31 - 1
"""Seed of the pieces that are evaluated, which are the same in every evaluation of every run."""

SPLITS = ("train", "val")
META = "meta.json"
META_VERSION = 1
DTYPE = np.dtype("<u2")
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class TokenData:
    """The tokens of a corpus, mapped from their files and read when they are used.

    Attributes
    ----------
    train, val
        uint16 arrays (N,) and (M,), read-only.
    vocab_size
        Every token is below it.
    digest
        sha256 over the sums of both splits: equal exactly where all tokens are.
    name, folder
        Name of the corpus, by default that of the folder, and the folder of the files.
    tokenizer, end_of_text
        Name, and the token that ends a document, from ``meta.json``; None where it is missing.
    """

    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    name: str
    digest: str
    tokenizer: str | None = None
    end_of_text: int | None = None
    folder: Path | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return (
            f"TokenData({self.name!r}: {len(self.train):,} training and {len(self.val):,} validation tokens, "
            f"vocabulary {self.vocab_size})"
        )


def open_tokens(
    folder: str | os.PathLike[str], *, vocab_size: int | None = None, digest: str | None = None
) -> TokenData:
    """Open a folder of token files.

    All tokens are read once, to verify that they are inside the vocabulary and match the sums in ``meta.json``.

    Parameters
    ----------
    folder
        Folder with ``train.bin`` and ``val.bin``, as in the description of the module.
    vocab_size
        Size of the vocabulary, for files without ``meta.json``; without either, GPT-2's 50257 is taken, as nanoGPT
        does.
    digest
        ``TokenData.digest`` of another process of the same run, taken without reading the tokens.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing, truncated or empty; a token outside the vocabulary (the message names its place); tokens that
        are not those that ``meta.json`` describes, a damaged ``meta.json``, or a ``meta.pkl`` in its place.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for split in SPLITS:
    ...         np.arange(9, dtype=np.uint16).tofile(f"{folder}/{split}.bin")
    ...     open_tokens(folder, vocab_size=9)
    TokenData('...': 9 training and 9 validation tokens, vocabulary 9)
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is not a folder; it should hold train.bin and val.bin")
    meta = _read_meta(place / META)
    vocabulary = _vocabulary(place, meta, vocab_size)
    maps = {split: _map(place / f"{split}.bin") for split in SPLITS}
    for split, tokens in maps.items():
        if (stated := meta.get(split, {}).get("tokens", len(tokens))) != len(tokens):
            raise ValueError(f"{place / split}.bin has {len(tokens)} tokens, {META} states {stated}: it is truncated")
    if digest is None:
        sums = {split: _scan(place / f"{split}.bin", maps[split], vocabulary) for split in SPLITS}
        for split, actual in sums.items():
            if (stated := meta.get(split, {}).get("sha256", actual)) != actual:
                raise ValueError(
                    f"{place / split}.bin has the sha256 sum {actual}, but {META} states {stated}: it is damaged, or "
                    f"{META} belongs to other files"
                )
        digest = hashlib.sha256("".join(sums[split] for split in SPLITS).encode()).hexdigest()
    return TokenData(
        **maps, vocab_size=vocabulary, name=meta.get("name") or place.resolve().name, digest=digest,
        tokenizer=meta.get("tokenizer"), end_of_text=meta.get("end_of_text"), folder=place,
    )  # fmt: skip


def token_batch(
    tokens: np.ndarray, *, block_size: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return random pieces of a text for one training step, as ``get_batch`` of nanoGPT does.

    The result is a function of the arguments: a run resumes by its step alone. The places of all `batch_size` pieces
    are drawn from the counter-based generator Philox, and each process takes its part of them.

    Parameters
    ----------
    tokens
        Integer array (N,), such as ``TokenData.train``.
    block_size, batch_size
        Tokens in a piece, and pieces of a step, of all processes together.
    seed, step
        Non-negative integers.
    rank, world_size
        Number of this process, and of all, a divisor of `batch_size`.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        (x, y): int64 arrays (batch_size / world_size, block_size); y is x moved on by one token.

    Examples
    --------
    >>> x, y = token_batch(np.arange(100, dtype=np.uint16), block_size=4, batch_size=2, seed=0, step=0)
    >>> x.shape, x.dtype, bool((y == x + 1).all())
    ((2, 4), dtype('int64'), True)
    """
    local, rank, _ = share(batch_size, rank, world_size)
    starts = _starts(tokens, block_size, batch_size, [natural("seed", seed), natural("step", step)])
    return _pieces(tokens, starts[rank * local : (rank + 1) * local], block_size)


def evaluation_batches(
    tokens: np.ndarray, *, block_size: int, batch_size: int, sequences: int | None = None,
    rank: int = 0, world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Iterate over pieces for evaluation, the same for every batch size and number of processes.

    The mean loss is the sum over all targets, divided by their number; both are summed over the processes. All
    processes get equally many batches of one shape, as collective forward passes need: rows that a process lacks are
    filled, with targets `IGNORE`, which torch's cross-entropy leaves out of a sum. With one process nothing is filled.

    Parameters
    ----------
    tokens, block_size, batch_size, rank, world_size
        As in `token_batch`, with its errors.
    sequences
        Pieces at random places, which depend on `block_size` and the number of tokens alone. None: the whole text in
        pieces without overlap, the short last one too: every token but the first is a target.

    Yields
    ------
    Iterator[tuple[np.ndarray, np.ndarray]]
        (x, y): int64 arrays (up to batch_size / world_size, block_size or less).

    Examples
    --------
    >>> for x, y in evaluation_batches(np.arange(8, dtype=np.uint16), block_size=3, batch_size=2):
    ...     print(x.tolist(), y.tolist())
    [[0, 1, 2], [3, 4, 5]] [[1, 2, 3], [4, 5, 6]]
    [[6]] [[7]]
    """
    _, rank, world_size = share(batch_size, rank, world_size)
    if sequences is not None:
        starts = _starts(tokens, block_size, natural("sequences", sequences, 1), [EVALUATION_SEED, 0])
        rest = 0
    else:
        targets = len(_check_tokens(tokens)) - 1
        if targets < 1:
            raise ValueError(f"at least 2 tokens are needed for one prediction, got {len(tokens)}")
        whole, rest = divmod(targets, natural("block_size", block_size, 1))
        starts = np.arange(whole) * block_size
    batches = [(starts[first : first + batch_size], block_size) for first in range(0, len(starts), batch_size)]
    if rest:
        batches.append((np.array([len(tokens) - 1 - rest]), rest))

    # An inner generator, so that the call itself raises errors of the arguments.
    def made() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for places, length in batches:
            each = -(-len(places) // world_size)
            mine = places[rank * each : (rank + 1) * each]
            x, y = _pieces(tokens, np.concatenate([mine, np.zeros(each - len(mine), np.int64)]), length)
            y[len(mine) :] = IGNORE
            yield x, y

    return made()


def _starts(tokens: np.ndarray, block_size: int, number: int, key: list[int]) -> np.ndarray:
    """Return the starts of random pieces. The first k of n are those of k."""
    if len(_check_tokens(tokens)) <= natural("block_size", block_size, 1):
        raise ValueError(
            f"{len(tokens)} tokens are too few: pieces of block_size {block_size} and the token after each need "
            f"{block_size + 1} at least"
        )
    # The remainder favours low places by less than 2**-32 for any corpus below 2**32 tokens.
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(number)
    return (raw % np.uint64(len(tokens) - block_size)).astype(np.int64)


def _pieces(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1].copy(), rows[:, 1:].copy()  # a single row would be contiguous, and shared by both


def _check_tokens(tokens: Any) -> np.ndarray:
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"tokens must be an integer array of one axis (data.train, data.val), got {found}")
    return tokens


def _read_meta(path: Path) -> dict[str, Any]:
    """Return the checked content of ``meta.json``; {} if there is none."""
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = meta["version"] == META_VERSION and isinstance(meta.get("name", ""), str)
        known &= isinstance(meta.get("tokenizer"), str | None) and isinstance(meta.get("end_of_text"), int | None)
        known &= all(isinstance(meta.get(split, {}), dict) for split in SPLITS)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if not known:
        raise ValueError(f"{path} is damaged, or not of version {META_VERSION}: {str(meta)[:200]}")
    return meta


def token_vocabulary(folder: str | os.PathLike[str]) -> int:
    """Return the size of the vocabulary of a folder, as `open_tokens` finds it, without reading tokens."""
    place = Path(folder).expanduser()
    return _vocabulary(place, _read_meta(place / META), None)


def _vocabulary(folder: Path, meta: dict[str, Any], given: int | None) -> int:
    stated = meta.get("vocab_size")
    if given is not None and stated not in (None, given):
        raise ValueError(f"vocab_size is {given}, but {folder / META} states {stated}")
    if given is None and stated is None and (folder / "meta.pkl").exists():
        raise ValueError(
            f"{folder / 'meta.pkl'} states the vocabulary, but pickles can run code and are not read: pass vocab_size"
        )
    size = natural("vocab_size", next(n for n in (given, stated, GPT2_VOCABULARY) if n is not None), 1)
    if size > 2**16:
        raise ValueError(f"vocab_size must be at most 65536 for tokens of 16 bits, got {size}")
    return size


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `structlin prepare` makes it, and so do the scripts of nanoGPT")
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        raise ValueError(f"{path} has {size} bytes; tokens have 2 bytes each: it is empty or truncated")
    return np.memmap(path, dtype=DTYPE, mode="r")


def _scan(path: Path, tokens: np.ndarray, vocabulary: int) -> str:
    """Return the sha256 sum of the tokens; ValueError where one is outside the vocabulary."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _CHUNK):
        chunk = np.ascontiguousarray(tokens[start : start + _CHUNK])
        if int(chunk.max()) >= vocabulary:
            wrong = int(np.argmax(chunk >= vocabulary))
            raise ValueError(
                f"{path}: token {start + wrong} is {chunk[wrong]}, outside the vocabulary of {vocabulary} "
                "(vocab_size or meta.json states another vocabulary)"
            )
        digest.update(chunk.data)
    return digest.hexdigest()


def natural(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int; TypeError for other types, ValueError for one below `least`."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        wanted = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {wanted}, got {number}")
    return number


def share(batch_size: Any, rank: Any, world_size: Any) -> tuple[int, int, int]:
    """Return (batch size of one process, rank, number of processes) of a batch that all share equally."""
    size, world = natural("batch_size", batch_size, 1), natural("world_size", world_size, 1)
    place = natural("rank", rank)
    if place >= world:
        raise ValueError(f"rank must be below world_size {world}, got {place}")
    if size % world:
        raise ValueError(f"batch_size {size} is that of all processes and cannot be shared equally by {world}")
    return size // world, place, world
