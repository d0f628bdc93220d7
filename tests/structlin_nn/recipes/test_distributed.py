"""Several processes: the losses of one, and checkpoints that any number of processes reads."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structlin_nn.checkpoints import checkpoints, read_checkpoint
from structlin_nn.data import batch_rows, load_images
from structlin_nn.recipes import cifar
from structlin_nn.recipes._processes import Processes, processes
from structlin_nn.records import read_record
from structlin_nn.trained import load_trained

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).with_name("workers.py"))
assert _spec is not None
assert _spec.loader is not None
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)

CLOSE = 1e-5  # relative, of losses


def difference(some: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(some, others, strict=True))


def at(job: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """A job in another folder, without its end and with other options."""
    kept = {key: value for key, value in job.items() if key != "stop_after"}
    return kept | {"options": {**job["options"], "out": str(folder), **options}}


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.fixture(scope="class")
    @classmethod
    def jobs(
        cls, tmp_path_factory: pytest.TempPathFactory, config: Any, gpt2_config: Any, imagenet_config: Any,
        text_tokens: Path, small_cifar: Path, image_tree: Path,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        folder = tmp_path_factory.mktemp("distributed")
        gpt2 = gpt2_config.replace(accumulate=1)
        cifar = config.replace(lr=1e-3, warmup_epochs=1.0)
        vit = imagenet_config.replace(structure="dense", options={}, depth=1, lr=1e-3, warmup_epochs=1.0, accumulate=2)
        data = {
            "gpt2": {"data": str(text_tokens)},
            "cifar": {"data": str(small_cifar), "unverified": True},
            "imagenet": {"data": str(image_tree)},
        }

        def job(name: str, one: Any, parallel: str = "ddp", **more: Any) -> dict[str, Any]:
            options = {"out": str(folder / name), "parallel": parallel, **data[one.task]}
            return {"recipe": one.task, "config": one.to_dict(), "options": options, **more}

        made = {f"{one.task}-{way}": job(f"{one.task}-{way}", one, way) for one in (gpt2, cifar, vit)
                for way in ("ddp", "fsdp")}  # fmt: skip
        half = gpt2.replace(precision="float16")
        made |= {f"half-{way}": job(f"half-{way}", half, way) for way in ("ddp", "fsdp")}
        bfloat = gpt2.replace(precision="bfloat16")
        made |= {f"bfloat-{way}": job(f"bfloat-{way}", bfloat, way) for way in ("ddp", "fsdp")}
        made["part"] = job("part", gpt2, "fsdp", stop_after=6)
        made["recomputed"] = job("recomputed", gpt2.replace(recompute=True, accumulate=2), "fsdp")
        made |= {f"{one.task}-one": job(f"{one.task}-one", one) for one in (gpt2, cifar, vit)}
        made["begun"] = job("begun", gpt2, stop_after=8)
        return made

    @pytest.fixture(scope="class")
    @classmethod
    def losses(cls, jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
        names = [name for name in jobs if not name.endswith("one") and name != "begun"]
        found = workers.start([jobs[name] for name in names], 2, tmp_path_factory.mktemp("jobs"))
        alone = {name: workers.train(job) for name, job in jobs.items() if name not in names}
        return dict(zip(names, found, strict=True)) | alone

    @pytest.mark.parametrize("way", ["ddp", "fsdp"])
    @pytest.mark.parametrize("task", ["gpt2", "cifar", "imagenet"])
    def test_have_the_losses_of_one(
        self, task: str, way: str, jobs: dict[str, Any], losses: dict[str, list[float]]
    ) -> None:
        assert difference(losses[f"{task}-{way}"], losses[f"{task}-one"]) < CLOSE
        one, two = (
            read_record(Path(jobs[f"{task}-{name}"]["options"]["out"]) / "record.jsonl") for name in ("one", way)
        )
        assert (two.header["hardware"]["processes"], two.header["hardware"]["parallel"]) == (2, way)
        assert two.header["counts"] == one.header["counts"]
        for a, b in zip(one.evaluations, two.evaluations, strict=True):
            for key in (key for key in a if key.endswith(("loss", "perplexity", "error"))):
                assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=1e-4)), key
            assert a["statistics"]["feature_rms"] == pytest.approx(b["statistics"]["feature_rms"], rel=1e-4)
            assert a["statistics"]["gains"] == pytest.approx(b["statistics"]["gains"], rel=1e-3, abs=1e-6)

    def test_recomputation_and_accumulation_change_nothing(self, losses: dict[str, list[float]]) -> None:
        assert difference(losses["recomputed"], losses["gpt2-one"]) < CLOSE

    def test_float16_of_shards_is_that_of_whole_models(self, jobs: Any, losses: dict[str, list[float]]) -> None:
        """With steps left out, because a gradient overflowed in one of the processes."""
        assert difference(losses["half-fsdp"], losses["half-ddp"]) < CLOSE
        assert difference(losses["half-fsdp"], losses["gpt2-one"]) < 0.05
        states = [read_checkpoint(Path(jobs[f"half-{way}"]["options"]["out"]))[1] for way in ("ddp", "fsdp")]
        assert states[0]["scaler"] == states[1]["scaler"]
        assert states[0]["scaler"]["scale"] < 2.0**16

    def test_bfloat16_of_shards_is_that_of_whole_models(self, losses: dict[str, list[float]]) -> None:
        """Nearly: activations between layers are in bfloat16 too."""
        assert 0 < difference(losses["bfloat-fsdp"], losses["bfloat-ddp"]) < 0.01
        assert difference(losses["bfloat-fsdp"], losses["gpt2-one"]) < 0.02

    def test_shards_of_two_are_resumed_by_one(self, jobs: Any, losses: dict[str, list[float]], tmp_path: Path) -> None:
        shutil.copytree(jobs["part"]["options"]["out"], tmp_path / "run")
        _, state = read_checkpoint(tmp_path / "run")
        assert state["step"] == 6
        assert {name[:4] for name in state["files"]} == {"__0_", "__1_", ".met"}  # both wrote, and both were summed
        resumed = workers.train(at(jobs["part"], tmp_path / "run", resume=True))
        assert difference(losses["part"] + resumed, losses["gpt2-one"]) < CLOSE
        one = load_trained(jobs["gpt2-one"]["options"]["out"], average=True).state_dict()
        for name, tensor in load_trained(tmp_path / "run", average=True).state_dict().items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)

    def test_a_flipped_bit_of_a_shard(self, jobs: Any, losses: dict[str, list[float]], tmp_path: Path) -> None:
        assert losses
        shutil.copytree(jobs["part"]["options"]["out"], tmp_path / "run")
        place, _ = read_checkpoint(tmp_path / "run")
        path = next(place.glob("__1_*"))
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="has another checksum"):
            workers.train(at(jobs["part"], tmp_path / "run", resume=True))

    def test_a_checkpoint_of_one_is_resumed_by_two(self, jobs: Any, losses: Any, tmp_path: Path) -> None:
        again = []
        for name, way in (("begun", "ddp"), ("begun", "fsdp"), ("part", "fsdp")):
            folder = tmp_path / f"{name}-{way}"
            shutil.copytree(jobs[name]["options"]["out"], folder)
            again.append(at(jobs[name], folder, parallel=way, resume=True))
        resumed = workers.start(again, 2, tmp_path)
        for first, rest in zip(("begun", "begun", "part"), resumed, strict=True):
            assert difference(losses[first] + rest, losses["gpt2-one"]) < CLOSE

    def test_a_full_disk_of_one_ends_both_and_leaves_the_last_checkpoint(
        self, jobs: dict[str, Any], losses: dict[str, list[float]], tmp_path: Path
    ) -> None:
        pytest.importorskip("resource")
        full = []
        for way, rank in (("ddp", 0), ("fsdp", 0), ("fsdp", 1)):
            folder, source = tmp_path / f"{way}-{rank}", jobs["part" if way == "fsdp" else "begun"]
            shutil.copytree(source["options"]["out"], folder)
            full.append(at(source, folder, parallel=way, resume=True, checkpoint_minutes=0.0) | {"full_disk": rank})
        before = [read_checkpoint(Path(job["options"]["out"]))[1]["step"] for job in full]
        workers.start(full, 2, tmp_path)
        for job, step in zip(full, before, strict=True):
            folder = Path(job["options"]["out"])
            errors = [Path(f"{folder}.error-{rank}").read_text() for rank in (0, 1)]
            assert all("could not be written" in error or "too large" in error for error in errors), errors
            assert read_checkpoint(folder)[1]["step"] == step
        again = [{key: value for key, value in job.items() if key != "full_disk"} for job in full]
        for first, rest in zip(("begun", "part", "part"), workers.start(again, 2, tmp_path), strict=True):
            assert difference(losses[first] + rest, losses["gpt2-one"]) < CLOSE

    @pytest.mark.parametrize("way", ["ddp", "fsdp"])
    def test_a_checkpoint_of_each_step(self, way: str, jobs: dict[str, Any], losses: Any, tmp_path: Path) -> None:
        """Of evaluated steps two, one before and one after the evaluation; all processes write both."""
        (found,) = workers.start([at(jobs[f"gpt2-{way}"], tmp_path / "run", checkpoint_minutes=0.0)], 2, tmp_path)
        assert found == losses[f"gpt2-{way}"]

    def test_sigterm_to_one_of_them(self, jobs: dict[str, Any], losses: Any, tmp_path: Path) -> None:
        """Both end at the same step, both know of the signal, and the run is resumed."""
        made = [at(jobs["gpt2-ddp"], tmp_path / f"rank{rank}") | {"signal": [rank, 5]} for rank in (0, 1)]
        found = workers.start(made, 2, tmp_path)
        for rank, job in enumerate(made):
            ended = [Path(f"{job['options']['out']}.ended-{of}").read_text() for of in (0, 1)]
            assert ended == ["SIGTERM 5"] * 2 or ended == ["SIGTERM 6"] * 2, (rank, ended)
        again = [
            {k: v for k, v in at(j, Path(j["options"]["out"]), resume=True).items() if k != "signal"} for j in made
        ]
        for first, rest in zip(found, workers.start(again, 2, tmp_path), strict=True):
            assert difference(first + rest, losses["gpt2-one"]) < CLOSE

    @pytest.mark.parametrize("way", ["ddp", "fsdp"])
    def test_kill_at_any_time(self, way: str, jobs: dict[str, Any], losses: Any, tmp_path: Path) -> None:
        """kill -9 of both while each step writes a checkpoint, twice; then the run completes."""
        assert losses
        job = at(jobs[f"gpt2-{way}"], tmp_path / "run", resume=True, checkpoint_minutes=0.0)
        seen = [-1]
        for _ in range(2):
            started = workers.begin([job], 2, tmp_path)
            deadline = time.monotonic() + 240
            try:
                while int((checkpoints(tmp_path / "run") or ["-1"])[-1]) < seen[-1] + 5:
                    assert time.monotonic() < deadline
                    time.sleep(0.003)
            finally:
                for process in started:
                    process.kill()
            texts = [process.communicate()[0] for process in started]
            assert [process.returncode for process in started] == [-signal.SIGKILL] * 2, texts
            seen.append(read_checkpoint(tmp_path / "run")[1]["step"])
        assert 0 < seen[1] < seen[2] < 20
        workers.start([job], 2, tmp_path)
        one, two = (
            read_record(Path(folder) / "record.jsonl")
            for folder in (jobs[f"gpt2-{way}"]["options"]["out"], tmp_path / "run")
        )
        for line in (*one.evaluations, *two.evaluations):
            line["seconds"] = line["training_seconds"] = 0
        assert one.evaluations == two.evaluations


@pytest.mark.slow
def test_batch_norm_has_one_model(
    config: Any, small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluated model is that of the checkpoint, of weights and of their average, and that of a resumed run.

    Running statistics are the means over the processes; for those of the inputs the oracle is in float64.
    """
    monkeypatch.setitem(sys.modules, "workers", workers)
    plain = {"augment": False, "mixup": 0.0, "label_smoothing": 0.0, "input_lr_mult": 1.0, "accumulate": 2}
    config = config.replace(
        model="workers:normalized", structure="low_rank", options={"rank": 3}, epochs=1, eval_every=1, **plain
    )
    jobs: dict[str, dict[str, Any]] = {}
    for way, ema in itertools.product(("ddp", "fsdp"), (0.0, 0.5)):
        options = {"out": str(tmp_path / f"{way}-{ema}"), "parallel": way, "data": str(small_cifar), "unverified": True}
        jobs[f"{way}-{ema}"] = {"recipe": "cifar", "config": config.replace(ema=ema).to_dict(), "options": options}
    part = at(jobs["ddp-0.5"], tmp_path / "part")
    workers.start([*jobs.values(), part | {"stop_after": 4}, at(part, tmp_path / "part", resume=True)], 2, tmp_path)

    data = load_images("cifar10", small_cifar, verify=False)
    mean, var = np.zeros((2, 3072)), np.ones((2, 3072))
    for step in range(7):
        rows = batch_rows(240, 32, config.seed, step)
        centre, scale = (np.reshape(values, (3, 1, 1)) for values in (data.mean, data.std))
        inputs = ((data.train_images[rows] / 255 - centre) / scale).reshape(32, 3072)
        for process, share in enumerate(np.split(inputs, 2)):
            for some in np.split(share, 2):
                mean[process] += 0.1 * (some.mean(0) - mean[process])
                var[process] += 0.1 * (some.var(0, ddof=1) - var[process])
        mean[:], var[:] = mean.mean(0), var.mean(0)

    for name, job in jobs.items():
        ema = job["config"]["ema"]
        evaluation = read_record(tmp_path / name / "record.jsonl").evaluations[-1]
        model = load_trained(tmp_path / name, model=cifar.build(config, 10), average=bool(ema))
        images, labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels)
        assert cifar.loss_and_error(model, images, labels, data)[0] == pytest.approx(evaluation["test_loss"], rel=1e-6)
        found = load_trained(tmp_path / name, model=cifar.build(config, 10))[1]
        np.testing.assert_allclose(found.running_mean, mean[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.running_var, var[0], rtol=1e-5, atol=0)
    one, two = (read_record(tmp_path / name / "record.jsonl").evaluations for name in ("ddp-0.5", "part"))
    for line in (*one, *two):
        line["seconds"] = line["training_seconds"] = 0
    assert one == two


def test_one_process_is_found_without_an_environment() -> None:
    with processes("cpu") as group:
        assert (group.rank, group.size, group.main, group.sharded) == (0, 1, True, False)
        assert group.largest(3) == 3
        assert group.first(lambda: [1]) == group.gather(1) == [1]
    with pytest.raises(ValueError, match="'cuda:77' does not exist"), processes("cuda:77"):
        pass


def test_a_batch_that_cannot_be_shared(gpt2_config: Any) -> None:
    with pytest.raises(ValueError, match="batch_size 5 cannot be shared equally by 2 processes"):
        Processes(0, 2, "ddp", torch.device("cpu")).part_size(gpt2_config.replace(batch_size=5))


def torchrun(data: Path, out: Path, options: str) -> "subprocess.Popen[str]":
    """Two processes that train a small GPT-2."""
    line = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 -m structlin_nn.cli train gpt2 --data {data} "
        f"--out {out} --width 16 --heads 2 --depth 1 --context 8 --batch-size 4 --eval-sequences 4 --threads 1 "
        + options
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(workers.ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *line.split()], env=environment, start_new_session=True, text=True, **pipes
    )


@pytest.mark.slow
def test_torchrun_is_interrupted(text_tokens: Path, tmp_path: Path) -> None:
    """Ctrl-C: the signal reaches torchrun and its processes, to which torchrun sends it once more."""
    process = torchrun(text_tokens, tmp_path / "run", "--steps 200000 --eval-every 100000 --quiet")
    deadline = time.monotonic() + 240
    try:
        while not checkpoints(tmp_path / "run"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
    finally:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    step = read_checkpoint(tmp_path / "run")[1]["step"]
    assert step > 0
    assert f"SIGINT after step {step} of 200000; checkpoint written" in err
    assert "Error" not in err.replace("ChildFailedError", "").replace("SignalException", "")


@pytest.mark.slow
def test_torchrun_starts_the_command(text_tokens: Path, tmp_path: Path) -> None:
    process = torchrun(
        text_tokens, tmp_path / "run", "--parallel fsdp --steps 3 --warmup-steps 1 --eval-every 3 --json --quiet"
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == 3
    record = read_record(tmp_path / "run" / "record.jsonl")
    assert record.finished
    assert record.header["hardware"]["processes"] == 2
