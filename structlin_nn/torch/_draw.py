"""Drawing a parameter, whole or sharded."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["fill"]


def fill(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal numbers of deviation ``std`` (zeros where it is 0), in place.

    A sharded parameter (a DTensor) gets its part of what a whole one would get: each process draws all of it, so that
    the values do not depend on the number of processes, and keeps its own part of the first process' numbers.
    """
    if not std:
        parameter.zero_()
        return
    sharded = sys.modules.get("torch.distributed.tensor")
    if sharded is None or not isinstance(parameter, sharded.DTensor) or parameter.is_meta:
        parameter.normal_(0, std, generator=generator)
        return
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.to_local().device)
    whole.normal_(0, std, generator=generator)
    parameter.copy_(sharded.distribute_tensor(whole, parameter.device_mesh, parameter.placements))
