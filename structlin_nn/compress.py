"""Compression of a trained model: its layers projected, its quality on data before and after, its costs counted."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.counting import count
from structlin_nn.torch import ProjectionReport, StructuredLinear, project_linear, to_dense_linear
from structlin_nn.trained import TrainedModel
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, TrainConfig

__all__ = ["CALIBRATION", "CompressionData", "compress", "costs", "open_data"]

CALIBRATION = {"cifar": 2000, "imagenet": 500, "gpt2": 32}
"""Training samples (images, sequences) that are used unless said otherwise."""
EVALUATION_SEQUENCES = 64


@dataclass(frozen=True)
class CompressionData:
    """Data to calibrate a projection with, and to evaluate a model on.

    Attributes:
        about: the data in a line.
        samples: makes batches of that many training samples: inputs of the model.
        evaluate: the quality of a model on the test split, on so many samples of it (None: the usual number).
    """

    about: str
    samples: Callable[[int], Iterator[Tensor]]
    evaluate: Callable[[nn.Module, int | None], dict[str, float]]


def open_data(
    trained: TrainedModel,
    root: str | os.PathLike[str] | None = None,
    *,
    data_set: str | None = None,
    verify: bool = True,
    context: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> CompressionData:
    """The data of the pipeline that a model belongs to.

    Args:
        trained: the model.
        root: where the data are, as `structlin train` takes them; None: the embedded images, for a model of 32 x 32
            images.
        data_set: ``cifar10``, ``cifar100`` or ``fashion``, if not that of the run.
        verify: compare the files of CIFAR with the official ones.
        context: tokens in a sequence; None: as many as GPT-2 takes.
        device: where batches go.
        seed: of the samples that are drawn.

    Raises:
        FileNotFoundError, ValueError: data that are missing, damaged, or not for this model; an option that its
            pipeline does not have.
    """
    task = trained.task
    if context is not None and task != "gpt2":
        raise ValueError(f"context is for language models, and {trained.name} takes images")
    if data_set is not None and task != "cifar":
        raise ValueError(f"data_set is for models of 32 x 32 images, and {trained.name} is none")
    if root is None and task != "cifar":
        raise ValueError(f"{trained.name} needs data: a folder as `structlin train {task}` takes it")
    makers = {"cifar": _cifar, "imagenet": _imagenet, "gpt2": _gpt2}
    return makers[task](trained, root, data_set, verify, context, device, seed)


def compress(
    trained: TrainedModel, structure: str, *, calibration: Sequence[Tensor] | None = None, **options: Any
) -> ProjectionReport:
    """Replace linear layers of a trained model, in place, by the nearest layers of a structure.

    As `structlin_nn.torch.project_linear`, whose arguments these are; but layers that are structured already are
    multiplied out first, and those of our own models that stay dense are structured layers of the structure ``dense``
    again, as they were. Of GPT-2 all layers are chosen unless said otherwise; a tied head stays.

    Raises:
        ValueError, TypeError: as `structlin_nn.torch.project_linear`; the model is then dense, and its function the
            same.
    """
    model = trained.model
    if any(isinstance(module, StructuredLinear) for module in model.modules()):
        to_dense_linear(model)
    usual = {"layers": "all" if trained.task == "gpt2" else "all_but_last"}
    report = project_linear(model, structure, calibration=calibration, **{**usual, **options})
    if trained.build["kind"] != "timm":
        _structure_again(model)
    return report


def costs(trained: TrainedModel) -> dict[str, int]:
    """Parameters of a model, and MACs and attention's MACs of one sample, counted on the meta device."""
    held = [*trained.model.parameters(), *trained.model.buffers()]
    twins: dict[int, Any] = {}
    for tensor in held:
        meta = tensor.detach().to("meta")
        twins[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    twin = replace(trained, model=copy.deepcopy(trained.model, twins))
    counted = count(twin.model, twin.example_input())
    return {
        "params": counted.params,
        "forward_macs": counted.macs(),
        "attention_macs": counted.macs("attention"),
    }


def _structure_again(model: nn.Module) -> None:
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        bias = linear.bias is not None
        new = StructuredLinear(linear.in_features, linear.out_features, bias, device="meta", structure="dense")
        new.factors[0] = linear.weight
        new.bias = linear.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new.train(linear.training))


def _cifar(
    trained: TrainedModel, root: Any, data_set: str | None, verify: bool, context: int | None, device: str, seed: int
) -> CompressionData:
    from structlin_nn.data import epoch_order
    from structlin_nn.data.augment import normalize
    from structlin_nn.training.cifar import CifarTask, evaluate
    from structlin_nn.training.distributed import single

    config = trained.config
    usual = config.data_set if isinstance(config, TrainConfig) else "fashion" if root is None else "cifar10"
    name = data_set or usual
    if root is None and name != "fashion":
        raise ValueError(f"the model is for {name}: its files are needed (--data), or --data-set fashion")
    if root is not None and name == "fashion":
        raise ValueError("the embedded images need no folder of data")
    task = CifarTask(TrainConfig(data_set=name, batch_size=1, seed=seed), single(device), root, verify)
    _same_outputs(trained, task.outputs)
    images, data = task.images, task.data
    order = torch.from_numpy(epoch_order(seed, 0, len(images)))

    def samples(number: int) -> Iterator[Tensor]:
        for chosen in order[:number].split(500):
            yield normalize(images[chosen], data.mean, data.std)

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        loss, error = evaluate(model, *(part[:number] for part in task.test), data)
        return {"test_loss": loss, "test_error": error}

    return CompressionData(task.introduction(), samples, quality)


def _imagenet(
    trained: TrainedModel, root: Any, data_set: str | None, verify: bool, context: int | None, device: str, seed: int
) -> CompressionData:
    from structlin_nn.data.augment import normalize
    from structlin_nn.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageRecipe, open_imagenet
    from structlin_nn.training.distributed import single
    from structlin_nn.training.imagenet import ImageNetTask

    size, batch = trained.image_size, 32
    data = open_imagenet(root)
    _same_outputs(trained, data.num_classes)
    batch = min(batch, data.train_size)
    config = ImageNetTrainConfig(image_size=size, batch_size=batch, warmup_epochs=0.0, workers=0, seed=seed)
    task = ImageNetTask(config, single(device), root)

    def samples(number: int) -> Iterator[Tensor]:
        batches = data.train_batches(batch_size=batch, seed=seed, recipe=ImageRecipe.plain(size))
        views = (normalize(images.to(device), IMAGENET_MEAN, IMAGENET_STD) for images, _, _ in batches)
        return (trained.rescaled(images) for images in _first(number, ((images, images) for images in views)))

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        if number is not None:
            raise ValueError("validation images come class by class: evaluate all of them, or none")
        with torch.no_grad():
            found = task.evaluate(lambda images: model(trained.rescaled(images)), 0, [0.0] * task.sums)
        return {key: found[key] for key in ("val_loss", "val_error", "val_top5_error")}

    return CompressionData(task.introduction(), samples, quality)


def _gpt2(
    trained: TrainedModel, root: Any, data_set: str | None, verify: bool, context: int | None, device: str, seed: int
) -> CompressionData:
    from structlin_nn.data.tokens import EVALUATION_SEED, evaluation_batches
    from structlin_nn.training.distributed import single
    from structlin_nn.training.gpt2 import GPT2Task, token_loss

    config: Any = trained.model.config
    length = config.context if context is None else context
    if not 1 <= length <= config.context:
        raise ValueError(f"context must be from 1 to {config.context}, which {trained.name} takes, got {length}")
    run: RunConfig = GPT2TrainConfig(context=length, batch_size=1, vocabulary=config.vocabulary)
    task = GPT2Task(run, single(device), root)  # type: ignore[arg-type]

    def pieces(tokens: Any, number: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = evaluation_batches(tokens, block_size=length, batch_size=4, sequences=number, seed=seed)
        return ((torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in batches)

    def samples(number: int) -> Iterator[Tensor]:
        return (x for x, _ in pieces(task.data.train, number, seed))

    def quality(model: nn.Module, number: int | None) -> dict[str, float]:
        wanted = EVALUATION_SEQUENCES if number is None else number
        loss, targets = token_loss(model, pieces(task.data.val, wanted, EVALUATION_SEED))
        return {"val_loss": loss, "val_perplexity": math.exp(loss), "val_tokens": targets}

    return CompressionData(task.introduction(), samples, quality)


def _pairs(number: int, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The first so many samples, in the batches that they come in."""
    for inputs, targets in batches:
        if number < 1:
            return
        yield inputs[:number], targets[:number]
        number -= len(inputs)


def _first(number: int, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    return (inputs for inputs, _ in _pairs(number, batches))


def _same_outputs(trained: TrainedModel, classes: int) -> None:
    options = trained.build.get("config") or trained.build["options"]
    own = options.get("num_classes", getattr(trained.model, "num_classes", None))
    if own != classes:
        raise ValueError(f"{trained.name} tells {own} classes apart, and the data have {classes}")
