"""Settings that every test needs."""

import gc
import os
import runpy
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)

pytest.register_assert_rewrite("helpers")

settings.register_profile("few", max_examples=12)

_OWN = "STRUCTLIN_CACHE" not in os.environ

# XLA compiles in half the time, and results differ by roundoff alone. Nearly every program of the tests runs once.
_COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Keep rates and timings of ways in a folder of this run, which all its processes share, and not in the user's.

    Without the slow tests, XLA compiles quickly, also in processes that tests start; with them, as it does for users.
    Tests of Hypothesis that set no number of examples then take few.
    Where xdist starts workers, libraries use one thread in each, as in .ci/run: more would wait for one another.
    """
    if getattr(config.option, "numprocesses", None):
        for library in ("OMP", "MKL", "OPENBLAS"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", _COMPILE_QUICKLY)  # read when jax first asks for its devices
        settings.load_profile("few")
    if _OWN:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        os.environ["STRUCTLIN_CACHE"] = str(Path(tempfile.gettempdir()) / f"structlin-tests-{run}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the design of the fast tests leaves out of a product of parameters.

    A function marked ``covering(n)`` keeps a subset in which every ``n`` values of different parameters that occur
    together anywhere do so.
    """
    functions: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow"):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in functions.values():
        values = [drawn(case) for case in cases]
        kept = covered(values, cases[0].get_closest_marker("covering").args[0])
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker(pytest.mark.slow)


def drawn(case: Any) -> tuple[Any, ...]:
    """What each parametrize, and each fixture with parameters, gives a case; values are told apart as objects."""
    left = {name: id(value) for name, value in case.callspec.params.items()}
    names = [mark.args[0] for mark in case.iter_markers("parametrize")]
    groups = [group.replace(" ", "").split(",") if isinstance(group, str) else group for group in names]
    return (*(tuple(left.pop(name) for name in group) for group in groups), *left.values())


def covered(cases: Sequence[tuple[Any, ...]], strength: int) -> set[int]:
    """Return the numbers of cases in which all combinations of ``strength`` values occur, chosen greedily.

    Of equally good cases, it takes the one whose values and pairs of values have been taken least.
    """
    places = [tuple(enumerate(case)) for case in cases]
    strength = min(strength, len(cases[0]))
    groups = [set(combinations(case, strength)) for case in places]
    counted = [[c for n in (1, 2) for c in combinations(case, n)] for case in places]
    left, missing, taken = list(range(len(cases))), set[Any]().union(*groups), Counter[Any]()
    while missing:
        best = max(left, key=lambda case: (len(groups[case] & missing), -sum(taken[c] for c in counted[case])))
        left.remove(best)
        missing -= groups[best]
        taken.update(counted[best])
    return set(range(len(cases))) - set(left)


def pytest_collection_finish() -> None:
    """Modules and collected tests live to the end: spare the collector from visiting them each time."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN and "PYTEST_XDIST_WORKER" not in os.environ:
        session = getattr(config.pluginmanager.getplugin("dsession"), "nodemanager", None)
        run = os.getpid() if session is None else session.testrunuid
        shutil.rmtree(Path(tempfile.gettempdir()) / f"structlin-tests-{run}", ignore_errors=True)


# Repairs the import of torchvision, here and in the processes that tests start, which may import helpers too.
_CHILDREN, _SUPPORT = (str(Path(__file__).parent / name) for name in ("child_processes", "support"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_CHILDREN, _SUPPORT, os.environ.get("PYTHONPATH"))))
_REPAIR = runpy.run_path(str(Path(_CHILDREN, "sitecustomize.py")))  # kept, for the operators live as long as it does
