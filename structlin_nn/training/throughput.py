"""Model FLOPs per second, and their share of what a device can do at most."""

from __future__ import annotations

import torch

__all__ = ["peak_flops"]

# Dense products, FLOP/s, from the makers' data sheets: (part of the device's name, half precision, float32).
# float32 is that of the CUDA cores: torch uses TF32 only where it is asked to.
_PEAKS = (
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The most FLOP/s that a device can do in products of a precision, None where that is not known.

    >>> peak_flops(torch.device("cpu"), "float32") is None
    True
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if precision == "float32" and torch.get_float32_matmul_precision() != "highest":
        return None
    for part, half, single in _PEAKS:
        if part in name:
            return single if precision == "float32" else half
    return None
