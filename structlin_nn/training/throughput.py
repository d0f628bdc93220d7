"""What a device can do at most, to compare model FLOPs per second with."""

from __future__ import annotations

import torch

from structlin_nn.counting import DEVICES

__all__ = ["peak_flops"]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most FLOP/s that a device can do in products of a precision, None where that is not known.

    >>> peak_flops(torch.device("cpu"), "float32") is None
    True
    """
    if device.type != "cuda":
        return None
    if precision == "float32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tfloat32"
    name = torch.cuda.get_device_name(device).lower()
    found = [known for key, known in DEVICES.items() if key in name]
    # The cards of the same name for PCIe do less.
    return found[0].peak.get(precision) if found and "pcie" not in name else None
