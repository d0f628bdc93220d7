"""What the processes of test_distributed.py run, in a module of its own so that they can import it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from structlin_nn.torch import Muon, StructuredLinear, parameter_groups

STEPS = 3


def make_model(device: str | None = None) -> nn.Sequential:
    """Factors whose first axis is 1 (kronecker's, low rank of rank 1), odd (monarch) and even; buffers too."""
    return nn.Sequential(
        StructuredLinear(12, 30, structure="block_tensor_train", rank=2, rms_cap=True, device=device),
        nn.GELU(),
        StructuredLinear(30, 14, structure="monarch", blocks=3, checkpoint=True, device=device),
        nn.GELU(),
        StructuredLinear(14, 14, structure="permutation", device=device),
        StructuredLinear(14, 21, structure="low_rank", rank=1, device=device),
        nn.GELU(),
        StructuredLinear(21, 9, structure="tensor_train", rank=3, device=device),
        StructuredLinear(9, 9, structure="toeplitz", rms_cap=True, device=device),
        StructuredLinear(9, 9, structure="diagonal", device=device),
        StructuredLinear(9, 5, structure="dense", device=device),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 5, generator=generator)


def train(model: nn.Module, x: torch.Tensor, target: torch.Tensor, spread, muon: bool = False) -> dict[str, object]:
    """Losses, gradients of the first step and parameters at the end; ``spread`` averages over processes."""
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if muon:
        optimizer = Muon(parameter_groups(model, lr=1e-2, optimizer="muon", adam_lr=1e-2))
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        if not step:
            gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(spread(loss.detach()))
    parameters = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": gradients, "parameters": parameters}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def mean(loss: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def run(rank: int, world_size: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=world_size)
    x, target = (t.chunk(world_size)[rank] for t in data())
    result: dict[str, object] = {}
    if kind == "ddp":
        torch.manual_seed(rank)  # DDP gives all processes the first one's parameters and buffers
        model = make_model()
        if not rank:
            torch.manual_seed(0)
            for layer in model:
                if isinstance(layer, StructuredLinear):
                    layer.reset_parameters()
        result = train(DistributedDataParallel(model), x, target, mean)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        torch.manual_seed(0)
        model = make_model("meta" if kind == "fsdp_meta" else None)
        for layer in model:
            if isinstance(layer, StructuredLinear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind == "fsdp_meta":
            model.to_empty(device="cpu")
            torch.manual_seed(0)
            for layer in model:
                if isinstance(layer, StructuredLinear):
                    layer.reset_parameters()
        result = {"sharded": all(isinstance(p, DTensor) for p in model.parameters())}
        result["initial"] = {n: whole(t.detach()).clone() for n, t in model.state_dict().items()}
        result |= train(model, x, target, mean, kind == "fsdp_muon")
    torch.save(result, Path(folder) / f"{kind}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
