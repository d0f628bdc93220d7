"""Parameter groups for torch optimisers, with the learning rates that the structure asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from structlin.scale import OPTIMIZERS
from structlin_nn._patterns import Pattern, Patterns, as_patterns, listed, matches, show
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
from structlin_nn._text import table
from structlin_nn.torch._modules import is_conv1d, linear_sizes
from structlin_nn.torch._muon import Matrices, factor_matrices, muon_multiplier
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
    adam_lr: float | None = None,
    adam_layers: Patterns = (),
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

    With ``optimizer="muon"`` the blocks of factors and the weights are stepped by Muon, at ``lr`` times
    ``sqrt(fan_out / fan_in) / sqrt(base d_out / base d_in)``, divided by the number of factors
    (:func:`structlin_nn.torch._muon.muon_multiplier` derives it), and everything else by Adam with its multipliers, at
    ``adam_lr``: embeddings, vectors, factors that are no matrices (Toeplitz, circulant), parameters with ``rules`` of
    their own, and layers named by ``adam_layers``, which is where the head of a classifier is often left. The groups
    are made for :class:`structlin_nn.torch.Muon`.

    Weight decay: ``weight_decay`` is the coefficient of every decayed group, as in nanoGPT and the paper's runs. AdamW
    and SGD shrink a parameter by ``learning rate * weight_decay`` in each step, so groups with larger multipliers decay
    faster. ``independent_decay=True`` divides the coefficient by the multiplier, and all decayed parameters shrink by
    ``lr * weight_decay``.

    A pattern is a glob (``*`` also runs over dots) or a compiled regular expression that matches the whole name.

    Args:
        model: the model to train. Parameters with ``requires_grad=False`` are left out.
        base_model: the same model at base width; only sizes are read, so build it on the meta device. Its layers may
            be dense or structured. None: each layer is its own base, dense layers have multiplier 1, and
            ``lr`` is the rate that was tuned on the dense model of this very width.
        lr: learning rate at base width.
        weight_decay: coefficient of the kinds in ``decay``.
        optimizer: whose rule: ``adam``, ``adamw``, ``sgd``, ``sign`` (Lion, signSGD), or ``muon``.
        structure_aware: False for the naive rule.
        extra_multipliers: further factors on the learning rate. A pattern that matches the name of a layer applies
            to its factors, weight or embedding, one that matches the full name of a parameter to that parameter.
            Several may apply; they multiply.
        rules: patterns of full parameter names with rules of their own, which go before all others (the first that
            matches counts): for parameters of unknown kinds, and for weights that are tied across kinds, by any name.
        decay: kinds of parameters (:data:`KINDS`) that are decayed.
        independent_decay: as above; not for ``adam``, whose decay goes through the gradient.
        adam_lr: for ``muon``, the rate of Adam at base width; needed if anything is left to Adam.
        adam_layers: for ``muon``, patterns of layers or parameters that are left to Adam.

    Returns:
        A list of dictionaries with ``params``, ``lr``, ``weight_decay``, and for the reader ``multiplier`` and
        ``names`` (for ``muon`` also ``matrices``, None for what Adam steps); ``print`` it for a table
        (:func:`format_groups`).

    Raises:
        ValueError: a parameter of two or more axes in a module of unknown kind; a parameter that several modules
            share and that their rules treat differently; modules with parameters that only one of model and base
            model has; a pattern that matches nothing; an unknown optimiser or kind; a negative rate or decay;
            ``adam_lr`` missing or not used; ``adam_layers`` for another optimiser than ``muon``.
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
    if optimizer not in (*OPTIMIZERS, "muon"):
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join((*OPTIMIZERS, 'muon'))}")
    muon = optimizer == "muon"
    check_arguments(lr, weight_decay, "adamw" if muon else optimizer, decay, independent_decay)
    to_adam, rules = as_patterns(adam_layers), dict(rules or {})
    if not muon and (to_adam or adam_lr is not None):
        raise ValueError(f"adam_lr and adam_layers go with optimizer='muon', not with {optimizer!r}")
    if adam_lr is not None and not adam_lr >= 0:
        raise ValueError(f"adam_lr must not be negative, got {adam_lr}")
    if base_model is not None:
        _check_same_modules(model, base_model)
    unused = set(to_adam)
    held: dict[nn.Parameter, list[tuple[str, Matrices | None]]] = {}

    def places() -> Iterator[Place]:
        for layer, module in _leaves(model):
            base = module if base_model is None else base_model.get_submodule(layer)
            found = _matrices(module) if muon else {}
            for place in _places(layer, module, base, "adamw" if muon else optimizer, structure_aware):
                short = place.name.removeprefix(f"{layer}.")
                left = {p for p in to_adam if matches(p, place.name) or matches(p, layer)}
                unused.difference_update(left)
                matrices = None if left or any(matches(p, place.name) for p in rules) else found.get(short)
                if matrices is not None:
                    value = _muon_value(module, short, matrices, _fans(base), structure_aware)
                    place = replace(place, multiplier=value)
                held.setdefault(place.parameter, []).append((place.name, matrices))
                yield place

    settled = settle(places(), dict(extra_multipliers or {}), rules, decay)
    if unused:
        raise ValueError(f"adam_layers: nothing matches {listed(map(show, unused))}")
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for p, name in trainable.items() if p not in settled]:
        raise ValueError(f"no rule reaches the parameters {listed(missed)}, which no known module holds as its own")
    matrices = {parameter: _one_step(held[parameter]) for parameter in settled} if muon else None
    return _grouped(settled, lr, weight_decay, independent_decay, matrices, adam_lr)


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


def _matrices(module: nn.Module) -> dict[str, Matrices]:
    """How Muon is to see the parameters of a module, by their names; the others are left to Adam."""
    found: dict[str, Matrices | None] = {}
    if isinstance(module, StructuredLinear):
        specs = zip(factor_matrices(module.structure), module.structure.factors, strict=True)
        found = {f"factors.{n}": m for n, m in enumerate(m for m, spec in specs if spec.trainable)}
    elif (sizes := linear_sizes(module)) is not None:
        found["weight"] = Matrices((1, 0) if is_conv1d(module) else (0, 1), 1, sizes[1], sizes[0])
    elif isinstance(module, _CONVOLUTIONS):
        positions, groups = math.prod(module.kernel_size), module.groups
        order = list(range(module.weight.ndim))
        if module.transposed:  # (inputs, outputs of a group, positions)
            order[:2] = [1, 0]
        if groups == 1 or not module.transposed:
            outside, inside = module.out_channels // groups, module.in_channels // groups * positions
            found["weight"] = Matrices(tuple(order), groups, outside, inside)
    elif isinstance(module, nn.MultiheadAttention):
        for name, fans in _fans(module).items():
            found[name] = Matrices((0, 1), 3 if name == "in_proj_weight" else 1, fans.fan_out, fans.fan_in)
    parameters = {
        **dict(module.named_parameters(recurse=False)),
        **({f"factors.{n}": p for n, p in enumerate(module.factors)} if isinstance(module, StructuredLinear) else {}),
    }
    return {name: m for name, m in found.items() if m is not None and not parameters[name].is_complex()}


def _muon_value(
    module: nn.Module, name: str, matrices: Matrices, base: Mapping[str, Fans], structure_aware: bool
) -> float:
    if isinstance(module, StructuredLinear):
        (base_fans,) = base.values()
        if structure_aware:
            return muon_multiplier(matrices, base_fans.fan_in, base_fans.fan_out, len(module.factors))
        fans = Fans(module.in_features, module.out_features)
    else:
        fans, base_fans = _fans(module)[name], base[name]
    whole = Matrices((), 1, fans.fan_out, fans.fan_in)
    return muon_multiplier(whole, base_fans.fan_in, base_fans.fan_out)


def _one_step(found: list[tuple[str, Matrices | None]]) -> Matrices | None:
    """How a parameter that stands at one or several places is stepped."""
    first, matrices = found[0]
    for name, other in found[1:]:
        if other != matrices:
            raise ValueError(
                f"a shared parameter is a matrix for Muon as one of {first} and {name} and another, or none, as the "
                "other; leave it to Adam with adam_layers, or give it a rule"
            )
    return matrices


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
    settled: Mapping[Any, tuple[str, ParameterRule]],
    lr: float,
    weight_decay: float,
    independent: bool,
    matrices: Mapping[Any, Matrices | None] | None,
    adam_lr: float | None,
) -> ParameterGroups:
    """``matrices``: for Muon, those of its parameters and None for those that Adam steps."""
    groups: dict[tuple[ParameterRule, bool], dict[str, Any]] = {}
    left = [] if matrices is None else [name for p, (name, _) in settled.items() if matrices[p] is None]
    if left and adam_lr is None:
        raise ValueError(f"adam_lr is needed: Adam steps {listed(left)}")
    if adam_lr is not None and not left:
        raise ValueError(f"adam_lr={adam_lr} is not used: Muon steps all parameters")
    for parameter, (name, rule) in settled.items():
        by_adam = matrices is not None and matrices[parameter] is None
        rate = adam_lr if by_adam and adam_lr is not None else lr
        coefficient = weight_decay / rule.multiplier if independent else weight_decay
        group = groups.setdefault(
            (rule, by_adam),
            {
                "params": [],
                "lr": rate * rule.multiplier,
                "weight_decay": coefficient if rule.decay else 0.0,
                "multiplier": rule.multiplier,
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        if matrices is not None:
            group.setdefault("matrices", None if by_adam else [])
            if not by_adam:
                group["matrices"].append(matrices[parameter])
    return ParameterGroups(groups.values())


def format_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """Parameter groups as a table: a row for each group and name, in which ``*`` stands for several numbers.

    Works on the result of :func:`parameter_groups` and on ``optimizer.param_groups`` made of it.

    >>> print(format_groups(parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), lr=0.1)))
    multiplier   lr  decay  tensors  parameters  names
             1  0.1      0        2          10  *.weight
             1  0.1      0        2           4  *.bias
    """
    rows: list[tuple[str, ...]] = []
    for group in groups:
        sizes: dict[str, dict[str, int]] = {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            sizes.setdefault(pattern, {})[name] = parameter.numel()
        shared = tuple(f"{group[key]:.6g}" for key in ("multiplier", "lr", "weight_decay"))
        for pattern, counts in sizes.items():
            name = pattern if len(counts) > 1 else next(iter(counts))
            rows.append((*shared, f"{len(counts):,}", f"{sum(counts.values()):,}", name))
    return table(("multiplier", "lr", "decay", "tensors", "parameters", "names"), rows, left=-1, rule=False)
