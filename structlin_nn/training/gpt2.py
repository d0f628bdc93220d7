"""The pipeline of GPT-2: random pieces of a text, next-token prediction, perplexity."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.data.tokens import EVALUATION_SEED, IGNORE, evaluation_batches, open_tokens, token_batch
from structlin_nn.training.config import GPT2TrainConfig
from structlin_nn.training.distributed import Processes
from structlin_nn.training.task import Task

__all__ = ["GPT2Task", "model_vocabulary", "token_loss"]

PROBED_SEQUENCES = 4
"""Pieces of the training tokens on which features and gains are measured."""


class GPT2Task(Task):
    """Language modelling on token files.

    Args:
        config: of the run.
        processes: of the run.
        data_root: folder with ``train.bin`` and ``val.bin``.

    Raises:
        ValueError: damaged data, a vocabulary that is smaller than the data's, too few tokens.
    """

    unit = "seq"
    sums = 2

    def __init__(
        self, config: GPT2TrainConfig, processes: Processes, data_root: str | os.PathLike[str] | None = None
    ) -> None:
        self.config: GPT2TrainConfig = config
        self.processes = processes
        part = self.part_size()
        if data_root is None:
            raise ValueError("GPT-2 is trained on a folder with train.bin and val.bin: none was given")
        self.digest = processes.first(lambda: open_tokens(data_root).digest)
        self.data = open_tokens(data_root, digest=self.digest)
        self.outputs = model_vocabulary(config, self.data.vocab_size)
        self.steps, self.warmup = config.steps, config.warmup_steps
        # Evaluation takes as many sequences at once as a part of a step, and so fits where that does.
        self.evaluated = part * processes.size
        self.taken = 0
        token_batch(self.data.train, batch_size=config.batch_size, seed=config.seed, step=0, **self._where())
        if not config.whole_validation:
            self._evaluated(self.data.val)

    def _where(self) -> dict[str, Any]:
        return {"block_size": self.config.context, "rank": self.processes.rank, "world_size": self.processes.size}

    def _evaluated(self, tokens: Any, whole: bool = False) -> Iterable[tuple[Tensor, Tensor]]:
        # The same pieces, whatever the parts of a step and the processes.
        sequences = None if whole else self.config.eval_batches * self.config.batch_size
        batches = evaluation_batches(tokens, batch_size=self.evaluated, sequences=sequences, **self._where())
        return (self._moved(x, y) for x, y in batches)

    def _moved(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    def described(self) -> dict[str, Any]:
        return {
            "name": self.data.name,
            "train_tokens": len(self.data.train),
            "val_tokens": len(self.data.val),
            "vocabulary": self.data.vocab_size,
            "tokenizer": self.data.tokenizer,
            "sha256": self.digest,
        }

    def introduction(self) -> str:
        data = self.data
        tokens = f"{len(data.train):,} training and {len(data.val):,} validation tokens"
        return f"{data.name}, {tokens}, vocabulary {data.vocab_size}"

    def parts(self) -> list[Any]:
        x, y = token_batch(
            self.data.train,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            step=self.taken,
            **self._where(),
        )
        self.taken += 1
        x, y = self._moved(x, y)
        return list(zip(x.chunk(self.config.accumulate), y.chunk(self.config.accumulate), strict=True))

    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
        x, y = part
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        return loss, torch.zeros(1, device=loss.device)

    def add(self, sums: Tensor, loss: Tensor, statistics: Tensor) -> None:
        sums[0] += loss
        sums[1] += 1

    def evaluates(self, step: int) -> bool:
        return step == self.steps or step % self.config.eval_every == 0

    def evaluate(self, model: Callable[..., Any], step: int, sums: list[float]) -> dict[str, Any]:
        train_loss, _ = token_loss(model, self._evaluated(self.data.train), self.processes)
        val = self._evaluated(self.data.val, self.config.whole_validation)
        val_loss, val_tokens = token_loss(model, val, self.processes)
        total, steps = sums
        return {
            "tokens": step * self.config.batch_size * self.config.context,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_perplexity": math.exp(val_loss),
            "val_tokens": val_tokens,
            "batch_loss": total / steps if steps else None,
        }

    def summary(self, evaluation: dict[str, Any]) -> str:
        return (
            f"step {evaluation['step']:>6} of {self.steps}  loss: train {evaluation['train_loss']:.4f}, "
            f"validation {evaluation['val_loss']:.4f}  perplexity {evaluation['val_perplexity']:.2f}"
        )

    def probe(self) -> Tensor:
        size = {"block_size": self.config.context, "batch_size": PROBED_SEQUENCES}
        x, _ = token_batch(self.data.train, seed=EVALUATION_SEED, step=0, **size)
        return torch.from_numpy(x).to(self.processes.device)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["step"]


def model_vocabulary(config: GPT2TrainConfig, size: int) -> int:
    """Tokens that the model knows, for data with a vocabulary of `size`.

    Raises:
        ValueError: a vocabulary that is smaller than that of the data.

    >>> model_vocabulary(GPT2TrainConfig(), 50257)
    50304
    """
    known = config.vocabulary or -(-size // 64) * 64
    if known < size:
        raise ValueError(f"vocabulary {known} is smaller than that of the data, {size}")
    return known


@torch.no_grad()
def token_loss(
    model: Callable[..., Any], batches: Iterable[tuple[Tensor, Tensor]], processes: Processes | None = None
) -> tuple[float, int]:
    """Mean cross-entropy in nats over all targets of some batches, and the number of these targets.

    Every target has the same weight, whatever the shape of its batch; perplexity is ``exp`` of this mean, and not a
    mean of perplexities.

    Args:
        model: tokens (batch, length) to logits (batch, length, vocabulary).
        batches: (tokens, targets); targets of `structlin_nn.data.tokens.IGNORE` count for nothing.
        processes: that share the batches, None for one.

    Raises:
        ValueError: no targets.

    >>> uniform = lambda x: torch.zeros(*x.shape, 8)
    >>> x = torch.zeros(2, 3, dtype=torch.int64)
    >>> loss, targets = token_loss(uniform, [(x, x), (x[:1], x[:1])])
    >>> round(math.exp(loss), 4), targets
    (8.0, 9)
    """
    total: Tensor | None = None
    for x, y in batches:
        logits = model(x).flatten(0, 1)
        if total is None:
            total = torch.zeros(2, dtype=torch.float64, device=logits.device)
        total[0] += F.cross_entropy(logits.float(), y.flatten(), reduction="sum", ignore_index=IGNORE).double()
        total[1] += (y != IGNORE).sum()
    if total is None:
        raise ValueError("there are no batches to evaluate")
    if processes is not None:
        processes.sum(total)
    loss, number = total.tolist()
    return loss / number, int(number)
