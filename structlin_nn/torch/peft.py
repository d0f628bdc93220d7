"""Adapters of peft on structured layers, and adapters whose update is a structured matrix.

peft adds a trained update to a frozen layer: ``y = W x + b + scale * U x``. LoRA's U has low rank. Here W may be a
structured layer, and U any registered structure: Monarch, Block Tensor-Train, Kronecker. peft finds the classes of this
module through the custom modules that a LoRA configuration may register, so that ``get_peft_model``,
``save_pretrained``, several adapters, merging and disabling work as they do for LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

import structlin
from structlin_nn._rates import check_number
from structlin_nn.torch._modules import is_conv1d
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["LoraOnStructured", "StructuredAdapter", "StructuredAdapterConfig", "lora_config"]


class LoraOnStructured(LoraLinear):
    """LoRA whose base is a :class:`StructuredLinear`.

    The sum of a structured matrix and one of low rank has no such structure. So merging puts an ``nn.Linear`` of the
    sum in the place of the base layer, and unmerging puts the very base layer back.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, by default the active ones."""
        base = self.get_base_layer()
        if isinstance(base, StructuredLinear):
            dense = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            dense.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            if base.bias is not None:
                dense.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
            object.__setattr__(self, "_kept", base)  # not a submodule: its factors are in no state dictionary meanwhile
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
    """An update ``scale * U`` with a structured matrix U, on an nn.Linear, a Conv1D or a StructuredLinear.

    U starts at zero, for its last factor does. Made by peft from a :class:`StructuredAdapterConfig`.
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
        """Return what merging adds to the weight of the base layer."""
        delta: Tensor = self.scaling[adapter] * self.lora_B[adapter].weight
        return delta.mT if is_conv1d(self.get_base_layer()) else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
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
    """Adapters with structured updates, for ``peft.get_peft_model``.

    Of the options of ``LoraConfig`` those that say where adapters go (``target_modules``, ``modules_to_save``, ...) and
    ``lora_dropout`` apply; ``r`` and ``lora_alpha`` do not.

    Parameters
    ----------
    structure
        Name of a registered structure; ``low_rank`` is LoRA.
    structure_options
        Its options, as ``{"blocks": 4}``.
    scale
        Factor on the update.

    Raises
    ------
    ValueError
        An unknown structure, or an option that it does not have.
    TypeError
        A scale that is no number.

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
        self._register_custom_module(dict.fromkeys(_bases(), StructuredAdapter))


def lora_config(**options: Any) -> LoraConfig:
    """Return a ``peft.LoraConfig`` by which structured layers get LoRA too; layers of other kinds get it as ever.

    ``PeftModel.from_pretrained`` of such adapters needs one as ``config``, too:
    ``lora_config(**{...})`` with the options that they were made with.

    Examples
    --------
    >>> lora_config(r=4, target_modules=["c_fc"]).r
    4
    """
    config = LoraConfig(**options)
    config._register_custom_module({StructuredLinear: LoraOnStructured})
    return config


def _bases() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return StructuredLinear, nn.Linear, Conv1D
