"""Published GPT-2 weights in our model.

Weights come from a `GPT2LMHeadModel` or `GPT2Model` of transformers, or from the files that it saves (``config.json``
beside ``model.safetensors``), which need neither transformers nor pickles.

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

from structlin_nn.models.networks import GPT2, GPT2Config
from structlin_nn.torch.files import check_entries, read_tensors

__all__ = ["load_gpt2"]

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


def load_gpt2(
    source: nn.Module | str | os.PathLike[str], *, untie: bool = False, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GPT2:  # fmt: skip
    """GPT-2 as published, with the weights of transformers: the logits are the same up to rounding.

    Parameters
    ----------
    source
        A `GPT2LMHeadModel` or `GPT2Model` of transformers; a folder with ``config.json`` and ``model.safetensors``; or
        a .safetensors file beside its ``config.json``.
    untie
        Give the model a head of its own, a copy of the token embedding, so that it can be projected too.
    device
        Device of the model.
    dtype
        Dtype of the model. None takes that of the token embedding.

    Returns
    -------
    GPT2
        A model in evaluation mode. It has no dropout; a configuration's is for training, and not taken over.

    Raises
    ------
    FileNotFoundError, ValueError
        Files that are missing or damaged, a configuration that this model cannot have (the message names the key), or
        tensors that are missing, left over, or of another shape.
    """
    settings, tensors = _from_module(source) if isinstance(source, nn.Module) else _from_files(Path(source))
    tied = (settings.get("tie_word_embeddings", True) or "lm_head.weight" not in tensors) and not untie
    config = _config(settings, tied)
    given = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    own = _renamed({name: tensor for name, tensor in given.items() if not _MASKS.match(name)}, tied)
    model = GPT2(config, device="meta", dtype=dtype or own["tokens.weight"].dtype)
    try:
        check_entries(model.state_dict(), own)
    except ValueError as error:
        raise ValueError(f"the weights do not make a GPT-2 of {config.depth} blocks: {error}") from error
    model = model.to_empty(device=device or "cpu")
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


def _config(settings: Mapping[str, Any], tied: bool) -> GPT2Config:
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
