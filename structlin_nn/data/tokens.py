"""Tokens of a text: files as nanoGPT writes them, random batches to train on, and a whole split to evaluate on.

A folder holds ``train.bin`` and ``val.bin``, raw little-endian uint16 numbers, one for each token, without a header:
what the data scripts of nanoGPT write (Karpathy, https://github.com/karpathy/nanoGPT) is read as it stands. Beside
them, ``structlin prepare`` writes ``meta.json`` with the size of the vocabulary, the tokeniser, and the number and
sha256 sum of the tokens of each split. nanoGPT's ``meta.pkl`` is a pickle, which can run code, and is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from structlin_nn.data import _cache
from structlin_nn.data._checks import natural, share

if TYPE_CHECKING:
    import torch

__all__ = [
    "GPT2_VOCABULARY",
    "IGNORE",
    "SPLITS",
    "TokenBatches",
    "TokenData",
    "TokenWindows",
    "open_tokens",
    "token_vocabulary",
]

GPT2_VOCABULARY = 50257
"""Tokens of GPT-2's byte-pair encoding, the last of which, 50256, ends a document."""

IGNORE = -100
"""Target that counts for nothing: the default ``ignore_index`` of torch's cross-entropy."""

SPLITS = ("train", "val")
META = "meta.json"
META_VERSION = 1
DTYPE = np.dtype("<u2")
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class TokenData:
    """The tokens of a corpus, mapped from their files: nothing is read before it is used.

    Attributes:
        train: uint16 array (N,), read-only.
        val: uint16 array (M,), read-only.
        vocab_size: every token is below it.
        name: of the corpus; the folder's where ``meta.json`` tells none.
        digest: sha256 over the sums of both splits: equal exactly where all tokens are.
        tokenizer: ``gpt2``, ``bytes``, or another name from ``meta.json``; None where nothing tells.
        end_of_text: the token that ends a document, None where there is none.
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
    folder: str | os.PathLike[str], *, vocab_size: int | None = None, name: str | None = None, digest: str | None = None
) -> TokenData:
    """Open a folder of token files.

    All tokens are read once, to see that each is inside the vocabulary and that the sums are those in ``meta.json``.
    Where that takes long, the sums are kept in the user's cache, and believed until one of the files has another size
    or time of change.

    Args:
        folder: holds ``train.bin`` and ``val.bin``, see the module's description.
        vocab_size: size of the vocabulary, for files without ``meta.json``; without either, GPT-2's 50257 is
            taken, as nanoGPT does.
        name: of the corpus, instead of what ``meta.json`` or the folder says.
        digest: what another process of the same run found (``TokenData.digest``), believed without reading anything.

    Returns:
        The data, both splits as read-only memory maps.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: an odd number of bytes, an empty split, a token outside the vocabulary (the message names its
            place), tokens that are not those that ``meta.json`` describes, a damaged ``meta.json``, a ``meta.pkl``
            in its place, or a ``vocab_size`` that contradicts it or does not fit uint16.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for split in SPLITS:
        ...         np.arange(9, dtype=np.uint16).tofile(f"{folder}/{split}.bin")
        ...     open_tokens(folder, vocab_size=9, name="counting")
        TokenData('counting': 9 training and 9 validation tokens, vocabulary 9)
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is no folder; it should hold train.bin and val.bin")
    meta = _read_meta(place / META)
    vocabulary = _vocabulary(place, meta, vocab_size)
    maps = {split: _map(place / f"{split}.bin") for split in SPLITS}
    for split, tokens in maps.items():
        if (stated := meta.get(split, {}).get("tokens", len(tokens))) != len(tokens):
            raise ValueError(f"{place / split}.bin holds {len(tokens)} tokens, {META} says {stated}: it is truncated")
    if digest is None:
        sums = _verified(place, maps, vocabulary)
        for split, found in sums.items():
            if (stated := meta.get(split, {}).get("sha256", found)) != found:
                raise ValueError(
                    f"{place / split}.bin has the sha256 sum {found}, {META} says {stated}: it is damaged, or {META} "
                    "belongs to other files"
                )
        digest = hashlib.sha256("".join(sums[split] for split in SPLITS).encode()).hexdigest()
    return TokenData(
        **maps,
        vocab_size=vocabulary,
        name=name or meta.get("name") or place.resolve().name,
        digest=digest,
        tokenizer=meta.get("tokenizer"),
        end_of_text=meta.get("end_of_text"),
        folder=place,
    )


class _Pieces:
    """Pieces of a text in batches that processes share: what `TokenBatches` and `TokenWindows` have in common."""

    def __init__(
        self, tokens: np.ndarray, block_size: int, batch_size: int, rank: int, world_size: int, device: Any
    ) -> None:
        self.tokens = _check_tokens(tokens)
        self.block_size = natural("block_size", block_size, 1)
        self.local_size, self.rank, self.world_size = share(batch_size, rank, world_size)
        self.device = device

    @property
    def batch_size(self) -> int:
        """Pieces in a batch, of all processes together."""
        return self.local_size * self.world_size


class TokenBatches(_Pieces):
    """Random pieces of a text, without end, from a position that can be saved.

    Batch k is a function of the tokens, the seed and k alone: the pieces start at ``batch_size`` independent
    places, drawn from the counter-based generator Philox. Processes that share a batch each take their part of
    it, so their number does not change what is trained on.

    Args:
        tokens: integer array (N,), such as ``TokenData.train``.
        block_size: tokens in a piece.
        batch_size: pieces in a batch, of all processes together.
        seed: non-negative integer.
        rank: number of this process.
        world_size: number of processes, a divisor of ``batch_size``.
        device: where batches go; to a CUDA device without waiting for it.

    Attributes:
        step: batches given out so far; may be set.

    Raises:
        TypeError: tokens that are no integer array of one axis, an argument that is no integer.
        ValueError: an argument out of range, a batch that cannot be shared equally, or fewer than
            ``block_size + 1`` tokens.

    Example:
        >>> batches = TokenBatches(np.arange(100, dtype=np.uint16), block_size=4, batch_size=2, seed=0)
        >>> x, y = next(batches)
        >>> x.shape, x.dtype, bool((y == x + 1).all())
        (torch.Size([2, 4]), torch.int64, True)
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tokens, block_size, batch_size, rank, world_size, device)
        self.seed = natural("seed", seed)
        self.step = 0
        if len(tokens) <= self.block_size:
            raise ValueError(
                f"{len(tokens)} tokens are too few: pieces of block_size {block_size} and the token after each "
                f"need {self.block_size + 1} at least"
            )

    def offsets(self, step: int) -> np.ndarray:
        """Where the pieces of a batch start, those of all processes: int64 array (batch_size,)."""
        raw = np.random.Philox(np.random.SeedSequence([self.seed, natural("step", step)])).random_raw(self.batch_size)
        # The remainder favours low offsets by less than 2**-32 for any corpus below 2**32 tokens.
        return (raw % np.uint64(len(self.tokens) - self.block_size)).astype(np.int64)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of batch number `step`, whatever the current position."""
        first = self.rank * self.local_size
        starts = self.offsets(step)[first : first + self.local_size]
        pieces = np.stack([self.tokens[start : start + self.block_size + 1] for start in starts])
        return _pairs(pieces, self.device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), both int64 of shape (batch_size / world_size, block_size); y is x moved on by one token."""
        pair = self.batch(self.step)
        self.step += 1
        return pair

    def state_dict(self) -> dict[str, int]:
        """Position and everything that decides the batches; plain values, the same in all processes."""
        return {
            "step": self.step,
            "seed": self.seed,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state of `state_dict`, in any number of processes.

        Raises:
            TypeError: a step that is no integer.
            ValueError: keys missing or unknown, or another seed, size or number of tokens than here.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"a state has the keys {sorted(own)}, got {sorted(state)}")
        if differing := [key for key in own if key != "step" and state[key] != own[key]]:
            listed = ", ".join(f"{key} is {own[key]} here and {state[key]} in the state" for key in differing)
            raise ValueError(f"the state is of other batches: {listed}")
        self.step = natural("step", state["step"])


class TokenWindows(_Pieces):
    """A whole split, once: pieces that follow each other without overlap, the short last one too.

    Every token but the first is a target exactly once. The mean loss of a split is therefore the sum of all
    losses, divided by ``targets``:

        total = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in windows)
        loss = total / windows.targets

    With one process nothing is padded: batches have shape (up to batch_size, block_size), and what is left at
    the end comes as a batch (1, rest). With more, each process takes its rows of every batch, and all get batches
    of one shape, as collective forward passes need: rows or places that a process lacks have targets `IGNORE`,
    which torch's cross-entropy leaves out of a sum. The total is then the sum over the processes.

    Args:
        tokens: integer array (N,), N >= 2, such as ``TokenData.val``.
        block_size: tokens in a piece.
        batch_size: pieces in a batch, of all processes together.
        rank: number of this process.
        world_size: number of processes, a divisor of ``batch_size``.
        device: where batches go.

    Attributes:
        targets: targets in the whole split, N - 1.

    Raises:
        TypeError, ValueError: as `TokenBatches`.

    Example:
        >>> windows = TokenWindows(np.arange(8, dtype=np.uint16), block_size=3, batch_size=2)
        >>> for x, y in windows:
        ...     print(x.tolist(), y.tolist())
        [[0, 1, 2], [3, 4, 5]] [[1, 2, 3], [4, 5, 6]]
        [[6]] [[7]]
        >>> windows.targets, len(windows)
        (7, 2)
    """

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tokens, block_size, batch_size, rank, world_size, device)
        self.targets = len(tokens) - 1
        if self.targets < 1:
            raise ValueError(f"at least 2 tokens are needed for one prediction, got {len(tokens)}")

    def __len__(self) -> int:
        """Batches that every process gets."""
        whole, rest = divmod(self.targets, self.block_size)
        return -(-whole // self.batch_size) + (1 if rest else 0)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        whole, rest = divmod(self.targets, self.block_size)
        for first in range(0, whole, self.batch_size):
            yield self._rows(first, min(self.batch_size, whole - first), self.block_size)
        if rest:
            yield self._rows(whole, 1, rest)

    def _rows(self, first: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's rows of a batch of `count` pieces of `length` tokens, from piece number `first` on."""
        each = -(-count // self.world_size)
        mine = range(self.rank * each, min((self.rank + 1) * each, count))
        starts = [(first + row) * self.block_size for row in mine]
        pieces = np.zeros((each, length + 1), dtype=self.tokens.dtype)
        for row, start in enumerate(starts):
            pieces[row] = self.tokens[start : start + length + 1]
        x, y = _pairs(pieces, self.device)
        y[len(starts) :] = IGNORE
        return x, y


def _pairs(pieces: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64, from pieces (batch, length + 1)."""
    import torch

    whole = torch.from_numpy(pieces.astype(np.int64))
    if torch.device(device).type == "cuda":
        whole = whole.pin_memory()
    whole = whole.to(device, non_blocking=True)
    # Copies, so that neither is a view of the other.
    return whole[:, :-1].clone(), whole[:, 1:].clone()


def _check_tokens(tokens: Any) -> np.ndarray:
    if isinstance(tokens, TokenData):
        raise TypeError("tokens must be one split of the data: pass data.train or data.val")
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"tokens must be an integer array of one axis, got {found}")
    return tokens


def _read_meta(path: Path) -> dict[str, Any]:
    """What ``meta.json`` says, checked; {} where there is none."""
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("version") != META_VERSION:
        found = meta.get("version") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"{path} must be an object of version {META_VERSION}, got {found!r}")
    kinds = {"name": (str,), "tokenizer": (str, type(None)), "end_of_text": (int, type(None)), "vocab_size": (int,)}
    for key, kind in kinds.items():
        if key in meta and not isinstance(meta[key], kind):
            raise ValueError(f"{path}: {key} is {meta[key]!r}")
    for split in SPLITS:
        entry = meta.get(split, {})
        if not isinstance(entry, dict) or not isinstance(entry.get("tokens", 0), int):
            raise ValueError(f"{path}: {split} must tell the number of tokens and their sha256 sum, got {entry!r}")
    return meta


def token_vocabulary(folder: str | os.PathLike[str]) -> int:
    """Size of the vocabulary of a folder of token files, as `open_tokens` finds it, which reads none of them here.

    Raises:
        ValueError: as `open_tokens`, of ``meta.json`` and ``meta.pkl``.
    """
    place = Path(folder).expanduser()
    return _vocabulary(place, _read_meta(place / META), None)


def _vocabulary(folder: Path, meta: dict[str, Any], given: int | None) -> int:
    stated = meta.get("vocab_size")
    if given is not None:
        size = natural("vocab_size", given, 1)
        if stated is not None and stated != size:
            raise ValueError(f"vocab_size {size} was given, {folder / META} says {stated}")
    elif stated is not None:
        size = natural(f"vocab_size in {folder / META}", stated, 1)
    elif (folder / "meta.pkl").exists():
        raise ValueError(
            f"{folder / 'meta.pkl'} tells the vocabulary, but pickles can run code and are not read: pass vocab_size"
        )
    else:
        size = GPT2_VOCABULARY
    if size > 2**16:
        raise ValueError(f"vocab_size must be at most 65536 for tokens of 16 bits, got {size}")
    return size


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `structlin prepare` makes it, and so do the scripts of nanoGPT")
    size = path.stat().st_size
    if size % DTYPE.itemsize:
        raise ValueError(f"{path} has {size} bytes, which is odd; tokens have 2 bytes each: it is truncated")
    if size == 0:
        raise ValueError(f"{path} is empty")
    return np.memmap(path, dtype=DTYPE, mode="r")


def _verified(folder: Path, maps: dict[str, np.ndarray], vocabulary: int) -> dict[str, str]:
    """The sums of both splits, from an earlier call where it took long and nothing changed."""
    files = {split: folder / f"{split}.bin" for split in SPLITS}
    known = _cache.cache_file("tokens", ".json", files.values(), META_VERSION, vocabulary)
    if known.exists():
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(known.read_text(encoding="utf-8"))
            return {split: str(found[split]) for split in SPLITS}
    start = time.monotonic()
    sums = {split: _scan(files[split], maps[split], vocabulary) for split in SPLITS}
    if time.monotonic() - start > _cache.SLOW_SECONDS:
        _cache.keep(known, lambda file: file.write(json.dumps(sums).encode()))
    return sums


def _scan(path: Path, tokens: np.ndarray, vocabulary: int) -> str:
    """The sha256 sum of the tokens; ValueError where one is outside the vocabulary."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _CHUNK):
        chunk = np.ascontiguousarray(tokens[start : start + _CHUNK])
        if int(chunk.max()) >= vocabulary:
            wrong = int(np.argmax(chunk >= vocabulary))
            raise ValueError(
                f"{path}: token {start + wrong} is {chunk[wrong]}, outside the vocabulary of {vocabulary} "
                "(another vocabulary is told by vocab_size or meta.json)"
            )
        digest.update(chunk)
    return digest.hexdigest()
