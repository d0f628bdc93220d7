"""The class of a repair, and functions that several repairs use."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

from cola.backends import np_fns
from plum import dispatch
from plum.resolver import AmbiguousLookupError
from plum.signature import Signature

from structlin._arrays import library_of_array


@dataclass(frozen=True)
class Repair:
    """A repair of CoLA. ``broken`` returns whether the defect exists, and imports no array library for that."""

    name: str
    broken: Callable[[], bool]
    apply: Callable[[], None]


def is_original(function: Any) -> bool:
    """Whether a function is the original of CoLA, or of the library from which CoLA has it."""
    return str(function.__module__).partition(".")[0] in ("cola", "plum", "torch")


def replacing(name: str, *changes: tuple[Any, str, Any], broken: Callable[[], bool] | None = None) -> Repair:
    """Return a repair that sets attributes; by default as long as the first one is the original."""

    def apply() -> None:
        for owner, attribute, new in changes:
            setattr(owner, attribute, new)

    return Repair(name, broken or (lambda: is_original(getattr(*changes[0][:2]))), apply)


def in_library(name: str, library: str, attribute: str, new: Any, broken: Callable[[], bool] | None = None) -> Repair:
    """Return a repair of CoLA's array functions for a library, which importing CoLA has imported if it is installed."""

    def is_broken() -> bool:
        if sys.modules.get(library) is None:
            return False
        return broken() if broken else is_original(getattr(functions_of(library), attribute))

    return Repair(name, is_broken, lambda: setattr(functions_of(library), attribute, new))


def implementation(name: str, *types: Any) -> Callable[..., Any]:
    """Return the method of CoLA's dispatched function ``name`` for arguments of ``types``."""
    return dispatch.functions[name].resolve_method(Signature(*types))[0]


def is_ambiguous(name: str, *types: Any) -> bool:
    """Whether two rules of ``name`` apply to ``types`` with equal precedence."""
    try:
        implementation(name, *types)
    except AmbiguousLookupError:
        return True
    return False


def rule(
    name: str, precedence: float = 1, cond: Callable[..., bool] | None = None, types: Sequence[type] = ()
) -> Callable[[Any], Any]:  # fmt: skip
    """Register a method of CoLA's dispatched function ``name``, for ``types`` or by default for its annotations."""

    def register(method: Any) -> Any:
        method.__name__ = name
        given = zip(inspect.signature(method).parameters, types, strict=True) if types else ()
        method.__annotations__ = dict(given) or get_type_hints(method)
        dispatch(method, cond=cond, precedence=precedence)  # type: ignore[arg-type]
        return method

    return register


@cache
def functions_of(backend: str) -> ModuleType:
    """Return CoLA's array functions for ``numpy``, ``torch`` or ``jax``."""
    # Not cola.backends.get_xnp: for jax it switches the whole process to the CPU.
    if backend == "jax":
        from cola.backends import jax_fns

        return jax_fns
    if backend == "torch":
        from cola.backends import torch_fns

        return torch_fns
    return np_fns


def library_of(functions: ModuleType) -> str:
    """Return ``numpy``, ``torch`` or ``jax`` for CoLA's array functions, without importing them."""
    return functions.__name__.rpartition(".")[2].removesuffix("_fns").replace("np", "numpy")


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array of one of the three libraries."""
    return library_of_array(x) is not None


def device_of(x: Any) -> Any:
    """Return the device of an array; None for NumPy arrays, and for placeholders of pytree transformations."""
    library = library_of_array(x)
    if library != "jax":
        return x.device if library == "torch" else None
    import jax

    return functions_of("jax").get_default_device() if isinstance(x, jax.core.Tracer) else x.device
