"""Training in several processes, as torchrun starts them.

They share one folder for records and checkpoints.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from structlin_nn.recipes._config import RunConfig, require

Value = TypeVar("Value")


@dataclass
class Processes:
    """The processes that torchrun started, seen from one of them (`rank`); `size` 1 for a process alone.

    Models are whole in each (``ddp``) or `sharded` (``fsdp``: FSDP2). `control` is the group of gloo, for values on the
    CPU, and `mesh` the mesh; both None for a single process. The `main` process writes and reports.
    """

    rank: int
    size: int
    parallel: str
    device: torch.device
    control: Any = None
    mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        self.main = self.rank == 0
        self.sharded = self.size > 1 and self.parallel == "fsdp"

    def first(self, work: Callable[[], Value]) -> Value:
        """Call `work` in the first process while the others wait; return its result, or raise its error, in all."""
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

    def largest(self, number: int) -> int:
        """Return the largest number of any process; all processes call it."""
        found = torch.tensor([number])
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by their ranks."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.control)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor, summed over the processes in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace real tensors by their means over the processes, in one communication.

        Sums are float64, so tensors of lower precision that all processes have alike stay as they are.
        """
        if self.size > 1 and tensors:
            means = self.sum(torch.cat([tensor.flatten() for tensor in tensors]).double()) / self.size
            for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def share(self, tensor: Tensor) -> Tensor:
        """Return the rows of this process of a tensor that all have, in parts as equal as possible."""
        return tensor if self.size == 1 else tensor.tensor_split(self.size)[self.rank]

    def part_size(self, config: RunConfig) -> int:
        """Return the number of samples of a part of a step in this process; ValueError for unequal parts."""
        own, left = divmod(config.batch_size, self.size)
        require(not left, f"batch_size {config.batch_size} cannot be shared equally by {self.size} processes")
        split = f"{own} samples in a process's share cannot be split into {config.accumulate} parts"
        require(own % config.accumulate == 0, split)
        return own // config.accumulate

    def wrap(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module to call for the forward pass. ``fsdp`` replaces the parameters of `model` by sharded ones.

        In bfloat16 shards are gathered and activations kept in bfloat16, and gradients are reduced in float32.
        """
        if self.size == 1:
            return model
        if not self.sharded:
            wrapped = DistributedDataParallel(
                model, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
            # Each step averages buffers (`average`). As an argument of the constructor, this is deprecated.
            wrapped.broadcast_buffers = False
            return wrapped
        # Logits may be a view; they are not changed in place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        policy = MixedPrecisionPolicy()
        if dtype == torch.bfloat16:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        sharded: Any = fully_shard(model, mesh=self.mesh, mp_policy=policy)
        return sharded

    @contextmanager
    def sync(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Sum gradients over the processes in the last part of a step, and only there."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        with wrapped.no_sync() if self.size > 1 and not self.sharded and not last else nullcontext():  # type: ignore[operator]
            yield


ALONE = Processes(0, 1, "ddp", torch.device("cpu"))


@contextmanager
def processes(device: str = "cpu", parallel: str = "ddp") -> Iterator[Processes]:
    """Join the processes that torchrun started within the block; without torchrun there is one process.

    An existing group is used and kept. With several processes ``cuda`` is the GPU of the local
    rank; ValueError for a device that does not exist, or ``cuda:N`` for several processes.
    """
    size, place = int(os.environ.get("WORLD_SIZE", "1")), torch.device(device)
    if place.type == "cuda" and size > 1:
        require(place.index is None, f"{size} processes cannot share {device}: use --device cuda, one GPU for each")
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if available_device(str(place)).type == "cuda":
        torch.cuda.set_device(place)
    if size == 1 and not dist.is_initialized():
        yield Processes(0, 1, parallel, place)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        control, mesh = dist.new_group(backend="gloo"), init_device_mesh(place.type, (dist.get_world_size(),))
        yield Processes(dist.get_rank(), dist.get_world_size(), parallel, place, control, mesh)
    finally:
        if ours:
            dist.destroy_process_group()


def available_device(name: str) -> torch.device:
    """Return a device of torch; ValueError for one that does not exist."""
    place = torch.device(name)
    seen = torch.cuda.device_count() if place.type == "cuda" else 1
    require((place.index or 0) < seen, f"device {name!r} does not exist: torch sees {seen} CUDA devices")
    return place


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
