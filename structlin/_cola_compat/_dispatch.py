"""Repairs of what takes long: plum's dispatch, annotations that take operators to pieces, sums that copy."""

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
from cola.ops import LinearOperator, Sum
from plum import dispatch
from plum.function import Function
from plum.resolver import AmbiguousLookupError, NotFoundLookupError, Resolver
from plum.signature import Signature

from structlin._arrays import Array
from structlin._cola_compat._repair import Repair, is_original, replacing

# -- lookup: one condition on one rule keeps plum from remembering anything about a function, and every call then compar
# dozens of signatures (0.1 to 0.4 ms for ``cola.inv``). What a call resolves to is remembered here if the types decide
# it: if it is the same whether conditions hold or not.

_original_lookup = Function._resolve_method_with_cache


def _lookup(self: Function, args: Any = None, types: Any = None) -> Any:
    key = None if args is None else tuple(map(type, args))
    if key in self._cache and not self._pending:
        return self._cache[key][:2]
    found = _original_lookup(self, args=args, types=types)
    if key is not None:
        count = len(self._resolver.signatures)
        undecided = vars(self).setdefault("_structlin_undecided", {})  # types, and the number of rules at that time
        if key not in self._cache and undecided.get(key) != count:
            signature = _decided(self, key)
            if signature is None:
                undecided[key] = count
            else:
                self._cache[key] = signature.implementation, signature.return_type, signature
    return found


def _decided(function: Function, types: tuple[type, ...]) -> Signature | None:
    """Return the signature that arguments of these types resolve to whatever their values; None if values matter."""
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


# -- binding


@dataclass
class _Bound:
    """The part of ``inspect.BoundArguments`` that plum uses, with defaults applied."""

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
        self.least = sum(default is inspect.Parameter.empty for default in self.defaults.values())

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and self.least <= len(args) <= len(self.defaults):
            return _Bound(self.defaults | dict(zip(self.defaults, args, strict=False)))
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


_KINDS = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _slow_cells() -> list[Any]:
    """Return where functions declared by CoLA's ``dispatch.abstract`` store a signature of ``inspect``."""
    found = []
    for function in dispatch.functions.values():
        for cell in getattr(getattr(function, "_abstract", None), "__closure__", None) or ():
            held = cell.cell_contents
            if isinstance(held, inspect.Signature) and {p.kind for p in held.parameters.values()} <= _KINDS:
                found.append(cell)
    return found


def _repair_binding() -> None:
    for cell in _slow_cells():
        cell.cell_contents = _Binder(cell.cell_contents)


# -- annotating


def _annotated(annotation: Any, A: LinearOperator) -> LinearOperator:
    """Return a copy with one more annotation."""
    copy = object.__new__(type(A))
    fields = vars(copy)
    fields.update(vars(A))
    name = "annotations" if "annotations" in fields else "_annotations"  # of one of ours
    fields[name] = fields[name] | {annotation}
    return copy


# -- sums: CoLA's begin with the number 0, and so copy the first term


def _sum_of_columns(self: Any, X: Array) -> Array:
    found = self.Ms[0] @ X
    for M in self.Ms[1:]:
        plus = getattr(M, "_plus_product", None)
        found = found + M @ X if plus is None else plus(found, X)
    return found


def _sum_of_rows(self: Any, X: Array) -> Array:
    return reduce(add, (X @ M for M in self.Ms))


# -- ``cola.solve`` is no dispatched function, so that no rule can tell it from an inverse that is kept

_SOLVE = ("cola", "cola.linalg", "cola.linalg.inverse", "cola.linalg.inverse.inv")


def use_for_solve(solve: Callable[..., Array]) -> None:
    """Put ``solve`` wherever CoLA's own stands."""
    original = sys.modules["cola.linalg.inverse.inv"].solve
    if not is_original(original):
        return
    for name in _SOLVE:
        if getattr(sys.modules[name], "solve", None) is original:
            sys.modules[name].solve = solve  # type: ignore[attr-defined]


SPEED = (
    replacing("lookup", (Function, "_resolve_method_with_cache", _lookup)),
    Repair("binding", lambda: bool(_slow_cells()), _repair_binding),
    replacing("annotating", (WrapMeta, "__call__", _annotated)),
    replacing("sums", (Sum, "_matmat", _sum_of_columns), (Sum, "_rmatmat", _sum_of_rows)),
)
