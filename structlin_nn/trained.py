"""Trained models: runs and files of this package, models of timm with a file of weights, and published GPT-2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn._shards import read_tensors
from structlin_nn.checkpoints import checkpoints, read_checkpoint
from structlin_nn.models.files import TIMM_OPTIONS, build_dense, build_of, load_gpt2, load_model, make_timm
from structlin_nn.records import read_record
from structlin_nn.torch._layout import changes, layout_of
from structlin_nn.torch.files import PlainFileError, check_entries, digest, read_structured
from structlin_nn.torch.files import read_tensors as read_tensors_file

__all__ = ["KINDS", "TrainedModel", "described", "load_trained", "model_of", "open_trained", "starting_weights"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

KINDS = (
    "a folder of `structlin train`, a .safetensors file of `structlin compress`, timm:NAME with --weights, or a folder "
    "with config.json and model.safetensors of GPT-2"
)
Scale = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on the CPU, in evaluation mode, with its description.

    Attributes
    ----------
    build
        Its construction (:mod:`structlin_nn.models.files`).
    name
        Name of the source, without folders.
    config
        Configuration and ``task`` of the run that trained it; None for a model of another source.
    scale
        (mean, standard deviation) that its images are normalised with, if they are not ImageNet's.
    """

    model: nn.Module
    build: dict[str, Any]
    name: str
    config: dict[str, Any] | None = None
    scale: Scale | None = None

    @property
    def task(self) -> str:
        """Pipeline whose data the model is for: ``gpt2``, ``cifar`` (images of 32 x 32) or ``imagenet``."""
        if self.config is not None:
            return self.config["task"]
        if self.build["kind"] == "GPT2":
            return "gpt2"
        return "cifar" if self.image_size == 32 and self.build["kind"] != "timm" else "imagenet"

    @property
    def image_size(self) -> int:
        """Side of the images that an image model takes."""
        if self.build["kind"] != "timm":
            return self.build["config"]["input_shape"][1]
        if self.config is not None:
            return self.config["image_size"]
        usual = getattr(self.model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        return self.build["options"].get("img_size", usual[1])

    def example_input(self, device: str = "meta") -> Tensor:
        """Return one sample of the longest shape that the model takes."""
        if self.build["kind"] == "timm":
            return torch.zeros(1, 3, self.image_size, self.image_size, device=device)
        return self.model.example_input(device=device)  # type: ignore[operator]

    def rescaled(self, images: Tensor) -> Tensor:
        """Return images (batch, 3, height, width) normalised for the model, from those normalised for ImageNet."""
        if self.scale is None:
            return images
        both = (IMAGENET_MEAN, IMAGENET_STD, *self.scale)
        mean, deviation, own_mean, own = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in both)
        return (images * deviation + mean - own_mean) / own


def open_trained(
    source: str | os.PathLike[str], *, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None,
    image_size: int | None = None, average: bool = False, untie: bool = False,
) -> TrainedModel:  # fmt: skip
    """Open a trained model.

    Parameters
    ----------
    source
        The folder of a run; a file of `structlin_nn.models.save_model`; ``timm:NAME``; or a folder (or the .safetensors
        file in it) that holds GPT-2 as transformers saves it.
    weights, num_classes, image_size
        Of ``timm:NAME``: the .safetensors file of its state dictionary (nothing is downloaded), and its sizes; by
        default those of the classifier in the file, and of the model.
    average
        Take the average of the weights of a run.
    untie
        Give published GPT-2 a head of its own (`structlin_nn.models.files.load_gpt2`).

    Raises
    ------
    FileNotFoundError, ValueError
        Files that are missing or damaged, weights of another model, or an option that the source does not have.
    """
    text = os.fspath(source)
    place = Path(text).expanduser()
    of_timm, is_run = text.startswith("timm:"), bool(checkpoints(place))
    published = (place if place.is_dir() else place.parent).joinpath("config.json").is_file()
    allowed = ("weights", "num_classes", "image_size") if of_timm else ("average",) if is_run else ()
    allowed = ("untie",) if published and not allowed else allowed
    given = {"weights": weights, "num_classes": num_classes, "image_size": image_size, "average": average or None}
    for name, value in {**given, "untie": untie or None}.items():
        if value is not None and name not in allowed:
            raise ValueError(f"{text} has no option {name}")
    if of_timm:
        if weights is None:
            raise ValueError(f"{text} needs weights, a .safetensors file of its state dictionary")
        return _timm(text.removeprefix("timm:"), weights, num_classes, image_size)
    if is_run:
        return _run(place, average)
    if published:
        gpt2 = load_gpt2(place, untie=untie)
        return TrainedModel(gpt2, build_of(gpt2), place.name)
    if place.is_file() and place.suffix == ".safetensors":
        model, build = load_model(place), read_structured(place).build
        assert build is not None
        return TrainedModel(model, build, place.name)
    if not place.exists():
        raise FileNotFoundError(f"{place} is missing: a trained model is {KINDS}")
    raise ValueError(f"{place} holds no trained model: a trained model is {KINDS}")


def load_trained(folder: str | os.PathLike[str], *, average: bool = False, model: nn.Module | None = None) -> nn.Module:
    """Return the model of the last checkpoint of a torch run, on the CPU and in evaluation mode.

    Parameters
    ----------
    folder, average
        Folder of the run, and whether to take the average of the weights. FileNotFoundError for a run without a
        checkpoint, ValueError for a damaged one, or one without an average.
    model
        Your own model to fill, if the run trained one. A checkpoint does not state its construction.
    """
    place, state = read_checkpoint(Path(folder))
    _check_is_of_torch(folder, state)
    if average and not state["tensors"].get("average"):
        raise ValueError(f"the run in {folder} has no average of its weights, because its ema is 0")
    if model is None:
        if state["build"] is None:
            raise ValueError(f"{_unknown(folder, state)}: pass the model as model=...")
        model = model_of(state["build"], state["layout"])
    tensors: dict[str, Any] = {"model": {name: tensor.detach() for name, tensor in model.state_dict().items()}}
    read_tensors(place, tensors)
    if average:
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        read_tensors(place, {"average": {n: v.detach() for n, v in held.items() if v.is_floating_point()}})
    return model.cpu().eval()


def described(model: nn.Module) -> dict[str, Any]:
    """Return ``build`` and ``layout``, from which `model_of` makes a model like this one; None for other models."""
    try:
        build = build_of(model)
    except TypeError:
        return {"build": None, "layout": None}
    return {"build": build, "layout": layout_of(model)}


def model_of(build: dict[str, Any], layout: dict[str, Any]) -> nn.Module:
    """Return the model that `described` describes, with values to be filled in."""
    model = build_dense(build)
    for change in changes(model, layout):
        change.apply(model)
    return model


def starting_weights(source: str | os.PathLike[str], model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with trained weights to train in place of `model`, and the entry of the record.

    `source` is a .safetensors file of tensors, or a source of `open_trained`, whose layers may have their own
    structures. ValueError for damaged files, or for names, shapes or sizes that differ from those of `model`.
    """
    place = Path(source).expanduser()
    structured = None
    try:
        if _holds_tensors_alone(place):
            tensors = read_tensors_file(place)
        else:
            found = open_trained(place)
            theirs, ours = found.build.get("config", {}), (described(model)["build"] or {}).get("config", {})
            if wrong := [name for name in ours if theirs.get(name) != ours[name]]:
                told = (f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here" for name in wrong)
                raise ValueError("; ".join(told))
            model, tensors = found.model.train(), dict(found.model.state_dict())
            structured = sum(form["structure"] != "dense" or form["rms_cap"] for form in layout_of(model)["layers"])
        check_entries(model.state_dict(), tensors)
    except ValueError as error:
        raise ValueError(f"{source} does not fit the model of the configuration: {error}") from error
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensors[name])
    return model, {"file": place.name, "sha256": digest(tensors), "structured_layers": structured}


def _holds_tensors_alone(place: Path) -> bool:
    if place.suffix != ".safetensors" or not place.is_file() or (place.parent / "config.json").is_file():
        return False
    try:
        return read_structured(place).build is None
    except PlainFileError:
        return True


def _run(folder: Path, average: bool) -> TrainedModel:
    _, state = read_checkpoint(folder)
    _check_is_of_torch(folder, state)
    if state["build"] is None:
        raise ValueError(
            f"{_unknown(folder, state)}: build the model and call structlin_nn.load_trained with model=..."
        )
    header = read_record(folder / "record.jsonl").header
    told = {"task": header["task"], **header["config"]}
    return TrainedModel(load_trained(folder, average=average), state["build"], folder.name, told)


def _check_is_of_torch(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    if not state["tensors"]:
        raise ValueError(f"the run in {folder} is one of flax, which cannot be loaded as a torch model; "
                         "restore its parameters with orbax.checkpoint")  # fmt: skip


def _unknown(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> str:
    name = state["config"]["model"]
    what = name if ":" in name else "your own model"
    return f"the run in {folder} trained {what}, whose sizes and layers its checkpoint does not describe"


def _timm(name: str, weights: str | os.PathLike[str], num_classes: int | None, image_size: int | None) -> TrainedModel:
    options = {k: v for k, v in zip(TIMM_OPTIONS, (num_classes, image_size), strict=True) if v is not None}
    tensors = read_tensors_file(weights)
    if num_classes is None:
        with torch.device("meta"):
            classifier = getattr(make_timm(name), "pretrained_cfg", {}).get("classifier")
        if isinstance(classifier, str) and f"{classifier}.weight" in tensors:
            options["num_classes"] = len(tensors[f"{classifier}.weight"])
    model = make_timm(name, **options)
    try:
        check_entries(model.state_dict(), tensors)
    except ValueError as error:
        raise ValueError(f"{weights} is not of timm's {name} with {options or 'its own sizes'}: {error}") from error
    model.load_state_dict(tensors)
    settings = getattr(model, "pretrained_cfg", {})
    scale = tuple(settings.get("mean", IMAGENET_MEAN)), tuple(settings.get("std", IMAGENET_STD))
    plain = scale == (IMAGENET_MEAN, IMAGENET_STD)
    build = {"kind": "timm", "name": name, "options": options}
    return TrainedModel(model.eval(), build, Path(weights).name, None, None if plain else scale)
