"""One step of an optimiser: parts of a batch, low precision, clipping, averages of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from structlin_nn.training.base import RunConfig
from structlin_nn.training.distributed import Processes, local, shard_like

__all__ = ["Average", "ShardedScaler", "Stepper"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Average:
    """Exponential moving average of a model's parameters: ``average += (1 - decay) * (parameter - average)``.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> average = Average(layer, decay=0.9)
    >>> before = layer.weight.item()
    >>> _ = layer.weight.data.add_(1.0)
    >>> average.update()
    >>> with average.in_place():
    ...     round(layer.weight.item() - before, 6)
    0.1
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters as they are now."""
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.detach(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block lasts, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)


class ShardedScaler(torch.amp.GradScaler):
    """A scaler for gradients of which each process has its own part, beside some that all have.

    torch's own takes either kind alone. Where one process finds a gradient that is not finite, all leave the step out,
    and so all have the same scale.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        parts = [part for p in parameters if (part := local(p.grad)).numel()]
        if parts:
            torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inv_scale)
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


class Stepper:
    """Takes steps of the optimiser of a model, as a configuration asks for.

    Args:
        config: whose learning rate and its schedule, precision, clipping and average.
        model: whose parameters the optimiser has.
        wrapped: what the forward pass is called on (`Processes.wrap`).
        optimizer: its groups have the learning rates before the schedule.
        processes: of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
    ) -> None:
        self.config, self.model, self.wrapped, self.optimizer = config, model, wrapped, optimizer
        self.processes = processes
        self.rates = [group["lr"] for group in optimizer.param_groups]
        scaler = ShardedScaler if processes.sharded else torch.amp.GradScaler
        self.scaler = scaler(processes.device.type, enabled=config.precision == "float16")
        self.average = Average(model, config.ema) if config.ema else None

    def autocast(self) -> torch.autocast:
        """Products in the configuration's precision."""
        dtype = DTYPES[self.config.precision]
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype != torch.float32)

    def step(
        self, parts: Sequence[Any], loss: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], share: float
    ) -> tuple[Tensor, Tensor]:
        """One step over this process's parts of a batch.

        Args:
            parts: equally large, each what `loss` takes.
            loss: (what to call, part) to (mean loss of the part, a vector of statistics of it).
            share: of the learning rates.

        Returns:
            (loss, statistics): mean and sum over the parts of this process, without a gradient.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad(set_to_none=True)
        losses, statistics = [], []
        for number, part in enumerate(parts, start=1):
            with self.processes.without_sync(self.wrapped, skip=number < len(parts)):
                with self.autocast():
                    value, found = loss(self.wrapped, part)
                self.scaler.scale(value / len(parts) if len(parts) > 1 else value).backward()
            losses.append(value.detach().double())
            statistics.append(found)
        self.processes.average_scalars(self.model)
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)
            self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        return torch.stack(losses).mean(), torch.stack(statistics).sum(0)

    def _clip(self) -> None:
        """Scale all gradients down to the norm that the configuration allows, sharded and plain ones together."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        kinds = {type(p.data): [q for q in parameters if type(q.data) is type(p.data)] for p in parameters}
        norms = [get_total_norm([p.grad for p in some if p.grad is not None]) for some in kinds.values()]
        total = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).norm()
        for some in kinds.values():
            clip_grads_with_norm_(some, self.config.clip, total)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the optimiser's tensors by name of the parameter, the average, the scaler."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            "optimizer": {names[p]: dict(entries) for p, entries in self.optimizer.state.items()},
            "average": {} if self.average is None else dict(self.average.tensors),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, in any number of processes; tensors are whole or sharded as here."""
        for name, parameter in self.model.named_parameters():
            if name in state["optimizer"]:
                entries = state["optimizer"][name]
                self.optimizer.state[parameter] = {
                    key: _placed(value, parameter, scalar=key == "step") for key, value in entries.items()
                }
        if self.average is not None:
            for name, tensor in self.average.tensors.items():
                tensor.copy_(_placed(state["average"][name], tensor))
        self.scaler.load_state_dict(state["scaler"])


def _placed(value: Any, like: Tensor, scalar: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    if scalar:  # the fused optimisers count steps in a tensor on the parameter's device
        return value.to(like.device, copy=True)
    return value.clone() if hasattr(value, "placements") else shard_like(value.clone(), like)
