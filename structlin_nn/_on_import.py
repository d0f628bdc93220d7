"""Import a module of this package after another library.

transformers has no entry points: a package must register itself for ``from_pretrained``. Importing transformers for
that would take seconds, so the registration follows its import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    def __init__(self, name: str, own: str) -> None:
        self.name, self.own = name, own

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(self.own)

        loader.exec_module = exec_module
        return spec


def after_import(name: str, own: str) -> None:
    """Import the module ``own`` after the module ``name``: at once if that is loaded, else when it will be."""
    if name in sys.modules:
        importlib.import_module(own)
    else:
        sys.meta_path.insert(0, _Finder(name, own))
