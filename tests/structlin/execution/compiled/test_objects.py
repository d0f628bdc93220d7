"""Compiled code on disk: it is what LLVM would compile, and nothing else is ever executed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from helpers.children import output

from structlin.execution.compiled import _objects, _target
from structlin.execution.compiled._ir import Code
from structlin.execution.compiled._target import CompileError, host, load

if host() is None:
    pytest.skip("the compiler for this processor is not there", allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRUCTLIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CompileError("LLVM was asked")

    monkeypatch.setattr(_target, "parsed", fail)


def written_by(number: int) -> int:
    """Return what a function writes that stores ``number``."""
    code = Code()
    code.put(f"store i64 {number}, ptr %table")
    target = host()
    assert target is not None
    function = load(code.function("chain", "ptr %table", target.attributes), "chain", target, [ctypes.c_void_p])
    place = ctypes.c_int64(0)
    function(ctypes.addressof(place))
    return place.value


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("code-*/*"))


def test_code_is_stored_once_and_loaded_without_a_compiler(cache: Path, request: pytest.FixtureRequest) -> None:
    assert [written_by(n) for n in (5, 7, 5)] == [5, 7, 5]
    assert len(files(cache)) == 2
    assert cache.joinpath("code-1").stat().st_mode & 0o077 == 0
    request.getfixturevalue("no_compiler")
    assert [written_by(n) for n in (7, 5)] == [7, 5]
    with pytest.raises(CompileError, match="LLVM was asked"):
        written_by(6)


CHILD = """
import sys, torch
import structlin as sl
from structlin.execution.compiled import _target
from structlin.execution.torch_cpu import CPUChain

def fail(*_):
    raise _target.CompileError("LLVM was asked")

if sys.argv[1] == "stored":
    _target.parsed = fail
structure = sl.design("block_tensor_train", (40, 30), rank=2)
factors = sl.random_factors(structure, backend="torch", dtype="float32", seed=0)
generator = torch.Generator().manual_seed(0)
x, gy = (torch.randn(37, size, generator=generator) for size in (30, 40))
passes = CPUChain(structure).compiled
found = [passes.forward(x, factors), *passes.backward(gy, x, factors, [True, True, True, False])[:-1]]
print([t.double().sum().item() for t in found])
"""


def test_another_process_compiles_nothing() -> None:
    """The text of a module does not depend on the order of sets; the results are equal."""
    compiled, stored = (output("-c", CHILD, k, PYTHONHASHSEED=seed) for k, seed in (("compiled", "1"), ("stored", "2")))
    assert compiled == stored
    assert compiled.count(",") == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b""])
def test_a_damaged_file_is_compiled_again(cache: Path, damage) -> None:
    written_by(5)
    (path,) = files(cache)
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert written_by(5) == 5
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="the owner of a folder is checked on POSIX systems")
def test_a_folder_that_others_may_write_to_is_not_used(cache: Path, request: pytest.FixtureRequest) -> None:
    written_by(5)
    (path,) = files(cache)
    path.parent.chmod(0o770)
    assert written_by(7) == 7
    assert files(cache) == [path]
    request.getfixturevalue("no_compiler")
    with pytest.raises(CompileError, match="LLVM was asked"):
        written_by(5)
    path.parent.chmod(0o700)
    assert written_by(5) == 5


@pytest.mark.skipif(os.name != "posix", reason="the owner of a folder is checked on POSIX systems")
def test_a_folder_of_another_user_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_by(5)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    key = files(cache)[0].name
    assert _objects.read(key) is None
    _objects.write("other", b"code")
    assert [path.name for path in files(cache)] == [key]


@pytest.mark.skipif(os.name != "posix", reason="the owner of a file is checked on POSIX systems")
def test_a_file_that_others_may_write_to_is_not_used(cache: Path, request: pytest.FixtureRequest) -> None:
    written_by(5)
    (path,) = files(cache)
    path.chmod(0o666)
    assert _objects.read(path.name) is None
    path.chmod(0o600)
    request.getfixturevalue("no_compiler")
    assert written_by(5) == 5


def test_code_that_cannot_be_linked_is_compiled_again(cache: Path) -> None:
    written_by(5)
    (path,) = files(cache)
    before = path.read_bytes()
    _objects.write(path.name, b"no object")
    assert written_by(5) == 5
    assert path.read_bytes() == before


def test_code_with_addresses_is_not_stored(cache: Path) -> None:
    target = host()
    assert target is not None
    text = Code().function("chain", "ptr %table", target.attributes)
    load(text, "chain", target, [ctypes.c_void_p], False)
    assert files(cache) == []


def test_without_a_home_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(_objects.wisdom, "root", fail)
    assert written_by(5) == 5


def test_a_failed_write_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    assert written_by(5) == 5
    assert files(cache) == []


def test_a_cache_that_is_no_folder_does_no_harm(cache: Path) -> None:
    cache.write_text("")
    assert written_by(5) == 5


def test_the_files_used_last_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        _objects.write(f"key{number}", bytes(100))
        os.utime(_objects.folder() / f"key{number}", (number, number))
    assert _objects.read("key0") == bytes(100)  # used now
    size = max(512 * path.stat().st_blocks or path.stat().st_size for path in files(cache))
    monkeypatch.setattr(_objects, "LIMIT", 2 * size)
    monkeypatch.setattr(_objects, "PRUNED", 1)
    _objects.write("key4", bytes(100))
    assert [path.name for path in files(cache)] == ["key0", "key3", "key4"]


def test_names_depend_on_text_target_and_versions() -> None:
    target = host()
    parts = [("text", target, "triple", "1"), ("text2", target, "triple", "1"), ("text", target, "triple", "2"),
             ("text", _target.AVX2, "triple", "1")]  # fmt: skip
    assert len({_objects.key_of(*part) for part in parts}) == 4
