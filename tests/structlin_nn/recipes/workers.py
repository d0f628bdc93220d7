"""Runs in several processes: what the tests of distributed training start.

``python workers.py JOBS.json`` in each process, with the environment of torchrun. Each job is an object with
``recipe``, ``config``, ``options``, and ``stop_after``; the losses of its steps are written to ``FOLDER.json`` by the
first process. With ``full_disk``, a process for which no file can have more than 20,000 bytes after the first step,
every process writes the error that ends the run to ``FOLDER.error-RANK``. With ``signal``, a process that gets SIGTERM
after so many steps, every process writes how the run ended to ``FOLDER.ended-RANK``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 600
"""Seconds after which processes are taken to hang: on a loaded machine two take minutes for the jobs of a test."""


def normalized(width: int, outputs: int) -> Any:
    """A model with batch norm, once of its inputs."""
    from torch import nn

    layers = [nn.BatchNorm1d(3072), nn.Linear(3072, width), nn.BatchNorm1d(width), nn.GELU(), nn.Linear(width, outputs)]
    return nn.Sequential(nn.Flatten(), *layers)


def train(job: dict[str, Any]) -> list[float]:
    """Train as a job says, in whatever processes there are, and return the losses (of the first process)."""
    import torch.distributed as dist

    from structlin_nn.recipes import recipe_module

    rank = dist.get_rank() if dist.is_initialized() else 0
    recipe, folder = recipe_module(job["recipe"]), job["options"]["out"]
    losses: list[float] = []

    def watch(run: Any, loss: float | None) -> bool:
        assert loss is not None
        losses.append(loss)
        if rank == job.get("full_disk"):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if [rank, len(losses)] == job.get("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        return len(losses) == job.get("stop_after")

    options = {**job["options"], "data": Path(job["options"]["data"])}
    try:
        result = recipe.train(
            recipe.Config.from_dict(job["config"]), recipe.Options(quiet=True, **options), watch=watch
        )
    except OSError as error:
        if "full_disk" not in job:
            raise
        Path(f"{folder}.error-{rank}").write_text(str(error))
    else:
        if "signal" in job:
            Path(f"{folder}.ended-{rank}").write_text(f"{result.signal and result.signal.name} {result.step}")
    if "full_disk" in job:
        import resource

        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    if rank == 0:
        Path(f"{folder}.json").write_text(json.dumps(losses))
    return losses


def start(jobs: list[dict[str, Any]], number: int, folder: Path) -> list[list[float]]:
    """Do jobs in a number of new processes, and return the losses of each."""
    started = begin(jobs, number, folder)
    try:
        texts = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n\n".join(texts)
    return [json.loads(Path(f"{job['options']['out']}.json").read_text()) for job in jobs]


def begin(jobs: list[dict[str, Any]], number: int, folder: Path) -> list[subprocess.Popen[str]]:
    """A number of new processes that do jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "jobs.json")],
            env=os.environ
            | common
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(number)
    ]


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
        dist.barrier()
    dist.destroy_process_group()
