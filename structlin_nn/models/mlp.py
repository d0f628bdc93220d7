"""The residual MLP on pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.models.factory import LinearFactory, StructureConfig, check_images, check_positive, check_shape
from structlin_nn.models.parts import MLPBlockParts, MLPParts
from structlin_nn.models.transformer import ImageModel
from structlin_nn.torch import mlp

PERMUTATION_SEED = 0


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an :class:`MLP`. ``input_shape`` is (channels, height, width); ``expansion`` that of the blocks.

    ``bias=False`` leaves out the biases of layers and norms.
    """

    width: int
    depth: int = 3
    num_classes: int = 10
    input_shape: tuple[int, int, int] = (3, 32, 32)
    expansion: int = 4
    bias: bool = True
    structure: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        check_positive(self, "width", "depth", "num_classes", "expansion")
        object.__setattr__(self, "input_shape", check_shape(self.input_shape))


class MLPBlock(MLPBlockParts, nn.Module):
    """The block of :class:`structlin_nn.models.parts.MLPBlockParts`."""

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h + down(gelu(up(norm(h))))``."""
        return mlp(h, self.up, self.down, norm=self.norm, residual=True)


class MLP(MLPParts, ImageModel):
    """Residual MLP on permuted pixels (Qiu et al., *Compute Better Spent*, ICML 2024, section 4).

    The pixels of an image are put into a fixed random order, the same for all images and models, so that no
    structure profits from the grid. (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> model = MLP(MLPConfig(width=16, input_shape=(1, 4, 4)))
    >>> model(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 10])
    """

    block = MLPBlock
    permutation: Tensor

    def make(self, linear: LinearFactory, config: MLPConfig) -> None:
        """Make the layers, and the fixed order of the pixels."""
        super().make(linear, config)
        empty = torch.empty(math.prod(config.input_shape), dtype=torch.int64, device=linear.device)
        self.register_buffer("permutation", empty)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Write the fixed order of the pixels, for example after ``to_empty``."""
        generator = torch.Generator().manual_seed(PERMUTATION_SEED)
        self.permutation.copy_(torch.randperm(len(self.permutation), generator=generator, device="cpu"))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features): the features (batch, width) are what the output layer reads."""
        check_images(x, self.config.input_shape)
        h = F.gelu(self.input(x.flatten(1).index_select(1, self.permutation)))
        h = self.blocks(h)
        logits = self.output(h)
        return (logits, h) if return_features else logits
