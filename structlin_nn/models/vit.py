"""The vision transformer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from structlin_nn.models.factory import LinearFactory, StructureConfig
from structlin_nn.models.sizes import check_positive, check_shape, resolve_head_dim
from structlin_nn.models.transformer import Block, Blocks


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a :class:`ViT`. ``input_shape`` is (channels, height, width); ``head_dim`` None: width // heads."""

    width: int
    depth: int = 12
    heads: int = 4
    head_dim: int | None = None
    num_classes: int = 1000
    input_shape: tuple[int, int, int] = (3, 224, 224)
    patch: int = 32
    expansion: int = 4
    structure: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        check_positive(self, "depth", "num_classes", "patch", "expansion")
        resolve_head_dim(self)
        shape = check_shape(self.input_shape)
        object.__setattr__(self, "input_shape", shape)
        if shape[1] % self.patch or shape[2] % self.patch:
            raise ValueError(f"patches of {self.patch} x {self.patch} do not tile images of {shape[1]} x {shape[2]}")

    @property
    def patches(self) -> int:
        """Number of patches of one image."""
        return (self.input_shape[1] // self.patch) * (self.input_shape[2] // self.patch)


class ViT(nn.Module):
    """Vision transformer with a class token (Dosovitskiy et al., 2021) and normalised queries and keys.

    Patch embedding with LayerNorm on both sides, pre-norm blocks, a final LayerNorm, and a head on the class token.
    Query projection, residual branches and head are zero at initialisation.
    (batch, channels, height, width) -> logits (batch, num_classes).

    >>> config = ViTConfig(width=16, depth=1, num_classes=7, input_shape=(1, 8, 8), patch=4)
    >>> ViT(config)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 7])
    """

    default_layers = "all_but_last"

    def __init__(
        self, config: ViTConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, config.input_shape[0] * config.patch**2
        assert config.head_dim is not None
        linear = LinearFactory(config.structure, self.default_layers, device, dtype)
        self.patch_norm = linear.norm(pixels)
        self.patch_embedding = linear(pixels, width, role="input")
        self.embedding_norm = linear.norm(width)
        self.class_token = linear.embedding(1, width)
        self.positions = linear.embedding(config.patches + 1, width)
        self.blocks = Blocks(
            Block(linear, width, config.heads, config.head_dim, config.expansion) for _ in range(config.depth)
        )
        self.norm = linear.norm(width)
        self.head = linear(width, config.num_classes, role="output", zero_init=True)

    def patchify(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, patches, patch * patch * channels)."""
        p = self.config.patch
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (logits, features): the features (batch, width) are what the head reads, after the last norm."""
        if tuple(x.shape[1:]) != self.config.input_shape:
            raise ValueError(f"images of shape (batch, *{self.config.input_shape}) are needed, got {tuple(x.shape)}")
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(self.patchify(x))))
        token = self.class_token.weight.expand(x.shape[0], 1, -1)
        x = torch.cat([token, x], dim=1) + self.positions.weight
        x = self.blocks(x)
        features = self.norm(x[:, 0])
        logits = self.head(features)
        return (logits, features) if return_features else logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass, and compute the rest again; as in timm."""
        self.blocks.recompute = enable

    def example_input(self, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
        """Zeros of the shape that the model takes."""
        return torch.zeros(batch, *self.config.input_shape, device=device)
