"""Files of models of this package and of timm, from which the models are built again, and published GPT-2 weights.

The format is that of :func:`structlin_nn.torch.save_structured`; its ``build`` describes the model before its layers
are replaced: ``{"kind": "GPT2", "config": {...}}`` with all sizes (likewise ``MLP`` and ``ViT``), or
``{"kind": "timm", "name": ..., "options": {...}}`` with ``num_classes`` and ``img_size``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.models.networks import GPT2, MLP, GPT2Config, ViT
from structlin_nn.torch.files import check_entries, fill, read_structured, read_tensors, save_structured

__all__ = ["build_of", "load_gpt2", "load_model", "make_timm", "save_model"]

_KINDS: dict[str, Any] = {"MLP": MLP, "ViT": ViT, "GPT2": GPT2}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TIMM_OPTIONS = ("num_classes", "img_size")


def save_model(
    model: nn.Module, path: str | os.PathLike[str], *, build: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
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
    metadata
        Further strings for the metadata of the file.

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
    save_structured(model, path, build=build, metadata=metadata)


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
    kind = type(model).__name__
    if type(model) is not _KINDS.get(kind):
        raise TypeError(f"the model must be one of structlin_nn.models, got {kind}; for others pass build")
    config: Any = model.config
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "structure"}
    return {"kind": kind, "config": {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}}


def build_dense(build: Mapping[str, Any]) -> nn.Module:
    """Return the dense model that :func:`build_of` describes, with random values."""
    _check(build)
    if build["kind"] == "timm":
        return make_timm(build["name"], **build["options"])
    with torch.random.fork_rng(devices=[]):
        return _KINDS[build["kind"]](_config(build))


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
        fine = isinstance(options, dict) and all(n in TIMM_OPTIONS and type(v) is int for n, v in options.items())
        if build.keys() != {"kind", "name", "options"} or not isinstance(build["name"], str) or not fine:
            raise ValueError(f"a model of timm is built from name and options ({', '.join(TIMM_OPTIONS)}), got {build}")
    elif kind in _KINDS:
        if build.keys() != {"kind", "config"} or not isinstance(build["config"], dict):
            raise ValueError(f"a {kind} is built from its config, got {build}")
        _config(build)
    else:
        raise ValueError(f"a model is built from kind, one of {', '.join((*_KINDS, 'timm'))}, got {build}")


def _config(build: Mapping[str, Any]) -> Any:
    config_class = _KINDS[build["kind"]].config_class
    known = {f.name for f in fields(config_class)} - {"structure"}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in build["config"].items()}
    if wrong := values.keys() ^ known:
        raise ValueError(f"the sizes of a {build['kind']} are {', '.join(sorted(known))}; {sorted(wrong)[0]} is wrong")
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(f"the sizes of a {build['kind']} do not fit: {error}") from error


_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Fixed masks, which old files hold.
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")
# What has no place in our model: key -> the value that changes nothing, which is the default.
_FIXED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
_PLACES = {
    "wte": "tokens", "wpe": "positions", "ln_f": "norm", "ln_1": "attention_norm", "ln_2": "ffn_norm",
    "attn.c_proj": "attention.out", "mlp.c_fc": "up", "mlp.c_proj": "down", "lm_head": "head",
}  # fmt: skip


def load_gpt2(source: nn.Module | str | os.PathLike[str], *, untie: bool = False) -> GPT2:
    """GPT-2 as published, with the weights of transformers: the logits are the same up to rounding.

    The files need neither transformers nor pickles. Source of the format: transformers' `GPT2LMHeadModel`; of the
    model: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    Parameters
    ----------
    source
        A `GPT2LMHeadModel` or `GPT2Model` of transformers; a folder with ``config.json`` and ``model.safetensors``; or
        a .safetensors file beside its ``config.json``.
    untie
        Give the model a head of its own, a copy of the token embedding, so that it can be projected too.

    Returns
    -------
    structlin_nn.models.GPT2
        A model on the CPU, in evaluation mode, with the dtype of the token embedding. It has no dropout; a
        configuration's is for training, and not taken over.

    Raises
    ------
    FileNotFoundError, ValueError
        Files that are missing or damaged, a configuration that this model cannot have (the message names the key), or
        tensors that are missing, left over, or of another shape.
    """
    settings, tensors = _from_module(source) if isinstance(source, nn.Module) else _from_files(Path(source))
    tied = (settings.get("tie_word_embeddings", True) or "lm_head.weight" not in tensors) and not untie
    config = _gpt2_config(settings, tied)
    given = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    own = _renamed({name: tensor for name, tensor in given.items() if not _MASKS.match(name)}, tied)
    model = GPT2(config, device="meta", dtype=own["tokens.weight"].dtype)
    try:
        check_entries(model.state_dict(), own)
    except ValueError as error:
        raise ValueError(f"the weights do not make a GPT-2 of {config.depth} blocks: {error}") from error
    model = model.to_empty(device="cpu")
    model.load_state_dict(own)
    return model.eval()


def _from_module(module: nn.Module) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) != "gpt2" or not callable(getattr(config, "to_dict", None)):
        raise TypeError(f"the model must be a GPT-2 of transformers, got {type(module).__name__}")
    return config.to_dict(), module.state_dict()


def _from_files(place: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    place = place.expanduser()
    if place.is_file() and place.suffix != ".safetensors":
        raise ValueError(f"{place} is not a .safetensors file; other files can contain code and are not read")
    path = (place if place.is_dir() else place.parent) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(settings).__name__}")
    if settings.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{path} must have the model_type 'gpt2', got {settings['model_type']!r}")
    return settings, read_tensors(place if place.is_file() else place / "model.safetensors")


def _gpt2_config(settings: Mapping[str, Any], tied: bool) -> GPT2Config:
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise ValueError(f"a GPT-2 with {key}={settings[key]!r} is not supported, only {value!r}")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        raise ValueError(f"activation_function {activation!r} is not supported, only {', '.join(_GELU)}")
    needed = ("n_embd", "n_layer", "n_head", "vocab_size")
    if lacking := [key for key in needed if not isinstance(settings.get(key), int)]:
        raise ValueError(f"{lacking[0]} must be an integer in the configuration, got {settings.get(lacking[0])!r}")
    width, depth, heads, vocabulary = (settings[key] for key in needed)
    inner = settings.get("n_inner") or 4 * width
    if inner % width:
        raise ValueError(f"n_inner {inner} is not supported: it must be a multiple of n_embd {width}")
    if width % heads:
        raise ValueError(f"n_embd {width} cannot be divided among {heads} heads")
    return GPT2Config(
        width=width, depth=depth, heads=heads, vocabulary=vocabulary, expansion=inner // width, tied=tied, bias=True,
        context=settings.get("n_positions", settings.get("n_ctx", 1024)), gelu=_GELU[activation], qk_norm=False,
        attention_scale=1 / math.sqrt(width // heads),
    )  # fmt: skip


def _renamed(given: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return tensors under our names; Conv1D of transformers stores (inputs, outputs), we (outputs, inputs)."""
    if "wte.weight" not in given:
        raise ValueError(f"the weights hold no wte.weight; the first of them is {next(iter(given), None)!r}")
    own: dict[str, Tensor] = {} if tied else {"head.factors.0": given["wte.weight"]}
    for name, tensor in given.items():
        start, layer = re.fullmatch(r"(?:h\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        layer, _, kind = layer.rpartition(".")
        prefix = "" if start is None else f"blocks.{start}."
        if kind == "weight" and (layer.startswith(("attn.", "mlp.")) or layer == "lm_head"):
            kind, tensor = "factors.0", tensor if layer == "lm_head" else tensor.T
        if layer == "attn.c_attn":
            parts = tensor.chunk(3, dim=0 if kind == "factors.0" else -1)
            own |= {f"{prefix}attention.{n}.{kind}": p for n, p in zip(("query", "key", "value"), parts, strict=True)}
        elif layer != "lm_head" or not tied:
            own[f"{prefix}{_PLACES.get(layer, layer)}.{kind}"] = tensor
    return {name: tensor.detach() for name, tensor in own.items()}
