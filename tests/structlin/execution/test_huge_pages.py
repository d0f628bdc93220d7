"""Advice to the system about the memory of large tensors."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch

import structlin as sl
from structlin.execution import _memory
from structlin.execution._memory import LEAST, advised
from structlin.execution.torch_cpu import CPUChain

if not hasattr(mmap, "MADV_HUGEPAGE"):
    pytest.skip("this system has no such advice", allow_module_level=True)

Call = tuple[int, int, int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The ranges of memory that the system is advised of."""
    found: list[Call] = []
    monkeypatch.setattr(_memory, "_madvise", lambda: lambda *given: found.append(given))
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    _memory._madvise.cache_clear()
    yield
    _memory._madvise.cache_clear()


def test_whole_pages_inside_of_a_large_tensor(calls: list[Call]) -> None:
    whole = torch.empty(LEAST + 3 * mmap.PAGESIZE, dtype=torch.uint8)
    for first in (0, 1, 100):
        part = whole[first:]
        assert advised(part) is part
        start, size, advice = calls.pop()
        assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
        assert part.data_ptr() <= start < part.data_ptr() + mmap.PAGESIZE
        assert 0 <= part.data_ptr() + part.nbytes - start - size < mmap.PAGESIZE
        assert advice == mmap.MADV_HUGEPAGE


def test_small_tensors_and_other_devices_are_left_alone(calls: list[Call]) -> None:
    advised(torch.empty(LEAST - 1, dtype=torch.uint8))
    advised(torch.empty(LEAST, device="meta"))
    assert calls == []


@pytest.mark.usefixtures("fresh")
def test_the_variable_of_numpy_disables_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_memory.VARIABLE, "0")
    assert _memory._madvise() is None
    advised(torch.empty(LEAST))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(_memory.platform, "system", lambda: system)
    assert _memory._madvise() is None
    advised(torch.empty(LEAST)).zero_()


def test_outputs_and_gradients_of_passes(calls: list[Call]) -> None:
    """Of the compiled passes and those by the BLAS; each range is inside of a tensor."""
    structure = sl.design("monarch", (1024, 1024), blocks=4)
    assert isinstance(structure, sl.Structure)
    factors = sl.random_factors(structure, backend="torch", dtype="float32", seed=0)
    x = torch.randn(LEAST // 4096 + 9, 1024)
    chain = CPUChain(structure)
    kinds = {kind: chain.passes(kind, torch.float32) for kind in ("compiled", "batched", "chunked")}
    assert kinds["chunked"] is not None
    for kind, passes in kinds.items():
        if passes is None:
            continue
        calls.clear()
        y = passes.forward(x, factors)
        gx, *_ = passes.backward(y, x, factors, [True, True, True, False])
        assert gx is not None
        for tensor in (y, gx):
            inside = [start - tensor.data_ptr() for start, _, _ in calls]
            assert any(0 <= offset < mmap.PAGESIZE for offset in inside), kind
