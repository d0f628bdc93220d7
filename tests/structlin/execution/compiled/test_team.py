"""Shares of a pass in threads: each runs once, whatever threads there are."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from structlin.execution.compiled import _team
from structlin.execution.compiled._ir import Code
from structlin.execution.compiled._target import host, load

HOST = host()
pytestmark = pytest.mark.skipif(HOST is None, reason="nothing is compiled here")


def counter():
    """Adds the total to each of the numbers of its range."""
    code = Code()
    numbers = code.value("load ptr, ptr %table")

    def count(i, _):
        at = code.at("i64", numbers, i)
        old = code.value(f"load i64, ptr {at}")
        code.put(f"store i64 {code.add(old, '%total')}, ptr {at}")

    code.loop("%first", "%last", 1, count)
    text = code.function("count", "ptr %table, i64 %first, i64 %last, i64 %total", "nounwind")
    return load(text, "count", HOST, [ctypes.c_void_p, *[ctypes.c_int64] * 3])


def counted(cuts):
    run, shares = counter(), len(cuts) - 1
    numbers = torch.zeros(shares, cuts[-1], dtype=torch.int64)
    _team.run_shares(run, [[row.data_ptr()] for row in numbers], cuts, 5, HOST)
    expected = torch.zeros_like(numbers)
    for k in range(shares):
        expected[k, cuts[k] : cuts[k + 1]] = 5
    return numbers, expected


CUTS = [[0, 7], [0, 5, 11], [0, 3, 3, 10], list(range(0, 40, 3))]


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("team", [True, False])
def test_each_share_runs_once(cuts, team, monkeypatch):
    if not team:
        monkeypatch.setattr(_team, "_PROCESS", -1)
    found, expected = counted(cuts)
    assert torch.equal(found, expected)


@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="another OpenMP")
def test_torchs_own_threads_are_taken(monkeypatch):
    monkeypatch.setattr(_team, "_pool", None)
    found, expected = counted([0, 4, 9])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"OMP_THREAD_LIMIT": "1"},
        pytest.param({"OMP_DYNAMIC": "true"}, marks=pytest.mark.slow),
        pytest.param({"OMP_NUM_THREADS": "3"}, marks=pytest.mark.slow),
    ],
)
def test_a_team_may_be_smaller(setting):
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_team import CUTS, counted
for cuts in CUTS:
    found, expected = counted(cuts)
    assert torch.equal(found, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **setting})


def test_without_torchs_openmp_a_pool_runs_them(monkeypatch):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    _team._team.cache_clear()
    try:
        assert _team._team(HOST) is None
        found, expected = counted([0, 4, 9])
    finally:
        _team._team.cache_clear()
    assert torch.equal(found, expected)
