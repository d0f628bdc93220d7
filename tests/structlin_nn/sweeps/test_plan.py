"""Plans of many runs: what they cost, what is done, and what is left."""

import json
from pathlib import Path

import pytest

from structlin_nn.cli import main
from structlin_nn.recipes import cifar, gpt2
from structlin_nn.records import COMMON_KEYS, HEADER_KEYS, TASK_KEYS, RecordWriter
from structlin_nn.sweeps import Sweep, grid, merge
from structlin_nn.sweeps.local import Job, plan

SWEEP = """
from structlin_nn.sweeps import Sweep, grid, merge
SWEEP = Sweep(
    name="many", about="200 runs", model="cifar-mlp", base={"data_set": "fashion", "epochs": 2, "eval_every": 1},
    overlays=merge(
        [{"structure": name} for name in ("dense", "monarch", "low_rank", "kronecker")],
        grid(width=[8, 16], lr=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], seed=range(5)),
    ),
)
"""
STEPS = 18  # 2 epochs of 10,000 images in batches of 1024


def record(job: Job, step: int) -> None:
    """A record like that of a run with a number of steps."""
    made = {key: {} for key in HEADER_KEYS if key != "schema"}
    writer = RecordWriter.create(
        job.folder / "record.jsonl",
        {**made, "task": "cifar", "config": job.config.to_dict(), "counts": {"steps": STEPS}},
    )
    for at in {0, step}:
        writer.append(dict.fromkeys((*COMMON_KEYS, *TASK_KEYS["cifar"]), 0) | {"step": at})
    (job.folder / "checkpoints" / f"{step:09d}").mkdir(parents=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("many.py").write_text(SWEEP)
    return tmp_path


def test_two_hundred_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from structlin_nn.sweeps import find

    configs = find("many.py").runs()
    jobs = {name: Job(config, cifar.Options(out=Path("runs/many", name))) for name, config in configs.items()}
    assert len(jobs) == 200
    names = list(jobs)
    expected = dict.fromkeys(names, "new")
    for name in names[:120:2]:
        record(jobs[name], STEPS)
        expected[name] = "finished"
    for name in names[1:21:2]:
        record(jobs[name], 9)
        expected[name] = "begun"
    for name in names[190:]:
        jobs[name].folder.mkdir(parents=True)
        (jobs[name].folder / "failed.json").write_text('{"error": "the loss is nan"}')
        expected[name] = "failed"

    calls = []
    original = cifar.count_run
    monkeypatch.setattr(cifar, "count_run", lambda *given: (calls.append(given), original(*given))[1])
    planned = plan(jobs)
    assert {name: entry.state for name, entry in planned.items()} == expected
    assert len(calls) == 4 * 2  # one for each model, whatever its rate and seed
    for name, entry in planned.items():
        assert entry.job is jobs[name]
        assert entry.counts["steps"] == STEPS
    costs = {(c.structure, c.width): planned[name].counts["forward_macs"] for name, c in configs.items()}
    assert costs[("dense", 16)] == 3072 * 16 + 3 * 2 * 16 * 64 + 16 * 10

    assert main(["sweep", "many.py", "--print-commands"]) == 0
    printed = capsys.readouterr().out.splitlines()
    left = [name for name in names if expected[name] in ("new", "begun")]
    assert [line.split("--out ")[1].split()[0] for line in printed] == [f"runs/many/{name}" for name in left]
    assert main(["sweep", "many.py", "--print-commands", "--retry"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(left) + 10
    assert main(["sweep", "many.py", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["total_training_macs"] for row in rows) == sum(
        entry.counts["total_training_macs"] for entry in planned.values()
    )


def test_the_vocabulary_of_tokens_that_were_not_prepared_here(tmp_path: Path) -> None:
    sweep = Sweep(
        name="x", about="", model="gpt2", base={"width": 32, "depth": 1, "heads": 2, "context": 8},
        overlays=merge([{"structure": "dense"}], grid(seed=[0])),
    )  # fmt: skip
    (config,) = sweep.runs().values()

    def head(meta: str | None) -> int:
        if meta is not None:
            (tmp_path / "meta.json").write_text(meta)
        planned = plan({"a": Job(config, gpt2.Options(out=tmp_path / "run", data=tmp_path))})
        return planned["a"].counts["embedding_params"] // 32 - 8

    assert head(None) == 50304
    assert head('{"version": 1, "vocab_size": 200}') == 256  # sums are not needed for a plan
