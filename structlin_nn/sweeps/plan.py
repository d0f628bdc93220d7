"""What the runs of a sweep cost, before any of them is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from structlin_nn.sweeps.local import Job, state_of
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, TrainConfig

__all__ = ["Planned", "data_sizes", "plan"]

IMAGENET_SIZES = (1000, 1_281_167)
"""Classes and training images of ILSVRC 2012."""
_CIFAR_SIZES = {"cifar10": (10, 50_000), "cifar100": (100, 50_000), "fashion": (10, 10_000)}
# What is no part of the model and the number of its steps.
_FREE = ("seed", "lr", "structure_aware", "device", "threads", "rule")


@dataclass(frozen=True)
class Planned:
    """A run that is planned: its state (`structlin_nn.sweeps.local.STATES`) and its counts (`count_run`)."""

    job: Job
    state: str
    counts: dict[str, int]


def plan(jobs: Mapping[str, Job]) -> dict[str, Planned]:
    """Count all runs, on the meta device, and look which are there already.

    Raises:
        ValueError: sizes that a structure cannot have (the message names the run), or a folder with another run.
    """
    from structlin_nn.training.header import count_run

    sizes: dict[str, tuple[int, int]] = {}
    counted: dict[str, dict[str, int]] = {}
    found = {}
    for name, job in jobs.items():
        config = job.config
        key = f"{config.task} {getattr(config, 'data_set', '')}"
        if key not in sizes:
            sizes[key] = data_sizes(config, job.data)
        outputs, samples = sizes[key]
        alike = repr(sorted((k, v) for k, v in config.to_dict().items() if k not in _FREE))
        try:
            if alike not in counted:
                counted[alike] = count_run(config, outputs, steps_of(config, samples))
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from error
        found[name] = Planned(job, state_of(config, job.folder), counted[alike])
    return found


def steps_of(config: RunConfig, samples: int) -> int:
    """Steps of a run on so many training samples.

    Raises:
        ValueError: fewer samples than a batch.
    """
    if isinstance(config, GPT2TrainConfig):
        return config.steps
    if samples < config.batch_size:
        raise ValueError(f"{samples} images are less than one batch of {config.batch_size}")
    if isinstance(config, TrainConfig):
        from structlin_nn.training.cifar import cifar_steps

        return cifar_steps(config, samples)
    assert isinstance(config, ImageNetTrainConfig)
    return config.epochs * (samples // config.batch_size)


def data_sizes(config: RunConfig, data: Mapping[str, Any]) -> tuple[int, int]:
    """Classes (or tokens that the model knows), and training samples.

    Those of the data where they are given, of the official data set where they are not; CIFAR that is verified has
    its official sizes.

    Raises:
        FileNotFoundError, ValueError: data that are missing or damaged.
    """
    root = data.get("data_root")
    if isinstance(config, TrainConfig):
        if root is None or data.get("verify", True):
            return _CIFAR_SIZES[config.data_set]
        from structlin_nn.data import load_images

        images = load_images(config.data_set, root, verify=False)
        return images.num_classes, len(images.train_labels)
    if isinstance(config, ImageNetTrainConfig):
        if root is None:
            return IMAGENET_SIZES
        from structlin_nn.data.imagenet import open_imagenet

        opened = open_imagenet(root, format=data.get("format"))
        return opened.num_classes, opened.train_size
    from structlin_nn.data.tokens import GPT2_VOCABULARY, token_vocabulary
    from structlin_nn.training.gpt2 import model_vocabulary

    assert isinstance(config, GPT2TrainConfig)
    return model_vocabulary(config, GPT2_VOCABULARY if root is None else token_vocabulary(root)), 0
