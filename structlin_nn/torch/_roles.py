"""Roles of the parameters of a torch model: kind, fans, and the matrices that they contain."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from structlin_nn._rates import Fans
from structlin_nn.torch._modules import is_conv1d, linear_sizes, num_experts
from structlin_nn.torch._muon import Matrices, factor_matrices
from structlin_nn.torch.linear import StructuredLinear

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
_TABLE = re.compile(
    r"((pos|position|relative_position|rel_pos|absolute_pos)(_.*|itions?)?)"
    r"|(.*(^|_)(tokens?|embed|embeds|embedding|embeddings|latents?|prompts?|table))"
)
"""Names of learned tables that are plain parameters in modules of timm and transformers."""
_BIAS = re.compile(r".*(^|_)bias(es)?(_[a-z]+)?")


class Experts(NamedTuple):
    """A parameter that contains the weights of several experts.

    ``number``: number of experts. ``transposed``: the shape is (experts, fan_in, fan_out), otherwise (experts, fan_out,
    fan_in).
    """

    number: int
    fan_in: int
    fan_out: int
    transposed: bool


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own parameters; a structured layer counts as one module, without its parameter lists."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            inside |= {*module.children(), *module.factors.modules()}  # with parametrizations of factors
            yield name, module
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def is_convolution(module: nn.Module) -> bool:
    """Return whether this is a convolution of torch."""
    return isinstance(module, _CONVOLUTIONS)


def experts(module: nn.Module) -> dict[str, Experts]:
    """Return the parameters with three axes of a mixture of experts of transformers, by name.

    Such a module has ``num_experts``, and pairs of parameters that map the features to those of the experts and back.
    The sizes of a pair determine the order of the axes. If they are ambiguous (square weights), the attribute
    ``is_transposed`` does.
    """
    count = getattr(module, "num_experts", None)
    own = dict(module.named_parameters(recurse=False))
    found = {name: tuple(p.shape) for name, p in own.items() if p.ndim == 3 and p.shape[0] == count}
    down = found.get("down_proj")
    up = found.get("gate_up_proj") or found.get("up_proj")
    if down is None or up is None:
        return {}
    gates = 2 if "gate_up_proj" in found else 1
    straight = up[1] == gates * down[2] and up[2] == down[1]
    crossed = up[2] == gates * down[1] and up[1] == down[2]
    if not (straight or crossed):
        return {}
    transposed = bool(getattr(module, "is_transposed", False)) if straight and crossed else crossed
    return {
        name: Experts(shape[0], shape[1 if transposed else 2], shape[2 if transposed else 1], transposed)
        for name, shape in found.items()
    }


def fans(module: nn.Module) -> dict[str, Fans]:
    """Return the fans of the weights of a module, by name; a structured layer has those of a dense layer."""
    if isinstance(module, StructuredLinear):
        return {"weight": Fans(module.in_features, module.out_features)}
    if (sizes := linear_sizes(module)) is not None:
        return {"weight": Fans(*sizes)}
    if isinstance(module, _CONVOLUTIONS):
        positions = math.prod(module.kernel_size)
        inside, outside = (n // module.groups for n in (module.in_channels, module.out_channels))
        return {"weight": Fans(inside * positions, outside * positions, module.groups)}
    if isinstance(module, nn.MultiheadAttention):
        sizes_in = {"in": module.embed_dim, "q": module.embed_dim, "k": module.kdim, "v": module.vdim}
        names = {f"{key}_proj_weight": Fans(size, module.embed_dim) for key, size in sizes_in.items()}
        return {name: found for name, found in names.items() if getattr(module, name) is not None}
    own: dict[str, tuple[int, ...]]
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim > 1}
    if isinstance(module, _RECURRENT):  # one matrix for each gate; weight_hr projects the hidden state
        hidden = module.hidden_size
        return {name: Fans(shape[1], shape[0] if "_hr" in name else hidden) for name, shape in own.items()}
    if isinstance(module, nn.Bilinear):
        return {"weight": Fans(module.in1_features * module.in2_features, module.out_features)}
    if found := experts(module):
        return {name: Fans(e.fan_in, e.fan_out) for name, e in found.items()}
    if _is_router(module):
        return {"weight": Fans(own["weight"][1], own["weight"][0])}
    if isinstance(module, ParametrizationList) and "original1" in own:  # weight normalisation: norms and directions
        shape = own["original1"]
        return {"original1": Fans(math.prod(shape[1:]), shape[0])}
    return {}


def _is_router(module: nn.Module) -> bool:
    """Return whether the class is, by its name, a router of experts with a weight (experts, features)."""
    weight = module._parameters.get("weight")
    return re.search(r"(Router|Gate)$", type(module).__name__) is not None and weight is not None and weight.ndim == 2


def matrices(module: nn.Module) -> dict[str, Matrices]:
    """Return the matrices in the parameters of a module for Muon, by name; Adam updates all other parameters."""
    found: dict[str, Matrices | None] = {}
    if isinstance(module, StructuredLinear):
        specs = zip(factor_matrices(module.structure), module.structure.factors, strict=True)
        found = {f"factors.{n}": m for n, m in enumerate(m for m, spec in specs if spec.trainable)}
    elif (sizes := linear_sizes(module)) is not None:
        found["weight"] = Matrices((1, 0) if is_conv1d(module) else (0, 1), 1, sizes[1], sizes[0])
    if (number := num_experts(module)) is not None:
        found = {name: m if m is None else m.stacked(number) for name, m in found.items()}
    if isinstance(module, _CONVOLUTIONS):
        positions, groups = math.prod(module.kernel_size), module.groups
        order = list(range(module.weight.ndim))
        if module.transposed:  # (inputs, outputs of a group, positions)
            order[:2] = [1, 0]
        if groups == 1 or not module.transposed:
            outside, inside = module.out_channels // groups, module.in_channels // groups * positions
            found["weight"] = Matrices(tuple(order), groups, outside, inside)
    elif isinstance(module, nn.MultiheadAttention):
        for name, own in fans(module).items():
            found[name] = Matrices((0, 1), 3 if name == "in_proj_weight" else 1, own.fan_out, own.fan_in)
    elif isinstance(module, _RECURRENT):
        for name, own in fans(module).items():
            found[name] = Matrices((0, 1), module.get_parameter(name).shape[0] // own.fan_out, own.fan_out, own.fan_in)
    elif packed := experts(module):
        for name, e in packed.items():
            found[name] = Matrices((0, 2, 1) if e.transposed else (0, 1, 2), e.number, e.fan_out, e.fan_in)
    held = dict(module.named_parameters(remove_duplicate=False))  # without pruned and parametrized ones
    return {name: m for name, m in found.items() if m is not None and name in held and not held[name].is_complex()}


def kind(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    """Return the kind of a parameter other than a weight with known fans; None if it may be a weight.

    In a module of unknown class the name determines the kind, as in timm and transformers: tables of positions, class
    tokens, biases. A parameter with at most one axis longer than 1 is a vector.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return "bias"
    if name == "bias" and parameter.ndim < 2:
        return "bias"
    if isinstance(module, _NORMS) or (parameter.ndim < 2 and type(module).__name__.endswith("Norm")):
        return "bias" if name == "bias" else "norm"
    if _TABLE.fullmatch(name):
        return "embedding"
    if parameter.numel() == max(parameter.shape, default=1):
        return "bias" if _BIAS.fullmatch(name) else "vector"
    if _BIAS.fullmatch(name):  # biases of experts, heads or positions
        return "bias"
    if name.endswith("_log") or getattr(parameter, "_no_weight_decay", False):  # parameters of the recurrence of Mamba
        return "vector"
    return None


def role_of(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Return the role of a weight that stays dense, for a report."""
    if linear_sizes(module) is not None:
        return "not chosen" if num_experts(module) is None else "not chosen, weights of experts"
    if isinstance(module, _CONVOLUTIONS):
        kernel = " x ".join(map(str, module.kernel_size))
        return f"convolution of {kernel}" + (f" in {module.groups} groups" if module.groups > 1 else "")
    if isinstance(module, nn.MultiheadAttention):
        return "packed projections of nn.MultiheadAttention"
    if isinstance(module, _RECURRENT):
        return "recurrent weight"
    if name in experts(module):
        return "weights of experts"
    if _is_router(module) and name == "weight":
        return "router of experts"
    return kind(module, name, parameter) or f"parameter of {type(module).__name__}"
