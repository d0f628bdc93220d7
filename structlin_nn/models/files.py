"""Files of models of this package and of timm, from which the models are built again.

The format is that of :func:`structlin_nn.torch.save_structured`; its ``build`` describes the model before its layers
are replaced: ``{"kind": "GPT2", "config": {...}}`` with all sizes (likewise ``MLP`` and ``ViT``), or
``{"kind": "timm", "name": ..., "options": {...}}`` with ``num_classes`` and ``img_size``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from structlin_nn.models.networks import GPT2, MLP, GPT2Config, MLPConfig, ViT, ViTConfig
from structlin_nn.torch.files import fill, read_structured, read_tensors, save_structured

__all__ = ["build_of", "load_model", "make_timm", "save_model"]

_KINDS: dict[str, tuple[Any, Any]] = {"MLP": (MLP, MLPConfig), "ViT": (ViT, ViTConfig), "GPT2": (GPT2, GPT2Config)}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TIMM_OPTIONS = ("num_classes", "img_size")


def save_model(model: nn.Module, path: str | os.PathLike[str], *, build: Mapping[str, Any] | None = None) -> None:
    """Write a model with its replaced layers to a .safetensors file for :func:`load_model`.

    Parameters
    ----------
    model
        A ``MLP``, ``ViT`` or ``GPT2`` of :mod:`structlin_nn.models`, or another with ``build``.
    path
        The file, ``.safetensors``; replaced as a whole.
    build
        Construction of a model that is not of this package, as in :mod:`structlin_nn.models.files`. ValueError for one
        that :func:`load_model` cannot build, TypeError if it is missing.

    Examples
    --------
    >>> from structlin_nn.models import build_model
    >>> from structlin_nn.torch import project_linear, to_dense_linear
    >>> model = build_model("cifar-mlp", width=16, depth=1)
    >>> _ = to_dense_linear(model), project_linear(model, "low_rank", rank=2)
    >>> save_model(model, "mlp.safetensors")
    >>> again = load_model("mlp.safetensors")
    >>> type(again).__name__, again.blocks[0].up.options
    ('MLP', {'rank': 2})
    """
    build = build_of(model) if build is None else dict(build)
    _check(build)
    save_structured(model, path, build=build)


def load_model(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Build the model of a file of :func:`save_model`, with its structured layers and values, in evaluation mode.

    ``device`` None is the CPU, ``dtype`` None that of the file.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`structlin_nn.torch.load_structured`; a file that does not state how to build its model
        (``load_structured`` takes a model that you build).
    """
    found = read_structured(path)
    try:
        if found.build is None:
            raise ValueError("the file does not state how its model is built: build it, and use load_structured")
        model = build_dense(found.build)
        kinds = {_DTYPES[kind] for kind in found.dtypes.values() if kind in _DTYPES}
        if dtype is None and len(kinds) == 1:
            dtype = kinds.pop()
        fill(model.to(dtype=dtype), found, read_tensors(path, found.sha256))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.to(device or "cpu").eval()


def build_of(model: nn.Module) -> dict[str, Any]:
    """Return the construction of a model of this package or of :func:`make_timm`, without the structure of its layers.

    TypeError for another model.

    Examples
    --------
    >>> from structlin_nn.models import build_model
    >>> build_of(build_model("cifar-mlp", width=16, depth=1, device="meta"))["config"]["width"]
    16
    """
    if (made := getattr(model, "structlin_build", None)) is not None:
        return made
    for kind, (model_class, config_class) in _KINDS.items():
        if type(model) is model_class:
            config: Any = model.config
            values = {f.name: getattr(config, f.name) for f in fields(config_class) if f.name != "structure"}
            return {"kind": kind, "config": {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}}
    raise TypeError(f"the model must be one of structlin_nn.models, got {type(model).__name__}; for others pass build")


def build_dense(build: Mapping[str, Any]) -> nn.Module:
    """Return the dense model that :func:`build_of` describes, with random values."""
    _check(build)
    if build["kind"] == "timm":
        return make_timm(build["name"], **build["options"])
    model_class, config_class = _KINDS[build["kind"]]
    with torch.random.fork_rng(devices=[]):
        return model_class(_config(build, config_class))


def make_timm(name: str, **options: Any) -> nn.Module:
    """Return a model of timm, with random values. :func:`build_of` returns its construction.

    Options are ``num_classes`` and ``img_size``. Models that are not built for a size, as convolutional ones, are built
    without it, and take images of any size. ValueError for an unknown name (without a tag of pretrained weights), other
    options, or a size that the model cannot have; ModuleNotFoundError where timm is not installed.
    """
    import timm

    if unknown := options.keys() - set(TIMM_OPTIONS):
        raise ValueError(f"a model of timm is built with {' and '.join(TIMM_OPTIONS)}, got {', '.join(unknown)}")
    if not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    with torch.random.fork_rng(devices=[]):
        try:
            model: Any = timm.create_model(name, pretrained=False, **options)
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" not in options:
                raise ValueError(f"timm's {name} cannot be built with {options}: {error}") from error
            options = {key: value for key, value in options.items() if key != "img_size"}
            model = timm.create_model(name, pretrained=False, **options)
        except AssertionError as error:
            raise ValueError(f"timm's {name} cannot be built with {options}: {error}") from error
    model.structlin_build = {"kind": "timm", "name": name, "options": dict(options)}
    return model


def _check(build: Mapping[str, Any]) -> None:
    kind = build.get("kind")
    if kind == "timm":
        options = build.get("options")
        fine = isinstance(options, dict) and all(
            name in TIMM_OPTIONS and isinstance(value, int) and not isinstance(value, bool)
            for name, value in options.items()
        )
        if build.keys() != {"kind", "name", "options"} or not isinstance(build["name"], str) or not fine:
            raise ValueError(f"a model of timm is built from name and options ({', '.join(TIMM_OPTIONS)}), got {build}")
    elif kind in _KINDS:
        if build.keys() != {"kind", "config"} or not isinstance(build["config"], dict):
            raise ValueError(f"a {kind} is built from its config, got {build}")
        _config(build, _KINDS[kind][1])
    else:
        raise ValueError(f"a model is built from kind, one of {', '.join((*_KINDS, 'timm'))}, got {build}")


def _config(build: Mapping[str, Any], config_class: Any) -> Any:
    known = {f.name for f in fields(config_class)} - {"structure"}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in build["config"].items()}
    if wrong := values.keys() ^ known:
        raise ValueError(f"the sizes of a {build['kind']} are {', '.join(sorted(known))}; {sorted(wrong)[0]} is wrong")
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(f"the sizes of a {build['kind']} do not fit: {error}") from error
