"""The runs of a sweep as commands, for a cluster. Imports neither torch nor jax."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from structlin_nn.sweeps.local import Job
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import recipe

__all__ = ["command", "settings", "slurm_script"]


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


def command(job: Job, launcher: Sequence[str] = ()) -> str:
    """The shell command that makes a run, or goes on with it.

    Args:
        job: the run.
        launcher: what the command is started by, such as ``torchrun --nproc-per-node 8 --no-python``.
    """
    config = job.config
    timm = config.model.startswith("timm:")
    words = [*launcher, "structlin", "train", "imagenet" if timm else config.model]
    words += ["--model", config.model] if timm else []
    for setting in settings(config):
        words += ["--set", setting]
    if (root := job.data.get("data_root")) is not None:
        words += ["--data", str(root)]
    if not job.data.get("verify", True):
        words.append("--unverified")
    for name in ("format", "on_broken"):
        if job.data.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(job.data[name])]
    words += ["--out", str(job.folder), "--resume", "--quiet"]
    return shlex.join(words)


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
