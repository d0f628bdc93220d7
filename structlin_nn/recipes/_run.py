"""The run of a recipe: its folder, record, checkpoints, signals and trackers.

A folder has ``record.jsonl`` (`structlin_nn.records`), ``ways.json`` (how products are run), ``.lock``, which the
process that trains there holds, and ``checkpoints/STEP/`` (`structlin_nn.checkpoints`). A checkpoint is written beside
its place, and renamed when all of it is on the disk.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Self

import filelock
import tyro

import structlin
from structlin import execution
from structlin.execution.wisdom import processor
from structlin_nn._files import atomic_write, cores, sync_folder
from structlin_nn._text import progress_bar
from structlin_nn.checkpoints import CHECKPOINTS, checkpoints, file_sha256, read_checkpoint, read_state
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.records import RecordWriter, sealed, unsealed

BEGUN = "The run had begun."
"""Note on errors after the start of a run, which are no misuse."""
RECORD, WAYS = "record.jsonl", "ways.json"
SAME_SECONDS = 5.0
"""A signal sooner after the first is the same request: Ctrl-C reaches a process, and torchrun forwards it."""


class TrainingError(RuntimeError):
    """Training cannot continue: the loss or the weights are no longer finite."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Files and output of a run, which do not change its result."""

    data: Path | None = None  # folder of the data
    out: Path | None = None  # folder of the run (default: under runs/)
    resume: bool = False  # resume the run in --out; on a CPU the result is bit-identical
    init_from: str | None = None  # trained weights to start from: a .safetensors file, a run, or published GPT-2
    parallel: Literal["ddp", "fsdp"] = "ddp"  # the model is whole in each process (ddp), or sharded (fsdp)
    checkpoint_minutes: float = 5.0  # minutes between checkpoints; each evaluation writes one too
    keep: int = 1  # number of last checkpoints to keep
    keep_best: bool = False  # also keep the checkpoint of the best evaluation
    log_every: int = 100  # steps between lines on stderr, 0 for none
    track: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.arg(metavar="[{tensorboard,wandb} ...]")
    ] = ()
    """Trackers to which evaluations and lines are also logged (the extra 'tracking')."""
    quiet: bool = False  # print neither bar nor log
    json: bool = False  # print the last evaluation as JSON

    def __post_init__(self) -> None:
        require(self.checkpoint_minutes >= 0, f"checkpoint_minutes must be at least 0, got {self.checkpoint_minutes:g}")
        require(self.keep >= 1 and self.log_every >= 0, "keep must be at least 1 and log_every at least 0")
        for name in self.track:
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"tracking by {name} needs the package {name}: pip install 'structlin[tracking]'")

    def needs(self, what: str) -> Path:
        """Return the folder of the data; ValueError, which describes them, if none is given."""
        if self.data is None:
            raise ValueError(f"--data is needed: {what}")
        return self.data


@dataclass(frozen=True)
class Result:
    """The end of a run: `step` of `steps`, its last `evaluation`, and the `signal` that interrupted it, or None."""

    folder: Path
    step: int
    steps: int
    signal: signal.Signals | None
    evaluation: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.steps

    @property
    def record(self) -> Path:
        """The run record."""
        return self.folder / RECORD


class Run:
    """A run in its folder, from its lock to its result: a context in which a recipe trains.

    `group` are the processes that train together. `watch(run, loss)` is called after every step; the loss is None if it
    was not fetched. If `watch` returns True, the run writes a checkpoint and ends, as after SIGINT or SIGTERM.

    Attributes
    ----------
    step, steps
        Steps done, and those of the whole run.
    last
        The last line of the record.
    state
        State of the checkpoint that the run resumes from; None for a new run.

    Raises
    ------
    FileExistsError, BlockingIOError
        The folder holds a run, and `options.resume` is False; another process trains.
    ValueError
        A damaged checkpoint, or one of another configuration (the message names the differing keys).
    """

    versions: Sequence[str] = ("torch",)

    def __init__(
        self, config: RunConfig, options: Options, group: Any,
        watch: Callable[[Run, float | None], bool | None] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.options, self.group, self.watch = config, options, group, watch
        self.recipe = type(config).__module__.rpartition(".")[2]
        self.folder = default_folder(config) if options.out is None else Path(options.out)
        self.step, self.steps, self.seconds, self.training_seconds = 0, 0, 0.0, 0.0
        self.last: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.check_every = 1
        self.stopped: signal.Signals | bool | None = None
        self.state: dict[str, Any] | None = None
        self._losses: list[Any] = []
        self._saved: tuple[int, int | None] | None = None
        self._trackers: list[Any] = []
        self._metrics: dict[str, float | None] = {}
        self._closing = ExitStack()

    # The folder

    def __enter__(self) -> Self:
        self._clock = self._saved_at = time.monotonic()
        with ExitStack() as closing:
            self._interruption = closing.enter_context(Interruption())
            self.state = self.group.first(lambda: self._open(closing))
            self._closing = closing.pop_all()
        if self.state is not None:
            # The numbers of all processes are those of the checkpoint.
            self.step, self.seconds, self.last = (self.state[key] for key in ("step", "seconds", "last"))
            self.training_seconds = self.state["training_seconds"]
            execution.pin(self.state["execution"])
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self.steps:
            error.add_note(BEGUN)
        self._closing.close()

    def _open(self, closing: ExitStack) -> dict[str, Any] | None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, a run needs a folder")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            closing.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
        except filelock.Timeout:
            raise BlockingIOError(
                f"another process trains in {folder}: wait for it, or choose another folder"
            ) from None
        closing.callback(self._remove_unbegun, made)
        names = checkpoints(folder)
        if ((folder / RECORD).exists() or names) and not self.options.resume:
            raise FileExistsError(
                f"{folder} holds a run already: resume it (--resume), or choose another folder (--out)"
            )
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder} holds a run of an earlier version, which this one cannot resume")
        if not names:
            return None
        place, state = read_checkpoint(folder)
        if state["recipe"] != self.recipe:
            raise ValueError(f"the run in {folder} is one of {state['recipe']}, and this is one of {self.recipe}")
        self.config.check_continues(type(self.config).from_dict(state["config"]), folder)
        if not (folder / RECORD).exists():
            raise FileNotFoundError(f"{folder / RECORD} is missing, it belongs to {place}")
        return state

    def _remove_unbegun(self, made: Sequence[Path]) -> None:
        if made and not (self.folder / RECORD).exists():
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            (self.folder / ".lock").unlink(missing_ok=True)
            for path in made:
                if not any(path.iterdir()):
                    path.rmdir()

    # The record

    def begin(self, *, steps: int, counts: dict[str, int], outputs: int, data: dict[str, Any], **header: Any) -> None:
        """Start the record, or truncate it to the checkpoint; print data and model.

        `counts` are as `structlin_nn.records` describes them; `outputs` is the number of classes or tokens; `data`
        (with ``sha256``) and `header` are entries of the header. ValueError for other data than those of the
        checkpoint, or a record that does not belong to it.
        """
        self.counts, self.outputs, self.digest = counts, outputs, data["sha256"]
        if self.state is not None and self.state["data"] != self.digest:
            raise ValueError(f"the run in {self.folder} was trained on other {data['name']} data than these")

        def write() -> tuple[RecordWriter, list[str]]:
            if self.state is not None:
                writer, messages = RecordWriter.reopen(self.folder / RECORD, self.state["record_size"])
                return writer, [f"resuming {self.folder} after step {self.step} of {steps}", *messages]
            began = [f"{self.folder} holds no checkpoint: starting from the beginning"] if self.options.resume else []
            made = {
                "started": datetime.now(UTC).isoformat(timespec="seconds"), "task": self.config.task,
                "recipe": self.recipe, "config": self.config.to_dict(), "seed": self.config.seed, "data": data,
                "counts": counts, "versions": versions(self.versions), **header,
            }  # fmt: skip
            return RecordWriter.create(self.folder / RECORD, made), began

        self._record, messages = self.group.first(write)
        self.steps = steps  # from here on the run has begun
        if self.state is not None:
            self._saved = self._reached
        self._clock = time.monotonic() - self.seconds
        self._saved_at = self._logged_at = self._mark = time.monotonic()
        self._logged = self.step
        if self.group.main:
            with (self.folder / RECORD).open("rb") as file:
                started = unsealed(self.folder / RECORD, file.readline())["started"]
            told = (self.folder, self.config.to_dict(), started, self.step)
            for name in dict.fromkeys(self.options.track):
                log, close = TRACKERS[name](*told)
                self._trackers.append(log)
                self._closing.callback(close)
        quiet = self.options.quiet or not self.group.main
        label = f"{self.config.structure} {self.config.width or self.config.model}"
        total, done = steps * self.config.batch_size, self.step * self.config.batch_size
        bar = progress_bar(total, label, done=done, unit=self.config.unit, quiet=quiet)
        self._bar = self._closing.enter_context(bar)
        shown = {k.replace("_", " "): f"{v:,}" if isinstance(v, int) else v for k, v in data.items()}
        said = ", ".join(f"{key} {value}" for key, value in shown.items() if key not in ("name", "sha256"))
        shape = f", width {self.config.width}" if self.config.width else ""
        messages += [
            f"data: {data['name']}; {said}",
            f"model: {self.config.model}{shape}, {self.config.structure} {self.config.options or ''}".rstrip(),
            f"counts: {counts['params']:,} parameters, {counts['forward_macs']:,} MACs for one sample forward, "
            f"{counts['total_training_macs']:.3g} for the whole run of {steps:,} steps",
        ]
        dear = [layer for layer in header["structures"] if layer["macs"] > layer["in_features"] * layer["out_features"]]
        if dear:
            messages.append(
                f"layers with more MACs than dense ones: {len(dear)} of {len(header['structures'])}; {dear[0]['name']} "
                f"has {dear[0]['macs']:,}, and a dense one {dear[0]['in_features'] * dear[0]['out_features']:,}"
            )
        for line in (*messages, f"writing to {self.folder}"):
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line on stderr, in the first process."""
        if not self.options.quiet and self.group.main:
            self._bar.write(text, file=sys.stderr)

    def peak(self) -> float | None:
        """Return the most FLOP/s that a device can do, None where that is not known."""
        return None

    def memory(self) -> int:
        """Return the most bytes that this process held at once."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def result(self) -> Result:
        """Return the end of the run."""
        stopped = self.stopped if isinstance(self.stopped, signal.Signals) else None
        return Result(self.folder, self.step, self.steps, stopped, self.last)

    # Checkpoints

    def save(self, metric: float | None = None) -> None:
        """Write a checkpoint; all processes call it.

        The last checkpoint stays if a weight is not finite (TrainingError) or the disk is full (OSError).
        """
        wrong = self.not_finite()
        if self.group.largest(int(wrong is not None)):
            named = wrong or "a weight in another process"
            raise TrainingError(f"{named} is not finite after step {self.step}; {self.good()}")
        if self._saved == self._reached:
            return
        place = self.folder / CHECKPOINTS / f"{self.step:09d}"
        partial = place.with_name(f"{place.name}.partial")

        def finish(files: dict[str, Any]) -> None:
            state = {
                "recipe": self.recipe, "config": self.config.to_dict(), "data": self.digest, "outputs": self.outputs,
                "step": self.step, "seconds": self.seconds, "training_seconds": self.training_seconds,
                "last": self.last, "metric": metric, "record_size": self._record.size, "files": files, **own,
            }  # fmt: skip
            with atomic_write(partial / "state.json") as file:
                file.write(sealed(state))
            if place.exists():  # of a run that was resumed from an older one
                place.rename(place.with_name(f"{place.name}.old.partial"))
            partial.rename(place)
            sync_folder(place.parent)
            self._metrics[place.name] = metric
            self._prune()
            text = json.dumps({"threads": self.config.threads, "ways": own["execution"]}, indent=1, sort_keys=True)
            with atomic_write(self.folder / WAYS) as file:
                file.write(text.encode())

        self.group.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        try:
            partial.mkdir(parents=True, exist_ok=True)
            own = self.write(partial)
            sums = {}
            for path in sorted(partial.rglob("*")):
                if path.is_file() and self.writes(path.name):
                    sums[path.relative_to(partial).as_posix()] = [path.stat().st_size, file_sha256(path)]
            files = {name: entry for some in self.group.gather(sums) for name, entry in some.items()}
            self.group.first(lambda: finish(files))
        except Exception as error:
            if self.group.main:
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno, f"the checkpoint {place} could not be written: {error.strerror or error}"
            ) from error
        self._saved, self._saved_at = self._reached, time.monotonic()

    @property
    def _reached(self) -> tuple[int, int | None]:
        # The same in all processes; only the first one knows the size of the record.
        return self.step, self.last.get("step")

    def writes(self, name: str) -> bool:
        """Whether this process wrote the file of that name in a checkpoint."""
        return True

    def _prune(self) -> None:
        names = checkpoints(self.folder)
        kept = set(names[-self.options.keep :])
        if self.options.keep_best:
            for name in names:
                if name not in self._metrics:
                    self._metrics[name] = read_state(self.folder / CHECKPOINTS / name)["metric"]
            known = {n: m for n in names if (m := self._metrics[n]) is not None}
            kept |= {min(known, key=lambda name: known[name])} if known else set()
        for path in (self.folder / CHECKPOINTS).iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def good(self) -> str:
        """Return a phrase that names the last checkpoint."""
        names = checkpoints(self.folder)
        return f"the last good checkpoint is {self.folder / CHECKPOINTS / names[-1]}" if names else "no checkpoint yet"

    # Implemented for each framework

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors of a checkpoint into a folder, and return the entries of ``state.json`` for them."""
        raise NotImplementedError

    def not_finite(self) -> str | None:
        """Return the name of a weight of this process that is not finite, or None."""
        raise NotImplementedError


def default_folder(config: Any) -> Path:
    """Return the default of `Options.out`."""
    data = f"{config.data_set}-" if hasattr(config, "data_set") else ""
    model = config.model.replace(":", "-").replace("/", "-")
    width = f"-w{config.width}" if config.width else ""
    flax = "flax-" if type(config).__module__.rpartition(".")[2].startswith("flax") else ""
    return Path(f"runs/{data}{flax}{model}-{config.structure}{width}-seed{config.seed}")


class Interruption:
    """Keep the first SIGINT or SIGTERM within the block in `signal`; one after `SAME_SECONDS` acts as usual.

    A nested block is the outer one. After a signal the handler stays, and later signals are ignored while the process
    ends: Python restores their defaults then, and the exit code would be that of a killed process. Outside of the main
    thread, where Python cannot handle signals, the block changes nothing.
    """

    active: Interruption | None = None

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> Interruption:
        if Interruption.active is not None:
            return Interruption.active
        if threading.current_thread() is threading.main_thread():
            Interruption.active = self
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if Interruption.active is self:
            Interruption.active = None
            if self.signal is None:
                self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), time.monotonic()
            atexit.register(_ignore)
        elif time.monotonic() - self._first > SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)


def _ignore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def scalars(evaluation: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of an evaluation, nested ones by their path, without None.

    Examples
    --------
    >>> scalars({"test_loss": 0.5, "batch_loss": None, "statistics": {"gains": {"input": 1.0}}})
    {'test_loss': 0.5, 'statistics/gains/input': 1.0}
    """
    found: dict[str, float] = {}
    for key, value in evaluation.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[prefix + key] = float(value)
    return found


def _tensorboard(folder: Path, config: Mapping[str, Any], started: str, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Hide values that an interrupted run wrote after its last checkpoint.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, config: Mapping[str, Any], started: str, step: int) -> Tracker:
    import wandb

    name = folder.resolve().name
    number = hashlib.sha256(f"{name} {started}".encode()).hexdigest()[:16]  # the same for a run and its resumption
    run = wandb.init(project="structlin", name=name, id=number, resume="allow", dir=str(folder), config=dict(config))
    return lambda values, step: run.log(dict(values), step=step), run.finish


Tracker = tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]
"""A function that logs values of a step, and one that ends."""
TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def versions(more: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "structlin": structlin.__version__}
    for name in ("numpy", "cola-ml", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def hardware(threads: int, device: str) -> dict[str, Any]:
    """Return a description of the processor, without the name of the machine."""
    found = processor()
    name = found.get("model name") or found["name"] or "unknown"
    return {
        "system": platform.system(), "machine": found["machine"], "cpu": name, "cores": cores(), "threads": threads,
        "device": device,
    }  # fmt: skip
