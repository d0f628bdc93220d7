"""The blocks of a model, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.ModuleList):
    """Modules that are applied in turn.

    With ``recompute``, the backward pass has only the input of each, and computes the rest again (activation
    checkpointing: Chen et al., *Training Deep Nets with Sublinear Memory Cost*, 2016).

    >>> blocks = Blocks([nn.Linear(3, 3), nn.Tanh()])
    >>> blocks(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            again = self.recompute and torch.is_grad_enabled()
            # Nothing in a block is random.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x
