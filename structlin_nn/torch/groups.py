"""Parameter groups for torch optimisers, with the learning rates that the structure asks for."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
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
    check_number,
    dense_multiplier,
    factor_multipliers,
    settle,
)
from structlin_nn._text import table
from structlin_nn.torch._modules import check_model
from structlin_nn.torch._muon import Matrices, muon_multiplier
from structlin_nn.torch._roles import fans as fans_of
from structlin_nn.torch._roles import is_convolution, leaves
from structlin_nn.torch._roles import kind as kind_of
from structlin_nn.torch._roles import matrices as matrices_of
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["KINDS", "ParameterGroups", "ParameterRule", "format_groups", "parameter_groups"]


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
    """Group the trainable parameters by learning-rate multiplier and weight decay, for a torch optimiser.

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

    (a grouped convolution counts its groups as blocks under SGD). Weights of recurrent layers, of experts (parameters
    of three axes, as transformers holds them) and of their routers are weights too, with the fans of one gate or one
    expert. Tables that a module holds as a bare parameter, such as class tokens, positions and biases by relative
    position, are known by their names as embeddings or biases. A weight that an embedding shares with a linear layer
    (a tied head) is an embedding, and Adam's under Muon. Any other parameter has multiplier 1 if it has the same size
    at base width, or if there is no base model; else it needs one of ``rules``. With ``structure_aware=False`` all
    factors of a layer get the multiplier of the dense layer of its size: the naive rule. Under SGD, muP proper would
    let embeddings, biases and norms grow with the width; ``extra_multipliers`` can.

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

    Parameters
    ----------
    model
        The model to train. Parameters with ``requires_grad=False`` are left out.
    base_model
        The same model at base width; only sizes are read, so build it on the meta device. Its layers may be dense or
        structured. None: each layer is its own base, dense layers have multiplier 1, and ``lr`` is the rate that was
        tuned on the dense model of this very width.
    lr
        Learning rate at base width.
    weight_decay
        Coefficient of the kinds in ``decay``.
    optimizer
        Whose rule: ``adam``, ``adamw``, ``sgd``, ``sign`` (Lion, signSGD), or ``muon``.
    structure_aware
        False for the naive rule.
    extra_multipliers
        Further factors on the learning rate. A pattern that matches the name of a layer applies to its factors, weight
        or embedding, one that matches the full name of a parameter to that parameter. Several may apply; they multiply.
    rules
        Patterns of full parameter names with rules of their own, which go before all others (the first that matches
        counts): for parameters of unknown kinds, and for weights that are tied across kinds, by any name.
    decay
        Kinds of parameters (:data:`KINDS`) that are decayed.
    independent_decay
        As above; not for ``adam``, whose decay goes through the gradient.
    adam_lr
        For ``muon``, the rate of Adam at base width; needed if anything is left to Adam.
    adam_layers
        For ``muon``, patterns of layers or parameters that are left to Adam.

    Returns
    -------
    ParameterGroups
        A list of dictionaries with ``params``, ``lr``, ``weight_decay``, and for the reader ``multiplier``, ``base_lr``
        (``lr`` is their product), ``optimizer`` and ``names`` (for ``muon`` also ``matrices``, None for what Adam
        steps); ``print`` it for a table (:func:`format_groups`). Rates and decay of the groups go before those that the
        optimiser is given. Schedulers that set a rate of their own (one cycle, cosine with a least rate) lose the
        multipliers: :func:`structlin_nn.torch.with_multipliers` keeps them. The steps of an optimiser warn where rates
        are lost (:class:`structlin_nn.torch.RatesWarning`).

    Raises
    ------
    ValueError
        A parameter of two or more axes in a module of unknown kind, whose size is another at base width; a parameter
        that several modules share and that their rules treat differently; modules with parameters that only one of
        model and base model has; a pattern that matches nothing; an unknown optimiser or kind; a negative rate or
        decay; ``adam_lr`` missing or not used; ``adam_layers`` for another optimiser than ``muon``.
    TypeError
        A model that is none; rates that are no numbers; rules that are no :class:`ParameterRule`.

    Examples
    --------
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
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer must be one of {', '.join((*OPTIMIZERS, 'muon'))}, whose rule applies, got {optimizer!r}"
        )
    if optimizer not in (*OPTIMIZERS, "muon"):
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join((*OPTIMIZERS, 'muon'))}")
    check_model(model, "parameter_groups")
    if base_model is not None:
        check_model(base_model, "parameter_groups, as base_model,")
    muon = optimizer == "muon"
    check_arguments(lr, weight_decay, "adamw" if muon else optimizer, decay, independent_decay)
    to_adam, rules = as_patterns(adam_layers), dict(rules or {})
    if not muon and (to_adam or adam_lr is not None):
        raise ValueError(f"adam_lr and adam_layers go with optimizer='muon', not with {optimizer!r}")
    if adam_lr is not None:
        check_number(adam_lr, "adam_lr")
    if adam_lr is not None and not adam_lr >= 0:
        raise ValueError(f"adam_lr must not be negative, got {adam_lr}")
    if base_model is not None:
        _check_same_modules(model, base_model)
    unused = set(to_adam)
    held: dict[Hashable, list[tuple[str, Matrices | None]]] = {}
    tables: set[Hashable] = set()

    def places() -> Iterator[Place]:
        for layer, module in leaves(model):
            base = module if base_model is None else base_model.get_submodule(layer)
            found = matrices_of(module) if muon else {}
            for place in _places(layer, module, base, "adamw" if muon else optimizer, structure_aware):
                short = place.name.removeprefix(f"{layer}.")
                left = {p for p in to_adam if matches(p, place.name) or matches(p, layer)}
                unused.difference_update(left)
                matrices = None if left or any(matches(p, place.name) for p in rules) else found.get(short)
                if matrices is not None:
                    value = _muon_value(module, short, matrices, fans_of(base), structure_aware)
                    place = replace(place, multiplier=value)
                held.setdefault(place.parameter, []).append((place.name, matrices))
                if place.kind == "embedding":
                    tables.add(place.parameter)
                yield place

    settled = settle(places(), dict(extra_multipliers or {}), rules, decay)
    if unused:
        raise ValueError(f"adam_layers: nothing matches {listed(map(show, unused))}")
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for p, name in trainable.items() if p not in settled]:
        raise ValueError(f"no rule reaches the parameters {listed(missed)}, which no known module holds as its own")
    matrices = {p: None if p in tables else _one_step(held[p]) for p in settled} if muon else None
    groups = _grouped(settled, lr, weight_decay, independent_decay, matrices, adam_lr)
    for group in groups:
        group["optimizer"] = optimizer
    return groups


def _places(layer: str, module: nn.Module, base: nn.Module, optimizer: str, structure_aware: bool) -> Iterator[Place]:
    """Return the parameters of a module from :func:`leaves`, with their rules."""
    prefix = f"{layer}." if layer else ""
    fans, base_fans = fans_of(module), fans_of(base)

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
            kind = kind_of(module, name, parameter)
            if kind is None and _keeps_its_size(base, name, parameter):
                kind = "weight"
            yield place(name, parameter, kind, 1.0 if kind else None)


def _keeps_its_size(base: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has the sizes that it has at base width, and so the rate."""
    other = base._parameters.get(name)
    return other is not None and other.shape == parameter.shape


def _muon_value(
    module: nn.Module, name: str, matrices: Matrices, base: Mapping[str, Fans], structure_aware: bool
) -> float:
    if isinstance(module, StructuredLinear):
        (base_fans,) = base.values()
        if structure_aware:
            return muon_multiplier(matrices, base_fans.fan_in, base_fans.fan_out, len(module.factors))
        fans = Fans(module.in_features, module.out_features)
    else:
        fans, base_fans = fans_of(module)[name], base[name]
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


def _check_same_modules(model: nn.Module, base_model: nn.Module) -> None:
    ours, theirs = dict(leaves(model)), dict(leaves(base_model))
    if missing := [name for name in ours if name not in theirs]:
        raise ValueError(f"the base model lacks modules with parameters that the model has: {listed(missing)}")
    if surplus := [name for name in theirs if name not in ours]:
        raise ValueError(f"the base model has modules with parameters that the model lacks: {listed(surplus)}")
    for name, module in ours.items():
        base = theirs[name]
        if fans_of(module).keys() != fans_of(base).keys() or _is_other(module, base):
            raise ValueError(
                f"module {name!r} is a {type(module).__qualname__} in the model "
                f"and a {type(base).__qualname__} in the base model"
            )


def _is_other(module: nn.Module, base: nn.Module) -> bool:
    """Whether one of two is a convolution, and the other neither that nor a structured layer."""
    kinds = [None if isinstance(one, StructuredLinear) else is_convolution(one) for one in (module, base)]
    return None not in kinds and kinds[0] != kinds[1]


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
        coefficient = weight_decay / rule.multiplier if independent and rule.multiplier else weight_decay
        group = groups.setdefault(
            (rule, by_adam),
            {
                "params": [],
                "lr": rate * rule.multiplier,
                "weight_decay": coefficient if rule.decay else 0.0,
                "multiplier": rule.multiplier,
                "base_lr": rate,
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

    Examples
    --------
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
