"""Submission of the runs of a sweep to a cluster by submitit (https://github.com/facebookincubator/submitit).

submitit writes the batch scripts, submits them as one array, and restarts jobs after a time limit or preemption. It
runs the commands of `structlin_nn.sweeps.commands`. Needs the extra ``cluster``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from structlin_nn.sweeps.commands import words
from structlin_nn.sweeps.local import Job

__all__ = ["CLUSTERS", "Command", "failures", "submit"]

CLUSTERS = ("slurm", "local")
"""``local`` runs processes of this machine, as a trial."""


class Command:
    """A command for submitit; calling it raises RuntimeError if the command fails.

    submitit calls `checkpoint` before the time limit: the command writes its checkpoint, ends, and is submitted again.

    Examples
    --------
    >>> Command(["true"])()
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"words": self.words, "_process": None}

    def __call__(self) -> None:
        """Run the command in a process group of its own; raise if it fails."""
        # Its own process group: schedulers signal whole groups, and the command does not handle submitit's signal.
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
        return DelayedSubmission(Command(self.words))

    def _end(self) -> None:
        """Let the command write a checkpoint and end, and wait for it."""
        if self._process is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                # The signal may interrupt `Popen.wait`, which is not reentrant.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def submit(
    name: str, jobs: Mapping[str, Job], logs: Path, *, cluster: str = "slurm", workers: int,
    launcher: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Submit runs, `workers` of them at a time, and return submitit's jobs by name; outside Slurm, wait for each batch.

    `logs` is the folder of scripts and output, `launcher` the words before each command, and `parameters` are those of
    submitit's ``AutoExecutor.update_parameters``, such as ``timeout_min`` or ``slurm_partition``.

    Raises
    ------
    ImportError
        Submitit is not installed.
    ValueError
        No runs, an unknown cluster or parameter, or no such scheduler on this machine.
    """
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {', '.join(CLUSTERS)}, got {cluster!r}")
    if not jobs:
        raise ValueError("there are no runs to submit")
    try:
        import submitit
    except ImportError as error:
        raise ImportError(f"submitting runs needs submitit: pip install 'structlin[cluster]' ({error})") from error
    settings: dict[str, Any] = {"name": re.sub(r"[^\w.+-]+", "_", name)}  # quotes do not hold a line break in #SBATCH
    if cluster == "slurm":
        settings["slurm_array_parallelism"] = workers
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{**settings, **(parameters or {})})
    except (AssertionError, NameError, RuntimeError, TypeError) as error:
        raise ValueError(f"submitit: {' '.join(str(error).split())}") from error
    program = (sys.executable, "-m", "structlin_nn.cli")
    commands = {run: Command(words(job, launcher, program)) for run, job in jobs.items()}
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
