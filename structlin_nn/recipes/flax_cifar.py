"""The models of `structlin_nn.recipes.cifar` in flax.nnx with optax: the same batches, rates and records.

    structlin train flax-cifar --structure block_tensor_train --width 256

Images are augmented by torch on the CPU. To change the loss or the model, copy this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import torch

from structlin_nn.data import batch_rows, load_images
from structlin_nn.data.augment import normalize
from structlin_nn.recipes import cifar
from structlin_nn.recipes._flax import FlaxConfig, FlaxRun
from structlin_nn.recipes._run import Result
from structlin_nn.recipes.cifar import EVALUATED_TRAINING_IMAGES, PROBED_IMAGES, Options

__all__ = ["Config", "Options", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(FlaxConfig, cifar.Config):
    """Options of `structlin_nn.recipes.cifar.Config` in float32, without compile, recompute and muon."""


def train(config: Config, options: Options, *, watch: Any = None) -> Result:
    """Train a model, or resume a run from its last checkpoint; arguments and errors as `cifar.train`."""
    with FlaxRun(config, options, watch) as run:
        # Images, in memory of torch: batches are those of the recipe in torch.
        data = load_images(config.data_set, options.data, verify=not options.unverified).as_32x32_rgb()
        classes, size = data.num_classes, config.batch_size
        steps = cifar.steps_of(config, len(data.train_labels))
        arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
        images, labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
        per_epoch = len(labels) // size
        augment = cifar.augmentation(config, data)
        generator = torch.Generator().manual_seed(config.seed)

        # Model and optimiser.
        run.start(
            cifar.build, classes, steps=steps, warmup=round(config.warmup_epochs * per_epoch),
            sample=torch.zeros(1, 3, 32, 32), probe=normalize(images[:PROBED_IMAGES], data.mean, data.std),
            data=cifar.described(data), generators={"augmentation": generator},
            extra_multipliers=cifar.extra_multipliers(config),
        )  # fmt: skip

        def loss(model: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model(x)
            return optax.softmax_cross_entropy(logits, y).mean(), logits.argmax(1)

        step, logits_of = run.make_step(loss), jax.jit(lambda params, x: run.model(params)(x))

        def loss_and_error(images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
            loss = wrong = 0.0
            for start in range(0, len(images), 1000):
                x = normalize(images[start : start + 1000], data.mean, data.std).numpy()
                right = labels[start : start + 1000].numpy()
                logits = logits_of(run.params, x)
                loss += float(optax.softmax_cross_entropy_with_integer_labels(logits, right).sum())
                wrong += float((logits.argmax(1) != right).sum())
            return loss / len(labels), wrong / len(labels)

        def evaluate() -> None:
            with run.evaluation():
                first = min(EVALUATED_TRAINING_IMAGES, len(labels))
                scores = (*loss_and_error(images[:first], labels[:first]), *loss_and_error(test_images, test_labels))
            found, told = cifar.evaluation(config, run.step, per_epoch, scores, run.sums.tolist())
            run.evaluated(found, told, metric="test_error")

        for _ in run.training(evaluate, config.eval_every * per_epoch, config.measure_every):
            rows = torch.from_numpy(batch_rows(len(labels), size, config.seed, run.step))
            inputs, targets = (tensor.numpy() for tensor in augment(images[rows], labels[rows], generator))
            loss_found, norm, predictions = step(inputs, targets)
            right = labels[rows].numpy()
            hits = [int((np.concatenate(predictions) == other).sum()) for other in (right, right[::-1])]
            run.stepped(loss_found, norm, (float(loss_found) * size, max(hits) if config.mixup else hits[0], size))
        return run.result()
