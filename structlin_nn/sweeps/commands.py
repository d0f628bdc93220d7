"""The runs of a sweep as commands, for a cluster. Imports neither torch nor jax."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from structlin_nn.sweeps.local import Job
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import recipe

__all__ = ["command", "settings", "slurm_script", "words"]


def settings(config: RunConfig) -> list[str]:
    """KEY=VALUE for every field in which a configuration differs from the recipe of its model and structure.

    >>> from structlin_nn.training.config import recipe
    >>> settings(recipe("cifar-mlp", width=128, structure="monarch", options={"blocks": 16}))
    ['structure=monarch', 'width=128', 'options={"blocks": 16}']
    """
    usual = recipe(config.model, structure=config.structure)
    changed = [name for name in config.differences(usual) if name != "structure"]
    values = config.to_dict()
    named = [] if config.structure == "dense" else [f"structure={config.structure}"]
    return named + [f"{n}={v if isinstance(v := values[n], str) else json.dumps(v)}" for n in changed]


def words(job: Job, launcher: Sequence[str] = (), program: Sequence[str] = ("structlin",)) -> list[str]:
    """The words of the command that makes a run, or goes on with it.

    Args:
        job: the run.
        launcher: what the command is started by, such as ``torchrun --nproc-per-node 8 --no-python``.
        program: what `structlin` is called by.
    """
    config = job.config
    timm = config.model.startswith("timm:")
    found = [*launcher, *program, "train", "imagenet" if timm else config.model]
    found += ["--model", config.model] if timm else []
    for setting in settings(config):
        found += ["--set", setting]
    if (root := job.data.get("data_root")) is not None:
        found += ["--data", str(root)]
    if not job.data.get("verify", True):
        found.append("--unverified")
    for name in ("format", "on_broken"):
        if job.data.get(name) is not None:
            found += [f"--{name.replace('_', '-')}", str(job.data[name])]
    return [*found, "--out", str(job.folder), "--resume", "--quiet"]


def command(job: Job, launcher: Sequence[str] = ()) -> str:
    """`words` as a command for a shell."""
    return shlex.join(words(job, launcher))


def slurm_script(name: str, jobs: Mapping[str, Job], *, workers: int, launcher: Sequence[str] = ()) -> str:
    """An array script for ``sbatch``: one task for each run, `workers` of them at a time.

    A task that is told to end writes a checkpoint, and goes on from it when it is started again. Options of the
    cluster (partition, GPUs, time) are given to ``sbatch``.

    Raises:
        ValueError: no runs.
    """
    if not jobs:
        raise ValueError("there are no runs for the script")
    lines = "\n".join(f"  {shlex.quote(command(job, launcher))}  # {run}" for run, job in jobs.items())
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{len(jobs) - 1}%{workers}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
commands=(
{lines}
)
eval "exec ${{commands[$SLURM_ARRAY_TASK_ID]}}"
"""
