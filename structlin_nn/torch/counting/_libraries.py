"""Changes to other libraries while their operations are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


def _tracing_on_meta(is_tracing: Callable[..., bool]) -> Callable[..., bool]:
    return lambda tensor=None: getattr(tensor, "is_meta", False) or is_tracing(tensor)


_REPLACEMENTS: dict[tuple[str, str], Callable[[Any], Any]] = {
    # Without torch.compile, flex_attention compiles itself, which torch does not support under a dispatch mode.
    ("torch.nn.attention.flex_attention", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"): lambda before: True,
    # transformers reads the values of a padding mask, unless it is traced; a mask on the meta device has none.
    ("transformers.masking_utils", "is_tracing"): _tracing_on_meta,
}


@contextmanager
def adapted_libraries() -> Iterator[None]:
    """Adapt the libraries that are imported, and restore them afterwards."""
    with ExitStack() as stack:
        for (name, attribute), replacement in _REPLACEMENTS.items():
            module = sys.modules.get(name)
            if module is not None and hasattr(module, attribute):
                before = getattr(module, attribute)
                stack.callback(setattr, module, attribute, before)
                setattr(module, attribute, replacement(before))
        yield
