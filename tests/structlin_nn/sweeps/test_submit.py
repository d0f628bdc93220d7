"""Runs given to submitit: real jobs on this machine, and a Slurm that only notes what it is given."""

import os
import pickle
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from structlin_nn.cli import main
from structlin_nn.recipes.cifar import Config, Options
from structlin_nn.records import failure_of, read_record
from structlin_nn.sweeps.local import Job
from structlin_nn.sweeps.submit import Command, failures, submit

# Notes that it was started; on SIGTERM notes that too, and ends as `structlin train` does; the second time it is done.
CHILD = """
import pathlib, signal, sys, time
notes = pathlib.Path(sys.argv[1])
def end(*_):
    notes.write_text(notes.read_text() + "stopped ")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
again = notes.exists()
notes.write_text((notes.read_text() if again else "") + "started ")
time.sleep(0 if again else 60)
"""

SWEEP = """
from structlin_nn.sweeps import Sweep, grid
SWEEP = Sweep(
    name="mine", about="two widths", model="cifar-mlp",
    base={"data_set": "fashion", "epochs": 1, "batch_size": 5000, "eval_every": 1, "threads": 1},
    overlays=grid(width=[8, 16]),
)
"""


def child(notes: Path) -> Command:
    return Command([sys.executable, "-c", CHILD, str(notes)], notes.parent)


def until(notes: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (notes.exists() and notes.read_text() == text):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def jobs(folder: Path) -> dict[str, Job]:
    return {f"r{seed}": Job(Config(seed=seed), Options(out=folder / f"r{seed}")) for seed in range(3)}


class TestCommand:
    def test_ends_with_the_error_of_the_command(self) -> None:
        Command(["true"])()
        with pytest.raises(RuntimeError, match="the command ended with 7: sh -c exit 7"):
            Command(["sh", "-c", "exit 7"])()

    def test_of_a_run_that_fails(self, tmp_path: Path) -> None:
        """The error is in the folder of the run, unless another process trains there, until the run is begun again."""
        folder = tmp_path / "run"
        with pytest.raises(RuntimeError, match="ended with 7"):
            pickle.loads(pickle.dumps(Command(["sh", "-c", "exit 7"], folder)))()
        assert failure_of(folder) == "RuntimeError: the command ended with 7: sh -c exit 7"
        with FileLock(folder / ".lock"), pytest.raises(RuntimeError, match="ended with 1"):
            Command(["false"], folder)()
        assert failure_of(folder) is None
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            Command(["no-such-program"], folder)()
        assert "no-such-program" in str(failure_of(folder))
        Command(["true"], folder)()
        assert failure_of(folder) is None

    def test_hands_sigterm_on(self, tmp_path: Path) -> None:
        notes, before = tmp_path / "notes", signal.getsignal(signal.SIGTERM)

        def interrupt() -> None:
            until(notes, "started ")
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(RuntimeError, match="ended with 143"):
            child(notes)()
        thread.join()
        assert failure_of(tmp_path) is None
        assert notes.read_text() == "started stopped "
        assert signal.getsignal(signal.SIGTERM) == before

    @pytest.mark.slow
    def test_is_started_again_after_a_time_limit(self, tmp_path: Path) -> None:
        submitit = pytest.importorskip("submitit")
        notes = tmp_path / "notes"
        executor = submitit.LocalExecutor(folder=tmp_path / "logs")
        executor.update_parameters(timeout_min=0.5, signal_delay_s=15)
        assert executor.submit(child(notes)).exception() is None
        assert notes.read_text() == "started stopped started "


class TestSubmit:
    def test_to_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("submitit")
        tools = tmp_path / "bin"
        tools.mkdir()
        for name, text in {"srun": "", "sbatch": f"cp $1 {tmp_path}/script; echo Submitted batch job 12"}.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
        found = submit(
            "mi ne\n$(touch x)", jobs(tmp_path), tmp_path / "logs", workers=2,
            parameters={"timeout_min": 90, "slurm_partition": "gpu"},
        )  # fmt: skip
        assert {run: job.job_id for run, job in found.items()} == {"r0": "12_0", "r1": "12_1", "r2": "12_2"}
        script = (tmp_path / "script").read_text()
        for line in ("array=0-2%2", "partition=gpu", "time=90"):
            assert f"#SBATCH --{line}" in script
        # The name of a sweep is one word, which the shell does not run.
        assert re.findall(r"#SBATCH --job-name=(.*)", script) == ["mi_ne_touch_x_"]
        assert "$(touch" not in script
        assert re.search(r"#SBATCH --signal=\w*@\d+", script)

    def test_mistakes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="cluster must be one of slurm, local, got 'pbs'"):
            submit("x", jobs(tmp_path), tmp_path, cluster="pbs", workers=1)
        with pytest.raises(ValueError, match="no runs"):
            submit("x", {}, tmp_path, workers=1)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "submitit", None)
            with pytest.raises(ImportError, match=r"pip install 'structlin\[cluster\]'"):
                submit("x", jobs(tmp_path), tmp_path, workers=1)
        pytest.importorskip("submitit")
        for parameters in ({"slurm_partitoin": "gpu"}, {"timeout_min": "long"}):
            with pytest.raises(ValueError, match=r"submitit: .*(partitoin|timeout_min)"):
                submit("x", jobs(tmp_path), tmp_path, cluster="local", workers=1, parameters=parameters)
        assert not list(tmp_path.glob("**/record.jsonl"))

    @pytest.mark.slow
    def test_by_the_command_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("submitit")
        monkeypatch.chdir(tmp_path)
        Path("mine.py").write_text(SWEEP)
        Path("runs/mine/w16/checkpoints/000000001").mkdir(parents=True)
        line = "sweep mine.py --submit local --workers 1 --submit-set timeout_min=5 --quiet"
        assert main(line.split()) == 1
        assert "w16: the command ended with 2: " in capfd.readouterr().err
        assert read_record("runs/mine/w8/record.jsonl").finished
        Path("runs/mine/w16/checkpoints/000000001").rmdir()
        assert main(line.split()) == 1
        assert "1 of 2 runs failed: w16; --retry resumes it" in capfd.readouterr().err
        assert main([*line.split()[:-1], "--json", "--retry"]) == 0
        assert read_record("runs/mine/w16/record.jsonl").finished


def test_failures_name_the_error(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="local")
    submitted = {"good": executor.submit(Command(["true"])), "bad": executor.submit(Command(["false"]))}
    (found,) = failures(submitted).items()
    assert found[0] == "bad"
    assert re.fullmatch(rf"the command ended with 1: false \(its output: {tmp_path}/.*\.err\)", found[1])
