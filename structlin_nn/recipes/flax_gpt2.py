"""GPT-2 in flax.nnx with optax: the tokens, rates and records of `structlin_nn.recipes.gpt2`.

    structlin train flax-gpt2 --data DIR --structure block_tensor_train --width 1024 --heads 16

To change the loss or the model, copy this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch

from structlin_nn.data.tokens import IGNORE, evaluation_batches, open_tokens, token_batch
from structlin_nn.recipes import gpt2
from structlin_nn.recipes._flax import FlaxConfig, FlaxRun
from structlin_nn.recipes._run import Options, Result

__all__ = ["Config", "Options", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(FlaxConfig, gpt2.Config):
    """Options of `structlin_nn.recipes.gpt2.Config` in float32, without compile, recompute and muon."""


def train(config: Config, options: Options, *, watch: Any = None) -> Result:
    """Train a model, or resume a run from its last checkpoint; arguments and errors as `gpt2.train`."""
    with FlaxRun(config, options, watch) as run:
        size = run.group.part_size(config)
        data = open_tokens(options.needs("a folder with train.bin and val.bin"))
        vocabulary = gpt2.vocabulary_of(config, data.vocab_size)

        # Model and optimiser.
        x, _ = token_batch(data.train, block_size=config.context, batch_size=4, seed=gpt2.PROBE_SEED, step=0)
        run.start(
            gpt2.build, vocabulary, steps=config.steps, warmup=config.warmup_steps, sample=torch.from_numpy(x[:1]),
            probe=torch.from_numpy(x), data=gpt2.described(data), decay=gpt2.decayed(config),
        )  # fmt: skip

        def loss(model: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean(), None

        step = run.make_step(loss)

        @jax.jit
        def total_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits, counted = run.model(params)(x), y != IGNORE
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, y, 0))
            return jnp.where(counted, losses, 0.0).sum()

        def token_loss(tokens: Any, sequences: int | None) -> tuple[float, int]:
            total, number = 0.0, 0
            for x, y in evaluation_batches(tokens, block_size=config.context, batch_size=size, sequences=sequences):
                total += float(total_loss(run.params, x, y))
                number += int((y != IGNORE).sum())
            return total / number, number

        def evaluate() -> None:
            with run.evaluation():
                train_loss, _ = token_loss(data.train, config.eval_sequences)
                val = token_loss(data.val, None if config.whole_validation else config.eval_sequences)
            found, told = gpt2.evaluation(config, run.step, train_loss, *val, run.sums.tolist())
            run.evaluated(found, told, metric="val_loss")

        for _ in run.training(evaluate, config.eval_every):
            x, y = token_batch(data.train, block_size=config.context, batch_size=config.batch_size, seed=config.seed,
                               step=run.step)  # fmt: skip
            loss_found, norm, _ = step(x, y)
            run.stepped(loss_found, norm, (float(loss_found), 1, 0))
        return run.result()
