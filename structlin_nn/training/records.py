"""Run records: JSON lines, one header and then one line for each evaluation.

The header has ``kind`` "header" and holds

- ``schema``: version of this format, 1; ``started``: time in UTC; ``config``: the `TrainConfig`; ``seed``;
- ``data``: name, numbers of images and classes, and a sha256 sum of the arrays;
- ``structures``: for each linear layer its name, sizes, structure, parameters and MACs of one application,
  and for each factor its shape, fans, initial deviation and learning-rate multiplier;
- ``counts``: ``params``, ``trainable_params``, ``forward_macs`` and ``training_macs`` (forward and backward pass) of
  one image, ``other_flops`` (FLOPs of structures that are no products), and ``steps``, ``samples`` and
  ``total_training_macs`` of the whole run;
- ``versions`` of Python and the libraries; ``hardware``.

A line of an evaluation has ``kind`` "evaluation" and holds ``step``, ``epoch``, ``samples`` seen,
``training_macs`` spent so far, ``lr`` (of the last step, at multiplier 1), and

- ``train_loss``, ``train_error``: on the first 10,000 training images (all, where there are fewer), without
  augmentation, mixup and label smoothing;
- ``test_loss``, ``test_error``: the same on the test images;
- ``batch_loss``, ``batch_error``: mean over the training steps since the last evaluation, on augmented and
  mixed batches with smoothed labels, as they were trained on (null at step 0). A mixed image has two labels;
  of each batch the label that more predictions agree with counts. That is the training error of the paper;
- ``seconds`` of training and evaluation so far, without the time between an interruption and its resumption.

Losses are mean cross-entropies in nats, errors shares from 0 to 1. MACs are multiply-accumulates. Times and
machine names aside, a run that was interrupted and resumed on the CPU writes what one without interruption writes.
No line holds a path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structlin_nn.training.files import atomic_write

__all__ = ["SCHEMA", "Record", "RecordWriter", "read_record"]

SCHEMA = 1
EVALUATION_KEYS = (
    "step", "epoch", "samples", "training_macs", "lr", "train_loss", "train_error", "test_loss", "test_error",
    "batch_loss", "batch_error", "seconds",
)  # fmt: skip
HEADER_KEYS = (
    "schema",
    "started",
    "config",
    "seed",
    "data",
    "structures",
    "counts",
    "versions",
    "hardware",
)


@dataclass(frozen=True)
class Record:
    """A run record that was read: its header and its evaluations, in the order of the steps.

    Attributes:
        header: see the module's description.
        evaluations: one dictionary for each line.
    """

    header: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...]

    @property
    def finished(self) -> bool:
        """Whether the last evaluation is that of the run's last step."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.header["counts"]["steps"]


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a run record and check that it is whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no record, one of another schema, or a line that is damaged or cut off (the message names
            file and line; resuming the run repairs a last line that was cut off).
    """
    path = Path(path)
    raw = path.read_bytes()
    lines = [_parse(path, number, line) for number, line in enumerate(raw.split(b"\n")[:-1], start=1)]
    if raw and not raw.endswith(b"\n"):
        raise ValueError(f"{path}, line {len(lines) + 1} is cut off; `--resume` of the run repairs it")
    if not lines:
        raise ValueError(f"{path} is empty, a run record starts with a header")
    header, *evaluations = lines
    if header.get("kind") != "header" or header.get("schema") != SCHEMA:
        raise ValueError(
            f"{path}, line 1 must be a header of schema {SCHEMA}, "
            f"got kind {header.get('kind')!r} and schema {header.get('schema')!r}"
        )
    if missing := [key for key in HEADER_KEYS if key not in header]:
        raise ValueError(f"{path}, line 1 lacks {', '.join(missing)}")
    for number, line in enumerate(evaluations, start=2):
        if line.get("kind") != "evaluation" or (missing := [key for key in EVALUATION_KEYS if key not in line]):
            lacking = f"lacks {', '.join(missing)}" if line.get("kind") == "evaluation" else f"is {line.get('kind')!r}"
            raise ValueError(f"{path}, line {number} must be an evaluation, it {lacking}")
    steps = [line["step"] for line in evaluations]
    if steps != sorted(set(steps)):
        raise ValueError(f"{path}: the steps of the evaluations must rise, got {steps}")
    return Record(header, tuple(evaluations))


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, got {line[:40]!r}")
    return value


class RecordWriter:
    """Appends evaluations to a run record; each is on the disk before the call returns.

    Use `create` for a new run and `reopen` for one that is resumed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> RecordWriter:
        """Start a record with its header, which is written as a whole or not at all.

        Raises:
            OSError: the file cannot be written.
            ValueError: the header holds a NaN or an infinity.
        """
        line = _line({"kind": "header", "schema": SCHEMA, **header})
        with atomic_write(path) as file:
            file.write(line)
        return cls(path, len(line))

    @classmethod
    def reopen(cls, path: Path, size: int) -> tuple[RecordWriter, list[str]]:
        """Go back to the first `size` bytes of a record, which is what it held when a checkpoint was written.

        Lines after that belong to steps that are done again, and the last may have been cut off by a kill.

        Returns:
            (writer, messages): what was dropped, one message for each kind of line; none where nothing was.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is shorter, or has no end of a line at that place: it is not the checkpoint's.
        """
        raw = path.read_bytes()
        if len(raw) < size or raw[size - 1 : size] != b"\n":
            raise ValueError(
                f"{path} has {len(raw)} bytes and does not belong to the checkpoint, which was written with the "
                f"end of a line at byte {size}"
            )
        whole, _, torn = raw[size:].rpartition(b"\n")
        messages = []
        if torn:
            messages.append(f"dropped the last line of {path}, which was cut off after {len(torn)} bytes")
        if whole:
            count = whole.count(b"\n") + 1
            messages.append(f"dropped {count} line(s) of {path} after the checkpoint, which are computed again")
        if len(raw) > size:
            with path.open("r+b") as file:
                file.truncate(size)
                file.flush()
                os.fsync(file.fileno())
        return cls(path, size), messages

    def append(self, evaluation: Mapping[str, Any]) -> None:
        """Add the line of an evaluation.

        Raises:
            OSError: the disk is full; the line may be there in part then, which resuming repairs.
            ValueError: a NaN or an infinity.
        """
        line = _line({"kind": "evaluation", **evaluation})
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
            os.fsync(file.fileno())
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes could be appended to {self.path}")
        self.size += len(line)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"
