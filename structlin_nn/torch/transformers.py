"""Saving and loading of models of transformers with structured layers.

``config.json`` of a model whose layers were replaced has an entry ``quantization_config`` with the method
``structlin``, which describes the layers. With this entry transformers lets a library change the layers of a model
before it loads the weights. So ``from_pretrained``, the automatic classes, checkpoints of the Trainer, sharded files
and ``device_map`` restore the structured layers. Only ``import structlin_nn`` is needed before loading. No code of the
files is executed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from structlin_nn._patterns import listed
from structlin_nn.torch._layout import changes, check_layout, layout_of
from structlin_nn.torch._modules import on_change
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.project import project_linear
from structlin_nn.torch.unpack import Attention, unpack_linear

__all__ = ["METHOD", "StructlinConfig", "StructlinQuantizer", "describe"]

METHOD, VERSION = "structlin", 1


@register_quantization_config(METHOD)
class StructlinConfig(QuantizationConfigMixin):
    """Description of the structured layers of a model, or of the projection of a dense model.

    With ``structure``, pass it to ``from_pretrained`` of a dense model, whose layers are then projected
    (:func:`structlin_nn.torch.project_linear`). In ``config.json`` it describes ``layers`` instead.

    Parameters
    ----------
    structure
        Name of a registered structure.
    layers
        With ``structure``, the selection of layers as in :func:`structlin_nn.torch.project_linear`; otherwise the
        description of the layers from ``config.json``.
    version
        Version of the description.
    **options
        Options of :func:`structlin_nn.torch.project_linear`: ``rank``, ``mac_fraction``, ``calibration``, ...

    Examples
    --------
    >>> import tempfile
    >>> import transformers
    >>> sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    >>> folder = tempfile.mkdtemp()
    >>> transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)
    >>> config = StructlinConfig("low_rank", mac_fraction=0.5)
    >>> model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    >>> type(model.transformer.h[0].mlp.c_fc).__name__
    'StructuredLinear'
    """

    def __init__(
        self, structure: str | None = None, *, layers: Any = None, version: int = VERSION, quant_method: str = METHOD,
        **options: Any,
    ) -> None:  # fmt: skip
        self.quant_method = quant_method  # type: ignore[assignment]
        self.structure, self.version = structure, version
        self.layers, self.options = layers, options
        if version != VERSION:
            raise ValueError(f"the version of the described layers must be {VERSION}, got {version!r}")
        if structure is None:
            if options or not isinstance(layers, list) or not layers:
                raise ValueError(
                    "give the name of a structure, for the layers of a dense model, or the layers that a config.json "
                    f"describes; got structure=None, layers={layers!r:.80} and {', '.join(options) or 'no options'}"
                )
            self.layout()

    def layout(self) -> dict[str, Any]:
        """Return the layers as :mod:`structlin_nn.torch.files` describes them."""
        found = []
        for shared in self.layers:
            if not isinstance(shared, Mapping) or not isinstance(shared.get("names"), list):
                raise ValueError(f"layers must be objects with names, got {shared!r:.80}")
            found += [{**shared, "names": names} for names in shared["names"]]
        layout = {"layers": found, "linear": []}
        check_layout(layout)
        return layout

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``config.json``, or before the layers are created the options that JSON can represent."""
        found = {"quant_method": METHOD, "version": self.version, "layers": self.layers}
        if self.structure is not None:
            found |= {"structure": self.structure, **self.options}
        return {key: value for key, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, bool | int | float | str)


@register_quantizer(METHOD)
class StructlinQuantizer(HfQuantizer):
    """Creates the structured layers of a model before its weights are loaded. Nothing is quantised."""

    quantization_config: StructlinConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Replace the layers of a model on the meta device."""
        if self.quantization_config.structure is not None:
            return
        layout = _placed(self.quantization_config.layout(), model)
        for change in changes(model, layout):
            change.apply(model)
        # The initialisation of a model such as SigLIP names the packed weights of its attention; the files have these
        # weights as layers, so it skips them.
        done = torch.empty(())
        done._is_hf_initialized = True  # type: ignore[attr-defined]
        for attention in _unpacked(model):
            attention.in_proj_weight = attention.in_proj_bias = done

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Project the layers of a dense model, and remove the marks of a quantised model."""
        config = self.quantization_config
        for attention in _unpacked(model):
            del attention.in_proj_weight
            attention.in_proj_bias = None
        del model.hf_quantizer  # transformers refuses to train or cast quantised models
        if config.structure is not None:
            del model.config.quantization_config
            layers = {} if config.layers is None else {"layers": config.layers}
            project_linear(model, config.structure, **layers, **config.options)
        else:
            _check_loaded(model)
        describe(model)

    def is_serializable(self) -> bool:
        """Return True: structured layers can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: structured layers can be trained."""
        return True


def _unpacked(model: nn.Module) -> list[Any]:
    """Return the modules that replace nn.MultiheadAttention."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def _check_loaded(model: PreTrainedModel) -> None:
    """Raise ValueError if the files lack the values of a structured layer that the configuration describes."""
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            for key, parameter in module.named_parameters():
                if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)):  # meta: it is on disk
                    raise ValueError(
                        f"config.json describes {name} as a structured layer, but the files have no {name}.{key}; "
                        "the configuration belongs to another model"
                    )


def _placed(layout: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return the layout with the names of this model, which transformers may load with or without the head."""
    prefix = f"{model.base_model_prefix}."

    def candidates(name: str) -> tuple[str, ...]:
        return name, name.removeprefix(prefix), prefix + name

    unpack_linear(model, [one for form in layout["layers"] for name in form["names"] for one in candidates(name)])
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found = []
    for form in layout["layers"]:
        names = []
        for name in form["names"]:
            names += [known for known in candidates(name) if known in own][:1]
        if names:
            found.append({**form, "names": names})
    if not found:
        first = [form["names"][0] for form in layout["layers"]]
        raise ValueError(
            f"{type(model).__name__} has none of the structured layers of the file: {listed(first, most=5)}"
        )
    return {"layers": found, "linear": []}


def describe(model: nn.Module) -> None:
    """Write the description of the structured layers of a model into its configuration, for ``save_pretrained``.

    The functions of :mod:`structlin_nn.torch` that change layers call it. Call it if other code changes layers. It
    updates the configuration of each model of transformers in ``model``.
    """
    done: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if not isinstance(module, PreTrainedModel) or config is None or any(config is other for other in done):
            continue
        done.append(config)
        forms = layout_of(module)["layers"]
        current = getattr(config, "quantization_config", None)
        if forms:
            if current is not None and not _is_ours(current):
                raise ValueError(
                    f"the model is quantised ({_method(current)}), so its configuration cannot describe structured "
                    "layers; replace layers of a model that is not quantised"
                )
            config.quantization_config = StructlinConfig(layers=_shared(forms))
        elif _is_ours(current):
            del config.quantization_config


@on_change
def _describe_or_warn(model: nn.Module) -> None:
    try:
        describe(model)
    except ValueError as error:
        warnings.warn(f"save_pretrained cannot describe the structured layers: {error}", stacklevel=4)


def _method(config: Any) -> Any:
    return config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)


def _is_ours(config: Any) -> bool:
    return config is not None and _method(config) == METHOD


def _shared(forms: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for all layers that differ only in their names; its ``names`` are a list of lists."""
    found: list[dict[str, Any]] = []
    for form in forms:
        rest = {key: value for key, value in form.items() if key != "names"}
        same = next((one for one in found if {**one, "names": 0} == {**rest, "names": 0}), None)
        if same is None:
            found.append({"names": [form["names"]], **rest})
        else:
            same["names"].append(form["names"])
    return found
