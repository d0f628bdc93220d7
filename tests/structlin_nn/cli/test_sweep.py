"""``structlin sweep``: runs are planned, made, skipped, resumed, and given out as commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import structlin_nn
from structlin_nn.cli import main
from structlin_nn.records import read_record
from structlin_nn.sweeps import names

SWEEP = """
from structlin_nn.sweeps import Sweep, grid, merge
SWEEP = Sweep(
    name="mine", about="two structures, two widths", model="cifar-mlp",
    base={"data_set": "cifar10", "epochs": 2, "batch_size": 48, "eval_every": 1, "threads": 1, "mixup": 0.0},
    overlays=merge([{"structure": "dense"}, {"structure": "monarch"}], grid(width=[8, 16])),
)
"""
RUNS = ["dense-w8", "dense-w16", "monarch-w8", "monarch-w16"]


@pytest.fixture
def folder(tmp_path: Path, small_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a sweep, mine.py, and small CIFAR files, cifar-10-batches-bin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("mine.py").write_text(SWEEP)
    Path("cifar-10-batches-bin").symlink_to(small_cifar)
    return tmp_path


LINE = "sweep mine.py --data cifar-10-batches-bin --unverified"


def planned(capsys: pytest.CaptureFixture[str], more: str = "") -> dict[str, str]:
    """The states of the runs."""
    assert main(f"{LINE} --dry-run --json {more}".split()) == 0
    return {row["run"]: row["state"] for row in json.loads(capsys.readouterr().out)}


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == names()
    assert main(["sweep", "--list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == names()


def test_a_plan(folder: Path, cli) -> None:
    table = cli(f"{LINE} --dry-run").out.splitlines()
    assert [line.split()[0] for line in table[2:6]] == RUNS
    assert all(line.split()[1] == "new" and line.split()[4] == "10" for line in table[2:6])
    assert table[-1].startswith("4 runs, ")
    assert table[-1].endswith(table[-1].split("; left: ")[1])
    assert not Path("runs").exists()


def test_runs_are_made_skipped_and_made_again(folder: Path, capsys: pytest.CaptureFixture[str], cli) -> None:
    """Neither a loss that is not finite nor an error, which is repeated when its cause is removed, stops the others."""
    # One in this process first: a run of a sweep is an ordinary run.
    words = shlex.split(cli(f"{LINE} --print-commands --only dense-w8").out)
    assert words[:2] == ["structlin", "train"]
    assert main(words[1:]) == 0
    capsys.readouterr()
    assert planned(capsys) == dict(zip(RUNS, ["finished", "new", "new", "new"], strict=True))
    before = Path("runs/mine/dense-w8/record.jsonl").read_bytes()
    assert main(f"{LINE} --set width=9 --only dense --dry-run".split()) == 0
    assert "has another configuration: lr was 0.003 and is 0.1" in cli(f"{LINE} --set lr=0.1 --dry-run", code=2).err

    Path("mine.py").write_text(SWEEP.replace("grid(", "[{}, {'lr': 1e30}, {'lr': 2e-3}], grid("))
    runs = ["dense-w8", *(f"monarch{lr}-w8" for lr in ("", "-lr1e+30", "-lr0.002"))]
    done, again, diverges, blocked = (Path("runs/mine", name) for name in runs)
    for folder in (again, blocked):
        folder.mkdir(parents=True)
    (again / "failed.json").write_text('{"error": "of a cause that is removed"}\n')
    (blocked / "checkpoints").touch()  # a file where a folder has to be
    chosen = f"--only {done.name} --only monarch*-w8"
    assert planned(capsys, chosen) == dict(zip(runs, ["finished", "failed", "new", "new"], strict=True))
    # Not started again without the option.
    assert cli(f"{LINE} --print-commands --only {done.name} --only {again.name}", code=1) == (
        "",
        f"structlin sweep: 1 of 2 runs failed: {again.name}; --retry resumes it\n",
    )
    assert cli(f"{LINE} --print-commands --only {done.name}") == ("", "structlin sweep: all runs are finished\n")
    err = cli(f"{LINE} --workers 1 {chosen} --retry --quiet", code=1).err
    assert "finite" in err or "the loss is" in err
    assert f"{diverges.name}: " in err
    assert f"{blocked.name}: NotADirectoryError" in err
    assert err.splitlines()[-1] == (
        f"structlin sweep: 2 of 4 runs failed: {diverges.name}, {blocked.name}; --retry resumes them"
    )
    assert planned(capsys, chosen) == dict(zip(runs, ["finished", "finished", "failed", "failed"], strict=True))
    assert (done / "record.jsonl").read_bytes() == before
    record = read_record(again / "record.jsonl")
    assert record.finished
    assert (record.header["config"]["structure"], record.header["config"]["width"]) == ("monarch", 8)
    assert not (again / "failed.json").exists()
    assert json.loads((diverges / "failed.json").read_text())["error"]
    assert "Traceback" in json.loads((blocked / "failed.json").read_text())["traceback"]
    assert "--lr 1e+30" in cli(f"{LINE} --print-commands --retry {chosen}").out


def test_failed_runs_are_named_until_they_are_trained_again(
    folder: Path, capsys: pytest.CaptureFixture[str], cli
) -> None:
    """A later command trains nothing, ends with 1 as well, and prints one JSON document if it is asked for."""
    Path("mine.py").write_text(SWEEP.replace("grid(width=[8, 16])", "grid(lr=[3e-3, 1e30], width=[8])"))
    good, bad = "dense-lr0.003-w8", "dense-lr1e+30-w8"
    line = f"{LINE} --workers 1 --only dense*"
    out, err = cli(line, "--json", code=1)
    first = json.loads(out)
    assert first["finished"] == [good]
    assert [*first["failed"]] == [bad]
    last = f"structlin sweep: 1 of 2 runs failed: {bad}; --retry resumes it"
    assert err.splitlines()[-1] == last
    assert f"structlin sweep: {bad}: {first['failed'][bad]}" in err.splitlines()

    for more in ("", "--quiet", "--print-commands"):
        assert main([*line.split(), *more.split()]) == 1, more
        out, err = capsys.readouterr()
        assert err == f"{last}\n", more
        assert bool(out) == (not more)
        assert more or out.splitlines()[-1].endswith("left: 0 runs, 0 training MACs")
    for more, found in (
        ("", first), ("--print-commands", []), ("--submit local", {"submitted": {}, "failed": first["failed"]})
    ):  # fmt: skip
        assert main([*line.split(), "--json", *more.split()]) == 1, more
        assert json.loads(capsys.readouterr().out) == found, more
    # Commands of other runs are given out, and the failed run is named.
    out, err = cli(f"{LINE} --print-commands --only dense* --only monarch-lr0.003-w8")
    assert (out.count("\n"), err) == (1, last.replace("of 2", "of 3") + "\n")

    out, err = cli(f"{LINE} --only {good}")
    assert out.splitlines()[-1].startswith("1 run, ")
    assert err == ""
    assert json.loads(cli(f"{LINE} --only {good} --json").out) == {"finished": [good], "failed": {}}
    for name, command in ((bad, "--retry --print-commands"), (good, "--dry-run")):
        (row,) = json.loads(cli(f"{LINE} --only {name} --json", *command.split()).out)
        assert row["run"] == name


def test_a_damaged_record_is_a_failed_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{LINE} --workers 1 --only dense-w8 --quiet"
    assert main(line.split()) == 0
    record = Path("runs/mine/dense-w8/record.jsonl")
    raw = bytearray(record.read_bytes())
    raw[raw.index(b'"test_loss": ') + 14] ^= 1
    record.write_bytes(raw)
    with monkeypatch.context() as patch:  # a run that ends without a result
        patch.setattr("structlin_nn.sweeps.local.run_all", lambda *_, **__: SimpleNamespace(failed={}, signal=None))
        assert main(line.split()) == 1
        told = "structlin sweep: neither finished nor failed: dense-w8; the same command resumes it\n"
        assert capsys.readouterr().err == told
    for _ in range(2):
        assert main([*line.split(), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["finished"] == []
        assert found["failed"] == {"dense-w8": f"ValueError: {record}, line 2 is damaged: its checksum is wrong"}
    assert record.read_bytes() == raw


def test_many_failed_runs_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], cli) -> None:
    Path("mine.py").write_text(SWEEP.replace("width=[8, 16]", "width=[8], seed=range(6)"))
    for name in planned(capsys):
        Path("runs/mine", name).mkdir(parents=True)
        Path("runs/mine", name, "failed.json").write_text("{")
    (line,) = cli(LINE, "--quiet", code=1).err.splitlines()
    assert line.startswith("structlin sweep: 12 of 12 runs failed: dense-w8-seed0, dense-w8-seed1, ")
    assert line.endswith(", and 2 more; --retry resumes them")
    assert set(json.loads(cli(LINE, "--json", code=1).out)["failed"].values()) == {"failed.json is damaged"}


def test_the_bar_of_one_run_with_a_large_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is that of a run; its text is short for every loss."""
    from structlin_nn.recipes import cifar
    from structlin_nn.sweeps import local

    told: list[tuple[str, float, str]] = []

    class Recipe:
        @staticmethod
        def train(config: object, options: object, watch: Any) -> SimpleNamespace:
            watch(SimpleNamespace(step=5, steps=10), 1595027409948416078349841989632.0)
            watch(SimpleNamespace(step=10, steps=10), 2.302585)
            return SimpleNamespace(finished=True)

    messages = SimpleNamespace(put=told.append)
    monkeypatch.setattr(local, "_shared", (messages, SimpleNamespace(is_set=lambda: False), 1))
    job = SimpleNamespace(
        config=SimpleNamespace(threads=1), options=cifar.Options(), folder=Path("run"), recipe=Recipe
    )  # fmt: skip
    assert local._train("a", job) is None  # type: ignore[arg-type]
    assert told == [("a", 0.5, "loss 1.595e+30"), ("a", 0.5, "loss 2.303")]

    def bar(total: float, label: str, **_: Any) -> Any:
        raise RuntimeError(label)

    monkeypatch.setattr(local, "progress_bar", bar)
    with pytest.raises(RuntimeError, match=r"^1 run$"):
        main(f"{LINE} --only dense-w8 --quiet --workers 1".split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep", "the following arguments are required: NAME, one of cifar-mlp"),
        ("sweep deltah", "unknown sweep 'deltah' (did you mean delta-h?)"),
        ("sweep nothing.py", "nothing.py does not exist"),
        ("sweep empty.py", "must define SWEEP"),
        ("sweep mine.py --set widht=3", "unknown key 'widht' (did you mean width?)"),
        ("sweep mine.py --dry-run --only x*", "--only x* matches none of the runs dense-w8, dense-w16"),
        ("sweep mine.py --workers 0", "argument --workers: must be a positive integer, got '0'"),
        ("sweep mine.py --launcher x", "--launcher is for the commands"),
        ("sweep mine.py --submit-set a=1", "--submit-set is for --submit"),
        ("sweep mine.py --submit local --print-commands", "give one of --submit and --print-commands"),
        ("sweep mine.py --data x --submit local --submit-set a", "'a' must be NAME=VALUE"),
        ("sweep mine.py --data x --submit pbs", "cluster must be one of slurm, local, got 'pbs'"),
        ("sweep gpt2", "--data is needed: the folder of OpenWebText"),
        ("sweep delta-h", "--data is needed: the folder of CIFAR-10, or --set data_set=fashion"),
        ("sweep gpt2 --unverified", "--unverified is for CIFAR"),
        ("sweep mine.py --set batch_size=60000 --dry-run", "50000 images are less than one batch of 60000"),
    ],
)
def test_misuse(line: str, message: str, folder: Path, cli) -> None:
    Path("empty.py").write_text("x = 1\n")
    err = cli(line, code=2).err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_resumes(number: signal.Signals, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from structlin_nn.cli import main; sys.exit(main(sys.argv[1:]))"
    long = "--set epochs=40 --set eval_every=2"
    command = [sys.executable, "-c", code, *LINE.split(), "--workers", "2", "--quiet", *long.split()]
    environment = os.environ | {"PYTHONPATH": str(Path(structlin_nn.__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not list(Path("runs").glob("mine/*/checkpoints/0*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert "SIGTERM; the same command resumes the unfinished runs" in err
    states = planned(capsys, long)
    assert "begun" in states.values()
    assert "finished" not in states.values()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(planned(capsys, long).values()) == {"finished"}
