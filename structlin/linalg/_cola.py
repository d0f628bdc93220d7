"""What linear algebra needs of CoLA and torch beyond the repairs of ``structlin._cola_compat``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from beartype.door import TypeHint
from cola.annotations import WrapMeta
from cola.backends import np_fns
from cola.ops import Identity, LinearOperator, ScalarMul, Sum
from plum import dispatch
from plum.function import Function
from plum.resolver import AmbiguousLookupError, NotFoundLookupError, Resolver
from plum.signature import Signature

from structlin._arrays import Array
from structlin._cola_compat._composing import _as_scalar, _scalar_mul
from structlin._cola_compat._repair import functions_of
from structlin.operators import StructuredOperator


def _repair_kron() -> None:
    """``torch.kron`` raises where its second argument is no contiguous array, which the transpose of one is not."""
    import torch

    def kron(a: Array, b: Array) -> Array:
        return torch.kron(a.contiguous(), b.contiguous())

    functions_of("torch").kron = kron  # type: ignore[attr-defined]


def _identity_to(self: Identity, device: Any) -> Identity:
    """CoLA's ``I_like(A)`` ends with this; where there is no device A is NumPy's, and so is the identity then."""
    self.device = device
    if device is None:
        self.xnp = np_fns
    return self


Identity.to = _identity_to
if "torch" in sys.modules:  # importing CoLA has imported it where it is installed
    _repair_kron()


def _sum_of_columns(self: Any, X: Array) -> Array:
    return reduce(add, (M @ X for M in self.Ms))


def _sum_of_rows(self: Any, X: Array) -> Array:
    return reduce(add, (X @ M for M in self.Ms))


# CoLA's begin with the number 0, and so copy the first term.
Sum._matmat, Sum._rmatmat = _sum_of_columns, _sum_of_rows


def use_for_solve(solve: Callable[..., Array]) -> None:
    """``cola.solve`` is no dispatched function, so that no rule can tell it from an inverse that is kept."""
    original = sys.modules["cola.linalg.inverse.inv"].solve
    for name in ("cola", "cola.linalg", "cola.linalg.inverse", "cola.linalg.inverse.inv"):
        if getattr(sys.modules[name], "solve", None) is original:
            sys.modules[name].solve = solve  # type: ignore[attr-defined]


# -- dispatch --------------------------------------------------------------------------------------------------------

# One condition on one rule keeps plum from remembering anything about a function, and every call then compares dozens
# of signatures (0.1 to 0.4 ms for ``cola.inv``). What a call resolves to is remembered here if the types decide it:
# if it is the same whether conditions hold or not.

_original_lookup = Function._resolve_method_with_cache


def _lookup(self: Function, args: Any = None, types: Any = None) -> Any:
    found = _original_lookup(self, args=args, types=types)
    if args is not None:
        key = tuple(map(type, args))
        if key not in self._cache and (signature := _decided(self, key)) is not None:
            self._cache[key] = signature.implementation, signature.return_type, signature
    return found


def _decided(function: Function, types: tuple[type, ...]) -> Signature | None:
    """The signature that arguments of these types resolve to whatever their values; None if values matter."""
    matching = [s for s in function._resolver.signatures if _takes(s, types)]
    resolver = Resolver()
    answers = []
    for signatures in (matching, [s for s in matching if s.condition is None]):
        resolver.signatures = [_unconditional(s) for s in signatures]
        try:
            answers.append(resolver.resolve(Signature(*types)).implementation)
        except (AmbiguousLookupError, NotFoundLookupError):
            return None
    if answers[0] is not answers[1]:
        return None
    return next(s for s in matching if s.implementation is answers[0])


def _takes(signature: Signature, types: tuple[type, ...]) -> bool:
    if len(signature.types) > len(types) or (len(signature.types) < len(types) and not signature.has_varargs):
        return False
    wanted = signature.expand_varargs(len(types))
    return all(TypeHint(t) <= TypeHint(w) for t, w in zip(types, wanted, strict=True))


def _unconditional(signature: Signature) -> Signature:
    copy = signature.__copy__()
    copy.condition = None
    copy.precedence = signature.precedence + (0.5 if signature.condition is not None else 0)
    return copy


Function._resolve_method_with_cache = _lookup  # type: ignore[method-assign]


@dataclass
class _Bound:
    """What plum asks of ``inspect.BoundArguments``, with the defaults in place."""

    arguments: dict[str, Any]

    def apply_defaults(self) -> None:
        pass


class _Binder:
    """A signature without ``*args`` that binds ordinary calls by itself: ``inspect`` takes 10 microseconds each time.

    Calls that do not fit go to ``inspect``, whose errors they get.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        self.defaults = {name: p.default for name, p in signature.parameters.items()}

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        left, arguments = iter(args), {}
        for name, default in self.defaults.items():
            value = next(left, default) if name not in kwargs else kwargs[name]
            if value is inspect.Parameter.empty:
                return self.signature.bind(*args, **kwargs)
            arguments[name] = value
        given = sum(name in kwargs for name in list(self.defaults)[len(args) :])
        if given != len(kwargs) or len(args) > len(arguments):
            return self.signature.bind(*args, **kwargs)
        return _Bound(arguments)


def _bind_quickly() -> None:
    """For every function that CoLA declares by ``dispatch.abstract``."""
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    for function in dispatch.functions.values():
        declared = getattr(function, "_abstract", None)
        for cell in getattr(declared, "__closure__", None) or ():
            found = cell.cell_contents
            if isinstance(found, inspect.Signature) and {p.kind for p in found.parameters.values()} <= kinds:
                cell.cell_contents = _Binder(found)


_bind_quickly()


def _annotated(annotation: Any, A: LinearOperator) -> LinearOperator:
    """A copy with one more annotation. CoLA's takes the operator and all of its members to pieces for it."""
    if isinstance(A, StructuredOperator):
        return A._with(A.structure, A.factors, A._annotations | {annotation})
    copy = object.__new__(type(A))
    vars(copy).update(vars(A), annotations=A.annotations | {annotation})
    return copy


WrapMeta.__call__ = _annotated


def scalar_like(A: LinearOperator, c: Any) -> ScalarMul:
    """c times the identity, of A's shape, in the library of A; complex where c is."""
    c, dtype = _as_scalar(A, c)
    return _scalar_mul(A, c, dtype, A.shape[0])
