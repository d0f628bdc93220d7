"""Linear layers of all experts of a mixture in one module, dense or structured.

The expert is the first axis of weights, factors and biases. The input has the rows of all experts, one expert after the
other. The part of an expert is a view, so the products are those of its own rows, and other experts are not computed.
If all experts have the same number of rows, the expert is one more batch axis of the chain, and one call computes all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import structlin
from structlin.execution.torch_ways import TorchChain, torch_chain
from structlin.structure import AbstractStructure, Structure
from structlin_nn._text import check_integer
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["ExpertLinear", "StructuredExperts", "by_expert"]


def by_expert(call: Callable[..., Tensor], x: Tensor, sizes: Sequence[int], stacked: Sequence[Tensor | None]) -> Tensor:
    """Return ``call(rows, *parts)`` of all experts with rows, one after the other.

    ``x`` has ``sizes[e]`` rows of expert e, and ``stacked`` tensors have a part for each expert. The gradient of such a
    tensor is put together once, with zeros for experts without rows.
    """
    parts = [[None] * len(sizes) if t is None else t.unbind() for t in stacked]
    rows = x.split(list(sizes))
    used = [e for e, size in enumerate(sizes) if size] or [0]
    return torch.cat([call(rows[e], *(part[e] for part in parts)) for e in used])


def _check(x: Tensor, sizes: Sequence[int], experts: int, in_features: int) -> None:
    if x.ndim == 2 and x.shape[1] != in_features:
        raise ValueError(
            f"the last axis of the input must have size in_features = {in_features}, got shape {tuple(x.shape)}"
        )
    if len(sizes) != experts or x.ndim != 2 or sum(sizes) != len(x) or min(sizes) < 0:
        raise ValueError(
            f"the input must have the rows of {experts} experts, one expert after the other, and sizes their numbers; "
            f"got shape {tuple(x.shape)} and {len(sizes)} sizes with the sum {sum(sizes)}"
        )


def _batched(structure: AbstractStructure, experts: int) -> TorchChain | None:
    """Return the chain of a block-diagonal matrix with one block for each expert; None if there is none."""
    if not isinstance(structure, Structure) or any(structure.padding):
        return None
    if any(one.output != after.input for one, after in pairwise(structure.steps)):  # regrouped vectors
        return None
    sizes = dict(structure.sizes)
    axis = next(letter for letter in ascii_letters if letter not in sizes)
    steps = [f"{axis}{s.input},{axis}{s.factor}->{axis}{s.output}" for s in structure.steps]
    return torch_chain(Structure.parse("; ".join(steps), {axis: experts, **sizes}))


class ExpertLinear(nn.Module):
    """Dense linear layers of several experts, ``y = W_e x + b_e`` for the rows x of expert e.

    Parameters
    ----------
    num_experts, in_features, out_features
        Sizes of the weight (num_experts, out_features, in_features).
    bias
        Add learned biases (num_experts, out_features).
    device, dtype
        Device and dtype of the parameters.

    Examples
    --------
    >>> layer = ExpertLinear(3, 8, 4)
    >>> layer(torch.ones(5, 8), sizes=(2, 0, 3)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_integer("num_experts", num_experts)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weights and biases as in ``nn.Linear``."""
        for parameter in self.parameters():
            parameter.uniform_(-1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Apply the layers to rows (sum of sizes, in_features), of which ``sizes[e]`` belong to expert e."""
        _check(x, sizes, self.num_experts, self.in_features)
        return by_expert(F.linear, x, sizes, (self.weight, self.bias))

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class StructuredExperts(StructuredLinear):
    """Structured linear layers of several experts, ``y = A_e x + b_e`` for the rows x of expert e.

    All experts have the same structure. Each parameter of :class:`StructuredLinear` has a first axis more, the experts.
    Initial deviations, caps, gains, learning rates and updates of Muon are those of the layer of one expert. Experts
    without rows are not computed; their gradients are 0.

    Parameters
    ----------
    num_experts
        Number of experts.
    in_features, out_features
        Sizes of the matrix of an expert.
    *args, **options
        Options of :class:`StructuredLinear`.

    Examples
    --------
    >>> layer = StructuredExperts(3, 8, 8, structure="low_rank", rank=2)
    >>> [tuple(factor.shape) for factor in layer.factors], layer(torch.ones(5, 8), sizes=(2, 0, 3)).shape
    ([(3, 2, 8), (3, 8, 2)], torch.Size([5, 8]))
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, *args: Any, **options: Any) -> None:
        check_integer("num_experts", num_experts)
        self._lead = (num_experts,)
        super().__init__(in_features, out_features, *args, **options)
        self._together = _batched(self.structure, num_experts)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self._lead[0]

    @property
    def operator(self) -> structlin.StructuredOperator:
        """Not defined: each expert has a matrix of its own. See :meth:`operators`."""
        raise AttributeError  # torch then calls __getattr__

    def __getattr__(self, name: str) -> Any:
        if name == "operator":
            raise AttributeError("StructuredExperts has one operator for each expert; call operators()")
        return super().__getattr__(name)

    def operators(self) -> tuple[structlin.StructuredOperator, ...]:
        """Return the matrix of each expert as an operator, without copies of the factors."""
        dtype = None if len(self.factors) else self._dtype_without_factors()
        return tuple(self._plan.operator_class._build(self.structure, part, dtype) for part in self._parts())

    def _parts(self) -> Iterator[tuple[Tensor, ...]]:
        """Return the factors of each expert."""
        parts = [factor.unbind() for factor in self.effective_factors()]
        return (tuple(part[e] for part in parts) for e in range(self.num_experts))

    def _dense_weight(self) -> Tensor:
        return torch.stack([self._dense(part) for part in self._parts()])

    def _capped(self, factor: Tensor, sigma: float, gain: Tensor | float) -> Tensor:
        return torch.vmap(structlin.rms_cap, (0, None, 0 if isinstance(gain, Tensor) else None))(factor, sigma, gain)

    def __prepare_scriptable__(self) -> StructuredLinear:
        """Raise TypeError: the sizes of the groups are not known."""
        raise TypeError("torch.jit.script cannot compile StructuredExperts")

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Apply the layers to rows (sum of sizes, in_features), of which ``sizes[e]`` belong to expert e."""
        _check(x, sizes, self.num_experts, self.in_features)
        return self._eager(x, sizes)

    def _affine(self, x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, sizes: Sequence[int] = ()) -> Tensor:
        equal = sizes[0] > 0 and len(set(sizes)) == 1
        if equal and self._together is not None and not (self.checkpoint or torch.compiler.is_compiling()):
            number, rows = len(sizes), sizes[0]
            x = x.reshape(number, rows, self.in_features).transpose(0, 1).reshape(rows, -1)
            y = self._together(x, factors, None if bias is None else bias.flatten())
            return y.view(rows, number, self.out_features).transpose(0, 1).reshape(-1, self.out_features)
        return by_expert(
            lambda rows, own, *part: super(StructuredExperts, self)._affine(rows, part, own),
            x, sizes, (bias, *factors),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return f"num_experts={self.num_experts}, {super().extra_repr()}"
