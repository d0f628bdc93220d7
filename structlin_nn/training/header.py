"""The header of a run record: what is trained, what it costs, on what it runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structlin_nn.counting import count
from structlin_nn.torch import StructuredLinear
from structlin_nn.training.base import RunConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.model import example_input, make_model

FLAX = ("jax", "flax", "optax")

__all__ = ["count_run", "hardware", "layers", "make_header", "versions"]


def count_run(config: RunConfig, outputs: int, steps: int, layout: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Parameters of the model, MACs of one sample, and the size of the whole run.

    Args:
        config: of the run.
        outputs: number of classes, or of the tokens that the model knows.
        steps: of the run.
        layout: of the model's layers, where it is not the configuration's (`structlin_nn.training.model.make_model`).

    ``training_macs`` are those of the forward and the backward pass, without the gradients that no step needs, such
    as that of the images (`structlin_nn.counting`): between two and three times ``forward_macs``.
    """
    model = make_model(config.replace(recompute=False), outputs, "meta", layout)
    counted = count(model, example_input(config, model))
    samples = steps * config.batch_size
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_params": counted.trainable_params,
        "embedding_params": counted.embedding_params,
        "forward_macs": counted.macs(),
        "training_macs": counted.training_macs,
        "other_flops": counted.other_flops,
        "steps": steps,
        "samples": samples,
        "total_training_macs": counted.training_macs * samples,
    }


def layers(config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Every linear layer with its structure, and of each factor the scale and the learning-rate multiplier in use."""
    rates = {id(p): group["lr"] / config.lr for group in optimizer.param_groups for p in group["params"]}
    found = []
    structured = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, StructuredLinear)]
    for name, layer in structured:
        trainable = iter(layer.factors)
        factors = [
            {
                "shape": list(factor.shape),
                "fan_in": factor.fan_in,
                "fan_out": factor.fan_out,
                "blocks": factor.blocks,
                "carried": factor.carried,
                "init_std": std,
                "lr_multiplier": rates[id(next(trainable))] if factor.trainable else 0.0,
            }
            for factor, std in zip(layer.structure.factors, layer.init_std, strict=True)
        ]
        found.append(
            {
                "name": name,
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "structure": repr(layer.structure),
                "params": sum(parameter.numel() for parameter in layer.parameters()),
                "macs": layer.structure.macs,
                "factors": factors,
            }
        )
    return found


def make_header(
    config: RunConfig,
    data: dict[str, Any],
    counts: dict[str, int],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    init_from: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The header of a run that starts now; see `structlin_nn.training.records`."""
    return ({} if init_from is None else {"init_from": init_from}) | {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": config.task,
        "config": config.to_dict(),
        "seed": config.seed,
        "data": data,
        "structures": layers(config, model, optimizer),
        "counts": counts,
        "versions": versions(*(FLAX if getattr(config, "framework", "torch") == "flax" else ())),
        "hardware": {
            **hardware(config, processes.device),
            "processes": processes.size,
            "parallel": processes.parallel if processes.size > 1 else None,
        },
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the libraries that decide results, with `more` of them."""
    import structlin

    found = {"python": platform.python_version(), "structlin": structlin.__version__}
    for name in ("torch", "numpy", "cola-ml", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def hardware(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the run is computed on; nothing that names the machine."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": config.threads or torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
