"""The processor that is compiled for, and the compiler: LLVM, by way of llvmlite, where that is installed."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

_LOCK = threading.Lock()  # llvmlite's compiler is used by one thread at a time


@dataclass(frozen=True)
class Target:
    """Vector registers of a processor: bytes of one, and how many there are; LLVM's name of it and its features."""

    width: int
    registers: int
    cpu: str
    features: str
    half_products: bool = False  # multiplies pairs of bfloat16 and adds to float32

    @property
    def attributes(self) -> str:
        """Of functions: without them LLVM may cut vectors of 64 bytes in two."""
        bits = 8 * self.width
        return f'nounwind "min-legal-vector-width"="{bits}" "prefer-vector-width"="{bits}"'


LLVM = (20,)
"""Older ones have other pointers and other products of bfloat16; llvmlite brings this one since 0.45."""


@cache
def _binding() -> Any:
    """llvmlite, ready to compile for this machine; None without it, and if it is too old."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    if llvm.llvm_version_info < LLVM:
        return None
    try:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    except RuntimeError:  # a build of LLVM for other machines
        return None
    return llvm


@cache
def host() -> Target | None:
    """This machine; None where nothing is compiled: no llvmlite or an old one, no AVX2, STRUCTLIN_FUSED=0 is set."""
    if os.environ.get("STRUCTLIN_FUSED", "1") == "0" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    llvm = _binding()
    if llvm is None:
        return None
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        return None
    cpu, flags = llvm.get_host_cpu_name(), features.flatten()
    if all(features.get(name) for name in ("avx512f", "avx512vl", "avx512bw", "avx512dq")):
        return Target(64, 32, cpu, flags, bool(features.get("avx512bf16")))
    return Target(32, 16, cpu, flags)


def address(function: Any) -> int:
    """Of a function of ctypes."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def load(text: str, name: str, target: Target, parameters: list[Any]) -> Callable[..., None]:
    """Compile a module and return its function; ``parameters`` are types of ctypes. Calls hold no lock of Python's."""
    llvm = _binding()
    with _LOCK:
        module = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"\n{text}')
        module.verify()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
            cpu=target.cpu, features=target.features, opt=3, jit=True
        )
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        function: Any = ctypes.CFUNCTYPE(None, *parameters)(engine.get_function_address(name))
    function.engine = engine  # the code lives as long as its engine
    return function
