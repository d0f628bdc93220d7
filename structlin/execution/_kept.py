"""Caches of the ways for a structure: plans that are made once, and a bounded amount of compiled code.

A structure is a value, and caches all over hold structures for as long as the process lives. So what is kept of one
must not live as long as it does: it is dropped when so many other structures were met since. A layer holds what it
runs itself, and keeps it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from structlin.structure import Structure

__all__ = ["STRUCTURES", "kept", "once"]

STRUCTURES = 128  # whose compiled passes are kept: some tens of megabytes of code
_recent: OrderedDict[int, weakref.ref[Structure]] = OrderedDict()
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def kept(structure: Structure, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what is kept under a key, made where it is not there."""
    found = structure._kept.get(key)
    if found is None:
        found = structure._kept[key] = make()
        _recent[id(structure)] = weakref.ref(structure)
        _recent.move_to_end(id(structure))
        while len(_recent) > STRUCTURES:
            _, oldest = _recent.popitem(last=False)
            if (other := oldest()) is not None:
                for name in [name for name in other._kept if name[0] != "products"]:
                    other._kept.pop(name, None)
    return found


def once(method: Method) -> Method:
    """Cache the results of a method in ``made`` of its object; a cache of functools would keep the object alive.

    Arguments are given by position. Two threads may both compute a result that neither finds.
    """

    @wraps(method)
    def found(self: Any, *key: object) -> Any:
        name = method, *key
        if name not in self.made:
            return self.made.setdefault(name, method(self, *key))
        return self.made[name]

    return cast(Method, found)
