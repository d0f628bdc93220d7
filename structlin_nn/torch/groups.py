"""Parameter groups for torch optimisers, with the learning rates that the structure asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import structlin
from structlin.scale import OPTIMIZERS
from structlin_nn.torch._modules import Pattern, linear_sizes, listed, matches, show
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["KINDS", "ParameterGroups", "ParameterRule", "format_groups", "parameter_groups"]

KINDS = ("factor", "weight", "embedding", "bias", "norm", "gain", "vector")
"""Kinds of parameters: factors of structured layers; weights of dense layers and convolutions; embeddings; biases;
weights of normalisation layers; gains of capped factors; all others that have at most one axis."""

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class ParameterRule:
    """A rule given by hand: learning-rate multiplier, and whether weight decay applies."""

    multiplier: float
    decay: bool = False

    def __post_init__(self) -> None:
        _check_multiplier(self.multiplier, "a ParameterRule")
        if not isinstance(self.decay, bool):
            raise TypeError(f"decay must be True or False, got {self.decay!r}")


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
    _check_arguments(lr, weight_decay, optimizer, decay, independent_decay)
    extra, rules = dict(extra_multipliers or {}), dict(rules or {})
    for pattern, value in extra.items():
        _check_multiplier(value, f"extra_multipliers[{show(pattern)}]")
    for pattern, given in rules.items():
        if not isinstance(given, ParameterRule):
            raise TypeError(f"rules[{show(pattern)}] must be a ParameterRule, got {given!r}")
    if base_model is not None:
        _check_same_modules(model, base_model)

    found: dict[nn.Parameter, _Found] = {}
    unused = {*extra, *rules}
    uncovered: dict[nn.Parameter, str] = {}
    for layer, module in _leaves(model):
        base = module if base_model is None else base_model.get_submodule(layer)
        for place in _places(layer, module, base, optimizer, structure_aware):
            by_hand = [pattern for pattern in rules if matches(pattern, place.name)]
            factors = [p for p in extra if matches(p, place.name) or (place.is_matrix and matches(p, layer))]
            unused.difference_update(by_hand, factors)
            if not place.parameter.requires_grad:
                continue
            entry = found.setdefault(place.parameter, _Found())
            entry.extra |= dict.fromkeys(factors)
            if by_hand:
                entry.by_hand[place.name] = rules[by_hand[0]]
            elif place.multiplier is not None:
                entry.derived[place.name] = ParameterRule(place.multiplier, place.kind in decay)
            else:
                uncovered[place.parameter] = (
                    f"{place.name} {tuple(place.parameter.shape)} of {type(module).__qualname__}"
                )
    if missing := [what for parameter, what in uncovered.items() if not found[parameter].by_hand]:
        raise ValueError(
            f"no rule covers the parameters {listed(missing)}; give rules={{pattern: ParameterRule(multiplier, "
            "decay)}, with multiplier 1 for embeddings and whatever else has a fan-in that does not grow with the width"
        )
    if unused:
        raise ValueError(f"nothing matches {listed(map(show, unused))}")
    return _grouped(_settled(found, extra, model), lr, weight_decay, independent_decay)


@dataclass
class _Found:
    """What is known of a parameter: its rules, by each of its names, and the extra multipliers that apply."""

    by_hand: dict[str, ParameterRule] = field(default_factory=dict)
    derived: dict[str, ParameterRule] = field(default_factory=dict)
    extra: dict[Pattern, None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """A parameter where a module holds it; ``multiplier`` is None where no rule covers it."""

    name: str
    parameter: nn.Parameter
    kind: str
    multiplier: float | None

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("factor", "weight", "embedding")


@dataclass(frozen=True)
class _Fans:
    fan_in: int
    fan_out: int
    blocks: int = 1


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters; a structured layer is one of them, and its parameter lists are not."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            inside |= set(module.children())
            yield name, module
        elif module not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _places(layer: str, module: nn.Module, base: nn.Module, optimizer: str, structure_aware: bool) -> Iterator[_Place]:
    """The parameters of a module that :func:`_leaves` gives, with their rules."""
    prefix = f"{layer}." if layer else ""
    fans, base_fans = _fans(module), _fans(base)
    if isinstance(module, StructuredLinear):
        values = _factor_multipliers(module, base_fans["weight"], optimizer, structure_aware)
        for number, (parameter, value) in enumerate(zip(module.factors, values, strict=True)):
            yield _Place(f"{prefix}factors.{number}", parameter, "factor", value)
        for number, parameter in enumerate(module.gains or ()):
            yield _Place(f"{prefix}gains.{number}", parameter, "gain", 1.0)
    for name, parameter in module.named_parameters(recurse=False):
        if name in fans:
            yield _Place(prefix + name, parameter, "weight", _multiplier(fans[name], base_fans[name], optimizer))
        else:
            kind = _kind(module, name, parameter)
            yield _Place(prefix + name, parameter, kind or "unknown", 1.0 if kind else None)


def _fans(module: nn.Module) -> dict[str, _Fans]:
    """Fans of the weights that a module holds, by their names; a structured layer's are those of a dense one."""
    if isinstance(module, StructuredLinear):
        return {"weight": _Fans(module.in_features, module.out_features)}
    if (sizes := linear_sizes(module)) is not None:
        return {"weight": _Fans(*sizes)}
    if isinstance(module, _CONVOLUTIONS):
        positions = math.prod(module.kernel_size)
        inside, outside = (n // module.groups for n in (module.in_channels, module.out_channels))
        return {"weight": _Fans(inside * positions, outside * positions, module.groups)}
    if isinstance(module, nn.MultiheadAttention):
        sizes_in = {"in": module.embed_dim, "q": module.embed_dim, "k": module.kdim, "v": module.vdim}
        names = {f"{key}_proj_weight": _Fans(size, module.embed_dim) for key, size in sizes_in.items()}
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


def _factor_multipliers(
    layer: StructuredLinear, base: _Fans, optimizer: str, structure_aware: bool
) -> tuple[float, ...]:
    if not structure_aware:
        return (_multiplier(_fans(layer)["weight"], base, optimizer),) * len(layer.factors)
    structure = layer.structure
    values = structlin.lr_multipliers(structure, optimizer=optimizer, base_d_in=base.fan_in, base_d_out=base.fan_out)
    return tuple(value for value, factor in zip(values, structure.factors, strict=True) if factor.trainable)


def _multiplier(fans: _Fans, base: _Fans, optimizer: str) -> float:
    dense = structlin.design("dense", (fans.fan_out, fans.fan_in))
    (value,) = structlin.lr_multipliers(dense, optimizer=optimizer, base_d_in=base.fan_in, base_d_out=base.fan_out)
    return value * (fans.blocks / base.blocks) if optimizer == "sgd" else value


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


def _settled(
    found: Mapping[nn.Parameter, _Found], extra: Mapping[Pattern, float], model: nn.Module
) -> dict[nn.Parameter, tuple[str, ParameterRule]]:
    """One name and one rule for each trainable parameter; ValueError where some parameter has none or several."""
    settled = {}
    for parameter, entry in found.items():
        rules = entry.by_hand or entry.derived
        name, rule = next(iter(rules.items()))
        if any(other != rule for other in rules.values()):
            told = "; ".join(f"{n}: multiplier {r.multiplier:g}, decay {r.decay}" for n, r in rules.items())
            raise ValueError(
                f"a shared parameter has several rules ({told}); give one with rules={{{name!r}: ParameterRule(...)}}"
            )
        multiplier = math.prod((extra[pattern] for pattern in entry.extra), start=rule.multiplier)
        settled[parameter] = name, ParameterRule(multiplier, rule.decay)
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for p, name in trainable.items() if p not in settled]:
        raise ValueError(f"no rule reaches the parameters {listed(missed)}, which no known module holds as its own")
    return settled


def _grouped(
    settled: Mapping[nn.Parameter, tuple[str, ParameterRule]], lr: float, weight_decay: float, independent: bool
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


def _check_arguments(
    lr: float, weight_decay: float, optimizer: str, decay: Collection[str], independent_decay: bool
) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}")
    if isinstance(decay, str) or (unknown := [kind for kind in decay if kind not in KINDS]):
        wrong = repr(decay) if isinstance(decay, str) else listed(map(repr, unknown))
        raise ValueError(f"decay must be a collection of {', '.join(KINDS)}, got {wrong}")
    if independent_decay and optimizer == "adam":
        raise ValueError(
            "independent_decay needs an optimizer that subtracts the decay from the parameter (adamw, sgd, sign); "
            "adam adds it to the gradient and then divides by the gradient's size"
        )


def _check_multiplier(value: float, what: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a multiplier must be positive and finite, got {value!r} in {what}")


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
