"""Adapters of peft on structured layers, and adapters whose update is a structured matrix.

peft adds a trained update to a frozen layer: ``y = W x + b + scale * U x``. In LoRA, U has low rank. Here W may be a
structured layer, and U any registered structure, such as Monarch, Block Tensor-Train or Kronecker. The classes of this
module are registered as custom modules of a LoRA configuration. So ``get_peft_model``, ``save_pretrained``, several
adapters, merging and disabling work as for LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import structlin
from structlin_nn._rates import check_number
from structlin_nn.torch._modules import is_conv1d
from structlin_nn.torch.experts import StructuredExperts
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["LoraOnStructured", "StructuredAdapter", "StructuredAdapterConfig", "lora_config"]


class LoraOnStructured(LoraLinear):
    """LoRA adapter of a :class:`StructuredLinear`.

    The sum of a structured matrix and one of low rank does not have the structure. So merging replaces the base layer
    by an ``nn.Linear`` of the sum, and unmerging restores the base layer.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        if isinstance(base_layer, StructuredExperts):
            raise ValueError(
                "adapters on StructuredExperts are not supported: each token has several experts, and an adapter one "
                "update; leave layers of experts out of target_modules"
            )
        super().__init__(base_layer, *args, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer, by default the active ones."""
        base = self.get_base_layer()
        if isinstance(base, StructuredLinear):
            dense = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            dense.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            if base.bias is not None:
                dense.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
            object.__setattr__(self, "_kept", base)  # not a submodule: not in the state dict
            self.base_layer, self.fan_in_fan_out = dense.train(base.training), False
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Undo all merges."""
        kept = getattr(self, "_kept", None)
        if kept is None:
            super().unmerge()
            return
        self.merged_adapters.clear()
        self.base_layer = kept
        object.__setattr__(self, "_kept", None)


class StructuredAdapter(LoraOnStructured):
    """Update ``scale * U`` with a structured matrix U, for an nn.Linear, a Conv1D or a StructuredLinear.

    The last factor of U is initialised with zeros, so U is zero at first. peft creates the adapter from a
    :class:`StructuredAdapterConfig`.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
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
        self.set_adapter(self.active_adapters, inference_mode=kwargs.get("inference_mode", False))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the matrix that merging adds to the weight of the base layer."""
        delta: Tensor = self.scaling[adapter] * self.lora_B[adapter].weight
        return delta.mT if is_conv1d(self.get_base_layer()) else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters: (..., in_features) -> (..., out_features)."""
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lora_B:
                update: Any = self.lora_B[name]
                inside = self.lora_dropout[name](x).to(update.factors[0].dtype)
                y = y + (self.scaling[name] * update(inside)).to(y.dtype)
        return y


@dataclass
class StructuredAdapterConfig(LoraConfig):
    """Configuration of adapters with structured updates, for ``peft.get_peft_model``.

    It uses the options of ``LoraConfig`` that select modules (``target_modules``, ``modules_to_save``, ...), and
    ``lora_dropout``. It does not use ``r`` and ``lora_alpha``.

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
        self._register_custom_module(dict.fromkeys((StructuredLinear, nn.Linear, Conv1D), StructuredAdapter))


def lora_config(**options: Any) -> LoraConfig:
    """Return a ``peft.LoraConfig`` with which structured layers get LoRA adapters, like layers of other kinds.

    Pass such a configuration as ``config`` to ``PeftModel.from_pretrained`` too, with the options of the saved
    adapters.

    Examples
    --------
    >>> lora_config(r=4, target_modules=["c_fc"]).r
    4
    """
    config = LoraConfig(**options)
    config._register_custom_module({StructuredLinear: LoraOnStructured})
    return config
