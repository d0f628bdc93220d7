"""Training in several processes: what torchrun says, and what the processes agree on.

Started by ``torchrun --nproc-per-node 2 -m structlin_nn.cli train ...``, each process finds its rank in the
environment; without, there is one process, and everything here is a step that does nothing. The processes share
one folder for records and checkpoints.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["PARALLEL", "Processes", "is_main_process", "local", "processes", "shard_like", "single"]

Value = TypeVar("Value")
PARALLEL = ("ddp", "fsdp")
"""How several processes share a model: each has all of it (ddp), or parts (fsdp: FSDP2, `fully_shard`)."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process; `size`: number of processes; `local_rank`: number of this one on its machine.
        parallel: one of `PARALLEL`.
        device: where this process computes.
        control: group of the processes for what is no tensor of the device; None for a single process.
        mesh: the processes as a mesh, None for a single one.
    """

    rank: int
    size: int
    local_rank: int
    parallel: str
    device: torch.device
    control: Any = None
    mesh: DeviceMesh | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the processes."""
        return self.size > 1 and self.parallel == "fsdp"

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; all have to ask."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def first(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the first process, which alone does it while the others wait; its error in all."""
        if self.size == 1:
            return work()
        held: list[Any] = [None, None]
        if self.main:
            try:
                held[0] = work()
            except Exception as error:
                held[1] = error
        dist.broadcast_object_list(held, src=0, group=self.control)
        if held[1] is not None:
            raise held[1]
        return held[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over the processes in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor; as equal as can be."""
        return tensor if self.size == 1 else tensor.tensor_split(self.size)[self.rank]

    def parts(self, number: int, what: str) -> int:
        """`number` divided by the processes; ValueError where something is left."""
        if number % self.size:
            raise ValueError(f"{what} {number} cannot be shared equally by {self.size} processes")
        return number // self.size

    def wrap(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """What the forward pass is to be called on. `fsdp` replaces the parameters of `model` by sharded ones.

        Scalar parameters (gains of capped factors) are not sharded; `average_scalars` gives them their gradients.
        """
        if self.size == 1:
            return model
        if not self.sharded:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids)
        # Logits may be a view, and nothing changes them in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        scalars = {p for p in model.parameters() if p.ndim == 0}
        for block in blocks:
            fully_shard(block, mesh=self.mesh, ignored_params=scalars)
        return fully_shard(model, mesh=self.mesh, ignored_params=scalars)

    @contextmanager
    def without_sync(self, wrapped: nn.Module, skip: bool) -> Iterator[None]:
        """Leave gradients unsummed for a part of a step that is not its last."""
        if self.size == 1 or not skip:
            if self.sharded:
                wrapped.set_requires_gradient_sync(True)  # type: ignore[operator]
            yield
        elif self.sharded:
            wrapped.set_requires_gradient_sync(False)  # type: ignore[operator]
            yield
        else:
            with wrapped.no_sync():  # type: ignore[operator]
                yield

    def average_scalars(self, model: nn.Module) -> None:
        """Give the scalar parameters of a sharded model the mean of their gradients."""
        if not self.sharded:
            return
        gradients = [p.grad for p in model.parameters() if p.ndim == 0 and p.grad is not None]
        if gradients:
            together = self.sum(torch.stack(gradients)) / self.size
            torch._foreach_copy_(gradients, list(together.unbind()))


def single(device: str) -> Processes:
    """This process alone.

    Raises:
        ValueError: a device that is not there.
    """
    return Processes(0, 1, 0, "ddp", _device(device))


def is_main_process() -> bool:
    """Whether the environment says that this is the first process, or the only one.

    >>> is_main_process()
    True
    """
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def processes(device: str, parallel: str = "ddp") -> Iterator[Processes]:
    """Join the processes that torchrun started, for as long as the block lasts; alone, there is one process.

    A group that is there already is used, and left as it is.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; with several processes, ``cuda`` is the GPU of the local rank.
        parallel: one of `PARALLEL`.

    Raises:
        ValueError: an unknown way, a device that is not there, or ``cuda:N`` for several processes.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not dist.is_initialized():
        yield single(device)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device)
    if place.type == "cuda":
        if place.index is not None:
            raise ValueError(f"{size} processes cannot share {device}: use --device cuda, one GPU for each process")
        place = _device(f"cuda:{local_rank}")
        torch.cuda.set_device(place)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        control = dist.new_group(backend="gloo")
        mesh = init_device_mesh(place.type, (dist.get_world_size(),))
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, parallel, place, control, mesh)
    finally:
        if ours:
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor (the same in all processes), sharded and placed as another is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
