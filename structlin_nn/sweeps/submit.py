"""The runs of a sweep given to a cluster by submitit (https://github.com/facebookincubator/submitit).

submitit writes the batch scripts, submits them as one array, and starts again what the time limit of the cluster or
another job ended. What it runs is the command that `structlin_nn.sweeps.commands` prints. Needs the extra ``cluster``.
"""

from __future__ import annotations

import os
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
"""``local`` is for trying: processes of this machine."""


class Command:
    """A command as submitit runs it; RuntimeError (when called) where it ends with an error.

    Called before the time is up, `checkpoint` has the command write its checkpoint and end, and asks for it to be
    started again.

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
        # A group of its own: schedulers signal whole groups, and the command does not know the signal of submitit.
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
        """Return what submitit calls before the time is up: the same command once more."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(Command(self.words))

    def _end(self) -> None:
        """Have the command write a checkpoint and end, and wait for it."""
        if self._process is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                # `Popen.wait` may be what was interrupted, and cannot be called a second time.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def submit(
    name: str, jobs: Mapping[str, Job], logs: Path, *, cluster: str = "slurm", workers: int,
    launcher: Sequence[str] = (), parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Submit runs, `workers` of them at a time; submitit's job of each. Outside Slurm, all before are waited for.

    `logs` is the folder of submitit's scripts and the output of the runs, `launcher` what the commands are started by,
    and `parameters` are those of submitit's ``AutoExecutor.update_parameters``, such as ``timeout_min`` or
    ``slurm_partition``.

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
    settings = {"name": name, "slurm_array_parallelism": workers} if cluster == "slurm" else {"name": name}
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
    """Wait for the jobs of `submit`, and tell why those that failed did, and where the command says more, by name."""
    errors = {run: job.exception() for run, job in submitted.items()}
    found = {}
    for run, error in errors.items():
        if error is not None:
            prefix = f"{RuntimeError.__name__}: "
            told = [line.removeprefix(prefix) for line in str(error).splitlines() if line.startswith(prefix)]
            found[run] = f"{(told or [str(error)])[-1]} (its output: {submitted[run].paths.stderr})"
    return found
