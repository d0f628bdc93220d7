"""The list of a layer's factors, with the hooks that others put on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["FactorList", "values"]


class FactorList(nn.ParameterList):
    """A ParameterList that can be called for its parameters, as a layer is for its output.

    Hooks run and a patched ``forward`` is called as in any module: pruning, spectral and weight normalisation set the
    factors in hooks, and offloading loads them before ``forward`` and frees them after it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__(parameters)
        self._names = [str(k) for k in range(len(self))]

    def forward(self) -> tuple[Tensor, ...]:
        """Return the factors by name: parameters, or what hooks and parametrizations have put in their places."""
        return tuple(getattr(self, str(k)) for k in range(len(self)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)  # nn.ParameterList refuses to be called

    def _get_name(self) -> str:
        return "ParameterList"  # a repr does not depend on which of the two it is


def values(factors: nn.Module) -> tuple[Tensor, ...]:
    """The values of a list of factors. Without anything that changes them this takes a third of a microsecond."""
    own = factors.__dict__  # attributes of modules take longer
    if factors.__class__ is FactorList and not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    ):
        held = own["_parameters"]
        try:
            return tuple([held[name] for name in own["_names"]])
        except KeyError:  # a factor is no parameter any more
            pass
    return factors() if isinstance(factors, FactorList) else tuple(factors)
