"""The residual MLP on pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.models.factory import LinearFactory, StructureConfig, check_images, check_positive, check_shape
from structlin_nn.models.transformer import Blocks, ImageModel
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


class MLPBlock(nn.Module):
    """``h + down(gelu(up(norm(h))))``, the branch zero at initialisation. (..., width) -> (..., width)."""

    def __init__(self, linear: LinearFactory, width: int, expansion: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = linear.norm(width, bias=bias)
        self.up = linear(width, expansion * width, bias=bias)
        self.down = linear(expansion * width, width, bias=bias, zero_init=True)

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h + down(gelu(up(norm(h))))``."""
        return mlp(h, self.up, self.down, norm=self.norm, residual=True)


class MLP(ImageModel):
    """Residual MLP on permuted pixels (Qiu et al., *Compute Better Spent*, ICML 2024, section 4).

    The pixels of an image are put into a fixed random order, the same for all images and models, so that no
    structure profits from the grid. (batch, channels, height, width) -> logits (batch, num_classes).

    Examples
    --------
    >>> model = MLP(MLPConfig(width=16, input_shape=(1, 4, 4)))
    >>> model(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 10])
    """

    default_layers = "all_but_last"
    permutation: Tensor

    def __init__(
        self, config: MLPConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        linear = LinearFactory(config.structure, self.default_layers, device, dtype)
        pixels = math.prod(config.input_shape)
        self.register_buffer("permutation", torch.empty(pixels, dtype=torch.int64, device=device))
        self.reset_buffers()
        bias = config.bias
        self.input = linear(pixels, config.width, role="input", bias=bias)
        self.blocks = Blocks(MLPBlock(linear, config.width, config.expansion, bias) for _ in range(config.depth))
        self.output = linear(config.width, config.num_classes, role="output", bias=bias, zero_init=True)

    def reset_buffers(self) -> None:
        """Write the fixed order of the pixels."""
        generator = torch.Generator().manual_seed(PERMUTATION_SEED)
        order = torch.randperm(self.permutation.numel(), generator=generator, device="cpu")
        self.permutation.copy_(order)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or (logits, features): the features (batch, width) are what the output layer reads."""
        check_images(x, self.config.input_shape)
        h = F.gelu(self.input(x.flatten(1).index_select(1, self.permutation)))
        h = self.blocks(h)
        logits = self.output(h)
        return (logits, h) if return_features else logits
