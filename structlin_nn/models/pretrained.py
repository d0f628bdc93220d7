"""Published GPT-2 weights in our model, and from there onto structures.

Weights come from a `GPT2LMHeadModel` or `GPT2Model` of transformers, or from the files that it saves
(``config.json`` beside ``model.safetensors``, in one file or several), which need neither transformers nor pickles.

Source of the format: transformers' `GPT2LMHeadModel`; of the model: Radford et al., Language Models are Unsupervised
Multitask Learners, 2019.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.models.gpt2 import GPT2, GPT2Config
from structlin_nn.torch.files import read_tensors

__all__ = ["load_gpt2", "project_gpt2"]

_GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Fixed masks, which old files hold.
_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")
# What has no place in our model: (key, value that changes nothing, default of the key).
_FIXED = (
    ("scale_attn_weights", True, True),
    ("scale_attn_by_inverse_layer_idx", False, False),
    ("add_cross_attention", False, False),
    ("layer_norm_epsilon", 1e-5, 1e-5),
)


def load_gpt2(
    source: nn.Module | str | os.PathLike[str],
    *,
    untie: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GPT2:
    """GPT-2 as published, with the weights of transformers: the logits are the same up to rounding.

    Args:
        source: a `GPT2LMHeadModel` or `GPT2Model` of transformers; a folder with ``config.json`` and
            ``model.safetensors`` (or its parts); or a .safetensors file beside its ``config.json``.
        untie: give the model a head of its own, a copy of the token embedding, so that it can be projected too.
        device: of the model.
        dtype: of the model; None: that of the token embedding.

    Returns:
        A model in evaluation mode. It has no dropout; a configuration's is for training, and not taken over.

    Raises:
        FileNotFoundError: files that are not there.
        ValueError: damaged files, a configuration that our model has no form for (the message names the key), or
            tensors that are missing, left over, or of another shape.
        TypeError: a module that is no GPT-2.
    """
    settings, tensors = _from_module(source) if isinstance(source, nn.Module) else _from_files(Path(source))
    config = _config(settings, tied=_is_tied(settings, tensors) and not untie)
    given = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in given.items() if not _MASKS.match(name)}
    own = _rename(given, config, untie)
    model = GPT2(config, device="meta", dtype=dtype or own["tokens.weight"].dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if wrong := sorted(shapes.keys() ^ own.keys()):
        which = "missing" if wrong[0] in shapes else "left over"
        raise ValueError(f"the weights do not make a GPT-2 of {config.depth} blocks: {wrong[0]} is {which}")
    for name, shape in shapes.items():
        if own[name].shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(own[name].shape)}")
    model = model.to_empty(device=device or "cpu")
    model.load_state_dict(own)
    return model.eval()


def project_gpt2(model: GPT2, structure: str, **options: Any) -> Any:
    """Replace the linear layers of a loaded model, in place, by the nearest layers of a structure.

    Its dense layers become ``nn.Linear``, and those `structlin_nn.torch.project_linear`, whose arguments and report
    these are: a rank, or a budget for the whole model (``mac_fraction=0.5``), and ``calibration`` batches of tokens,
    with which the error of the outputs is what is small. Embeddings stay; so does a tied head.

    Args:
        model: from `load_gpt2`.
        structure: name of a registered structure.
        **options: of `structlin_nn.torch.project_linear`; ``layers`` is ``"all"`` unless given.

    Returns:
        The report (`structlin_nn.torch.ProjectionReport`).

    Raises:
        TypeError: a model that is no `GPT2`.
        ValueError: as `structlin_nn.torch.project_linear`.

    Example:
        >>> from structlin_nn.models import build_model
        >>> sizes = {"depth": 1, "heads": 2, "vocabulary": 40, "context": 8}
        >>> model = build_model("gpt2", width=16, **sizes)
        >>> report = project_gpt2(model, "low_rank", rank=3, layers="all_but_last")
        >>> report.macs_after < report.macs_before
        True
    """
    from structlin_nn.torch.project import project_linear, to_dense_linear

    if not isinstance(model, GPT2):
        raise TypeError(f"a GPT2 of structlin_nn.models is needed, got {type(model).__name__}")
    to_dense_linear(model)
    return project_linear(model, structure, **{"layers": "all", **options})


def _from_module(module: nn.Module) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) != "gpt2" or not callable(getattr(config, "to_dict", None)):
        raise TypeError(f"a GPT-2 of transformers is needed, got {type(module).__name__}")
    return config.to_dict(), module.state_dict()


def _from_files(place: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    place = place.expanduser()
    folder = place if place.is_dir() else place.parent
    if place.is_file() and place.suffix != ".safetensors":
        raise ValueError(f"{place} is no .safetensors file; files of another kind can run code, and are not read")
    settings = _read_json(folder / "config.json")
    if settings.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{folder / 'config.json'} is of a {settings['model_type']}, not of a gpt2")
    index = folder / "model.safetensors.index.json"
    if place.is_file():
        parts = [place]
    elif (folder / "model.safetensors").is_file() or not index.is_file():
        parts = [folder / "model.safetensors"]
    else:
        names = set(_read_json(index).get("weight_map", {}).values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index} must name the files beside it that hold the weights, got {sorted(names)}")
        parts = sorted(folder / name for name in names)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= read_tensors(part)
    return settings, tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def _config(settings: Mapping[str, Any], tied: bool) -> GPT2Config:
    for key, value, default in _FIXED:
        if settings.get(key, default) != value:
            raise ValueError(f"a GPT-2 with {key}={settings[key]!r} is not supported, only {value!r}")
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        raise ValueError(f"activation_function {activation!r} is not supported, only {', '.join(_GELU)}")
    if lacking := [
        key for key in ("n_embd", "n_layer", "n_head", "vocab_size") if not isinstance(settings.get(key), int)
    ]:
        raise ValueError(f"the configuration must tell {lacking[0]} as an integer, got {settings.get(lacking[0])!r}")
    width = settings["n_embd"]
    inner = settings.get("n_inner") or 4 * width
    if inner % width:
        raise ValueError(f"n_inner {inner} is not supported: it must be a multiple of n_embd {width}")
    if width % settings["n_head"]:
        raise ValueError(f"n_embd {width} cannot be divided among {settings['n_head']} heads")
    return GPT2Config(
        width=width,
        depth=settings["n_layer"],
        heads=settings["n_head"],
        vocabulary=settings["vocab_size"],
        context=settings.get("n_positions", settings.get("n_ctx", 1024)),
        expansion=inner // width,
        qk_norm=False,
        attention_scale=1 / math.sqrt(width // settings["n_head"]),
        bias=True,
        tied=tied,
        gelu=_GELU[activation],
    )


def _is_tied(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return settings.get("tie_word_embeddings", True) or "lm_head.weight" not in tensors


_OUTSIDE = {"wte": "tokens", "wpe": "positions", "ln_f": "norm"}
_PLAIN = {"ln_1": "attention_norm", "ln_2": "ffn_norm"}
_LINEAR = {"attn.c_proj": "attention.out", "mlp.c_fc": "up", "mlp.c_proj": "down"}


def _rename(given: Mapping[str, Tensor], config: GPT2Config, untie: bool) -> dict[str, Tensor]:
    """Tensors under our names. Conv1D of transformers keeps weights as (inputs, outputs), we as (outputs, inputs)."""
    own: dict[str, Tensor] = {}
    for name, tensor in given.items():
        block, _, rest = name.removeprefix("h.").partition(".") if name.startswith("h.") else ("", "", name)
        layer, _, kind = rest.rpartition(".")
        start = f"blocks.{block}." if block else ""
        if layer == "attn.c_attn":
            parts = tensor.chunk(3, dim=-1)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                own[f"{start}attention.{part}.{_parameter(kind)}"] = _turned(value, kind)
        elif layer in _LINEAR:
            own[f"{start}{_LINEAR[layer]}.{_parameter(kind)}"] = _turned(tensor, kind)
        elif layer in _PLAIN:
            own[f"{start}{_PLAIN[layer]}.{kind}"] = tensor
        elif layer == "lm_head":
            if not config.tied and not untie:
                own["head.factors.0"] = tensor
        else:
            own[f"{ {'wte': 'tokens', 'wpe': 'positions', 'ln_f': 'norm'}.get(layer, name) }.{kind}"] = tensor
    if untie and "tokens.weight" in own:
        head = given.get("lm_head.weight", own["tokens.weight"])
        own["head.factors.0"] = head
    if "tokens.weight" not in own:
        raise ValueError(f"the weights hold no wte.weight; the first of them is {next(iter(given), None)!r}")
    return {name: tensor.detach() for name, tensor in own.items()}


def _parameter(kind: str) -> str:
    return "factors.0" if kind == "weight" else kind


def _turned(tensor: Tensor, kind: str) -> Tensor:
    return tensor.T if kind == "weight" else tensor
