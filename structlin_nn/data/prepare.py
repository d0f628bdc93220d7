"""Texts and OpenWebText as token files, for ``structlin prepare``.

Files are written as a whole or not at all, and the same call resumes an interrupted preparation.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from structlin_nn._files import atomic_write, cores
from structlin_nn.data._splits import load_hub
from structlin_nn.data.tokenizers import Tokenizer, load_tokenizer
from structlin_nn.data.tokens import DTYPE, META, META_VERSION, SPLITS, TokenData, natural, open_tokens

__all__ = ["OPENWEBTEXT", "prepare_openwebtext", "prepare_text", "pydoc_documents"]

OPENWEBTEXT = "Skylion007/openwebtext"
ROWS = 50_000
"""Documents that are tokenised together; an interruption loses at most as many."""
BEGUN = ".prepare.json"


def pydoc_documents() -> dict[str, str]:
    """Return the topics of Python's own documentation (`pydoc_data.topics`), by name: about half a megabyte of English.

    Licence: that of Python, https://docs.python.org/3/license.html. The text differs between versions of Python.

    Examples
    --------
    >>> len(pydoc_documents()) > 50
    True
    """
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def prepare_text(
    files: Sequence[str | os.PathLike[str]] | None, out: str | os.PathLike[str], *, tokenizer: str = "gpt2",
    vocabulary: str | os.PathLike[str] | None = None, val_fraction: float = 0.1, name: str | None = None,
    workers: int | None = None,
) -> TokenData:  # fmt: skip
    """Write the tokens of texts to a folder, as `structlin_nn.data.tokens.open_tokens` reads them.

    Parameters
    ----------
    files
        UTF-8 text files, each a document, in this order; None: `pydoc_documents`.
    out
        Folder to write. If the same call has finished before, it is only opened.
    tokenizer, vocabulary
        As `structlin_nn.data.tokenizers.load_tokenizer`, with its errors.
    val_fraction
        Share of each document, by bytes, that goes to the validation split: its end, from the start of a line where
        there is one near. Above 0 and below 1.
    name
        Name of the corpus; by default that of the folder.
    workers
        Threads; None: one for each core.

    Raises
    ------
    FileNotFoundError, FileExistsError, ValueError
        A file is missing; the folder holds something else; a file that is empty or not UTF-8 (the message names the
        byte), or a text too short for two splits.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = prepare_text(None, f"{folder}/pydoc", tokenizer="bytes", workers=1)
    >>> data.vocab_size, len(data.train) > 8 * len(data.val) > 0
    (257, True)
    """
    _check_fraction(val_fraction)
    if files is not None and not files:
        raise ValueError("at least one text file is needed")
    coder = load_tokenizer(tokenizer, vocabulary)
    target = Path(out).expanduser()
    documents: list[tuple[str, Callable[[], bytes]]]
    if files is None:
        documents = [(title, text.encode) for title, text in pydoc_documents().items()]
    else:
        documents = [(str(path), path.read_bytes) for path in (Path(file).expanduser() for file in files)]
        for path, _ in documents:
            if Path(path).is_dir():
                raise ValueError(f"{path} is a folder; name its files")
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path} does not exist")
    sums = [hashlib.sha256(read()).hexdigest() for _, read in documents]
    job = {"kind": "text", "tokenizer": coder.name, "val_fraction": val_fraction, "documents": sums}

    def encode(document: tuple[str, Callable[[], bytes]]) -> list[tuple[str, np.ndarray]]:
        title, read = document
        if not (raw := read()):
            raise ValueError(f"{title} is empty")
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{title} is not UTF-8 at byte {error.start}") from error
        cut = _cut(raw, round((1 - val_fraction) * len(raw)))
        return [
            (split, np.array([*coder.encode(part.decode()), coder.end_of_text], DTYPE))
            for split, part in zip(SPLITS, (raw[:cut], raw[cut:]), strict=True)
            if part
        ]

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        # tiktoken and tokenizers release Python's global lock.
        with ThreadPoolExecutor(_cores(workers)) as pool:
            for found in pool.map(encode, documents):
                yield from found

    title = name or (f"pydoc-{platform.python_version()}" if files is None else target.resolve().name)
    return _write(target, job, title, coder, parts)


def prepare_openwebtext(
    out: str | os.PathLike[str], *, dataset: str | os.PathLike[str] = OPENWEBTEXT, split: str = "train",
    column: str = "text", tokenizer: str = "gpt2", vocabulary: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.0005, seed: int = 2357, name: str | None = None, workers: int | None = None,
) -> TokenData:  # fmt: skip
    """Write the tokens of a data set of documents to a folder, by the steps of nanoGPT's ``prepare.py``.

    Hugging Face `datasets` downloads, splits and tokenises, and keeps each `ROWS` tokenised documents in its cache: an
    interrupted call is resumed there. With the defaults the splits are those of nanoGPT. About 9 billion tokens, 18 GB,
    and 54 GB in the cache of `datasets` (Gokaslan and Cohen, OpenWebText Corpus, 2019).

    Parameters
    ----------
    out, tokenizer, vocabulary, name
        As in `prepare_text`, with its errors.
    dataset, split
        A name on the hub, a folder of files, or one that ``save_to_disk`` wrote; and the name of a split.
        FileNotFoundError: nothing there, or no network to look.
    column
        Name of the column of the text.
    val_fraction, seed
        Share of the documents that makes the validation split, and seed of that choice.
    workers
        Processes; None: one for each core.
    """
    _check_fraction(val_fraction)
    natural("seed", seed)
    coder = load_tokenizer(tokenizer, vocabulary)
    place, processes = os.fspath(dataset), _cores(workers)
    rows = load_hub(place, split=split, workers=processes)
    if column not in rows.column_names:
        raise ValueError(f"{place} has the columns {', '.join(rows.column_names)}, not {column!r}")
    title = Path(place).name if Path(place).exists() else place
    job = {
        "kind": "documents", "dataset": [title, split, column, len(rows)], "tokenizer": coder.name,
        "val_fraction": val_fraction, "seed": seed,
    }  # fmt: skip

    def parts() -> Iterator[tuple[str, np.ndarray]]:
        import datasets

        try:
            chosen = rows.select_columns([column]).train_test_split(test_size=val_fraction, seed=seed, shuffle=True)
        except ValueError as error:
            raise ValueError(f"{len(rows)} documents are too few for val_fraction {val_fraction} ({error})") from error
        features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))})
        # Processes get these arguments, from which `datasets` computes its hash.
        how = {"column": column, "tokenizer": tokenizer, "vocabulary": vocabulary}
        for split, whole in (("train", chosen["train"]), ("val", chosen["test"])):
            pieces = math.ceil(len(whole) / ROWS)
            for number in range(pieces):
                piece = whole.shard(num_shards=pieces, index=number, contiguous=True)
                done = piece.map(
                    _encode, fn_kwargs=how, batched=True, remove_columns=[column], features=features,
                    num_proc=processes if processes > 1 else None, desc=f"{split} {number + 1} of {pieces}",
                )  # fmt: skip
                for table in done.with_format("arrow").iter(batch_size=1000):
                    yield split, table.column("ids").combine_chunks().flatten().to_numpy()

    return _write(Path(out).expanduser(), job, name or title, coder, parts)


_tokenizer = functools.cache(load_tokenizer)


def _encode(rows: dict[str, list[Any]], column: str, tokenizer: str, vocabulary: Any) -> dict[str, list[np.ndarray]]:
    """Tokenise documents."""
    coder = _tokenizer(tokenizer, vocabulary)
    if wrong := [text for text in rows[column] if not isinstance(text, str)]:
        raise ValueError(f"the column {column!r} holds {wrong[0]!r}, which is not text")
    return {"ids": [np.array([*coder.encode(text), coder.end_of_text], np.uint16) for text in rows[column]]}


def _write(
    out: Path, job: dict[str, Any], name: str, coder: Tokenizer, parts: Callable[[], Iterable[tuple[str, np.ndarray]]]
) -> TokenData:
    """Write parts of splits, in their order, to the token files of a folder, and describe them in meta.json."""
    begun, meta, files = out / BEGUN, out / META, {split: out / f"{split}.bin" for split in SPLITS}
    if meta.exists() and json.loads(meta.read_text(encoding="utf-8")).get("job") == job:
        return open_tokens(out)
    if meta.exists() or (any(path.exists() for path in files.values()) and not begun.exists()):
        raise FileExistsError(f"{out} holds other tokens, or those of other settings: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    begun.touch()
    digests = {split: hashlib.sha256() for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        opened = {split: stack.enter_context(atomic_write(path)) for split, path in files.items()}
        for split, tokens in parts():
            raw = tokens.astype(DTYPE).tobytes()
            opened[split].write(raw)
            digests[split].update(raw)
            counts[split] += len(tokens)
        if empty := [split for split in SPLITS if not counts[split]]:
            raise ValueError(f"the {empty[0]} split would be empty; use more text or another val_fraction")
    stated = {split: {"tokens": counts[split], "sha256": digests[split].hexdigest()} for split in SPLITS}
    about = {"name": name, "tokenizer": coder.name, "vocab_size": coder.vocab_size, "end_of_text": coder.end_of_text}
    with atomic_write(meta) as file:
        file.write(json.dumps({"version": META_VERSION, **about, **stated, "job": job}, indent=2).encode())
    begun.unlink()
    return open_tokens(out)


def _cut(raw: bytes, place: int) -> int:
    """Return the start of a line shortly before `place`, or else of the character that is there."""
    # The window is small, so that the shares hardly change.
    window = min(2**12, place // 8, (len(raw) - place) // 8)
    line = raw.rfind(b"\n", place - window, place)
    if line >= 0:
        return line + 1
    return place + next((n for n, byte in enumerate(raw[place : place + 4]) if byte & 0xC0 != 0x80), 0)


def _check_fraction(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1, got {value}")


def _cores(workers: int | None) -> int:
    return cores() if workers is None else natural("workers", workers, 1)
