"""Compression of a trained model: projection of its layers, data for calibration and evaluation, and costs."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.counting import count
from structlin_nn.torch import ProjectionReport, StructuredLinear, project_linear, to_dense_linear
from structlin_nn.torch._modules import places_of, put
from structlin_nn.trained import TrainedModel

__all__ = ["CALIBRATION", "CompressionData", "compress", "costs", "open_data"]

CALIBRATION = {"cifar": 2000, "imagenet": 500, "gpt2": 32}
"""Default numbers of training samples (images, sequences)."""
EVALUATION_SEQUENCES = 64


@dataclass(frozen=True)
class CompressionData:
    """Data to calibrate a projection with, and to evaluate a model on.

    Attributes
    ----------
    about
        One-line description of the data.
    samples
        Function that returns a number of training samples, in batches of inputs of the model.
    evaluate
        Function that evaluates a model on a number of samples of the test split (None: the default number).
    """

    about: str
    samples: Callable[[int], Iterator[Tensor]]
    evaluate: Callable[[nn.Module, int | None], dict[str, float]]


def open_data(
    trained: TrainedModel, root: str | os.PathLike[str] | None = None, *, data_set: str | None = None,
    verify: bool = True, context: int | None = None, device: str = "cpu", seed: int = 0,
) -> CompressionData:  # fmt: skip
    """Return the data of the pipeline that a model belongs to.

    Parameters
    ----------
    trained
        The model.
    root
        Folder of the data, as for `structlin train`. None takes the embedded images, for a model of 32 x 32 images.
    data_set
        ``cifar10``, ``cifar100`` or ``fashion``, if not that of the run.
    verify
        Compare the files of CIFAR with the official ones.
    context
        Tokens in a sequence; None: as many as GPT-2 takes.
    device
        Device of the batches.
    seed
        Seed of the drawn samples.

    Raises
    ------
    FileNotFoundError, ValueError
        Data that are missing, damaged, or not for this model; an option that its pipeline does not have.
    """
    task = trained.task
    if context is not None and task != "gpt2":
        raise ValueError(f"context is for language models, and {trained.name} takes images")
    if data_set is not None and task != "cifar":
        raise ValueError(f"data_set is for models of 32 x 32 images, and {trained.name} is a model of {task}")
    if task == "cifar":
        return _cifar(trained, root, data_set, verify, device, seed)
    if root is None:
        raise ValueError(f"{trained.name} needs data: a folder as `structlin train {task}` takes it")
    return _imagenet(trained, root, device, seed) if task == "imagenet" else _gpt2(trained, root, context, device, seed)


def compress(
    trained: TrainedModel, structure: str, *, calibration: Sequence[Tensor] | None = None, **options: Any
) -> ProjectionReport:
    """Replace linear layers of a trained model, in place, by the nearest layers of a structure.

    The options are arguments of `structlin_nn.torch.project_linear`. Chosen layers that are structured are multiplied
    out first, and other layers stay as they are. By default, all layers of GPT-2 are chosen, except for a tied head.

    Raises
    ------
    ValueError, TypeError
        Errors of `structlin_nn.torch.project_linear`. The model is then unchanged.
    """
    model = trained.model
    structured = places_of(model, lambda module: isinstance(module, StructuredLinear))
    if structured:
        to_dense_linear(model)
    usual = {"layers": "all" if trained.task == "gpt2" else "all_but_last"}
    try:
        return project_linear(model, structure, calibration=calibration, **{**usual, **options})
    finally:
        for layer, names in structured.items():
            if not isinstance(model.get_submodule(names[0]), StructuredLinear):  # it was not projected
                put(model, names, layer)


def costs(trained: TrainedModel) -> dict[str, int]:
    """Return the parameters of a model, and the MACs and attention MACs of one sample, counted on the meta device."""
    held = [*trained.model.parameters(), *trained.model.buffers()]
    twins: dict[int, Any] = {}
    for tensor in held:
        meta = tensor.detach().to("meta")
        twins[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    twin = replace(trained, model=copy.deepcopy(trained.model, twins))
    counted = count(twin.model, twin.example_input())
    return {"params": counted.params, "forward_macs": counted.macs(), "attention_macs": counted.macs("attention")}


def _cifar(
    trained: TrainedModel, root: Any, data_set: str | None, verify: bool, device: str, seed: int
) -> CompressionData:  # fmt: skip
    from structlin_nn.data import epoch_order, load_images
    from structlin_nn.data.augment import normalize
    from structlin_nn.recipes.cifar import loss_and_error

    name = data_set or (trained.config or {}).get("data_set", "fashion" if root is None else "cifar10")
    if root is None and name != "fashion":
        raise ValueError(f"the model is for {name}: its files are needed (--data), or --data-set fashion")
    if root is not None and name == "fashion":
        raise ValueError(f"the images of fashion are embedded and need no folder of data, got {root}")
    data = load_images(name, root, verify=verify).as_32x32_rgb()
    _check_classes(trained, data.num_classes)
    images, test, labels = (
        torch.from_numpy(part).to(device) for part in (data.train_images, data.test_images, data.test_labels)
    )
    order = torch.from_numpy(epoch_order(seed, 0, len(images)))

    def samples(number: int) -> Iterator[Tensor]:
        for chosen in order[:number].split(500):
            yield normalize(images[chosen.to(device)], data.mean, data.std)

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        loss, error = loss_and_error(model, test[:number], labels[:number], data)
        return {"test_loss": loss, "test_error": error}

    about = f"{data.name}, {len(images):,} training and {len(test):,} test images; {data.source}"
    return CompressionData(about, samples, quality)


def _imagenet(trained: TrainedModel, root: Any, device: str, seed: int) -> CompressionData:
    from structlin_nn.data.imagenet import ImageRecipe, open_imagenet
    from structlin_nn.recipes.imagenet import normalized, validated

    size, data = trained.image_size, open_imagenet(root)
    _check_classes(trained, data.num_classes)
    batch = min(32, data.train_size)

    def samples(number: int) -> Iterator[Tensor]:
        batches = data.train_batches(batch_size=batch, seed=seed, recipe=ImageRecipe.plain(size))
        return _first(number, (trained.rescaled(normalized(images, device)) for images, _, _ in batches))

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        if number is not None:
            raise ValueError(f"validation images are sorted by class: evaluate all or none of them, not {number}")
        batches = data.val_batches(batch, size=size)
        return validated(lambda images: model(trained.rescaled(images)), batches, data.num_classes, device)

    return CompressionData(repr(data), samples, quality)


def _gpt2(trained: TrainedModel, root: Any, context: int | None, device: str, seed: int) -> CompressionData:
    from structlin_nn.data.tokens import evaluation_batches, open_tokens, token_batch
    from structlin_nn.recipes.gpt2 import perplexity, token_loss

    config: Any = trained.model.config
    length = config.context if context is None else context
    if not 1 <= length <= config.context:
        raise ValueError(f"context must be from 1 to {config.context}, the context of {trained.name}, got {length}")
    data = open_tokens(root)
    if config.vocabulary < data.vocab_size:
        raise ValueError(f"vocabulary {config.vocabulary} is smaller than that of the data, {data.vocab_size}")

    def on_device(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in batches)

    def samples(number: int) -> Iterator[Tensor]:
        make = {"block_size": length, "batch_size": 4, "seed": seed}
        pairs = on_device(token_batch(data.train, step=step, **make) for step in itertools.count())
        return _first(number, (inputs for inputs, _ in pairs))

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        wanted = EVALUATION_SEQUENCES if number is None else number
        batches = evaluation_batches(data.val, block_size=length, batch_size=4, sequences=wanted)
        loss, targets = token_loss(model, on_device(batches), device)
        return {"val_loss": loss, "val_perplexity": perplexity(loss) or math.inf, "val_tokens": targets}

    about = f"{data.name}, {len(data.train):,} training and {len(data.val):,} validation tokens"
    return CompressionData(f"{about}, vocabulary {data.vocab_size}", samples, quality)


def _first(number: int, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return a number of first samples, in their batches."""
    for inputs in batches:
        if number < 1:
            return
        yield inputs[:number]
        number -= len(inputs)


def _check_classes(trained: TrainedModel, classes: int) -> None:
    options = trained.build.get("config") or trained.build["options"]
    own = options.get("num_classes", getattr(trained.model, "num_classes", None))
    if own != classes:
        raise ValueError(f"{trained.name} has {own} classes, but the data have {classes}; pass data with {own} classes")
