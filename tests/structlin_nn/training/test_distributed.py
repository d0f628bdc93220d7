"""Several processes: the losses of one, and checkpoints that any number of processes reads."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from structlin_nn.training.checkpoint import load_checkpoint
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, RunConfig, TrainConfig
from structlin_nn.training.distributed import Processes, processes, single
from structlin_nn.training.loop import load_trained
from structlin_nn.training.records import read_record
from structlin_nn.training.sharded import load_shards, remove_shards, save_shards
from structlin_nn.training.stepper import ShardedScaler

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).with_name("workers.py"))
assert _spec is not None
assert _spec.loader is not None
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)

CLOSE = 1e-5  # relative, of losses


def difference(some: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(some, others, strict=True))


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.fixture(scope="class")
    @classmethod
    def jobs(
        cls,
        tmp_path_factory: pytest.TempPathFactory,
        config: TrainConfig,
        gpt2_config: GPT2TrainConfig,
        imagenet_config: ImageNetTrainConfig,
        text_tokens: Path,
        small_cifar: Path,
        image_tree: Path,
    ) -> dict[str, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("distributed")
        gpt2 = gpt2_config.replace(accumulate=1)
        cifar = config.replace(lr=1e-3, warmup_epochs=1.0)
        vit = imagenet_config.replace(structure="dense", depth=1, lr=1e-3, warmup_epochs=1.0, accumulate=2)
        data = {
            "gpt2": {"data_root": str(text_tokens)},
            "cifar": {"data_root": str(small_cifar), "verify": False},
            "imagenet": {"data_root": str(image_tree)},
        }

        def job(name: str, one: RunConfig, **options: Any) -> dict[str, Any]:
            settings = {"task": one.task, "config": one.to_dict(), "data": data[one.task]}
            return {"folder": str(folder / name), **settings, **options}

        made = {
            f"{one.task}-{way}": job(f"{one.task}-{way}", one, parallel=way)
            for one in (gpt2, cifar, vit)
            for way in ("ddp", "fsdp")
        }
        half = gpt2.replace(precision="float16")
        made |= {f"half-{way}": job(f"half-{way}", half, parallel=way) for way in ("ddp", "fsdp")}
        made["part"] = job("part", gpt2, parallel="fsdp", stop_after=12)
        made["recomputed"] = job("recomputed", gpt2.replace(recompute=True, accumulate=2), parallel="fsdp")
        for one in (gpt2, cifar, vit):
            made[f"{one.task}-one"] = job(f"{one.task}-one", one)
        made["begun"] = job("begun", gpt2, stop_after=8)
        return made

    @pytest.fixture(scope="class")
    @classmethod
    def losses(
        cls, jobs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
    ) -> dict[str, list[float]]:
        names = [name for name in jobs if not name.endswith("one") and name != "begun"]
        found = workers.start([jobs[name] for name in names], 2, tmp_path_factory.mktemp("jobs"))
        alone = {name: workers.train(job) for name, job in jobs.items() if name not in names}
        return dict(zip(names, found, strict=True)) | alone

    @pytest.mark.parametrize("way", ["ddp", "fsdp"])
    @pytest.mark.parametrize("task", ["gpt2", "cifar", "imagenet"])
    def test_have_the_losses_of_one(
        self, task: str, way: str, jobs: dict[str, Any], losses: dict[str, list[float]]
    ) -> None:
        assert len(losses[f"{task}-{way}"]) == {"gpt2": 20, "cifar": 21, "imagenet": 12}[task]
        assert difference(losses[f"{task}-{way}"], losses[f"{task}-one"]) < CLOSE
        one, two = (read_record(Path(jobs[f"{task}-{name}"]["folder"]) / "record.jsonl") for name in ("one", way))
        assert two.header["hardware"]["processes"] == 2
        assert two.header["hardware"]["parallel"] == way
        assert two.header["structures"] == one.header["structures"]
        assert two.header["counts"] == one.header["counts"]
        for a, b in zip(one.evaluations, two.evaluations, strict=True):
            for key in (key for key in a if key.endswith(("loss", "perplexity", "error"))):
                assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=1e-4)), key
            assert a["statistics"]["feature_rms"] == pytest.approx(b["statistics"]["feature_rms"], rel=1e-4)
            assert a["statistics"]["gains"] == pytest.approx(b["statistics"]["gains"], rel=1e-3, abs=1e-6)

    def test_recomputation_and_accumulation_change_nothing(self, losses: dict[str, list[float]]) -> None:
        assert difference(losses["recomputed"], losses["gpt2-one"]) < CLOSE

    def test_float16_of_shards_is_that_of_whole_models(
        self, jobs: dict[str, dict[str, Any]], losses: dict[str, list[float]]
    ) -> None:
        """With steps left out, because a gradient overflowed in one of the processes."""
        assert difference(losses["half-fsdp"], losses["half-ddp"]) < CLOSE
        assert difference(losses["half-fsdp"], losses["gpt2-one"]) < 0.05
        states = [load_checkpoint(Path(jobs[f"half-{way}"]["folder"]) / "checkpoint.pt") for way in ("ddp", "fsdp")]
        assert states[0]["scaler"] == states[1]["scaler"]
        assert states[0]["scaler"]["scale"] < 2.0**16

    def test_shards_of_two_are_resumed_by_one(
        self, jobs: dict[str, Any], losses: dict[str, list[float]], tmp_path: Path
    ) -> None:
        shutil.copytree(jobs["part"]["folder"], tmp_path / "run")
        state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
        assert state["step"] == 12
        assert "model" not in state
        resumed = workers.train({**jobs["part"], "folder": str(tmp_path / "run"), "stop_after": None, "resume": True})
        assert difference(losses["part"] + resumed, losses["gpt2-one"]) < CLOSE
        # The one process has the whole of it in one file.
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "checkpoint.pt", "losses.json", "record.jsonl", "ways.json",
        ]  # fmt: skip
        one = load_trained(jobs["gpt2-one"]["folder"], average=True).state_dict()
        for name, tensor in load_trained(tmp_path / "run", average=True).state_dict().items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)

    def test_a_checkpoint_of_one_is_resumed_by_two(
        self, jobs: dict[str, Any], losses: dict[str, list[float]], tmp_path: Path
    ) -> None:
        again = []
        for way in ("ddp", "fsdp"):
            shutil.copytree(jobs["begun"]["folder"], tmp_path / way)
            again.append({**jobs["begun"], "folder": str(tmp_path / way), "stop_after": None, "parallel": way})
        shutil.copytree(jobs["part"]["folder"], tmp_path / "part")
        again.append({**jobs["part"], "folder": str(tmp_path / "part"), "stop_after": None})
        resumed = workers.start([job | {"resume": True} for job in again], 2, tmp_path)
        for first, rest in zip(("begun", "begun", "part"), resumed, strict=True):
            assert difference(losses[first] + rest, losses["gpt2-one"]) < CLOSE

    def test_a_full_disk_of_one_ends_both_and_leaves_the_last_checkpoint(
        self, jobs: dict[str, Any], losses: dict[str, list[float]], tmp_path: Path
    ) -> None:
        pytest.importorskip("resource")
        full = []
        for way, rank in (("ddp", 0), ("fsdp", 0), ("fsdp", 1)):
            folder = tmp_path / f"{way}-{rank}"
            shutil.copytree(jobs["part" if way == "fsdp" else "begun"]["folder"], folder)
            common = {"folder": str(folder), "parallel": way, "stop_after": None, "resume": True}
            full.append({**jobs["part"], **common, "full_disk": rank})
        before = [load_checkpoint(Path(job["folder"]) / "checkpoint.pt")["step"] for job in full]
        workers.start(full, 2, tmp_path)
        for job, step in zip(full, before, strict=True):
            folder = Path(job["folder"])
            errors = [(folder / f"error-{rank}").read_text() for rank in (0, 1)]
            assert all("checkpoint" in error or "too large" in error for error in errors), errors
            assert load_checkpoint(folder / "checkpoint.pt")["step"] == step
        again = [{key: value for key, value in job.items() if key != "full_disk"} for job in full]
        for first, rest in zip(("begun", "part", "part"), workers.start(again, 2, tmp_path), strict=True):
            assert difference(losses[first] + rest, losses["gpt2-one"]) < CLOSE

    @pytest.mark.parametrize("way", ["ddp", "fsdp"])
    def test_kill_at_any_time(
        self, way: str, jobs: dict[str, Any], losses: dict[str, list[float]], tmp_path: Path
    ) -> None:
        """kill -9 of both while each step writes a checkpoint, twice; then the run goes on to its end."""
        assert losses
        job = {**jobs[f"gpt2-{way}"], "folder": str(tmp_path / "run"), "resume": True, "always": True}
        seen = []
        for _ in range(2):
            started = workers.begin([job], 2, tmp_path)
            deadline, path = time.monotonic() + 240, tmp_path / "run" / "checkpoint.pt"
            first = path.stat().st_mtime_ns if path.exists() else 0
            changes, last = 0, first
            while changes < 5:
                assert time.monotonic() < deadline
                now = path.stat().st_mtime_ns if path.exists() else first
                changes, last = changes + (now != last), now
                time.sleep(0.003)
            for process in started:
                process.kill()
            texts = [process.communicate()[0] for process in started]
            assert [process.returncode for process in started] == [-signal.SIGKILL] * 2, texts
            seen.append(load_checkpoint(path)["step"])
        assert 0 < seen[0] < seen[1] < 20
        workers.start([job], 2, tmp_path)
        one, two = (
            read_record(Path(folder) / "record.jsonl") for folder in (jobs[f"gpt2-{way}"]["folder"], tmp_path / "run")
        )
        for line in (*one.evaluations, *two.evaluations):
            line["seconds"] = 0
        assert one.evaluations == two.evaluations

    def test_sharded_weights_load_whole(self, jobs: dict[str, Any], losses: dict[str, list[float]]) -> None:
        assert losses
        one, two = (load_trained(jobs[f"gpt2-{name}"]["folder"]).state_dict() for name in ("one", "fsdp"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


class TestShards:
    @pytest.fixture
    def alone(self) -> Processes:
        return single("cpu")

    @pytest.fixture
    def tensors(self) -> dict[str, Any]:
        return {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}, "average": {}}

    def empty(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: {k: torch.zeros_like(v) for k, v in entry.items()} for key, entry in tensors.items()}

    def test_round_trip_by_turns(self, tmp_path: Path, alone: Processes, tensors: dict[str, Any]) -> None:
        saved = save_shards(tmp_path, None, tensors, alone)
        other = save_shards(tmp_path, saved["slot"], tensors, alone)
        assert {saved["slot"], other["slot"]} == {"shards-0", "shards-1"}
        found = self.empty(tensors)
        load_shards(tmp_path, saved, found, alone)
        assert torch.equal(found["model"]["a"], tensors["model"]["a"])
        assert int(found["model"]["b"]) == 3
        remove_shards(tmp_path, other["slot"])
        assert [path.name for path in tmp_path.iterdir()] == [other["slot"]]

    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
    @pytest.mark.parametrize("kept", [None, 20])
    def test_damage(
        self, name: str, kept: int | None, tmp_path: Path, alone: Processes, tensors: dict[str, Any]
    ) -> None:
        saved = save_shards(tmp_path, None, tensors, alone)
        path = tmp_path / saved["slot"] / name
        raw = path.read_bytes()
        path.unlink()
        if kept is not None:
            path.write_bytes(raw[:kept])
        with pytest.raises(ValueError, match=f"{name} (is missing|has 20 bytes).*the checkpoint is damaged"):
            load_shards(tmp_path, saved, self.empty(tensors), alone)
        path.write_bytes(b"x" * len(raw))
        with pytest.raises(ValueError, match="is damaged or of another model"):
            load_shards(tmp_path, saved, self.empty(tensors), alone)

    def test_another_model(self, tmp_path: Path, alone: Processes, tensors: dict[str, Any]) -> None:
        saved = save_shards(tmp_path, None, tensors, alone)
        for wrong in ({"c": torch.zeros(2)}, {"a": torch.zeros(3, 3)}):
            with pytest.raises(ValueError, match="is damaged or of another model"):
                load_shards(tmp_path, saved, {"model": wrong}, alone)

    def test_code_is_not_run(
        self, tmp_path: Path, alone: Processes, tensors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Hostile:
            def __reduce__(self) -> tuple:
                return os.mkdir, ("hostile",)

        monkeypatch.chdir(tmp_path)
        saved = save_shards(tmp_path, None, tensors, alone)
        path = tmp_path / saved["slot"] / ".metadata"
        path.write_bytes(pickle.dumps(Hostile()))
        saved["files"][".metadata"] = path.stat().st_size
        with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.mkdir"):
            load_shards(tmp_path, saved, self.empty(tensors), alone)
        assert not Path("hostile").exists()

    def test_what_is_no_tensor_is_not_read(self, tmp_path: Path, alone: Processes, tensors: dict[str, Any]) -> None:
        saved = save_shards(tmp_path, None, {"model": {"a": "text"}}, alone)
        with pytest.raises(ValueError, match="it holds something that is no tensor"):
            load_shards(tmp_path, saved, {"model": {"a": torch.zeros(2)}}, alone)

    def test_a_full_disk(
        self, tmp_path: Path, alone: Processes, tensors: dict[str, Any], full_disk: Callable[[int], Any]
    ) -> None:
        saved = save_shards(tmp_path, None, tensors, alone)
        with full_disk(100_000), pytest.raises(OSError, match="could not be written"):
            save_shards(tmp_path, saved["slot"], {"model": {"large": torch.zeros(100_000)}}, alone)
        found = self.empty(tensors)
        load_shards(tmp_path, saved, found, alone)
        assert torch.equal(found["model"]["a"], tensors["model"]["a"])


class TestShardedScaler:
    """In one process, with the answer that others would give."""

    @pytest.mark.parametrize(("mine", "theirs"), [(False, False), (True, False), (False, True)])
    @pytest.mark.parametrize("unscaled", [False, True])
    def test_a_step_is_left_out_where_any_process_overflows(
        self, mine: bool, theirs: bool, unscaled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def all_reduce(found: torch.Tensor, operation: Any) -> None:
            asked.append(operation)
            found.fill_(max(found.item(), float(theirs)))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        layer = torch.nn.Linear(3, 1, bias=False)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.25, fused=True)
        scaler = ShardedScaler("cpu", init_scale=64.0)
        scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
        if mine:
            layer.weight.grad[0, 1] = float("inf")
        if unscaled:
            scaler.unscale_(optimizer)
            if not (mine or theirs):
                assert torch.equal(layer.weight.grad, torch.full((1, 3), 2.0))
        scaler.step(optimizer)
        scaler.update()
        skipped = mine or theirs
        assert asked == [torch.distributed.ReduceOp.MAX]
        assert torch.equal(layer.weight, before) == skipped
        assert skipped or torch.allclose(layer.weight, before - 0.25)  # Adam's first step is its rate
        assert scaler.get_scale() == (32.0 if skipped else 64.0)
        assert optimizer.state[layer.weight]["step"] == (0 if skipped else 1)


class TestOneProcess:
    def test_is_found_without_an_environment(self) -> None:
        with processes("cpu") as group:
            assert (group.rank, group.size, group.main, group.sharded) == (0, 1, True, False)
            assert group.any(True)
            assert group.first(lambda: [1]) == [1]

    @pytest.mark.parametrize(
        ("device", "way", "message"),
        [("cpu", "dpp", "parallel must be one of ddp, fsdp, got 'dpp'"), ("cuda:77", "ddp", "'cuda:77' is not there")],
    )
    def test_mistakes(self, device: str, way: str, message: str) -> None:
        with pytest.raises(ValueError, match=message), processes(device, way):
            pass

    def test_a_batch_that_cannot_be_shared(self) -> None:
        with pytest.raises(ValueError, match="batch_size 5 cannot be shared equally by 2 processes"):
            Processes(0, 2, 0, "ddp", torch.device("cpu")).parts(5, "batch_size")


def torchrun(data: Path, out: Path, options: str) -> subprocess.Popen[str]:
    """Two processes that train a small GPT-2."""
    line = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 -m structlin_nn.cli train gpt2 --data {data} "
        f"--out {out} --width 16 --heads 2 --depth 1 --context 8 --batch-size 4 --eval-batches 1 --threads 1 {options}"
    )
    path = os.pathsep.join([str(workers.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *line.split()], env=environment, start_new_session=True, text=True, **pipes
    )


@pytest.mark.slow
def test_torchrun_is_interrupted(text_tokens: Path, tmp_path: Path) -> None:
    """Ctrl-C: the signal reaches torchrun and its processes, to which torchrun sends it once more."""
    process = torchrun(text_tokens, tmp_path / "run", "--steps 200000 --eval-every 100000 --quiet")
    deadline, path = time.monotonic() + 240, tmp_path / "run" / "checkpoint.pt"
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    step = load_checkpoint(path)["step"]
    assert step > 0
    assert f"SIGINT after step {step} of 200000; checkpoint written" in err


@pytest.mark.slow
def test_torchrun_starts_the_command(text_tokens: Path, tmp_path: Path) -> None:
    options = "--parallel fsdp --steps 3 --warmup-steps 1 --eval-every 3 --json"
    process = torchrun(text_tokens, tmp_path / "run", options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == 3
    assert "processes: 2, fsdp" in err
    assert read_record(tmp_path / "run" / "record.jsonl").finished
