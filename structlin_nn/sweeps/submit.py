"""The runs of a sweep as commands for a cluster, and their submission by submitit.

submitit (https://github.com/facebookincubator/submitit, extra ``cluster``) writes the batch scripts, submits them as
one array, and restarts jobs after a time limit or preemption.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import filelock

from structlin_nn._on_import import needed
from structlin_nn.recipes import recipe
from structlin_nn.records import FAILED
from structlin_nn.sweeps.local import Job, note_failure

__all__ = ["CLUSTERS", "Command", "command", "failures", "submit", "words"]

CLUSTERS = ("slurm", "local")
"""``local`` runs processes on this machine, as a trial."""


def words(job: Job, launcher: Sequence[str] = (), program: Sequence[str] = ("structlin",)) -> list[str]:
    """Return the words of the command that trains or resumes a run, after those of `launcher` and `program`."""
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
    if isinstance(value, bool) and name not in ("rms_cap", "compile"):  # these two can be None, and are no flags
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def command(job: Job, launcher: Sequence[str] = ()) -> str:
    """`words` as a command for a shell."""
    return shlex.join(words(job, launcher))


class Command:
    """A command for submitit; calling it raises RuntimeError if the command fails.

    submitit calls `checkpoint` before the time limit: the command writes its checkpoint, ends, and is submitted again.
    A command that fails without having been asked to end is a failed run of `folder`, if no other process trains there.

    Examples
    --------
    >>> Command(["true"])()
    """

    def __init__(self, words: Sequence[str], folder: Path | None = None) -> None:
        self.words, self.folder = tuple(words), folder
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    def __call__(self) -> None:
        """Run the command in a process group of its own; raise if it fails."""
        if self.folder is None:
            return self._run()
        (self.folder / FAILED).unlink(missing_ok=True)
        try:
            self._run()
        except (OSError, RuntimeError) as error:
            if not self._asked:
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(filelock.Timeout), filelock.FileLock(self.folder / ".lock", timeout=0):
                    note_failure(self.folder, error)
            raise

    def _run(self) -> None:
        self._asked = False
        # Schedulers signal whole process groups, and the command does not handle submitit's signal.
        with subprocess.Popen(self.words, start_new_session=True) as self._process:
            before = signal.signal(signal.SIGTERM, lambda *_: self._end())
            try:
                code = self._process.wait()
            finally:
                signal.signal(signal.SIGTERM, before)
                if self._process.poll() is None:
                    self._end()
        if code:
            raise RuntimeError(f"the command ended with {code}: {' '.join(self.words)}")

    def checkpoint(self) -> Any:
        """End the command, and return its resubmission."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(Command(self.words, self.folder))

    def _end(self) -> None:
        """Let the command write a checkpoint and end, and wait for it."""
        self._asked = True
        if self._process is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                # The signal may interrupt `Popen.wait`, which is not reentrant.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def submit(
    name: str, jobs: Mapping[str, Job], logs: Path, *, cluster: str = "slurm", workers: int,
    launcher: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Submit runs, `workers` of them at a time, and return submitit's jobs by name; without Slurm, wait for each batch.

    `logs` is the folder of scripts and output, and `launcher` are the words before each command. `parameters` are those
    of submitit's ``AutoExecutor.update_parameters``, such as ``timeout_min`` or ``slurm_partition``.
    """
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {', '.join(CLUSTERS)}, got {cluster!r}")
    if not jobs:
        raise ValueError("there are no runs to submit; give one or more jobs")
    submitit = needed("submitit", "submitting runs needs submitit", "cluster")
    settings: dict[str, Any] = {"name": re.sub(r"[^\w.+-]+", "_", name)}  # quotes do not hold a line break in #SBATCH
    if cluster == "slurm":
        settings["slurm_array_parallelism"] = workers
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{**settings, **(parameters or {})})
    except (AssertionError, NameError, RuntimeError, TypeError) as error:
        raise ValueError(f"submitit: {' '.join(str(error).split())}") from error
    program = (sys.executable, "-m", "structlin_nn.cli")
    commands = {run: Command(words(job, launcher, program), job.folder) for run, job in jobs.items()}
    size = len(jobs) if cluster == "slurm" else workers
    found: dict[str, Any] = {}
    for first in range(0, len(jobs), size):
        some = list(jobs)[first : first + size]
        with executor.batch():
            found |= {run: executor.submit(commands[run]) for run in some}
        if cluster != "slurm":
            failures({run: found[run] for run in some})
    return found


def failures(submitted: Mapping[str, Any]) -> dict[str, str]:
    """Wait for the jobs of `submit`, and return the reasons of failed ones, with their output files, by name."""
    errors = {run: job.exception() for run, job in submitted.items()}
    found = {}
    for run, error in errors.items():
        if error is not None:
            prefix = f"{RuntimeError.__name__}: "
            told = [line.removeprefix(prefix) for line in str(error).splitlines() if line.startswith(prefix)]
            found[run] = f"{(told or [str(error)])[-1]} (its output: {submitted[run].paths.stderr})"
    return found
