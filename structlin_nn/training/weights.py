"""What a run starts from in place of random weights: a file, another run, or published weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.torch._layout import layout_of
from structlin_nn.torch.files import PlainFileError, check_entries, digest, read_structured, read_tensors
from structlin_nn.trained import TrainedModel, open_trained
from structlin_nn.training.base import RunConfig
from structlin_nn.training.config import GPT2TrainConfig, ImageNetTrainConfig, TrainConfig

__all__ = ["MODEL_FIELDS", "InitialWeights", "open_weights"]

MODEL_FIELDS: dict[type[RunConfig], tuple[str, ...]] = {
    TrainConfig: ("depth", "bias"),
    ImageNetTrainConfig: ("depth", "heads", "patch", "image_size"),
    GPT2TrainConfig: (
        "depth", "heads", "head_dim", "context", "vocabulary", "expansion", "qk_norm", "attention_scale", "bias",
        "tied", "gelu",
    ),
}  # fmt: skip
"""Fields of a configuration that say what model it is, beside `SHARED_FIELDS`."""
SHARED_FIELDS = ("width", "base_width", "structure", "options", "rms_cap", "rule")


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from, of a model whose layers may be any structured ones.

    Attributes:
        name: of the file or folder, without the folders above.
        sha256: of the tensors (`structlin_nn.torch.files.digest`).
        tensors: by name, tied ones under each name.
        layout: which layers are structured (`structlin_nn.torch._layout`); None for a file of tensors alone, whose
            layers are those of the configuration.
        trained: the model with what is known of it, None likewise.
    """

    name: str
    sha256: str
    tensors: dict[str, Tensor]
    layout: dict[str, Any] | None = None
    trained: TrainedModel | None = None

    def described(self) -> dict[str, Any]:
        """As the header of a record has it."""
        structured = None if self.layout is None else len(_structured(self.layout))
        return {"file": self.name, "sha256": self.sha256, "structured_layers": structured}

    def fields(self, kind: type[RunConfig]) -> dict[str, Any]:
        """Fields of a configuration that the weights decide; none for a file of tensors alone.

        Raises:
            ValueError: a model of another pipeline, structured layers of several structures, or of one without a
                name, which a configuration cannot state.
        """
        if self.trained is None or self.layout is None:
            return {}
        build, config = self.trained.build, self.trained.config
        own = {"MLP": TrainConfig, "GPT2": GPT2TrainConfig, "timm": ImageNetTrainConfig}.get(build["kind"])
        if own is None:  # a ViT
            own = TrainConfig if self.trained.task == "cifar" else ImageNetTrainConfig
        if own is not kind:
            raise ValueError(f"{self.name} holds a {build['kind']} of {own.task}, and this trains {kind.task}")
        found = _structure_fields(self.name, self.layout)
        if build["kind"] == "timm":
            size = {"image_size": self.trained.image_size}
            return {**found, **size, "model": f"timm:{build['name']}", "width": 0, "base_width": 0}
        sizes = build["config"]
        found |= {"width": sizes["width"], "base_width": sizes["width"] if config is None else config.base_width}
        if kind is TrainConfig:
            found["model"] = "cifar-mlp" if build["kind"] == "MLP" else "cifar-vit"
        for name in MODEL_FIELDS[kind]:
            if name == "image_size":
                found[name] = sizes["input_shape"][1]
            elif name in sizes:
                found[name] = 0 if sizes[name] is None else sizes[name]
        return found

    def put_into(self, model: nn.Module) -> None:
        """Give a model, made with the layout, the tensors.

        Raises:
            ValueError: names, shapes or sizes that are not those of the model.
        """
        own = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        try:
            self._check_build(model)
            check_entries(own, self.tensors)
        except ValueError as error:
            raise ValueError(f"{self.name} does not fit the model of the configuration: {error}") from error
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.tensors[name])

    def _check_build(self, model: nn.Module) -> None:
        if self.trained is None or "config" not in self.trained.build:
            return
        from structlin_nn.models.files import build_of

        theirs, ours = self.trained.build["config"], build_of(model)["config"]
        if wrong := [f"{name} is {theirs.get(name)!r} there and {ours[name]!r} here" for name in ours
                     if theirs.get(name) != ours[name]]:  # fmt: skip
            raise ValueError("; ".join(wrong))


def open_weights(source: str | os.PathLike[str]) -> InitialWeights:
    """Weights of a file or folder.

    Args:
        source: a .safetensors file, of `structlin compress` or of tensors alone; the folder of a run; or a folder with
            GPT-2 as transformers saves it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged files, or files of another kind.
    """
    place = Path(source).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        tensors = read_tensors(place)
        try:
            said = read_structured(place)
        except PlainFileError:
            if not (place.parent / "config.json").is_file():
                return InitialWeights(place.name, digest(tensors), tensors)
        else:
            if said.build is None:
                raise ValueError(f"{place} does not say how its model is built: write it with save_model")
    trained = open_trained(place)
    tensors = dict(trained.model.state_dict())
    return InitialWeights(place.name, digest(tensors), tensors, layout_of(trained.model), trained)


def differing(given: Mapping[str, Any], decided: Mapping[str, Any]) -> list[str]:
    """What a configuration that was asked for says otherwise than the weights, in words."""
    found = []
    for name in given.keys() & decided.keys() - {"options", "base_width"}:
        if given[name] != decided[name]:
            found.append(f"{name} is {decided[name]!r} there and {given[name]!r} here")
    options = given.get("options", {})
    for name in options.keys() if "options" in decided else ():
        if decided["options"].get(name) != options[name]:
            there = decided["options"].get(name, "another in each layer")
            found.append(f"{name} is {there} there and {options[name]!r} here")
    return sorted(found)


def _structured(layout: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [form for form in layout["layers"] if form["structure"] != "dense" or form["rms_cap"]]


def _structure_fields(name: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    forms = _structured(layout)
    if not forms:
        return {"structure": "dense", "options": {}, "rms_cap": False, "rule": "paper"}
    kinds = sorted({form["structure"] or "a chain without a name" for form in forms})
    if len(kinds) > 1 or forms[0]["structure"] is None:
        raise ValueError(f"a run has one structure with a name, and the layers of {name} have {', '.join(kinds)}")
    first = forms[0]["options"]
    options = {key: _tuples(first[key]) for key in first if all(f["options"].get(key) == first[key] for f in forms)}
    rules = {form["rule"] for form in forms}
    return {
        "structure": kinds[0],
        "options": options,
        "rms_cap": any(form["rms_cap"] for form in forms),
        "rule": rules.pop() if len(rules) == 1 else "paper",
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
