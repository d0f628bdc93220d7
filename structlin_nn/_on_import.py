"""Import of optional packages, and of a module of this package after another library.

transformers has no entry points: a package must register itself for ``from_pretrained``. Importing transformers for
that would take seconds, so the registration follows its import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


def needed(name: str, what: str, extra: str) -> Any:
    """Return a module of an optional package; an ImportError says which extra of this package installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{what}: pip install 'structlin[{extra}]' ({error})") from error
    except (OSError, RuntimeError) as error:  # torchvision's, beside a torch of another build
        raise ImportError(f"{what}, and {name} cannot be imported beside this torch ({error})") from error


def after_import(name: str, own: str) -> None:
    """Import the module ``own`` after the module ``name``: at once if that is loaded, else when it will be."""
    if name in sys.modules:
        importlib.import_module(own)
        return

    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != name:
            return None
        sys.meta_path.remove(finder)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(own)

            loader.exec_module = exec_module
        return spec

    finder: Any = SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
