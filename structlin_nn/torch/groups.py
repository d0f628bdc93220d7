"""Parameter groups for torch optimisers, with the learning rates that the structure asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from structlin_nn._patterns import Pattern, listed
from structlin_nn._rates import (
    KINDS,
    Fans,
    ParameterRule,
    Place,
    check_arguments,
    dense_multiplier,
    factor_multipliers,
    settle,
)
from structlin_nn.torch._modules import linear_sizes
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["KINDS", "ParameterGroups", "ParameterRule", "format_groups", "parameter_groups"]

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


class ParameterGroups(list):
    """Parameter groups as torch optimisers take them: a list of dictionaries. ``print`` it for a table."""

    def __str__(self) -> str:
        return format_groups(self)


def parameter_groups(
    model: nn.Module,
    base_model: nn.Module | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    structure_aware: bool = True,
    extra_multipliers: Mapping[Pattern, float] | None = None,
    rules: Mapping[Pattern, ParameterRule] | None = None,
    decay: Collection[str] = ("factor", "weight"),
    independent_decay: bool = False,
) -> ParameterGroups:
    """Groups of the trainable parameters by learning-rate multiplier and weight decay, for a torch optimiser.

    Multipliers, on the rate ``lr`` that was tuned on the dense model at base width (muP; Qiu et al., *Compute Better
    Spent*, ICML 2024, section 3; for SGD see :mod:`structlin.scale`):

    ==========================================  ===========================================  =========================
    parameter                                   Adam, AdamW, sign                            SGD
    ==========================================  ===========================================  =========================
    factor of a :class:`StructuredLinear`       base d_in / (fan_in * number of factors)     blocks * carried
                                                                                             * (fan_out / fan_in)
                                                                                             / (base d_out / base d_in)
    weight of nn.Linear, nn.MultiheadAttention  base fan_in / fan_in                         (fan_out / fan_in)
    or a convolution                                                                         / (base fan_out / fan_in)
    embeddings, biases, norms, gains, vectors   1                                            1
    ==========================================  ===========================================  =========================

    (a grouped convolution counts its groups as blocks under SGD). With ``structure_aware=False`` all factors of a
    layer get the multiplier of the dense layer of its size: the naive rule. Under SGD, muP proper would let embeddings,
    biases and norms grow with the width; ``extra_multipliers`` can.

    Weight decay: ``weight_decay`` is the coefficient of every decayed group, as in nanoGPT and the paper's runs. AdamW
    and SGD shrink a parameter by ``learning rate * weight_decay`` in each step, so groups with larger multipliers decay
    faster. ``independent_decay=True`` divides the coefficient by the multiplier, and all decayed parameters shrink by
    ``lr * weight_decay``.

    A pattern is a glob (``*`` also runs over dots) or a compiled regular expression that matches the whole name.

    Args:
        model: the model to train. Parameters with ``requires_grad=False`` are left out.
        base_model: the same model at base width; only sizes are read, so build it on the meta device. Its layers may
            be dense or structured. None: each layer is its own base, so that dense layers have multiplier 1.
        lr: learning rate at base width.
        weight_decay: coefficient of the kinds in ``decay``.
        optimizer: whose rule: ``adam``, ``adamw``, ``sgd``, or ``sign`` (Lion, signSGD).
        structure_aware: False for the naive rule.
        extra_multipliers: further factors on the learning rate. A pattern that matches the name of a layer applies
            to its factors, weight or embedding, one that matches the full name of a parameter to that parameter.
            Several may apply; they multiply.
        rules: patterns of full parameter names with rules of their own, which go before all others (the first that
            matches counts): for parameters of unknown kinds, and for weights that are tied across kinds, by any name.
        decay: kinds of parameters (:data:`KINDS`) that are decayed.
        independent_decay: as above; not for ``adam``, whose decay goes through the gradient.

    Returns:
        A list of dictionaries with ``params``, ``lr``, ``weight_decay``, and for the reader ``multiplier`` and
        ``names``; ``print`` it for a table (:func:`format_groups`).

    Raises:
        ValueError: a parameter of two or more axes in a module of unknown kind; a parameter that several modules
            share and that their rules treat differently; modules with parameters that only one of model and base
            model has; a pattern that matches nothing; an unknown optimiser or kind; a negative rate or decay.
        TypeError: rules that are no :class:`ParameterRule`.

    >>> model = nn.Sequential(StructuredLinear(64, 64, structure="low_rank", rank=4), nn.ReLU(), nn.Linear(64, 10))
    >>> base = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).to("meta")
    >>> groups = parameter_groups(model, base, lr=1.0, weight_decay=0.1)
    >>> print(groups)
    multiplier    lr  decay  tensors  parameters  names
          0.25  0.25    0.1        1         256  0.factors.0
             4     4    0.1        1         256  0.factors.1
             1     1      0        2          74  *.bias
           0.5   0.5    0.1        1         640  2.weight
    >>> from torch.optim import AdamW
    >>> optimizer = AdamW(groups)
    """
    check_arguments(lr, weight_decay, optimizer, decay, independent_decay)
    if base_model is not None:
        _check_same_modules(model, base_model)

    def places() -> Iterator[Place]:
        for layer, module in _leaves(model):
            base = module if base_model is None else base_model.get_submodule(layer)
            yield from _places(layer, module, base, optimizer, structure_aware)

    settled = settle(places(), dict(extra_multipliers or {}), dict(rules or {}), decay)
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for p, name in trainable.items() if p not in settled]:
        raise ValueError(f"no rule reaches the parameters {listed(missed)}, which no known module holds as its own")
    return _grouped(settled, lr, weight_decay, independent_decay)


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters; a structured layer is one of them, and its parameter lists are not."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            inside |= set(module.children())
            yield name, module
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _places(layer: str, module: nn.Module, base: nn.Module, optimizer: str, structure_aware: bool) -> Iterator[Place]:
    """The parameters of a module that :func:`_leaves` gives, with their rules."""
    prefix = f"{layer}." if layer else ""
    fans, base_fans = _fans(module), _fans(base)

    def place(name: str, parameter: nn.Parameter, kind: str | None, value: float | None) -> Place:
        described = f"{prefix}{name} {tuple(parameter.shape)} of {type(module).__qualname__}"
        return Place(prefix + name, layer, parameter, kind or "unknown", value, parameter.requires_grad, described)

    if isinstance(module, StructuredLinear):
        values = factor_multipliers(module.structure, base_fans["weight"], optimizer, structure_aware)
        for number, (parameter, value) in enumerate(zip(module.factors, values, strict=True)):
            yield place(f"factors.{number}", parameter, "factor", value)
        for number, parameter in enumerate(module.gains or ()):
            yield place(f"gains.{number}", parameter, "gain", 1.0)
    for name, parameter in module.named_parameters(recurse=False):
        if name in fans:
            yield place(name, parameter, "weight", dense_multiplier(fans[name], base_fans[name], optimizer))
        else:
            kind = _kind(module, name, parameter)
            yield place(name, parameter, kind, 1.0 if kind else None)


def _fans(module: nn.Module) -> dict[str, Fans]:
    """Fans of the weights that a module holds, by their names; a structured layer's are those of a dense one."""
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
        return {name: fans for name, fans in names.items() if getattr(module, name) is not None}
    return {}


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    """Kind of a parameter that is no weight; None where it may be one."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "bias"
    if name == "bias" and parameter.ndim < 2:
        return "bias"
    if isinstance(module, _NORMS):
        return "bias" if name == "bias" else "norm"
    return "vector" if parameter.ndim < 2 else None


def _check_same_modules(model: nn.Module, base_model: nn.Module) -> None:
    ours, theirs = dict(_leaves(model)), dict(_leaves(base_model))
    if missing := [name for name in ours if name not in theirs]:
        raise ValueError(f"the base model lacks modules with parameters that the model has: {listed(missing)}")
    if surplus := [name for name in theirs if name not in ours]:
        raise ValueError(f"the base model has modules with parameters that the model lacks: {listed(surplus)}")
    for name, module in ours.items():
        base = theirs[name]
        if _fans(module).keys() != _fans(base).keys() or isinstance(module, _CONVOLUTIONS) != isinstance(
            base, _CONVOLUTIONS
        ):
            raise ValueError(
                f"module {name!r} is a {type(module).__qualname__} in the model "
                f"and a {type(base).__qualname__} in the base model"
            )


def _grouped(
    settled: Mapping[Any, tuple[str, ParameterRule]], lr: float, weight_decay: float, independent: bool
) -> ParameterGroups:
    groups: dict[ParameterRule, dict[str, Any]] = {}
    for parameter, (name, rule) in settled.items():
        coefficient = weight_decay / rule.multiplier if independent else weight_decay
        group = groups.setdefault(
            rule,
            {
                "params": [],
                "lr": lr * rule.multiplier,
                "weight_decay": coefficient if rule.decay else 0.0,
                "multiplier": rule.multiplier,
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return ParameterGroups(groups.values())


def format_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """Parameter groups as a table: a row for each group and name, in which ``*`` stands for several numbers.

    Works on the result of :func:`parameter_groups` and on ``optimizer.param_groups`` made of it.

    >>> print(format_groups(parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), lr=0.1)))
    multiplier   lr  decay  tensors  parameters  names
             1  0.1      0        2          10  *.weight
             1  0.1      0        2           4  *.bias
    """
    rows: list[tuple[str, ...]] = [("multiplier", "lr", "decay", "tensors", "parameters", "names")]
    for group in groups:
        sizes: dict[str, dict[str, int]] = {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            sizes.setdefault(pattern, {})[name] = parameter.numel()
        shared = tuple(f"{group[key]:.6g}" for key in ("multiplier", "lr", "weight_decay"))
        for pattern, counts in sizes.items():
            name = pattern if len(counts) > 1 else next(iter(counts))
            rows.append((*shared, f"{len(counts):,}", f"{sum(counts.values()):,}", name))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
