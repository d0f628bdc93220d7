"""Neural networks with structured layers: adapters for torch and flax, models, recipes and the command line.

The names below are loaded when they are used, so that importing this package loads neither torch nor jax. Those of the
adapters are of torch; `structlin_nn.flax` has the same for flax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from structlin_nn._on_import import after_import

if TYPE_CHECKING:
    from structlin_nn.models import build_model as build_model
    from structlin_nn.recipes import recipe as recipe
    from structlin_nn.records import read_record as read_record
    from structlin_nn.torch import Muon as Muon
    from structlin_nn.torch import StructuredLinear as StructuredLinear
    from structlin_nn.torch import count as count
    from structlin_nn.torch import load_structured as load_structured
    from structlin_nn.torch import parameter_groups as parameter_groups
    from structlin_nn.torch import project_linear as project_linear
    from structlin_nn.torch import replace_linear as replace_linear
    from structlin_nn.torch import save_structured as save_structured
    from structlin_nn.torch import to_dense_linear as to_dense_linear
    from structlin_nn.trained import load_trained as load_trained
    from structlin_nn.trained import open_trained as open_trained

_MODULES = {
    "models": ("build_model",),
    "recipes": ("recipe",),
    "records": ("read_record",),
    "torch": (
        "Muon", "StructuredLinear", "count", "load_structured", "parameter_groups", "project_linear", "replace_linear",
        "save_structured", "to_dense_linear",
    ),
    "trained": ("load_trained", "open_trained"),
}  # fmt: skip
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_PLACES)

# Files of transformers with structured layers load without a call of ours.
after_import("transformers.modeling_utils", f"{__name__}.torch.transformers")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
