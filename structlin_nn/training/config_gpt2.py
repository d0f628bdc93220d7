"""The configuration of GPT-2 on token files, and its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structlin_nn.training.base import RunConfig, check, option

__all__ = ["GPT2_RECIPE", "GPT2TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class GPT2TrainConfig(RunConfig):
    """Everything that decides the result of a training run of GPT-2, apart from the tokens.

    `GPT2TrainConfig()` is no recipe; see `structlin_nn.training.config.recipe`.

    Raises:
        TypeError, ValueError: as `RunConfig`.

    Example:
        >>> GPT2TrainConfig(width=128, heads=2, context=64, steps=100, warmup_steps=10).context
        64
    """

    task = "gpt2"

    model: str = option("gpt2", "which model to train", ("gpt2",))
    width: int = option(768, "width of the model")
    base_width: int = option(768, "width at which the learning rate was tuned")
    depth: int = option(12, "number of blocks")
    heads: int = option(12, "heads of the attention")
    head_dim: int = option(0, "size of a head; 0: width // heads")
    context: int = option(512, "tokens in a sequence")
    vocabulary: int = option(0, "tokens that the model knows; 0: the data's, rounded up to a multiple of 64")
    expansion: int = option(4, "width of the feed-forward layers, as a multiple of the width")
    qk_norm: bool = option(True, "normalise queries and keys")
    attention_scale: float = option(0.0, "factor on the attention logits; 0: 8 / head_dim")
    bias: bool = option(False, "biases in all linear layers but the head, and in the norms")
    tied: bool = option(False, "the token embedding is the head, which then is not structured")
    gelu: str = option("none", "GELU, exact or in the tanh approximation", ("none", "tanh"))
    layers: str = option("all", "which linear layers are structured, the others stay dense", ("all", "all_but_last"))
    batch_size: int = option(480, "sequences of a step, of all processes and parts together")
    steps: int = option(1000, "steps of the run")
    warmup_steps: int = option(0, "steps of linear warm-up")
    eval_every: int = option(100, "steps from one evaluation to the next")
    eval_batches: int = option(100, "batches of the training and of the validation tokens that are evaluated")
    whole_validation: bool = option(False, "evaluate on all validation tokens instead of eval_batches of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "depth", "heads", "context", "expansion", "steps", "eval_every", "eval_batches")
        self._at_least(0, "head_dim", "vocabulary", "warmup_steps", "attention_scale")
        check("warmup_steps", self.warmup_steps, self.warmup_steps < self.steps, "less than steps")
        if self.head_dim == 0 and self.heads > self.width:
            raise ValueError(f"a width of {self.width} has no room for {self.heads} heads; give head_dim")


GPT2_RECIPE: dict[str, Any] = {
    "base_width": 768,
    "layers": "all",
    "batch_size": 480,
    "context": 512,
    "steps": 600_000,
    "lr": 6e-4,
    "warmup_steps": 2000,
    "final_lr": 0.1,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "clip": 1.0,
    "eval_every": 1000,
}
"""The paper's 600,000 steps of 480 sequences of 512 tokens; what it does not state is as in nanoGPT
(Karpathy, https://github.com/karpathy/nanoGPT): learning rate and its schedule, weight decay, betas, clipping."""
