"""What tests/conftest.py repairs, for the processes that tests start: its folder is on their PYTHONPATH."""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

_libraries = []


class _Torchvision(importlib.abc.MetaPathFinder):
    """Lets torchvision be imported beside a torch without CUDA, for which it may hold no compiled operators.

    It registers fake kernels of two operators on import, which fails where their schemas are missing; timm and
    transformers then fail too. Python parts of torchvision work without the operators.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is not None:
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)  # the definitions live as long as it does


sys.meta_path.insert(0, _Torchvision())
