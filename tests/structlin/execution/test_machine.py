"""What one core can count on of the caches."""

import pytest

from structlin.execution import machine
from structlin.execution.machine import DEFAULT, Caches, caches


def describe(folder, index, **texts):
    (folder / f"index{index}").mkdir()
    for name, text in texts.items():
        (folder / f"index{index}" / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("threads", "shared", "l3"), [("0", "0-7", 4 << 20), ("0,32", "0-7,32-39", 4 << 20), ("0-1", "0-1", 32 << 20)]
)
def test_linux(threads, shared, l3, tmp_path, monkeypatch):
    """Two threads of a core do not share it in the sense that cores do; instructions are left out."""
    describe(tmp_path, 0, level=1, type="Data", size="48K", shared_cpu_list=threads)
    describe(tmp_path, 1, level=1, type="Instruction", size="64K", shared_cpu_list=threads)
    describe(tmp_path, 2, level=2, type="Unified", size="2M", shared_cpu_list=threads)
    describe(tmp_path, 3, level=3, type="Unified", size="32768K", shared_cpu_list=shared)
    describe(tmp_path, 4, level="?", type="Unified", size="1K", shared_cpu_list="0")
    monkeypatch.setattr(machine, "_LINUX", tmp_path)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert caches.__wrapped__() == Caches(48 << 10, 2 << 20, l3)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_where_nothing_can_be_asked(platform, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_LINUX", tmp_path)
    monkeypatch.setattr(machine.sys, "platform", platform)
    assert caches.__wrapped__() == DEFAULT
