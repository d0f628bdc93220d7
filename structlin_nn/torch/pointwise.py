"""Convolutions of kernel size 1 whose weight is a structured matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from structlin_nn.torch.linear import StructuredLinear

__all__ = ["StructuredPointwise"]


class StructuredPointwise(StructuredLinear):
    """Structured layer over the channels at each position: (batch, in, ...) -> (batch, out, ...).

    It replaces a convolution of kernel size 1 without groups and padding.

    Parameters
    ----------
    in_features, out_features
        Numbers of channels.
    stride
        Stride along each axis of positions. Its length is the number of these axes.
    **options
        Options of :class:`StructuredLinear`.

    Examples
    --------
    >>> import torch
    >>> layer = StructuredPointwise(8, 12, stride=(2, 2), structure="low_rank", rank=2)
    >>> layer(torch.ones(3, 8, 6, 6)).shape
    torch.Size([3, 12, 3, 3])
    """

    def __init__(
        self, in_features: int, out_features: int, *args: Any, stride: tuple[int, ...], **options: Any
    ) -> None:
        super().__init__(in_features, out_features, *args, **options)
        self.stride = tuple(stride)

    @classmethod
    def like(cls, convolution: Any) -> Callable[..., StructuredPointwise]:
        """Return a function that creates a layer with the stride of a convolution."""
        return partial(cls, stride=convolution.stride)

    def to_convolution(self, weight: Tensor) -> nn.Module:
        """Return the convolution of torch with a weight (out, in); its other parameters are on the meta device."""
        axes = len(self.stride)
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        bias = self.bias is not None
        made: nn.Module = kind(self.in_features, self.out_features, 1, self.stride, bias=bias, device="meta")
        made.weight = nn.Parameter(weight.reshape(*weight.shape, *[1] * axes))
        return made

    def _eager(self, x: Tensor) -> Tensor:
        """Apply the layer: (batch, in, ...) -> (batch, out, ...), or without the batch axis."""
        axes = len(self.stride)
        if not isinstance(x, Tensor):
            return super()._eager(x)  # type: ignore[unreachable]
        if x.ndim not in (axes + 1, axes + 2):
            raise ValueError(
                f"the input must have a batch, channels and {axes} axes of positions, got shape {tuple(x.shape)}"
            )
        if any(step > 1 for step in self.stride):
            places: Any = (..., *(slice(None, None, step) for step in self.stride))
            x = x[places]
        return super()._eager(x.movedim(-axes - 1, -1)).movedim(-1, -axes - 1)

    def extra_repr(self) -> str:
        """Describe the layer for ``print``."""
        return f"{super().extra_repr()}, stride={self.stride}"
