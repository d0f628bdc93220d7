"""Adapters of peft on structured layers, and adapters whose update is a structured matrix.

peft adds a trained update to a frozen layer: ``y = W x + b + scale * U x``. In LoRA, U has low rank. Here W may be a
structured layer, and U any registered structure, such as Monarch, Block Tensor-Train or Kronecker. The classes of this
module are registered as custom modules of a LoRA configuration. So ``get_peft_model``, ``save_pretrained``, several
adapters, merging and disabling work as for LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import structlin
from structlin_nn._rates import check_number
from structlin_nn.torch._modules import changed, dense_kind, is_conv1d
from structlin_nn.torch.experts import StructuredExperts
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.pointwise import StructuredPointwise

__all__ = ["LoraOnStructured", "StructuredAdapter", "StructuredAdapterConfig", "lora_config"]


class LoraOnStructured(LoraLinear):
    """LoRA adapter of a :class:`StructuredLinear`.

    The sum of a structured matrix and one of low rank does not have the structure. So merging replaces the base layer
    by a dense layer of the sum, and unmerging restores the base layer.
    """

    _kept: StructuredLinear | None = None  # the base layer while a dense one is in its place

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        if isinstance(base_layer, StructuredExperts):
            raise ValueError(
                "adapters on StructuredExperts are not supported: each token has several experts, and an adapter one "
                "update; leave layers of experts out of target_modules"
            )
        if isinstance(base_layer, StructuredPointwise):
            raise ValueError(
                "adapters on StructuredPointwise are not supported: its features are not the last axis; leave "
                "convolutions out of target_modules"
            )
        super().__init__(base_layer, *args, **options)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        if isinstance(self.get_base_layer(), StructuredLinear):
            self.fan_in_fan_out = False
            _check_keeps_the_base(config)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer, by default the active ones."""
        base, chosen = self.get_base_layer(), self.active_adapters if adapter_names is None else adapter_names
        if isinstance(base, StructuredLinear) and any(name in self.lora_B for name in chosen):
            dense = dense_kind(base, base.weight.detach().clone())
            if base.bias is not None:
                dense.bias = nn.Parameter(base.bias.detach().clone())
            object.__setattr__(self, "_kept", base)  # not a submodule: not in the state dict
            self.base_layer = dense.requires_grad_(False).train(base.training)
            self.fan_in_fan_out = is_conv1d(dense)
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Undo all merges."""
        if self._kept is None:
            super().unmerge()
            return
        self.merged_adapters.clear()
        self.base_layer, self.fan_in_fan_out = self._kept.train(self.training), False
        object.__setattr__(self, "_kept", None)

    def _apply(self, fn: Any, recurse: bool = True) -> LoraOnStructured:
        """Move or cast the layer, with the base layer that unmerging restores."""
        if self._kept is not None and recurse:
            self._kept._apply(fn)
        super()._apply(fn, recurse)
        return self


def _check_keeps_the_base(config: LoraConfig) -> None:
    """Raise ValueError if an initialisation subtracts the update from the base weight, which has a structure."""
    own: Any = config.init_lora_weights
    if not isinstance(own, bool) and own not in ("gaussian", "eva", "orthogonal", "mica"):
        raise ValueError(
            f"init_lora_weights={own!r} changes the weight of the base layer, which is structured; on structured "
            "layers it must be True, False, 'gaussian', 'eva', 'orthogonal' or 'mica'"
        )
    if getattr(config, "kasa_config", None) is not None:
        raise ValueError("kasa_config changes the weight of the base layer, which is structured; leave it out")


class StructuredAdapter(LoraOnStructured):
    """Update ``scale * U`` with a structured matrix U, for an nn.Linear, a Conv1D or a StructuredLinear.

    The last factor of U is initialised with zeros, so U is zero at first. peft creates the adapter from a
    :class:`StructuredAdapterConfig`.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        self.r[adapter_name], self.lora_alpha[adapter_name] = 1, config.scale  # their ratio is the scale in peft
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout.update({adapter_name: dropout})
        self.lora_A[adapter_name] = nn.Identity()
        assert self.in_features is not None
        assert self.out_features is not None
        self.lora_B[adapter_name] = StructuredLinear(
            self.in_features, self.out_features, bias=False, structure=config.structure, zero_init=True,
            **config.structure_options,
        )  # fmt: skip
        self.scaling[adapter_name] = float(config.scale)
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the matrix that merging adds to the weight of the base layer."""
        delta: Tensor = self.scaling[adapter] * self.lora_B[adapter].weight
        return delta.mT if is_conv1d(self.get_base_layer()) else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters: (..., in_features) -> (..., out_features).

        With ``adapter_names``, each row of a batch has its own adapter; ``__base__`` stands for none.
        """
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters if names is None else dict.fromkeys(names):
            if name not in self.lora_B:
                continue
            if names is None:
                y = y + self._update(name, x, y)
            else:
                rows = torch.tensor([row for row, own in enumerate(names) if own == name], device=x.device)
                y = y.index_add(0, rows, self._update(name, x[rows], y))
        return y

    def _update(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        """Return the update of one adapter, in the dtype of ``like``."""
        update: Any = self.lora_B[name]
        found: Tensor = self.scaling[name] * update(self.lora_dropout[name](x).to(update.factors[0].dtype))
        return found.to(like.dtype)


@dataclass
class StructuredAdapterConfig(LoraConfig):
    """Configuration of adapters with structured updates, for ``peft.get_peft_model``.

    It uses the options of ``LoraConfig`` that select modules (``target_modules``, ``modules_to_save``, ...), and
    ``lora_dropout``. It does not use ``r`` and ``lora_alpha``, and rejects options of other forms of LoRA. Its files
    have the type ``STRUCTLIN``, which peft knows after ``import structlin_nn.torch.peft``.

    Parameters
    ----------
    structure
        Name of a registered structure; ``low_rank`` corresponds to LoRA.
    structure_options
        Options of the structure, such as ``{"blocks": 4}``.
    scale
        Number by which the update is multiplied.

    Examples
    --------
    >>> import transformers
    >>> sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    >>> config = StructuredAdapterConfig(structure="monarch", structure_options={"blocks": 4}, target_modules=["c_fc"])
    >>> from peft import get_peft_model
    >>> adapted = get_peft_model(model, config)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    1280
    """

    structure: str = field(default="monarch", metadata={"help": "Structure of the update."})
    structure_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the structure."})
    scale: float = field(default=1.0, metadata={"help": "Factor on the update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known = structlin.structure_options(self.structure)
        if unknown := [key for key in self.structure_options if key not in known]:
            raise ValueError(
                f"structure {self.structure!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}"
            )
        check_number(self.scale, "scale")
        plain = LoraConfig()
        other = [one.name for one in fields(LoraConfig) if one.metadata.get("is_lora_variant") or one.name in _OF_LORA]
        if given := [name for name in other if getattr(self, name) != getattr(plain, name)]:
            raise ValueError(f"structured adapters have no {', '.join(given)}, which is for LoRA; leave it out")
        kinds: Any = dict.fromkeys((StructuredLinear, nn.Linear, Conv1D), StructuredAdapter) | {nn.Module: _refuse}
        self._register_custom_module(kinds)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the file."""
        return {**super().to_dict(), "peft_type": _TYPE}


_TYPE = "STRUCTLIN"
_OF_LORA = ("init_lora_weights", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters")


def _refuse(target: nn.Module, *args: Any, **options: Any) -> nn.Module:
    raise ValueError(
        f"structured adapters need an nn.Linear, a Conv1D of transformers or a StructuredLinear, but target_modules "
        f"selects a {type(target).__name__}"
    )


def lora_config(**options: Any) -> LoraConfig:
    """Return a ``peft.LoraConfig`` with which structured layers get LoRA adapters, like layers of other kinds.

    After ``import structlin_nn.torch.peft``, this holds for every ``peft.LoraConfig``, also for the one that peft reads
    from a file.

    Examples
    --------
    >>> lora_config(r=4, target_modules=["c_fc"]).r
    4
    """
    config = LoraConfig(**options)
    config._register_custom_module({StructuredLinear: LoraOnStructured})
    return config


class StructuredLoraModel(LoraModel):
    """peft's model of LoRA, for models that may have structured layers."""

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len({isinstance(one, StructuredAdapterConfig) for one in self.peft_config.values()}) > 1:
            raise ValueError(
                "a model cannot have adapters of LoRA and of StructuredAdapterConfig; merge or unload those that it has"
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if StructuredLinear not in (peft_config._custom_modules or {}):
            peft_config._register_custom_module({StructuredLinear: LoraOnStructured})
        chosen = peft_config.target_modules
        if isinstance(chosen, str) and chosen.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= _structured(model, peft_config)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **options: Any) -> Any:
        if any(isinstance(self.peft_config.get(name), StructuredAdapterConfig) for name in adapters):
            raise ValueError(
                "the weighted sum of structured updates need not have their structure, so add_weighted_adapter cannot "
                "add them; activate several adapters with base_model.set_adapter([...]), or merge them"
            )
        return super()._check_add_weighted_adapter(adapters, *args, **options)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, inside, rest = key.rpartition(f".lora_B.{adapter_name}.")
        if inside and "." in rest:  # a list of a structured update, such as factors.0; peft expects weight
            return f"{head}.lora_B.{rest}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **options)
        changed(model)  # layers may be dense now
        return model


def _structured(model: nn.Module, config: LoraConfig) -> set[str]:
    """Return the names of structured layers, also those with adapters, without a head, as peft selects all-linear."""
    inside = {
        one for layer in model.modules() if isinstance(layer, BaseTunerLayer) for one in layer.modules() if one != layer
    }
    heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES if config.task_type == TaskType.SEQ_CLS]
    if isinstance(model, PreTrainedModel):
        heads.append(model.get_output_embeddings())
    other = StructuredExperts | StructuredPointwise
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear | LoraOnStructured)
        if not isinstance(module, other) and module not in inside and not any(module is head for head in heads)
    }


# peft has no registration of a tuner for a known type, or of a type that it does not know.
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = StructuredLoraModel
PEFT_TYPE_TO_CONFIG_MAPPING[_TYPE] = StructuredAdapterConfig  # type: ignore[index]
