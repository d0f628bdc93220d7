"""Settings that every test needs."""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)

_libraries = []
_OWN = "STRUCTLIN_CACHE" not in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """Keep rates and timings of ways in a folder of this run, which all its processes share, and not in the user's."""
    if _OWN:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        os.environ["STRUCTLIN_CACHE"] = str(Path(tempfile.gettempdir()) / f"structlin-tests-{run}")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN and "PYTEST_XDIST_WORKER" not in os.environ:
        session = getattr(config.pluginmanager.getplugin("dsession"), "nodemanager", None)
        run = os.getpid() if session is None else session.testrunuid
        shutil.rmtree(Path(tempfile.gettempdir()) / f"structlin-tests-{run}", ignore_errors=True)


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
