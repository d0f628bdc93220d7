"""Settings that every test needs."""

import gc
import os
import runpy
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)

_OWN = "STRUCTLIN_CACHE" not in os.environ

# XLA compiles in half the time, and results differ by roundoff alone. Nearly every program of the tests runs once.
_COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Keep rates and timings of ways in a folder of this run, which all its processes share, and not in the user's.

    Without the slow tests, XLA compiles quickly, also in processes that tests start; with them, as it does for users.
    Where xdist starts workers, libraries use one thread in each, as in .ci/run: more would wait for one another.
    """
    if getattr(config.option, "numprocesses", None):
        for library in ("OMP", "MKL", "OPENBLAS"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", _COMPILE_QUICKLY)  # read when jax first asks for its devices
    if _OWN:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        os.environ["STRUCTLIN_CACHE"] = str(Path(tempfile.gettempdir()) / f"structlin-tests-{run}")


def pytest_collection_finish() -> None:
    """Modules and collected tests live to the end: spare the collector from visiting them each time."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN and "PYTEST_XDIST_WORKER" not in os.environ:
        session = getattr(config.pluginmanager.getplugin("dsession"), "nodemanager", None)
        run = os.getpid() if session is None else session.testrunuid
        shutil.rmtree(Path(tempfile.gettempdir()) / f"structlin-tests-{run}", ignore_errors=True)


# Repairs the import of torchvision, here and in the processes that tests start.
_CHILDREN = str(Path(__file__).parent / "child_processes")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_CHILDREN, os.environ.get("PYTHONPATH"))))
_REPAIR = runpy.run_path(str(Path(_CHILDREN, "sitecustomize.py")))  # kept, for the operators live as long as it does
