"""The target processor, and the compiler: LLVM by llvmlite, if it is installed."""

from __future__ import annotations

import ctypes
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import count
from typing import Any

from structlin.execution.compiled import _objects

_LOCK = threading.Lock()  # a target machine of LLVM's is used by one thread at a time
_NUMBERS = count()  # of what was loaded: a linker takes each name once
OPTIONS = (("opt", 3), ("jit", True))  # of the compiler
LINKED = 64  # functions of a linker: it takes 160 KB itself, and keeps 9 KB of each


class CompileError(RuntimeError):
    """LLVM did not compile or load a function. The caller uses another way."""


@dataclass(frozen=True)
class Target:
    """Vector registers of a processor: bytes of one, and how many there are; and the features that code may use.

    ``cpu`` is LLVM's name of a baseline, and ``features`` are LLVM's names of additional features. No other feature of
    the processor's name is used, because a hypervisor may have disabled it. ``tune`` is LLVM's name of the processor
    for whose latencies instructions are ordered. It enables no feature.
    """

    width: int
    registers: int
    features: tuple[str, ...]
    half_products: bool = False  # multiplies pairs of bfloat16 and adds to float32; rounds float32 to bfloat16
    tiles: bool = False  # multiplies tiles of such pairs
    cpu: str = "x86-64"
    tune: str = "generic"

    @property
    def attributes(self) -> str:
        """Attributes of functions; without them LLVM may split vectors of 64 bytes."""
        bits = 8 * self.width
        vectors = f'"min-legal-vector-width"="{bits}" "prefer-vector-width"="{bits}"'
        return f'nounwind {vectors} "tune-cpu"="{self.tune}"'


AVX2 = Target(32, 16, ("avx2", "fma", "f16c"))
AVX512 = Target(64, 32, (*AVX2.features, "avx512f", "avx512vl", "avx512bw", "avx512dq"))
AVX512_BF16 = Target(64, 32, (*AVX512.features, "avx512bf16"), half_products=True)

NEON = Target(16, 32, (), cpu="generic")  # what every 64-bit Arm processor has
X86 = (AVX512_BF16, AVX512, AVX2)
TARGETS = {"x86_64": X86, "amd64": X86, "aarch64": (NEON,), "arm64": (NEON,)}  # by the name of the architecture
TILES = ("amx-tile", "amx-bf16")  # beyond AVX512_BF16

LLVM = (20,)
"""Older ones have other pointers and other products of bfloat16; llvmlite brings this one since 0.45."""


@cache
def _binding() -> Any:
    """Return llvmlite, initialized for this machine; None if it is missing, too old or does not load."""
    try:
        import llvmlite.binding as llvm

        if llvm.llvm_version_info < LLVM:
            return None
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    except (ImportError, OSError, RuntimeError, AttributeError):  # also a build of LLVM for other machines
        return None
    return llvm


@cache
def host() -> Target | None:
    """Return the target of this machine; None if nothing is compiled and the products of torch or of XLA run.

    That is so without llvmlite or with an old one, on x86-64 processors without AVX2 or F16C, and on all that are
    neither x86-64 nor 64-bit Arm.
    """
    targets, llvm = TARGETS.get(platform.machine().lower()), _binding()
    if targets is None or llvm is None:
        return None
    try:
        return supported(llvm.get_host_cpu_features(), llvm.get_host_cpu_name(), targets)
    except RuntimeError:  # LLVM does not know the processor
        return None


def supported(features: dict[str, bool], name: str, among: Sequence[Target] = X86) -> Target | None:
    """Return the best target for these features, tuned for the named processor; None if there is none."""
    for target in among:
        if all(features.get(feature) for feature in target.features):
            return replace(target, tune=name)
    return None


@cache
def tiled_host() -> Target | None:
    """Return this machine with tiles; None if the processor has none or the system does not permit their use."""
    found, llvm = host(), _binding()
    if found is None or not found.half_products or not all(llvm.get_host_cpu_features().get(f) for f in TILES):
        return None
    return with_tiles(found) if _permitted() else None


def with_tiles(target: Target) -> Target:
    return replace(target, features=(*target.features, *TILES), tiles=True)


def _permitted() -> bool:
    """Ask the system for the memory of tiles, which Linux (since 5.16) grants to a process and all its threads.

    See the documentation of Linux, "Using XSTATE features in user space applications".
    """
    if platform.system() != "Linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0


def address(function: Any) -> int:
    """Return the address of a function of ctypes."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def load(text: str, name: str, target: Target, parameters: list[Any], stored: bool = True) -> Callable[..., None]:
    """Return the function of a module; ``parameters`` are types of ctypes. Calls hold no lock of Python's.

    The module is compiled, unless an earlier process has stored its code (:mod:`._objects`). Code that contains
    addresses of this process must not be ``stored``. The code is freed with the last reference to the function. Raises
    :class:`CompileError` if LLVM fails in any way.
    """
    try:
        with _LOCK:
            key = loaded = None
            if stored:
                key = _objects.key_of(text, target, OPTIONS, _binding().get_process_triple(), _version())
                loaded = _stored(key, name)
            if loaded is None:
                machine, module = parsed(text, target)
                code = machine.emit_object(module)
                loaded = _link(code, name)
                if key is not None:
                    _objects.write(key, code)
        function: Any = ctypes.CFUNCTYPE(None, *parameters)(loaded[name])
    except Exception as error:  # of LLVM's: RuntimeError; and whatever else llvmlite raises, MemoryError included
        raise CompileError(f"LLVM did not compile {name!r}: {error}") from error
    function.loaded = loaded
    return function


def _stored(key: str, name: str) -> Any:
    """Return the code that an earlier process has stored, in memory; None if there is none that can be linked."""
    code = _objects.read(key)
    try:
        return None if code is None else _link(code, name)
    except RuntimeError:
        return None


@cache
def _version() -> str:
    import llvmlite

    return f"{llvmlite.__version__} {_binding().llvm_version_info}"


def parsed(text: str, target: Target) -> tuple[Any, Any]:
    """Return the compiler for a target, and a module as LLVM has it, checked."""
    llvm, triple = _binding(), _binding().get_process_triple()
    # In a context of its own: the process's one keeps every type and constant.
    module = llvm.parse_assembly(f'target triple = "{triple}"\n{text}', llvm.create_context())
    module.verify()
    return _machine(target), module


@cache
def _machine(target: Target) -> Any:
    llvm = _binding()
    features = ",".join(f"+{feature}" for feature in target.features)
    machine = llvm.Target.from_triple(llvm.get_process_triple())
    return machine.create_target_machine(cpu=target.cpu, features=features, **dict(OPTIONS))


@lru_cache(maxsize=1)
def _linker(generation: int) -> Any:
    """Return the linker of LINKED functions: one after the other, as each keeps some KB of a function that is gone.

    What is loaded holds the linker that it came from.
    """
    return _binding().create_lljit_compiler(suppress_errors=True)


def _link(code: bytes, name: str) -> Any:
    """Code in memory, with the addresses of its functions; it is freed with this object.

    The code may call only the functions of the process that are named here. Calls of a compiler's runtime library, such
    as ``__truncsfbf2``, would end the process if it does not have that function.
    """
    library = _binding().orcjit.JITLibraryBuilder().add_object_img(code).export_symbol(name)
    # What LLVM makes of loops that clear or copy.
    for symbol, function in (("memset", ctypes.memset), ("memcpy", ctypes.memmove), ("memmove", ctypes.memmove)):
        library.import_symbol(symbol, address(function))
    number = next(_NUMBERS)
    return library.link(_linker(number // LINKED), f"structlin{number}")


@cache
def _warned() -> list[str]:
    """Return what the process was warned of."""
    return []


def warn_once(error: CompileError, instead: str) -> None:
    """Warn, once in the life of the process, that something was not compiled, and say what runs ``instead``."""
    if not _warned():
        _warned().append(str(error))
        warnings.warn(f"{error}. {instead} runs instead, which may be slower.", RuntimeWarning, stacklevel=3)
