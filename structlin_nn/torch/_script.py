"""What ``torch.jit.script`` needs of a layer: einsums that it can compile, in place of the ways of structlin.execution.

``torch.jit`` is deprecated, so only chains of einsums with their own parameters are supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin.structure import AbstractStructure, Structure


class Scriptable(nn.Module):
    """Part of a layer that ``torch.jit.script`` compiles."""

    __jit_unused_properties__ = ("operator",)
    if TYPE_CHECKING:  # torch.jit does not know these annotations
        structure: AbstractStructure
        factors: nn.ParameterList
        bias: nn.Parameter | None
        in_features: int
        out_features: int
        rms_cap: bool
        checkpoint: bool

    def __prepare_scriptable__(self) -> Scriptable:
        """Add the attributes that the compiled code reads; TypeError for a layer that it cannot express."""
        structure, found, stride = self.structure, self.factors, getattr(self, "stride", ())
        hooks = [key for key, value in vars(found).items() if key.endswith("_hooks") and value]
        if not isinstance(structure, Structure):
            reason = f"the structure is not a chain of einsums: {structure!r}"
        elif self.rms_cap or any(step > 1 for step in stride):
            reason = "it caps its factors" if self.rms_cap else f"it has stride {stride}"
        elif self.checkpoint:
            reason = "it has checkpoint=True"
        elif hooks or list(found._parameters) != [str(k) for k in range(len(structure.steps))]:
            reason = "the factors are changed by hooks, pruning or parametrizations"
        elif any(type(factor.data) is not Tensor for factor in found):
            reason = "the factors are quantised or distributed"
        else:
            sizes = dict(structure.sizes)
            self._equations = [f"...{s.input},{s.factor}->...{s.output}" for s in structure.steps]
            self._sizes = [[sizes[a] for a in s.input] for s in structure.steps]
            self._padding, self._axis = structure.padding[0], -1 - len(stride)
            return self
        raise TypeError(
            f"torch.jit.script cannot compile the layer {self.in_features} -> {self.out_features} ({reason}); "
            "use torch.export.export, which supports all layers"
        )

    def _scripted(self, x: Tensor) -> Tensor:
        """Apply the layer, in the subset of Python that ``torch.jit`` compiles."""
        if x.dim() < -self._axis or x.shape[self._axis] != self.in_features:
            raise ValueError(
                f"axis {self._axis} of the input must have size in_features = {self.in_features}, got shape {x.shape}"
            )
        y = self._products(x.movedim(self._axis, -1))
        if self.bias is not None:
            y = y.add_(self.bias)  # in the dtype to which autocast casts the operands of einsum
        return y.movedim(-1, self._axis)

    def _scripted_weight(self) -> Tensor:
        like = self.factors[0]
        return self._products(torch.eye(self.in_features, dtype=like.dtype, device=like.device)).mT

    def _products(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        y = F.pad(x, [0, self._padding])
        for k, factor in enumerate(self.factors):
            y = torch.einsum(self._equations[k], y.reshape(list(lead) + self._sizes[k]), factor)
        return y.flatten(len(lead))[..., : self.out_features]
