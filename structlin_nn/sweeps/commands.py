"""The runs of a sweep as commands, for a cluster."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from structlin_nn.recipes import recipe
from structlin_nn.sweeps.local import Job

__all__ = ["command", "words"]


def words(job: Job, launcher: Sequence[str] = (), program: Sequence[str] = ("structlin",)) -> list[str]:
    """Return the words of the command that makes a run, or resumes it, after those of `launcher` and `program`."""
    config = job.config
    usual, values = recipe(config.model, structure=config.structure), config.to_dict()
    found = [*launcher, *program, "train", "imagenet" if config.task == "imagenet" else config.model]
    if config.model.startswith("timm:"):
        found += ["--model", config.model]
    if config.structure != "dense":
        found += ["--structure", config.structure]
    if hasattr(config, "data_set"):
        found += ["--data-set", config.data_set]
    for name in config.differences(usual):
        if name not in ("structure", "data_set"):
            found += _option(name, values[name])
    default = type(job.options)()
    for entry in fields(job.options):
        value = getattr(job.options, entry.name)
        if value != getattr(default, entry.name) and entry.name not in ("out", "resume", "quiet"):
            found += _option(entry.name, [str(v) for v in value] if isinstance(value, tuple) else value)
    return [*found, "--out", str(job.folder), "--resume", "--quiet"]


def _option(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool) and name not in ("rms_cap", "compile"):  # which can be None
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def command(job: Job, launcher: Sequence[str] = ()) -> str:
    """`words` as a command for a shell."""
    return shlex.join(words(job, launcher))
