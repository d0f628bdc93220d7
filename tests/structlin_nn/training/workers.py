"""Runs in several processes: what the tests of distributed training start.

``python workers.py JOBS.json`` in each process, with the environment of torchrun. Each job is an object with
``config`` and ``task``, ``folder``, ``data`` (arguments of setup), ``parallel``, and ``stop_after``; the losses of its
steps are written to ``FOLDER/losses.json`` by the first process. With ``full_disk``, a process for which no file can
have more than 20,000 bytes after setup, every process writes the error that ends the run to ``FOLDER/error-RANK``.
With ``always``, a checkpoint is written after every step.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


class Losses:
    """A progress that notes the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def start(self, total: int, done: int, label: str) -> None: ...

    def update(self, images: int, loss: float | None) -> None:
        assert loss is not None
        self.values.append(loss)

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


@contextmanager
def full_disk(really: bool) -> Iterator[None]:
    """A context in which writing a larger file fails, or any other context."""
    if not really:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(job: dict[str, Any]) -> list[float]:
    """Train as a job says, in whatever processes there are, and return the losses (of the first process)."""
    from structlin_nn.training.config import config_from_dict
    from structlin_nn.training.distributed import processes
    from structlin_nn.training.loop import fit, setup

    config = config_from_dict(job["task"], job["config"])
    left = job.get("stop_after")

    def stop() -> bool:
        nonlocal left
        left = None if left is None else left - 1
        return left == 0

    losses = Losses()
    with processes(config.device, job.get("parallel", "ddp")) as group:
        run = setup(config, job["folder"], resume=job.get("resume", False), processes=group, **job["data"])
        always = "full_disk" in job or job.get("always", False)
        with full_disk(group.rank == job.get("full_disk")):
            try:
                fit(run, losses, stop=stop, checkpoint_minutes=0 if always else 5)
            except OSError as error:
                if "full_disk" not in job:
                    raise
                failed = str(error)
        if "full_disk" in job:
            (Path(job["folder"]) / f"error-{group.rank}").write_text(failed)
        if group.main:
            (Path(job["folder"]) / "losses.json").write_text(json.dumps(losses.values))
    return losses.values


def start(jobs: list[dict[str, Any]], number: int, folder: Path) -> list[list[float]]:
    """Do jobs in so many new processes, and return the losses of each."""
    started = begin(jobs, number, folder)
    try:
        texts = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n\n".join(texts)
    return [json.loads((Path(job["folder"]) / "losses.json").read_text()) for job in jobs]


def begin(jobs: list[dict[str, Any]], number: int, folder: Path) -> list[subprocess.Popen[str]]:
    """So many new processes that do jobs."""
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
