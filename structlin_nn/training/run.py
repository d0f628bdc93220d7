"""A run between two steps: what the loop changes and a checkpoint holds."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin import execution
from structlin_nn._files import atomic_write
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.training import checkpoint as files
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import config_from_dict
from structlin_nn.training.distributed import Processes, local, shard_like
from structlin_nn.training.header import count_run, make_header
from structlin_nn.training.model import make_model, make_optimizer
from structlin_nn.training.records import RecordWriter
from structlin_nn.training.sharded import load_shards, remove_shards, save_shards
from structlin_nn.training.statistics import Probe
from structlin_nn.training.stepper import Stepper
from structlin_nn.training.task import Task, make_task
from structlin_nn.training.weights import InitialWeights, open_weights

__all__ = ["CHECKPOINT", "RECORD", "Run", "TrainingError", "load_trained", "setup"]

RECORD, CHECKPOINT, WAYS = "record.jsonl", "checkpoint.pt", "ways.json"


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the weights are no longer finite."""


@dataclass
class Run:
    """A run between two steps, in one of its processes.

    Attributes:
        model: the model itself; `stepper.wrapped` is what a step calls.
        task: data, loss and evaluation.
        step: steps done.
        sums: statistics of the steps since the last evaluation (`Task.add`).
        last: the last line of the record.
        shards: where the last checkpoint has its tensors, None where they are in its file.
        layout: of the model's layers, where it is not the configuration's; `init_from`: what it started from, as the
            header has it, or None.
        messages: for the reader, from `setup`.
    """

    config: RunConfig
    folder: Path
    task: Task
    processes: Processes
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    counts: dict[str, int]
    record: RecordWriter
    sums: Tensor
    probe: Probe | None = None
    step: int = 0
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    init_from: dict[str, Any] | None = None
    messages: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.task.steps

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.processes.device

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is."""
        return self.folder / CHECKPOINT

    def call(self, *inputs: Any, **options: Any) -> Any:
        """The forward pass for evaluation, in the configuration's precision."""
        # Never the compiled code: it is for the shapes of a step, and has no place for the hooks of a probe.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with self.stepper.autocast(), eager:
            if not self.processes.sharded:
                return self.model.forward(*inputs, **options)  # needs no other process
            found = self.stepper.wrapped(*inputs, **options)
            self.stepper.wrapped.reshard()  # type: ignore[operator]  # which only a backward pass does by itself
            return found

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model, or the average of its weights where the configuration asks for one."""
        was_training = self.model.training
        self.model.eval()
        average = self.stepper.average
        with torch.no_grad(), nullcontext() if average is None else average.in_place():
            found = self.task.evaluate(self.call, self.step, self.sums.tolist())
        if self.probe is not None:
            found["statistics"] = self.probe.statistics()
        self.model.train(was_training)
        return found

    def tensors(self) -> dict[str, Any]:
        """The tensors of model, optimiser and average, by names of parameters."""
        state = self.stepper.state()
        return {"model": self.model.state_dict(), "optimizer": state["optimizer"], "average": state["average"]}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, apart from `tensors`."""
        return {
            "task": self.config.task,
            "config": self.config.to_dict(),
            "data": self.task.digest,
            "outputs": self.task.outputs,
            "layout": self.layout,
            "init_from": self.init_from,
            "scaler": self.stepper.scaler.state_dict(),
            "position": self.task.state_dict(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums.cpu(),
            "probe": None if self.probe is None else self.probe.state(),
            "last": self.last,
            "record_size": self.record.size,
            "execution": self.ways(),
        }

    def ways(self) -> dict[str, str]:
        """How each product of the model was run so far in this process (`structlin.execution.decisions`)."""
        return execution.decisions({m.structure for m in self.model.modules() if isinstance(m, StructuredLinear)})

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the step at which a checkpoint was written, in whatever number of processes."""
        execution.pin(state.get("execution", {}))  # which checkpoints of earlier versions lack
        tensors = state if state["shards"] is None else self._read_shards(state)
        place_model(self.model, tensors["model"])
        self.stepper.restore({**tensors, "scaler": state["scaler"]})
        self.task.load_state_dict(state["position"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.step, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        self.sums = state["sums"].to(self.device)
        self.shards = state["shards"]
        if self.probe is not None and state["probe"] is not None:  # which checkpoints of earlier versions lack
            self.probe.restore(state["probe"])

    def save(self) -> None:
        """Write a checkpoint; all processes call it.

        Raises:
            TrainingError: a weight is not finite; the last checkpoint stays.
            OSError: the disk is full; the last checkpoint stays.
        """
        wrong = [n for n, p in self.model.named_parameters() if not bool(torch.isfinite(local(p)).all())]
        if self.processes.any(bool(wrong)):
            named = wrong[0] if wrong else "a weight in another process"
            raise TrainingError(f"{named} is not finite after step {self.step}; {self.good()}")
        tensors, state = self.tensors(), self.state()
        if self.processes.sharded:
            optimizer = {name: _as_tensors(entries) for name, entries in tensors["optimizer"].items()}
            current = None if self.shards is None else self.shards["slot"]
            self.shards = save_shards(self.folder, current, {**tensors, "optimizer": optimizer}, self.processes)
            state |= {"shards": self.shards, "optimizer_keys": {n: list(e) for n, e in optimizer.items()}}
        else:
            self.shards = None
            state |= {"shards": None, **tensors}
        self.processes.first(lambda: files.save_checkpoint(self.checkpoint, state))
        if self.processes.main:
            self._write_ways()
            remove_shards(self.folder, None if self.shards is None else self.shards["slot"])

    def _write_ways(self) -> None:
        """Say beside the record how the products of the model are run."""
        text = json.dumps({"threads": torch.get_num_threads(), "ways": self.ways()}, indent=1, sort_keys=True)
        with atomic_write(self.folder / WAYS) as file:
            file.write(text.encode())

    def good(self) -> str:
        """A phrase that names the last checkpoint."""
        return f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"

    def _read_shards(self, state: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a sharded checkpoint, sharded as they are needed here."""
        parameters = dict(self.model.named_parameters())
        average = {} if self.stepper.average is None else self.stepper.average.tensors
        tensors = {
            "model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": {
                name: {key: _empty(key, parameters[name]) for key in keys if name in parameters}
                for name, keys in state["optimizer_keys"].items()
            },
            "average": {name: tensor.clone() for name, tensor in average.items()},
        }
        load_shards(self.folder, state["shards"], tensors, self.processes)
        return tensors


def setup(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    resume: bool = False,
    processes: Processes | None = None,
    init_from: str | os.PathLike[str] | InitialWeights | None = None,
    **data: Any,
) -> Run:
    """Load the data, build the model, and start a record, or take a run up where its last checkpoint left it.

    Args:
        config: the configuration, of any pipeline.
        folder: where record and checkpoint are or will be; it is made.
        data_root: where the data are. CIFAR: its files (`structlin_nn.data.load_images`); None for the embedded
            images.
        resume: go on with the run in `folder`. Where none was begun there, one is, and `Run.messages` says so.
        processes: that train together (`structlin_nn.training.distributed.processes`); None for this one alone.
        init_from: trained weights to start from (`structlin_nn.training.weights.open_weights`). The structured layers
            are those of the file, whatever the structure of the configuration is called; the sizes of the model have
            to be its own (`InitialWeights.fields` gives them). A run that goes on needs it no more.
        **data: what else the pipeline's task takes: ``verify=False`` does not compare CIFAR with its official sums.

    Raises:
        FileNotFoundError: data that are not there.
        FileExistsError: `folder` holds a run, and `resume` is False.
        ValueError: damaged data or checkpoint, a structure that the sizes do not allow, a device that is not
            there, or a run with another configuration, other data or other initial weights than the one to be
            resumed (the message names the differing keys); weights that do not fit the model.
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    record, checkpoint = folder / RECORD, folder / CHECKPOINT
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, a run needs a folder")
    if (record.exists() or checkpoint.exists()) and not resume:
        raise FileExistsError(f"{folder} holds a run already: resume it, or choose another folder")
    state = files.load_checkpoint(checkpoint) if checkpoint.exists() else None
    if state is not None:
        config.check_continues(config_from_dict(state["task"], state["config"]), folder)
    if processes is None:
        from structlin_nn.training.distributed import single

        processes = single(config.device)
    task = make_task(config, processes, data_root=data_root, **data)
    if state is not None and state["data"] != task.digest:
        named = getattr(config, "data_set", config.task)
        raise ValueError(f"the run in {folder} was trained on other {named} data than these")

    weights, layout, started = _initial(config, folder, state, init_from)
    torch.manual_seed(config.seed)
    model = make_model(config, task.outputs, processes.device, layout)
    if weights is not None:
        weights.put_into(model)
    blocks = list(getattr(model, "blocks", ()))
    if config.compile:
        for module in blocks if processes.sharded else (model,):
            module.compile()
    wrapped = processes.wrap(model, blocks)
    optimizer, _ = make_optimizer(config, model, task.outputs)
    counts = count_run(config, task.outputs, task.steps, layout)
    messages: list[str] = []
    processes.barrier()  # nobody looks for a record any more
    if state is not None:
        if not record.exists():
            raise FileNotFoundError(f"{record} is missing, it belongs to {checkpoint}")
        size = state["record_size"]
        writer, messages = processes.first(lambda: RecordWriter.reopen(record, size))
        messages.insert(0, f"resuming {folder} after step {state['step']} of {task.steps}")
    else:
        if resume:
            messages.append(f"{folder} holds no checkpoint: starting from the beginning")
        header = make_header(config, task.described(), counts, model, optimizer, processes, started)
        writer = processes.first(lambda: RecordWriter.create(record, header))
    run_kind, stepper = Run, Stepper(config, model, wrapped, optimizer, processes)
    if getattr(config, "framework", "torch") == "flax":
        from structlin_nn.training.flax_loop import FlaxRun, FlaxStepper

        run_kind, stepper = FlaxRun, FlaxStepper(config, model, task.outputs, processes)
    made = run_kind(
        config=config,
        folder=folder,
        task=task,
        processes=processes,
        model=model,
        optimizer=optimizer,
        stepper=stepper,
        counts=counts,
        record=writer,
        sums=torch.zeros(task.sums, dtype=torch.float64, device=processes.device),
        messages=messages,
        layout=layout,
        init_from=started,
    )
    made.probe = Probe(model, made.call, task.probe())
    if state is not None:
        made.restore(state)
    return made


def _initial(
    config: RunConfig, folder: Path, state: dict[str, Any] | None, init_from: Any
) -> tuple[InitialWeights | None, dict[str, Any] | None, dict[str, Any] | None]:
    """Weights to start from, the layout of the layers, and what the header says; None where there is nothing."""
    if init_from is not None and getattr(config, "framework", "torch") != "torch":
        raise ValueError("init_from needs framework='torch'")
    if state is None:
        if init_from is None:
            return None, None, None
        weights = init_from if isinstance(init_from, InitialWeights) else open_weights(init_from)
        return weights, weights.layout, weights.described()
    started = state.get("init_from")
    if init_from is not None and started is None:
        raise ValueError(f"the run in {folder} did not start from trained weights")
    if isinstance(init_from, InitialWeights) and init_from.sha256 != started["sha256"]:
        raise ValueError(f"the run in {folder} started from other weights than {init_from.name}: {started['file']}")
    return None, state.get("layout"), started


def load_trained(folder: str | os.PathLike[str], *, average: bool = False) -> nn.Module:
    """The model of a run as its last checkpoint has it, on the CPU and in evaluation mode.

    Args:
        folder: of the run.
        average: the average of the weights instead of the weights.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged checkpoint, or a run without an average.
    """
    folder = Path(folder)
    state = files.load_checkpoint(folder / CHECKPOINT)
    config = config_from_dict(state["task"], state["config"]).replace(recompute=False, compile=False)
    if average and not config.ema:
        raise ValueError(f"the run in {folder} keeps no average of its weights (ema is 0)")
    with torch.random.fork_rng(devices=[]):
        model = make_model(config, state["outputs"], "cpu", state.get("layout"))
    tensors = state
    if state["shards"] is not None:
        from structlin_nn.training.distributed import single

        tensors = {"model": model.state_dict()}
        if average:
            tensors["average"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        load_shards(folder, state["shards"], tensors, single("cpu"))
    place_model(model, tensors["model"])
    if average:
        place_model(model, {**tensors["model"], **tensors["average"]})
    return model.eval()


@torch.no_grad()
def place_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model, sharded or not, the tensors of another with the same names; ValueError where they differ."""
    own = model.state_dict()
    if missing := own.keys() ^ tensors.keys():
        raise ValueError(f"the checkpoint is of another model: {', '.join(sorted(missing)[:5])}")
    for name, tensor in own.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            raise ValueError(f"the checkpoint has {name} of shape {tuple(given.shape)}, here {tuple(tensor.shape)}")
        tensor.copy_(given if hasattr(given, "placements") else shard_like(given, tensor))


def _as_tensors(entries: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in entries.items()}


def _empty(key: str, parameter: Tensor) -> Tensor:
    return torch.zeros(()) if key == "step" else torch.zeros_like(parameter.detach())
