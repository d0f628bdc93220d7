"""Run records: JSON lines, one header and then one line for each evaluation.

The header has ``kind`` "header" and holds

- ``schema``: version of this format, 4; ``started``: time in UTC; ``task``: the recipe, ``cifar``, ``imagenet`` or
  ``gpt2``; ``config``: its configuration (``Config`` in `structlin_nn.recipes`); ``seed``;
- ``data``: name, sizes, and a sha256 sum of the data;
- ``structures``: for each structured linear layer its name, sizes, structure, parameters and MACs of one application,
  and for each factor its shape, fans, initial deviation and learning-rate multiplier;
- ``counts``: ``params``, ``trainable_params``, ``embedding_params``, ``forward_macs`` and ``training_macs`` (forward
  and backward pass) of one sample (an image, or a sequence of full length), ``other_flops`` and
  ``training_other_flops`` (FLOPs that are no products, such as those of FFTs, of the forward pass and of both passes),
  and ``steps``, ``samples``, ``total_training_macs`` and ``total_training_flops`` of the whole run (records of earlier
  versions lack ``training_other_flops`` and ``total_training_flops``);
- ``versions`` of Python and the libraries; ``hardware``, with the number of processes and how they share the model;
- for a run that started from trained weights, ``init_from``: the name of the ``file``, the ``sha256`` sum of its
  tensors, and how many ``structured_layers`` it has (null where it does not say).

A line of an evaluation has ``kind`` "evaluation" and holds, in all pipelines, ``step``, ``samples`` seen,
``training_macs`` spent so far, ``lr`` (of the last step, at multiplier 1), ``batch_loss`` (mean over the training
steps since the last evaluation, of the loss that was trained on; null at step 0), ``seconds`` of training and
evaluation so far, without the time between an interruption and its resumption, ``training_seconds``, those of the
steps alone, without evaluations and checkpoints (records of earlier versions lack it), and

- ``statistics``: RMS of the last hidden features and of their change in a step, and the gain of each layer
  (`structlin_nn.recipes._torch.Probe`), on the first 1024 training images (``cifar``), the first 64 validation
  images (``imagenet``), or 4 fixed pieces of the training tokens (``gpt2``).

Further, for ``cifar``

- ``epoch``;
- ``train_loss``, ``train_error``: on the first 10,000 training images (all, where there are fewer), without
  augmentation, mixup and label smoothing; ``test_loss``, ``test_error``: the same on the test images;
- ``batch_error``: as ``batch_loss``, on augmented and mixed batches. A mixed image has two labels; of each batch the
  label that more predictions agree with counts. That is the training error of the paper;

for ``imagenet``

- ``epoch``; ``val_loss``, ``val_error`` (top-1) and ``val_top5_error`` on all validation images;

for ``gpt2``

- ``tokens`` seen; ``train_loss`` (on fixed pieces of the training tokens), ``val_loss`` and ``val_perplexity``, which
  is exp(``val_loss``); ``val_tokens``: the number of targets that ``val_loss`` is the mean over.

Where the configuration asks for an average of the weights, evaluations are of that average (``statistics`` are not).

Losses are mean cross-entropies in nats, errors shares from 0 to 1. MACs are multiply-accumulates. Times and
machine names aside, a run that was interrupted and resumed on the CPU writes what one without interruption writes.
No line holds a path. Each line ends with ``crc32``, the checksum of what stands before it. Earlier schemas are read
too: 3 has no checksums, and 2 has ``statistics`` for CIFAR only.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structlin_nn._files import atomic_write

__all__ = ["FAILED", "SCHEMA", "Record", "RecordWriter", "failure_of", "read_record", "sealed", "unsealed"]

SCHEMA = 4
FAILED = "failed.json"
"""Name of the file in the folder of a run of a sweep that ended with an error."""
_SUM = re.compile(rb', "crc32": "([0-9a-f]{8})"}')
COMMON_KEYS = ("step", "samples", "training_macs", "lr", "batch_loss", "seconds", "statistics")
TASK_KEYS = {
    "cifar": ("epoch", "train_loss", "train_error", "test_loss", "test_error", "batch_error"),
    "imagenet": ("epoch", "val_loss", "val_error", "val_top5_error"),
    "gpt2": ("tokens", "train_loss", "val_loss", "val_perplexity", "val_tokens"),
}
HEADER_KEYS = (
    "schema", "started", "task", "config", "seed", "data", "structures", "counts", "versions", "hardware",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A run record: its header and its evaluations, in the order of the steps.

    Attributes
    ----------
    header
        The header, as in the description of the module.
    evaluations
        A dictionary for each line.
    """

    header: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...]

    @property
    def finished(self) -> bool:
        """Whether the last evaluation is that of the run's last step."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.header["counts"]["steps"]


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a run record and check that it is whole.

    Raises
    ------
    ValueError
        Not a record, one of another schema, or a line that is damaged or cut off (the message names file and line;
        resuming the run repairs a last line that was cut off).
    """
    path = Path(path)
    return _record(path, path.read_bytes())


def _record(path: Path, raw: bytes) -> Record:
    """Return the record that `raw` is; `path` is for messages."""
    lines = [unsealed(path, line, number) for number, line in enumerate(raw.split(b"\n")[:-1], start=1)]
    if raw and not raw.endswith(b"\n"):
        raise ValueError(f"{path}, line {len(lines) + 1} is cut off; resuming the run repairs it")
    if not lines:
        raise ValueError(f"{path} is empty, a run record starts with a header")
    header, *evaluations = lines
    schema = header.get("schema")
    if schema == SCHEMA and (
        bare_lines := [n for n, line in enumerate(lines, start=1) if line.pop("crc32", None) is None]
    ):
        raise ValueError(f"{path}, line {bare_lines[0]} is damaged: it has no checksum")
    if header.get("kind") != "header" or schema not in range(2, SCHEMA + 1):
        raise ValueError(
            f"{path}, line 1 must be a header of schema 2 to {SCHEMA}, got kind {header.get('kind')!r} and schema "
            f"{schema!r}"
        )
    header.setdefault("recipe", header.get("task"))
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise ValueError(f"{path}, line 1 lacks {', '.join(missing)}")
    if header["task"] not in TASK_KEYS:
        raise ValueError(f"{path}, line 1: the task must be one of {', '.join(TASK_KEYS)}, got {header['task']!r}")
    bare = schema == 2 and header["task"] != "cifar"
    wanted = [key for key in (*COMMON_KEYS, *TASK_KEYS[header["task"]]) if not (bare and key == "statistics")]
    for number, line in enumerate(evaluations, start=2):
        if line.get("kind") != "evaluation" or (missing := [key for key in wanted if key not in line]):
            lacking = f"lacks {', '.join(missing)}" if line.get("kind") == "evaluation" else f"is {line.get('kind')!r}"
            raise ValueError(f"{path}, line {number} must be an evaluation, it {lacking}")
    steps = [line["step"] for line in evaluations]
    if steps != sorted(set(steps)):
        raise ValueError(f"{path}: the steps of the evaluations must rise, got {steps}")
    return Record(header, tuple(evaluations))


def failure_of(folder: Path) -> str | None:
    """Return the error that a run of a sweep ended with, from its folder; None for a run that did not fail."""
    try:
        text = (folder / FAILED).read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        return str(json.loads(text)["error"])
    except (KeyError, TypeError, ValueError):
        return f"{FAILED} is damaged"


def unsealed(path: Path, line: bytes, number: int = 1) -> dict[str, Any]:
    """Return the value of a line of `sealed`, or of an older one without a checksum; ValueError for damage."""
    line = line.removesuffix(b"\n")
    found = _SUM.search(line)
    if found is not None and (found.end() != len(line) or int(found[1], 16) != zlib.crc32(line[: found.start()])):
        raise ValueError(f"{path}, line {number} is damaged: its checksum is wrong")
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, got {line[:40]!r}")
    if found is None and "crc32" in value:
        raise ValueError(f"{path}, line {number} is damaged: its checksum is damaged")
    return value


class RecordWriter:
    """Appends evaluations to a run record; each is on the disk before the call returns.

    Use `create` for a new run and `reopen` for one that is resumed. Of several processes, the first one writes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> RecordWriter:
        """Start a record with its header, written atomically; make its folder."""
        line = sealed({"kind": "header", "schema": SCHEMA, **header})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(line)
        return cls(path, len(line))

    @classmethod
    def reopen(cls, path: Path, size: int) -> tuple[RecordWriter, list[str]]:
        """Truncate a record to its first `size` bytes, its size at a checkpoint.

        Later lines belong to steps that are repeated, and the last may be incomplete. Returns the writer and messages
        about dropped lines. ValueError for a file that does not belong to the checkpoint, or damage in a line that
        stays.
        """
        raw = path.read_bytes()
        if len(raw) < size or raw[size - 1 : size] != b"\n":
            raise ValueError(
                f"{path} has {len(raw)} bytes and does not belong to the checkpoint, which was written with the "
                f"end of a line at byte {size}"
            )
        _record(path, raw[:size])  # verifies every line that stays
        whole, _, torn = raw[size:].rpartition(b"\n")
        messages = []
        if torn:
            messages.append(f"dropped the last line of {path}, which was cut off after {len(torn)} bytes")
        if whole:
            count = whole.count(b"\n") + 1
            messages.append(f"dropped {count} line(s) of {path} after the checkpoint, which are repeated")
        if len(raw) > size:
            with path.open("r+b") as file:
                file.truncate(size)
                file.flush()
                os.fsync(file.fileno())
        return cls(path, size), messages

    def append(self, evaluation: Mapping[str, Any]) -> None:
        """Add the line of an evaluation. An OSError may leave a part of it, which resuming repairs."""
        line = sealed({"kind": "evaluation", **evaluation})
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
            os.fsync(file.fileno())
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes could be appended to {self.path}")
        self.size += len(line)


def sealed(value: Mapping[str, Any]) -> bytes:
    r"""Return an object as a line of JSON whose last entry, ``crc32``, is the checksum of the rest.

    Examples
    --------
    >>> sealed({"step": 3})
    b'{"step": 3, "crc32": "d3a4e216"}\n'
    """
    text = json.dumps(value, allow_nan=False).encode()[:-1]
    return text + f', "crc32": "{zlib.crc32(text):08x}"}}\n'.encode()
