"""Linear layers in place of weights that a module packs into one parameter.

Such modules are experts of transformers and nn.MultiheadAttention. Linear layers can be replaced and projected and have
learning rates of their own; a parameter with the weights of all experts, or of three projections, cannot. The output of
the model does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn.torch._modules import changed, check_model, dense_layer, places_of, put
from structlin_nn.torch._roles import experts
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["Attention", "ExpertLayers", "pack_linear", "unpack_linear"]


class _Unpacked(nn.Module):
    """Base of modules with linear layers, which keep a copy, without values, of the module that they replace."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        empty: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in packed.parameters()
        }
        object.__setattr__(self, "_shell", copy.deepcopy(packed, empty))  # no submodule
        self.train(packed.training)

    def _values(self) -> dict[str, Tensor]:
        """Return the values of the packed parameters, by name."""
        raise NotImplementedError

    def packed(self) -> nn.Module:
        """Return the module with packed parameters that has the values of these layers."""
        shell: Any = copy.deepcopy(self._shell)
        for name, value in self._values().items():
            owner, _, key = name.rpartition(".")
            setattr(shell.get_submodule(owner), key, _copied(value, shell.get_parameter(name).requires_grad))
        return shell.train(self.training)


def _copied(value: Tensor, trained: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), trained)


def _layer(experts: int | None, weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    """Return a linear layer, or those of experts, with copies of these values."""
    made: Any = dense_layer(experts, weight.shape[-1], weight.shape[-2], bias is not None, weight.dtype)
    made.weight = _copied(weight, like.requires_grad)
    if bias is not None:
        made.bias = _copied(bias, like.requires_grad)
    return made


class ExpertLayers(_Unpacked):
    """Experts of transformers with one layer for each packed weight: :class:`ExpertLinear`, or a structured one.

    Each expert computes the tokens that chose it, and no others.
    """

    num_experts: int
    act_fn: nn.Module

    def __init__(self, packed: nn.Module) -> None:
        super().__init__(packed)
        _exclude_from_graphs()
        self._kind: Any = type(packed)
        for name, value in vars(packed).items():
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)
        for name, child in packed.named_children():
            self.add_module(name, child)
        self._forms = experts(packed)
        for name, form in self._forms.items():
            weight, bias = packed.get_parameter(name), packed._parameters.get(f"{name}_bias")
            self.add_module(name, _layer(form.number, weight.mT if form.transposed else weight, bias, weight))

    def _values(self) -> dict[str, Tensor]:
        values = {}
        for name, form in self._forms.items():
            layer: Any = self.get_submodule(name)
            values[name] = layer.weight.mT if form.transposed else layer.weight
            if layer.bias is not None:
                values[f"{name}_bias"] = layer.bias
        return values

    def __setstate__(self, state: dict[str, Any]) -> None:
        _exclude_from_graphs()
        super().__setstate__(state)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts to (tokens, features); indices and weights of the experts have shape (tokens, k)."""
        chosen = top_k_index.flatten()
        sizes = self._sizes(chosen)
        order = chosen.argsort(stable=True)[: sum(sizes)]  # larger indices stand for experts elsewhere
        token = order // top_k_index.shape[1]
        gated = "gate_up_proj" in self._forms
        hidden = self.get_submodule("gate_up_proj" if gated else "up_proj")(hidden_states[token], sizes)
        hidden = self._kind._apply_gate(self, hidden) if gated else self.act_fn(hidden)
        z = self.get_submodule("down_proj")(hidden, sizes) * top_k_weights.flatten()[order, None]
        # A sum over the k experts of a token by index_add_ would have no fixed order on a GPU.
        parts = z.new_zeros(len(chosen), z.shape[1]).index_copy(0, order, z).to(hidden_states.dtype)
        return parts.view(*top_k_index.shape, z.shape[1]).sum(1)

    def _sizes(self, chosen: Tensor) -> list[int]:
        """Return the number of times that each expert is chosen; without values, as if all were equal."""
        if chosen.is_meta:
            return [len(chosen) // self.num_experts + (e < len(chosen) % self.num_experts)
                    for e in range(self.num_experts)]  # fmt: skip
        return chosen.bincount(minlength=self.num_experts)[: self.num_experts].tolist()


@cache
def _exclude_from_graphs() -> None:
    """Exclude experts from torch.compile, because the sizes of the groups differ from call to call.

    This is done with the first module, because it imports the compiler, which takes seconds.
    """
    ExpertLayers.forward = torch.compiler.disable(ExpertLayers.forward)  # type: ignore[method-assign]


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Attention(_Unpacked):
    """nn.MultiheadAttention with linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    It has neither ``add_bias_kv`` nor ``add_zero_attn``.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__(packed)
        self.embed_dim, self.num_heads, self.head_dim = packed.embed_dim, packed.num_heads, packed.head_dim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        self.in_proj_bias = None  # disables the fused path of torch's Transformer
        self._qkv_same_embed_dim = packed._qkv_same_embed_dim
        biases = [None] * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        for number, (name, bias) in enumerate(zip(_PROJECTIONS, biases, strict=True)):
            held = packed.in_proj_weight if self._qkv_same_embed_dim else packed.get_parameter(f"{name}_weight")
            weight = held.chunk(3)[number] if self._qkv_same_embed_dim else held
            self.add_module(name, _layer(None, weight, bias, held))
        self.out_proj: Any = _layer(None, packed.out_proj.weight, packed.out_proj.bias, packed.out_proj.weight)

    def _values(self) -> dict[str, Tensor]:
        layers: dict[str, Any] = {name: self.get_submodule(name) for name in _PROJECTIONS}
        values: dict[str, Tensor] = {"out_proj.weight": self.out_proj.weight}
        if self._qkv_same_embed_dim:
            values["in_proj_weight"] = torch.cat([layer.weight for layer in layers.values()])
        else:
            values |= {f"{name}_weight": layer.weight for name, layer in layers.items()}
        if self.out_proj.bias is not None:
            values["out_proj.bias"] = self.out_proj.bias
            values["in_proj_bias"] = torch.cat([layer.bias for layer in layers.values()])
        return values

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Compute attention as nn.MultiheadAttention does, with the same arguments and results."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        single = query.ndim == 2
        parts = [part[None] if single else part if self.batch_first else part.transpose(0, 1)
                 for part in (query, key, value)]  # fmt: skip
        q, k, v = (
            self.get_submodule(name)(part).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for name, part in zip(_PROJECTIONS, parts, strict=True)
        )
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        padding = _additive(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / self.head_dim**0.5
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        if single:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module can be unpacked: the roles of its parameters are known, and its gate can be called."""
    if type(module) is nn.MultiheadAttention:
        return module.bias_k is None and not module.add_zero_attn
    if isinstance(module, ExpertLayers) or not (found := experts(module)):
        return False
    own = {name for name, _ in module.named_parameters()}
    gated = "gate_up_proj" not in found or hasattr(type(module), "_apply_gate")
    return gated and own <= {*found, *(f"{name}_bias" for name in found)}


def _is_replaced(module: nn.Module) -> bool:
    return any(isinstance(inside, StructuredLinear) for inside in module.modules())


def unpack_linear(model: nn.Module, inside: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Replace modules that pack weights into one parameter by modules with linear layers, in place.

    Experts of transformers are replaced by :class:`ExpertLayers`, and ``nn.MultiheadAttention`` by :class:`Attention`,
    with the same values. The output of the model does not change. Modules that share parameters with others are not
    replaced. The result has the replaced modules by name. :func:`pack_linear` is the inverse.

    Parameters
    ----------
    model
        Any module.
    inside
        Names of layers. Only modules that contain one of them are replaced. Default: all.

    Examples
    --------
    >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    >>> list(unpack_linear(model)), model["attention"].q_proj
    (['attention'], Linear(in_features=8, out_features=8, bias=True))
    """
    check_model(model, "unpack_linear")
    places = {
        module: [n for n in names if n and (inside is None or any(one.startswith(f"{n}.") for one in inside))]
        for module, names in places_of(model, _is_packed).items()
    }
    users: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(module)
    done: dict[str, nn.Module] = {}
    for module, names in places.items():
        if not names or any(len(users[parameter]) > 1 for parameter in module.parameters()):
            continue
        made = Attention(module) if isinstance(module, nn.MultiheadAttention) else ExpertLayers(module)
        put(model, names, made)
        done |= dict.fromkeys(names, module)
    return done


@contextmanager
def unpacked(model: nn.Module, wanted: bool) -> Iterator[Callable[[], None]]:
    """Unpack modules if ``wanted``, and restore them if the block raises an error.

    The context manager returns a function that restores the modules without structured layers.
    """
    done = unpack_linear(model) if wanted else {}

    def restore(everything: bool = False) -> None:
        for name, old in done.items():
            if everything or not _is_replaced(model.get_submodule(name)):
                put(model, [name], old)

    try:
        yield restore
    except BaseException:
        restore(everything=True)
        raise


def pack_linear(model: nn.Module) -> tuple[str, ...]:
    """Restore, in place, the packed modules that :func:`unpack_linear` replaced, if all their layers are dense.

    The result has their names.

    Examples
    --------
    >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    >>> _ = unpack_linear(model)
    >>> pack_linear(model), type(model["attention"]).__name__
    (('attention',), 'MultiheadAttention')
    """
    check_model(model, "pack_linear")
    places = places_of(model, lambda module: isinstance(module, _Unpacked) and not _is_replaced(module))
    for module, names in places.items():
        put(model, names, module.packed())
    changed(model)
    return tuple(names[0] for names in places.values())
