"""Runs write records, interruptions do not change their results, and no other run overwrites them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refused

import structlin
import structlin_nn
from structlin import execution
from structlin_nn._shards import read_tensors, write_tensors
from structlin_nn.checkpoints import CHECKPOINTS, checkpoints, read_checkpoint, read_state
from structlin_nn.cli import main
from structlin_nn.recipes import _run, recipe_module
from structlin_nn.recipes._run import Interruption
from structlin_nn.recipes.cifar import Config, Options, train
from structlin_nn.records import COMMON_KEYS, HEADER_KEYS, TASK_KEYS, read_record, sealed
from structlin_nn.trained import load_trained

STEPS_PER_EPOCH = 7  # 240 images in batches of 32, the incomplete one left out
Setting = tuple[str, Any, Any]


@pytest.fixture(params=["cifar", "gpt2", "imagenet"])
def setting(
    request: pytest.FixtureRequest, config: Any, gpt2_config: Any, imagenet_config: Any, small_cifar: Path,
    text_tokens: Path, image_tree: Path,
) -> Setting:  # fmt: skip
    """Each recipe in turn: its name, a configuration, and options that say where its data are."""
    config, more = {
        "cifar": (config, {"data": small_cifar, "unverified": True}),
        "gpt2": (gpt2_config, {"data": text_tokens}),
        "imagenet": (imagenet_config, {"data": image_tree}),
    }[request.param]
    return request.param, config, recipe_module(request.param).Options(quiet=True, **more)


@pytest.fixture
def options(small_cifar: Path, tmp_path: Path) -> Options:
    return Options(data=small_cifar, unverified=True, quiet=True, out=tmp_path / "run")


def python_path() -> str:
    """With what tests/conftest.py adds for processes that tests start."""
    return os.pathsep.join([str(Path(structlin_nn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])


def stop_after(steps: int) -> Callable[..., bool]:
    calls = iter(range(1, 10**6))
    return lambda run, loss: next(calls) == steps


def lines(folder: Path) -> list[dict[str, Any]]:
    """A record without what may differ between two runs of one configuration: times."""
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "training_seconds", "started", "crc32")}
        for line in (folder / "record.jsonl").read_text().splitlines()
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by their path."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    place, _ = read_checkpoint(folder)
    dcp_to_torch_save(place, folder.parent / "whole.pt")
    found: dict[str, torch.Tensor] = {}

    def add(prefix: str, value: Any) -> None:
        for key, entry in value.items():
            add(f"{prefix}.{key}", entry) if isinstance(entry, dict) else found.update({f"{prefix}.{key}": entry})

    add("", torch.load(folder.parent / "whole.pt", weights_only=True))
    return found


def assert_same(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    states = [read_checkpoint(folder)[1] for folder in (one, other)]
    apart = ("seconds", "training_seconds", "last", "record_size", "files", "execution", "crc32")
    a, b = ({k: v for k, v in state.items() if k not in apart} for state in states)
    assert a == b


class TestEveryRecipe:
    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setting], tuple[Any, Any]]:
        """Configuration and result of a finished run of each recipe, with everything that has a state."""
        found: dict[str, tuple[Any, Any]] = {}

        def run(setting: Setting) -> tuple[Any, Any]:
            name, config, options = setting
            if name not in found:
                config = config.replace(ema=0.9, clip=1.0, precision="bfloat16")
                out = tmp_path_factory.mktemp(name) / "whole"
                found[name] = config, recipe_module(name).train(config, replace(options, out=out))
            return found[name]

        return run

    def test_records(self, setting: Setting, whole: Callable[[Setting], tuple[Any, Any]]) -> None:
        name, _, options = setting
        config, result = whole(setting)
        assert result.finished
        raw = [json.loads(line) for line in result.record.read_text().splitlines()]
        assert set(raw[0]) == {"kind", "recipe", "crc32", *HEADER_KEYS}
        wanted = {"kind", "crc32", "training_seconds", *COMMON_KEYS, *TASK_KEYS[config.task]}
        assert all(set(line) == wanted for line in raw[1:])
        assert all(0 <= line["training_seconds"] <= line["seconds"] for line in raw[1:])
        record = read_record(result.record)
        assert record.finished
        assert record.header["config"] == config.to_dict()
        last = record.evaluations[-1]
        assert last["samples"] == result.steps * config.batch_size
        assert last["training_macs"] == record.header["counts"]["total_training_macs"]
        assert str(result.record.parent) not in result.record.read_text()
        assert str(options.data) not in result.record.read_text()
        assert recipe_module(name).plan(config, options)[1:] == (result.steps, record.header["counts"])

    def test_resumed_results_are_bit_identical(
        self, setting: Setting, whole: Callable[[Setting], tuple[Any, Any]], tmp_path: Path
    ) -> None:
        name, _, options = setting
        train, (config, result) = recipe_module(name).train, whole(setting)
        part = replace(options, out=tmp_path / "part")
        assert not train(config, part, watch=stop_after(7)).finished
        torch.manual_seed(777)  # what other code does with the global generator must not matter
        assert train(config, replace(part, resume=True)).finished
        assert_same(result.record.parent, tmp_path / "part")

    def test_a_full_disk_leaves_the_last_checkpoint(
        self, setting: Setting, tmp_path: Path, full_disk: Callable[[int], Any]
    ) -> None:
        name, config, options = setting
        train, options = recipe_module(name).train, replace(options, out=tmp_path / "run")
        train(config, options, watch=stop_after(3))
        options = replace(options, resume=True)
        with full_disk(30_000), pytest.raises(OSError, match=r"could not be written|too large|space") as caught:
            train(config, replace(options, checkpoint_minutes=0))
        assert "pos " not in str(caught.value)  # what torch says of its files
        assert read_checkpoint(tmp_path / "run")[1]["step"] == 3
        assert train(config, options).finished

    def test_another_recipe(self, setting: Setting, tmp_path: Path) -> None:
        name, config, options = setting
        recipe_module(name).train(config, replace(options, out=tmp_path / "run"), watch=stop_after(1))
        other = recipe_module("cifar" if name != "cifar" else "gpt2")
        message = f"is one of {name}, and this is one of"
        with pytest.raises(ValueError, match=message):
            other.train(other.Config(), other.Options(out=tmp_path / "run", resume=True, quiet=True))

    def test_execution_does_not_change_losses(self, setting: Setting, tmp_path: Path) -> None:
        name, config, options = setting
        config, found = config.replace(accumulate=1, ema=0.0), []
        for number, changes in enumerate(({}, {"accumulate": 4}, {"recompute": True})):
            one = config.replace(**changes)
            losses: list[float] = []
            recipe_module(name).train(
                one, replace(options, out=tmp_path / str(number)),
                watch=lambda run, loss, losses=losses: losses.append(loss) or len(losses) == 3,
            )  # fmt: skip
            found.append(losses)
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        assert found[0] == pytest.approx(found[2], rel=1e-5)


class TestResume:
    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, config: Config, small_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("finished") / "run"
        assert train(config, Options(data=small_cifar, unverified=True, quiet=True, out=folder)).finished
        return folder

    @pytest.fixture
    def whole(self, finished: Path, tmp_path: Path) -> Path:
        """A copy of the finished run, which a test may change."""
        return Path(shutil.copytree(finished, tmp_path / "whole"))

    @pytest.mark.parametrize("after", [1, STEPS_PER_EPOCH, 20])
    def test_is_bit_identical(self, after: int, whole: Path, config: Config, options: Options) -> None:
        assert train(config, options, watch=stop_after(after)).step == after
        assert train(config, replace(options, resume=True)).finished
        assert_same(whole, options.out)

    def test_many_times(self, whole: Path, config: Config, options: Options) -> None:
        for _ in range(3):
            train(config, replace(options, resume=True), watch=stop_after(6))
        assert train(config, replace(options, resume=True)).finished
        assert_same(whole, options.out)

    def test_after_a_kill_in_the_middle_of_a_line(
        self, whole: Path, config: Config, options: Options, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(config, options, watch=stop_after(10))
        with (options.out / "record.jsonl").open("ab") as file:
            file.write(b'{"kind": "evaluation", "step": 14, "epo')
        assert train(config, replace(options, resume=True, quiet=False)).finished
        assert "cut off after 39 bytes" in capsys.readouterr().err
        assert_same(whole, options.out)

    def test_after_a_kill_between_record_and_checkpoint(
        self, whole: Path, config: Config, options: Options, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(config, options, watch=stop_after(10))
        train(config, replace(options, resume=True, keep=9), watch=stop_after(4))
        assert checkpoints(options.out) == ["000000010", "000000014"]
        shutil.rmtree(options.out / CHECKPOINTS / "000000014")
        assert train(config, replace(options, resume=True, quiet=False)).finished
        assert "dropped 1 line(s)" in capsys.readouterr().err
        assert_same(whole, options.out)

    def test_of_a_finished_run_changes_nothing(self, whole: Path, config: Config, options: Options) -> None:
        before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        assert train(config, replace(options, out=whole, resume=True)).finished
        assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before

    def test_with_another_configuration(self, whole: Path, config: Config, options: Options) -> None:
        other, options = config.replace(width=48, lr=0.1), replace(options, out=whole, resume=True)
        with pytest.raises(ValueError, match=r"configuration: width was 24 and is 48, lr was 0.003 and is 0.1$"):
            train(other, options)

    def test_with_other_data(self, whole: Path, config: Config, options: Options, tmp_path: Path) -> None:
        other = tmp_path / options.data.name
        shutil.copytree(options.data, other)
        raw = bytearray((other / "data_batch_3.bin").read_bytes())
        raw[1000] ^= 1
        (other / "data_batch_3.bin").write_bytes(raw)
        with pytest.raises(ValueError, match="was trained on other cifar10 data"):
            train(config, replace(options, out=whole, data=other, resume=True))

    def test_without_its_record(self, whole: Path, config: Config, options: Options) -> None:
        (whole / "record.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match=r"record.jsonl is missing"):
            train(config, replace(options, out=whole, resume=True))

    def test_needs_the_option_resume(self, whole: Path, config: Config, options: Options) -> None:
        with pytest.raises(FileExistsError, match="holds a run already"):
            train(config, replace(options, out=whole))

    def test_repeats_the_ways_of_its_products(self, config: Config, options: Options, tmp_path: Path) -> None:
        """Results are bit-identical, even if other ways would be chosen now, and the run names its ways."""
        config = config.replace(width=40, epochs=2, augment=False)
        with execution.using("products"):
            train(config, replace(options, out=tmp_path / "whole"))
            train(config, options, watch=stop_after(3))
        with execution.using("token_major"):
            assert train(config, replace(options, resume=True)).finished
        assert_same(tmp_path / "whole", options.out)
        found = json.loads((options.out / "ways.json").read_text())
        assert set(found["ways"].values()) == {"products", "separate"}  # of layers, and of blocks of layers
        assert read_checkpoint(options.out)[1]["execution"] == found["ways"]


class TestCheckpoints:
    @pytest.fixture
    def run(self, config: Config, options: Options) -> Path:
        train(config, options, watch=stop_after(3))
        return options.out

    def test_every_bit_counts(self, run: Path, config: Config, options: Options) -> None:
        """Flips of one bit anywhere in a checkpoint are seen: 80 of 80."""
        place, state = read_checkpoint(run)
        generator = np.random.default_rng(0)
        files = [place / name for name in (*state["files"], "state.json")]
        for number in range(80):
            path = files[number % len(files)]
            good = path.read_bytes()
            raw = bytearray(good)
            raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
            path.write_bytes(raw)
            with pytest.raises(ValueError, match=r"damaged|checksum|another version"):
                read_checkpoint(run)
            path.write_bytes(good)
        assert read_checkpoint(run)[1] == state

    @pytest.mark.parametrize("kept", [None, 20])
    def test_a_file_that_is_missing_or_cut_off(
        self, kept: int | None, run: Path, config: Config, options: Options
    ) -> None:
        place, state = read_checkpoint(run)
        path = place / next(iter(state["files"]))
        raw = path.read_bytes()
        path.unlink()
        if kept is not None:
            path.write_bytes(raw[:kept])
        with pytest.raises(
            ValueError, match=r"(is missing|has 20 bytes, and \d+ were written): the checkpoint is damaged"
        ):
            train(config, replace(options, resume=True))

    def test_an_expected_key(self, run: Path, config: Config, options: Options) -> None:
        place, state = read_checkpoint(run)
        del state["sums"]
        state.pop("crc32", None)
        (place / "state.json").write_bytes(sealed(state))
        with pytest.raises(ValueError, match="lacks sums: it is a checkpoint of another version"):
            train(config, replace(options, resume=True))

    def test_last_ones_and_the_best(self, config: Config, options: Options) -> None:
        config = config.replace(epochs=6, eval_every=1, lr=0.1, schedule="constant")
        result = train(config, replace(options, keep=2, keep_best=True))
        errors = {line["step"]: line["test_error"] for line in read_record(result.record).evaluations}
        best = min(errors, key=lambda step: errors[step])
        kept = [int(name) for name in checkpoints(options.out)]
        assert set(kept) == {best, 35, 42}
        assert read_state(options.out / CHECKPOINTS / f"{best:09d}")["metric"] == errors[best]

    def test_code_is_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import pickle

        class Hostile:
            def __reduce__(self) -> tuple:
                return os.mkdir, ("hostile",)

        monkeypatch.chdir(tmp_path)
        write_tensors(tmp_path / "x", {"a": torch.zeros(2)})
        (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(ValueError, match=r"it refers to (posix|nt)\.mkdir"):
            read_tensors(tmp_path / "x", {"a": torch.zeros(2)})
        assert not Path("hostile").exists()

    def test_what_is_no_tensor_is_not_read(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "x", {"a": "text"})
        with pytest.raises(ValueError, match="it holds entries that are not tensors"):
            read_tensors(tmp_path / "x", {"a": torch.zeros(2)})

    def test_another_model(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "x", {"a": torch.zeros(2)})
        for wrong in ({"b": torch.zeros(2)}, {"a": torch.zeros(3)}):
            with pytest.raises(ValueError, match="is damaged or of another model"):
                read_tensors(tmp_path / "x", wrong)

    def test_a_checkpoint_of_an_earlier_version(self, config: Config, options: Options) -> None:
        options.out.mkdir()
        (options.out / "checkpoint.pt").touch()
        with pytest.raises(ValueError, match="holds a run of an earlier version"):
            train(config, replace(options, resume=True))


class TestFolder:
    def test_two_processes_in_one_folder(
        self, config: Config, options: Options, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The second one is refused, as is another process the lock, and the first is what it would have been."""
        refused = []

        def second(run: Any, loss: float | None) -> bool:
            if run.step == 4:
                code = main(["train", "cifar", "--out", str(options.out), "--resume", "--quiet"])
                lock = f"import filelock; filelock.FileLock({str(options.out / '.lock')!r}, timeout=0).acquire()"
                command = [sys.executable, "-c", lock]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                refused.append((code, capsys.readouterr().err, done.stderr))
            return False

        assert train(config, options, watch=second).finished
        ((code, told, locked),) = refused
        assert code == 1
        assert "another process trains in" in told
        assert "Timeout" in locked
        assert train(config, replace(options, out=options.out.with_name("alone"))).finished
        assert_same(options.out, options.out.with_name("alone"))

    def test_nothing_is_left_of_a_run_that_never_began(self, config: Config, options: Options) -> None:
        with pytest.raises(FileNotFoundError):
            train(config, replace(options, data=Path("nowhere")))
        refused(ValueError, "240 images are less than one batch of 300", train, config.replace(batch_size=300), options)
        refused(ValueError, "rank", train, config.replace(structure="low_rank", options={"rank": 0}), options)
        refused(ValueError, "device 'cuda:7' does not exist", train, config.replace(device="cuda:7"), options)
        assert not options.out.exists()

    def test_a_file_in_its_place(self, config: Config, options: Options) -> None:
        options.out.touch()
        with pytest.raises(NotADirectoryError, match="is a file, a run needs a folder"):
            train(config, options)

    def test_cpu_with_a_number(self, config: Config, options: Options) -> None:
        assert train(config.replace(device="cpu:0"), options, watch=stop_after(2)).step == 2


class TestTrouble:
    def test_a_loss_that_is_not_finite(self, config: Config, options: Options) -> None:
        def break_it(run: Any, loss: float | None) -> None:
            if run.step == STEPS_PER_EPOCH + 2:
                run.model.output.factors[0].data.fill_(1e38)

        with pytest.raises(_run.TrainingError, match=r"step 10; the last good checkpoint is .*000000000"):
            train(config, options, watch=break_it)

    def test_weights_that_are_not_finite_are_not_saved(self, config: Config, options: Options) -> None:
        def break_it(run: Any, loss: float | None) -> bool:
            run.model.output.factors[0].data[0] = float("nan")
            return True

        with pytest.raises(_run.TrainingError, match=r"output.factors.0 is not finite after step 1"):
            train(config, options, watch=break_it)
        assert read_checkpoint(options.out)[1]["step"] == 0

    def test_an_error_of_the_loop_is_no_misuse(
        self, config: Config, options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cli
    ) -> None:
        """A ValueError in a step: a traceback, and exit code 1; in the options: one line, and 2."""
        from structlin_nn.recipes import cifar

        def broken(*arguments: Any) -> Any:
            raise ValueError("in the loop")

        line = f"train cifar --out {options.out} --epochs 1 --batch-size 1000 --width 16 --threads 1 --quiet"
        with monkeypatch.context() as patched:
            patched.setattr(cifar, "batch_rows", broken)
            assert main(line.split()) == 1
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert "ValueError: in the loop" in told
        told = cli(line, "--accumulate", "7", code=2).err
        assert "cannot be split into 7 parts" in told or "holds a run already" in told
        assert told.count("\n") == 1

    def test_a_large_loss_has_no_perplexity(self, gpt2_config: Any, text_tokens: Path, tmp_path: Path) -> None:
        """Above 709 nats exp is no float64; the loss is finite, and the run continues."""
        module = recipe_module("gpt2")

        def enlarge(run: Any, loss: float | None) -> None:
            if run.step == 4:
                run.model.head.factors[-1].data.mul_(1e6)

        options = module.Options(data=text_tokens, out=tmp_path / "run", quiet=True)
        config = gpt2_config.replace(ema=0.0, rms_cap=False, lr=1e-2)
        assert module.train(config, options, watch=enlarge).finished
        found = read_record(tmp_path / "run" / "record.jsonl").evaluations[1]
        assert found["val_loss"] > 709
        assert found["val_perplexity"] is None


class TestSignals:
    @pytest.fixture(autouse=True)
    def handlers(self) -> Iterator[None]:
        """After a signal the handler stays, for the seconds in which the process ends."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_write_a_checkpoint_and_stop(self, number: signal.Signals, config: Config, options: Options) -> None:
        def interrupt(run: Any, loss: float | None) -> None:
            if run.step == 9:
                os.kill(os.getpid(), number)

        result = train(config, options, watch=interrupt)
        assert (result.signal, result.step, result.finished) == (number, 10, False) or result.step == 9
        assert read_checkpoint(options.out)[1]["step"] == result.step
        assert train(config, replace(options, resume=True)).finished

    def test_a_second_one_is_an_order_only_when_it_comes_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(_run.time, "monotonic", lambda: now[0])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
        before = signal.getsignal(signal.SIGINT)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            now[0] = 4.0
            signal.raise_signal(signal.SIGINT)
            assert interruption.signal is signal.SIGINT
        signal.raise_signal(signal.SIGINT)  # while the process ends
        now[0] = 6.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before

    def test_works_outside_of_the_main_thread(self, config: Config, options: Options) -> None:
        def run() -> None:
            with execution.using("compare"):  # as by default, but not in these tests
                train(config, options, watch=stop_after(2))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert read_checkpoint(options.out)[1]["step"] == 2

    @pytest.mark.slow
    def test_two_quick_ones_on_the_command_line(self, options: Options) -> None:
        """Ctrl-C twice: exit code 130, and a checkpoint."""
        process = start(options.out, "--epochs 100000 --eval-every 100000")
        wait_for(options.out, process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert "SIGINT after step" in told


def start(out: Path, more: str) -> "subprocess.Popen[str]":
    line = f"train cifar --width 16 --batch-size 100 --threads 1 --out {out} --quiet --resume {more}"
    code = "import sys; from structlin_nn.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *line.split()], env=environment, text=True, **pipes)


def wait_for(folder: Path, process: "subprocess.Popen[str]", after: int = -1) -> None:
    """Wait until a run has the checkpoint of a step after this one."""
    deadline = time.monotonic() + 240
    try:
        while int((checkpoints(folder) or ["-1"])[-1]) <= after:
            assert time.monotonic() < deadline, "no checkpoint"
            assert process.poll() is None, process.communicate()
            time.sleep(0.003)
    except BaseException:
        process.kill()
        raise


@pytest.mark.slow
def test_kill_at_any_time(tmp_path: Path) -> None:
    """kill -9 at random times while each step writes a checkpoint, 10 times; then the run is that without a kill."""
    generator = np.random.default_rng(0)
    more = "--epochs 3 --steps 250 --checkpoint-minutes 0 --keep 3"
    steps = [-1]
    for _ in range(10):
        process = start(tmp_path / "run", more)
        wait_for(tmp_path / "run", process, steps[-1])  # else the kill would come before the first step
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.communicate()
        steps.append(read_checkpoint(tmp_path / "run")[1]["step"])
        if steps[-1] == 250:
            break
    assert len(steps) > 4
    assert steps == sorted(set(steps))
    for name in ("run", "whole"):
        process = start(tmp_path / name, more)
        assert process.wait(timeout=300) == 0, process.communicate()
    assert_same(tmp_path / "run", tmp_path / "whole")


class TestTelling:
    def test_a_line_of_the_log(self, config: Config, options: Options, capsys: pytest.CaptureFixture[str]) -> None:
        train(config, replace(options, quiet=False, log_every=5))
        told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "step      5" in line]
        assert len(told) == 1
        for word in ("of 21", "loss ", "lr ", "gradient ", "img/s", "FLOP/s", "GiB"):
            assert word in told[0]

    def test_the_norm_does_not_change_a_step(self, config: Config, options: Options, tmp_path: Path) -> None:
        """float32 without clipping: with and without lines of the log."""
        train(config, replace(options, log_every=1))
        train(config, replace(options, log_every=0, out=tmp_path / "other"))
        assert_same(options.out, tmp_path / "other")

    def test_tensorboard(self, config: Config, options: Options) -> None:
        pytest.importorskip("tensorboard")
        train(config, replace(options, track=("tensorboard",)))
        assert list((options.out / "tensorboard").glob("events.*"))

    def test_a_tracker_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_run.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"needs the package wandb: pip install 'structlin\[tracking\]'"):
            Options(track=("wandb",))


def test_counts_and_layers_of_the_header(config: Config, options: Options) -> None:
    record = read_record(train(config, options).record)
    counts, layers = record.header["counts"], record.header["structures"]
    model = load_trained(options.out)
    assert counts["params"] == sum(p.numel() for p in model.parameters())
    assert counts["forward_macs"] == sum(layer["macs"] for layer in layers)
    for layer in layers:
        base = 3072 if layer["name"] == "input" else {"up": 64, "down": 256, "output": 64}[layer["name"].split(".")[-1]]
        extra = 0.1 if layer["name"] == "input" else 1.0
        for factor in layer["factors"]:
            expected = extra * base / (factor["fan_in"] * len(layer["factors"]))
            assert factor["lr_multiplier"] == pytest.approx(expected), layer["name"]
    assert structlin.__version__ == record.header["versions"]["structlin"]
