"""The steps of a recipe, and the run of one in torch: model, optimiser and checkpoints."""

from __future__ import annotations

import base64
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from structlin import execution
from structlin_nn._shards import read_tensors, write_tensors
from structlin_nn.checkpoints import CHECKPOINTS
from structlin_nn.counting import DEVICES, count
from structlin_nn.recipes._config import RunConfig, require
from structlin_nn.recipes._probe import Probe
from structlin_nn.recipes._processes import Processes, local
from structlin_nn.recipes._run import Options, Run, TrainingError, hardware, scalars
from structlin_nn.torch import Muon, StructuredLinear, parameter_groups
from structlin_nn.trained import described, model_of, starting_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def count_run(
    build: Callable[..., nn.Module], config: RunConfig, outputs: int, steps: int, sample: Tensor
) -> dict[str, int]:
    """Return parameters, MACs of one sample, and the size of the run, counted on the meta device."""
    with torch.device("meta"):
        model = build(config.replace(recompute=False), outputs)
    try:
        # In training mode, batch norm refuses a single value for each channel.
        counted = count(model.eval(), sample.to("meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{config.model} does not take inputs of shape {tuple(sample.shape)}: {error}") from error
    samples = steps * config.batch_size
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_params": counted.trainable_params, "embedding_params": counted.embedding_params,
        "forward_macs": counted.macs(), "training_macs": counted.training_macs, "other_flops": counted.other_flops,
        "training_other_flops": counted.training_other_flops, "steps": steps, "samples": samples,
        "total_training_macs": counted.training_macs * samples,
        "total_training_flops": counted.training_flops * samples,
    }  # fmt: skip


def base_of(build: Callable[..., nn.Module], config: RunConfig, outputs: int) -> nn.Module | None:
    """Return the dense model at base width, on the meta device, with the recipe's heads if they divide the width.

    None for a model that has its own width: each layer is its own base.
    """
    if config.has_own_width:
        return None
    changes: dict[str, Any] = {"width": config.base_width, "structure": "dense", "options": {}, "rms_cap": False}
    if config.is_named and hasattr(config, "heads"):
        changes["heads"] = math.gcd(type(config).heads, config.base_width)
    if hasattr(config, "head_dim"):
        changes["head_dim"] = 0
    if expansion := getattr(config, "base_expansion", 0):
        changes["expansion"] = expansion
    with torch.device("meta"):
        return build(config.replace(**changes, recompute=False), outputs)


def make_optimizer(config: RunConfig, model: nn.Module, base: nn.Module | None, **rules: Any) -> torch.optim.Optimizer:
    """Return the optimiser, with the learning rates of `structlin_nn.torch.parameter_groups` before the schedule.

    ``base``: the dense model at base width, on the meta device: ``config.lr`` is its rate. None: each layer is its own
    base, and ``config.lr`` is the rate of the dense model of this width. ``rules``: of `parameter_groups`.
    """
    groups = parameter_groups(
        model, base, lr=config.lr, weight_decay=config.weight_decay, optimizer=config.optimizer,
        structure_aware=config.structure_aware, independent_decay=config.independent_decay,
        adam_lr=config.adam_lr or None, **rules,
    )  # fmt: skip
    if config.optimizer == "muon":
        return Muon(groups, lr=config.lr, betas=config.betas)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, lr=config.lr, betas=config.betas, fused=True)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor; on CUDA by a copy from pinned memory, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Average:
    """Exponential moving average of parameters and buffers: ``average += (1 - decay) * (value - average)``.

    Buffers of integers are those of the model. By hand, because `torch.optim.swa_utils.AveragedModel` copies a module,
    which sharded modules do not allow, and evaluates the copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, held = decay, {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = {name: value for name, value in held.items() if value.is_floating_point()}
        self.tensors = {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current values."""
        for name, value in self.values.items():
            self.tensors[name].lerp_(value.detach(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged values within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            kept = value.detach().clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


class Steps(Run):
    """The steps and evaluations of a run, in torch or flax.

    `probe` measures features and gains, `sums` are those of the recipe between evaluations, `warmup` is a number of
    steps.
    """

    probe: Probe
    sums: Any
    warmup: int

    def evaluated(self, found: dict[str, Any], summary: str, metric: str) -> None:
        """Add an evaluation to the record, and write a checkpoint; all processes call it.

        `found` are its entries of this recipe, `summary` is a line, and `metric` is the key of the value to minimise
        (`keep_best`). TrainingError if a number is not finite.
        """
        self.fetch_losses()
        found = {**found, "statistics": self.probe.statistics()}
        if not all(abs(value) < float("inf") for value in found.values() if isinstance(value, float)):
            raise TrainingError(f"the loss at the evaluation after step {self.step} is not finite; {self.good()}")
        samples = self.step * self.config.batch_size
        self.seconds = time.monotonic() - self._clock
        self.last = {
            "step": self.step, "samples": samples, "training_macs": samples * self.counts["training_macs"],
            "lr": self.config.lr * self.share(max(self.step - 1, 0)), **found, "seconds": round(self.seconds, 3),
            "training_seconds": round(self.training_seconds, 3),
        }  # fmt: skip
        self.sums[:] = 0
        self.group.first(lambda: self._record.append(self.last))
        self.save(found[metric])
        for log in self._trackers:
            log(scalars(self.last), self.step)
        self.say(summary)
        self._mark = time.monotonic()

    def share(self, step: int) -> float:
        """Return the share of the learning rate that step number `step` (from 0) takes.

        The warm-up rises linearly and reaches 1 at step `warmup`; from there on the share is 1 (``constant``), or
        ``final_lr + (1 - final_lr) (1 + cos(pi t)) / 2`` with t rising from 0 to 1 at `steps`, a step that is never
        taken (Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017, equation 5).
        """
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.config.schedule == "constant":
            return 1.0
        fallen = (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        return fallen if self.config.final_lr == 0 else self.config.final_lr + (1 - self.config.final_lr) * fallen

    def training(self, evaluate: Callable[[], None], every: int, measure_every: int = 0) -> Iterator[None]:
        """Iterate over the steps that are left, each of which ends with a call of `stepped`.

        `evaluate` is called before the first step, after each `every` steps, and after the last. The change of features
        is measured in the steps before evaluations, or in each `measure_every`-th.
        """
        if not self.last:
            evaluate()
        while self.step < self.steps and not self.stopped:
            evaluates = self.step + 1 == self.steps or (self.step + 1) % every == 0
            self._measures = (self.step + 1) % measure_every == 0 if measure_every else evaluates
            if self._measures:
                self.probe.before_step()
            yield
            if evaluates:
                evaluate()

    def stepped(self, loss: Any, norm: Any, sums: Any) -> None:
        """Finish a step: keep its loss, log it, check for signals, and write a checkpoint if one is due.

        `loss` is the mean over the batch, as a number or a scalar tensor; `norm` is that of the gradient, or None;
        `sums` is added to those of the run. TrainingError names the step of a loss that is not finite and the last good
        checkpoint.
        """
        if self._measures:
            self.probe.after_step()
        self.sums += sums
        self.step += 1
        self._losses.append(loss)
        checking = self.step % self.check_every == 0 or self.step == self.steps
        value = self.fetch_losses() if checking else None
        self.training_seconds += time.monotonic() - self._mark
        self._bar.update(self.config.batch_size)
        every = self.options.log_every
        if value is not None and every and self.step - self._logged >= every:
            self._log(value, norm)
        number = self._interruption.signal or 0
        if self.watch is not None and self.watch(self, value) and not number:
            number = -1  # no signal
        due = time.monotonic() - self._saved_at > 60 * self.options.checkpoint_minutes
        if self.group.size > 1:  # communication waits for the device
            number = self.group.largest(abs(int(number))) if checking else 0
            due = checking and bool(self.group.largest(int(due)))
        if number:
            self.stopped = signal.Signals(number) if number > 1 else True
        if (self.stopped or due) and self.step < self.steps:
            self.fetch_losses()
            self.seconds = time.monotonic() - self._clock
            self.save()
        self._mark = time.monotonic()

    def logs(self) -> bool:
        """Whether the current step may be logged, which needs the norm of the gradient."""
        every = self.options.log_every
        return bool(every) and self.step + 1 - self._logged >= every

    def fetch_losses(self) -> float:
        """Return the last of the losses since the previous call; TrainingError for the first that is not finite."""
        values = [float(loss) for loss in self._losses] or [0.0]
        for number, value in enumerate(values):
            if not abs(value) < float("inf"):
                raise TrainingError(
                    f"the loss is {value} at step {self.step - len(values) + number + 1}; {self.good()}"
                )
        self._losses.clear()
        return values[-1]

    def _log(self, loss: float, norm: Any) -> None:
        now = time.monotonic()
        speed = (self.step - self._logged) * self.config.batch_size / max(now - self._logged_at, 1e-9)
        flops = (2 * self.counts["training_macs"] + self.counts["training_other_flops"]) * speed
        found = {
            "loss": loss,
            "lr": self.config.lr * self.share(self.step - 1),
            f"{self.config.unit}_per_second": speed,
            "flops_per_second": flops,
        }
        words = [f"step {self.step:>6} of {self.steps}", f"loss {loss:.4f}", f"lr {found['lr']:.3g}"]
        if norm is not None:
            found["gradient_norm"] = float(norm)
            words.append(f"gradient {found['gradient_norm']:.3g}")
        tokens = getattr(self.config, "context", 0)
        words.append(f"{speed * tokens:,.0f} tok/s" if tokens else f"{speed:,.0f} {self.config.unit}/s")
        words.append(f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP/s")
        if (peak := self.peak()) is not None:
            found["mfu"] = flops / (peak * self.group.size)
            words.append(f"MFU {100 * found['mfu']:.1f} %")
        found["memory"] = self.memory()
        words.append(f"{found['memory'] / 2**30:.2f} GiB")
        self.say("  ".join(words))
        for log in self._trackers:
            log({f"log/{key}": value for key, value in found.items()}, self.step)
        self._logged, self._logged_at = self.step, now


class TorchRun(Steps):
    """A run in torch (`structlin_nn.recipes._run.Run`): model, optimiser, average and scaler, and checkpoints of them.

    `model` is the model itself, and `forward` what a step calls; `sums` are float64 numbers, the same in all processes.
    """

    group: Processes
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, config: RunConfig, options: Options, group: Processes, watch: Any = None) -> None:
        super().__init__(config, options, group, watch)
        self.device = group.device
        self.check_every = 1 if group.device.type == "cpu" else 50  # to look at a loss waits for the device
        self.generators: dict[str, torch.Generator] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        if self.config.threads:
            self._closing.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.config.threads)
        if self.device.type == "cuda":
            self._closing.callback(_allow_tf32, torch.backends.cuda.matmul.allow_tf32)
            _allow_tf32(self.config.tf32)
        return self

    def make_model(self, build: Callable[..., nn.Module], outputs: int) -> nn.Module:
        """Return the model on the device of the run, drawn from torch's generator on the CPU or with trained weights.

        ValueError for sizes that the structure does not allow, or weights that are not of this model.
        """
        torch.manual_seed(self.config.seed)
        self.init_from = None if self.state is None else self.state["init_from"]
        if self.init_from is not None:  # whose layers may have sizes that no configuration states
            assert self.state is not None
            model = model_of(self.state["build"], self.state["layout"])
        else:
            model = build(self.config, outputs)
            if self.options.init_from is not None and self.state is None:
                model, self.init_from = starting_weights(self.options.init_from, model)
        require(
            self.state is None or self.options.init_from is None or self.init_from is not None,
            f"the run in {self.folder} did not start from trained weights",
        )
        if self.config.recompute:
            require(hasattr(model, "set_grad_checkpointing"), f"recompute: {type(model).__name__} cannot recompute")
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._described = described(model)
        self.model = model.to(self.device)
        if self.config.compile:
            for module in getattr(model, "blocks", ()) if self.group.sharded else (model,):
                module.compile()
        self.forward = self.group.wrap(self.model, DTYPES[self.config.precision])
        return self.model

    def start(
        self, build: Callable[..., nn.Module], outputs: int, *, steps: int, warmup: int, sums: int, sample: Tensor,
        probe: Tensor, data: dict[str, Any], generators: Mapping[str, torch.Generator] | None = None, **rules: Any,
    ) -> torch.optim.Optimizer:  # fmt: skip
        """Make the optimiser, start the record, or restore what the checkpoint holds.

        `build` is called for the dense model at base width; `sums` says how many numbers the recipe adds up between
        evaluations; `sample` is an input that is counted, and `probe` are those on which features and gains are
        measured; `generators` are those that the recipe draws from, by name; `rules` are arguments of
        `parameter_groups`.
        """
        optimizer = make_optimizer(self.config, self.model, base_of(build, self.config, outputs), **rules)
        self.optimizer, self.warmup = optimizer, warmup
        self.generators = dict(generators or {})
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")
        self.average = Average(self.model, self.config.ema) if self.config.ema else None
        self._statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self.sums = torch.zeros(sums, dtype=torch.float64, device=self.device)
        self.probe = Probe(self.model, self.call, probe)
        gpu = self.device.type == "cuda"
        more = {"gpu": torch.cuda.get_device_name(self.device), "cuda": torch.version.cuda} if gpu else {}
        parallel = self.group.parallel if self.group.size > 1 else None
        machine = hardware(self.config.threads or torch.get_num_threads(), self.device.type)
        header: dict[str, Any] = {
            "structures": layers_of(self.model, optimizer.param_groups),
            "hardware": {**machine, **more, "processes": self.group.size, "parallel": parallel},
        }
        if self.init_from is not None:
            header["init_from"] = self.init_from
        layers_given = self.init_from is not None and self.init_from["structured_layers"] is not None
        counted = (lambda *_: model_of(**self._described)) if layers_given else build
        counts = count_run(counted, self.config, outputs, steps, sample)
        self.begin(steps=steps, counts=counts, outputs=outputs, data=data, **header)
        if self.state is not None:
            self._restore(self.state)
        self.model.train()
        return optimizer

    # The parts of a step

    def set_rates(self) -> None:
        """Give the optimiser the learning rates of the step that is taken now."""
        share = self.share(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def sync(self, last: bool) -> Any:
        """Return a context for the backward pass of a part: gradients are summed over the processes in the last one."""
        return self.group.sync(self.forward, last)

    def autocast(self) -> torch.autocast:
        """Products in the configuration's precision."""
        dtype = DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def gradient_norm(self) -> Tensor | None:
        """Clip the gradients to ``config.clip``, and return their norm; None if it is not needed."""
        if not self.config.clip and not self.logs():
            return None
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.config.clip:
            clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        return norm

    def update(self) -> None:
        """Step the optimiser, the scaler and the average; give all processes the same statistics of batch norm."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.group.average(self._statistics)
        if self.average is not None:
            self.average.update()

    def mean_and_sum(self, losses: Sequence[Tensor], statistics: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Return the mean of the losses and the sum of the statistics of all parts in all processes."""
        loss = torch.stack([loss.detach().double() for loss in losses]).mean()
        summed = torch.stack(list(statistics)).sum(0).double() if statistics else loss.new_zeros(1)
        if self.group.size == 1:
            return loss, summed
        together = self.group.sum(torch.cat([loss[None] / self.group.size, summed]))
        return together[0], together[1:]

    def call(self, *inputs: Any, **options: Any) -> Any:
        """Return the forward pass for evaluation, in the configuration's precision."""
        # The compiled code is for the shapes of a step, and takes no hooks of a probe.
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        with self.autocast(), eager:
            if not self.group.sharded:
                return self.model.forward(*inputs, **options)  # needs no other process
            found = self.forward(*inputs, **options)
            self.forward.reshard()  # type: ignore[operator]  # which only a backward pass does by itself
            return found

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Set the model to evaluation mode, with its averaged weights if it has any, within the block."""
        self.model.eval()
        with torch.no_grad(), nullcontext() if self.average is None else self.average.in_place():
            yield
        self.model.train()

    def peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        precision = "tfloat32" if self.config.precision == "float32" and self.config.tf32 else self.config.precision
        name = torch.cuda.get_device_name(self.device).lower()
        found = [known for key, known in DEVICES.items() if key in name]
        # Cards of the same name for PCIe are slower.
        return found[0].peak.get(precision) if found and "pcie" not in name else None

    def memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else super().memory()

    # Checkpoints

    def not_finite(self) -> str | None:
        named = self.model.named_parameters()
        return next((n for n, p in named if not bool(torch.isfinite(local(p)).all())), None)

    def _tensors(self) -> dict[str, Any]:
        """Return the tensors of model, optimiser and average, by names of parameters."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        states = {
            names[p]: {key: torch.as_tensor(value) for key, value in entries.items()}
            for p, entries in self.optimizer.state.items()
        }
        average = {} if self.average is None else self.average.tensors
        return {"model": self.model.state_dict(), "optimizer": states, "average": average}

    def write(self, folder: Path) -> dict[str, Any]:
        tensors = self._tensors()
        write_tensors(folder, tensors, self.group.control)
        keys = {name: list(entries) for name, entries in tensors["optimizer"].items()}
        state = common_state(self, self.model)
        state["generators"]["torch"] = encoded(torch.get_rng_state())
        if self.device.type == "cuda":
            state["generators"]["cuda"] = encoded(torch.cuda.get_rng_state(self.device))
        held = {"optimizer": keys, "average": self.average is not None}
        more = {"init_from": self.init_from, "scaler": self.scaler.state_dict(), "tensors": held}
        return {**state, **more, **self._described}

    def writes(self, name: str) -> bool:
        return name.startswith(f"__{self.group.rank}_") or (self.group.main and not name.startswith("__"))

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, written by any number of processes."""
        parameters = dict(self.model.named_parameters())
        tensors = {
            "model": {name: tensor.detach() for name, tensor in self.model.state_dict().items()},
            "optimizer": {
                name: {  # the fused optimisers count steps in a tensor on the parameter's device
                    k: torch.zeros((), device=p.device) if k == "step" else torch.zeros_like(p.detach()) for k in keys
                }
                for name, keys in state["tensors"]["optimizer"].items()
                if (p := parameters.get(name)) is not None
            },
            "average": {} if self.average is None else self.average.tensors,
        }
        place = self.folder / CHECKPOINTS / f"{self.step:09d}"
        read_tensors(place, tensors, self.group.control)
        for name, entries in tensors["optimizer"].items():
            self.optimizer.state[parameters[name]] = entries
        self.scaler.load_state_dict(state["scaler"])
        restore_common(self, state)
        torch.set_rng_state(decoded(state["generators"]["torch"]))
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(decoded(state["generators"]["cuda"]), self.device)
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))


def common_state(run: Any, model: nn.Module) -> dict[str, Any]:
    """Return the entries of ``state.json`` that runs in torch and in flax have alike."""
    structures: Any = {module.structure for module in model.modules() if isinstance(module, StructuredLinear)}
    return {
        "generators": {name: encoded(generator.get_state()) for name, generator in run.generators.items()},
        "sums": run.sums.tolist(), "probe": [run.probe.total, run.probe.count],
        "execution": execution.decisions(structures),
    }  # fmt: skip


def restore_common(run: Any, state: Mapping[str, Any]) -> None:
    """Restore generators and probe from `common_state`."""
    for name, generator in run.generators.items():
        generator.set_state(decoded(state["generators"][name]))
    run.probe.total, run.probe.count = state["probe"]


def encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def layers_of(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a description of every structured layer, with scale and learning-rate multiplier of each factor."""
    rates = {id(p): group["multiplier"] for group in groups for p in group["params"]}
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, StructuredLinear):
            continue
        trainable = iter(layer.factors)
        factors = [
            {
                "shape": list(factor.shape), "fan_in": factor.fan_in, "fan_out": factor.fan_out,
                "blocks": factor.blocks, "carried": factor.carried, "init_std": std,
                "lr_multiplier": rates[id(next(trainable))] if factor.trainable else 0.0,
            }
            for factor, std in zip(layer.structure.factors, layer.init_std, strict=True)
        ]  # fmt: skip
        found.append({
            "name": name, "in_features": layer.in_features, "out_features": layer.out_features,
            "structure": repr(layer.structure), "params": sum(parameter.numel() for parameter in layer.parameters()),
            "macs": layer.structure.macs, "factors": factors,
        })  # fmt: skip
    return found


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
