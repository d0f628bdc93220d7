"""Settings that every test needs."""

import importlib.metadata

import jax

jax.config.update("jax_enable_x64", True)

_libraries = []


def _repair_torchvision() -> None:
    """Let torchvision be imported beside a torch without CUDA, for which it may hold no compiled operators.

    It registers fake kernels of two operators on import, which fails where their schemas are missing; timm and
    transformers then fail too. Python parts of torchvision work without the operators.
    """
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # the definitions live as long as it does


_repair_torchvision()
